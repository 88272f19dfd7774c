//! The guest's console: kept in `console.log`, its last lines at hand for the reason why a boot failed.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::rotate::Rotating;

/// Bytes of the console that are kept in memory.
const TAIL: usize = 4 * 1024;

/// A running copy of the console.
#[derive(Debug, Clone)]
pub struct Console {
    tail: Arc<Mutex<VecDeque<u8>>>,
    ended: watch::Receiver<bool>,
}

impl Console {
    /// Copies what comes from `socket` into the file at `path`, which must be in a directory of the sandbox's own.
    pub fn start(socket: UnixStream, path: &Path) -> io::Result<Self> {
        let mut log = Rotating::open(path)?;
        let tail = Arc::new(Mutex::new(VecDeque::with_capacity(TAIL)));
        let (end, ended) = watch::channel(false);
        let console = Self { tail: tail.clone(), ended };
        tokio::spawn(async move {
            copy(socket, &mut log, &tail).await;
            end.send_replace(true);
        });
        Ok(console)
    }

    /// Waits until the machine has closed its end, so that the tail is all there is; not longer than `deadline`.
    pub async fn ended(&self, deadline: std::time::Duration) {
        // Without an end in time the tail is what has come so far.
        let _ = tokio::time::timeout(deadline, self.ended.clone().wait_for(|ended| *ended)).await;
    }

    /// The last `lines` lines, control characters removed: they come from the guest and go to terminals.
    pub fn tail(&self, lines: usize) -> String {
        let bytes: Vec<u8> =
            self.tail.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).iter().copied().collect();
        last_lines(&bytes, lines)
    }
}

fn last_lines(bytes: &[u8], lines: usize) -> String {
    let text: String = String::from_utf8_lossy(bytes).chars().filter(|&c| c == '\n' || !c.is_control()).collect();
    let all: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

async fn copy(mut socket: UnixStream, log: &mut Rotating, tail: &Mutex<VecDeque<u8>>) {
    let mut buffer = [0; 4096];
    loop {
        let read = match socket.read(&mut buffer).await {
            Ok(0) => return,
            Ok(read) => read,
            Err(error) => {
                tracing::warn!(%error, "console lost");
                return;
            }
        };
        let bytes = &buffer[..read];
        {
            let mut tail = tail.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let excess = (tail.len() + read).saturating_sub(TAIL).min(tail.len());
            tail.drain(..excess);
            tail.extend(bytes);
        }
        if let Err(error) = log.append(bytes) {
            tracing::warn!(%error, path = %log.path().display(), "console output lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotate::ROTATE;

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
        let path = dir.path().join("console.log");
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let console = Console::start(ours, &path).unwrap();
        let line = [b"x".repeat(4095), b"\n".to_vec()].concat();
        for _ in 0..1030 {
            tokio::io::AsyncWriteExt::write_all(&mut guest, &line).await.unwrap();
        }
        drop(guest);
        console.ended(std::time::Duration::from_secs(10)).await;
        let sizes = ["console.log", "console.log.1"].map(|name| dir.path().join(name).metadata().unwrap().len());
        assert_eq!(sizes.iter().sum::<u64>(), 1030 * 4096);
        assert!(sizes[1] >= ROTATE && sizes[0] < ROTATE, "{sizes:?}");
    }
}
