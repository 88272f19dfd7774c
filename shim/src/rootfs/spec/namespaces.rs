//! Namespaces that a container joins by path. A container can join those of other containers of its sandbox; all other
//! paths mean namespaces of the host. The sandbox's VM is connected to a network namespace of the host, and the
//! container uses the VM's own.

use std::path::{Component, Path};

use oci_spec::runtime::LinuxNamespaceType;

/// Whether the path means a network namespace of the host, such as one that a CNI plugin configured.
pub(super) fn is_network_of_host(kind: LinuxNamespaceType, path: &Path) -> bool {
    kind == LinuxNamespaceType::Network && path.is_absolute() && process_and_name(path).is_none()
}

/// Why a namespace cannot be joined by this path, if it cannot. `is_init` recognizes the inits of the sandbox's
/// containers. Clients take the PID from the response to Create, which is a PID of the guest, so the path is valid in
/// the guest.
pub(super) fn problem(kind: LinuxNamespaceType, path: &Path, is_init: &dyn Fn(u32) -> bool) -> Option<String> {
    let Some((pid, name)) = process_and_name(path) else {
        return (!is_network_of_host(kind, path))
            .then(|| format!("joining a {kind} namespace by its path on the host is not supported"));
    };
    if kind == LinuxNamespaceType::Mount {
        return Some("a container cannot join a mount namespace, because its root is mounted in its own".to_owned());
    }
    if name != file_of(kind) {
        return Some(format!("is not a {kind} namespace: the path must be /proc/{pid}/ns/{}", file_of(kind)));
    }
    (!is_init(pid)).then(|| format!("process {pid} is not the init of a container of this sandbox"))
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
    fn only_namespaces_of_the_same_sandbox_can_be_joined() {
        use LinuxNamespaceType::{Cgroup, Ipc, Mount, Network, Pid, User, Uts};
        let table = [
            (Network, "/proc/40/ns/net", None),
            (Ipc, "/proc/40/ns/ipc", None),
            (Uts, "/proc/40/ns/uts", None),
            (Pid, "/proc/40/ns/pid", None),
            (User, "/proc/40/ns/user", None),
            (Cgroup, "/proc/40/ns/cgroup", None),
            (Network, "/proc/1/ns/net", Some("process 1 is not the init")),
            (Network, "/proc/40/ns/ipc", Some("must be /proc/40/ns/net")),
            (Mount, "/proc/40/ns/mnt", Some("mount namespace")),
            (Network, "/run/netns/x", None),
            (Network, "run/netns/x", Some("net namespace by its path on the host")),
            (Ipc, "/proc/self/ns/ipc", Some("ipc namespace by its path on the host")),
            (Ipc, "/proc/40/../40/ns/ipc", Some("by its path on the host")),
            (Ipc, "/proc/+40/ns/ipc", Some("by its path on the host")),
            (Ipc, "/proc/40/ns/ipc/x", Some("by its path on the host")),
            (Ipc, "proc/40/ns/ipc", Some("by its path on the host")),
        ];
        for (kind, path, expected) in table {
            let problem = problem(kind, Path::new(path), &|pid| pid == 40);
            match (expected, problem) {
                (None, None) => {}
                (Some(part), Some(text)) if text.contains(part) => {}
                (expected, problem) => panic!("{kind} {path}: {problem:?}, expected {expected:?}"),
            }
        }
    }
}
