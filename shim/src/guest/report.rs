//! Receives the guest's heartbeats, log lines and supervisor status on the connection of its hello. The end of the
//! connection, an invalid report and missing heartbeats (`silence.rs`) each mean the death of the VM.
//!
//! The guest is untrusted: its texts are cleaned before they are kept or logged, the names of its fields cannot be those
//! of the host, and a rate limit keeps them from flooding the host's log.

use std::io;
use std::pin::pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::frame;
use husk_protos::lock::lock;
use husk_protos::report::report::What;
use husk_protos::report::supervisor_status::State;
use husk_protos::report::{LogLevel, LogLine, Report, SupervisorStatus};
use serde_json::json;
use tokio::io::AsyncRead;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::Level;

use super::clock;
use super::silence::{Silence, sample, window};
use crate::console::Record;
use crate::containerd::log as logging;
use crate::host::rate::{Admitted, Bucket};
use crate::host::run_delay::{CpuWaits, RunDelays};
use crate::host::text::clean;
use crate::state::recent::{EventKind, Recent};
use crate::state::status;
use crate::state::status::Heartbeats;

/// Log lines of a guest that go to the host's log in a burst. The guest's own file gets all lines.
const BURST: f64 = 256.0;
/// Log lines of a guest that go to the host's log in the long run, per second.
const PER_SECOND: f64 = 16.0;

/// Where reports go.
#[derive(Debug)]
pub(crate) struct ReportSinks {
    /// Least severe level that is kept.
    pub(crate) level: Level,
    /// The guest's log file.
    pub(crate) file: Record,
    /// The sandbox's recent events.
    pub(crate) recent: Recent,
}

/// The guest's heartbeats at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HealthSnapshot {
    /// Time between two heartbeats.
    pub(crate) interval: Duration,
    /// Time since the last heartbeat, or since the guest's hello before the first one.
    pub(crate) since_heartbeat: Duration,
    /// Heartbeats that were due in that time.
    pub(crate) missed: u32,
    /// They are missing because the host gives the machine too little CPU time.
    pub(crate) starved: bool,
}

/// The last heartbeat and the last supervisor status of a guest.
#[derive(Debug)]
pub(crate) struct GuestHealth {
    interval: Duration,
    last: Mutex<Instant>,
    starved: AtomicBool,
    clock: Notify,
    supervisor: watch::Sender<Option<SupervisorStatus>>,
}

impl GuestHealth {
    /// The health of a guest that has just sent its hello.
    pub(crate) fn new(interval: Duration) -> Self {
        let (last, starved) = (Mutex::new(Instant::now()), AtomicBool::new(false));
        Self { interval, last, starved, clock: Notify::new(), supervisor: watch::channel(None).0 }
    }

    /// The heartbeats so far.
    pub(crate) fn snapshot(&self) -> HealthSnapshot {
        let since_heartbeat = lock(&self.last).elapsed();
        let missed = since_heartbeat.as_nanos() / self.interval.as_nanos().max(1);
        let (missed, starved) = (missed.try_into().unwrap_or(u32::MAX), self.starved.load(Ordering::Relaxed));
        HealthSnapshot { interval: self.interval, since_heartbeat, missed, starved }
    }

    /// Notified when a heartbeat shows that the guest's clock differs from the host's.
    pub(crate) fn clock(&self) -> &Notify {
        &self.clock
    }

    /// The status of the guest's supervisor, and its changes; none before the first report.
    pub(crate) fn supervisor(&self) -> watch::Receiver<Option<SupervisorStatus>> {
        self.supervisor.subscribe()
    }
}

