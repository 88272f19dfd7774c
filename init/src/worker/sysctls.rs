//! The `net.*` sysctls of containers that share the VM's network namespace, and those of a sandbox without a pause
//! container.
//!
//! The containers of a pod share a network namespace, which in the guest is the VM's own. containerd's CRI plugin sets
//! `net.ipv4.ip_unprivileged_port_start` and `net.ipv4.ping_group_range` for every pod. libcontainer rejects such
//! sysctls for a container in its caller's network namespace, so that a container cannot change a host. Here the
//! namespace belongs to the sandbox, so the worker writes them.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};

/// Moves the `net.*` sysctls out of the spec if the container shares the VM's network namespace. Those of a container
/// with another one remain, for libcontainer. `is_vms` decides about a namespace that is named by a path.
pub(super) fn take(spec: &mut Spec, is_vms: impl Fn(&Path) -> bool) -> Vec<(String, String)> {
    let Some(linux) = spec.linux_mut() else { return Vec::new() };
    let mut namespaces = linux.namespaces().iter().flatten();
    let shared = match namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::Network) {
        None => true,
        // libcontainer takes an empty path for none as well.
        Some(namespace) => namespace.path().as_deref().is_some_and(|path| !path.as_os_str().is_empty() && is_vms(path)),
    };
    if !shared {
        return Vec::new();
    }
    let Some(sysctls) = linux.sysctl().clone() else { return Vec::new() };
    let (mut taken, rest): (Vec<_>, Vec<_>) =
        sysctls.into_iter().partition(|(key, _)| key.starts_with("net.") || key.starts_with("net/"));
    if !taken.is_empty() {
        linux.set_sysctl(if rest.is_empty() { None } else { Some(rest.into_iter().collect()) });
    }
    taken.sort();
    taken
}

/// Whether a path is that of the VM's network namespace. libcontainer reports a path that does not exist.
pub(super) fn is_vms_namespace(path: &Path) -> bool {
    let identity = |path: &Path| path.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
    match (identity(path), identity(Path::new("/proc/self/ns/net"))) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}

/// Sets the sysctls. The error is runc's, with the value in addition.
pub(crate) fn write(sysctls: &[(String, String)]) -> Result<(), String> {
    for (key, value) in sysctls {
        let path = file(key).ok_or_else(|| format!("write sysctl key {key}: is not the name of a sysctl"))?;
        // Without `create`: /proc/sys would reply EACCES for a file that does not exist.
        let mut file = OpenOptions::new()
            .write(true)
            .open(&path)
            .map_err(|e| format!("write sysctl key {key}: open {}: {e}", path.display()))?;
        // In one call: the kernel takes each write for a whole value.
        file.write_all(value.as_bytes())
            .map_err(|e| format!("write sysctl key {key}: write {value:?} to {}: {e}", path.display()))?;
    }
    Ok(())
}

/// The file of a sysctl. As in sysctl(8), the first separator of the name, a dot or a slash, is the one between its
/// parts, and the other one belongs to the parts: `net.ipv4.conf.eth0/100.forwarding`.
fn file(key: &str) -> Option<PathBuf> {
    let swapped = |c| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    let slashes = key.find(['.', '/']).is_some_and(|at| key.as_bytes()[at] == b'/');
    let path = if slashes { key.to_owned() } else { key.chars().map(swapped).collect() };
    let valid = path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    valid.then(|| Path::new("/proc/sys").join(path))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn only_a_container_in_the_vms_network_namespace_loses_its_network_sysctls() {
        let sysctls = json!({
            "net.ipv4.ping_group_range": "0 2147483647", "net/core/somaxconn": "7", "network": "1",
            "kernel.shmmax": "12345678"
        });
        let network = ["net.ipv4.ping_group_range", "net/core/somaxconn"];
        let table: [(Value, &[&str]); 6] = [
            (json!([{"type": "pid"}]), &network),
            (Value::Null, &network),
            (json!([{"type": "network", "path": "/proc/1/ns/net"}]), &network),
            (json!([{"type": "network"}]), &[]),
            (json!([{"type": "network", "path": ""}]), &[]),
            (json!([{"type": "network", "path": "/proc/77/ns/net"}]), &[]),
        ];
        for (namespaces, expected) in table {
            let spec = json!({"ociVersion": "1.2.0", "linux": {"sysctl": sysctls, "namespaces": namespaces}});
            let mut spec: Spec = serde_json::from_value(spec).unwrap();
            let taken = take(&mut spec, |path| path == Path::new("/proc/1/ns/net"));
            let keys: Vec<_> = taken.iter().map(|(key, _)| key.as_str()).collect();
            assert_eq!(keys, expected, "{namespaces}");
            let rest = spec.linux().as_ref().unwrap().sysctl().as_ref().unwrap();
            assert_eq!(rest.len(), 4 - expected.len(), "{namespaces}");
            assert!(rest.contains_key("kernel.shmmax") && rest.contains_key("network"), "{namespaces}");
        }
        let spec = json!({"ociVersion": "1.2.0", "linux": {"sysctl": {"net.ipv4.ip_forward": "1"}}});
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        assert_eq!(take(&mut spec, |_| false), [("net.ipv4.ip_forward".to_owned(), "1".to_owned())]);
        assert_eq!(*spec.linux().as_ref().unwrap().sysctl(), None);
    }

    #[test]
    fn a_name_leads_to_its_file_and_to_no_other() {
        let table = [
            ("net.ipv4.ip_forward", Some("/proc/sys/net/ipv4/ip_forward")),
            ("net/ipv4/ip_forward", Some("/proc/sys/net/ipv4/ip_forward")),
            ("net.ipv4.conf.eth0/100.forwarding", Some("/proc/sys/net/ipv4/conf/eth0.100/forwarding")),
            ("net/ipv4/conf/eth0.100/forwarding", Some("/proc/sys/net/ipv4/conf/eth0.100/forwarding")),
            ("net/../kernel/core_pattern", None),
            ("net.//.kernel.core_pattern", None),
            ("net..ipv4", None),
            ("net.", None),
        ];
        for (key, expected) in table {
            assert_eq!(file(key).as_deref(), expected.map(Path::new), "{key}");
        }
    }

    #[test]
    fn a_sysctl_that_cannot_be_set_is_named_with_its_value() {
        let failure = |key: &str, value: &str| write(&[(key.to_owned(), value.to_owned())]).unwrap_err();
        assert_eq!(
            failure("net.ipv4.nonsense", "1"),
            "write sysctl key net.ipv4.nonsense: open /proc/sys/net/ipv4/nonsense: No such file or directory (os error \
             2)"
        );
        assert_eq!(failure("net..", "1"), "write sysctl key net..: is not the name of a sysctl");
        let message = failure("net.ipv4.ip_default_ttl", "many");
        assert!(
            message.starts_with(
                "write sysctl key net.ipv4.ip_default_ttl: write \"many\" to /proc/sys/net/ipv4/ip_default_ttl: "
            ),
            "{message}"
        );
    }

    #[test]
    fn the_vms_network_namespace_is_recognized_by_its_inode() {
        let own = PathBuf::from(format!("/proc/{}/ns/net", std::process::id()));
        assert!(is_vms_namespace(&own));
        assert!(!is_vms_namespace(Path::new("/proc/self/ns/pid")) && !is_vms_namespace(Path::new("/absent")));
    }
}
