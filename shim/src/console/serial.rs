//! The console of a sandbox, which is its machine's serial port: recorded in `console.log`, served on `console.sock`.
//! Its last lines explain a failed boot. In debug mode, the console of the guest's shell is part of it: containers may
//! open the serial port as /dev/console, but not the shell's console.

use std::io;
use std::path::Path;
use std::time::Duration;

use husk_protos::FATAL_PREFIX;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};

use crate::console::endpoint;
use crate::console::endpoint::Endpoint;
use crate::console::record::{REPLAY, Record};
use crate::host::text::{clean, last_lines};

/// The file with the console's output, in the sandbox's directory.
pub const LOG: &str = "console.log";
/// The socket of the console.
pub const SOCKET: &str = "console.sock";
/// The beginnings of the line in which a guest reports a fatal error.
const FATAL_PREFIXES: [&str; 2] = ["Kernel panic - not syncing: ", FATAL_PREFIX];
/// Longest part of that line in an error message, characters.
pub(crate) const FATAL_MAX: usize = 200;
/// Bytes of the console that may explain a failed boot.
const TAIL: usize = 4 * 1024;
/// Pieces of input queued for the guest. While the queue is full, clients that type wait.
const INPUT: usize = 16;

/// The machine's end of the console.
#[derive(Debug, Clone, Default)]
pub(super) enum MachineEnd {
    /// No machine has been started yet.
    #[default]
    Unused,
    /// The machine is connected and accepts input.
    Up(mpsc::Sender<Vec<u8>>),
    /// The machine has ended. A retried boot starts another one.
    Ended,
}

/// The console of a sandbox. It outlives its machines. Clones share it.
#[derive(Debug, Clone)]
pub struct Console {
    pub(super) record: Record,
    pub(super) machine: watch::Sender<MachineEnd>,
}

impl Console {
    /// The console of the sandbox in `folder`. Creates no file before there is output.
    pub fn new(folder: &Path) -> Self {
        Self { record: Record::new(&folder.join(LOG)), machine: watch::channel(MachineEnd::Unused).0 }
    }

    /// The recorded output.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Describes where the console is served.
    pub fn endpoint(&self) -> Endpoint {
        let machine = match &*self.machine.borrow() {
            MachineEnd::Unused => endpoint::Line::Unused,
            MachineEnd::Up(_) => endpoint::Line::Up,
            MachineEnd::Ended => endpoint::Line::Ended,
        };
        let log = self.record.path();
        Endpoint { path: log.with_file_name(SOCKET), log: log.to_owned(), machine, replay_bytes: REPLAY }
    }

    /// Connects a machine: records its output from `serial` and sends clients' input to it. A guest in debug mode has a
    /// shell with a console of its own: then the output of both is recorded, and the shell gets the input.
    pub fn attach(&self, serial: UnixStream, shell: Option<UnixStream>) -> Attached {
        let (read, write) = serial.into_split();
        // The serial port stays connected, without input, as long as there is output: the machine would take the end of
        // the input for the end of its reader.
        let (write, without_input) = match shell {
            Some(shell) => {
                let (output, input) = shell.into_split();
                let record = self.record.clone();
                tokio::spawn(async move { copy_output(output, &record).await });
                (input, Some(write))
            }
            None => (write, None),
        };
        let (typed, input) = mpsc::channel(INPUT);
        let (end, ended) = watch::channel(false);
        let attached = Attached { record: self.record.clone(), start: self.record.end(), ended };
        self.machine.send_replace(MachineEnd::Up(typed));
        let writer = tokio::spawn(write_input(write, input));
        let console = self.clone();
        tokio::spawn(async move {
            copy_output(read, &console.record).await;
            drop(without_input);
            writer.abort();
            console.machine.send_replace(MachineEnd::Ended);
            end.send_replace(true);
        });
        attached
    }
}

/// The console of one machine.
#[derive(Debug, Clone)]
pub struct Attached {
    record: Record,
    /// Where this machine's output starts in the record.
    start: u64,
    ended: watch::Receiver<bool>,
}

impl Attached {
    /// Waits until the machine has closed its end, so that the tail is complete; at most for `deadline`.
    pub async fn ended(&self, deadline: Duration) {
        // After the deadline the tail is what has arrived so far.
        let _ = tokio::time::timeout(deadline, self.ended.clone().wait_for(|ended| *ended)).await;
    }

    /// Adds the guest's fatal error, if the console shows one, to the cause of a machine's end. Waits for the end of
    /// the output until `deadline`.
    pub async fn explain(&self, cause: String, deadline: Duration) -> String {
        self.ended(deadline).await;
        match fatal_error(&self.recent()) {
            Some(line) => format!("{cause}; console: {line}"),
            None => cause,
        }
    }

