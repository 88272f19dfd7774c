//! The cgroup that this process was started in, once it has left it for its sandbox's. Hooks and logging programs run
//! there: they are the operator's, may outlive the sandbox, and do not count towards its limits.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use husk_protos::lock::lock;
use procfs::process::Process;

use crate::host::process::ProcessId;

/// Where this process was in a hierarchy.
#[derive(Debug)]
struct Place {
    /// The `cgroup.procs` file of its cgroup.
    home: PathBuf,
    /// That of the hierarchy's root.
    root: PathBuf,
}

/// The home; empty while the process is at home.
static HOME: Mutex<Vec<Place>> = Mutex::new(Vec::new());

/// Moves this process, with all its threads, to the cgroup with these open `cgroup.procs` files. `roots` are the mount
/// points of the host's hierarchies.
///
/// # Errors
/// When `/proc` cannot be read or a file cannot be written. The process may then have moved in some hierarchies.
pub(crate) fn leave_for(cgroup: &[File], roots: &[PathBuf]) -> io::Result<()> {
    let own = std::process::id().to_string();
    let paths: Vec<String> = Process::myself()
        .and_then(|process| process.cgroups())
        .map_err(io::Error::other)?
        .into_iter()
        .map(|group| group.pathname)
        .collect();
    let home = roots.iter().filter_map(|root| in_hierarchy(root, &paths, &own)).collect();
    *lock(&HOME) = home;
    cgroup.iter().try_for_each(|mut file| file.write_all(own.as_bytes()))
}

/// Moves other processes to this process's cgroups, unless the first of them is there. `roots` are the mount points of the
/// host's hierarchies.
///
/// # Errors
/// When `/proc` cannot be read or a file cannot be written. The processes may then have moved in some hierarchies.
pub(crate) fn bring(processes: &[ProcessId], roots: &[PathBuf]) -> io::Result<()> {
    let Some(first) = processes.first() else { return Ok(()) };
    let groups = |pid: u32| fs::read_to_string(format!("/proc/{pid}/cgroup"));
    let own = std::process::id();
    let here = groups(own)?;
    if groups(first.pid)? == here {
        return Ok(());
    }
    let paths: Vec<String> = here.lines().filter_map(|line| Some(line.splitn(3, ':').nth(2)?.to_owned())).collect();
    for place in roots.iter().filter_map(|root| in_hierarchy(root, &paths, &own.to_string())) {
        let mut procs = OpenOptions::new().write(true).open(&place.home)?;
        processes.iter().try_for_each(|process| procs.write_all(process.pid.to_string().as_bytes()))?;
    }
    Ok(())
}

/// This process's place in a hierarchy. `/proc` names controllers instead of mount points, so the right path is
/// the one that lists the process.
fn in_hierarchy(root: &Path, paths: &[String], pid: &str) -> Option<Place> {
    let mut candidates = paths.iter().map(|path| root.join(path.trim_start_matches('/')).join("cgroup.procs"));
    let home =
        candidates.find(|file| fs::read_to_string(file).is_ok_and(|pids| pids.lines().any(|line| line == pid)))?;
    Some(Place { home, root: root.join("cgroup.procs") })
}

/// Moves this process back, or to the root of a hierarchy in which the home is gone. Does nothing if it has not left.
///
/// # Errors
/// When neither can be joined.
pub(crate) fn come_back() -> io::Result<()> {
    let own = std::process::id().to_string();
    let mut home = lock(&HOME);
    home.iter().try_for_each(|Place { home, root }| {
        let join = |procs: &Path| OpenOptions::new().write(true).open(procs)?.write_all(own.as_bytes());
        join(home).or_else(|_| join(root))
    })?;
    home.clear();
    Ok(())
}

/// The open `cgroup.procs` files of the home, which a child writes 0 to before it becomes another program. None if the
/// process is at home, or where the home is gone.
///
/// # Errors
/// When a file cannot be opened.
pub(crate) fn files() -> io::Result<Vec<File>> {
    let home = lock(&HOME);
    let opened = home.iter().map(|place| OpenOptions::new().write(true).open(&place.home));
    opened.filter(|opened| !opened.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)).collect()
}
