//! A node: a containerd with its CRI plugin, a bridge network for pods and a registry, in a machine of its own.

use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use husk_tests::artifacts::{Runtime, repository};
use husk_tests::command::{self, Output};
use husk_tests::containerd::{Containerd, ENV};
use husk_tests::machine::Machine;
use husk_tests::process::{self, Process};
use husk_tests::registry::{Images, serve};

use crate::daemon::Daemon;

/// The runtime handler and RuntimeClass of runc.
pub const RUNC: &str = "runc";
/// The registry for all images, whichever registry they name.
const REGISTRY: &str = "127.0.0.1:5000";
/// The node's CRI socket.
pub const SOCKET: &str = "/run/node/containerd.sock";
/// The socket of the Node Resource Interface.
pub const NRI: &str = "/run/node/nri.sock";
/// Deadline for containerd to become ready.
const START: Duration = Duration::from_secs(60);
/// How long the kubelet may take to remove the sandboxes of the last pods: it does so once a minute. Until then, a shim of
/// the Sandbox API has to run.
const COLLECT: Duration = Duration::from_secs(120);
/// How long containerd and the shims may clean up after that.
const SETTLE: Duration = Duration::from_secs(10);
/// Between two questions about sandboxes, which cost CPU time that the cleanup needs.
const POLL: Duration = Duration::from_millis(500);
/// The cgroup that the CRI plugin makes for pods without a parent cgroup.
const CGROUP: &str = "k8s.io";

/// A pod with a host port is reached on the loopback address, so that address must be routable. Tests share IPC objects
/// and host names with the node; its namespaces outlive containerd.
const PREPARE: &str = r#"set -e
mkdir -p /run/node/cni /run/node/registries/_default /run/node/files /run/tmp
ip route add default via 192.0.2.2
sysctl -qw net.ipv4.conf.all.route_localnet=1 net.ipv6.conf.all.forwarding=1
touch /run/node/ipc /run/node/uts
unshare --ipc=/run/node/ipc --uts=/run/node/uts hostname node
cat >/run/node/registries/_default/hosts.toml <<END
server = "http://REGISTRY"
[host."http://REGISTRY"]
  capabilities = ["pull", "resolve"]
END
cat >/run/node/cni/10-bridge.conflist <<END
{ "cniVersion": "1.0.0", "name": "pods", "plugins": [
  { "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
    "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.88.0.0/16" }], [{ "subnet": "fd00:88::/64" }]],
              "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] } },
  { "type": "portmap", "capabilities": { "portMappings": true } } ] }
END
cat >/run/node/crictl.yaml <<END
runtime-endpoint: unix:///run/node/containerd.sock
image-endpoint: unix:///run/node/containerd.sock
timeout: 120
END
mkdir -p /etc/containerd
cat >/etc/containerd/config.toml <<END
CONFIG
END
{ cat /run/containerd/husk.toml; echo; echo 'machine = "q35"'; } >/run/node/q35.toml
"#;

const CONFIG: &str = r#"version = 3
root = "/run/node/root"
state = "/run/node/state"
[grpc]
  address = "/run/node/containerd.sock"
[ttrpc]
  address = "/run/node/containerd.sock.ttrpc"
[plugins."io.containerd.cri.v1.images"]
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "registry.k8s.io/pause:3.10.1"
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "/run/node/registries"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["PLUGINS"]
    conf_dir = "/run/node/cni"
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        SystemdCgroup = false
[plugins."io.containerd.nri.v1.nri"]
  disable = false
  socket_path = "/run/node/nri.sock"
  plugin_path = "/run/node/nri"
  plugin_config_path = "/run/node/nri.d"
"#;

/// husk's handlers.
const HANDLERS: &str = r#"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.husk]
  runtime_type = "io.containerd.husk.v1"
  pod_annotations = ["io.husk.*"]
  container_annotations = ["io.husk.*"]
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.husk-shim]
  runtime_type = "io.containerd.husk.v1"
  pod_annotations = ["io.husk.*"]
  container_annotations = ["io.husk.*"]
  sandboxer = "shim"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.husk-q35]
  runtime_type = "io.containerd.husk.v1"
  options = { ConfigPath = "/run/node/q35.toml" }
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.husk-shim-q35]
  runtime_type = "io.containerd.husk.v1"
  options = { ConfigPath = "/run/node/q35.toml" }
  sandboxer = "shim"
