//! The sysctls of a pod that containerd's Sandbox API creates. With a pause container, containerd puts them into that
//! container's spec. Pure.

use std::collections::HashMap;

use crate::config::problem::Problem;

/// What containerd's CRI plugin sets for a pod by default, unless the pod names it: any user may listen on any port, and
/// send pings.
const DEFAULTS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];

/// The sysctls of IPC and UTS namespaces (ipc_namespaces(7), uts_namespaces(7)). A name that ends in a dot stands for
/// everything below.
const OF_NAMESPACES: [&str; 11] = [
    "net.",
    "fs.mqueue.",
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
    "kernel.domainname",
];
/// Longest value, bytes. The longest that the kernel takes is a list of ports.
const MAX_VALUE: usize = 1024;

/// The pod's sysctls and the defaults, by names with dots.
///
/// # Errors
/// Each sysctl that does not belong to a namespace of the pod.
pub(super) fn of_pod(requested: &HashMap<String, String>) -> Result<HashMap<String, String>, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut sysctls: HashMap<_, _> = DEFAULTS.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    for (given, value) in requested {
        let name = dotted(given);
        let known = OF_NAMESPACES.iter().any(|known| match known.ends_with('.') {
            true => name.len() > known.len() && name.starts_with(known),
            false => name == *known,
        });
        let why = if name == "kernel.hostname" {
            "is the pod's host name: set hostname"
        } else if !known {
            "belongs to no namespace of the pod: net.*, fs.mqueue.*, kernel.domainname, kernel.msg*, kernel.sem and \
             kernel.shm* do"
        } else if value.len() > MAX_VALUE || value.contains(['\n', '\0']) {
            "must be one line of at most 1024 bytes"
        } else {
            sysctls.insert(name, value.clone());
            continue;
        };
        problems.push(Problem::quoted(format!("linux.sysctls[{given:?}]"), value, why));
    }
    problems.sort_by(|one, other| one.key.cmp(&other.key));
    if problems.is_empty() { Ok(sysctls) } else { Err(problems) }
}

/// A name with dots between its parts. As in sysctl(8), the first separator of the name, a dot or a slash, is the one
/// between its parts, and the other one belongs to the parts.
fn dotted(name: &str) -> String {
    if name.find(['.', '/']).is_some_and(|at| name.as_bytes()[at] == b'/') {
        let swapped = |c| match c {
            '.' => '/',
            '/' => '.',
            other => other,
        };
        return name.chars().map(swapped).collect();
    }
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(sysctls: &[(&str, &str)]) -> Result<HashMap<String, String>, Vec<String>> {
        let sysctls = sysctls.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        of_pod(&sysctls).map_err(|problems| problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_pod_has_its_sysctls_and_containerds_defaults() {
        assert_eq!(of(&[]).unwrap().len(), 2);
        let given = [
            ("net/ipv4/conf/eth0.100/forwarding", "1"),
            ("kernel.sem", "250 32000 100 128"),
            ("fs.mqueue.msg_max", "20"),
            ("net.ipv4.ip_unprivileged_port_start", "1024"),
        ];
        let sysctls = of(&given).unwrap();
        let value = |name: &str| sysctls.get(name).map(String::as_str);
        assert_eq!(value("net.ipv4.conf.eth0/100.forwarding"), Some("1"));
        assert_eq!(value("kernel.sem"), Some("250 32000 100 128"));
        assert_eq!(value("net.ipv4.ip_unprivileged_port_start"), Some("1024"));
        assert_eq!(value("net.ipv4.ping_group_range"), Some("0 2147483647"));
        assert_eq!(sysctls.len(), 5);
    }

    #[test]
    fn a_sysctl_of_no_namespace_of_the_pod_is_rejected_by_name() {
        let long = "1".repeat(1025);
        for (name, value, why) in [
            ("vm.swappiness", "1", "belongs to no namespace"),
            ("kernel.core_pattern", "|/x", "belongs to no namespace"),
            ("kernel/shmmax_", "1", "belongs to no namespace"),
            ("net.", "1", "belongs to no namespace"),
            ("net", "1", "belongs to no namespace"),
            ("kernel.hostname", "x", "is the pod's host name"),
            ("net.core.somaxconn", "1\n2", "must be one line"),
            ("net.core.somaxconn", long.as_str(), "must be one line"),
        ] {
            let problems = of(&[(name, value)]).unwrap_err();
            let shown: String = value.chars().take(80).collect();
            let expected = format!("linux.sysctls[{name:?}] = {shown:?}: {why}");
            assert!(problems.len() == 1 && problems[0].starts_with(&expected), "{problems:?}");
        }
    }
}
