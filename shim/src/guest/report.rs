//! What a guest tells by itself, on the connection of its hello: that it still turns, its log, its supervisor. The connection's end, words that
//! mean nothing, and silence are a death of the VM.
//!
//! The guest is not trusted: what it says is bounded and made harmless before it is kept or logged, and no flood of it fills the host's log.

use std::pin::pin;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use husk_protos::frame;
use husk_protos::report::report::What;
use husk_protos::report::supervisor_status::State;
use husk_protos::report::{LogLevel, LogLine, Report, SupervisorStatus};
use serde_json::{Value, json};
use tokio::io::AsyncRead;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::Level;

use crate::console::Record;
use crate::containerd::log as logging;
use crate::state::recent::{Kind, Recent};

/// So many heartbeats in a row that do not come are a death.
const MISSED: u32 = 3;
/// Longest text of the guest's that is kept, bytes.
const TEXT_MAX: usize = 2048;
/// Lines of a guest that may come at once, and how many a second from then on; in the host's log, not in the guest's own file.
const BURST: f64 = 256.0;
const PER_SECOND: f64 = 16.0;

/// How a guest is listened to.
#[derive(Debug)]
pub struct Listening {
    /// The least severe level that it may log at.
    pub level: Level,
    /// Where its log is kept in full.
    pub file: Record,
    /// Where its operator is told of what is wrong with it.
    pub recent: Recent,
}

/// How the guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Health {
    /// Time between two heartbeats.
    pub interval: Duration,
    /// Since the last one; since the guest's hello if there was none yet.
    pub since_heartbeat: Duration,
    /// Heartbeats that should have come since.
    pub missed: u32,
}

/// What has been heard of a guest so far.
#[derive(Debug)]
pub struct Heard {
    interval: Duration,
    last: Mutex<Instant>,
    supervisor: watch::Sender<Option<SupervisorStatus>>,
}

impl Heard {
    /// Of a guest that has just said hello.
    pub fn new(interval: Duration) -> Self {
        Self { interval, last: Mutex::new(Instant::now()), supervisor: watch::channel(None).0 }
    }

    /// How the guest is now.
    pub fn health(&self) -> Health {
        let since_heartbeat = self.last().elapsed();
        let missed = since_heartbeat.as_nanos() / self.interval.as_nanos().max(1);
        Health { interval: self.interval, since_heartbeat, missed: missed.try_into().unwrap_or(u32::MAX) }
    }

    /// What its supervisor does; changes are told. None if it has none, as far as is known.
    pub fn supervisor(&self) -> watch::Receiver<Option<SupervisorStatus>> {
        self.supervisor.subscribe()
    }

