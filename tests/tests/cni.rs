//! A container in a VM has the network that CNI plugins give to it under runc: both runtimes run in the same namespace,
//! one after the other, and report what they see.
#![cfg(not(target_env = "musl"))]

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use husk_shim::copied_sysctls;
use husk_tests::artifacts::Runtime;
use husk_tests::cni::{NODE, Network, Node, OUTSIDE, Plugins, Pod, host_local};
use husk_tests::command::wait_for;
use husk_tests::containerd::{Container, Containerd};
use husk_tests::vm::guest_program;
use serde_json::{Value, json};

const SLEEP: [&str; 2] = ["sleep", "1000"];
/// Runs a program of the machine, with its libraries, in a container.
const MACHINE: &str = "machine() {
        program=$1; shift
        libraries=/machine/lib/x86_64-linux-gnu
        $libraries/ld-linux-x86-64.so.2 --library-path $libraries /machine/bin/$program \"$@\"
    }\n";
const GIB: u64 = 1024 * 1024 * 1024;
/// Deadline for one large transfer.
const TRANSFER: Duration = Duration::from_secs(300);

/// Builds the program once: cargo takes a second even if there is nothing to do.
fn traffic_program() -> Result<String> {
    static PROGRAM: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| guest_program("traffic").map_err(|error| format!("{error:?}")));
    program.as_ref().map(|program| program.display().to_string()).map_err(|error| anyhow!("{error}"))
}

/// The machine's `ip` and `ss` and their libraries, and the program for traffic.
fn flags(pod: &Pod) -> Result<Vec<String>> {
    let traffic = traffic_program()?;
    let mount = |from: &str, to: &str| ["--mount".into(), format!("type=bind,src={from},dst={to},options=rbind:ro")];
    let namespace = ["--with-ns".into(), format!("network:{}", pod.netns())];
    Ok([namespace, mount("/usr", "/machine"), mount(&traffic, "/traffic")].concat())
}

fn container<'a>(containerd: &'a Containerd, runtime: Runtime, pod: &Pod, more: &[&str]) -> Result<Container<'a>> {
    let flags = flags(pod)?;
    let flags: Vec<&str> = flags.iter().map(String::as_str).chain(more.iter().copied()).collect();
    containerd.detached_with(runtime, &flags, runtime.shim(), &SLEEP)
}

/// Who talks to a container: a namespace, and its addresses on the networks of the container.
struct Peer {
    namespace: &'static str,
    addresses: Vec<&'static str>,
}

struct Case {
    name: &'static str,
    networks: Vec<Network>,
    peer: Peer,
    /// Must occur in the report, or the plugins did something else than this test expects.
    expected: &'static [&'static str],
}

fn network(name: &'static str, plugins: Vec<Value>) -> Network {
    Network { name, plugins, runtime: json!({}) }
}

fn bridge(name: &str, mtu: u32, subnets: &[&str]) -> Value {
    json!({"type": "bridge", "bridge": name, "isGateway": true, "ipMasq": true, "hairpinMode": true, "mtu": mtu,
        "ipam": host_local(subnets)})
}