/// Receives reports until the guest is lost. Returns the reason, as a cause of death. `machine` shows how long the
/// machine's threads wait for a CPU.
pub(crate) async fn receive(
    mut from: impl AsyncRead + Unpin,
    sinks: ReportSinks,
    health: &GuestHealth,
    machine: impl Fn() -> io::Result<RunDelays>,
) -> String {
    let (now, level) = (Instant::now(), sinks.level);
    let bucket = || Bucket::new(BURST, PER_SECOND, now);
    let mut log = Log { limit: bucket(), supervisors: bucket(), level };
    let mut watched = Watched { health, recent: &sinks.recent, machine, late: None };
    loop {
        // Pinned across the waits: a cancelled read would lose the part of a report that has been read.
        let mut next = pin!(frame::read::<Report>(&mut from));
        let read = loop {
            tokio::select! {
                biased;
                read = &mut next => break read,
                () = sleep_until(watched.until()) => {
                    if watched.goes_on() {
                        continue;
                    }
                    // The shim itself may have been stopped, and the guest's reports are still on their way.
                    match timeout(health.interval / 2, &mut next).await {
                        Ok(read) => break read,
                        Err(_) if watched.extend() => {}
                        Err(_) => return silence(health.snapshot()),
                    }
                }
            }
        };
        match read.map(|report| report.what) {
            Ok(Some(What::Heartbeat(heartbeat))) => {
                watched.end();
                *lock(&health.last) = Instant::now();
                if clock::differs(heartbeat.realtime_ns) {
                    health.clock.notify_one();
                }
            }
            Ok(Some(What::Log(line))) => log.line(line, &sinks.file),
            Ok(Some(What::Supervisor(status))) => log.supervisor(status, health, &sinks.recent),
            // Only a guest with a newer protocol sends other reports, and its hello has been rejected.
            Ok(_) => {}
            Err(frame::FrameError::Io(_)) => return "the guest's connection was lost".to_owned(),
            Err(error) => return format!("the guest sent an invalid report: {}", Chain(&error)),
        }
    }
}

/// Notices late heartbeats.
struct Watched<'a, Machine> {
    health: &'a GuestHealth,
    recent: &'a Recent,
    machine: Machine,
    late: Option<Late>,
}

/// A heartbeat is late.
struct Late {
    silence: Silence,
    waits: CpuWaits,
    /// For how long the machine's threads have waited for a CPU in the current window.
    waited: Duration,
}

impl<Machine: Fn() -> io::Result<RunDelays>> Watched<'_, Machine> {
    /// Until when the next heartbeat is waited for.
    fn until(&self) -> Instant {
        let interval = self.health.interval;
        match &self.late {
            Some(late) => late.silence.until.min(late.waits.last_sample() + sample(interval)),
            None => *lock(&self.health.last) + window(interval),
        }
    }

    /// Notes that a heartbeat is late, or measures the machine's waits. Whether the current window goes on.
    fn goes_on(&mut self) -> bool {
        let Some(late) = &mut self.late else {
            self.note("a heartbeat is late");
            let silence = Silence::begin(self.health.interval, *lock(&self.health.last));
            self.late = Some(Late { silence, waits: CpuWaits::begin((self.machine)()), waited: Duration::ZERO });
            return true;
        };
        late.waited += late.waits.sample((self.machine)()).0;
        Instant::now() < late.silence.until
    }

    /// Whether the guest gets more time, because it had too little CPU time.
    fn extend(&mut self) -> bool {
        let Some(late) = &mut self.late else { return true };
        let waited = std::mem::take(&mut late.waited) + late.waits.sample((self.machine)()).0;
        let starved = late.silence.extend(waited);
        if starved && !self.health.starved.swap(true, Ordering::Relaxed) {
            self.note("the VM is starved: the host gives it too little CPU time");
            tracing::warn!(
                waited_ms = waited.as_millis() as u64,
                "the VM is starved: the host gives it too little CPU time for its heartbeats"
            );
        }
        starved
    }

    fn end(&mut self) {
        self.health.starved.store(false, Ordering::Relaxed);
        if self.late.take().is_some() {
            self.note("the heartbeats have resumed");
        }
    }

    fn note(&self, what: &str) {
        self.recent.note(EventKind::Health, what, json!(heartbeats(self.health.snapshot())));
    }
}

/// The guest's heartbeats for `husk status`.
pub(crate) fn heartbeats(health: HealthSnapshot) -> Heartbeats {
    Heartbeats {
        heartbeat_interval_ms: health.interval.as_millis() as u64,
        since_heartbeat_ms: health.since_heartbeat.as_millis() as u64,
        missed: health.missed,
        starved: health.starved,
    }
}

