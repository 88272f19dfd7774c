//! Links, addresses and routes that appear in a container's network namespace after its VM has booted reach the guest,
//! as a container under runc sees them at once.
#![cfg(not(target_env = "musl"))]

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::Runtime;
use husk_tests::command::wait_for;
use husk_tests::containerd::{Configured, Container, Containerd};
use husk_tests::shim::{Shim, Streams};

const SLEEP: [&str; 2] = ["sleep", "1000"];
/// How long a change may take to arrive.
const ARRIVES: Duration = Duration::from_secs(60);

/// An empty network namespace of the daemon, and one with the other ends of its links.
struct Pod<'a> {
    containerd: &'a Containerd,
    name: String,
}

impl<'a> Pod<'a> {
    fn new(containerd: &'a Containerd, name: &str) -> Result<Self> {
        let pod = Self { containerd, name: containerd.id(name) };
        pod.sh("ip netns add $pod; ip netns add $peer; p link set lo up")?;
        Ok(pod)
    }

    /// Runs a script with `$pod` and `$peer` set to the names of the two namespaces. `p` and `q` run `ip` in them, and
    /// `plug LINK NUMBER` does what a CNI plugin does.
    fn sh(&self, script: &str) -> Result<String> {
        let names = format!(
            "set -e; pod=pod-{0}; peer=peer-{0}
            p() {{ ip -n $pod \"$@\"; }}; q() {{ ip -n $peer \"$@\"; }}
            plug() {{
                q link add peer$2 mtu 1400 type veth peer name made$2 mtu 1400
                q addr add 10.$2.0.1/24 dev peer$2; q addr add fd00:$2::1/64 dev peer$2 nodad; q link set peer$2 up
                q link set made$2 netns $pod; p link set made$2 name $1; p link set $1 up
                p addr add 10.$2.0.7/24 brd 10.$2.0.255 dev $1; p addr add fd00:$2::7/64 dev $1 nodad
            }}",
            self.name
        );
        Ok(self.containerd.sh(&format!("{names}\n{script}"))?.text())
    }

    fn container(&self, runtime: Runtime, name: &str) -> Result<Container<'a>> {
        let namespace = format!("network:/run/netns/pod-{}", self.name);
        // With two virtual CPUs, each card has two pairs of queues.
        let flags = ["--with-ns", &namespace, "--annotation", "io.husk.vcpus=2"];
        self.containerd.detached_with(runtime, &flags, name, &SLEEP)
    }

    /// A shim with a container that is not created yet.
    fn shim(&self, id: &str, args: &[&str]) -> Result<Shim<'a>> {
        let mut spec = husk_tests::bundle::spec(id, args);
        let path = format!("/run/netns/pod-{}", self.name);
        let namespaces = spec["linux"]["namespaces"].as_array_mut().into_iter().flatten();
        namespaces.filter(|n| n["type"] == "network").for_each(|n| n["path"] = path.clone().into());
        Shim::start(self.containerd, id, &spec)
    }

    /// What a VM's connection adds to the pod's namespace.
    fn devices_and_qdiscs(&self) -> Result<String> {
        self.sh("p -o link | cut -d: -f2; tc -n $pod qdisc | grep ingress || true")
    }

    fn wait_until_clean(&self, before: &str) -> Result<()> {
        wait_for(ARRIVES, "only the pod's own devices are left", || {
            self.devices_and_qdiscs().map(|now| (now == before).then_some(())).transpose()
        })?
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        let _ = self.sh("ip netns delete $pod");
        let _ = self.sh("ip netns delete $peer");
    }
}

/// Names, MACs, MTU, states, addresses, routes, rules and permanent neighbours, without numbers and flags that are the
/// kernel's own. The host's taps have names that start with `husk`. The kernel's order of links is not that of names.
const CONFIGURATION: &str = "for link in $(ls /sys/class/net | grep -v ^husk); do
        echo $link $(cat /sys/class/net/$link/mtu) $(cat /sys/class/net/$link/address) \
            $(ip link show dev $link | grep -o '[<,]UP[,>]' | tr -d '<,>')
    done
    ip -o -4 addr | awk '{print $2, $3, $4, $5, $6}' | sort -s -k 1,1
    ip -o -6 addr | awk '/scope global/ {print $2, $3, $4}' | sort -s -k 1,1
    ip -4 route; ip -6 route | grep -v '^fe80\\|^ff00\\|multicast' | awk '{print $1, $2, $3, $4, $5}'
    ip rule | sed 's/\\t/ /g'; ip neigh | grep PERMANENT | sed 's, used .*,,' | sort; true";

