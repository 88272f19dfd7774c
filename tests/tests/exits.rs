//! How processes end: their exit statuses, and the order and reason of their events.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::ttrpc::Code;
use husk_tests::artifacts::Runtime;
use husk_tests::bundle;
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::events::Published;
use husk_tests::fifo;
use husk_tests::shim::{Api, Shim, Streams, code};
use serde_json::json;

/// Deadline for an event on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// The exits among events, by process id, and the OOMs as `oom`.
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
fn exit_statuses_from_0_to_255_are_reported_unchanged() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("status");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sh", "-c", "exit 255"]))?;
    shim.create(&Streams::default())?;
    shim.task.exec(&id, "before", &bundle::process(&["sleep", "1000"]), &Streams::default())?;
    for status in [0, 1, 2, 42, 125, 126, 127, 128, 129, 137, 143, 200, 254, 255] {
        let exec = format!("e{status}");
        let reported = shim.exec_process(&exec, &bundle::process(&["sh", "-c", &format!("exit {status}")]))?.0;
        ensure!(reported == status, "exit {status} is reported as {reported}");
    }
    shim.task.start(&id, "")?;
    ensure!(shim.task.wait(&id, "")? == 255 && shim.task.state(&id, "")?.exit_status == 255);
    let late = code(&shim.task.start(&id, "before"));
    // runc's shim returns one or the other, depending on whether it has already noticed the exit.
    ensure!(matches!(late, Some(Code::FAILED_PRECONDITION | Code::UNKNOWN)), "{late:?}");
    if Runtime::under_test() == Runtime::Husk {
        ensure!(late == Some(Code::FAILED_PRECONDITION), "{late:?}");
    }
    ensure!(shim.task.delete(&id, "")? == 255);
    Ok(())
}

#[test]
fn the_inits_exit_is_published_after_those_of_its_execs_and_all_waits_are_answered() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("order");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
    shim.run_detached()?;
    let execs: Vec<String> = (0..10).map(|number| format!("e{number}")).collect();
    for exec in &execs {
        shim.start_exec(exec, &bundle::process(&["sleep", "1000"]), &Streams::default())?;
    }
    // Some clients wait for execs that nobody deletes before their container and its shim.
    let (deleted, waited) = execs.split_at(5);
    let waiting = waited.iter().map(|exec| {
        let (client, id, exec) = (shim.client(Api::V2)?, id.clone(), exec.clone());
        Ok(std::thread::spawn(move || client.wait(&id, &exec)))
    });
    let waiting: Vec<_> = waiting.collect::<Result<_>>()?;
    shim.task.kill(&id, "", 9)?;
    ensure!(shim.task.wait(&id, "")? == 137);
    for exec in deleted {
        ensure!(shim.task.wait(&id, exec)? == 137);
        shim.task.delete(&id, exec)?;
    }
    shim.task.delete(&id, "")?;
    shim.shutdown();
    for wait in waiting {
        let waited = wait.join().map_err(|_| anyhow::anyhow!("a wait panicked"))?;
        // One that came too late finds no container.
        ensure!(matches!(waited, Ok(137)) || code(&waited) == Some(Code::NOT_FOUND), "{waited:?}");
    }
    let mut ends = ends(&shim.events.until("/tasks/delete", DEADLINE)?)?;
    ensure!(ends.pop() == Some(id), "the init's exit was not the last: {ends:?}");
    ends.sort();
    ensure!(ends == execs, "{ends:?}");
    Ok(())
}

#[test]
fn the_exit_of_an_exec_that_is_deleted_at_once_is_published() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("at-once");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
    shim.run_detached()?;
    for number in 0..5 {
        let exec = format!("e{number}");
        shim.start_exec(&exec, &bundle::process(&["sleep", "1000"]), &Streams::default())?;
        shim.task.kill(&id, &exec, 9)?;
        // Without a wait for its exit: as soon as possible.
        wait_for(DEADLINE, "the exec can be deleted", || shim.task.delete(&id, &exec).ok())?;
        let ends = ends(&shim.events.until("/tasks/exit", DEADLINE)?)?;
        ensure!(ends == [exec], "{ends:?}");
    }
    Ok(())
}