/// The supervisor's status for `husk status`.
pub(crate) fn supervisor_status(status: &SupervisorStatus) -> status::SupervisorStatus {
    let state = match status.state.enum_value_or_default() {
        State::RUNNING => "running",
        State::WAITING => "waiting",
        State::GAVE_UP => "given up",
        State::STOPPED => "stopped",
        State::STATE_UNSPECIFIED => "unknown",
    };
    status::SupervisorStatus {
        state: state.to_owned(),
        pid: Some(status.pid).filter(|pid| *pid != 0),
        restarts: status.restarts,
        last_end: Some(status.last_end.clone()).filter(|last_end| !last_end.is_empty()),
        wait_ms: Some(status.wait_ms).filter(|ms| *ms != 0),
    }
}

fn silence(health: HealthSnapshot) -> String {
    format!(
        "the guest has not sent a heartbeat for {} ms, due every {} ms{}",
        health.since_heartbeat.as_millis(),
        health.interval.as_millis(),
        if health.starved { "; the host gave it too little CPU time" } else { "" }
    )
}

/// The name of a field of the guest, restricted to the characters of the shim's own fields. With its prefix, no name is
/// one that the host uses.
fn field_name(name: &str) -> String {
    let plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.');
    let name: String = name.chars().filter(plain).take(64).collect();
    format!("guest.{}", if name.is_empty() { "field" } else { &name })
}

struct Log {
    limit: Bucket,
    /// Separate from the lines' limit: a flood of lines must not suppress the supervisor's status.
    supervisors: Bucket,
    level: Level,
}

impl Log {
    fn line(&mut self, line: LogLine, file: &Record) {
        let level = match line.level.enum_value_or_default() {
            LogLevel::LOG_LEVEL_ERROR => Level::ERROR,
            LogLevel::LOG_LEVEL_WARN => Level::WARN,
            LogLevel::LOG_LEVEL_INFO => Level::INFO,
            LogLevel::LOG_LEVEL_DEBUG => Level::DEBUG,
            LogLevel::LOG_LEVEL_TRACE | LogLevel::LOG_LEVEL_UNSPECIFIED => Level::TRACE,
        };
        if level > self.level {
            return;
        }
        let (message, fields) = message_and_fields(&line);
        let ms = line.boottime_ns / 1_000_000;
        let text = format!("{}.{:03} {}: {message}{fields}\n", ms / 1000, ms % 1000, level.as_str().to_lowercase());
        file.append(text.as_bytes());
        match self.limit.admit(Instant::now()) {
            Admitted::No => {}
            Admitted::Yes { held_back: 0 } => logging::guest(level, &message, &fields),
            Admitted::Yes { held_back } => {
                let path = file.path().display();
                tracing::warn!(lines = held_back, %path, "guest log lines were dropped here; the guest's log file has them");
                logging::guest(level, &message, &fields);
            }
        }
    }

    fn supervisor(&mut self, mut status: SupervisorStatus, health: &GuestHealth, recent: &Recent) {
        status.last_end = clean(&status.last_end);
        let (pid, restarts, last_end) = (status.pid, status.restarts, &status.last_end);
        if let Admitted::Yes { .. } = self.supervisors.admit(Instant::now()) {
            recent.note(EventKind::Supervisor, "the supervisor's state", json!(supervisor_status(&status)));
            match status.state.enum_value_or_default() {
                State::GAVE_UP => {
                    tracing::error!(
                        restarts,
                        last_end,
                        "the supervisor agent failed too often and will not be restarted"
                    )
                }
                State::WAITING => {
                    tracing::warn!(
                        restarts,
                        wait_ms = status.wait_ms,
                        last_end,
                        "the supervisor agent will be restarted"
                    );
                }
                state => tracing::info!(?state, pid, restarts, "the supervisor agent changed its state"),
            }
        }
        health.supervisor.send_replace(Some(status));
    }
}

