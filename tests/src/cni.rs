//! Networks as CNI plugins make them, through the protocol of the CNI specification 1.0.
//!
//! The plugins run in a network namespace that stands for a node, so each test has its own bridges and firewall rules.
//! An uplink connects the node with another namespace, from where clients outside the node reach it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::artifacts::repository;
use crate::command::{self, Output};
use crate::containerd::Containerd;

/// Deadline for a plugin, and for a command in a namespace: as long as the largest transfer takes on a loaded machine.
const COMMAND: Duration = Duration::from_secs(300);
/// Both releases support it.
const VERSION: &str = "1.0.0";

/// The node's address on its uplink.
pub const NODE: &str = "192.0.2.1";
/// The address at the other end of the uplink.
pub const OUTSIDE: &str = "192.0.2.2";

/// One release of the CNI plugins.
#[derive(Clone, Debug)]
pub struct Plugins {
    /// Where they come from: `debian` or `module`.
    pub origin: &'static str,
    /// Their directory.
    pub folder: PathBuf,
}

impl Plugins {
    /// The releases that `tests/setup-cni` has fetched.
    pub fn all() -> Result<Vec<Self>> {
        let folder = repository().join(".cache/cni");
        let mut all = Vec::new();
        for origin in ["debian", "module"] {
            let plugins = Self { origin, folder: folder.join(origin) };
            if !plugins.folder.join("bridge").exists() {
                bail!("{} is missing: run `./task test-tools` first", plugins.folder.display());
            }
            all.push(plugins);
        }
        Ok(all)
    }

    /// The newest release.
    pub fn newest() -> Result<Self> {
        Self::all()?.pop().context("there are no CNI plugins")
    }
}

/// A namespace in which plugins run. Its links, rules and processes end with it.
pub struct Node<'a> {
    /// The daemon in whose /run the namespaces are.
    pub containerd: &'a Containerd,
    plugins: Plugins,
    id: String,
}

impl<'a> Node<'a> {
    /// Creates a node whose uplink has both families.
    pub fn new(containerd: &'a Containerd, plugins: &Plugins, name: &str) -> Result<Self> {
        let node = Self { containerd, plugins: plugins.clone(), id: containerd.id(name) };
        node.sh(&format!(
            "ip netns add $node; ip netns add $outside
            ip -n $node link set lo up; ip -n $outside link set lo up
            ip -n $node link add uplink mtu 9000 type veth peer name eth0 mtu 9000 netns $outside
            ip -n $node addr add {NODE}/24 dev uplink; ip -n $node addr add 2001:db8::1/64 dev uplink nodad
            ip -n $outside addr add {OUTSIDE}/24 dev eth0; ip -n $outside addr add 2001:db8::2/64 dev eth0 nodad
            ip -n $node link set uplink up; ip -n $outside link set eth0 up
            ip netns exec $node sysctl -q net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1"
        ))?;
        Ok(node)
    }

    /// The name of the node's namespace.
    pub fn name(&self) -> String {
        format!("node-{}", self.id)
    }

    /// Runs a script in the daemon's namespaces, with `$node` and `$outside` set to the names of the node's.
    pub fn sh(&self, script: &str) -> Result<Output> {
        let names = format!("set -e; node={}; outside=outside-{}", self.name(), self.id);
        let mut command = self.containerd.enter("sh");
        command.args(["-c", &format!("{names}\n{script}")]);
        command::run(command, None, COMMAND)?.ok()
    }

    /// Creates a pod's namespace and attaches it to the networks: to the first one as `eth0`, to the next as `net1`.
    pub fn pod(&self, networks: &[Network]) -> Result<Pod<'_>> {
        let mut pod = Pod { node: self, name: self.containerd.id("pod"), attachments: Vec::new() };
        self.sh(&format!("ip netns add {0}; ip -n {0} link set lo up", pod.name))?;
        for (number, network) in networks.iter().enumerate() {
            let link = if number == 0 { "eth0".to_owned() } else { format!("net{number}") };
            pod.attach(network, link)?;
        }
        Ok(pod)
    }

    fn plugin(&self, call: &Call<'_>, config: &Value) -> Result<String> {
        let kind = config["type"].as_str().context("a plugin without a type")?;
        let mut command = self.containerd.enter("ip");
        command.args(["netns", "exec", &self.name()]);
        command.arg(self.plugins.folder.join(kind));
        command.env("CNI_COMMAND", call.command).env("CNI_CONTAINERID", &call.pod.name).env("CNI_IFNAME", call.link);
        command.env("CNI_NETNS", call.pod.netns()).env("CNI_PATH", &self.plugins.folder);
        let output = command::run(command, Some(serde_json::to_vec(config)?), COMMAND)?;
        ensure!(output.code() == 0, "CNI {} of {kind}: {output}", call.command);
        Ok(output.text())
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        // The namespaces live as long as the servers in them.
        let script = "for netns in $node $outside; do
                ip netns pids $netns | xargs -r kill -KILL; ip netns delete $netns
            done";
        if let Err(error) = self.sh(script) {
            eprintln!("remove the node {}: {error:?}", self.id);
        }
    }
}

