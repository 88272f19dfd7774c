//! The shim publishes the same events as runc's shim, with the same fields in the same order.

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

/// Replaces values that differ from run to run by placeholders.
#[derive(Default)]
struct Names {
    pids: HashMap<(String, u32), usize>,
}

impl Names {
    /// Replaces PIDs by the order of their first appearance, starting with 1; 0 stays 0. Under husk, all processes of a
    /// container have the PID of its holder, so the process, by its exec id, belongs to the key.
    fn pid(&mut self, process: &str, pid: &mut u32) {
        let next = self.pids.len() + 1;
        if *pid != 0 {
            *pid = *self.pids.entry((process.to_owned(), *pid)).or_insert(next) as u32;
        }
    }

    fn time(time: Option<&mut Timestamp>) {
        if let Some(time) = time {
            // 1 for a time of this century, 0 otherwise.
            *time = Timestamp { seconds: i64::from(time.seconds > 1_600_000_000), ..Default::default() };
        }
    }
}

fn describe<M: MessageFull + Debug>(event: &Published, change: impl FnOnce(&mut M)) -> Result<String> {
    let mut message: M = event.decode()?;
    change(&mut message);
    Ok(format!("{} {message:?}", event.topic))
}

/// An event as text that is the same in every run.
fn normalised(event: &Published, id: &str, names: &mut Names) -> Result<String> {
    let text = match event.topic.as_str() {
        "/tasks/create" => describe::<TaskCreate>(event, |event| names.pid(id, &mut event.pid)),
        "/tasks/start" => describe::<TaskStart>(event, |event| names.pid(id, &mut event.pid)),
        "/tasks/exec-added" => describe::<TaskExecAdded>(event, |_| {}),
        "/tasks/exec-started" => describe::<TaskExecStarted>(event, |event| names.pid(&event.exec_id, &mut event.pid)),
        "/tasks/paused" => describe::<TaskPaused>(event, |_| {}),
        "/tasks/resumed" => describe::<TaskResumed>(event, |_| {}),
        "/tasks/oom" => describe::<TaskOOM>(event, |_| {}),
        "/tasks/exit" => describe::<TaskExit>(event, |event| {
            names.pid(&event.id, &mut event.pid);
            Names::time(event.exited_at.as_mut());
        }),
        "/tasks/delete" => describe::<TaskDelete>(event, |event| {
            names.pid(id, &mut event.pid);
            Names::time(event.exited_at.as_mut());
        }),
        other => bail!("an unknown event {other}: {event:?}"),
    };
    Ok(text?.replace(id, "ID"))
}

/// All events of a container that goes through every state.
fn life(containerd: &Containerd) -> Result<Vec<String>> {
    let id = containerd.id("events");
    let mut spec = bundle::spec(&id, &["sleep", "1000"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 24 << 20, "swap": 24 << 20});
    let shim = Shim::start(containerd, &id, &spec)?;
    let task = &shim.task;
    let (io, _stdout, _stderr) = shim.streams("init")?;
    shim.create_and_start(&io)?;
    shim.exec_process("ends", &bundle::process(&["sh", "-c", "exit 3"]))?;
    task.exec(&id, "fails", &bundle::process(&["/no/such"]), &Streams::default())?;
    ensure!(task.start(&id, "fails").is_err());
    task.delete(&id, "fails")?;
    task.exec(&id, "never", &bundle::process(&["true"]), &Streams::default())?;
    task.pause(&id)?;
    task.resume(&id)?;
    task.delete(&id, "never")?;
    ensure!(shim.exec_process("greedy", &bundle::process(&["tail", "/dev/zero"]))?.0 == 137);
    shim.start_exec("stays", &bundle::process(&["sleep", "1000"]), &Streams::default())?;
    task.kill(&id, "", 9)?;
    task.wait(&id, "")?;
    task.wait(&id, "stays")?;
    task.delete(&id, "stays")?;
    task.delete(&id, "")?;
    let mut names = Names::default();
    let events = shim.events.until("/tasks/delete", Duration::from_secs(60))?;
    events.iter().map(|event| normalised(event, &id, &mut names)).collect()
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn events_equal_those_of_runcs_shim() -> Result<()> {
    let mut runc = life(&Containerd::with(Setup { runtime: Some(Runtime::Runc), ..Setup::default() })?)?;
    // runc's shim publishes one for each of the kernel's notifications, and a process whose memory the kernel has not
    // yet taken back can cause another.
    runc.dedup_by(|second, first| second == first && second.starts_with("/tasks/oom"));
    let husk = life(Containerd::shared()?)?;
    // The kernel notifies runc's shim of an OOM and of the resulting exit on separate paths, so these events race
    // there.
    let sorted = |events: &[String]| {
        let mut events = events.to_vec();
        events.sort();
        events
    };
    ensure!(sorted(&husk) == sorted(&runc), "husk: {husk:#?}\nrunc: {runc:#?}");
    let without_oom = |events: &[String]| -> Vec<String> {
        events.iter().filter(|event| !event.starts_with("/tasks/oom")).cloned().collect()
    };
    ensure!(without_oom(&husk) == without_oom(&runc), "husk: {husk:#?}\nrunc: {runc:#?}");
    let position = |start: &str| husk.iter().position(|event| event.starts_with(start));
    let greedy = husk.iter().position(|event| event.starts_with("/tasks/exit") && event.contains("greedy"));
    ensure!(position("/tasks/oom") < greedy, "{husk:#?}");
    Ok(())
}
