//! A guest that lies (`init/src/hostile.rs`), and what the host guarantees all the same: every task ends and can be
//! removed within its deadlines, what containerd and its clients see is bounded and true, and nothing is left behind.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::built;
use husk_tests::command::Output;
use husk_tests::containerd::{Configured, Container, Containerd};
use husk_tests::events::{Event, Watch};
use husk_tests::leftovers::Leftovers;
use husk_tests::operator;

/// Longer than all deadlines of the configuration, on a loaded machine.
const SOON: Duration = Duration::from_secs(60);
/// Lines of one sandbox in containerd's log that a flood may cause: bursts of several kinds.
const LINES_MAX: usize = 1000;
/// Bytes of a sandbox's state, logs included.
const STATE_MAX: u64 = 16 << 20;
/// Open descriptors of a shim.
const DESCRIPTORS_MAX: usize = 1000;
/// The most characters of the guest's in one message.
const TEXT_MAX: usize = 1000;

/// A containerd whose guests lie to the containers `lie-*`.
fn start() -> Result<Configured> {
    let initrd = built("initrd-hostile.img")?;
    Configured::start(&format!("initrd = {initrd:?}\nkill_timeout_ms = 2000\ncall_timeout_ms = 5000\n"))
}

/// Runs a container to which the guest tells the lies `name`, and then kills it: it ends with status 137, once, and
/// nothing is left. Returns the container's events.
fn survive(name: &str, check: impl FnOnce(&Containerd, &Container<'_>) -> Result<()>) -> Result<Vec<Event>> {
    let configured = start()?;
    let containerd = &configured.containerd;
    // Unpacks the image.
    containerd.run(&[], &containerd.id("first"), &["true"]).ok()?;
    let before = Leftovers::now(containerd);
    let events = Watch::start(containerd)?;
    let container = containerd.detached(&[], &format!("lie-{name}"), &["sleep", "1000"])?;
    check(containerd, &container).with_context(|| containerd.log_tail())?;

    container.kill("SIGKILL")?;
    let is_exit = |event: &Event| event.topic == "/tasks/exit" && event.text("id") == container.id();
    let seen = events.collect(container.id(), SOON, is_exit).with_context(|| containerd.log_tail())?;
    let exit = seen.last().context("no exit")?;
    ensure!(exit.fields["exit_status"] == 137, "{exit:?}");
    container.await_status("STOPPED")?;
    ensure!(container.delete_task()? == 137, "the task was deleted with another status");
    containerd.ctr(["container", "rm", container.id()]).ok()?;
    drop(events);
    before.expect_none_since(containerd)?;

    let lines = containerd.logged(container.id());
    ensure!(lines.len() <= LINES_MAX, "{} lines in containerd's log: {:?}", lines.len(), lines.first());
    for line in &lines {
        ensure!(!line.chars().any(|c| c.is_control() || c == '\u{202e}'), "{line:?}");
        ensure!(!line.starts_with("level=error msg=forged"), "{line:?}");
    }
    Ok(seen)
}

fn count(events: &[Event], topic: &str) -> usize {
    events.iter().filter(|event| event.topic == topic).count()
}

/// An error that contains the guest's text, as the client prints it.
fn expect_harmless(failed: &Output) -> Result<()> {
    let errors = failed.errors();
    ensure!(failed.code() != 0 && errors.chars().count() <= 2 * TEXT_MAX, "{} characters", errors.chars().count());
    ensure!(errors.trim_end().lines().count() == 1, "{errors:?}");
    ensure!(!errors.trim_end().chars().any(|c| c.is_control() || c == '\u{202e}'), "{errors:?}");
    ensure!(errors.contains("guest:"), "the error does not name its author: {errors}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_guest_that_ignores_kill_and_delete_and_shutdown_is_ended_by_the_host() -> Result<()> {
    survive("deaf", |_, _| Ok(())).map(drop)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn an_exit_that_the_guest_hides_is_reported_by_the_host() -> Result<()> {
    survive("undying", |_, _| Ok(())).map(drop)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_flood_of_events_reaches_no_subscriber() -> Result<()> {
    let seen = survive("flood", |_, container| {
        // The flood goes on all the time that these take.
        for _ in 0..3 {
            ensure!(container.script("echo works")? == "works");
        }
        Ok(())
    })?;
    ensure!(count(&seen, "/tasks/paused") == 0, "{seen:#?}");
    ensure!(count(&seen, "/tasks/start") == 1 && count(&seen, "/tasks/create") == 1, "{seen:#?}");
    // Exhausted memory is reported at most once a second.
    ensure!(count(&seen, "/tasks/oom") <= SOON.as_secs() as usize, "{} OOM events", count(&seen, "/tasks/oom"));
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn endless_log_lines_fill_neither_the_disk_nor_containerds_log() -> Result<()> {
    survive("chatter", |containerd, container| {
        for _ in 0..3 {
            ensure!(container.script("echo works")? == "works");
        }
        let folder = operator::folder(containerd, container.id());
        let mut bytes = 0;
        for entry in folder.read_dir()? {
            bytes += entry?.metadata()?.len();
        }
        ensure!(bytes <= STATE_MAX, "{bytes} bytes");
        Ok(())
    })
    .map(drop)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_guest_that_dials_without_end_exhausts_nothing() -> Result<()> {
    survive("dial", |containerd, container| {
        for _ in 0..3 {
            ensure!(container.script("echo works")? == "works");
        }
        let (shim, _) = containerd.shim_of(container.id())?;
        let open = std::fs::read_dir(format!("/proc/{}/fd", shim.pid))?.count();
        ensure!(open <= DESCRIPTORS_MAX, "the shim has {open} open descriptors");
        Ok(())
    })
    .map(drop)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn an_error_of_the_guest_is_short_and_harmless_and_names_its_author() -> Result<()> {
    survive("huge", |_, container| expect_harmless(&container.exec(&["true"]).output()?)).map(drop)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn impossible_values_of_the_guest_reach_nobody() -> Result<()> {
    let seen = survive("absurd", |containerd, container| {
        let list = containerd.ctr(["task", "ls"]).ok()?.text();
        let line = list.lines().find(|line| line.starts_with(container.id())).context("not listed")?;
        let pid: i32 = line.split_whitespace().nth(1).context("no PID")?.parse()?;
        // The guest claims a status that containerd does not have.
        ensure!(pid > 0 && line.ends_with("UNKNOWN"), "{line}");
        let metrics = containerd.ctr(["task", "metrics", container.id()]).output()?;
        ensure!(metrics.code() != 0 && metrics.errors().len() < 2 * TEXT_MAX, "{metrics}");
        // The shim does not decode it.
        let processes = containerd.ctr(["task", "ps", container.id()]).output()?;
        ensure!(processes.code() != 0 && processes.errors().contains("bytes is larger than"), "{processes}");
        Ok(())
    })?;
    for event in &seen {
        let pid = event.fields["pid"].as_u64().unwrap_or(0);
        ensure!(pid < u64::from(u32::MAX), "{event:?}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_guest_that_does_not_answer_is_not_awaited_forever() -> Result<()> {
    survive("silent", |containerd, container| {
        let failed = containerd.ctr(["task", "ps", container.id()]).output()?;
        ensure!(failed.code() != 0 && failed.errors().contains("deadline"), "{failed}");
        // containerd keeps the reason to itself.
        let failed = containerd.ctr(["task", "metrics", container.id()]).output()?;
        ensure!(failed.code() != 0, "{failed}");
        let failed = container.exec(&["true"]).output()?;
        ensure!(failed.code() != 0 && failed.errors().contains("deadline"), "{failed}");
        Ok(())
    })
    .map(drop)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_guest_that_lies_about_the_length_of_output_delays_only_its_own_exit_and_not_for_long() -> Result<()> {
    for lie in ["late", "early"] {
        survive(lie, |_, container| {
            // As with a stalled reader, the exit waits for the missing bytes for a few seconds.
            let all = container.script("seq 1 1000")?;
            ensure!(lie == "early" || all.lines().count() == 1000, "{} lines", all.lines().count());
            Ok(())
        })
        .with_context(|| lie)?;
    }
    Ok(())
}
