//! nerdctl's networks, published ports and compose projects, and `ctr run --cni`: what a user sees under runc holds under husk.
//!
//! Each scenario runs with runc and with husk, each under a daemon of its own, so that addresses and rules are the same.
//! It returns what the user has seen; the transcripts, and what remains afterwards, must be equal.
#![cfg(not(target_env = "musl"))]

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use husk_tests::artifacts::Runtime;
use husk_tests::cni::Plugins;
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::husk_only;
use husk_tests::machine::{Machine, WEB, normalized};
use husk_tests::nerdctl::Nerdctl;

/// Names, MTU, addresses and routes of a container, without MACs and link-local addresses, which are random.
const CONFIGURATION: &str =
    "for link in /sys/class/net/*; do echo ${link##*/} $(cat $link/mtu) $(cat $link/carrier); done
    ip -o -4 addr | awk '{print $2, $3, $4, $5, $6}' | sort; ip -4 route | sort";
/// What nerdctl mounts into a container.
const FILES: &str = "hostname; cat /etc/resolv.conf; sort /etc/hosts";

/// A machine of one runtime, and nerdctl on it.
struct Stage {
    machine: Machine,
    program: PathBuf,
}

impl Stage {
    fn nerdctl(&self) -> Nerdctl<'_> {
        Nerdctl::new(self.machine.containerd(), self.program.clone())
    }

    /// `nerdctl run --detach` of the web server.
    fn web(&self, name: &str, network: &str, flags: &[&str]) -> Result<()> {
        let flags = [&["--detach", "--name", name], flags].concat();
        let nerdctl = self.nerdctl();
        nerdctl.ok(&nerdctl.run_args(network, &flags, &["sh", "-c", WEB, name])).map(drop)
    }

    /// Runs a shell script in the container and returns its output, with ids replaced.
    fn exec(&self, name: &str, script: &str) -> Result<String> {
        let output = self.nerdctl().ok(&["exec", name, "sh", "-c", script]).with_context(|| script.to_owned())?;
        Ok(format!("{name}:\n{}\n", normalized(&output)))
    }

    /// The container's hosts file, once it names the other container. A VM sees a change of a mounted
    /// file within a second.
    fn hosts(&self, name: &str, other: &str) -> Result<String> {
        wait_for(Duration::from_secs(60), &format!("{other} is in the hosts file of {name}"), || {
            let hosts = self.exec(name, "sort /etc/hosts");
            hosts.map(|hosts| hosts.split_whitespace().any(|word| word == other).then_some(hosts)).transpose()
        })?
    }

    /// Fails unless the container's default routes are in the order of those in its namespace on the host, where nerdctl
    /// adds them in any order: the first one counts.
    fn expect_hosts_default_routes(&self, name: &str) -> Result<()> {
        let gateways = "ip -4 route | awk '/default/ {print $3}'";
        let pid = self.nerdctl().ok(&["inspect", "--format", "{{.State.Pid}}", name])?;
        let on_host = self.machine.containerd().sh(&format!("nsenter -t {pid} -n {gateways}"))?.text();
        let inside = self.nerdctl().ok(&["exec", name, "sh", "-c", gateways])?;
        ensure!(
            inside == on_host && inside.lines().count() == 2,
            "in the container:\n{inside}\non the host:\n{on_host}"
        );
        Ok(())
    }

    fn remove(&self, names: &[&str]) -> Result<()> {
        self.nerdctl().ok(&[&["rm", "--force"], names].concat()).map(drop)
    }
}

/// Runs the scenario under each runtime and compares what it returns and what it leaves.
fn same_with_both(scenario: fn(&Stage) -> Result<String>) -> Result<()> {
    let program = Nerdctl::program()?;
    let stage = |runtime| anyhow::Ok(Stage { machine: Machine::start(runtime)?, program: program.clone() });
    let runc = stage(Runtime::Runc)?;
    let expected = scenario(&runc).context("under runc")?;
    let expected_rest = runc.machine.settled()?;
    drop(runc);
    husk_only!();
    let husk = stage(Runtime::Husk)?;
    let found = scenario(&husk).context("under husk")?;
    ensure!(found == expected, "--- husk ---\n{found}\n--- runc ---\n{expected}");
    husk.machine.expect_remains(&expected_rest)
}