"#;

/// Puts the configuration where an installed husk reads it.
const HUSK: &str = "mkdir -p /etc/husk && cp /run/containerd/husk.toml /etc/husk/config.toml";

/// What a node has of husk when it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Husk<'a> {
    /// containerd's configuration has husk's handlers. The text is lines of husk's configuration.
    Registered(&'a str),
    /// A configuration of husk, and nothing else: a test installs it.
    Absent,
}

/// What containers leave behind, besides processes.
const LEFT: &str = "ls -d /run/husk/*/* 2>/dev/null; ip netns list | grep -v outside; true";

/// The folder that `tests/setup-kubernetes` fills.
pub fn folder() -> PathBuf {
    repository().join(".cache/kubernetes")
}

/// The programs: containerd, crictl, critest.
pub fn bin() -> PathBuf {
    folder().join("bin")
}

fn plugins() -> PathBuf {
    repository().join(".cache/cni/module")
}

fn images() -> PathBuf {
    folder().join("images")
}

/// What must exist before a node can start.
pub fn needs() -> [PathBuf; 4] {
    [bin().join("containerd"), bin().join("crictl"), plugins().join("bridge"), images().join("tags")]
}

/// A running node. It ends with everything in it when it is dropped.
pub struct Node {
    machine: Machine,
    /// containerd.
    daemon: Daemon,
    /// What runs on the node without a pod.
    idle: usize,
}

impl Node {
    /// Starts one. containerd and the shims write to the file `log`.
    pub fn start(log: &Path, husk: Husk) -> Result<Self> {
        let (lines, handlers) = match husk {
            Husk::Registered(lines) => (lines, HANDLERS),
            Husk::Absent => ("", ""),
        };
        let machine = Machine::configured(Runtime::Husk, lines)?;
        let config = CONFIG.replace("PLUGINS", &plugins().display().to_string()) + handlers;
        machine.containerd().sh(&PREPARE.replace("REGISTRY", REGISTRY).replace("CONFIG", &config))?.ok()?;
        if husk == Husk::Absent {
            machine.containerd().sh(HUSK)?.ok()?;
        }
        let listener =
            machine.containerd().in_network(|| TcpListener::bind(REGISTRY).context("listen for the registry"))?;
        serve(listener, Arc::new(Images::open(&images())?));
        let daemon = start_containerd(machine.containerd(), log, husk)?;
        let mut node = Self { machine, daemon, idle: 0 };
        node.await_ready()?;
        node.crictl(&["pull", "registry.k8s.io/pause:3.10.1"])?;
        node.mark_idle();
        Ok(node)
    }

    /// Notes what runs without a pod: see [`Self::left`].
    pub fn mark_idle(&mut self) {
        self.idle = self.processes().len();
    }

    /// containerd.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    /// The machine that the node is.
    pub fn machine(&self) -> &Containerd {
        self.machine.containerd()
    }

    /// Waits until the CRI plugin answers.
    pub fn await_ready(&mut self) -> Result<()> {
        let mut last = String::new();
        let ready = command::wait_for(START, "the CRI plugin answers", || match self.crictl(&["version"]) {
            Ok(_) => Some(Ok(())),
            Err(error) => {
                last = format!("{error:#}");
                self.daemon.has_exited().then(|| bail!("containerd has exited"))
            }
        });
        ready.and_then(|ready| ready).with_context(|| last)
    }

    /// A command in the node's namespaces.
    pub fn enter(&self, program: impl AsRef<Path>) -> Command {
        enter(self.machine.containerd(), program.as_ref())
    }

    /// Runs crictl.
    pub fn crictl(&self, words: &[&str]) -> Result<Output> {
        let mut command = self.enter(bin().join("crictl"));
        command.args(["--config", "/run/node/crictl.yaml"]).args(words);
        command::run(command, None, START)?.ok()
    }

    /// PATH of the node's programs.
    pub fn search_path(&self) -> String {
        search_path(self.machine.containerd())
    }