fn cases() -> Vec<Case> {
    let peer = |namespace, addresses: &[&'static str]| Peer { namespace, addresses: addresses.to_vec() };
    let everything = vec![
        bridge("cni0", 1480, &["10.77.0.0/24", "fd00:77::/64"]),
        json!({"type": "portmap", "capabilities": {"portMappings": true}}),
        json!({"type": "firewall"}),
        json!({"type": "tuning", "mac": "02:00:00:77:00:09", "mtu": 1480, "sysctl": {
            "net.core.somaxconn": "500", "net.ipv4.conf.eth0.arp_notify": "1", "net.ipv4.tcp_keepalive_time": "600"}}),
        json!({"type": "bandwidth", "ingressRate": 800_000_000, "ingressBurst": 80_000_000,
            "egressRate": 800_000_000, "egressBurst": 80_000_000}),
    ];
    vec![
        Case {
            name: "all plugins, dual stack",
            networks: vec![Network {
                runtime: json!({"portMappings": [{"hostPort": 8000, "containerPort": 7000, "protocol": "tcp"}]}),
                ..network("all", everything)
            }],
            peer: peer("$node", &["10.77.0.1", "[fd00:77::1]"]),
            expected: &["02:00:00:77:00:09", "\"mtu\":1480", "10.77.0.2", "fd00:77::2", "somaxconn:500"],
        },
        Case {
            name: "two networks, MTU 9000",
            networks: vec![
                network("first", vec![bridge("cni0", 1500, &["10.78.0.0/24"])]),
                network("second", vec![bridge("cni1", 9000, &["10.79.0.0/24", "fd00:79::/64"])]),
            ],
            peer: peer("$node", &["10.78.0.1", "10.79.0.1", "[fd00:79::1]"]),
            expected: &["\"mtu\":1500", "\"mtu\":9000", "\"ifname\":\"net1\""],
        },
        Case {
            name: "IPv4 only, MTU 1400",
            networks: vec![network("four", vec![bridge("cni0", 1400, &["10.80.0.0/16"])])],
            peer: peer("$node", &["10.80.0.1"]),
            expected: &["\"mtu\":1400", "10.80.0.2"],
        },
        Case {
            name: "IPv6 only, MTU 9000",
            networks: vec![network("six", vec![bridge("cni0", 9000, &["fd00:81::/64"])])],
            peer: peer("$node", &["[fd00:81::1]"]),
            expected: &["\"mtu\":9000", "fd00:81::2"],
        },
        Case {
            name: "ptp, dual stack",
            networks: vec![network(
                "ptp",
                vec![json!({"type": "ptp", "ipMasq": true, "mtu": 1400,
                    "ipam": host_local(&["10.82.0.0/24", "fd00:82::/64"])})],
            )],
            peer: peer("$node", &["10.82.0.1", "[fd00:82::1]"]),
            expected: &["\"mtu\":1400", "\"scope\":\"link\""],
        },
        Case {
            name: "macvlan",
            networks: vec![network(
                "macvlan",
                vec![json!({"type": "macvlan", "master": "uplink", "mode": "bridge", "mtu": 1500, "ipam": {
                    "type": "host-local", "routes": [{"dst": "0.0.0.0/0"}],
                    "ranges": [[{"subnet": "192.0.2.0/24", "rangeStart": "192.0.2.50", "gateway": OUTSIDE}],
                        [{"subnet": "2001:db8::/64", "rangeStart": "2001:db8::50", "gateway": "2001:db8::2"}]]}})],
            )],
            peer: peer("$outside", &[OUTSIDE, "[2001:db8::2]"]),
            expected: &["192.0.2.50", "2001:db8::50"],
        },
    ]
}

/// Requests of iproute2 whose answers are compared, apart from what [`normal`] removes.
const QUERIES: [&str; 7] = [
    "-j addr",
    "-4 -j route show table all",
    "-6 -j route show table all",
    "-4 -j rule",
    "-6 -j rule",
    "-4 -j neigh show nud permanent",
    "-6 -j neigh show nud permanent",
];

/// What a container sees of its network and how its traffic passes, one item per line.
fn report(node: &Node, pod: &Pod, case: &Case, runtime: Runtime) -> Result<Vec<String>> {
    let resolv = format!("/run/resolv-{}", node.containerd.token());
    std::fs::write(node.containerd.path(&resolv), "nameserver 10.77.0.1\nsearch pods.example\noptions ndots:5\n")?;
    let mount = format!("type=bind,src={resolv},dst=/etc/resolv.conf,options=rbind:ro");
    let container = container(node.containerd, runtime, pod, &["--mount", &mount])?;
    let mut script = format!("set -e; {MACHINE}");
    for query in QUERIES {
        script += &format!("echo '# {query}'; machine ip {query}\n");
    }
    script += "echo '# others'; /traffic serve 7000; cat /etc/resolv.conf
        machine ss -H -ltun | awk '{print $1, $2, $5}' | sort
        cd /proc/sys/net\n";
    // One process: each takes long to start in an emulated VM.
    script += &format!("grep . {} 2>&1 || true\n", copied_sysctls("eth0").join(" "));
    for address in &case.peer.addresses {
        let plain = address.trim_matches(['[', ']']);
        script += &format!("ping -c 2 -w 30 {plain} | grep -o '. packets received'\n");
        script += &traffic("/traffic", &format!("{address}:7100"));
    }
    let seen = container.script(&script)?;
    let mut report = Vec::new();
    let mut query = "";
    for line in seen.lines() {
        match line.strip_prefix("# ") {
            Some(next) => query = next,
            None if query == "others" => report.push(line.to_owned()),
            None => {
                let objects: Vec<Value> = serde_json::from_str(line).with_context(|| format!("{query}: {line}"))?;
                report.extend(objects.into_iter().map(|object| normal(query, object)));
            }
        }
    }
    let peer = format!("ip netns exec {} {}", case.peer.namespace, traffic_program()?);
    for number in 0..case.networks.len() {
        for address in pod.addresses(number)? {
            let arrived = pod.sh(&traffic(&peer, &format!("{address}:7000")))?;
            report.extend(arrived.lines().map(|line| format!("from outside: {line}")));
        }
    }
    Ok(report)
}

/// Commands that exchange data with a server in both directions. The last datagrams are larger than every MTU here.
fn traffic(program: &str, server: &str) -> String {
    ["get SERVER 4000000 1", "put SERVER 4000000 1", "udp SERVER 1200 20", "udp SERVER 20000 5"]
        .map(|request| format!("{program} {}\n", request.replace("SERVER", server)))
        .concat()
}

/// An object without what belongs to the kernel that shows it: numbers, queues, and the other end of a veth.
fn normal(query: &str, mut object: Value) -> String {
    let Some(fields) = object.as_object_mut() else { return object.to_string() };
    for field in ["ifindex", "link", "link_index", "link_netnsid", "qdisc", "txqlen"] {
        fields.remove(field);
    }
    // The guest's kernel tests no address for duplicates again, and derives no route from an address: husk lists both.
    for address in fields.get_mut("addr_info").and_then(Value::as_array_mut).into_iter().flatten() {
        for flag in ["nodad", "noprefixroute"] {
            address.as_object_mut().and_then(|address| address.remove(flag));
        }
    }
    format!("{query}: {object}")
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_vm_has_the_network_that_the_plugins_give_to_runc() -> Result<()> {
    let containerd = Containerd::shared()?;
    let mut failed = Vec::new();
    for plugins in Plugins::all()? {
        for case in cases() {
            if let Err(error) = compare(containerd, &plugins, &case) {
                failed.push(format!("{}, {}: {error:?}", plugins.origin, case.name));
            }
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n\n"));
    Ok(())
}

fn compare(containerd: &Containerd, plugins: &Plugins, case: &Case) -> Result<()> {
    let node = Node::new(containerd, plugins, "same")?;
    let before = node.sh("ip -n $node -o link | cut -d: -f2")?.text();
    let mut pod = node.pod(&case.networks)?;
    node.sh(&format!("ip netns exec {} {} serve 7100", case.peer.namespace, traffic_program()?))?;
    let clean = pod.devices_and_qdiscs()?;
    let expected = report(&node, &pod, case, Runtime::Runc)?;
    for text in case.expected {
        ensure!(expected.iter().any(|line| line.contains(text)), "runc does not show {text}: {expected:#?}");
    }
    let found = report(&node, &pod, case, Runtime::Husk)?;
    let differences = differences(&expected, &found);
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    wait_until_clean(&pod, &clean)?;
    pod.detach()?;
    let left = pod.sh("ip -n $pod -o link | cut -d: -f2")?;
    ensure!(left == " lo", "the plugins have left {left}");
    // Bridges stay.
    let after = node.sh("ip -n $node -o link | cut -d: -f2 | grep -v cni || true")?.text();
    ensure!(after == before, "{after}, not {before}");
    Ok(())
}

fn differences(expected: &[String], found: &[String]) -> Vec<String> {
    let only = |these: &[String], others: &[String], who: &str| -> Vec<String> {
        these.iter().filter(|line| !others.contains(line)).map(|line| format!("only {who}: {line}")).collect()
    };
    [only(expected, found, "runc"), only(found, expected, "husk")].concat()
}

fn wait_until_clean(pod: &Pod, before: &str) -> Result<()> {
    let mut now = String::new();
    wait_for(Duration::from_secs(60), "only the plugins' devices are left", || {
        pod.devices_and_qdiscs()
            .map(|found| {
                now = found;
                (now == before).then_some(())
            })
            .transpose()
    })
    .with_context(|| format!("before:\n{before}\nnow:\n{now}"))?
}

/// A network with one bridge, and the pod's address in it.
fn simple() -> Network {
    network("simple", vec![bridge("cni0", 1500, &["10.90.0.0/24"])])
}
const GATEWAY: &str = "10.90.0.1";
const ADDRESS: &str = "10.90.0.2";

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_gibibyte_passes_intact_in_both_directions() -> Result<()> {
    let containerd = Containerd::shared()?;
    let node = Node::new(containerd, &Plugins::newest()?, "large")?;
    let pod = node.pod(&[simple()])?;
    let container = container(containerd, Runtime::Husk, &pod, &[])?;
    node.sh(&format!("ip netns exec $node {} serve 7100", traffic_program()?))?;
    for direction in ["get", "put"] {
        let transfer = container.exec(&["/traffic", direction, &format!("{GATEWAY}:7100"), &GIB.to_string(), "1"]);
        let output = transfer.deadline(TRANSFER).ok()?;
        ensure!(output.text() == format!("1 connections, {GIB} bytes each"), "{output}");
        eprintln!("{}", output.errors().trim());
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_hundred_connections_at_once_pass_in_each_direction() -> Result<()> {
    let containerd = Containerd::shared()?;
    let node = Node::new(containerd, &Plugins::newest()?, "many")?;
    let pod = node.pod(&[simple()])?;
    let program = traffic_program()?;
    node.sh(&format!("ip netns exec $node {program} serve 7100"))?;
    // With two virtual CPUs, the card has two pairs of queues.
    let container = container(containerd, Runtime::Husk, &pod, &["--annotation", "io.husk.vcpus=2"])?;
    let inside = "/traffic serve 7000; for i in get put; do /traffic $i 10.90.0.1:7100 200000 100; done";
    let inside = container.script(inside)?;
    let outside =
        node.sh(&format!("for i in get put; do ip netns exec $node {program} $i {ADDRESS}:7000 200000 100; done"))?;
    for text in [inside, outside.text()] {
        ensure!(text == ["100 connections, 200000 bytes each"; 2].join("\n"), "{text}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn hostports_lead_to_the_container() -> Result<()> {
    let containerd = Containerd::shared()?;
    for plugins in Plugins::all()? {
        let node = Node::new(containerd, &plugins, "ports")?;
        let mut network = simple();
        network.plugins.push(json!({"type": "portmap", "capabilities": {"portMappings": true}}));
        network.plugins.push(json!({"type": "firewall"}));
        let mapping = |protocol, host, inside| json!({"hostPort": host, "containerPort": inside, "protocol": protocol});
        network.runtime = json!({"portMappings": [mapping("tcp", 8000, 7000), mapping("udp", 8053, 7000)]});
        let mut pod = node.pod(&[network])?;
        let program = traffic_program()?;
        // The node routes nothing by default.
        node.sh(&format!("ip -n $outside route add 10.90.0.0/24 via {NODE}"))?;
        let client = format!(
            "for from in $node $outside; do
                ip netns exec $from {program} get {NODE}:8000 500000 4
                ip netns exec $from {program} put {NODE}:8000 500000 4
                ip netns exec $from {program} udp {NODE}:8053 1000 4
            done
            ip netns exec $node {program} get 127.0.0.1:8000 1000 1"
        );
        let mut found = Vec::new();
        for runtime in [Runtime::Runc, Runtime::Husk] {
            let container = container(containerd, runtime, &pod, &[])?;
            container.script("/traffic serve 7000")?;
            let out = pod.sh(&client)?;
            // The container reaches itself through the node, too.
            let own = container.script(&format!("/traffic get {NODE}:8000 1000 1"))?;
            found.push([out, own].join("\n"));
        }
        ensure!(found[0] == found[1], "{}: {found:#?}", plugins.origin);
        pod.detach()?;
        let refused = node.sh(&format!("! ip netns exec $outside {program} get {NODE}:8000 1 1"))?;
        ensure!(refused.errors().contains("Connection refused"), "{refused}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn bandwidth_limits_hold_for_a_vm() -> Result<()> {
    let containerd = Containerd::shared()?;
    let node = Node::new(containerd, &Plugins::newest()?, "slow")?;
    let mut network = simple();
    let (rate, burst) = (80_000_000, 400_000);
    network.plugins.push(json!({"type": "bandwidth", "ingressRate": rate, "ingressBurst": burst,
        "egressRate": rate, "egressBurst": burst}));
    let pod = node.pod(&[network])?;
    let program = traffic_program()?;
    node.sh(&format!("ip netns exec $node {program} serve 7100"))?;
    let counters = "for link in $(ip -n $node -o link | grep -o 'veth[^@]*\\|bwp[^:]*\\|ifb[^:]*'); do
            tc -n $node -s qdisc show dev $link
        done";
    for runtime in [Runtime::Runc, Runtime::Husk] {
        let before = limits(&node.sh(counters)?.text());
        ensure!(before.len() == 2, "{}", node.sh(counters)?);
        let container = container(containerd, runtime, &pod, &[])?;
        for direction in ["get", "put"] {
            let request = ["/traffic", direction, &format!("{GATEWAY}:7100"), "4000000", "1"];
            let output = container.exec(&request).deadline(TRANSFER).ok()?;
            eprintln!("{}, limited to 80 Mbit/s: {}", runtime.name(), output.errors().trim());
        }
        // Both directions went through the limiters, which are the same ones as before.
        let after = limits(&node.sh(counters)?.text());
        ensure!(after.len() == 2 && after.iter().zip(&before).all(|(a, b)| a - b >= 4_000_000), "{before:?} {after:?}");
    }
    Ok(())
}

/// The bytes that each limiter (tbf) has passed.
fn limits(statistics: &str) -> Vec<u64> {
    let qdiscs = statistics.split("qdisc ").filter(|qdisc| qdisc.starts_with("tbf"));
    qdiscs.filter_map(|qdisc| qdisc.split("Sent ").nth(1)?.split(' ').next()?.parse().ok()).collect()
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn killing_any_process_of_a_vm_leaves_its_network_clean() -> Result<()> {
    let containerd = Containerd::shared()?;
    let node = Node::new(containerd, &Plugins::newest()?, "kill")?;
    let mut pod = node.pod(&[simple(), network("second", vec![bridge("cni1", 9000, &["10.91.0.0/24"])])])?;
    let before = pod.devices_and_qdiscs()?;
    for victim in ["qemu", "virtiofsd", "containerd-shim"] {
        let container = container(containerd, Runtime::Husk, &pod, &[])?;
        let during = pod.devices_and_qdiscs()?;
        ensure!(during.contains("husk-") && during.contains("ingress"), "{during}");
        let (shim, _) = containerd.shim_of(container.id())?;
        if victim == "containerd-shim" { shim } else { containerd.shim_child(container.id(), victim)? }.kill();
        if victim == "containerd-shim" {
            wait_for(Duration::from_secs(30), "containerd cleans up", || {
                container.status().map(|status| status.is_none().then_some(())).transpose()
            })??;
        } else {
            container.await_status("STOPPED")?;
            ensure!(container.delete_task()? == 137);
        }
        wait_until_clean(&pod, &before).context(victim)?;
        // The namespace is as good as before.
        let again = self::container(containerd, Runtime::Runc, &pod, &[])?;
        again.script(&format!("ping -c 1 -w 20 {GATEWAY}; ping -c 1 -w 20 10.91.0.1"))?;
    }
    pod.detach()
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_namespace_that_vanishes_with_its_links_ends_cleanly() -> Result<()> {
    let containerd = Containerd::shared()?;
    let node = Node::new(containerd, &Plugins::newest()?, "vanish")?;
    let links = || Ok::<_, anyhow::Error>(node.sh("ip -n $node -o link | cut -d: -f2 | grep -c veth || true")?.text());
    let mut pod = node.pod(&[simple()])?;
    ensure!(links()? == "1");
    let container = container(containerd, Runtime::Husk, &pod, &[])?;
    // The order in which containerd and kubelet would never do it.
    pod.detach()?;
    pod.sh("ip netns delete $pod")?;
    ensure!(links()? == "0");
    // The container runs on, without a network.
    ensure!(container.script("cat /sys/class/net/eth0/mtu; echo alive")?.ends_with("alive"));
    container.kill_and_wait()?;
    ensure!(container.delete_task()? == 137);
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn ping_needs_the_capability_that_it_needs_under_runc() -> Result<()> {
    let containerd = Containerd::shared()?;
    let node = Node::new(containerd, &Plugins::newest()?, "ping")?;
    let pod = node.pod(&[network("both", vec![bridge("cni0", 1500, &["10.90.0.0/24", "fd00:90::/64"])])])?;
    let script = "for target in 10.90.0.1 fd00:90::1; do
            ping -c 1 -w 20 $target >/dev/null 2>&1; echo $?
        done
        ping -c 1 -s 4000 -w 20 10.90.0.1 | grep -c 'bytes from'; ping -c 1 10.90.0.1 2>&1 | grep -c ermi";
    let mut found = Vec::new();
    for runtime in [Runtime::Runc, Runtime::Husk] {
        for flags in [&[][..], &["--cap-drop", "CAP_NET_RAW"]] {
            found.push(container(containerd, runtime, &pod, flags)?.exec(&["sh", "-c", script]).output()?.text());
        }
    }
    ensure!(found[0].starts_with("0\n0\n1"), "{found:#?}");
    ensure!(found[..2] == found[2..] && found[0] != found[1], "{found:#?}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn groups_that_a_container_joins_reach_it_on_a_macvlan() -> Result<()> {
    let containerd = Containerd::shared()?;
    let node = Node::new(containerd, &Plugins::newest()?, "groups")?;
    let ipam = json!({"type": "host-local", "ranges": [[{"subnet": "192.0.2.0/24", "rangeStart": "192.0.2.50"}]],
        "routes": [{"dst": "0.0.0.0/0"}]});
    let macvlan = json!({"type": "macvlan", "master": "uplink", "mode": "bridge", "ipam": ipam});
    let pod = node.pod(&[network("macvlan", vec![macvlan])])?;
    let before = pod.devices_and_qdiscs()?;
    let container = container(containerd, Runtime::Husk, &pod, &[])?;
    let mut join = container.exec(&["/traffic", "join", "239.7.7.7:7200"]).command();
    let join = join.stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(join.stdout.context("no stdout")?).lines();
    ensure!(lines.next().context("no output")?? == "joined");
    node.sh(&format!("ip netns exec $outside {} cast 239.7.7.7:7200 {OUTSIDE} hello", traffic_program()?))?;
    ensure!(lines.next().context("nothing was received")?? == "hello");
    container.kill_and_wait()?;
    container.delete_task()?;
    wait_until_clean(&pod, &before)
}
