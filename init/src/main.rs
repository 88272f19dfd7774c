//! husk's guest: PID 1 and agent in one binary.
//!
//! As PID 1 it boots the guest and serves the host over vsock until it is told to end. Under the name of a worker
//! ([`worker::NAME`]) it does one operation on a container, under another ([`launch::NAME`]) it becomes a program that runs beside the containers.

mod boot;
mod bundle;
mod cgroup;
mod console;
mod debug;
mod error;
mod events;
mod events_service;
mod io;
mod launch;
mod log;
mod paths;
mod reaper;
mod report;
mod rpc;
mod serve;
mod spawn;
mod supervisor;
mod system;
mod task;
mod worker;

use std::panic::catch_unwind;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
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
                Err(_nobody_to_tell) => ExitCode::FAILURE,
            };
        }
        launch::NAME => return launch::become_program(args),
        _ => {}
    }
    if std::process::id() != 1 {
        eprintln!("husk-init is the init of a husk guest: it only runs as PID 1");
        return ExitCode::FAILURE;
    }
    let reports = Reports::default();
    match catch_unwind(|| live(&reports)) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => console::last_words(&format!("{error:#}")),
        // The panic's own message is on the console already.
        Err(_) => console::last_words("the init panicked"),
    }
    // What the host was not told: it may say why.
    while let Some(line) = reports.untold() {
        console::write(&log::console_line(&line));
    }
    end()
}

/// The whole life of a guest. Comes back when it is to end.
fn live(reports: &Reports) -> anyhow::Result<()> {
    let mut timeline = Timeline::default();
    let cmdline = boot::boot(&mut timeline, reports)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let result = runtime.block_on(serve(cmdline, timeline, reports));
    // Tasks that wait for something must not keep the guest from its end.
    std::mem::forget(runtime);
    result
}

async fn serve(cmdline: Cmdline, mut timeline: Timeline, reports: &Reports) -> anyhow::Result<()> {
    let ports = serve::Ports::bind()?;
    timeline.mark(BootStep::LISTENING);
    let reaper = reaper::Reaper::start().context("listen to SIGCHLD")?;
    let supervisor = if cmdline.supervisor {
        let started = supervisor::Supervisor::start(reaper.clone(), reports.clone(), cmdline.debug);
        Some(started.context("start the supervisor agent")?)
    } else {
        None
    };
    let events = Arc::new(events::Events::default());
    let streams = Arc::new(io::Streams::default());
    let workers = worker::client::Workers::new(reaper.clone(), cmdline.log);
    let debug = if cmdline.debug {
        Some(debug::Debug::start(&reaper, &streams).context("start what a guest in debug mode has")?)
    } else {
        None
    };
    let tasks = task::Tasks::new(reaper, workers, events.clone(), streams.clone());
    std::fs::create_dir_all(paths::STATE).context("make the folder of the containers' states")?;

    timeline.mark(BootStep::READY);
    let hello = system::hello(&timeline);
    let (end, mut ended) = mpsc::channel(1);
    let supervisor = supervisor.map(Arc::new);
    let task = task::service::TaskService { tasks: tasks.clone(), supervisor, reports: reports.clone(), end };
    let mut calls = containerd_shim_protos::shim_async::create_task(Arc::new(task));
    calls.extend(husk_protos::bundle_ttrpc::create_bundle(Arc::new(bundle::BundleService::new(tasks))));
    calls.extend(husk_protos::system_ttrpc::create_system(Arc::new(system::Service { hello: hello.clone() })));
    if let Some(debug) = &debug {
        calls.extend(debug.service());
    }
    let _server = ports.serve(calls, streams, events).await?;

    // Its end tells the host that the guest is gone: it is held until then.
    let mut host = VsockStream::connect(VsockAddr::new(HOST_CID, cmdline.ready_port)).await.context("dial the host")?;
    frame::write(&mut host, &hello).await.context("say hello to the host")?;

    tokio::select! {
        _ = ended.recv() => {}
        // The host ends a guest that it does not hear: that is the only one who could help.
        error = reports.deliver(&mut host, cmdline.heartbeat) => {
            console::write(&format!("husk: no way to tell the host anything: {error}\n"));
            ended.recv().await;
        }
    }
    if let Some(debug) = debug {
        debug.end();
    }
    // The answer is still to get out, and what the last processes wrote, and how they ended. The host ends the VM when it has all that.
    let _ = tokio::time::timeout(HOST_ENDS, host.read_u8()).await;
    Ok(())
}

/// How long the host may take to end the VM after the answer to its shutdown: more than it waits for what is on its way to it.
const HOST_ENDS: Duration = Duration::from_secs(1);

/// Ends the guest, unless the host is faster: `reboot=t` on its kernel's command line and QEMU's `-no-reboot` make it QEMU's exit.
fn end() -> ExitCode {
    nix::unistd::sync();
    let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
    console::last_words(&format!("reboot: {error}"));
    // PID 1's exit is a kernel panic, which with `panic=-1` is a reboot too.
    ExitCode::FAILURE
}