    fn last(&self) -> MutexGuard<'_, Instant> {
        self.last.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Listens to a guest until it cannot be heard any more. The reason, as a cause of death.
pub async fn listen(mut from: impl AsyncRead + Unpin, listening: Listening, heard: &Heard) -> String {
    let (now, level) = (Instant::now(), listening.level);
    let mut log = Log { limit: Limit::new(now), supervisors: Limit::new(now), level };
    let mut late = false;
    loop {
        // Pinned for all waits: what has been read of a report must not be lost with one of them.
        let mut next = pin!(frame::read::<Report>(&mut from));
        let last = *heard.last();
        let read = loop {
            tokio::select! {
                biased;
                read = &mut next => break read,
                () = sleep_until(last + heard.interval * MISSED) => {
                    // This process may be the one that stood still, and what the guest has said in the meantime is yet to arrive.
                    match timeout(heard.interval / 2, &mut next).await {
                        Ok(read) => break read,
                        Err(_) => return silence(heard),
                    }
                }
                () = sleep_until(last + heard.interval * 3 / 2), if !late => {
                    late = true;
                    listening.recent.note(Kind::Health, "a heartbeat is late", in_json(heard.health()));
                }
            }
        };
        match read.map(|report| report.what) {
            Ok(Some(What::Heartbeat(_))) => {
                if std::mem::take(&mut late) {
                    listening.recent.note(Kind::Health, "a heartbeat has come again", in_json(heard.health()));
                }
                *heard.last() = Instant::now();
            }
            Ok(Some(What::Log(line))) => log.take(line, &listening.file),
            Ok(Some(What::Supervisor(status))) => log.supervisor(status, heard, &listening.recent),
            // A guest of a later protocol; an older shim refuses its hello.
            Ok(_) => {}
            Err(frame::Error::Io(_)) => return "the guest's connection was lost".to_owned(),
            Err(error) => return format!("the guest's report was not understood: {error}"),
        }
    }
}

/// How the guest is, for its operator.
pub fn in_json(health: Health) -> Value {
    json!({
        "heartbeat_interval_ms": health.interval.as_millis() as u64,
        "since_heartbeat_ms": health.since_heartbeat.as_millis() as u64,
        "missed": health.missed,
    })
}

/// What the supervisor does, for the guest's operator.
pub fn supervisor_in_json(status: &SupervisorStatus) -> Value {
    let state = match status.state.enum_value_or_default() {
        State::RUNNING => "running",
        State::WAITING => "waiting",
        State::GAVE_UP => "given up",
        State::STOPPED => "stopped",
        State::STATE_UNSPECIFIED => "unknown",
    };
    let last_end = Some(&status.last_end).filter(|last_end| !last_end.is_empty());
    json!({
        "state": state,
        "pid": Some(status.pid).filter(|pid| *pid != 0),
        "restarts": status.restarts,
        "last_end": last_end,
        "wait_ms": Some(status.wait_ms).filter(|ms| *ms != 0),
    })
}

fn silence(heard: &Heard) -> String {
    let health = heard.health();
    format!(
        "the guest has not sent a heartbeat for {} ms, due every {} ms",
        health.since_heartbeat.as_millis(),
        health.interval.as_millis()
    )
}

/// A text of the guest's, cut and without anything that a terminal would take for a command.
fn harmless(text: &str) -> String {
    text[..text.floor_char_boundary(TEXT_MAX)].chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Of a field of the guest's: as ours are.
fn harmless_name(name: &str) -> String {
    let plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.');
    let name: String = name.chars().filter(plain).take(64).collect();
    if name.is_empty() { "field".to_owned() } else { name }
}

struct Log {
    limit: Limit,
    /// For what is told of the supervisor, which no flood of lines shall drown.
    supervisors: Limit,
    level: Level,
}

impl Log {
    fn take(&mut self, line: LogLine, file: &Record) {
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
        let (message, fields) = words(&line);
        let ms = line.boottime_ns / 1_000_000;
        let text = format!("{}.{:03} {}: {message}{fields}\n", ms / 1000, ms % 1000, level.as_str().to_lowercase());
        file.append(text.as_bytes());
        match self.limit.admit(Instant::now()) {
            Admitted::No => {}
            Admitted::Yes { held_back: 0 } => logging::guest(level, &message, &fields),
            Admitted::Yes { held_back } => {
                tracing::warn!(lines = held_back, path = %file.path().display(), "lines of the guest's log are only in its file");
                logging::guest(level, &message, &fields);
            }
        }
    }

    fn supervisor(&mut self, mut status: SupervisorStatus, heard: &Heard, recent: &Recent) {
        status.last_end = harmless(&status.last_end);
        let (pid, restarts, last_end) = (status.pid, status.restarts, &status.last_end);
        if let Admitted::Yes { .. } = self.supervisors.admit(Instant::now()) {
            recent.note(Kind::Supervisor, "the supervisor's state", supervisor_in_json(&status));
            match status.state.enum_value_or_default() {
                State::GAVE_UP => {
                    tracing::error!(restarts, last_end, "the supervisor has failed too often and is given up")
                }
                State::WAITING => {
                    tracing::warn!(
                        restarts,
                        wait_ms = status.wait_ms,
                        last_end,
                        "the supervisor will be started again"
                    );
                }
                state => tracing::info!(?state, pid, restarts, "the supervisor's state"),
            }
        }
        heard.supervisor.send_replace(Some(status));
    }
}

/// A line's message, and its fields as the log writes them.
fn words(line: &LogLine) -> (String, String) {
    let mut fields = String::new();
    for field in line.fields.iter().take(32) {
        logging::push_field(&mut fields, &harmless_name(&field.name), &harmless(&field.value));
    }
    if line.dropped > 0 {
        logging::push_field(&mut fields, "lost_before", &line.dropped.to_string());
    }
    (harmless(&line.message), fields)
}

enum Admitted {
    No,
    Yes { held_back: u64 },
}

/// Lets through [`BURST`] at once, and [`PER_SECOND`] in the long run.
struct Limit {
    room: f64,
    since: Instant,
    held_back: u64,
}

impl Limit {
    fn new(now: Instant) -> Self {
        Self { room: BURST, since: now, held_back: 0 }
    }

    fn admit(&mut self, now: Instant) -> Admitted {
        let gained = now.saturating_duration_since(self.since).as_secs_f64() * PER_SECOND;
        self.room = (self.room + gained).min(BURST);
        self.since = now;
        if self.room < 1.0 {
            self.held_back += 1;
            return Admitted::No;
        }
        self.room -= 1.0;
        Admitted::Yes { held_back: std::mem::take(&mut self.held_back) }
    }
}

#[cfg(test)]
mod tests {
    use husk_protos::report::{Heartbeat, LogField};
    use tokio::io::AsyncWriteExt;

    use super::*;

    const INTERVAL: Duration = Duration::from_secs(10);

    fn report(what: What) -> Report {
        Report { what: Some(what), ..Default::default() }
    }

    fn beat() -> Report {
        report(What::Heartbeat(Heartbeat::new()))
    }

    fn listening(dir: &tempfile::TempDir) -> Listening {
        let file = Record::new(&dir.path().join("guest.log"));
        Listening { level: Level::INFO, file, recent: Recent::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn two_heartbeats_may_be_missed_and_the_third_kills() {
        let dir = tempfile::tempdir().unwrap();
        let (mut guest, ours) = tokio::io::duplex(4096);
        let heard = Heard::new(INTERVAL);
        let began = Instant::now();
        let guest = async {
            for _ in 0..3 {
                tokio::time::sleep(3 * INTERVAL - Duration::from_millis(1)).await;
                frame::write(&mut guest, &beat()).await.unwrap();
            }
            guest
        };
        let listening = listening(&dir);
        let recent = listening.recent.clone();
        let (cause, _guest) = tokio::join!(listen(ours, listening, &heard), guest);
        // Each of them was told of when it was late, and when it came.
        let told: Vec<_> = recent.after(0, 100).into_iter().map(|event| event.what).collect();
        let (late, again) = ("a heartbeat is late", "a heartbeat has come again");
        assert_eq!(told, [late, again, late, again, late, again, late]);
        let silent = began.elapsed() - 3 * (3 * INTERVAL - Duration::from_millis(1));
        assert_eq!(
            cause,
            format!("the guest has not sent a heartbeat for {} ms, due every 10000 ms", silent.as_millis())
        );
        assert!(silent >= 3 * INTERVAL && silent < 4 * INTERVAL, "{silent:?}");
        assert!(heard.health().missed == MISSED);
    }

    #[tokio::test]
    async fn an_end_and_nonsense_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let cases: [(&[u8], &str); 4] = [
            (b"", "the guest's connection was lost"),
            (b"\0\0", "the guest's connection was lost"),
            (
                b"\xff\xff\xff\xff",
                "the guest's report was not understood: frame of 4294967295 bytes is larger than 65536",
            ),
            (b"\0\0\0\x01\xff", "the guest's report was not understood: decode frame"),
        ];
        for (bytes, wanted) in cases {
            let (mut guest, ours) = tokio::io::duplex(4096);
            guest.write_all(bytes).await.unwrap();
            drop(guest);
            let cause = listen(ours, listening(&dir), &Heard::new(INTERVAL)).await;
            assert!(cause.starts_with(wanted), "{bytes:?}: {cause}");
        }
    }

    #[tokio::test]
    async fn what_the_guest_says_is_kept_without_what_could_harm() {
        let dir = tempfile::tempdir().unwrap();
        let (mut guest, ours) = tokio::io::duplex(1 << 20);
        let heard = Heard::new(INTERVAL);
        let line = |level, message: &str| LogLine {
            level: LogLevel::into(level),
            message: message.into(),
            boottime_ns: 1_234_567_890,
            fields: vec![LogField { name: "a b=\n".into(), value: "\x1b[31m\n\"x".into(), ..Default::default() }],
            dropped: 2,
            ..Default::default()
        };
        for what in [
            What::Log(line(LogLevel::LOG_LEVEL_WARN, "one\nlevel=error msg=forged")),
            What::Log(line(LogLevel::LOG_LEVEL_DEBUG, "below the level")),
            What::Supervisor(SupervisorStatus {
                state: State::RUNNING.into(),
                pid: 9,
                last_end: format!("\x07{}", "y".repeat(3 * TEXT_MAX)),
                ..Default::default()
            }),
        ] {
            frame::write(&mut guest, &report(what)).await.unwrap();
        }
        drop(guest);
        let listening = listening(&dir);
        let recent = listening.recent.clone();
        listen(ours, listening, &heard).await;
        let told = &recent.after(0, 100)[0];
        assert_eq!(
            (told.kind, &told.fields["state"], &told.fields["pid"]),
            (Kind::Supervisor, &json!("running"), &json!(9))
        );
        let kept = std::fs::read_to_string(dir.path().join("guest.log")).unwrap();
        assert_eq!(kept, "1.234 warn: one level=error msg=forged ab=\" [31m \\\"x\" lost_before=2\n");
        let status = heard.supervisor().borrow().clone().unwrap();
        assert_eq!((status.pid, status.last_end.len(), status.last_end.starts_with(" y")), (9, TEXT_MAX, true));
    }

    #[tokio::test]
    async fn a_supervisor_that_gives_up_is_told_of_in_the_midst_of_a_flood() {
        let dir = tempfile::tempdir().unwrap();
        let (mut guest, ours) = tokio::io::duplex(1 << 20);
        let line = LogLine { level: LogLevel::LOG_LEVEL_WARN.into(), message: "flood".into(), ..Default::default() };
        for _ in 0..2 * BURST as usize {
            frame::write(&mut guest, &report(What::Log(line.clone()))).await.unwrap();
        }
        let status = SupervisorStatus { state: State::GAVE_UP.into(), restarts: 10, ..Default::default() };
        frame::write(&mut guest, &report(What::Supervisor(status))).await.unwrap();
        drop(guest);
        let listening = listening(&dir);
        let recent = listening.recent.clone();
        listen(ours, listening, &Heard::new(INTERVAL)).await;
        assert_eq!(recent.after(0, 100)[0].fields["state"], "given up");
    }

    #[test]
    fn a_flood_is_let_through_by_drops() {
        let now = Instant::now();
        let mut limit = Limit::new(now);
        let admitted = |limit: &mut Limit, now| matches!(limit.admit(now), Admitted::Yes { .. });
        let first = (0..1000).filter(|_| admitted(&mut limit, now)).count();
        assert_eq!(first, BURST as usize);
        assert!(matches!(limit.admit(now + Duration::from_secs(1)), Admitted::Yes { held_back: 744 }));
        let later = now + Duration::from_secs(3600);
        assert_eq!((0..1000).filter(|_| admitted(&mut limit, later)).count(), BURST as usize);
    }
}
