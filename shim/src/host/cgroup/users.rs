//! The sandboxes that use one cgroup. Each has an attribute there with the limits that it asks for. The last one that
//! leaves removes the cgroup, and so an end of a sandbox never kills another's processes.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::Flock;

use super::limits::{self, LimitError, Limits};
use super::marks::{self, User};
use super::remove::remove;
use crate::host::lock::{self, is_gone};

/// Locks a cgroup against other shims. `None` if it is gone.
fn lock(path: &Path, within: Duration) -> io::Result<Option<Flock<File>>> {
    match lock::lock(path, within, || File::open(path).map(Some)) {
        Err(error) if is_gone(&error) => Ok(None),
        locked => locked.map(Some),
    }
}

/// What all users of a cgroup ask for together.
fn together(path: &Path) -> io::Result<Option<Limits>> {
    let users = marks::users(path)?;
    Ok(users.iter().map(|user| Limits::parse(user)).reduce(Limits::with))
}

/// Makes a sandbox a user of the existing cgroup at `path`, and marks it as husk's. Returns false if the cgroup has been
/// removed in the meantime.
///
/// # Errors
/// When the cgroup cannot be locked or marked, or a limit of its other users cannot be changed.
pub(crate) fn enter(path: &Path, user: &User) -> io::Result<bool> {
    let Some(_locked) = lock(path, lock::TIMEOUT)? else { return Ok(false) };
    marks::mark(path)?;
    let before = together(path)?.unwrap_or_default();
    marks::set_user(path, user, &Limits::default().to_string())?;
    // A user without limits: the others' no longer apply to all processes.
    limits::write(path, &before, &Limits::default()).map_err(|error| error.source)?;
    Ok(true)
}

/// Changes the limits that a user of the cgroup at `path` asks for. Returns the spec's fields whose limits this hierarchy
/// carries.
///
/// # Errors
/// When the cgroup is gone, cannot be locked, or the kernel rejects the limit.
pub(crate) fn limit(path: &Path, user: &User, wanted: &Limits) -> Result<Vec<&'static str>, LimitError> {
    let failed =
        |source| LimitError { field: "linux.resources", value: wanted.to_string(), path: path.to_owned(), source };
    let locked = lock(path, lock::TIMEOUT).map_err(failed)?;
    let Some(_locked) = locked else { return Err(failed(io::ErrorKind::NotFound.into())) };
    let before = together(path).map_err(failed)?.unwrap_or_default();
    marks::set_user(path, user, &wanted.to_string()).map_err(failed)?;
    let after = together(path).map_err(failed)?.unwrap_or_default();
    limits::write(path, &before, &after)
}

/// Ends a sandbox's use of the cgroup at `path`. The last user kills what the cgroup still contains and removes it; so
/// does `None`. Succeeds if the cgroup is gone.
///
/// # Errors
/// When the cgroup cannot be locked or removed within this time.
pub(crate) fn leave(path: &Path, user: Option<&User>, within: Duration) -> io::Result<()> {
    let deadline = Instant::now() + within;
    let left = || deadline.saturating_duration_since(Instant::now());
    let Some(user) = user else { return remove(path, left()) };
    let Some(_locked) = lock(path, within)? else { return Ok(()) };
    let before = together(path)?.unwrap_or_default();
    marks::remove_user(path, user)?;
    match together(path)? {
        Some(others) => limits::write(path, &before, &others).map(drop).map_err(|error| error.source),
        None => remove(path, left()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    /// The mount point of a hierarchy of this host.
    fn hierarchy() -> &'static Path {
        let candidates: [&'static str; 3] = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
        let found = candidates.into_iter().map(Path::new).find(|path| path.join("cgroup.procs").exists());
        found.expect("the host has no cgroup hierarchy below /sys/fs/cgroup")
    }

    #[test]
    fn the_end_of_one_user_kills_nothing_and_that_of_the_last_removes_the_cgroup() {
        let path = hierarchy().join(format!("husk-test-users-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        let [one, two] = ["s1", "s2"].map(|id| User::new("ns", id));
        assert!(enter(&path, &one).unwrap() && enter(&path, &two).unwrap());
        assert!(marks::is_marked(&path));
        let mut process = Command::new("sleep").arg("600").spawn().unwrap();
        limits::write_value(&path.join("cgroup.procs"), &process.id().to_string()).unwrap();
        let second = Duration::from_secs(1);
        for _ in 0..2 {
            leave(&path, Some(&one), second).unwrap();
            assert!(path.exists());
            assert_eq!(process.try_wait().unwrap(), None);
        }
        leave(&path, Some(&two), 5 * second).unwrap();
        assert!(!path.exists());
        assert!(!process.wait().unwrap().success());
        leave(&path, Some(&two), second).unwrap();
        assert!(!enter(&path, &one).unwrap(), "a cgroup that is gone");
    }

    #[test]
    fn two_users_have_their_limits_together_and_one_that_leaves_takes_its_own_along() {
        let path = hierarchy().join(format!("husk-test-limits-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        if !path.join("pids.max").exists() {
            limits::enable_controller(&path, "pids");
        }
        let [one, two] = ["s1", "s2"].map(|id| User::new("ns", id));
        let pids = |pids| Limits { pids, ..Limits::default() };
        let now = || fs::read_to_string(path.join("pids.max")).unwrap().trim().to_owned();
        assert!(enter(&path, &one).unwrap());
        assert!(limit(&path, &one, &pids(Some(100))).unwrap().contains(&"linux.resources.pids.limit"));
        assert_eq!(now(), "100");
        assert!(enter(&path, &two).unwrap());
        assert_eq!(now(), "max", "the second has no limit yet");
        limit(&path, &two, &pids(Some(50))).unwrap();
        assert_eq!(now(), "150");
        leave(&path, Some(&one), Duration::from_secs(1)).unwrap();
        assert_eq!(now(), "50");
        limit(&path, &two, &pids(None)).unwrap();
        assert_eq!(now(), "max");
        leave(&path, Some(&two), Duration::from_secs(5)).unwrap();
    }
}
