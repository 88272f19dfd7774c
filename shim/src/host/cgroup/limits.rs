//! Limits of a cgroup: memory, CPU time, and processes with their threads.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The period of CPU quotas, microseconds: the kernel's default.
const PERIOD_US: u64 = 100_000;

/// What a cgroup may use. `None` means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Bytes.
    pub(crate) memory: Option<u64>,
    /// Thousandths of a CPU.
    pub(crate) milli_cpus: Option<u64>,
    /// Processes and threads.
    pub(crate) pids: Option<u64>,
}

/// A limit that the host's kernel rejects.
#[derive(Debug, thiserror::Error)]
#[error("write {value:?} to {}", path.display())]
pub(crate) struct LimitError {
    /// The spec's field that the limit comes from.
    pub(crate) field: &'static str,
    /// The written value.
    pub(crate) value: String,
    /// The file.
    pub(crate) path: PathBuf,
    /// The cause.
    pub(crate) source: io::Error,
}

/// Names of files and their contents, in the order in which they are written.
type Files = Vec<(&'static str, String)>;

/// A kind of limit.
struct Kind {
    /// The spec's field.
    field: &'static str,
    /// The controller of cgroup v2.
    controller: &'static str,
    get: fn(&Limits) -> Option<u64>,
    /// Files and their contents on cgroup v2, and on v1.
    files: fn(Option<u64>) -> [Files; 2],
}

fn number_or(value: Option<u64>, unlimited: &str) -> String {
    value.map_or_else(|| unlimited.to_owned(), |value| value.to_string())
}

const KINDS: [Kind; 3] = [
    Kind {
        field: "linux.resources.memory.limit",
        controller: "memory",
        get: |limits| limits.memory,
        files: |value| {
            [vec![("memory.max", number_or(value, "max"))], vec![("memory.limit_in_bytes", number_or(value, "-1"))]]
        },
    },
    Kind {
        field: "linux.resources.cpu.quota",
        controller: "cpu",
        get: |limits| limits.milli_cpus,
        files: |value| {
            let quota = value.map(|milli| milli.saturating_mul(PERIOD_US / 1000));
            let v1 = vec![("cpu.cfs_period_us", PERIOD_US.to_string()), ("cpu.cfs_quota_us", number_or(quota, "-1"))];
            [vec![("cpu.max", format!("{} {PERIOD_US}", number_or(quota, "max")))], v1]
        },
    },
    Kind {
        field: "linux.resources.pids.limit",
        controller: "pids",
        get: |limits| limits.pids,
        // The same file in both versions.
        files: |value| [vec![("pids.max", number_or(value, "max"))], Vec::new()],
    },
];

impl Limits {
    /// The spec's fields that are limited.
    pub(crate) fn fields(&self) -> Vec<&'static str> {
        KINDS.iter().filter(|kind| (kind.get)(self).is_some()).map(|kind| kind.field).collect()
    }

    /// The limits of two users of a cgroup together: none where one of them has none.
    pub(super) fn with(self, other: Self) -> Self {
        let sum = |one: Option<u64>, other: Option<u64>| Some(one?.saturating_add(other?));
        Self {
            memory: sum(self.memory, other.memory),
            milli_cpus: sum(self.milli_cpus, other.milli_cpus),
            pids: sum(self.pids, other.pids),
        }
    }

    /// Reverts `Display`. What cannot be read is no limit.
    pub(super) fn parse(text: &str) -> Self {
        let mut numbers = text.split(' ').map(|number| number.parse().ok());
        let mut next = || numbers.next().flatten();
        Self { memory: next(), milli_cpus: next(), pids: next() }
    }
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |value| number_or(value, "-");
        write!(f, "{} {} {}", text(self.memory), text(self.milli_cpus), text(self.pids))
    }
}

/// Changes the limits of the cgroup at `group`, in one of the host's hierarchies, from `before` to `after`. A limit that
/// has not changed is not written. Returns the spec's fields whose limits the hierarchy carries.
///
/// # Errors
/// [`LimitError`]; limits before it have changed.
pub(super) fn write(group: &Path, before: &Limits, after: &Limits) -> Result<Vec<&'static str>, LimitError> {
    let mut applied = Vec::new();
    for kind in &KINDS {
        let value = (kind.get)(after);
        let [v2, v1] = (kind.files)(value);
        let exist = |files: &[(&str, String)]| files.last().is_some_and(|(file, _)| group.join(file).exists());
        let changes = value != (kind.get)(before);
        if changes && !exist(&v2) && !exist(&v1) {
            enable_controller(group, kind.controller);
        }
        let Some(files) = [v2, v1].into_iter().find(|files| exist(files)) else { continue };
        match if changes { write_files(group, kind.field, &files) } else { Ok(()) } {
            Ok(()) => applied.push(kind.field),
            // cgroup v1 rejects a quota above that of a cgroup above, which is in force anyway.
            Err(error) if kind.controller == "cpu" && error.source.kind() == io::ErrorKind::InvalidInput => {}
            Err(error) => return Err(error),
        }
    }
    Ok(applied)
}

fn write_files(group: &Path, field: &'static str, files: &[(&str, String)]) -> Result<(), LimitError> {
    files.iter().try_for_each(|(file, value)| {
        let path = group.join(file);
        write_value(&path, value).map_err(|source| LimitError { field, value: value.clone(), path, source })
    })
}

/// Writes to an existing file of a cgroup.
///
/// # Errors
/// When the file cannot be opened or written.
pub(crate) fn write_value(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(format!("{value}\n").as_bytes())
}

