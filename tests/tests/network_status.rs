//! What operators and containerd's clients see of a container's network: addresses, connections and counters.
#![cfg(not(target_env = "musl"))]

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::Runtime;
use husk_tests::bundle;
use husk_tests::containerd::{Container, Containerd};
use husk_tests::operator::{husk, husk_json};
use husk_tests::pods::{Bridge, Pod};
use husk_tests::shim::Shim;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const SLEEP: [&str; 2] = ["sleep", "1000"];
const PING: &str = "ping -c 20 -i 0.1 -s 1000 -w 60 10.88.0.1";
/// Bytes of these 20 pings of 1000 bytes, in each direction, without Ethernet headers.
const PINGED: u64 = 20 * 1028;

fn ping(container: &Container<'_>) -> Result<()> {
    container.script(PING).map(drop)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn status_shows_each_link_with_its_connection_addresses_and_counters() -> Result<()> {
    let containerd = Containerd::shared()?;
    let bridge = Bridge::new(containerd, "status")?;
    let pod = bridge.pod(7)?;
    containerd.sh(&format!(
        "ip -n {0} link add net1 mtu 1400 type veth peer name other netns {1}",
        pod.name,
        bridge.name()
    ))?;
    let container = pod.container(Runtime::Husk, &[], "status", &SLEEP)?;
    ping(&container)?;
    // The container sees what it adds, and so does the operator.
    let status =
        || Ok::<_, anyhow::Error>(husk_json(containerd, &["status", "--json", container.id()])?["network"].take());
    let network = status()?;
    ensure!(network["netns"] == pod.path().as_str() && network["problems"] == json!([]), "{network:#}");
    let link = |network: &Value, name: &str| {
        let links = network["links"].as_array().into_iter().flatten();
        links.clone().find(|link| link["host"]["link"]["name"] == name).cloned().with_context(|| format!("{network:#}"))
    };
    let eth0 = link(&network, "eth0")?;
    ensure!(eth0["mac"] == pod.mac.as_str() && eth0["guest"]["name"] == "eth0", "{eth0:#}");
    ensure!((&eth0["guest"]["up"], &eth0["guest"]["carrier"]) == (&json!(true), &json!(true)), "{eth0:#}");
    let addresses = eth0["guest"]["addresses"].as_array().context("addresses")?;
    ensure!(addresses.contains(&"10.88.0.7/16".into()) && addresses.contains(&"fd00:88::7/64".into()), "{eth0:#}");
    for counter in ["received_bytes", "sent_bytes"] {
        let count = eth0["guest"]["counters"][counter].as_u64().context(counter)?;
        ensure!((PINGED..2 * PINGED).contains(&count), "{counter}: {eth0:#}");
    }
    ensure!(eth0["host"]["tap"].as_str().is_some_and(|tap| tap.starts_with("husk-")), "{eth0:#}");
    let net1 = link(&network, "net1")?;
    ensure!((&net1["guest"]["mtu"], &net1["guest"]["up"]) == (&json!(1400), &json!(false)), "{net1:#}");

    let page = husk(containerd, &["status", container.id()])?.ok()?.text();
    let row = page.lines().find(|line| line.contains(&pod.mac)).with_context(|| page.clone())?;
    for part in ["eth0", "1500", "up", "eth0 via husk-", " packets", "10.88.0.7/16"] {
        ensure!(row.contains(part), "no {part:?} in\n{page}");
    }

    // A guest that does not answer delays the status, and hides nothing that the host knows.
    let qemu = Pid::from_raw(containerd.qemu_of(container.id())?.pid);
    kill(qemu, Signal::SIGSTOP)?;
    let silent = status();
    kill(qemu, Signal::SIGCONT)?;
    let silent = silent?;
    ensure!(silent["problems"][0].as_str().is_some_and(|text| text.contains("did not report its links")), "{silent:#}");
    let eth0 = link(&silent, "eth0")?;
    ensure!(eth0["guest"].is_null() && eth0["mac"] == pod.mac.as_str(), "{eth0:#}");
    ensure!(status()?["problems"] == json!([]));
    Ok(())
}

/// Bytes that arrived in a pod and that it sent, as its link on the host counts them. containerd's CRI plugin reads a
/// pod's counters there.
fn counted(pod: &Pod<'_>) -> Result<[u64; 2]> {
    Ok([pod.counter("rx_bytes")?, pod.counter("tx_bytes")?])
}

/// Expects that the pings are in the counters, and little else.
fn expect_pings(what: &str, before: [u64; 2], now: [u64; 2]) -> Result<()> {
    let expected = PINGED..PINGED + PINGED / 2;
    let met = before.iter().zip(now).all(|(before, now)| expected.contains(&(now - before)));
    ensure!(met, "{what}: {before:?} -> {now:?}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn counters_grow_with_the_traffic_as_under_runc() -> Result<()> {
    let containerd = Containerd::shared()?;
    let bridge = Bridge::new(containerd, "counters")?;

    let pod = bridge.pod(8)?;
    let container = pod.container(Runtime::Runc, &[], "runc", &SLEEP)?;
    let before = counted(&pod)?;
    ping(&container)?;
    expect_pings("runc's pod on the host", before, counted(&pod)?)?;

    let pod = bridge.pod(9)?;
    let id = containerd.id("husk");
    let mut spec = bundle::spec(&id, &SLEEP);
    let namespaces = spec["linux"]["namespaces"].as_array_mut().into_iter().flatten();
    namespaces.filter(|n| n["type"] == "network").for_each(|n| n["path"] = pod.path().into());
    let shim = Shim::running(containerd, &id, &spec)?;
    // runc's shim has no interfaces in its statistics.
    let task = || {
        let metrics = shim.task.metrics(&id)?;
        let eth0 = metrics.network.iter().find(|interface| interface.name == "eth0");
        eth0.map(|eth0| [eth0.rx_bytes, eth0.tx_bytes]).with_context(|| format!("no eth0: {metrics}"))
    };
    let (before, task_before) = (counted(&pod)?, task()?);
    shim.script("ping", PING)?;
    expect_pings("husk's pod on the host", before, counted(&pod)?)?;
    expect_pings("the statistics of husk's task", task_before, task()?)?;
    shim.task.kill(&id, "", 9)?;
    shim.task.wait(&id, "")?;
    shim.task.delete(&id, "")?;
    shim.shutdown();
    Ok(())
}
