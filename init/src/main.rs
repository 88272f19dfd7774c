//! husk's guest init: PID 1 and agent in one binary.
//!
//! As PID 1 it boots the guest and serves the host over vsock until the host shuts it down. Under the name
//! [`worker::NAME`] the same binary performs one operation on a container; under [`launch::NAME`] it executes a program
//! that runs outside of containers, and under [`sandbox::NAME`] it holds the namespaces of a sandbox.
//!
//! # Modules
//!
//! A module imports only from rows below its own, or from its own row.
//!
//! | module | contents |
//! |---|---|
//! | `serve` | vsock ports and their TTRPC servers |
//! | `bundle`, `network`, `system` | the Bundle, Network and System services |
//! | `changes` | reports changes of the host's files to programs that watch them |
//! | `task` | containerd's Task service: containers, execs and their states |
//! | `debug` | debug mode: a shell on the console, and the Debug service |
//! | `supervisor` | runs the supervisor agent and restarts it |
//! | `worker` | short-lived processes that call libcontainer |
//! | `sandbox` | holds the namespaces of a sandbox without a pause container |
//! | `launch` | starts programs that run outside of containers |
//! | `disks` | disks of the running machine, and the Disks service |
//! | `boot` | boot steps, kernel parameters, timeline |
//! | `events` | containerd's events, and the Events service |
//! | `forward` | relays TCP connections from the host, connections to the host's Unix sockets, and DNS queries |
//! | `io` | the standard streams of processes, and the Stdio service |
//! | `cgroup` | cgroups: setup, limits, metrics, freezer, OOM kills |
//! | `report` | heartbeats, log lines and supervisor status for the host |
//! | `log`, `console` | log lines, and the guest's console |
//! | `reaper`, `spawn` | reaps children and delivers their exits; starts processes |
//! | `roots` | root filesystems that consist of folders of disks |
//! | `attributes` | owner, mode, times and extended attributes of files |
//! | `paths`, `rpc` | paths of a container; runs RPC handlers |
//! | `error`, `connection` | the error of a call; connections that report their end |
//! | `clock`, `fd` | the boot clock; descriptors in the async runtime |

mod attributes;
mod boot;
mod bundle;
mod cgroup;
mod changes;
mod clock;
mod connection;
mod console;
mod debug;
mod disks;
mod error;
mod events;
mod fd;
mod forward;
#[cfg(feature = "hostile")]
mod hostile;
mod io;
mod launch;
mod log;
mod loopback;
mod network;
mod paths;
mod reaper;
mod report;
mod roots;
mod rpc;
mod sandbox;
mod serve;
mod spawn;
mod supervisor;
mod system;
mod task;
mod uevents;
mod worker;

use std::panic::catch_unwind;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use husk_protos::chain::Chain;
use husk_protos::system::BootStep;
use husk_protos::{HOST_CID, frame};
use nix::sys::reboot::{RebootMode, reboot};
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio_vsock::{VsockAddr, VsockStream};

use boot::{Cmdline, Timeline};
use report::Reports;

