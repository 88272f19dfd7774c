//! Pods on a bridge: network namespaces of a daemon, as the CNI plugin `bridge` leaves them.

use anyhow::{Context, Result};

use crate::artifacts::Runtime;
use crate::containerd::{Container, Containerd};

/// The bridge's address in [`Bridge`].
const GATEWAY: &str = "10.88.0.1";

/// A namespace that stands for the node, with a bridge.
pub struct Bridge<'a> {
    containerd: &'a Containerd,
    name: String,
}

/// A namespace with one link, `eth0`, on the bridge.
pub struct Pod<'a> {
    containerd: &'a Containerd,
    /// The namespace's name for `ip -n`.
    pub name: String,
    /// Its address, without the length of the prefix, which is 16.
    pub address: String,
    /// The link's MAC.
    pub mac: String,
}

impl<'a> Bridge<'a> {
    /// Creates the node's namespace with its bridge.
    pub fn new(containerd: &'a Containerd, name: &str) -> Result<Self> {
        let name = format!("node-{}", containerd.id(name));
        let bridge = Self { containerd, name };
        bridge.containerd.sh(&format!(
            "set -e; n={}; ip netns add $n; ip -n $n link set lo up; ip -n $n link add cni0 type bridge
            ip -n $n addr add {GATEWAY}/16 dev cni0; ip -n $n addr add fd00:88::1/64 dev cni0 nodad
            ip -n $n link set cni0 up",
            bridge.name
        ))?;
        Ok(bridge)
    }

    /// The namespace's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds a pod. Its number, from 2 to 250, is the last part of its address.
    pub fn pod(&self, number: u8) -> Result<Pod<'a>> {
        let name = format!("pod{number}-{}", self.name);
        let address = format!("10.88.0.{number}");
        // Dropped, and so removed, if a command fails.
        let mut pod = Pod { containerd: self.containerd, name, address, mac: String::new() };
        let added = self.containerd.sh(&format!(
            "set -e; n={}; p={}; ip netns add $p; ip -n $p link set lo up
            ip -n $p link add eth0 type veth peer name veth{number} netns $n
            ip -n $n link set veth{number} master cni0 up
            ip -n $p addr add {}/16 brd 10.88.255.255 dev eth0; ip -n $p addr add fd00:88::{number}/64 dev eth0 nodad
            ip -n $p link set eth0 up
            ip -n $p route add default via {GATEWAY}; ip -n $p -6 route add default via fd00:88::1
            ip netns exec $p cat /sys/class/net/eth0/address",
            self.name, pod.name, pod.address
        ))?;
        pod.mac = added.text();
        Ok(pod)
    }
}

impl Pod<'_> {
    /// The namespace's path, in the daemon's mount namespace.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }
}

impl<'a> Pod<'a> {
    /// A container of the pod, in the background.
    pub fn container(&self, runtime: Runtime, flags: &[&str], name: &str, args: &[&str]) -> Result<Container<'a>> {
        let namespace = format!("network:{}", self.path());
        self.containerd.detached_with(runtime, &[&["--with-ns", &namespace], flags].concat(), name, args)
    }

    /// A counter of the pod's link in the namespace, such as rx_bytes.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let script = format!("ip netns exec {} cat /sys/class/net/eth0/statistics/{name}", self.name);
        self.containerd.sh(&script)?.text().parse().with_context(|| format!("the counter {name}"))
    }
}

impl Drop for Bridge<'_> {
    fn drop(&mut self) {
        // Fails if it was never created.
        let _ = self.containerd.sh(&format!("ip netns delete {}", self.name));
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // Fails if it was never created.
        let _ = self.containerd.sh(&format!("ip netns delete {}", self.name));
    }
}
