//! What libcontainer leaves undone in a container's namespaces: `lo` is down in a new network namespace, and the
//! propagation of a mount is ignored.

use std::fs::File;
use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};

use crate::error::CallError;
use crate::loopback;

/// Completes the namespaces of a container that waits for its start. The worker stays in them, so this is its last
/// step.
pub(super) fn complete(spec: &Spec, id: &str, pid: i32) -> Result<(), CallError> {
    if has_new_network(spec) {
        enter(pid, "net", CloneFlags::CLONE_NEWNET)
            .and_then(|()| loopback::up())
            .map_err(|e| CallError::internal(format_args!("create {id}: bring up lo"), &e))?;
    }
    let mut propagations = propagations(spec.mounts().as_deref().unwrap_or_default()).peekable();
    if propagations.peek().is_some() {
        enter(pid, "mnt", CloneFlags::CLONE_NEWNS)
            .map_err(|e| CallError::internal(format_args!("create {id}: enter its mount namespace"), &e))?;
    }
    for (destination, option, flags) in propagations {
        mount(None::<&str>, destination, None::<&str>, flags, None::<&str>).map_err(|e| {
            let destination = destination.display();
            CallError::internal(format_args!("create {id}: mounts: {destination}: make it {option}"), &e)
        })?;
    }
    Ok(())
}

/// Joins a namespace of a process.
fn enter(pid: i32, name: &str, kind: CloneFlags) -> io::Result<()> {
    Ok(setns(File::open(format!("/proc/{pid}/ns/{name}"))?, kind)?)
}

/// Whether the container has a network namespace that nobody has set up.
fn has_new_network(spec: &Spec) -> bool {
    let mut namespaces = spec.linux().iter().flat_map(|linux| linux.namespaces().iter().flatten());
    namespaces.any(|namespace| {
        // libcontainer takes an empty path for none as well.
        let path = namespace.path().as_deref().unwrap_or(Path::new(""));
        namespace.typ() == LinuxNamespaceType::Network && path.as_os_str().is_empty()
    })
}

/// The mounts that have a propagation of their own, in their order. The last option of a mount counts.
fn propagations(mounts: &[Mount]) -> impl Iterator<Item = (&Path, &str, MsFlags)> {
    mounts.iter().filter_map(|mount| {
        let options = mount.options().iter().flatten().rev();
        let (option, flags) = options.into_iter().find_map(|option| Some((option.as_str(), propagation(option)?)))?;
        Some((mount.destination().as_path(), option, flags))
    })
}

fn propagation(option: &str) -> Option<MsFlags> {
    let (kind, recursive) = match option {
        "private" | "shared" | "slave" | "unbindable" => (option, MsFlags::empty()),
        _ => (option.strip_prefix('r')?, MsFlags::MS_REC),
    };
    let kind = match kind {
        "private" => MsFlags::MS_PRIVATE,
        "shared" => MsFlags::MS_SHARED,
        "slave" => MsFlags::MS_SLAVE,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some(kind | recursive)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn only_a_new_network_namespace_needs_its_loopback_brought_up() {
        let table = [
            (json!([{"type": "network"}]), true),
            (json!([{"type": "pid"}, {"type": "network", "path": ""}]), true),
            (json!([{"type": "network", "path": "/proc/40/ns/net"}]), false),
            (json!([{"type": "pid"}]), false),
            (Value::Null, false),
        ];
        for (namespaces, expected) in table {
            let spec = json!({"ociVersion": "1.2.0", "linux": {"namespaces": namespaces}});
            assert_eq!(has_new_network(&serde_json::from_value(spec).unwrap()), expected, "{namespaces}");
        }
    }

    #[test]
    fn the_last_propagation_of_a_mount_counts() {
        let table = [
            (json!(["rbind", "rshared"]), Some(MsFlags::MS_SHARED | MsFlags::MS_REC)),
            (json!(["slave", "ro", "private"]), Some(MsFlags::MS_PRIVATE)),
            (json!(["runbindable"]), Some(MsFlags::MS_UNBINDABLE | MsFlags::MS_REC)),
            (json!(["rbind", "ro", "rro", "rr", ""]), None),
            (Value::Null, None),
        ];
        for (options, expected) in table {
            let mount: Mount = serde_json::from_value(json!({"destination": "/a", "options": options})).unwrap();
            let found: Vec<_> = propagations(std::slice::from_ref(&mount)).map(|(_, _, flags)| flags).collect();
            assert_eq!(found, Vec::from_iter(expected), "{options}");
        }
    }
}
