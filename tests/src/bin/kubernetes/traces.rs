//! Everything on a node that pods could leave behind, to be compared before and after.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::Result;
use husk_tests::command;
use husk_tests::leftovers::Leftovers;

use crate::node::{self, Node};

/// How long containerd, the shims and the kubelet may clean up after the last sandbox is removed.
const SETTLE: Duration = Duration::from_secs(240);
/// A snapshot costs CPU time that the cleanup needs.
const INTERVAL: Duration = Duration::from_secs(2);
/// What the daemons store there is asked for by name instead.
const STORES: [&str; 3] = ["/run/node/root", "/run/node/etcd", "/run/node/files"];
/// Daemons have other PIDs after a restart.
const DAEMONS: [&str; 4] = ["containerd", "kubelet", "etcd", "kube-apiserver"];

/// What is not below `/run`: firewall rules, addresses in use, logs, containerd's containers and tasks.
/// Not its snapshots: a killed containerd leaves those of the creates that it was busy with, for a day, to its leases.
const LIST: &str = r#"iptables-save | sed -n 's/^-/firewall rule -/p'
find /var/lib/cni /var/log/pods /var/log/containers -mindepth 1 -not -name 'last_reserved_ip*' 2>/dev/null | sed 's/^/file /'
ctr() { "$0" --address /run/node/containerd.sock --namespace k8s.io "$@"; }
ctr containers ls -q | sed 's/^/container /'
ctr tasks ls -q | sed 's/^/task /'"#;

/// A snapshot.
pub struct Traces {
    left: Leftovers,
    listed: BTreeSet<String>,
}

impl Traces {
    /// Takes the snapshot.
    pub fn now(node: &Node) -> Result<Self> {
        let left = Leftovers::now_without(node.machine(), &STORES);
        let mut command = node.enter("sh");
        command.args(["-c", LIST]).arg(node::bin().join("ctr"));
        let listed = command::run(command, None, SETTLE)?.ok()?.text().lines().map(str::to_owned).collect();
        Ok(Self { left, listed })
    }

    /// What the node has now and did not have then, one thing per line, when everything has had time to clean up. Lines for
    /// which `excused` holds do not count.
    pub fn added(&self, node: &Node, excused: impl Fn(&str) -> bool) -> Result<String> {
        if let Err(error) = node.await_collected() {
            return Ok(format!("{error:#}"));
        }
        let (mut added, started) = (Ok(String::new()), Instant::now());
        let clean = command::poll(INTERVAL, SETTLE, "nothing is left", || {
            added = Self::now(node).map(|now| self.without(&now, &excused));
            added.as_ref().is_ok_and(String::is_empty).then_some(())
        });
        // A timeout is a result here: what is left.
        clean.map_or(added, |()| {
            writeln!(std::io::stderr(), "kubernetes: nothing was left {:.1?} later", started.elapsed())?;
            Ok(String::new())
        })
    }

    fn without(&self, now: &Self, excused: &impl Fn(&str) -> bool) -> String {
        let mut added = self.left.added(&now.left);
        added.retain(|line| !is_daemon(line) && !is_class(line) && !excused(line));
        added.extend(now.listed.difference(&self.listed).cloned());
        added.join("\n")
    }
}

/// Whether it is a line like `process 12 containerd: /path/containerd --config ...`.
fn is_daemon(line: &str) -> bool {
    let name = line.strip_prefix("process ").and_then(|rest| rest.split_once(": ")?.0.split_once(' '));
    name.is_some_and(|(_, name)| DAEMONS.contains(&name))
}

/// Whether it is a cgroup that the kubelet makes for all pods of a class of service.
fn is_class(line: &str) -> bool {
    ["/kubepods/burstable", "/kubepods/besteffort"].iter().any(|class| line.ends_with(class))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_of_all_pods_is_no_trace_and_that_of_a_pod_is() {
        assert!(is_class("cgroup /sys/fs/cgroup/cpu/kubelet-1x0/kubepods/burstable"));
        assert!(!is_class("cgroup /sys/fs/cgroup/cpu/kubelet-1x0/kubepods/burstable/pod1"));
    }

    #[test]
    fn a_daemon_is_no_trace_and_a_shim_is() {
        assert!(is_daemon("process 12 containerd: /bin/containerd --config x"));
        assert!(is_daemon("process 1 kubelet: zombie"));
        assert!(!is_daemon("process 12 containerd-shim: /bin/containerd-shim-runc-v2"));
        assert!(!is_daemon("folder /run/husk/x: containerd"));
    }
}