/// Enables a controller of cgroup v2 down to `group`, as runc does. Best effort: the caller notices whether the group has
/// the controller's files.
pub(crate) fn enable_controller(group: &Path, controller: &str) {
    let mut above: Vec<_> =
        group.ancestors().skip(1).take_while(|path| path.join("cgroup.controllers").exists()).collect();
    above.reverse();
    for path in above {
        let enabled = |file: &str| {
            let text = fs::read_to_string(path.join(file)).unwrap_or_default();
            text.split_ascii_whitespace().any(|name| name == controller)
        };
        let file = path.join("cgroup.subtree_control");
        if !enabled("cgroup.controllers") {
            return;
        }
        if !enabled("cgroup.subtree_control")
            && let Err(error) = write_value(&file, &format!("+{controller}"))
        {
            tracing::warn!(path = %file.display(), %error, controller, "failed to enable a cgroup controller");
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME: Limits = Limits { memory: Some(1 << 30), milli_cpus: Some(750), pids: Some(1124) };

    /// A directory that looks like a cgroup with these files.
    fn group(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        files.iter().for_each(|file| fs::write(folder.path().join(file), "").unwrap());
        folder
    }

    fn content(group: &tempfile::TempDir, file: &str) -> String {
        fs::read_to_string(group.path().join(file)).unwrap().lines().next().unwrap_or_default().to_owned()
    }

    const MEMORY: &str = "linux.resources.memory.limit";
    const CPU: &str = "linux.resources.cpu.quota";
    const PIDS: &str = "linux.resources.pids.limit";

    #[test]
    fn limits_are_written_to_the_files_of_each_version() {
        let none = Limits::default();
        let v2 = group(&["memory.max", "cpu.max", "pids.max"]);
        assert_eq!(write(v2.path(), &none, &SOME).unwrap(), [MEMORY, CPU, PIDS]);
        let read = |file| content(&v2, file);
        assert_eq!([read("memory.max"), read("cpu.max"), read("pids.max")], ["1073741824", "75000 100000", "1124"]);
        // On v1 and hybrid hosts each controller has a hierarchy of its own, and the v2 hierarchy has none.
        for (files, field, expected) in [
            (&["memory.limit_in_bytes"][..], MEMORY, "1073741824"),
            (&["cpu.cfs_period_us", "cpu.cfs_quota_us"], CPU, "75000"),
            (&["pids.max"], PIDS, "1124"),
        ] {
            let v1 = group(files);
            assert_eq!(write(v1.path(), &none, &SOME).unwrap(), [field], "{files:?}");
            assert_eq!(content(&v1, files.last().unwrap()), expected);
        }
        let unified_of_hybrid = group(&["cgroup.procs"]);
        assert_eq!(write(unified_of_hybrid.path(), &none, &SOME).unwrap(), [""; 0]);
        assert_eq!(SOME.fields(), [MEMORY, CPU, PIDS]);
    }

    #[test]
    fn only_changes_are_written_and_a_limit_can_be_removed() {
        let v2 = group(&["memory.max", "cpu.max", "pids.max"]);
        assert_eq!(write(v2.path(), &SOME, &SOME).unwrap(), [MEMORY, CPU, PIDS]);
        assert_eq!(content(&v2, "memory.max"), "");
        write(v2.path(), &SOME, &Limits::default()).unwrap();
        let read = |file| content(&v2, file);
        assert_eq!([read("memory.max"), read("cpu.max"), read("pids.max")], ["max", "max 100000", "max"]);
        let v1 = group(&["memory.limit_in_bytes", "cpu.cfs_period_us", "cpu.cfs_quota_us"]);
        write(v1.path(), &SOME, &Limits { pids: SOME.pids, ..Limits::default() }).unwrap();
        assert_eq!([content(&v1, "memory.limit_in_bytes"), content(&v1, "cpu.cfs_quota_us")], ["-1", "-1"]);
    }

    #[test]
    fn controllers_are_enabled_down_to_the_cgroup() {
        let root = tempfile::tempdir().unwrap();
        let leaf = root.path().join("a/leaf");
        fs::create_dir_all(&leaf).unwrap();
        for folder in [root.path().to_owned(), root.path().join("a")] {
            fs::write(folder.join("cgroup.controllers"), "cpu memory pids\n").unwrap();
            fs::write(folder.join("cgroup.subtree_control"), "").unwrap();
        }
        enable_controller(&leaf, "memory");
        for folder in ["", "a"] {
            let control = fs::read_to_string(root.path().join(folder).join("cgroup.subtree_control")).unwrap();
            assert_eq!(control, "+memory\n", "{folder}");
        }
        enable_controller(&leaf, "rdma");
        assert_eq!(fs::read_to_string(root.path().join("cgroup.subtree_control")).unwrap(), "+memory\n");
    }

    #[test]
    fn users_together_have_the_sum_of_their_limits_and_none_where_one_has_none() {
        assert_eq!(Limits::parse(&SOME.to_string()), SOME);
        let some = Limits { memory: None, ..SOME };
        assert_eq!(Limits::parse(&some.to_string()), some);
        assert_eq!(Limits::parse("x"), Limits::default());
        assert_eq!(SOME.with(some), Limits { memory: None, milli_cpus: Some(1500), pids: Some(2248) });
        assert_eq!(Limits { memory: Some(u64::MAX), ..SOME }.with(SOME).memory, Some(u64::MAX));
    }
}
