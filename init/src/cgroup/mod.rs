//! The guest's cgroups (v2): PID 1's own group, and one group per container under a common parent.
//!
//! cgroups-rs is not used here: version 0.5 depends on zbus unconditionally, and a D-Bus client does not belong in PID
//! 1.

mod file;
pub(crate) mod freezer;
pub(crate) mod limits;
pub(crate) mod oom;
pub(crate) mod stats;
pub(crate) mod tree;
mod watch;

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::timeout;

use file::ignore_gone;
use watch::EventsFile;

/// Mount point of cgroup2.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";
/// The group of PID 1 and its workers.
pub(crate) const OWN: &str = "/sys/fs/cgroup/husk";
/// The group of the supervisor agent and its children. Exists only while the agent runs.
pub(crate) const SUPERVISOR: &str = "/sys/fs/cgroup/supervisor";
/// The parent of the containers' groups: [`husk_protos::CONTAINERS_CGROUP`] below [`ROOT`].
pub(crate) const CONTAINERS: &str = "/sys/fs/cgroup/containers";
/// In debug mode: the parent of the groups of processes that run in the guest itself.
pub(crate) const DEBUG: &str = "/sys/fs/cgroup/debug";

/// Memory of PID 1 that reclaim does not touch (`memory.min`), bytes: twice the limit of its idle size.
const OWN_MEMORY_MIN: &str = "8388608";

/// Creates the groups, moves PID 1 into its own, and delegates all controllers to the containers' parent.
pub(crate) fn set_up() -> io::Result<()> {
    let controllers: String = fs::read_to_string(format!("{ROOT}/cgroup.controllers"))?
        .split_ascii_whitespace()
        .map(|controller| format!("+{controller} "))
        .collect();
    fs::create_dir(OWN)?;
    fs::create_dir(CONTAINERS)?;
    // A group with processes cannot delegate controllers (no internal processes): PID 1 leaves the root first.
    fs::write(format!("{OWN}/cgroup.procs"), "0")?;
    fs::write(format!("{ROOT}/cgroup.subtree_control"), &controllers)?;
    fs::write(format!("{CONTAINERS}/cgroup.subtree_control"), &controllers)?;
    protect(OWN, OWN_MEMORY_MIN)
}

/// Creates a group unless it exists, and sets the memory that reclaim does not touch (`memory.min`), bytes.
pub(crate) fn make_protected(group: &str, memory_min: &str) -> io::Result<()> {
    match fs::create_dir(group) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
        _ => protect(group, memory_min),
    }
}

fn protect(group: &str, memory_min: &str) -> io::Result<()> {
    match fs::write(format!("{group}/memory.min"), memory_min) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            tracing::warn!(group, "the group's memory is not protected: the kernel has no memory controller");
            Ok(())
        }
        other => other,
    }
}

/// The group of a container.
pub(crate) fn of(container: &str) -> PathBuf {
    Path::new(CONTAINERS).join(container)
}

/// Kills all processes in a group and below it. Succeeds when the group does not exist.
pub(crate) fn kill(group: &Path) -> io::Result<()> {
    ignore_gone(fs::write(group.join("cgroup.kill"), "1"))
}

/// The PIDs in a group and below it.
pub(crate) fn processes(group: &Path) -> io::Result<Vec<i32>> {
    let mut pids = Vec::new();
    tree::visit(group, |group| {
        match group.read("cgroup.procs") {
            Ok(text) => pids.extend(text.lines().filter_map(|pid| pid.parse::<i32>().ok())),
            // A threaded group lists no processes; its threaded domain, a group above it, does (cgroup-v2.rst,
            // "Threads").
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    })?;
    Ok(pids)
}

/// The number of groups below `group`, at any depth.
pub(crate) fn count_below(group: &Path) -> io::Result<u32> {
    let mut count = 0;
    tree::visit(group, |_| {
        count += 1;
        Ok(())
    })?;
    Ok(count - 1)
}

/// Kills the processes in a group, waits for their exit, and removes the group with all groups below it. Succeeds when
/// the group does not exist.
///
/// # Errors
/// `TimedOut` when a process survives the kill for longer than `deadline`; or an error of the kernel.
pub(crate) async fn remove(group: &Path, deadline: Duration) -> io::Result<()> {
    // Fast path: the group is usually empty, because the container's init is the last process to exit.
    match fs::remove_dir(group) {
        // EBUSY: the group has processes or groups below it.
        Err(error) if error.kind() == ErrorKind::ResourceBusy => {}
        result => return ignore_gone(result),
    }
    // Kill before removing groups: live processes could keep creating new ones.
    kill(group)?;
    let removed = async {
        wait_empty(group).await?;
        ignore_gone(tree::remove(group).await)
    };
    timeout(deadline, removed).await.map_err(|_| {
        io::Error::new(ErrorKind::TimedOut, format!("{} still exists {deadline:?} after the kill", group.display()))
    })?
}

async fn wait_empty(group: &Path) -> io::Result<()> {
    match EventsFile::open(&group.join("cgroup.events")) {
        Ok(events) => ignore_gone(events.until("populated 0").await),
        Err(error) => ignore_gone(Err(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_containers_group_is_the_one_that_specs_name() {
        assert_eq!(CONTAINERS, format!("{ROOT}{}", husk_protos::CONTAINERS_CGROUP));
    }
}
