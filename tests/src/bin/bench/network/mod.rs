//! The network of a VM: throughput and round-trip time compared with a connection made by hand, with user-mode
//! networking and with runc, and what a network adds to the start of a container.

mod contender;
mod cost;
mod manual;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::{Runtime, repository};
use husk_tests::cni::{Network, Node, Plugins, host_local};
use husk_tests::containerd::{Containerd, Setup};
use husk_tests::vm;
use serde_json::json;

use crate::report::{Column, Report, Target};
use contender::{Client, Contender, GATEWAY, Server, Tools};

/// The part of the manual connection's throughput that husk has to reach.
const OF_MANUAL: f64 = 0.9;
/// Pings of one round.
const PINGS: usize = 100;

/// Measures everything.
pub(crate) fn run(rounds: usize, runtime: &tokio::runtime::Runtime, report: &mut Report) -> Result<()> {
    let containerd = Containerd::with(Setup { runtime: Some(Runtime::Husk), ..Setup::default() })?;
    let node = Node::new(&containerd, &Plugins::newest()?, "bench")?;
    let results = [
        traffic(&node, rounds.div_ceil(4), runtime, report),
        cost::of_a_run(&node, &networks(), rounds, report),
        runtime.block_on(cost::in_the_guest(report)),
    ];
    // The results of the other parts are still useful.
    let failures: Vec<String> = results.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

/// A bridge with both families, as Kubernetes and nerdctl configure it.
fn networks() -> [Network; 1] {
    let ipam = host_local(&["10.88.0.0/16", "fd00:88::/64"]);
    let bridge = json!({"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": ipam});
    [Network { name: "bench", plugins: vec![bridge], runtime: json!({}) }]
}

/// Each round measures all contenders in turn, so that the machine's load affects all of them.
fn traffic(node: &Node<'_>, rounds: usize, runtime: &tokio::runtime::Runtime, report: &mut Report) -> Result<()> {
    let containerd = node.containerd;
    let tools = Tools { iperf3: repository().join(".cache/iperf3"), probe: vm::guest_program("probe")? };
    let pod = || node.pod(&networks());
    let pods = [(Column::Husk, Runtime::Husk, pod()?), (Column::Runc, Runtime::Runc, pod()?)];
    // The plugin has created the bridge with its address for the first pod.
    let on_bridge = Server::start(containerd, &tools, Some(&node.name()), GATEWAY)?;
    let on_host = Server::start(containerd, &tools, None, "127.0.0.1")?;
    let flags = tools.flags();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let mut contenders = Vec::new();
    for (column, shim, pod) in &pods {
        let namespace = format!("network:{}", pod.netns());
        let flags = [&["--with-ns", &namespace], &flags[..]].concat();
        let client = containerd.detached_with(*shim, &flags, "network", &["sleep", "100000"])?;
        contenders.push(Contender::new(*column, Client::Container(client), &on_bridge, GATEWAY));
    }
    let pod = pod()?;
    let model = contenders.first().context("no container")?.id()?;
    let guest = runtime.block_on(manual::boot(&pod, &tools, model))?;
    contenders.push(Contender::new(Column::Manual, Client::Guest(runtime, Box::new(guest)), &on_bridge, GATEWAY));
    let flags = [flags, vec!["--annotation", "io.husk.network=user"]].concat();
    let user = containerd.detached_with(Runtime::Husk, &flags, "user", &["sleep", "100000"]);
    let user = user.map(|container| {
        // The gateway of user-mode networking is the host.
        contenders.push(Contender::new(Column::User, Client::Container(container), &on_host, "10.0.2.2"));
    });

    for _ in 0..rounds {
        for contender in &mut contenders {
            contender.measure(PINGS)?;
        }
    }
    let samples = |pick: for<'a> fn(&'a Contender<'_>) -> &'a Vec<f64>| -> Vec<(Column, Vec<f64>)> {
        contenders.iter().map(|contender| (contender.column, pick(contender).clone())).collect()
    };
    let target = Target::AtLeastTimesManual(OF_MANUAL);
    report.median("iperf3, out of the container", "Gbit/s", &samples(|contender| &contender.out), target);
    report.median("iperf3, into the container", "Gbit/s", &samples(|contender| &contender.into), target);
    report.distribution("round trip of a byte over TCP", "ms", &samples(|contender| &contender.trips), Target::Any);
    user
}
