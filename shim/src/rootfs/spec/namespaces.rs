//! Namespaces that a container joins by path.
//!
//! Clients build the paths of another container's namespaces from the PID that containerd reports, which is that of a
//! holder on the host: `/proc/<pid>/ns/ipc`. A container can join those of its sandbox's containers, in the guest. All
//! other paths mean namespaces of the host. The sandbox's VM is connected to a network namespace of the host, and the
//! container uses the VM's own; namespaces of other kinds cannot be joined.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::LinuxNamespaceType;

use super::context::Sibling;

/// What a namespace's path means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// A network namespace of the host, such as one that a CNI plugin configured.
    HostNetwork,
    /// The VM's network namespace.
    VmNetwork,
    /// A namespace in the guest, by its path there.
    Guest(PathBuf),
}

/// Resolves a path, or returns why the namespace cannot be joined. `sibling` finds the containers of the sandbox by the
/// PIDs of their holders.
pub(super) fn resolve(
    kind: LinuxNamespaceType,
    path: &Path,
    sibling: &dyn Fn(u32) -> Option<Sibling>,
) -> Result<Target, String> {
    let of_process = process_and_name(path);
    if kind == LinuxNamespaceType::Mount && of_process.is_some() {
        return Err("a container cannot join a mount namespace, because its root is mounted in its own".to_owned());
    }
    let Some((pid, name, sibling)) = of_process.and_then(|(pid, name)| Some((pid, name, sibling(pid)?))) else {
        return match of_process {
            _ if kind == LinuxNamespaceType::Network && path.is_absolute() => Ok(Target::HostNetwork),
            Some((pid, _)) => Err(format!("process {pid} does not represent a running container of this sandbox")),
            None => Err(format!("joining a {kind} namespace by its path on the host is not supported")),
        };
    };
    if name != file_of(kind) {
        return Err(format!("is not a {kind} namespace: the path must be /proc/{pid}/ns/{}", file_of(kind)));
    }
    if kind == LinuxNamespaceType::Network && sibling.in_vms_network {
        return Ok(Target::VmNetwork);
    }
    let shareable = matches!(kind, LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts);
    if sibling == Sibling::VM && !shareable {
        return Err(format!(
            "the containers of a sandbox cannot share a {kind} namespace under the Sandbox API, because it would be that \
             of the VM's PID 1: use the sandboxer \"podsandbox\""
        ));
    }
    Ok(Target::Guest(format!("/proc/{}/ns/{name}", sibling.guest_pid).into()))
}

/// The file's name in `/proc/<pid>/ns` (namespaces(7)).
fn file_of(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "net",
        LinuxNamespaceType::Time => "time",
    }
}

/// Splits `/proc/<pid>/ns/<name>` into PID and name.
fn process_and_name(path: &Path) -> Option<(u32, &str)> {
    let mut parts = path.components();
    let mut next = || match parts.next()? {
        Component::Normal(part) => part.to_str(),
        Component::RootDir => Some("/"),
        _ => None,
    };
    let (root, proc, pid, ns, name) = (next()?, next()?, next()?, next()?, next()?);
    let pid = pid.parse().ok().filter(|_| pid.bytes().all(|byte| byte.is_ascii_digit()))?;
    (root == "/" && proc == "proc" && ns == "ns" && parts.next().is_none()).then_some((pid, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_holders_mean_the_guests_namespaces_and_others_the_hosts() {
        use LinuxNamespaceType::{Cgroup, Ipc, Mount, Network, Pid, User, Uts};
        // Two containers: the first uses the VM's network, the second has its own.
        let sibling = |pid| match pid {
            4001 => Some(Sibling { guest_pid: 40, in_vms_network: true }),
            4002 => Some(Sibling { guest_pid: 50, in_vms_network: false }),
            _ => None,
        };
        let guest = |path: &str| Ok(Target::Guest(path.into()));
        let table = [
            (Network, "/proc/4001/ns/net", Ok(Target::VmNetwork)),
            (Network, "/proc/4002/ns/net", guest("/proc/50/ns/net")),
            (Ipc, "/proc/4001/ns/ipc", guest("/proc/40/ns/ipc")),
            (Uts, "/proc/4001/ns/uts", guest("/proc/40/ns/uts")),
            (Pid, "/proc/4002/ns/pid", guest("/proc/50/ns/pid")),
            (User, "/proc/4001/ns/user", guest("/proc/40/ns/user")),
            (Cgroup, "/proc/4001/ns/cgroup", guest("/proc/40/ns/cgroup")),
            (Network, "/proc/1/ns/net", Ok(Target::HostNetwork)),
            (Network, "/run/netns/x", Ok(Target::HostNetwork)),
            (Network, "/proc/4001/ns/ipc", Err("must be /proc/4001/ns/net")),
            (Mount, "/proc/4001/ns/mnt", Err("mount namespace")),
            // A PID of the guest is none of the host.
            (Pid, "/proc/40/ns/pid", Err("process 40 does not represent a running container")),
            (Network, "run/netns/x", Err("net namespace by its path on the host")),
            (Ipc, "/proc/self/ns/ipc", Err("ipc namespace by its path on the host")),
            (Ipc, "/proc/4001/../4001/ns/ipc", Err("by its path on the host")),
            (Ipc, "/proc/+4001/ns/ipc", Err("by its path on the host")),
            (Ipc, "/proc/4001/ns/ipc/x", Err("by its path on the host")),
            (Ipc, "proc/4001/ns/ipc", Err("by its path on the host")),
        ];
        for (kind, path, expected) in table {
            match (resolve(kind, Path::new(path), &sibling), expected) {
                (Err(text), Err(part)) if text.contains(part) => {}
                (Ok(target), Ok(expected)) if target == expected => {}
                (resolved, expected) => panic!("{kind} {path}: {resolved:?}, expected {expected:?}"),
            }
        }
    }
}