#[test]
fn nerdctl_publishes_ports_on_the_host() -> Result<()> {
    same_with_both(|stage| {
        let machine = &stage.machine;
        stage.web("web", "bridge", &["-p", "18080:80"])?;
        stage.web("local", "bridge", &["-p", "127.0.0.1:18081:80"])?;
        let mut seen = machine.fetch_published()?;
        seen +=
            &format!("ports: {} {}\n", stage.nerdctl().ok(&["port", "web"])?, stage.nerdctl().ok(&["port", "local"])?);
        seen += &stage.exec("web", CONFIGURATION)?;
        // From the container through NAT to another machine.
        stage.exec("web", "ping -c 2 -w 20 192.0.2.2")?;

        let script = "dd if=/dev/urandom of=/www/data bs=1M count=8 2>/dev/null; md5sum </www/data";
        let sum = stage.nerdctl().ok(&["exec", "web", "sh", "-c", script])?;
        let received = machine.fetch_sum("http://192.0.2.1:18080/data")?;
        ensure!(sum.contains(&received), "{sum} was sent, {received} received");

        stage.remove(&["web", "local"])?;
        ensure!(
            machine.fetch_once("http://127.0.0.1:18080")?.code() != 0,
            "the port is published without its container"
        );
        // The port is free again.
        stage.web("web", "bridge", &["-p", "18080:80"])?;
        seen += &machine.fetch("http://127.0.0.1:18080")?;
        stage.remove(&["web"])?;
        Ok(seen)
    })
}

#[test]
fn nerdctl_networks_have_static_addresses_names_and_a_second_link() -> Result<()> {
    same_with_both(|stage| {
        let nerdctl = stage.nerdctl();
        nerdctl.ok(&["network", "create", "--subnet", "10.77.1.0/24", "front"])?;
        nerdctl.ok(&["network", "create", "--subnet", "10.77.2.0/24", "back"])?;
        let dns = ["--dns", "192.0.2.53", "--dns-search", "example.test", "--add-host", "db:192.0.2.9"];
        stage.web("fixed", "front", &[&["--ip", "10.77.1.55"], &dns[..]].concat())?;
        let mut seen = stage.exec("fixed", &format!("{CONFIGURATION}; {FILES}"))?;

        stage.web("both", "front", &["--network", "back", "--hostname", "both"])?;
        stage.web("rear", "back", &[])?;
        seen += &stage.exec("both", &format!("{CONFIGURATION}; {FILES}"))?;
        stage.expect_hosts_default_routes("both")?;
        // nerdctl has rewritten the hosts file of a running container.
        seen += &stage.hosts("fixed", "both")?;
        for (from, to) in [("both", "fixed"), ("both", "rear"), ("fixed", "both"), ("rear", "both")] {
            seen += &stage.exec(from, &format!("wget -T 20 -q -O - http://{to}/"))?;
        }
        // No route leads from one network to the other.
        ensure!(nerdctl.run(&["exec", "fixed", "ping", "-c", "1", "-w", "2", "10.77.2.3"], None)?.code() != 0);

        nerdctl.ok(&["restart", "both"])?;
        seen += &stage.exec("both", CONFIGURATION)?;
        stage.expect_hosts_default_routes("both")?;
        seen += &stage.exec("fixed", "wget -T 20 -q -O - http://both/")?;
        nerdctl.ok(&["stop", "fixed"])?;
        seen += &stage.hosts("both", "fixed")?;
        nerdctl.ok(&["start", "fixed"])?;
        seen += &stage.exec("fixed", CONFIGURATION)?;
        seen += &stage.exec("both", "wget -T 20 -q -O - http://fixed/")?;

        stage.remove(&["fixed", "both", "rear"])?;
        nerdctl.ok(&["network", "rm", "front", "back"])?;
        Ok(seen)
    })
}

