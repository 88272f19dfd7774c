//! husk under docker: containers run, and have docker's networks, published ports and names as they have under runc.
//!
//! Each scenario runs with runc and with husk for each docker, under a dockerd and a containerd of its own, and returns
//! what the user has seen; both must be equal.
#![cfg(not(target_env = "musl"))]

use std::io::{BufRead, BufReader};
use std::process::Stdio;
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

/// A DNS server on the other machine, 192.0.2.2: it answers with the protocol of the query, and with many records for
/// one name.
const DNS: &str = r#"
import socketserver, struct

def answer(query, protocol):
    end = query.index(0, 12) + 5
    name, kind = query[13:13 + query[12]], struct.unpack(">H", query[end - 4:end - 2])[0]
    records = []
    if kind == 1 and name == b"outside":
        records = [bytes([192, 0, 2, 2])]
    elif kind == 16:
        texts = [protocol] if name == b"protocol" else [b"%03d" % n + bytes(200) for n in range(30)]
        records = [bytes([len(text)]) + text for text in texts]
    code = 0 if name in (b"outside", b"protocol", b"long") else 3
    reply = query[:2] + struct.pack(">HHHHH", 0x8180 | code, 1, len(records), 0, 0) + query[12:end]
    for record in records:
        reply += b"\xc0\x0c" + struct.pack(">HHIH", kind, 1, 60, len(record)) + record
    if protocol == b"udp" and len(reply) > 512:
        reply = query[:2] + struct.pack(">HHHHH", 0x8380, 1, 0, 0, 0) + query[12:end]
    return reply

class Datagram(socketserver.BaseRequestHandler):
    def handle(self):
        self.request[1].sendto(answer(self.request[0], b"udp"), self.client_address)

class Stream(socketserver.StreamRequestHandler):
    def handle(self):
        length = self.rfile.read(2)
        if len(length) == 2:
            reply = answer(self.rfile.read(struct.unpack(">H", length)[0]), b"tcp")
            self.wfile.write(struct.pack(">H", len(reply)) + reply)

socketserver.ThreadingMixIn.daemon_threads = True
class Datagrams(socketserver.ThreadingUDPServer): allow_reuse_address = True
class Streams(socketserver.ThreadingTCPServer): allow_reuse_address = True
import threading
datagrams, streams = Datagrams(("192.0.2.2", 53), Datagram), Streams(("192.0.2.2", 53), Stream)
threading.Thread(target=datagrams.serve_forever, daemon=True).start()
print("ready", flush=True)
streams.serve_forever()
"#;

/// Starts the server. It ends with the machine.
fn serve_names(machine: &Machine) -> Result<()> {
    let mut command = machine.containerd().enter("ip");
    command.args(["netns", "exec", "outside", "python3", "-c", DNS]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut server = command.spawn()?;
    let mut line = String::new();
    BufReader::new(server.stdout.take().context("no pipe")?).read_line(&mut line)?;
    ensure!(line == "ready\n", "the DNS server does not start: {:?}", server.wait());
    Ok(())
}

/// Bytes of a DNS query for `printf`, for a TXT record, after its length.
fn query(name: &str) -> String {
    let labels: String = name.split('.').map(|label| format!("\\{:03o}{label}", label.len())).collect();
    let length = 12 + name.len() + 2 + 4;
    format!(
        "\\000\\{length:03o}\\022\\064\\001\\000\\000\\001\\000\\000\\000\\000\\000\\000{labels}\\000\\000\\020\\000\\001"
    )
}

#[test]
fn docker_containers_find_each_other_and_others_by_name() -> Result<()> {
    same_with_both(|machine, engine| {
        serve_names(machine)?;
        engine.ok(&["network", "create", "--subnet", "10.77.1.0/24", "shop"])?;
        web(engine, "late", &[&["--add-host", "fixed:10.77.1.10"], &TWO_NETWORKS[..]].concat())?;
        web(engine, "web", &["--network", "shop", "--ip", "10.77.1.10", "--network-alias", "store"])?;
        let client = ["--network", "shop", "--ip", "10.77.1.11", "--dns", "192.0.2.2", "--hostname", "client"];
        web(engine, "client", &client)?;
        // A network that a running container joins: from now on it has docker's DNS server.
        engine.ok(&["network", "connect", "--ip", "10.77.1.12", "shop", "late"])?;

        let mut seen = String::new();
        let mut run = |container: &str, script: &str| {
            let output = engine.run(&["exec", container, "sh", "-c", script])?;
            seen += &format!("{container}: {script}: {}\n{}{}", output.code(), output.text(), output.errors());
            anyhow::Ok(())
        };
        for container in ["client", "late"] {
            run(container, "cat /etc/resolv.conf | grep -v '^#'; wget -T 20 -q -O - http://web/ http://store/")?;
        }
        run("late", "wget -T 20 -q -O - http://fixed/")?;
        run("web", "for name in client late store; do ping -c 1 -w 20 $name | head -n 1; done")?;
        // One type at a time: busybox prints the answers to two in the order of their arrival.
        run("client", "for type in a aaaa; do nslookup -type=$type web; done; nslookup -type=a store")?;
        run("client", "nslookup 10.77.1.10; nslookup -type=a nobody.example")?;
        run("client", "nslookup -type=a outside.example; nslookup -type=txt protocol.example")?;
        // Without the time of the record's end.
        let ask = |name: &str| format!("printf '{}' | nc -w 20 127.0.0.11 53 | md5sum", query(name));
        run("client", &ask("protocol.example"))?;
        run("client", &ask("long.example"))?;
        // The containers' own servers can have the port.
        run("web", "httpd -p 53 -h /www && wget -T 20 -q -O - http://127.0.0.1:53/")?;
        let many = "for n in $(seq 40); do nslookup -type=a web >/tmp/$n & done; wait; cat /tmp/? /tmp/?? | grep -c 10.77.1.10";
        run("client", many)?;

        // A name follows its container.
        engine.ok(&["rm", "--force", "web"])?;
        run("client", "nslookup -type=a web")?;
        engine.ok(&["restart", "client"])?;
        run("client", "nslookup -type=a late")?;
        engine.ok(&["rm", "--force", "client", "late"])?;
        engine.ok(&["network", "rm", "shop"])?;
        Ok(seen)
    })
}
