//! What the guest sends without being asked on the connection of its hello, and what it writes to its console. Also what
//! it makes the VM's processes print and send.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::frame;
use husk_protos::lock::lock;
use husk_protos::system::Hello;
use tokio::time::Instant;
use tracing::{Dispatch, Level};

use super::checks::{harmless, harmless_json, names};
use super::wire::run;
use crate::console::Record;
use crate::console::helper_log::{HelperLog, Intake, Kept, Limits};
use crate::console::lines::Lines;
use crate::console::serial::{FATAL_MAX, fatal_error};
use crate::containerd::log;
use crate::guest::client::accept;
use crate::guest::report::{GuestHealth, ReportSinks, receive, supervisor_status};
use crate::host::text::{LONGEST, last_lines};
use crate::state::facts::{Boot, HostMilestone, Milestone, printable};
use crate::state::recent::Recent;

/// A file that cannot be written: the records stay in memory.
const NOWHERE: &str = "/nowhere/log";
/// The names with which each line of the host's log begins, and one of the guest's.
const HOST: [&str; 5] = ["level", "msg", "runtime", "namespace", "sandbox"];
const GUEST: [&str; 6] = ["level", "msg", "from", "runtime", "namespace", "sandbox"];
/// Milestones of a boot: the guest's, its kernel's and the host's.
const MILESTONES: usize = 32 + 3;

/// The most bytes that a target reads whose work grows with them: longer inputs show nothing else.
const CONSOLE: usize = 512;
const HELPER: usize = 512;
/// How often an input of the console comes again, one in 16: its lines are split after 8 KiB.
const AGAIN: usize = 17;
/// Instead of the shim's limits, which only long inputs reach.
const LIMITS: Limits = Limits { written: (16.0, 1.0), endless: (128.0, 16.0) };

thread_local! {
    /// containerd's log, in memory.
    static LOG: (Dispatch, Written) = {
        let written = Written::default();
        (Dispatch::new(log::subscriber(true, "ns", "sb", written.clone())), written)
    };
}

#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Kept for Vec<u8> {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.extend_from_slice(bytes);
        Ok(())
    }
}

/// The guest's first message.
pub fn hello(bytes: &[u8]) {
    let hello = match run(frame::read::<Hello>(&mut &*bytes)) {
        Ok(hello) => hello,
        Err(error) => return harmless(&Chain(&error).to_string(), LONGEST),
    };
    if let Err(error) = accept(&hello) {
        harmless(&Chain(&error).to_string(), 2 * LONGEST);
    }
    for version in [&hello.version, &hello.kernel] {
        harmless(&printable(version), LONGEST);
    }
    let mut boot = Boot::begin();
    boot.reached(HostMilestone::VmmStarted);
    boot.hello_received(&hello);
    assert!(boot.milestones.len() <= MILESTONES, "{} milestones", boot.milestones.len());
    assert!(boot.milestones.is_sorted_by_key(|milestone| milestone.at_us), "{:?}", boot.milestones);
    let json = serde_json::to_vec(&boot.milestones).expect("JSON");
    let again: Vec<Milestone> = serde_json::from_slice(&json).expect("milestones");
    assert_eq!(again, boot.milestones);
}

/// Frames with reports. What arrives in containerd's log, in the guest's log and in `husk status` is harmless, and the
/// guest's fields are not the host's.
pub fn reports(bytes: &[u8]) {
    LOG.with(|(dispatch, written)| {
        lock(&written.0).clear();
        let (file, recent) = (Record::new(Path::new(NOWHERE)), Recent::default());
        let sinks = ReportSinks { level: Level::TRACE, file: file.clone(), recent: recent.clone() };
        let health = GuestHealth::new(Duration::from_secs(3600));
        let unknown = || Err(io::ErrorKind::NotFound.into());
        let cause = tracing::dispatcher::with_default(dispatch, || run(receive(bytes, sinks, &health, unknown)));
        harmless(&cause, LONGEST);

        let log = String::from_utf8(std::mem::take(&mut *lock(&written.0))).expect("UTF-8");
        log.lines().for_each(log_line);
        let from = file.replay();
        let kept = file.read(from, usize::MAX).expect("what is replayed is there");
        let kept = String::from_utf8_lossy(&kept);
        // The first line may be cut.
        kept.split_terminator('\n').skip(usize::from(from > 0)).for_each(guests_line);

        for event in recent.after(0, usize::MAX) {
            harmless(&event.what, LONGEST);
            harmless_json(&event.fields);
        }
        if let Some(status) = &*health.supervisor().borrow() {
            harmless_json(&serde_json::to_value(supervisor_status(status)).expect("JSON"));
        }
    });
}

