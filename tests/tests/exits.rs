//! How processes end: with which status, told in which order, and why.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::ttrpc::Code;
use husk_tests::artifacts::Runtime;
use husk_tests::bundle;
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::events::Published;
use husk_tests::fifo;
use husk_tests::process::Process;
use husk_tests::shim::{Api, Shim, Streams, code};
use serde_json::json;

/// Longest for an event on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);

/// The exits and OOMs among events, by the process's id; `oom` for an OOM.
fn ends(events: &[Published]) -> Result<Vec<String>> {
    let mut ends = Vec::new();
    for event in events {
        match event.topic.as_str() {
            "/tasks/exit" => ends.push(event.decode::<TaskExit>()?.id),
            "/tasks/oom" => {
                event.decode::<TaskOOM>()?;
                ends.push("oom".to_owned());
            }
            _ => {}
        }
    }
    Ok(ends)
}

#[test]
fn every_status_from_0_to_255_is_told_as_it_is() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("status");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sh", "-c", "exit 255"]))?;
    shim.create(&Streams::default())?;
    shim.task.exec(&id, "before", &bundle::process(&["sleep", "1000"]), &Streams::default())?;
    for status in [0, 1, 2, 42, 125, 126, 127, 128, 129, 137, 143, 200, 254, 255] {
        let exec = format!("e{status}");
        let ended = shim.exec_process(&exec, &bundle::process(&["sh", "-c", &format!("exit {status}")]))?.0;
        ensure!(ended == status, "exit {status} is told as {ended}");
    }
    shim.task.start(&id, "")?;
    ensure!(shim.task.wait(&id, "")? == 255 && shim.task.state(&id, "")?.exit_status == 255);
    let late = code(&shim.task.start(&id, "before"));
    // runc's shim answers the one or the other, as it has heard of the end itself or not.
    ensure!(matches!(late, Some(Code::FAILED_PRECONDITION | Code::UNKNOWN)), "{late:?}");
    if Runtime::under_test() == Runtime::Husk {
        ensure!(late == Some(Code::FAILED_PRECONDITION), "{late:?}");
    }
    ensure!(shim.task.delete(&id, "")? == 255);
    Ok(())
}

#[test]
fn the_inits_exit_is_told_after_those_of_its_execs() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("order");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
    shim.run_detached()?;
    let execs: Vec<String> = (0..10).map(|number| format!("e{number}")).collect();
    for exec in &execs {
        shim.task.exec(&id, exec, &bundle::process(&["sleep", "1000"]), &Streams::default())?;
        shim.task.start(&id, exec)?;
    }
    shim.task.kill(&id, "", 9)?;
    ensure!(shim.task.wait(&id, "")? == 137);
    for exec in &execs {
        ensure!(shim.task.wait(&id, exec)? == 137);
        shim.task.delete(&id, exec)?;
    }
    shim.task.delete(&id, "")?;
    let mut ends = ends(&shim.events.until("/tasks/delete", DEADLINE)?)?;
    ensure!(ends.pop() == Some(id), "the init's was not the last: {ends:?}");
    ends.sort();
    ensure!(ends == execs, "{ends:?}");
    Ok(())
}

#[test]
fn the_exit_of_an_exec_that_is_deleted_at_once_is_told() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("at-once");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
    shim.run_detached()?;
    for number in 0..5 {
        let exec = format!("e{number}");
        shim.task.exec(&id, &exec, &bundle::process(&["sleep", "1000"]), &Streams::default())?;
        shim.task.start(&id, &exec)?;
        shim.task.kill(&id, &exec, 9)?;
        // Without waiting for its exit: as soon as there is one.
        wait_for(DEADLINE, "it can be deleted", || shim.task.delete(&id, &exec).ok())?;
        let ends = ends(&shim.events.until("/tasks/exit", DEADLINE)?)?;
        ensure!(ends == [exec], "{ends:?}");
    }
    Ok(())
}

#[test]
fn who_needs_more_memory_than_the_limit_ends_with_137_after_an_oom_event() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("oom");
    // tail keeps what it has read as long as no line ends.
    let greedy = ["tail", "/dev/zero"];
    let mut spec = bundle::spec(&id, &["sh", "-c", "until [ -e /run/go ]; do sleep 0.1; done; exec tail /dev/zero"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 24 << 20, "swap": 24 << 20});
    let shim = Shim::start(containerd, &id, &spec)?;
    shim.run_detached()?;
    let (status, ..) = shim.exec_process("greedy", &bundle::process(&greedy))?;
    ensure!(status == 137, "{status}");
    let events = shim.events.until("/tasks/exit", DEADLINE)?;
    ensure!(ends(&events)? == ["oom", "greedy"], "{:?}", ends(&events)?);
    ensure!(shim.task.state(&id, "")?.status.value() == 2, "the init had no part in it");

    shim.task.exec(&id, "go", &bundle::process(&["mkdir", "/run/go"]), &Streams::default())?;
    shim.task.start(&id, "go")?;
    ensure!(shim.task.wait(&id, "")? == 137);
    shim.task.delete(&id, "")?;
    let ends = ends(&shim.events.until("/tasks/delete", DEADLINE)?)?;
    ensure!(ends.last() == Some(&id) && ends.iter().filter(|end| *end == "oom").count() == 1, "{ends:?}");
    ensure!(ends.iter().position(|end| end == "oom") < ends.iter().position(|end| *end == id), "{ends:?}");
    Ok(())
}

/// QEMU of the shim's VM.
fn qemu(shim: &Shim) -> Result<Process> {
    let below = shim.containerd().shim_of(&shim.bundle.id)?.1;
    let found = below.iter().find(|process| process.name.starts_with("qemu")).cloned();
    found.with_context(|| format!("the shim has no QEMU: {below:#?}"))
}