fn main() -> ExitCode {
    let mut args = std::env::args();
    let name = args.next().unwrap_or_default();
    match name.as_str() {
        worker::NAME => {
            return match worker::serve::run(&args.next().unwrap_or_default()) {
                Ok(()) => ExitCode::SUCCESS,
                // The connection to PID 1 has failed: there is nowhere to report the error.
                Err(_) => ExitCode::FAILURE,
            };
        }
        launch::NAME => return launch::become_program(args),
        sandbox::NAME => return sandbox::become_sandbox(),
        _ => {}
    }
    if let Some(succeeded) = worker::user_namespace::run_program(&name, args) {
        return if succeeded { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    if std::process::id() != 1 {
        eprintln!("husk-init is the init of a husk guest and runs only as PID 1");
        return ExitCode::FAILURE;
    }
    let reports = Reports::default();
    match catch_unwind(|| run(&reports)) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => console::fatal(&Chain(error.as_ref()).to_string()),
        // The panic handler has already written the message.
        Err(_) => console::fatal("the init panicked"),
    }
    // Lines that did not reach the host may contain the reason.
    while let Some(line) = reports.undelivered() {
        console::write(&log::console_line(&line));
    }
    end_guest()
}

/// Boots the guest and serves the host until the guest is to end.
fn run(reports: &Reports) -> anyhow::Result<()> {
    let mut timeline = Timeline::default();
    let cmdline = boot::boot(&mut timeline, reports)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let result = runtime.block_on(serve(cmdline, timeline, reports));
    // Dropping the runtime would wait for blocking tasks and delay the guest's end.
    std::mem::forget(runtime);
    result
}

async fn serve(cmdline: Cmdline, mut timeline: Timeline, reports: &Reports) -> anyhow::Result<()> {
    let secret = boot::random().context("make the secret of the host's connections")?;
    let ports = serve::Ports::bind(secret)?;
    timeline.mark(BootStep::LISTENING);
    let reaper = reaper::Reaper::start().context("install the SIGCHLD handler")?;
    let sandbox_pid = match cmdline.sandbox {
        true => sandbox::start(&reaper).await.context("create the sandbox's namespaces")?,
        false => 0,
    };
    let supervisor = if cmdline.supervisor {
        let started = supervisor::Supervisor::start(reaper.clone(), reports.clone(), cmdline.debug);
        Some(started.context("start the supervisor agent")?)
    } else {
        None
    };
    let events = Arc::new(events::Events::default());
    let streams = Arc::new(io::Streams::default());
    let workers = worker::client::Workers::new(reaper.clone(), cmdline.log);
    let debug =
        if cmdline.debug { Some(debug::Debug::start(&reaper, &streams).context("start debug mode")?) } else { None };
    let sockets = Arc::new(forward::socket::Sockets::default());
    let disks = Arc::new(disks::Disks::default());
    let tasks = task::Tasks::new(reaper, workers, events.clone(), streams.clone(), sockets.clone(), disks.clone());
    std::fs::create_dir_all(paths::STATE).with_context(|| format!("create {}", paths::STATE))?;

    timeline.mark(BootStep::READY);
    let mut hello = system::hello(&timeline, sandbox_pid);
    let (end, mut shutdown) = mpsc::channel(1);
    let supervisor = supervisor.map(Arc::new);
    let task = task::service::TaskService { tasks: tasks.clone(), supervisor, reports: reports.clone(), end };
    #[cfg(feature = "hostile")]
    let (task, events) = hostile::Liar::new(task, events, cmdline.ready_port);
    let mut calls = containerd_shim_protos::shim_async::create_task(Arc::new(task));
    calls.extend(husk_protos::bundle_ttrpc::create_bundle(Arc::new(bundle::BundleService::new(tasks, sockets))));
    calls.extend(husk_protos::system_ttrpc::create_system(Arc::new(system::SystemService { hello: hello.clone() })));
    calls.extend(husk_protos::network_ttrpc::create_network(Arc::new(network::NetworkService::default())));
    calls.extend(husk_protos::disks_ttrpc::create_disks(Arc::new(disks::DisksService(disks))));
    if let Some(debug) = &debug {
        calls.extend(debug.service());
    }
    let _server = ports.serve(calls, streams.clone(), events).await?;

    // Keep this connection until the end: the host takes its end for the guest's end.
    let mut host = VsockStream::connect(VsockAddr::new(HOST_CID, cmdline.ready_port))
        .await
        .with_context(|| format!("connect to vsock port {} of the host", cmdline.ready_port))?;
    hello.secret = secret.to_vec();
    frame::write(&mut host, &hello).await.context("send the Hello to the host")?;

    tokio::select! {
        _ = shutdown.recv() => {}
        // Nothing to do here: the host ends a guest whose heartbeats are missing.
        error = reports.deliver(&mut host, cmdline.heartbeat) => {
            console::write(&format!("husk: failed to send reports to the host: {}\n", Chain(&error)));
            shutdown.recv().await;
        }
    }
    if let Some(debug) = debug {
        debug.end();
    }
    // The response, the last output and the last exits are still on their way. Once the host has them, it ends the VM.
    let ended_by_host = async {
        let _ = tokio::time::timeout(HOST_READS_OUTPUT, streams.connections.closed()).await;
        tokio::time::sleep(HOST_ENDS_VM).await;
    };
    tokio::select! {
        () = ended_by_host => {}
        _ = host.read_u8() => {}
    }
    Ok(())
}

/// Time for the host to read the last output after the response to Shutdown. Longer than the host waits for a reader of
/// its own.
const HOST_READS_OUTPUT: Duration = Duration::from_secs(11);
/// Time for the host to end the VM when it has the last output. Longer than it waits for the last exits.
const HOST_ENDS_VM: Duration = Duration::from_secs(1);

/// Reboots, unless the host ends the VM first. `reboot=t` on the kernel command line and QEMU's `-no-reboot` turn a
/// reboot into QEMU's exit.
fn end_guest() -> ExitCode {
    nix::unistd::sync();
    let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
    console::fatal(&format!("reboot: {error}"));
    // The exit of PID 1 is a kernel panic, and with `panic=-1` a reboot too.
    ExitCode::FAILURE
}
