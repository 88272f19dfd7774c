//! A paused container is frozen and reports it, and can still be killed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::Status;
use containerd_shim_protos::ttrpc::Code;
use husk_tests::artifacts::Version;
use husk_tests::bundle;
use husk_tests::containerd::Containerd;
use husk_tests::events::Watch;
use husk_tests::shim::{Shim, Streams, code};

/// Writes a counter to a file in a loop.
const COUNT: &str = "i=0; while :; do i=$((i+1)); echo $i > /run/count; done";

fn status(shim: &Shim, exec: &str) -> Result<Status> {
    let state = shim.task.state(&shim.bundle.id, exec)?;
    state.status.enum_value().map_err(|other| anyhow::anyhow!("status {other}"))
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_paused_container_is_frozen_and_every_call_on_it_returns() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("pause");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sh", "-c", COUNT]))?;
    let task = &shim.task;
    let precondition = Some(Code::FAILED_PRECONDITION);
    let (io, idle) = (Streams::default(), bundle::process(&["sleep", "1000"]));

    shim.create(&io)?;
    ensure!(code(&task.pause(&id)) == precondition, "Pause before Start");
    task.start(&id, "")?;
    ensure!(code(&task.resume(&id)) == precondition, "Resume of a running container");
    shim.start_exec("runs", &idle, &io)?;
    task.exec(&id, "waits", &idle, &io)?;
    shim.script("counts", "while ! [ -s /run/count ]; do :; done")?;

    task.pause(&id)?;
    ensure!((status(&shim, "")?, status(&shim, "runs")?) == (Status::PAUSED, Status::PAUSED));
    ensure!(status(&shim, "waits")? == Status::CREATED, "an exec without a process is not paused");
    let usage = || task.metrics(&id).map(|metrics| metrics.cpu.usage_usec);
    let before = usage()?;
    for (call, result) in [
        ("Pause", code(&task.pause(&id))),
        ("Start of an exec", code(&task.start(&id, "waits"))),
        ("Delete", code(&task.delete(&id, ""))),
        ("Delete of an exec", code(&task.delete(&id, "runs"))),
    ] {
        ensure!(result == precondition, "{call} of a paused container returns {result:?}");
    }
    let added = task.exec(&id, "late", &idle, &io);
    ensure!(
        added.is_err_and(|error| format!("{error:#}").contains("paused")),
        "an exec was added to a paused container"
    );
    ensure!(task.pids(&id)?.len() == 2);
    ensure!(usage()? == before, "the paused container used CPU time");
    task.kill(&id, "runs", 15)?;

    task.resume(&id)?;
    ensure!(status(&shim, "")? == Status::RUNNING);
    ensure!(task.wait(&id, "runs")? == 143, "the signal sent during the pause was lost");
    task.start(&id, "waits")?;
    let further = "old=$(cat /run/count); while [ \"$(cat /run/count)\" = \"$old\" ]; do :; done";
    shim.script("goes-on", further).context("the counter stands still after Resume")?;

    // A paused container can be killed without being resumed.
    task.pause(&id)?;
    task.kill(&id, "", 9)?;
    ensure!(task.wait(&id, "")? == 137 && task.wait(&id, "waits")? == 137);
    ensure!(status(&shim, "")? == Status::STOPPED);
    ensure!(code(&task.resume(&id)) == precondition && code(&task.pause(&id)) == precondition);
    task.delete(&id, "")?;
    let events = shim.events.until("/tasks/delete", Duration::from_secs(60))?;
    let topics: Vec<&str> =
        events.iter().map(|event| event.topic.as_str()).filter(|topic| topic.ends_with("ed")).collect();
    let (added, started) = ("/tasks/exec-added", "/tasks/exec-started");
    let expected = [
        added,
        started,
        added,
        added,
        started,
        "/tasks/paused",
        "/tasks/resumed",
        started,
        added,
        started,
        "/tasks/paused",
    ];
    ensure!(topics == expected, "{topics:?}");
    Ok(())
}

#[test]
fn ctr_can_pause_and_resume_with_every_containerd() -> Result<()> {
    for version in Version::ALL {
        let containerd = Containerd::shared_of(version)?;
        let watch = Watch::start(containerd)?;
        let container = containerd.detached(&[], "ctr-pause", &["sleep", "1000"])?;
        containerd.ctr(["task", "pause", container.id()]).ok()?;
        ensure!(container.status()?.as_deref() == Some("PAUSED"), "{version:?}");
        containerd.ctr(["task", "resume", container.id()]).ok()?;
        ensure!(container.status()?.as_deref() == Some("RUNNING"), "{version:?}");
        containerd.ctr(["task", "pause", container.id()]).ok()?;
        containerd.ctr(["task", "rm", "--force", container.id()]).ok()?;
        let events = watch.collect(container.id(), Duration::from_secs(60), |event| event.topic == "/tasks/delete")?;
        let topics: Vec<&str> = events.iter().map(|event| event.topic.trim_start_matches("/tasks/")).collect();
        ensure!(
            topics == ["create", "start", "paused", "resumed", "paused", "exit", "delete"],
            "{version:?}: {topics:?}"
        );
    }
    Ok(())
}
