//! Recorded output: in rotated files, with its last part in memory. Several readers follow it from memory, each at its
//! own pace. Writers never wait for them: a reader that falls too far behind loses output and learns how much.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use husk_protos::lock::lock;
use tokio::sync::watch;

use crate::console::chain::LogChain;
use crate::console::rotate::Rotating;

/// Most bytes of earlier output that a new reader receives.
pub(super) const REPLAY: usize = 64 * 1024;
/// Bytes kept in memory: how far a reader may fall behind.
const KEPT: usize = 4 * REPLAY;

/// A reader was too slow: output that it has not read was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{missed} bytes were dropped before they were read")]
pub struct Overrun {
    /// The number of bytes that it missed.
    pub missed: u64,
}

/// Recorded output. Clones share it.
#[derive(Debug, Clone)]
pub struct Record {
    path: PathBuf,
    inner: Arc<Mutex<Inner>>,
    /// Bytes appended since the record was created.
    end: Arc<watch::Sender<u64>>,
}

#[derive(Debug, Default)]
struct Inner {
    /// None before the first output.
    file: Option<Rotating>,
    /// The last write to the file failed, which has been logged.
    failing: bool,
    kept: VecDeque<u8>,
}

impl Record {
    /// A record with its file at `path`. Creates no file before there is output.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), inner: Arc::default(), end: Arc::new(watch::channel(0).0) }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends bytes. Bytes that cannot be written to the file are still kept in memory. The first of several failures
    /// in a row is logged.
    pub fn append(&self, bytes: &[u8]) {
        let mut inner = lock(&self.inner);
        let written = write(&mut inner.file, &self.path, bytes);
        match &written {
            Err(error) if !inner.failing => {
                tracing::warn!(%error, path = %self.path.display(), "failed to write output to its file");
            }
            _ => {}
        }
        inner.failing = written.is_err();
        let excess = (inner.kept.len() + bytes.len()).saturating_sub(KEPT);
        let dropped = excess.min(inner.kept.len());
        inner.kept.drain(..dropped);
        inner.kept.extend(&bytes[excess - dropped..]);
        // Under the lock: the end always matches the bytes in memory.
        self.end.send_modify(|end| *end += bytes.len() as u64);
    }

    /// The present end, as an offset.
    pub fn end(&self) -> u64 {
        *self.end.borrow()
    }

    /// The offset at which a new reader starts: [`REPLAY`] bytes before the end, or less if there is less.
    pub fn replay(&self) -> u64 {
        let inner = lock(&self.inner);
        self.end() - inner.kept.len().min(REPLAY) as u64
    }

    /// Reads at most `limit` bytes from the offset `from`.
    ///
    /// # Errors
    /// When bytes at `from` have been dropped.
    pub fn read(&self, from: u64, limit: usize) -> Result<Vec<u8>, Overrun> {
        let inner = lock(&self.inner);
        let start = self.end() - inner.kept.len() as u64;
        match from.checked_sub(start) {
            Some(skip) => Ok(inner.kept.iter().skip(skip as usize).take(limit).copied().collect()),
            None => Err(Overrun { missed: start - from }),
        }
    }

    /// Waits for output after the offset `from`.
    pub async fn grown(&self, from: u64) {
        // self owns the sender, so this cannot fail.
        let _ = self.end.subscribe().wait_for(|end| *end > from).await;
    }

    /// Waits until the byte at the offset `from` has been dropped.
    pub async fn overrun(&self, from: u64) {
        let _ = self.end.subscribe().wait_for(|end| end.saturating_sub(KEPT as u64) > from).await;
    }

    /// Opens the files, and returns the record's end that matches their end: a reader of the files continues there.
    ///
    /// # Errors
    /// When a file cannot be opened.
    pub fn on_disk(&self) -> io::Result<(LogChain, u64)> {
        let _unchanged = lock(&self.inner);
        Ok((LogChain::open(&self.path)?, self.end()))
    }
}

fn write(file: &mut Option<Rotating>, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let file = match file {
        Some(file) => file,
        None => file.insert(Rotating::open(path)?),
    };
    file.append(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> (tempfile::TempDir, Record) {
        let dir = tempfile::tempdir().unwrap();
        let record = Record::new(&dir.path().join("log"));
        (dir, record)
    }

    #[test]
    fn a_reader_gets_everything_or_learns_how_much_it_missed() {
        let (_dir, record) = record();
        assert_eq!((record.end(), record.replay(), record.read(0, 10)), (0, 0, Ok(vec![])));
        record.append(b"0123456789");
        let table: [(u64, usize, &[u8]); 4] = [(0, 4, b"0123"), (4, 100, b"456789"), (10, 5, b""), (11, 5, b"")];
        for (from, limit, expected) in table {
            assert_eq!(record.read(from, limit).unwrap(), expected, "{from}");
        }
        assert_eq!(record.replay(), 0);
        record.append(&vec![b'x'; KEPT]);
        assert_eq!(record.read(4, 1), Err(Overrun { missed: 6 }));
        assert_eq!(record.read(10, 1).unwrap(), b"x");
        assert_eq!(record.replay(), 10 + (KEPT - REPLAY) as u64);
        // One append that is larger than the memory.
        record.append(&[vec![b'y'; KEPT], b"end".to_vec()].concat());
        assert_eq!(record.read(record.end() - 3, 100).unwrap(), b"end");
        assert_eq!(record.read(record.end() - KEPT as u64, KEPT).unwrap().len(), KEPT);
        assert_eq!(record.read(record.end() - KEPT as u64 - 1, 1), Err(Overrun { missed: 1 }));
    }

    #[test]
    fn readers_get_output_that_cannot_be_written_to_its_file() {
        let record = Record::new(Path::new("/nowhere/log"));
        record.append(b"x");
        assert_eq!(record.read(0, 10).unwrap(), b"x");
    }

    #[test]
    fn files_and_memory_join_without_a_gap() {
        let (_dir, record) = record();
        record.append(b"before\n");
        let (chain, end) = record.on_disk().unwrap();
        record.append(b"after\n");
        let mut bytes = vec![0; 100];
        let read = chain.read_at(0, &mut bytes).unwrap();
        assert_eq!((&bytes[..read], record.read(end, 100).unwrap().as_slice()), (&b"before\n"[..], &b"after\n"[..]));
    }

    #[tokio::test]
    async fn readers_wake_for_new_output_and_for_dropped_output() {
        let (_dir, record) = record();
        record.append(b"0123456789");
        let wait = |what: u8| {
            let record = record.clone();
            tokio::spawn(async move {
                match what {
                    0 => record.grown(10).await,
                    _ => record.overrun(9).await,
                }
            })
        };
        let (grown, overrun) = (wait(0), wait(1));
        tokio::task::yield_now().await;
        assert!(!grown.is_finished() && !overrun.is_finished());
        record.append(&vec![b'x'; KEPT - 1]);
        let deadline = std::time::Duration::from_secs(10);
        tokio::time::timeout(deadline, grown).await.expect("woken").unwrap();
        assert!(!overrun.is_finished());
        record.append(b"x");
        tokio::time::timeout(deadline, overrun).await.expect("woken").unwrap();
    }
}
