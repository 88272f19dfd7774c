//! The guest's cgroups: PID 1's own, and one for each container below the containers' one.

pub mod freezer;
pub mod limits;
pub mod oom;
pub mod stats;
pub mod tree;
mod watch;

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::timeout;

use watch::Watched;

/// Where cgroup2 is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
/// PID 1's own, with its workers.
pub const OWN: &str = "/sys/fs/cgroup/husk";
/// The supervisor agent's, with what it starts; only there while it runs.
pub const SUPERVISOR: &str = "/sys/fs/cgroup/supervisor";
/// The containers' parent.
pub const CONTAINERS: &str = "/sys/fs/cgroup/containers";
/// Of a guest in debug mode: what runs in the guest itself, each in a group of its own.
pub const DEBUG: &str = "/sys/fs/cgroup/debug";

/// Memory that reclaim leaves to PID 1 (`memory.min`), bytes: twice what it may weigh when idle.
const OWN_MEMORY_MIN: &str = "8388608";

/// Makes the groups and delegates every controller of the kernel down to the containers. PID 1 moves into its own.
pub fn set_up() -> io::Result<()> {
    let controllers: String = fs::read_to_string(format!("{ROOT}/cgroup.controllers"))?
        .split_ascii_whitespace()
        .map(|controller| format!("+{controller} "))
        .collect();
    fs::create_dir(OWN)?;
    fs::create_dir(CONTAINERS)?;
    // A group with members of its own cannot delegate (no internal processes): PID 1 leaves the root first.
    fs::write(format!("{OWN}/cgroup.procs"), "0")?;
    fs::write(format!("{ROOT}/cgroup.subtree_control"), &controllers)?;
    fs::write(format!("{CONTAINERS}/cgroup.subtree_control"), &controllers)?;
    protect(OWN, OWN_MEMORY_MIN)
}

/// Makes a group, unless it is there, with memory that reclaim leaves to it (`memory.min`), bytes.
pub fn make_protected(group: &str, memory_min: &str) -> io::Result<()> {
    match fs::create_dir(group) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
        _ => protect(group, memory_min),
    }
}

fn protect(group: &str, memory_min: &str) -> io::Result<()> {
    match fs::write(format!("{group}/memory.min"), memory_min) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            tracing::warn!(group, "the kernel has no memory controller: the group's memory is not protected");
            Ok(())
        }
        other => other,
    }
}

/// The cgroup of a container.
pub fn of(container: &str) -> PathBuf {
    Path::new(CONTAINERS).join(container)
}

/// Kills everything in a group and below it. A group that is not there has nothing to kill.
pub fn kill(group: &Path) -> io::Result<()> {
    missing_is_fine(fs::write(group.join("cgroup.kill"), "1"))
}

/// The processes of a group and of all below it.
pub fn processes(group: &Path) -> io::Result<Vec<i32>> {
    let mut pids = Vec::new();
    tree::visit(group, |group| {
        match group.read("cgroup.procs") {
            Ok(text) => pids.extend(text.lines().filter_map(|pid| pid.parse::<i32>().ok())),
            // A threaded group lists no processes: the group above it that its threads began in does (cgroup-v2.rst, "Threads").
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    })?;
    Ok(pids)
}

/// Number of groups below `group`, at any depth.
pub fn count_below(group: &Path) -> io::Result<u32> {
    let mut count = 0;
    tree::visit(group, |_| {
        count += 1;
        Ok(())
    })?;
    Ok(count - 1)
}

/// Kills what is in the group, waits until it is empty, and removes it with all below it. A group that is not there is removed.
///
/// # Errors
/// `TimedOut` when something in it survives the kill longer than `deadline`; or what the kernel said.
pub async fn remove(group: &Path, deadline: Duration) -> io::Result<()> {
    // Nearly always it is empty by now, because its init was the last to go.
    match fs::remove_dir(group) {
        // EBUSY is said for members and for groups below alike.
        Err(error) if error.kind() == ErrorKind::ResourceBusy => {}
        done => return missing_is_fine(done),
    }
    // Before the groups below: what lives in them could go on making new ones.
    kill(group)?;
    let removed = async {
        wait_empty(group).await?;
        missing_is_fine(tree::remove(group).await)
    };
    timeout(deadline, removed).await.map_err(|_| {
        io::Error::new(ErrorKind::TimedOut, format!("{} is there {deadline:?} after the kill", group.display()))
    })?
}

async fn wait_empty(group: &Path) -> io::Result<()> {
    match Watched::open(&group.join("cgroup.events")) {
        Ok(events) => missing_is_fine(events.until("populated 0").await),
        Err(error) => missing_is_fine(Err(error)),
    }
}

fn missing_is_fine(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if is_gone(&error) { Ok(()) } else { Err(error) })
}

/// A file of a group; nothing when the kernel does not have it, or does not fill it (PSI that is switched off).
fn read(group: &Path, file: &str) -> io::Result<Option<String>> {
    match fs::read_to_string(group.join(file)) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
        Err(error) => Err(io::Error::new(error.kind(), format!("read {file}: {error}"))),
    }
}

/// The number beside `key` in a file of lines with a key and a number each; zero when it is not there.
fn number(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.parse().ok())
        .unwrap_or(0)
}

/// ENOENT when a group's name is gone, ENODEV when one of its files was open and the group went.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}