struct Call<'a> {
    command: &'static str,
    pod: &'a Pod<'a>,
    link: &'a str,
}

/// A network's configuration list, and what the runtime passes to plugins that declare the capability.
#[derive(Clone, Debug)]
pub struct Network {
    /// Unique on a node.
    pub name: &'static str,
    /// The plugins' configurations, in order.
    pub plugins: Vec<Value>,
    /// Values by capability, such as `portMappings`.
    pub runtime: Value,
}

impl Network {
    /// The plugin's configuration as the runtime completes it.
    fn config(&self, node: &Node<'_>, plugin: &Value, previous: &Value) -> Value {
        let mut config = plugin.clone();
        config["cniVersion"] = VERSION.into();
        config["name"] = self.name.into();
        if config["ipam"]["type"] == "host-local" {
            config["ipam"]["dataDir"] = format!("/run/cni-{}", node.id).into();
        }
        for (capability, value) in self.runtime.as_object().into_iter().flatten() {
            if config["capabilities"][capability] == true {
                config["runtimeConfig"][capability] = value.clone();
            }
        }
        if !previous.is_null() {
            config["prevResult"] = previous.clone();
        }
        config
    }
}

/// Addresses from these ranges, with routes to everything of their families.
pub fn host_local(subnets: &[&str]) -> Value {
    let ranges: Vec<Value> = subnets.iter().map(|subnet| json!([{"subnet": subnet}])).collect();
    let default = |subnet: &&str| json!({"dst": if subnet.contains(':') { "::/0" } else { "0.0.0.0/0" }});
    json!({"type": "host-local", "ranges": ranges, "routes": subnets.iter().map(default).collect::<Vec<_>>()})
}

struct Attachment {
    network: Network,
    link: String,
    result: Value,
}

/// A network namespace that is attached to networks of a node.
pub struct Pod<'a> {
    node: &'a Node<'a>,
    name: String,
    attachments: Vec<Attachment>,
}

impl Pod<'_> {
    /// The daemon in whose /run the namespace is.
    pub fn containerd(&self) -> &Containerd {
        self.node.containerd
    }

    /// The namespace's path, as the daemon sees it.
    pub fn netns(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// The addresses that the plugins have reported for the attachment with this number.
    pub fn addresses(&self, attachment: usize) -> Result<Vec<String>> {
        let attachment = self.attachments.get(attachment).context("no such attachment")?;
        let address = |ip: &Value| {
            let address = ip["address"].as_str()?.split('/').next()?;
            Some(if address.contains(':') { format!("[{address}]") } else { address.to_owned() })
        };
        Ok(attachment.result["ips"].as_array().into_iter().flatten().filter_map(address).collect())
    }

    /// Runs a script like [`Node::sh`], with `$pod` set to the name of this namespace.
    pub fn sh(&self, script: &str) -> Result<String> {
        Ok(self.node.sh(&format!("pod={}\n{script}", self.name))?.text())
    }

    /// Links with their flags, and ingress qdiscs: what a VM's connection changes in the namespace.
    pub fn devices_and_qdiscs(&self) -> Result<String> {
        // The kernel sets the queue length of a link without one when it gets a qdisc: net/sched/sch_api.c.
        self.sh("ip -n $pod -o link | cut -d: -f2- | sed 's/ *qlen [0-9]*//; s/ *\\\\//'; tc -n $pod qdisc | grep ingress || true")
    }

    fn attach(&mut self, network: &Network, link: String) -> Result<()> {
        let mut result = Value::Null;
        for plugin in &network.plugins {
            let config = network.config(self.node, plugin, &result);
            let call = Call { command: "ADD", pod: self, link: &link };
            result = serde_json::from_str(&self.node.plugin(&call, &config)?)?;
        }
        self.attachments.push(Attachment { network: network.clone(), link, result });
        Ok(())
    }

    /// Detaches from all networks, in reverse order.
    pub fn detach(&mut self) -> Result<()> {
        while let Some(attachment) = self.attachments.pop() {
            for plugin in attachment.network.plugins.iter().rev() {
                let config = attachment.network.config(self.node, plugin, &attachment.result);
                self.node.plugin(&Call { command: "DEL", pod: self, link: &attachment.link }, &config)?;
            }
        }
        Ok(())
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // Fails if the test has removed the namespace.
        let _ = self.sh("ip netns delete $pod");
    }
}
