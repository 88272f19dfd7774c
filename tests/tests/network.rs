//! A container in a VM has the network of the namespace that its spec names, as it has under runc.
#![cfg(not(target_env = "musl"))]

use std::time::Duration;

use anyhow::{Result, ensure};
use husk_tests::artifacts::Runtime;
use husk_tests::command::wait_for;
use husk_tests::containerd::{Container, Containerd};
use husk_tests::shim::Shim;

const SLEEP: [&str; 2] = ["sleep", "1000"];

/// Two network namespaces of the daemon, joined by two links. The pod's end is configured as CNI's bridge and ptp plugins do it.
struct Pod<'a> {
    containerd: &'a Containerd,
    name: String,
}

impl<'a> Pod<'a> {
    fn new(containerd: &'a Containerd, name: &str) -> Result<Self> {
        let name = containerd.id(name);
        let pod = Self { containerd, name };
        pod.sh("ip netns add $pod; ip netns add $peer
            p() { ip -n $pod \"$@\"; }; q() { ip -n $peer \"$@\"; }
            p link set lo up
            p link add eth0 mtu 1400 type veth peer name peer0 mtu 1400 netns $peer
            p link add net1 type veth peer name peer1 netns $peer
            q addr add 10.88.0.1/16 dev peer0; q addr add fd00:88::1/64 dev peer0 nodad
            q addr add 10.99.0.1/32 dev peer1
            for link in peer0 peer1; do q link set $link up; done
            p addr add 10.88.0.7/16 brd 10.88.255.255 dev eth0; p addr add fd00:88::7/64 dev eth0 nodad
            p addr add 10.99.0.7/24 dev net1 noprefixroute
            for link in eth0 net1; do p link set $link up; done
            p route add 10.99.0.1 dev net1 scope link src 10.99.0.7
            p route add 10.99.0.0/24 via 10.99.0.1 dev net1 src 10.99.0.7
            p route add default via 10.88.0.1 metric 10; p -6 route add default via fd00:88::1
            q route add 10.99.0.7 dev peer1")?;
        Ok(pod)
    }

    /// Runs a script with `$pod` and `$peer` set to the names of the two namespaces.
    fn sh(&self, script: &str) -> Result<String> {
        let names = format!("set -e; pod=pod-{0}; peer=peer-{0}", self.name);
        Ok(self.containerd.sh(&format!("{names}\n{script}"))?.text())
    }

    fn container(&self, runtime: Runtime, name: &str) -> Result<Container<'a>> {
        self.container_with(runtime, &[], name)
    }

    fn container_with(&self, runtime: Runtime, flags: &[&str], name: &str) -> Result<Container<'a>> {
        let namespace = format!("network:/run/netns/pod-{}", self.name);
        let flags = [&["--with-ns", &namespace], flags].concat();
        self.containerd.detached_with(runtime, &flags, name, &SLEEP)
    }

    fn wait_until_clean(&self, before: &str) -> Result<()> {
        wait_for(Duration::from_secs(60), "only the pod's own devices are left", || {
            self.devices_and_qdiscs().map(|now| (now == before).then_some(())).transpose()
        })?
    }

    /// What a VM's connection adds to the pod's namespace.
    fn devices_and_qdiscs(&self) -> Result<String> {
        self.sh("ip -n $pod -o link | cut -d: -f2; tc -n $pod qdisc | grep ingress || true")
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // Both fail if the test has removed the namespace.
        let _ = self.sh("ip netns delete $pod");
        let _ = self.sh("ip netns delete $peer");
    }
}

