//! What a guest says in words. Its console: kept in `console.log`, served on `console.sock` (see [`clients`]), its last lines at hand for the reason why a boot
//! failed.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};

use crate::console::record::{REPLAY, Record};

pub mod chain;
pub mod clients;
pub mod lines;
pub mod record;
pub mod rotate;

/// The file's name in the sandbox's folder.
pub const LOG: &str = "console.log";
/// The name of the init's log.
pub const INIT_LOG: &str = "guest.log";
/// The socket's.
pub const SOCKET: &str = "console.sock";
/// What a guest's last words begin with.
const LAST_WORDS: [&str; 2] = ["Kernel panic - not syncing: ", husk_protos::FATAL_PREFIX];
/// Most of them that is told, bytes.
const LAST_WORDS_MAX: usize = 200;
/// Bytes of the console that may explain a failed boot.
const TAIL: usize = 4 * 1024;
/// Pieces of input on their way to the guest; those who type past that wait.
const INPUT: usize = 16;

/// All that a guest says in words. Clones share it.
#[derive(Debug, Clone)]
pub struct GuestLogs {
    /// Its console.
    pub console: Console,
    /// The log of its init.
    pub init: Record,
}

impl GuestLogs {
    /// Those of the sandbox with this folder. Has no effect until there is something.
    pub fn new(folder: &Path) -> Self {
        Self { console: Console::new(folder), init: Record::new(&folder.join(INIT_LOG)) }
    }
}

/// Whether there is a machine at the other end.
#[derive(Debug, Clone, Default)]
enum Line {
    /// Not yet.
    #[default]
    Unused,
    /// Yes, and it takes input.
    Up(mpsc::Sender<Vec<u8>>),
    /// Not any more. There may be another one, if the boot is tried again.
    Ended,
}

/// The console of a sandbox, whatever machine is at the other end. Clones share it.
#[derive(Debug, Clone)]
pub struct Console {
    record: Record,
    line: watch::Sender<Line>,
}

impl Console {
    /// The console of the sandbox with this folder. Has no effect until there is a machine.
    pub fn new(folder: &Path) -> Self {
        Self { record: Record::new(&folder.join(LOG)), line: watch::channel(Line::Unused).0 }
    }

    /// All that has come from it.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Where it is to be had.
    pub fn endpoint(&self) -> Value {
        let machine = match &*self.line.borrow() {
            Line::Unused => "unused",
            Line::Up(_) => "up",
            Line::Ended => "ended",
        };
        let log = self.record.path();
        json!({"path": log.with_file_name(SOCKET), "log": log, "machine": machine, "replay_bytes": REPLAY})
    }

    /// Takes what comes from a machine's `socket`, and gives it what is typed.
    pub fn attach(&self, socket: UnixStream) -> Attached {
        let (read, write) = socket.into_split();
        let (typed, input) = mpsc::channel(INPUT);
        let (end, ended) = watch::channel(false);
        let attached = Attached { record: self.record.clone(), from: self.record.end(), ended };
        self.line.send_replace(Line::Up(typed));
        let writer = tokio::spawn(write_input(write, input));
        let console = self.clone();
        tokio::spawn(async move {
            copy(read, &console.record).await;
            writer.abort();
            console.line.send_replace(Line::Ended);
            end.send_replace(true);
        });
        attached
    }
}

/// The console of one machine.
#[derive(Debug, Clone)]
pub struct Attached {
    record: Record,
    /// Where its output begins.
    from: u64,
    ended: watch::Receiver<bool>,
}

impl Attached {
    /// Waits until the machine has closed its end, so that the tail is all there is; not longer than `deadline`.
    pub async fn ended(&self, deadline: Duration) {
        // Without an end in time the tail is what has come so far.
        let _ = tokio::time::timeout(deadline, self.ended.clone().wait_for(|ended| *ended)).await;
    }

    /// The cause of a machine's end, with what the guest has said of it, which is waited for until `deadline`.
    pub async fn explain(&self, cause: String, deadline: Duration) -> String {
        self.ended(deadline).await;
        match last_words(&self.tail(usize::MAX)) {
            Some(words) => format!("{cause}; its console says: {words}"),
            None => cause,
        }
    }

    /// The last `lines` lines, control characters removed: they come from the guest and go to terminals.
    pub fn tail(&self, lines: usize) -> String {
        let from = self.from.max(self.record.end().saturating_sub(TAIL as u64));
        // So few bytes are always kept.
        last_lines(&self.record.read(from, TAIL).unwrap_or_default(), lines)
    }
}

