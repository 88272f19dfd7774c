//! Maps the users and groups of a container to the guest's.
//!
//! libcontainer writes a mapping of one line itself. For more lines it runs `newuidmap` and `newgidmap`, which write
//! them for users that may not. A worker may, and there are no such programs in the guest: this binary is both, under
//! their names. libcontainer ignores whether they succeed, so [`prepare`] rejects whatever the kernel would.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec};

use crate::error::{CallError, FailureKind};
use crate::paths;

/// Most bytes that the kernel takes for a mapping: less than a page (user_namespaces(7)).
const MAP_MAX: usize = 4095;
/// The programs in [`paths::BIN`], and the files that they write.
const PROGRAMS: [(&str, &str); 2] = [("newuidmap", "uid_map"), ("newgidmap", "gid_map")];

/// Checks the mappings of a new user namespace, and provides the programs that write those of several lines.
///
/// # Errors
/// InvalidArgument for mappings that the kernel would reject.
pub(super) fn prepare(spec: &Spec) -> Result<(), CallError> {
    let Some(linux) = spec.linux() else { return Ok(()) };
    let fields = [("linux.uidMappings", linux.uid_mappings()), ("linux.gidMappings", linux.gid_mappings())];
    let mut several = false;
    for (field, mappings) in fields {
        let mappings = mappings.as_deref().unwrap_or_default();
        check(field, mappings).map_err(|what| CallError::new(FailureKind::InvalidArgument, what))?;
        several |= mappings.len() > 1;
    }
    if several {
        provide(Path::new(paths::BIN)).map_err(|e| CallError::internal(format_args!("create {}", paths::BIN), &e))?;
    }
    Ok(())
}

fn provide(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    for (program, _) in PROGRAMS {
        match symlink("/proc/self/exe", folder.join(program)) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn check(field: &str, mappings: &[LinuxIdMapping]) -> Result<(), String> {
    let end = |first: u32, size: u32| first.checked_add(size).filter(|_| size > 0);
    for (index, one) in mappings.iter().enumerate() {
        let problem = |why: &str| {
            Err(format!("{field}[{index}]: {} {} {}: {why}", one.container_id(), one.host_id(), one.size()))
        };
        let ends = (end(one.container_id(), one.size()), end(one.host_id(), one.size()));
        let (Some(inside), Some(outside)) = ends else { return problem("is not a range of IDs") };
        for other in &mappings[..index] {
            let overlap = |first: u32, end: u32, from: u32| first < from.saturating_add(other.size()) && from < end;
            if overlap(one.container_id(), inside, other.container_id())
                || overlap(one.host_id(), outside, other.host_id())
            {
                return problem("overlaps another mapping");
            }
        }
    }
    let size = mappings.iter().map(|one| line(one.container_id(), one.host_id(), one.size()).len()).sum::<usize>();
    if size > MAP_MAX {
        return Err(format!("{field}: {} mappings are too many", mappings.len()));
    }
    Ok(())
}

/// A line of a mapping.
pub(super) fn line(inside: impl ToString, outside: impl ToString, size: impl ToString) -> String {
    [inside.to_string(), outside.to_string(), size.to_string()].join(" ") + "\n"
}

/// Writes a mapping, if this process was started under the name of a program that does: `newuidmap <pid> <first ID
/// inside> <first ID outside> <number of IDs> ...`. Returns whether it succeeded.
pub(crate) fn run_program(name: &str, args: impl Iterator<Item = String>) -> Option<bool> {
    let program = Path::new(name).strip_prefix(paths::BIN).ok()?;
    let (_, file) = PROGRAMS.iter().find(|(name, _)| program == Path::new(name))?;
    let args: Vec<String> = args.collect();
    let (pid, mappings) = args.split_first()?;
    let map: String = mappings.chunks_exact(3).map(|one| line(&one[0], &one[1], &one[2])).collect();
    Some(fs::write(Path::new("/proc").join(pid).join(file), map).is_ok())
}

/// Users or groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    User,
    Group,
}

/// The guest's ID of a container's user or group. None if the container's user namespace does not map it.
///
/// # Errors
/// When the mapping of a joined namespace cannot be read.
pub(super) fn in_guest(spec: &Spec, kind: Kind, id: u32) -> io::Result<Option<u32>> {
    mapped(spec, kind, id, |path| std::fs::read_to_string(path))
}

fn mapped(spec: &Spec, kind: Kind, id: u32, read: impl FnOnce(&Path) -> io::Result<String>) -> io::Result<Option<u32>> {
    let Some(linux) = spec.linux() else { return Ok(Some(id)) };
    let mut namespaces = linux.namespaces().iter().flatten();
    let Some(namespace) = namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::User) else {
        return Ok(Some(id));
    };
    let mappings = match kind {
        Kind::User => linux.uid_mappings(),
        Kind::Group => linux.gid_mappings(),
    };
    let ranges: Vec<[u32; 3]> = match (mappings, namespace.path().as_deref().and_then(|path| file_of(path, kind))) {
        (Some(mappings), _) if !mappings.is_empty() => {
            mappings.iter().map(|one| [one.container_id(), one.host_id(), one.size()]).collect()
        }
        (_, Some(path)) => parse(&read(&path)?),
        (_, None) => Vec::new(),
    };
    Ok(ranges.iter().find_map(|[inside, outside, size]| {
        let offset = id.checked_sub(*inside).filter(|offset| offset < size)?;
        outside.checked_add(offset)
    }))
}