/// A line's message, and its fields in the log's format.
fn message_and_fields(line: &LogLine) -> (String, String) {
    let mut fields = String::new();
    for field in line.fields.iter().take(32) {
        logging::push_field(&mut fields, &field_name(&field.name), &clean(&field.value));
    }
    if line.dropped > 0 {
        logging::push_field(&mut fields, "guest.lost_before", &line.dropped.to_string());
    }
    (clean(&line.message), fields)
}

#[cfg(test)]
mod tests {
    use husk_protos::report::{Heartbeat, LogField};
    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::guest::silence::{MISSED, STARVED};
    use crate::host::text::LONGEST;

    const INTERVAL: Duration = Duration::from_secs(10);

    fn unknown() -> io::Result<RunDelays> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn report(what: What) -> Report {
        Report { what: Some(what), ..Default::default() }
    }

    fn beat() -> Report {
        report(What::Heartbeat(Heartbeat::new()))
    }

    fn sinks(dir: &tempfile::TempDir) -> ReportSinks {
        let file = Record::new(&dir.path().join("guest.log"));
        ReportSinks { level: Level::INFO, file, recent: Recent::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn heartbeats_may_be_late_twice_but_not_three_times() {
        let dir = tempfile::tempdir().unwrap();
        let (mut guest, ours) = tokio::io::duplex(4096);
        let health = GuestHealth::new(INTERVAL);
        let began = Instant::now();
        let guest = async {
            for _ in 0..3 {
                tokio::time::sleep(3 * INTERVAL - Duration::from_millis(1)).await;
                frame::write(&mut guest, &beat()).await.unwrap();
            }
            guest
        };
        let sinks = sinks(&dir);
        let recent = sinks.recent.clone();
        let (cause, _guest) = tokio::join!(receive(ours, sinks, &health, unknown), guest);
        // Each late heartbeat is reported, and each arrival after it.
        let events: Vec<_> = recent.after(0, 100).into_iter().map(|event| event.what).collect();
        let (late, resumed) = ("a heartbeat is late", "the heartbeats have resumed");
        assert_eq!(events, [late, resumed, late, resumed, late, resumed, late]);
        let silent = began.elapsed() - 3 * (3 * INTERVAL - Duration::from_millis(1));
        assert_eq!(
            cause,
            format!("the guest has not sent a heartbeat for {} ms, due every 10000 ms", silent.as_millis())
        );
        assert!(silent >= 3 * INTERVAL && silent < 4 * INTERVAL, "{silent:?}");
        assert_eq!((health.snapshot().missed, health.snapshot().starved), (MISSED, false));
    }

    #[tokio::test(start_paused = true)]
    async fn a_starved_guest_is_not_killed_until_it_has_cpu_time_again_or_too_much_time_has_passed() {
        for (starved, missed) in [(40, 4), (1000, STARVED)] {
            let dir = tempfile::tempdir().unwrap();
            let (mut guest, ours) = tokio::io::duplex(4096);
            let (health, began, sinks) = (GuestHealth::new(INTERVAL), Instant::now(), sinks(&dir));
            let recent = sinks.recent.clone();
            let delays = || Ok(RunDelays::of_waiting(began.elapsed().min(Duration::from_secs(starved))));
            let guest = async {
                tokio::time::sleep(4 * INTERVAL).await;
                assert!(health.snapshot().starved);
                frame::write(&mut guest, &beat()).await.unwrap();
                guest
            };
            if missed == STARVED {
                let cause = receive(ours, sinks, &health, delays).await;
                assert!(cause.ends_with(" ms, due every 10000 ms; the host gave it too little CPU time"), "{cause}");
                assert_eq!(health.snapshot().missed, STARVED);
                continue;
            }
            let (cause, _guest) = tokio::join!(receive(ours, sinks, &health, delays), guest);
            assert!(cause.ends_with(" ms, due every 10000 ms"), "{cause}");
            assert_eq!(health.snapshot().missed, MISSED);
            let events: Vec<_> = recent.after(0, 100).into_iter().map(|event| event.what).collect();
            let starved = "the VM is starved: the host gives it too little CPU time";
            let (late, resumed) = ("a heartbeat is late", "the heartbeats have resumed");
            assert_eq!(events, [late, starved, resumed, late]);
        }
    }

    #[tokio::test]
    async fn a_lost_connection_and_an_invalid_report_are_different_causes() {
        let dir = tempfile::tempdir().unwrap();
        let cases: [(&[u8], &str); 4] = [
            (b"", "the guest's connection was lost"),
            (b"\0\0", "the guest's connection was lost"),
            (b"\xff\xff\xff\xff", "the guest sent an invalid report: frame of 4294967295 bytes is larger than 65536"),
            (b"\0\0\0\x01\xff", "the guest sent an invalid report: decode frame"),
        ];
        for (bytes, expected) in cases {
            let (mut guest, ours) = tokio::io::duplex(4096);
            guest.write_all(bytes).await.unwrap();
            drop(guest);
            let cause = receive(ours, sinks(&dir), &GuestHealth::new(INTERVAL), unknown).await;
            assert!(cause.starts_with(expected), "{bytes:?}: {cause}");
        }
    }

    #[tokio::test]
    async fn guest_texts_are_kept_without_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        let (mut guest, ours) = tokio::io::duplex(1 << 20);
        let health = GuestHealth::new(INTERVAL);
        let line = |level, message: &str| LogLine {
            level: LogLevel::into(level),
            message: message.into(),
            boottime_ns: 1_234_567_890,
            fields: [("a b=\n", "\x1b[31m\n\"x"), ("namespace", "moby"), ("", "")]
                .map(|(name, value)| LogField { name: name.into(), value: value.into(), ..Default::default() })
                .into(),
            dropped: 2,
            ..Default::default()
        };
        for what in [
            What::Log(line(LogLevel::LOG_LEVEL_WARN, "one\nlevel=error msg=forged")),
            What::Log(line(LogLevel::LOG_LEVEL_DEBUG, "below the level")),
            What::Supervisor(SupervisorStatus {
                state: State::RUNNING.into(),
                pid: 9,
                last_end: format!("\x07{}", "y".repeat(3 * LONGEST)),
                ..Default::default()
            }),
        ] {
            frame::write(&mut guest, &report(what)).await.unwrap();
        }
        drop(guest);
        let sinks = sinks(&dir);
        let recent = sinks.recent.clone();
        receive(ours, sinks, &health, unknown).await;
        let event = &recent.after(0, 100)[0];
        assert_eq!(
            (event.kind, &event.fields["state"], &event.fields["pid"]),
            (EventKind::Supervisor, &json!("running"), &json!(9))
        );
        let kept = std::fs::read_to_string(dir.path().join("guest.log")).unwrap();
        assert_eq!(
            kept,
            "1.234 warn: one level=error msg=forged guest.ab=\"[31m \\\"x\" guest.namespace=moby guest.field=\"\" guest.lost_before=2\n"
        );
        let status = health.supervisor().borrow().clone().unwrap();
        assert_eq!(
            (status.pid, status.last_end.chars().count(), status.last_end.starts_with("yy")),
            (9, LONGEST, true)
        );
    }

    #[tokio::test]
    async fn a_flood_of_log_lines_does_not_hide_that_the_supervisor_gave_up() {
        let dir = tempfile::tempdir().unwrap();
        let (mut guest, ours) = tokio::io::duplex(1 << 20);
        let line = LogLine { level: LogLevel::LOG_LEVEL_WARN.into(), message: "flood".into(), ..Default::default() };
        for _ in 0..2 * BURST as usize {
            frame::write(&mut guest, &report(What::Log(line.clone()))).await.unwrap();
        }
        let status = SupervisorStatus { state: State::GAVE_UP.into(), restarts: 10, ..Default::default() };
        frame::write(&mut guest, &report(What::Supervisor(status))).await.unwrap();
        drop(guest);
        let sinks = sinks(&dir);
        let recent = sinks.recent.clone();
        receive(ours, sinks, &GuestHealth::new(INTERVAL), unknown).await;
        assert_eq!(recent.after(0, 100)[0].fields["state"], "given up");
    }
}