    /// A part of the names of cgroups that end with the node.
    pub fn token(&self) -> &str {
        self.machine.containerd().token()
    }

    /// Kills everything that runs on the node: the kernel kills a PID namespace with its process 1.
    pub fn kill(&self) {
        if let Some(first) = Process::read(self.machine.containerd().pid()) {
            first.kill();
        }
    }

    fn processes(&self) -> Vec<Process> {
        process::descendants(self.machine.containerd().pid())
    }

    /// What pods have left on the node, one thing per line, when everything has had time to clean up.
    pub fn left(&self) -> Result<String> {
        if let Err(error) = self.await_collected() {
            return Ok(format!("{error:#}"));
        }
        let (mut left, started) = (Ok(String::new()), Instant::now());
        let clean = command::wait_for(SETTLE, "nothing is left", || {
            left = self.leftovers();
            left.as_ref().is_ok_and(String::is_empty).then_some(())
        });
        // A timeout is a result here: what is left.
        clean.map_or(left, |()| {
            writeln!(std::io::stderr(), "kubernetes: nothing was left {:.1?} later", started.elapsed())?;
            Ok(String::new())
        })
    }

    /// Waits until the kubelet has removed the sandboxes of all pods, and says how long it took.
    pub fn await_collected(&self) -> Result<()> {
        let (mut last, started) = (String::new(), Instant::now());
        let gone = command::poll(POLL, COLLECT, "the sandboxes of all pods are removed", || {
            let (text, done) = match self.crictl(&["pods"]) {
                // One line is the table's head.
                Ok(pods) => (pods.text(), pods.text().lines().count() <= 1),
                Err(error) => (format!("{error:#}"), false),
            };
            last = text;
            done.then_some(())
        });
        gone.with_context(|| last)?;
        writeln!(std::io::stderr(), "kubernetes: all sandboxes were removed after {:.1?}", started.elapsed())?;
        Ok(())
    }

    fn leftovers(&self) -> Result<String> {
        let mut left = self.machine.containerd().sh(LEFT)?.text();
        let processes = self.processes();
        if processes.len() > self.idle {
            processes.iter().for_each(|process| left += &format!("\n{} {}", process.pid, process.command));
        }
        Ok(left)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // containerd runs in the machine's PID namespace, which would end only afterwards.
        self.kill();
        self.daemon.wait();
        remove_cgroup();
    }
}

/// In the machine's namespaces, and in the node's IPC and UTS namespaces.
fn enter(machine: &Containerd, program: &Path) -> Command {
    let mut command = machine.enter("nsenter");
    command.args(["--ipc=/run/node/ipc", "--uts=/run/node/uts", "--"]).arg(program);
    command.env("PATH", search_path(machine));
    command.env("TMPDIR", "/run/tmp");
    command
}

/// husk's programs, those of the node's containerd, and the machine's runc.
fn search_path(machine: &Containerd) -> String {
    format!("{}:{}:{}", repository().join("out").display(), bin().display(), machine.search_path())
}

fn start_containerd(machine: &Containerd, log: &Path, husk: Husk) -> Result<Daemon> {
    let mut command = enter(machine, &bin().join("containerd"));
    command.args(["--log-level", "debug", "--config", "/etc/containerd/config.toml"]);
    if husk == Husk::Absent {
        // It finds what is installed, and not this repository's.
        for (name, _) in ENV {
            command.env_remove(name);
        }
        let (ours, with_runc) = (bin(), machine.bin());
        command.env("PATH", format!("{}:{}:/usr/sbin:/usr/bin:/sbin:/bin", ours.display(), with_runc.display()));
    }
    Daemon::start(command, log).context("start containerd")
}

/// The CRI plugin leaves its cgroup behind, which others on this machine may use too: only an empty one is removed.
fn remove_cgroup() {
    let Ok(hierarchies) = std::fs::read_dir("/sys/fs/cgroup") else { return };
    for hierarchy in hierarchies.flatten() {
        let _ = std::fs::remove_dir(hierarchy.path().join(CGROUP));
    }
    let _ = std::fs::remove_dir(Path::new("/sys/fs/cgroup").join(CGROUP));
}