/// The file with the mapping of the user namespace `/proc/<pid>/ns/user`.
fn file_of(namespace: &Path, kind: Kind) -> Option<PathBuf> {
    let name = match kind {
        Kind::User => "uid_map",
        Kind::Group => "gid_map",
    };
    Some(namespace.parent()?.parent()?.join(name))
}

/// Reads the lines of a mapping (user_namespaces(7)): first ID inside, first ID outside, number of IDs.
fn parse(map: &str) -> Vec<[u32; 3]> {
    let line = |line: &str| {
        let mut numbers = line.split_whitespace().map(|number| number.parse().ok());
        Some([numbers.next()??, numbers.next()??, numbers.next()??])
    };
    map.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn mappings_that_the_kernel_would_reject_are_named() {
        let check_all = |mappings: Value| -> Result<(), String> {
            let mappings: Vec<LinuxIdMapping> = serde_json::from_value(mappings).unwrap();
            check("linux.uidMappings", &mappings)
        };
        let one =
            |inside: u32, outside: u32, size: u32| json!({"containerID": inside, "hostID": outside, "size": size});
        for good in
            [json!([]), json!([one(0, 100_000, 65_536)]), json!([one(0, 1000, 1), one(1, 0, 1000), one(5000, 5000, 7)])]
        {
            assert_eq!(check_all(good), Ok(()));
        }
        for (bad, expected) in [
            (json!([one(0, 1, 0)]), "linux.uidMappings[0]: 0 1 0: is not a range of IDs"),
            (json!([one(0, u32::MAX, 2)]), "linux.uidMappings[0]: 0 4294967295 2: is not a range of IDs"),
            (json!([one(0, 100, 5), one(4, 200, 5)]), "linux.uidMappings[1]: 4 200 5: overlaps another mapping"),
            (json!([one(0, 100, 5), one(10, 96, 5)]), "linux.uidMappings[1]: 10 96 5: overlaps another mapping"),
            (
                Value::from_iter((0..400u32).map(|n| one(n, 100_000 + n, 1))),
                "linux.uidMappings: 400 mappings are too many",
            ),
        ] {
            assert_eq!(check_all(bad), Err(expected.to_owned()));
        }
    }

    #[test]
    fn the_programs_are_found_by_their_paths_only() {
        let folder = tempfile::tempdir().unwrap();
        provide(folder.path()).unwrap();
        provide(folder.path()).unwrap();
        assert!(folder.path().join("newuidmap").exists() && folder.path().join("newgidmap").exists());
        let none = || std::iter::once("0".to_owned());
        for other in ["husk-worker", "newuidmap", "/usr/bin/newuidmap", "/run/husk/bin/newgrp"] {
            assert_eq!(run_program(other, none()), None, "{other}");
        }
        // There is no process 0.
        assert_eq!(run_program("/run/husk/bin/newgidmap", none()), Some(false));
    }

    #[test]
    fn an_id_is_mapped_as_in_its_user_namespace() {
        let user = json!([{"type": "pid"}, {"type": "user"}]);
        let joined = json!([{"type": "user", "path": "/proc/40/ns/user"}]);
        let two = json!([
            {"containerID": 0, "hostID": 100_000, "size": 10}, {"containerID": 1000, "hostID": 500, "size": 2}
        ]);
        let table = [
            (Value::Null, Value::Null, 7, Some(7)),
            (json!([{"type": "pid"}]), two.clone(), 7, Some(7)),
            (user.clone(), two.clone(), 7, Some(100_007)),
            (user.clone(), two.clone(), 1001, Some(501)),
            (user.clone(), two.clone(), 10, None),
            (user, Value::Null, 0, None),
            (joined.clone(), two, 9, Some(100_009)),
            (joined.clone(), Value::Null, 5, Some(300_005)),
            (joined, json!([]), 70_000, None),
        ];
        for (kind, field, file) in
            [(Kind::User, "uidMappings", "/proc/40/uid_map"), (Kind::Group, "gidMappings", "/proc/40/gid_map")]
        {
            let read = |path: &Path| {
                assert_eq!(path, Path::new(file));
                Ok("         0     300000      65536\n".to_owned())
            };
            for (namespaces, mappings, id, expected) in &table {
                let linux = json!({"namespaces": namespaces, field: mappings});
                let spec: Spec = serde_json::from_value(json!({"ociVersion": "1.2.0", "linux": linux})).unwrap();
                assert_eq!(mapped(&spec, kind, *id, read).unwrap(), *expected, "{linux} {id}");
            }
        }
    }
}