/// Why the guest has ended, in its own words: its kernel's when it panicked, or its init's. They are no more than words: it could say anything.
fn last_words(tail: &str) -> Option<&str> {
    let line =
        tail.lines().find_map(|line| LAST_WORDS.iter().find_map(|mark| line.find(mark).map(|at| &line[at..])))?;
    let words = line.trim_end_matches(" ]---");
    Some(&words[..words.floor_char_boundary(LAST_WORDS_MAX)])
}

fn last_lines(bytes: &[u8], lines: usize) -> String {
    let text: String = String::from_utf8_lossy(bytes).chars().filter(|&c| c == '\n' || !c.is_control()).collect();
    let all: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

async fn copy(mut from: OwnedReadHalf, record: &Record) {
    let mut buffer = [0; 4096];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => return,
            Ok(read) => record.append(&buffer[..read]),
            Err(error) => {
                // The machine's end while something typed was still unread.
                if error.kind() != io::ErrorKind::ConnectionReset {
                    tracing::warn!(%error, "console lost");
                }
                return;
            }
        }
    }
}

/// A guest that reads no input holds up those who type, and nobody else.
async fn write_input(mut to: OwnedWriteHalf, mut input: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = input.recv().await {
        if to.write_all(&bytes).await.is_err() {
            // The machine has gone, which is noticed by whoever reads from it.
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::rotate::ROTATE;

    #[test]
    fn a_guests_last_words_are_found_on_its_console() {
        let panic = "a\nKernel panic - not syncing: sysrq triggered crash\nCPU: 0\n---[ end Kernel panic - not syncing: sysrq triggered crash ]---";
        let long = format!("husk: fatal: {}", "é".repeat(200));
        let table = [
            ("", None),
            ("all is well", None),
            (panic, Some("Kernel panic - not syncing: sysrq triggered crash")),
            ("---[ end Kernel panic - not syncing: x ]---", Some("Kernel panic - not syncing: x")),
            ("[    1.5] husk: fatal: mount proc on /proc: no", Some("husk: fatal: mount proc on /proc: no")),
            (&long, Some(&long[..199])),
        ];
        for (tail, expected) in table {
            assert_eq!(last_words(tail), expected, "{tail}");
        }
    }

    #[test]
    fn what_an_operator_sees_is_the_last_lines_without_control_characters() {
        let table: &[(&[u8], usize, &str)] = &[
            (b"one\r\ntwo\r\nthree\r\n", 2, "two\nthree"),
            (b"\x1b[31mred\x1b[0m\x07\n", 5, "[31mred[0m"),
            (b"", 5, ""),
            (b"\xff\xfeno utf-8\n\n\n", 1, "\u{fffd}\u{fffd}no utf-8"),
        ];
        for (bytes, lines, expected) in table {
            assert_eq!(last_lines(bytes, *lines), *expected);
        }
    }

    #[tokio::test]
    async fn everything_is_in_the_file_and_the_file_is_rotated() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let console = Console::new(dir.path()).attach(ours);
        let line = [b"x".repeat(4095), b"\n".to_vec()].concat();
        for _ in 0..1030 {
            guest.write_all(&line).await.unwrap();
        }
        drop(guest);
        console.ended(Duration::from_secs(10)).await;
        let sizes = ["console.log", "console.log.1"].map(|name| dir.path().join(name).metadata().unwrap().len());
        assert_eq!(sizes.iter().sum::<u64>(), 1030 * 4096);
        assert!(sizes[1] >= ROTATE && sizes[0] < ROTATE, "{sizes:?}");
    }

    #[tokio::test]
    async fn the_tail_of_a_machine_has_nothing_of_the_one_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let console = Console::new(dir.path());
        for words in ["first", "second"] {
            let (ours, mut guest) = UnixStream::pair().unwrap();
            let attached = console.attach(ours);
            guest.write_all(format!("the {words} machine\n").as_bytes()).await.unwrap();
            drop(guest);
            attached.ended(Duration::from_secs(10)).await;
            assert_eq!(attached.tail(10), format!("the {words} machine"));
        }
        let both = std::fs::read_to_string(dir.path().join(LOG)).unwrap();
        assert_eq!(both, "the first machine\nthe second machine\n");
    }
}
