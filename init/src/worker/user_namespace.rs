//! Maps the users and groups of a container to the guest's.

use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};

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