/// A line of containerd's log.
fn log_line(line: &str) {
    harmless(line, 64 * LONGEST * 10);
    let names = names(line);
    let from_guest = names.get(2) == Some(&"from");
    let own = if from_guest { &GUEST[..] } else { &HOST[..] };
    assert!(names.starts_with(own), "{line:?}");
    let added = &names[own.len()..];
    assert_eq!(added.iter().all(|name| name.starts_with("guest.")), from_guest || added.is_empty(), "{line:?}");
    assert!(added.iter().all(|name| !GUEST.contains(name)), "{line:?}");
}

/// A line of the guest's own log.
fn guests_line(line: &str) {
    harmless(line, 64 * LONGEST * 10);
    let (time, rest) = line.split_once(' ').expect("a time");
    let (seconds, ms) = time.split_once('.').expect("milliseconds");
    assert!(seconds.parse::<u64>().is_ok() && ms.len() == 3 && ms.parse::<u64>().is_ok(), "{line:?}");
    let (level, _) = rest.split_once(": ").expect("a level");
    assert!(["error", "warn", "info", "debug", "trace"].contains(&level), "{line:?}");
}

/// Output of the console: how many bytes arrive at a time, a byte that may repeat the output, and the output.
pub fn console(bytes: &[u8]) {
    let [size, again, bytes @ ..] = bytes else { return };
    let bytes = bytes[..bytes.len().min(CONSOLE)].repeat(if again % 16 == 15 { AGAIN } else { 1 });
    let (mut lines, mut all, mut length) = (Lines::default(), Vec::new(), 0);
    for part in bytes.chunks(usize::from(*size) * 16 + 1) {
        all.extend(lines.take(part));
    }
    all.extend(lines.end());
    for line in &all {
        assert!(!line.contains('\n'), "{line:?}");
        length += line.len();
    }
    // An invalid byte becomes a character of three bytes.
    assert!(length <= 3 * bytes.len(), "{length} bytes of {}", bytes.len());
    let text = String::from_utf8_lossy(&bytes);
    if let Some(fatal) = fatal_error(&text) {
        harmless(&fatal, FATAL_MAX);
    }
    let last = last_lines(&text, 10);
    assert!(last.chars().count() <= LONGEST && last.lines().count() <= 10, "{last:?}");
    last.lines().for_each(|line| harmless(line, LONGEST));
}

/// Output of QEMU or virtiofsd: parts, each after a byte with its length and one with the time since the last part.
pub fn helper(bytes: &[u8]) {
    let (log, began) = (HelperLog::new(), Instant::now());
    let mut intake = Intake::new("helper", Path::new(NOWHERE), Vec::new(), log.clone(), LIMITS, began);
    let (mut rest, mut now, mut taken, mut printable) = (&bytes[..bytes.len().min(HELPER)], began, 0, Vec::new());
    while let [length, passed, after @ ..] = rest {
        let (part, after) = after.split_at(after.len().min(usize::from(*length) * 16));
        now += Duration::from_millis(u64::from(*passed) * 4);
        intake.take(part, now);
        taken += part.iter().filter(|byte| **byte == b'\n').count();
        // What is left of a line has no other bytes between these.
        printable.extend(part.iter().filter(|byte| byte.is_ascii_graphic() || **byte == b' '));
        rest = after;
    }
    let file = String::from_utf8(intake.end()).expect("UTF-8");
    // The last line, which no newline ends, has the time of its end.
    let seconds = (now.max(Instant::now()) - began).as_secs_f64();
    let allowed = |(burst, rate): (f64, f64)| burst + rate * seconds;
    let (mut written, mut dropped) = (0, 0);
    for line in file.lines() {
        harmless(line, LONGEST);
        // The process may print the same. Then the numbers prove nothing.
        match line.strip_prefix("husk: ").and_then(|line| line.strip_suffix(" lines were dropped here")) {
            Some(count) => dropped += count.parse::<usize>().unwrap_or(0),
            None => written += 1,
        }
    }
    assert!(written as f64 <= allowed(LIMITS.written), "{written} lines in {seconds} s");
    if !String::from_utf8_lossy(&printable).contains("husk: ") {
        assert!(written + dropped >= taken, "{taken} lines, of which {written} are written and {dropped} counted");
    }
    if let Some(cause) = log.flood() {
        harmless(&cause, LONGEST);
        assert!(taken as f64 + 1.0 >= LIMITS.endless.0, "{taken} lines are a flood");
    }
    run(log.tail(Duration::ZERO)).lines().for_each(|line| harmless(line, LONGEST));
}

/// What QEMU sends on its control connection.
pub fn machine(bytes: &[u8]) {
    for error in run(crate::vmm::factory::read_control(bytes)) {
        harmless(&error, 3 * LONGEST);
    }
}