#[test]
fn an_exec_that_was_never_started_ends_with_its_vm_and_can_be_deleted() -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell("an_exec_that_was_never_started_ends_with_its_vm_and_can_be_deleted") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "never")?;
    let id = shim.bundle.id.clone();
    for exec in ["waited", "deleted"] {
        shim.task.exec(&id, exec, &bundle::process(&["true"]), &Streams::default())?;
    }
    // Somebody may be waiting already.
    let early = shim.client(Api::V2)?;
    let waiting = std::thread::spawn({
        let id = id.clone();
        move || early.wait(&id, "waited")
    });
    qemu(&shim)?.kill();
    ensure!(waiting.join().map_err(|_| anyhow::anyhow!("the wait panicked"))?? == 137);
    ensure!(shim.task.wait(&id, "waited")? == 137);
    for exec in ["waited", "deleted"] {
        let asked = Instant::now();
        ensure!(shim.task.delete(&id, exec)? == 137);
        ensure!(asked.elapsed() < Duration::from_secs(3), "Delete took {:?}", asked.elapsed());
    }
    ensure!(shim.task.wait(&id, "")? == 137);
    shim.task.delete(&id, "")?;
    let ends = ends(&shim.events.until("/tasks/delete", DEADLINE)?)?;
    ensure!(ends == [id], "an exec that never ran has ended: {ends:?}");
    Ok(())
}

#[test]
fn when_the_vm_dies_readers_who_do_not_read_are_waited_for_together() -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell("when_the_vm_dies_readers_who_do_not_read_are_waited_for_together") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "unread")?;
    let id = shim.bundle.id.clone();
    let execs: Vec<String> = (0..4).map(|number| format!("e{number}")).collect();
    let mut readers = Vec::new();
    for exec in &execs {
        let (io, stdout, mut stderr) = shim.streams(exec)?;
        fifo::fill(&shim.bundle.outside.join(format!("{exec}.out")))?;
        shim.task.exec(&id, exec, &bundle::process(&["sh", "-c", "echo there >&2; exec yes"]), &io)?;
        shim.task.start(&id, exec)?;
        stderr.read_until("there\n", DEADLINE)?;
        readers.push((stdout, stderr));
    }
    let asked = Instant::now();
    qemu(&shim)?.kill();
    ensure!(shim.task.wait(&id, "")? == 137);
    // One after the other they would take 20 s.
    ensure!(asked.elapsed() < Duration::from_secs(10), "the init's exit came after {:?}", asked.elapsed());
    for exec in &execs {
        ensure!(shim.task.delete(&id, exec)? == 137);
    }
    shim.task.delete(&id, "")?;
    let mut ends = ends(&shim.events.until("/tasks/delete", DEADLINE)?)?;
    ensure!(ends.pop() == Some(id), "the init's was not the last: {ends:?}");
    ends.sort();
    ensure!(ends == execs, "{ends:?}");
    Ok(())
}

#[test]
fn a_reader_who_does_not_read_holds_up_no_other_exit() -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell("a_reader_who_does_not_read_holds_up_no_other_exit") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "holds-up")?;
    let id = shim.bundle.id.clone();
    let (io, _stdout, _stderr) = shim.streams("unread")?;
    fifo::fill(&shim.bundle.outside.join("unread.out"))?;
    shim.task.exec(&id, "unread", &bundle::process(&["sh", "-c", "echo; exit 4"]), &io)?;
    shim.task.start(&id, "unread")?;
    let ended = || shim.task.state(&id, "unread").ok().filter(|state| state.exit_status == 4);
    wait_for(DEADLINE, "it has ended in the guest", ended)?;
    for number in 0..3 {
        ensure!(shim.exec(&format!("e{number}"), &["true"])?.0 == 0);
    }
    // Otherwise they waited for the exit before them, and that for its reader.
    let first = ends(&shim.events.until("/tasks/exit", DEADLINE)?)?;
    ensure!(first == ["e0"], "{first:?}");
    ensure!(shim.task.wait(&id, "unread")? == 4);
    Ok(())
}

#[test]
fn a_shutdown_of_what_runs_loses_neither_its_last_words_nor_its_exit() -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell("a_shutdown_of_what_runs_loses_neither_its_last_words_nor_its_exit") {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    for round in 0..3 {
        let id = containerd.id("last-words");
        // More than all buffers on the way hold, so that each is full when it ends.
        let script = "trap 'seq 1 150000; exit 9' TERM; echo ready; while :; do sleep 0.05; done";
        let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sh", "-c", script]))?;
        let (io, mut stdout, _stderr) = shim.streams("init")?;
        shim.create(&io)?;
        shim.task.start(&id, "")?;
        stdout.read_until("ready\n", DEADLINE)?;
        let reading = std::thread::spawn(move || -> Result<Vec<u8>> {
            let mut said = Vec::new();
            loop {
                let bytes = stdout.read(8 * 1024, DEADLINE)?;
                if bytes.is_empty() {
                    return Ok(said);
                }
                said.extend(bytes);
                // A reader who takes his time: some 800 KiB a second.
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        // The shim may be gone before its answer is out.
        let _ = shim.task.shutdown(&id, true);
        let said = reading.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        let wanted: String = (1..=150_000).map(|number| format!("{number}\n")).collect();
        ensure!(said == wanted.as_bytes(), "round {round}: {} of {} bytes came", said.len(), wanted.len());
        let events = shim.events.until("/tasks/exit", DEADLINE)?;
        let exit: TaskExit = events.last().context("an event")?.decode()?;
        ensure!(exit.id == id && exit.exit_status == 9, "round {round}: {exit:?}");
    }
    Ok(())
}