    /// The last lines, at most this many: short enough for an error message, and harmless on a terminal.
    pub fn tail(&self, lines: usize) -> String {
        last_lines(&self.recent(), lines)
    }

    /// The end of the output, as the guest has written it.
    fn recent(&self) -> String {
        let from = self.start.max(self.record.end().saturating_sub(TAIL as u64));
        // The record keeps more than TAIL bytes, so this read does not fail.
        String::from_utf8_lossy(&self.record.read(from, TAIL).unwrap_or_default()).into_owned()
    }
}

/// The line with the kernel's panic or the init's fatal error. The guest controls this text, so it proves nothing.
pub(crate) fn fatal_error(tail: &str) -> Option<String> {
    let in_line = |line: &'_ str| FATAL_PREFIXES.iter().find_map(|prefix| line.find(prefix));
    let line = tail.lines().find_map(|line| in_line(line).map(|at| &line[at..]))?;
    Some(clean(line.trim_end().trim_end_matches(" ]---")).chars().take(FATAL_MAX).collect())
}

async fn copy_output(mut from: OwnedReadHalf, record: &Record) {
    let mut buffer = [0; 4096];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => return,
            Ok(length) => record.append(&buffer[..length]),
            Err(error) => {
                // The machine ended with unread input.
                if error.kind() != io::ErrorKind::ConnectionReset {
                    tracing::warn!(%error, "failed to read the console");
                }
                return;
            }
        }
    }
}

/// A guest that reads no input stalls the clients that type, and nothing else.
async fn write_input(mut to: OwnedWriteHalf, mut input: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = input.recv().await {
        if to.write_all(&bytes).await.is_err() {
            // The machine has ended; the reader notices.
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::rotate::ROTATE;

    #[test]
    fn the_guests_fatal_error_is_found_on_its_console() {
        let panic = "a\nKernel panic - not syncing: sysrq triggered crash\nCPU: 0\n\
                     ---[ end Kernel panic - not syncing: sysrq triggered crash ]---";
        let long = format!("husk: fatal: \x1b[2J\u{202e}{}", "é".repeat(400));
        let cut = format!("husk: fatal: [2J{}", "é".repeat(200 - 16));
        let table = [
            ("", None),
            ("all is well", None),
            (panic, Some("Kernel panic - not syncing: sysrq triggered crash")),
            ("---[ end Kernel panic - not syncing: x ]---", Some("Kernel panic - not syncing: x")),
            ("[    1.5] husk: fatal: mount proc on /proc: no", Some("husk: fatal: mount proc on /proc: no")),
            (&long, Some(&cut)),
        ];
        for (tail, expected) in table {
            assert_eq!(fatal_error(tail).as_deref(), expected, "{tail}");
        }
    }

    #[tokio::test]
    async fn the_log_file_has_all_output_and_is_rotated() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let console = Console::new(dir.path()).attach(ours, None);
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
    async fn what_an_operator_types_for_the_shell_does_not_reach_the_serial_port() {
        let dir = tempfile::tempdir().unwrap();
        let ((ours, mut serial), (our_shell, mut shell)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let console = Console::new(dir.path());
        let attached = console.attach(ours, Some(our_shell));
        let MachineEnd::Up(typed) = console.machine.borrow().clone() else { panic!("no machine") };
        typed.send(b"secret\n".to_vec()).await.unwrap();
        let mut read = [0; 7];
        shell.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"secret\n");
        let nothing = serial.try_read(&mut read).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock, "the serial port has input, or its end");
        shell.write_all(b"of the shell\n").await.unwrap();
        console.record().grown(12).await;
        serial.write_all(b"of the kernel\n").await.unwrap();
        drop((serial, shell));
        attached.ended(Duration::from_secs(10)).await;
        assert_eq!(attached.tail(10), "of the shell\nof the kernel");
    }

    #[tokio::test]
    async fn a_machines_tail_excludes_the_output_of_the_previous_machine() {
        let dir = tempfile::tempdir().unwrap();
        let console = Console::new(dir.path());
        for name in ["first", "second"] {
            let (ours, mut guest) = UnixStream::pair().unwrap();
            let attached = console.attach(ours, None);
            guest.write_all(format!("the {name} machine\n").as_bytes()).await.unwrap();
            drop(guest);
            attached.ended(Duration::from_secs(10)).await;
            assert_eq!(attached.tail(10), format!("the {name} machine"));
        }
        let both = std::fs::read_to_string(dir.path().join(LOG)).unwrap();
        assert_eq!(both, "the first machine\nthe second machine\n");
    }
}