/// Names, MACs, MTU, addresses and routes, without numbers and flags that are the kernel's own.
const CONFIGURATION: &str = "for link in lo eth0 net1; do
        echo $link $(cat /sys/class/net/$link/mtu) $(cat /sys/class/net/$link/address)
    done
    ip -o -4 addr | awk '{print $2, $3, $4, $5, $6}'
    ip -o -6 addr | awk '/scope global/ {print $2, $3, $4}'
    ip -4 route; ip -6 route | grep -v '^fe80\\|^ff00\\|multicast' | awk '{print $1, $2, $3, $4, $5}'";

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn links_addresses_and_routes_are_those_that_runc_shows() -> Result<()> {
    let containerd = Containerd::shared()?;
    let pod = Pod::new(containerd, "same")?;
    let expected = pod.container(Runtime::Runc, "runc")?.script(CONFIGURATION)?;
    ensure!(expected.contains("eth0 1400") && expected.contains("default via 10.88.0.1 dev eth0"), "{expected}");
    let found = pod.container(Runtime::Husk, "husk")?.script(CONFIGURATION)?;
    ensure!(found == expected, "husk:\n{found}\nrunc:\n{expected}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn traffic_passes_in_both_directions_on_every_link() -> Result<()> {
    let pod = Pod::new(Containerd::shared()?, "traffic")?;
    // With two virtual CPUs, each card has two pairs of queues.
    let container = pod.container_with(Runtime::Husk, &["--annotation", "io.husk.vcpus=2"], "traffic")?;
    for address in ["10.88.0.1", "10.99.0.1"] {
        container.script(&format!("ping -c 2 -w 20 {address}"))?;
    }
    container.script("ping -6 -c 2 -w 20 fd00:88::1")?;
    // A server in the container, and bytes that are compared by checksum.
    let sum = container.script(
        "mkdir /www; dd if=/dev/urandom of=/www/data bs=1M count=8 2>/dev/null
        httpd -p 8080 -h /www; md5sum </www/data",
    )?;
    for address in ["10.88.0.7", "[fd00:88::7]", "10.99.0.7"] {
        let download = format!(
            "import hashlib, urllib.request as u
direct = u.build_opener(u.ProxyHandler({{}}))
print(hashlib.md5(direct.open('http://{address}:8080/data', timeout=60).read()).hexdigest())"
        );
        let received = pod.sh(&format!("ip netns exec $peer python3 -c \"{download}\""))?;
        ensure!(sum.split(' ').next() == Some(received.as_str()), "{address}: {sum} was sent, {received} received");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn containers_of_a_pod_share_its_network() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (pod, other) = (Pod::new(containerd, "pod")?, Pod::new(containerd, "other")?);
    let ids = ["pause", "app", "stray", "node"].map(|name| containerd.id(name));
    let spec = |id: &str, network: &str| {
        let mut spec = husk_tests::bundle::spec(id, &SLEEP);
        spec["annotations"] = serde_json::json!({"io.kubernetes.cri.sandbox-id": ids[0]});
        let namespaces = spec["linux"]["namespaces"].as_array_mut().into_iter().flatten();
        namespaces.filter(|n| n["type"] == "network").for_each(|n| n["path"] = network.into());
        spec
    };
    let netns = |pod: &Pod| format!("/run/netns/pod-{}", pod.name);
    let pause = Shim::running(containerd, &ids[0], &spec(&ids[0], &netns(&pod)))?;
    // The same namespace by another path.
    containerd.sh(&format!("ln -s {} /run/link-{}", netns(&pod), ids[1]))?;
    let app = Shim::running(containerd, &ids[1], &spec(&ids[1], &format!("/run/link-{}", ids[1])))?;
    let addresses = "readlink /proc/self/ns/net; ip -o addr";
    ensure!(app.script("app", addresses)? == pause.script("pause", addresses)?);
    let stray = Shim::start(containerd, &ids[2], &spec(&ids[2], &netns(&other)))?.create_error()?;
    ensure!(stray.contains("is not the sandbox's: its VM was booted with"), "{stray}");
    let mut node = husk_tests::bundle::spec(&ids[3], &SLEEP);
    node["annotations"] = serde_json::json!({"io.kubernetes.cri.container-type": "sandbox"});
    node["linux"]["namespaces"].as_array_mut().into_iter().for_each(|all| all.retain(|n| n["type"] != "network"));
    let node = Shim::start(containerd, &ids[3], &node)?.create_error()?;
    ensure!(node.contains("the pod uses the node's network (hostNetwork)"), "{node}");
    for (shim, id) in [(&app, &ids[1]), (&pause, &ids[0])] {
        shim.task.kill(id, "", 9)?;
        shim.task.wait(id, "")?;
        shim.task.delete(id, "")?;
        shim.shutdown();
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn sysctls_of_a_pod_apply_to_its_network() -> Result<()> {
    let containerd = Containerd::shared()?;
    let pod = Pod::new(containerd, "sysctl")?;
    let id = containerd.id("sysctl");
    let mut spec = husk_tests::bundle::spec(&id, &SLEEP);
    let path = format!("/run/netns/pod-{}", pod.name);
    let namespaces = spec["linux"]["namespaces"].as_array_mut().into_iter().flatten();
    namespaces.filter(|n| n["type"] == "network").for_each(|n| n["path"] = path.clone().into());
    spec["linux"]["sysctl"] =
        serde_json::json!({"net.ipv4.ip_unprivileged_port_start": "7", "net.ipv4.ping_group_range": "0 9"});
    let shim = Shim::running(containerd, &id, &spec)?;
    let files = "cd /proc/sys/net/ipv4; cat ip_unprivileged_port_start ping_group_range; ls /sys/class/net";
    let found = shim.script("sysctl", files)?;
    ensure!(found.split_whitespace().collect::<Vec<_>>() == ["7", "0", "9", "eth0", "lo", "net1"], "{found}");
    shim.task.kill(&id, "", 9)?;
    shim.task.wait(&id, "")?;
    shim.task.delete(&id, "")?;
    shim.shutdown();
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_namespace_that_outlives_its_vm_is_clean() -> Result<()> {
    let containerd = Containerd::shared()?;
    let pod = Pod::new(containerd, "clean")?;
    let before = pod.devices_and_qdiscs()?;
    let container = pod.container(Runtime::Husk, "deleted")?;
    let during = pod.devices_and_qdiscs()?;
    ensure!(during.contains("husk-") && during.contains("ingress"), "{during}");
    container.kill_and_wait()?;
    container.delete_task()?;
    // The VM ends in the background, after the response to the delete.
    pod.wait_until_clean(&before)?;

    let container = pod.container(Runtime::Husk, "killed")?;
    containerd.shim_of(container.id())?.0.kill();
    // containerd runs the shim's `delete` and removes the task.
    wait_for(Duration::from_secs(30), "containerd cleans up", || {
        container.status().map(|status| status.is_none().then_some(())).transpose()
    })??;
    pod.wait_until_clean(&before)?;
    // The namespace still works, for runc and for another VM.
    pod.container(Runtime::Runc, "runc")?.script("ping -c 1 -w 20 10.88.0.1")?;
    pod.container(Runtime::Husk, "again")?.script("ping -c 1 -w 20 10.88.0.1")?;
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_vm_ends_cleanly_when_its_namespace_is_gone() -> Result<()> {
    let pod = Pod::new(Containerd::shared()?, "gone")?;
    let container = pod.container(Runtime::Husk, "gone")?;
    pod.sh("ip netns delete $pod")?;
    container.kill_and_wait()?;
    ensure!(container.delete_task()? == 137);
    // The kernel destroys the namespace, and with it the links, when the VM's taps are closed.
    wait_for(Duration::from_secs(60), "the namespace is gone", || {
        pod.sh("ip -n $peer -o link").map(|links| (!links.contains("peer0")).then_some(())).transpose()
    })??;
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn networks_that_a_vm_cannot_have_are_rejected_by_name() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("node");
    containerd.sh(&format!("touch /run/{id}; mount --bind /proc/1/ns/net /run/{id}; touch /run/file-{id}"))?;
    let table = [
        (format!("/run/{id}"), "the pod asks for the node's own network"),
        (format!("/run/file-{id}"), "is not a network namespace"),
        (format!("/run/none-{id}"), "No such file or directory"),
    ];
    for (path, expected) in table {
        let ran =
            containerd.run(&["--with-ns", &format!("network:{path}")], &containerd.id("x"), &["true"]).output()?;
        ensure!(ran.code() != 0 && ran.errors().contains(expected) && ran.errors().contains(&path), "{ran}");
    }
    containerd.sh(&format!("umount /run/{id}; rm /run/{id} /run/file-{id}"))?;
    Ok(())
}
