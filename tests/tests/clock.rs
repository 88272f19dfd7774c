//! The guest's clock shows the host's time. The tests assert no durations: a clock is read between two readings of the
//! host's, and has to lie between them.

use std::fs::File;
use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use husk_tests::command::wait_for;
use husk_tests::containerd::{Configured, Containerd};
use husk_tests::shim::Shim;
use husk_tests::{bundle, fifo};
use serde_json::json;

/// The largest error of a clock that has been set.
const TOLERANCE: Duration = Duration::from_millis(5);
const DEADLINE: Duration = Duration::from_secs(60);

/// A container that prints its time whenever it reads a line, and sets its clock to what the line contains.
struct Clock<'a> {
    shim: Shim<'a>,
    input: File,
    output: fifo::Reader,
}

impl<'a> Clock<'a> {
    fn start(containerd: &'a Containerd, name: &str) -> Result<Self> {
        let id = containerd.id(name);
        // busybox's date prints no fractions.
        let script = "show() { adjtimex | awk '/tv_sec/ {s = $2} /tv_usec/ {print s, $2}'; }
            show; while read time; do [ -z \"$time\" ] || date -s \"@$time\" >/dev/null; show; done";
        let mut spec = bundle::spec(&id, &["sh", "-c", script]);
        for set in ["bounding", "effective", "permitted"] {
            bundle::append(&mut spec, &format!("/process/capabilities/{set}"), [json!("CAP_SYS_TIME")]);
        }
        let shim = Shim::start(containerd, &id, &spec)?;
        let (mut io, output, _) = shim.streams("clock")?;
        let input = fifo::writer(&shim.bundle.outside.join("clock.in"))?;
        io.stdin = shim.bundle.path.join("clock.in").display().to_string();
        shim.create_and_start(&io)?;
        Ok(Self { shim, input, output })
    }

    /// The next time that the container prints.
    fn printed(&mut self) -> Result<Duration> {
        let line = self.output.read_until("\n", DEADLINE)?;
        let (seconds, microseconds) = line.trim().split_once(' ').with_context(|| line.clone())?;
        Ok(Duration::from_secs(seconds.parse()?) + Duration::from_micros(microseconds.parse()?))
    }

    /// Has the container read its clock, and returns how far it is from the host's, if it is: zero if it lies between
    /// the readings of the host's clock before and after.
    fn difference(&mut self) -> Result<Duration> {
        let before = now()?;
        self.input.write_all(b"\n")?;
        let (read, after) = (self.printed()?, now()?);
        Ok(before.saturating_sub(read).max(read.saturating_sub(after)))
    }

    fn end(self) -> Result<()> {
        let id = &self.shim.bundle.id;
        self.shim.task.kill(id, "", 9)?;
        self.shim.task.wait(id, "")?;
        self.shim.task.delete(id, "")?;
        self.shim.shutdown();
        Ok(())
    }
}

fn now() -> Result<Duration> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?)
}

#[test]
fn a_container_starts_with_the_hosts_time() -> Result<()> {
    let containerd = Containerd::shared()?;
    let before = now()?;
    let mut clock = Clock::start(containerd, "clock")?;
    let first = clock.printed()?;
    ensure!(before < first + TOLERANCE && first < now()? + TOLERANCE, "{before:?} {first:?} {:?}", now()?);
    // The shortest of a few calls shows the difference best.
    for _ in 0..20 {
        let difference = clock.difference()?;
        ensure!(difference < TOLERANCE, "the clock differs by {difference:?}");
    }
    clock.end()
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_clock_that_was_wrong_is_corrected() -> Result<()> {
    let configured = Configured::start("heartbeat_interval_ms = 500\n")?;
    let mut clock = Clock::start(&configured.containerd, "wrong-clock")?;
    clock.printed()?;
    for wrong_by in [-3600, 3600] {
        let wrong = now()?.as_secs() as i64 + wrong_by;
        clock.input.write_all(format!("{wrong}\n").as_bytes())?;
        clock.printed()?;
        wait_for(DEADLINE, "the clock is corrected", || {
            clock.difference().map(|difference| (difference < TOLERANCE).then_some(())).transpose()
        })??;
    }
    ensure!(clock.shim.log().contains("corrected the guest's clock"), "no log line");
    clock.end()
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_vm_that_was_stopped_has_the_hosts_time_again() -> Result<()> {
    let configured = Configured::start("heartbeat_interval_ms = 1500\n")?;
    let mut clock = Clock::start(&configured.containerd, "stopped-clock")?;
    clock.printed()?;
    let qemu = configured.containerd.qemu_of(&clock.shim.bundle.id)?;
    qemu.stop();
    // The time for which a VM is stopped, less than three heartbeats.
    std::thread::sleep(Duration::from_secs(2));
    qemu.resume();
    wait_for(DEADLINE, "the clock is correct", || {
        clock.difference().map(|difference| (difference < TOLERANCE).then_some(())).transpose()
    })??;
    clock.end()
}
