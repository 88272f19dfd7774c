//! One of the compared networks: a client in a container or a guest, and servers that it reaches.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use husk_tests::containerd::{Container, Containerd};
use husk_tests::guest::Guest;
use serde_json::Value;

use crate::report::Column;

/// The bridge's address, which the plugin host-local chooses: the first one of the network.
pub(super) const GATEWAY: &str = "10.88.0.1";

/// Deadline for a server to listen.
const START: Duration = Duration::from_secs(30);
/// Seconds of one transfer. The first one, during which an emulator translates the code, is not counted.
const SECONDS: &str = "3";
const OMITTED: &str = "1";

/// Where the clients have the programs.
const IPERF3: &str = "/iperf3";
const PROBE: &str = "/probe";

/// The programs on the host.
pub(super) struct Tools {
    /// The folder with iperf3 and its libraries.
    pub(super) iperf3: PathBuf,
    /// The static program that plays ping-pong.
    pub(super) probe: PathBuf,
}

impl Tools {
    /// The flags of `ctr run` that bring the programs into a container.
    pub(super) fn flags(&self) -> Vec<String> {
        let mount = |source: &Path, target: &str| {
            ["--mount".to_owned(), format!("type=bind,src={},dst={target},options=rbind:ro", source.display())]
        };
        let probe = self.probe.parent().unwrap_or(&self.probe);
        [mount(&self.iperf3, IPERF3), mount(probe, PROBE)].concat()
    }
}

/// iperf3's arguments, by the loader that comes with it.
fn iperf3(folder: &str) -> [String; 4] {
    [format!("{folder}/ld.so"), "--library-path".to_owned(), folder.to_owned(), format!("{folder}/iperf3")]
}

/// Servers at one address.
pub(super) struct Server {
    iperf3: u16,
    echo: u16,
    processes: Vec<Child>,
}

impl Server {
    /// Starts the servers in a network namespace of the daemon, or of the host.
    pub(super) fn start(containerd: &Containerd, tools: &Tools, netns: Option<&str>, address: &str) -> Result<Self> {
        let enter = || match netns {
            Some(netns) => {
                let mut command = containerd.enter("ip");
                command.args(["netns", "exec", netns]);
                command
            }
            None => containerd.enter("env"),
        };
        // Free on the host, which a namespace with servers of its own does not need.
        let mut server = Self { iperf3: free_port()?, echo: free_port()?, processes: Vec::new() };
        let mut command = enter();
        command.args(iperf3(&tools.iperf3.display().to_string())).args(["-s", "--forceflush", "-B", address, "-p"]);
        server.add(command.arg(server.iperf3.to_string()), "iperf3")?;
        let mut command = enter();
        server
            .add(command.arg(&tools.probe).args(["echo", &format!("{address}:{}", server.echo)]), "the echo server")?;
        Ok(server)
    }

    /// Starts a process and waits until it says that it listens.
    fn add(&mut self, command: &mut Command, name: &str) -> Result<()> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut child = child.with_context(|| format!("start {name}"))?;
        let output = child.stdout.take().context("no stdout")?;
        self.processes.push(child);
        let (listens, listening) = mpsc::channel();
        std::thread::spawn(move || {
            // Read to the end: a full pipe would stall the server.
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if line.to_lowercase().contains("listening") {
                    // Sent twice if the server says so again.
                    let _ = listens.send(());
                }
            }
        });
        listening.recv_timeout(START).with_context(|| format!("{name} does not listen"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for process in &mut self.processes {
            // It may have exited. What runs in the daemon's PID namespace ends with the daemon.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// Where the client's programs run.
pub(super) enum Client<'a> {
    Container(Container<'a>),
    /// A guest without containers, and the runtime that drives it.
    Guest(&'a tokio::runtime::Runtime, Box<Guest>),
}

impl Client<'_> {
    fn run(&self, args: &[&str]) -> Result<String> {
        match self {
            Self::Container(container) => Ok(container.exec(args).ok()?.text()),
            Self::Guest(runtime, guest) => {
                let (status, out, errors) = runtime.block_on(guest.run_in_vm(args, None))?;
                let [out, errors] = [out, errors].map(|text| String::from_utf8_lossy(&text).into_owned());
                ensure!(status == 0, "{args:?} exited with {status}: {out}{errors}");
                Ok(out)
            }
        }
    }
}

/// A client, and what it has measured.
pub(super) struct Contender<'a> {
    pub(super) column: Column,
    client: Client<'a>,
    server: &'a Server,
    address: &'static str,
    /// Gbit/s sent by the client.
    pub(super) out: Vec<f64>,
    /// Gbit/s received by the client.
    pub(super) into: Vec<f64>,
    /// Milliseconds.
    pub(super) trips: Vec<f64>,
}

impl<'a> Contender<'a> {
    /// A client that reaches the servers at this address.
    pub(super) fn new(column: Column, client: Client<'a>, server: &'a Server, address: &'static str) -> Self {
        Self { column, client, server, address, out: Vec::new(), into: Vec::new(), trips: Vec::new() }
    }

    /// The container's id.
    pub(super) fn id(&self) -> Result<&str> {
        match &self.client {
            Client::Container(container) => Ok(container.id()),
            Client::Guest(..) => bail!("a guest without containers"),
        }
    }

    /// Measures one round.
    pub(super) fn measure(&mut self, pings: usize) -> Result<()> {
        self.out.push(self.transfer(&[])?);
        self.into.push(self.transfer(&["-R"])?);
        let server = format!("{}:{}", self.address, self.server.echo);
        let probe = format!("{PROBE}/probe");
        let times = self.client.run(&[&probe, "ping", &server, &pings.to_string()])?;
        for time in times.lines() {
            let microseconds: f64 = time.parse().with_context(|| format!("the probe printed {time:?}"))?;
            self.trips.push(microseconds / 1000.0);
        }
        Ok(())
    }

    fn transfer(&self, flags: &[&str]) -> Result<f64> {
        let (program, port) = (iperf3(IPERF3), self.server.iperf3.to_string());
        let mut args: Vec<&str> = program.iter().map(String::as_str).collect();
        args.extend(["-c", self.address, "-p", &port, "-t", SECONDS, "-O", OMITTED, "-J"]);
        args.extend(flags);
        let output = self.client.run(&args)?;
        let report: Value = serde_json::from_str(&output).with_context(|| format!("iperf3 printed {output:?}"))?;
        let received = report["end"]["sum_received"]["bits_per_second"].as_f64();
        Ok(received.with_context(|| format!("no rate in {output}"))? / 1e9)
    }
}