/// Waits until a container in a VM shows what a container of runc in the same namespace shows. `husk` runs a script.
fn wait_until_same(husk: impl Fn(&str) -> Result<String>, runc: &Container<'_>) -> Result<String> {
    let (mut found, mut expected) = (String::new(), String::new());
    let same = wait_for(ARRIVES, "the guest has the namespace's network", || {
        let read = husk(CONFIGURATION).and_then(|found| Ok((found, runc.script(CONFIGURATION)?)));
        (found, expected) = match read {
            Ok(read) => read,
            Err(error) => return Some(Err(error)),
        };
        (found == expected && !found.is_empty()).then_some(Ok(()))
    });
    same.with_context(|| format!("husk:\n{found}\nrunc:\n{expected}"))??;
    Ok(expected)
}

/// Traffic in both directions: the peer downloads a file from this address of the container.
fn download(pod: &Pod<'_>, husk: impl Fn(&str) -> Result<String>, address: &str) -> Result<()> {
    let sum = husk(
        "mkdir /www; dd if=/dev/urandom of=/www/data bs=1M count=4 2>/dev/null
        httpd -p 8080 -h /www; md5sum </www/data",
    )?;
    let download = format!(
        "import hashlib, urllib.request as u
direct = u.build_opener(u.ProxyHandler({{}}))
print(hashlib.md5(direct.open('http://{address}:8080/data', timeout=60).read()).hexdigest())"
    );
    let received = pod.sh(&format!("ip netns exec $peer python3 -c \"{download}\""))?;
    ensure!(sum.split(' ').next() == Some(received.as_str()), "{sum} was sent, {received} received");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_network_that_is_configured_after_create_is_there_before_the_first_instruction() -> Result<()> {
    let containerd = Containerd::shared()?;
    let pod = Pod::new(containerd, "created")?;
    let before = pod.devices_and_qdiscs()?;
    let id = containerd.id("first");
    let shim = pod.shim(&id, &["sh", "-c", &format!("{CONFIGURATION}\nping -c 1 -w 20 10.1.0.1 >&2")])?;
    let (io, mut stdout, mut stderr) = shim.streams("init")?;
    shim.create(&io)?;
    pod.sh("plug eth0 1; p route add default via 10.1.0.1; p route add 10.9.0.0/16 via 10.1.0.2")?;
    shim.task.start(&id, "")?;
    let status = shim.task.wait(&id, "")?;
    let found = String::from_utf8(stdout.read_to_end(ARRIVES)?)?;
    let errors = String::from_utf8(stderr.read_to_end(ARRIVES)?)?;
    ensure!(status == 0 && errors.contains("1 packets received"), "{status}: {found}{errors}");
    let runc = pod.container(Runtime::Runc, "runc")?;
    let expected = runc.script(CONFIGURATION)?;
    ensure!(expected.contains("eth0 1400") && expected.contains("default via 10.1.0.1"), "{expected}");
    ensure!(found.trim() == expected.trim(), "husk:\n{found}\nrunc:\n{expected}");
    shim.task.delete(&id, "")?;
    shim.shutdown();
    pod.sh("q link del peer1")?;
    pod.wait_until_clean(&before)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn changes_of_a_namespace_reach_its_running_container() -> Result<()> {
    let containerd = Containerd::shared()?;
    let pod = Pod::new(containerd, "changes")?;
    let before = pod.devices_and_qdiscs()?;
    let husk = pod.container(Runtime::Husk, "husk")?;
    let runc = pod.container(Runtime::Runc, "runc")?;
    // The spare network card is out of sight.
    ensure!(husk.script("ls /sys/class/net; cat /proc/net/dev | grep -c :")? == "lo\n1");
    wait_until_same(|script| husk.script(script), &runc)?;

    pod.sh("plug eth0 1; p route add default via 10.1.0.1")?;
    let shown = wait_until_same(|script| husk.script(script), &runc)?;
    ensure!(shown.contains("eth0 1400") && shown.contains("UP"), "{shown}");
    for change in [
        "p addr add 10.1.0.8/24 dev eth0; p addr del fd00:1::7/64 dev eth0",
        "p route del default; p route add 10.9.0.0/16 via 10.1.0.1 metric 7; p -6 route add default via fe80::9 dev eth0",
        "p neigh add 10.1.0.9 lladdr 02:00:00:00:00:09 dev eth0",
        "p rule add from 10.1.0.8 table 100; p route add default via 10.1.0.1 table 100",
        "p link set eth0 address 02:00:00:00:01:07 mtu 1300",
        "p link set eth0 down",
        "p link set eth0 name net7; p link set net7 up",
    ] {
        pod.sh(change)?;
        wait_until_same(|script| husk.script(script), &runc).context(change)?;
    }
    // Traffic in both directions, with the new MAC.
    husk.script("ping -c 1 -w 20 10.1.0.1")?;
    download(&pod, |script| husk.script(script), "10.1.0.7")?;

    // The link leaves, and another one gets its card.
    pod.sh("q link del peer1; p rule del from 10.1.0.8 table 100")?;
    ensure!(wait_until_same(|script| husk.script(script), &runc)?.starts_with("lo "));
    ensure!(husk.script("ls /sys/class/net; cat /proc/net/dev | grep -c :")? == "lo\n1");
    pod.sh("plug eth5 2")?;
    wait_until_same(|script| husk.script(script), &runc)?;
    husk.script("ping -c 1 -w 20 10.2.0.1")?;

    containerd.shim_of(husk.id())?.0.kill();
    wait_for(Duration::from_secs(30), "containerd cleans up", || {
        husk.status().map(|status| status.is_none().then_some(())).transpose()
    })??;
    pod.sh("q link del peer2")?;
    pod.wait_until_clean(&before)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_link_without_a_network_card_fails_the_start_by_name() -> Result<()> {
    let containerd = Containerd::shared()?;
    let pod = Pod::new(containerd, "cards")?;
    let id = containerd.id("cards");
    let shim = pod.shim(&id, &SLEEP)?;
    shim.create(&Streams::default())?;
    pod.sh("plug eth0 1; plug net1 2")?;
    for _ in 0..2 {
        let error = shim.task.start(&id, "").err().context("the container starts without its link")?.to_string();
        ensure!(error.contains("link net1: the VM has no network card left for it"), "{error}");
    }
    // The VM works on with what fits.
    pod.sh("q link del peer2")?;
    shim.task.start(&id, "")?;
    shim.script("ping", "ping -c 1 -w 20 10.1.0.1")?;
    shim.task.kill(&id, "", 9)?;
    shim.task.wait(&id, "")?;
    shim.task.delete(&id, "")?;
    shim.shutdown();
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn links_beyond_the_spare_network_cards_are_plugged_into_a_q35() -> Result<()> {
    let configured = Configured::start("machine = \"q35\"\nnetwork_spare_nics = 0\nvcpus = 2\n")?;
    let containerd = &configured.containerd;
    let pod = Pod::new(containerd, "plugged")?;
    let before = pod.devices_and_qdiscs()?;
    let id = containerd.id("plugged");
    let shim = pod.shim(&id, &["sh", "-c", &format!("{{ {CONFIGURATION}; }} >/first; exec sleep 1000")])?;
    let execs = AtomicU32::new(0);
    let husk = |script: &str| shim.script(&format!("exec{}", execs.fetch_add(1, Ordering::Relaxed)), script);

    // Start waits for them.
    shim.create(&Streams::default())?;
    pod.sh("plug eth0 1; plug eth1 2; p route add default via 10.1.0.1")?;
    shim.task.start(&id, "")?;
    let runc = pod.container(Runtime::Runc, "runc")?;
    let shown = wait_until_same(husk, &runc)?;
    ensure!(shown.contains("eth1 1400"), "{shown}");
    wait_for(ARRIVES, "the first process has seen both links", || {
        let first = husk("cat /first");
        first.map(|first| (first == shown).then_some(())).transpose()
    })??;

    // In the running container, up to the limit.
    pod.sh("for number in 3 4 5 6 7 8; do plug net$number $number; done")?;
    wait_until_same(husk, &runc)?;
    husk("for number in 1 2 3 4 5 6 7 8; do ping -c 1 -w 20 10.$number.0.1; done")?;
    download(&pod, husk, "10.8.0.7")?;
    pod.sh("plug net9 9")?;
    let mut log = shim.log();
    wait_for(ARRIVES, "the log names the link", || {
        log += &shim.log();
        let limit = "cannot be given more than the 8 that were plugged into it";
        log.lines().any(|line| line.contains("link net9") && line.contains(limit)).then_some(())
    })
    .with_context(|| log.clone())?;

    // A plugged card serves further links as the others do.
    pod.sh("q link del peer3")?;
    wait_until_same(husk, &runc)?;
    husk("ping -c 1 -w 20 10.9.0.1")?;

    containerd.shim_of(&id)?.0.kill();
    shim.delete_action()?.ok()?;
    pod.sh("for number in 1 2 4 5 6 7 8 9; do q link del peer$number; done")?;
    pod.wait_until_clean(&before)
}
