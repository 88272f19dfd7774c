//! What the shim publishes is what runc's would: the same events with the same fields, in the same order.

use std::collections::HashMap;
use std::fmt::Debug;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::MessageFull;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use husk_tests::artifacts::Runtime;
use husk_tests::bundle;
use husk_tests::containerd::{Containerd, Setup};
use husk_tests::events::Published;
use husk_tests::shim::{Shim, Streams};
use serde_json::json;

/// Puts in the place of what differs from run to run what it stands for.
#[derive(Default)]
struct Names {
    pids: HashMap<u32, usize>,
}

impl Names {
    /// Pids by the order of their first appearance, beginning with 1; none stays none.
    fn pid(&mut self, pid: &mut u32) {
        let next = self.pids.len() + 1;
        if *pid != 0 {
            *pid = *self.pids.entry(*pid).or_insert(next) as u32;
        }
    }

    fn time(time: Option<&mut Timestamp>) {
        if let Some(time) = time {
            // Of this century, or not.
            *time = Timestamp { seconds: i64::from(time.seconds > 1_600_000_000), ..Default::default() };
        }
    }
}

fn told<M: MessageFull + Debug>(event: &Published, change: impl FnOnce(&mut M)) -> Result<String> {
    let mut message: M = event.decode()?;
    change(&mut message);
    Ok(format!("{} {message:?}", event.topic))
}

/// An event in words that are the same for the same happening.
fn words(event: &Published, id: &str, names: &mut Names) -> Result<String> {
    let text = match event.topic.as_str() {
        "/tasks/create" => told::<TaskCreate>(event, |event| names.pid(&mut event.pid)),
        "/tasks/start" => told::<TaskStart>(event, |event| names.pid(&mut event.pid)),
        "/tasks/exec-added" => told::<TaskExecAdded>(event, |_| {}),
        "/tasks/exec-started" => told::<TaskExecStarted>(event, |event| names.pid(&mut event.pid)),
        "/tasks/paused" => told::<TaskPaused>(event, |_| {}),
        "/tasks/resumed" => told::<TaskResumed>(event, |_| {}),
        "/tasks/oom" => told::<TaskOOM>(event, |_| {}),
        "/tasks/exit" => told::<TaskExit>(event, |event| {
            names.pid(&mut event.pid);
            Names::time(event.exited_at.as_mut());
        }),
        "/tasks/delete" => told::<TaskDelete>(event, |event| {
            names.pid(&mut event.pid);
            Names::time(event.exited_at.as_mut());
        }),
        other => bail!("an unknown event {other}: {event:?}"),
    };
    Ok(text?.replace(id, "ID"))
}

/// All events of a container that goes through everything.
fn life(containerd: &Containerd) -> Result<Vec<String>> {
    let id = containerd.id("events");
    let mut spec = bundle::spec(&id, &["sleep", "1000"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 24 << 20, "swap": 24 << 20});
    let shim = Shim::start(containerd, &id, &spec)?;
    let task = &shim.task;
    let (io, _stdout, _stderr) = shim.streams("init")?;
    shim.create(&io)?;
    task.start(&id, "")?;
    shim.exec_process("ends", &bundle::process(&["sh", "-c", "exit 3"]))?;
    task.exec(&id, "fails", &bundle::process(&["/no/such"]), &Streams::default())?;
    ensure!(task.start(&id, "fails").is_err());
    task.delete(&id, "fails")?;
    task.exec(&id, "never", &bundle::process(&["true"]), &Streams::default())?;
    task.pause(&id)?;
    task.resume(&id)?;
    task.delete(&id, "never")?;
    ensure!(shim.exec_process("greedy", &bundle::process(&["tail", "/dev/zero"]))?.0 == 137);
    task.exec(&id, "stays", &bundle::process(&["sleep", "1000"]), &Streams::default())?;
    task.start(&id, "stays")?;
    task.kill(&id, "", 9)?;
    task.wait(&id, "")?;
    task.wait(&id, "stays")?;
    task.delete(&id, "stays")?;
    task.delete(&id, "")?;
    let mut names = Names::default();
    let events = shim.events.until("/tasks/delete", Duration::from_secs(20))?;
    events.iter().map(|event| words(event, &id, &mut names)).collect()
}

#[test]
fn the_events_are_those_of_runcs_shim() -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell("the_events_are_those_of_runcs_shim") {
        return Ok(());
    }
    let runc = life(&Containerd::with(Setup { runtime: Some(Runtime::Runc), ..Setup::default() })?)?;
    let husk = life(Containerd::shared()?)?;
    // The kernel tells runc's shim of an OOM by another way than of the exit that it causes: there, they race.
    let sorted = |events: &[String]| {
        let mut events = events.to_vec();
        events.sort();
        events
    };
    ensure!(sorted(&husk) == sorted(&runc), "husk: {husk:#?}\nrunc: {runc:#?}");
    let but_oom = |events: &[String]| -> Vec<String> {
        events.iter().filter(|event| !event.starts_with("/tasks/oom")).cloned().collect()
    };
    ensure!(but_oom(&husk) == but_oom(&runc), "husk: {husk:#?}\nrunc: {runc:#?}");
    let at = |start: &str| husk.iter().position(|event| event.starts_with(start));
    let greedy = husk.iter().position(|event| event.starts_with("/tasks/exit") && event.contains("greedy"));
    ensure!(at("/tasks/oom") < greedy, "{husk:#?}");
    Ok(())
}
