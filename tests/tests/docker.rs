//! husk under docker: containers run, and have docker's networks, published ports and names as they have under runc.
//!
//! Each scenario runs with runc and with husk, each for each docker under a dockerd and a containerd of its own, and returns what the
//! user has seen; both must be equal.
#![cfg(not(target_env = "musl"))]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::Runtime;
use husk_tests::command::wait_for;
use husk_tests::docker::{self, Docker};
use husk_tests::husk_only;
use husk_tests::machine::{Machine, WEB, normalized};

/// Names, MTU, addresses and routes of a container. docker 28's MACs are random.
const CONFIGURATION: &str = "for link in /sys/class/net/*; do
        echo ${link##*/} $(cat $link/mtu) $(cat $link/carrier)
    done
    ip -o -4 addr | awk '{print $2, $3, $4, $5, $6}' | sort; ip -4 route";

/// Network cards for two networks: docker does not announce how many a container will have.
const TWO_NETWORKS: [&str; 2] = ["--annotation", "io.husk.network_spare_nics=2"];

/// Runs the scenario under each docker and each runtime, and compares what it returns.
fn same_with_both(scenario: fn(&Machine, &Docker) -> Result<String>) -> Result<()> {
    let transcript = |version, runtime: Runtime| {
        let machine = Machine::start(runtime)?;
        let docker = Docker::start(&machine, version)?;
        let transcript = scenario(&machine, &docker);
        let transcript = transcript.with_context(|| format!("docker {version}, {}", runtime.name()))?;
        docker.stop()?;
        machine.expect_no_links(&["docker0", "lo", "uplink"])?;
        anyhow::Ok(transcript)
    };
    let mut expected = Vec::new();
    for version in docker::VERSIONS {
        if let Some(why) = docker::missing(version) {
            eprintln!("not tested with docker {version}: {}", why.trim());
            continue;
        }
        expected.push((version, transcript(version, Runtime::Runc)?));
    }
    husk_only!();
    for (version, expected) in expected {
        let found = transcript(version, Runtime::Husk)?;
        ensure!(found == expected, "docker {version}\n--- husk ---\n{found}\n--- runc ---\n{expected}");
    }
    Ok(())
}

/// `docker run --detach` of the web server.
fn web(docker: &Docker, name: &str, flags: &[&str]) -> Result<()> {
    docker.container(&[&["--detach", "--name", name], flags].concat(), &["sh", "-c", WEB, name])?.ok().map(drop)
}

#[test]
fn docker_runs_containers_with_input_limits_logs_exec_and_exit_status() -> Result<()> {
    same_with_both(|_, engine| {
        let through = engine.container_with(&["--rm", "-i"], &["cat"], Some("through stdin"))?.ok()?;
        let mut seen = through.text();
        engine.container(&["--rm"], &["sh", "-c", "exit 7"])?.expect_code(7)?;
        let limits =
            "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null; id -u; hostname";
        seen += &engine
            .container(&["--rm", "-m", "100m", "-u", "1000", "--hostname", "inside"], &["sh", "-c", limits])?
            .ok()?
            .text();

        let script = "echo out; echo err >&2; trap 'echo bye; exit 5' TERM; while :; do sleep 0.1; done";
        engine.container(&["--detach", "--name", "loop"], &["sh", "-c", script])?.ok()?;
        seen += &engine.ok(&["exec", "loop", "cat", "/proc/1/comm"])?;
        engine.run(&["exec", "loop", "sh", "-c", "exit 9"])?.expect_code(9)?;
        engine.ok(&["pause", "loop"])?;
        seen += &engine.ok(&["inspect", "--format", "{{.State.Status}}", "loop"])?;
        engine.ok(&["unpause", "loop"])?;
        engine.ok(&["stop", "loop"])?;
        seen += &engine.ok(&["inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "loop"])?;
        let logs = wait_for(Duration::from_secs(30), "the container's output is in docker's log", || {
            let logs = engine.run(&["logs", "loop"]).ok()?;
            (logs.text().contains("bye") && logs.errors().contains("err")).then(|| logs.text() + &logs.errors())
        })?;
        seen += &logs;
        engine.ok(&["start", "loop"])?;
        seen += &engine.ok(&["inspect", "--format", "{{.State.Status}}", "loop"])?;
        engine.ok(&["rm", "--force", "loop"])?;
        ensure!(engine.ok(&["ps", "--all", "--quiet"])?.is_empty());
        Ok(seen)
    })
}

#[test]
fn docker_publishes_ports_on_the_host() -> Result<()> {
    same_with_both(|machine, engine| {
        web(engine, "web", &["-p", "18080:80"])?;
        web(engine, "local", &["-p", "127.0.0.1:18081:80"])?;
        let mut seen = machine.fetch_published()?;
        seen += &engine.ok(&["port", "web"])?;
        seen += &engine.ok(&["exec", "web", "sh", "-c", CONFIGURATION])?;
        seen += &normalized(&engine.ok(&["exec", "web", "cat", "/etc/hosts", "/etc/resolv.conf"])?);
        engine.ok(&["exec", "web", "ping", "-c", "2", "-w", "20", "192.0.2.2"])?;

        engine.ok(&["restart", "web"])?;
        seen += &machine.fetch("http://127.0.0.1:18080")?;
        engine.ok(&["rm", "--force", "web", "local"])?;
        ensure!(
            machine.fetch_once("http://127.0.0.1:18080")?.code() != 0,
            "the port is published without its container"
        );
        Ok(seen)
    })
}

#[test]
fn docker_containers_of_a_network_reach_each_other_by_address() -> Result<()> {
    same_with_both(|_, engine| {
        engine.ok(&["network", "create", "--subnet", "10.77.1.0/24", "front"])?;
        engine.ok(&["network", "create", "--subnet", "10.77.2.0/24", "back"])?;
        web(engine, "fixed", &[&["--network", "front", "--ip", "10.77.1.55"], &TWO_NETWORKS[..]].concat())?;
        web(engine, "rear", &["--network", "back"])?;
        // A second network before the start.
        engine.ok(&[
            "create",
            "--runtime",
            engine.runtime(),
            "--name",
            "both",
            "--network",
            "front",
            TWO_NETWORKS[0],
            TWO_NETWORKS[1],
            docker::IMAGE,
            "sh",
            "-c",
            WEB,
            "both",
        ])?;
        engine.ok(&["network", "connect", "back", "both"])?;
        engine.ok(&["start", "both"])?;
        // docker decides anew each time which network gets eth0.
        let addresses = "ip -o -4 addr | awk '{print $4}' | sort; ip -4 route | awk '/default/ {print $3}'";
        let mut seen = engine.ok(&["exec", "both", "sh", "-c", addresses])?;
        for address in ["10.77.1.55", "10.77.2.2"] {
            seen +=
                &engine.ok(&["exec", "both", "wget", "-T", "20", "-q", "-O", "-", &format!("http://{address}/")])?;
        }
        // A network that a running container joins and leaves.
        engine.ok(&["network", "connect", "back", "fixed"])?;
        seen += &engine.ok(&["exec", "fixed", "sh", "-c", CONFIGURATION])?;
        seen += &engine.ok(&["exec", "fixed", "wget", "-T", "20", "-q", "-O", "-", "http://10.77.2.2/"])?;
        engine.ok(&["network", "disconnect", "back", "fixed"])?;
        engine.ok(&["rm", "--force", "fixed", "both", "rear"])?;
        engine.ok(&["network", "rm", "front", "back"])?;
        Ok(seen)
    })
}

#[test]
fn docker_containers_find_each_other_by_the_names_in_their_hosts_files() -> Result<()> {
    same_with_both(|_, engine| {
        engine.ok(&["network", "create", "--subnet", "10.77.1.0/24", "shop"])?;
        web(engine, "web", &["--network", "shop", "--ip", "10.77.1.10"])?;
        web(engine, "client", &["--network", "shop", "--add-host", "web:10.77.1.10"])?;
        let seen = engine.ok(&["exec", "client", "wget", "-T", "20", "-q", "-O", "-", "http://web/"])?;
        engine.ok(&["rm", "--force", "web", "client"])?;
        engine.ok(&["network", "rm", "shop"])?;
        Ok(seen)
    })
}