#[test]
fn exceeding_the_memory_limit_means_an_oom_event_then_exit_status_137() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("oom");
    // tail keeps its input until a line ends.
    let greedy = ["tail", "/dev/zero"];
    let mut spec = bundle::spec(&id, &["sh", "-c", "until [ -e /run/go ]; do sleep 0.1; done; exec tail /dev/zero"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 24 << 20, "swap": 24 << 20});
    let shim = Shim::start(containerd, &id, &spec)?;
    shim.run_detached()?;
    let (status, ..) = shim.exec_process("greedy", &bundle::process(&greedy))?;
    ensure!(status == 137, "{status}");
    let events = shim.events.until("/tasks/exit", DEADLINE)?;
    ensure!(ends(&events)? == ["oom", "greedy"], "{:?}", ends(&events)?);
    ensure!(shim.task.state(&id, "")?.status.value() == 2, "the init does not run any more");

    shim.start_exec("go", &bundle::process(&["mkdir", "/run/go"]), &Streams::default())?;
    ensure!(shim.task.wait(&id, "")? == 137);
    shim.task.delete(&id, "")?;
    let ends = ends(&shim.events.until("/tasks/delete", DEADLINE)?)?;
    ensure!(ends.last() == Some(&id) && ends.iter().filter(|end| *end == "oom").count() == 1, "{ends:?}");
    ensure!(ends.iter().position(|end| end == "oom") < ends.iter().position(|end| *end == id), "{ends:?}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn an_unstarted_exec_ends_with_its_vm_and_can_be_deleted() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "never")?;
    let id = shim.bundle.id.clone();
    for exec in ["waited", "deleted"] {
        shim.task.exec(&id, exec, &bundle::process(&["true"]), &Streams::default())?;
    }
    // A client that waits already.
    let early = shim.client(Api::V2)?;
    let waiting = std::thread::spawn({
        let id = id.clone();
        move || early.wait(&id, "waited")
    });
    containerd.qemu_of(&id)?.kill();
    ensure!(waiting.join().map_err(|_| anyhow::anyhow!("the wait panicked"))?? == 137);
    ensure!(shim.task.wait(&id, "waited")? == 137);
    for exec in ["waited", "deleted"] {
        // An exit that is not recorded would be awaited in vain, and Delete would fail.
        ensure!(shim.task.delete(&id, exec)? == 137);
    }
    ensure!(shim.task.wait(&id, "")? == 137);
    shim.task.delete(&id, "")?;
    let ends = ends(&shim.events.until("/tasks/delete", DEADLINE)?)?;
    ensure!(ends == [id], "an exec that never ran has an exit event: {ends:?}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_vms_death_waits_for_stalled_readers_only_once() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "unread")?;
    let id = shim.bundle.id.clone();
    let execs: Vec<String> = (10..23).map(|number| format!("e{number}")).collect();
    let mut readers = Vec::new();
    for exec in &execs {
        let (io, stdout, mut stderr) = shim.streams(exec)?;
        fifo::fill(&shim.bundle.outside.join(format!("{exec}.out")))?;
        shim.task.exec(&id, exec, &bundle::process(&["sh", "-c", "echo there >&2; exec yes"]), &io)?;
        shim.task.start(&id, exec)?;
        stderr.read_until("there\n", DEADLINE)?;
        readers.push((stdout, stderr));
    }
    containerd.qemu_of(&id)?.kill();
    // One after the other would take 65 s, and a call has 60 s.
    ensure!(shim.task.wait(&id, "")? == 137);
    for exec in &execs {
        ensure!(shim.task.delete(&id, exec)? == 137);
    }
    shim.task.delete(&id, "")?;
    let mut ends = ends(&shim.events.until("/tasks/delete", DEADLINE)?)?;
    ensure!(ends.pop() == Some(id), "the init's exit was not the last: {ends:?}");
    ends.sort();
    ensure!(ends == execs, "{ends:?}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_stalled_reader_delays_no_other_exit() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "holds-up")?;
    let id = shim.bundle.id.clone();
    let execs = ["e0", "e1", "e2"];
    for exec in execs {
        shim.start_exec(exec, &bundle::process(&["sleep", "1000"]), &Streams::default())?;
    }
    let (io, _stdout, _stderr) = shim.streams("unread")?;
    fifo::fill(&shim.bundle.outside.join("unread.out"))?;
    shim.task.exec(&id, "unread", &bundle::process(&["sh", "-c", "echo; exit 4"]), &io)?;
    shim.task.start(&id, "unread")?;
    let exited = || shim.task.state(&id, "unread").ok().filter(|state| state.exit_status == 4);
    wait_for(DEADLINE, "the exec has exited in the guest", exited)?;
    // Within the time for which the shim waits for the reader: they run already.
    for exec in execs {
        shim.task.kill(&id, exec, 9)?;
    }
    // Otherwise these execs would wait for the exit before them, and thus for its reader.
    let first = ends(&shim.events.until("/tasks/exit", DEADLINE)?)?;
    ensure!(matches!(&first[..], [first] if execs.contains(&first.as_str())), "{first:?}");
    ensure!(shim.task.wait(&id, "unread")? == 4);
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_shutdown_loses_neither_the_last_output_nor_the_exit() -> Result<()> {
    let containerd = Containerd::shared()?;
    for round in 0..3 {
        let id = containerd.id("last-words");
        // More output than all buffers on the way hold, so each is full when the process exits.
        let script = "seq 1 150000 >/all; trap 'cat /all; exit 9' TERM; echo ready; while :; do sleep 0.05; done";
        let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sh", "-c", script]))?;
        let (io, mut stdout, _stderr) = shim.streams("init")?;
        shim.create_and_start(&io)?;
        stdout.read_until("ready\n", DEADLINE)?;
        let reading = std::thread::spawn(move || -> Result<Vec<u8>> {
            let mut output = Vec::new();
            loop {
                let bytes = stdout.read(8 * 1024, DEADLINE)?;
                if bytes.is_empty() {
                    return Ok(output);
                }
                output.extend(bytes);
                // A slow reader: at most 4 MiB/s. The guest kills a process three seconds after SIGTERM.
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        // The shim may exit before its response is sent.
        let _ = shim.task.shutdown(&id, true);
        let output = reading.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        let expected: String = (1..=150_000).map(|number| format!("{number}\n")).collect();
        ensure!(output == expected.as_bytes(), "round {round}: received {} of {} bytes", output.len(), expected.len());
        let events = shim.events.until("/tasks/exit", DEADLINE)?;
        let exit: TaskExit = events.last().context("an event")?.decode()?;
        ensure!(exit.id == id && exit.exit_status == 9, "round {round}: {exit:?}");
    }
    Ok(())
}