#[test]
fn nerdctl_compose_services_reach_each_other_by_name() -> Result<()> {
    same_with_both(|stage| {
        let nerdctl = stage.nerdctl();
        let (runtime, image) = (stage.machine.containerd().runtime().name(), stage.machine.containerd().image());
        let service = |name: &str| serde_json::json!({"image": image, "runtime": runtime, "command": ["sh", "-c", WEB.replace('$', "$$"), name]});
        let mut project = serde_json::json!({"services": {"web": service("web"), "client": service("client")}});
        project["services"]["web"]["ports"] = serde_json::json!(["18080:80"]);
        // In parallel, either could get the first address.
        project["services"]["client"]["depends_on"] = serde_json::json!(["web"]);
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("compose.yaml");
        // JSON is YAML.
        std::fs::write(&file, project.to_string())?;
        let file = file.display().to_string();
        let compose =
            |args: &[&str]| nerdctl.ok(&[&["compose", "--project-name", "shop", "--file", &file], args].concat());

        compose(&["up", "--detach"])?;
        let mut seen = compose(&["exec", "client", "wget", "-T", "20", "-q", "-O", "-", "http://web/"])?;
        seen += &compose(&["exec", "web", "wget", "-T", "20", "-q", "-O", "-", "http://client/"])?;
        seen += &stage.machine.fetch("http://127.0.0.1:18080")?;
        seen += &stage.exec("shop-web-1", &format!("{CONFIGURATION}; {FILES}"))?;
        let mut status: Vec<String> = compose(&["ps"])?.lines().map(|line| line.trim_end().to_owned()).collect();
        status.sort();
        let logged = wait_for(Duration::from_secs(30), "both services have logged", || {
            let logs = compose(&["logs", "--no-color"]);
            logs.map(|logs| {
                ["web has started", "client has started"].iter().all(|line| logs.contains(line)).then_some(logs)
            })
            .transpose()
        })??;
        let mut logged: Vec<&str> = logged.lines().collect();
        logged.sort();
        seen += &format!("{}\n{}\n", status.join("\n"), logged.join("\n"));

        compose(&["down"])?;
        ensure!(
            nerdctl.ok(&["ps", "--all", "--quiet"])?.is_empty() && !nerdctl.ok(&["network", "ls"])?.contains("shop")
        );
        Ok(seen)
    })
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_network_of_another_container_is_rejected_by_name_and_host_and_none_have_no_links() -> Result<()> {
    let program = Nerdctl::program()?;
    let stage = Stage { machine: Machine::start(Runtime::Husk)?, program };
    let nerdctl = stage.nerdctl();
    stage.web("first", "bridge", &[])?;
    let joined = nerdctl.run(&nerdctl.run_args("container:first", &["--rm"], &["true"]), None)?;
    ensure!(joined.code() != 0 && joined.errors().contains("connect each to the network"), "{joined}");
    for network in ["none", "host"] {
        let links = nerdctl.ok(&nerdctl.run_args(network, &["--rm"], &["ls", "/sys/class/net"]))?;
        ensure!(links == "lo", "--network {network}: {links}");
    }
    // The first container's network still works.
    stage.exec("first", "ping -c 1 -w 20 10.4.0.1")?;
    stage.remove(&["first"])
}

#[test]
fn ctr_run_with_cni_has_the_network_of_the_configuration() -> Result<()> {
    let scenario = |containerd: &Containerd| {
        containerd.sh(&format!(
            "mkdir -p /etc/cni/net.d /opt/cni/bin; mount --bind {} /opt/cni/bin
            cat >/etc/cni/net.d/10-test.conflist <<'END'
{{ \"cniVersion\": \"1.0.0\", \"name\": \"test\", \"plugins\": [
  {{ \"type\": \"bridge\", \"bridge\": \"cni0\", \"isGateway\": true, \"ipMasq\": true,
    \"ipam\": {{ \"type\": \"host-local\", \"ranges\": [[{{ \"subnet\": \"10.88.0.0/16\" }}]], \"routes\": [{{ \"dst\": \"0.0.0.0/0\" }}] }} }} ] }}
END",
            Plugins::newest()?.folder.display()
        ))?;
        // The first process finds the network complete.
        let script = format!("{CONFIGURATION}; ping -c 1 -w 20 10.88.0.1 >/dev/null && echo reached");
        let first = containerd.run(&["--cni"], &containerd.id("cni"), &["sh", "-c", &script]).ok()?.text();
        let second = containerd.detached(&["--cni"], "cni", &["sleep", "1000"])?;
        anyhow::Ok(first + &second.script(&script)?)
    };
    let runc = Machine::start(Runtime::Runc)?;
    let expected = scenario(runc.containerd()).context("under runc")?;
    ensure!(expected.contains("eth0 1500 1") && expected.contains("reached"), "{expected}");
    drop(runc);
    husk_only!();
    let husk = Machine::start(Runtime::Husk)?;
    let found = scenario(husk.containerd()).context("under husk")?;
    ensure!(found == expected, "--- husk ---\n{found}\n--- runc ---\n{expected}");
    let links = wait_for(Duration::from_secs(60), "the containers' links are gone", || {
        let links = husk.containerd().sh("ip -br link | cut -d' ' -f1; ls /run/netns").map(|output| output.text());
        links.map(|links| (!links.contains("veth") && !links.contains("husk-")).then_some(links)).transpose()
    })??;
    if links.lines().any(|line| line.starts_with("cni-")) {
        bail!("a network namespace is left: {links}");
    }
    Ok(())
}
