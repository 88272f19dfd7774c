//! Output without end that several want to follow: on disk, rotated, and its last part in memory. A follower reads from there at its own pace;
//! one that falls behind what is kept has lost something, and is told. Nobody who writes waits for it.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::watch;

use crate::console::rotate::Rotating;

pub use super::chain::Chain;

/// Bytes that a new follower may be given of what was before it.
pub const REPLAY: usize = 64 * 1024;
/// Bytes that are kept in memory; what is beyond [`REPLAY`] is how far a follower may be behind.
const KEPT: usize = 4 * REPLAY;

/// What a follower wanted has been dropped to make room: it was too slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{missed} bytes were dropped before they were read")]
pub struct Overrun {
    /// Bytes that it cannot be given any more.
    pub missed: u64,
}

/// A record. Clones share it.
#[derive(Debug, Clone)]
pub struct Record {
    path: PathBuf,
    inner: Arc<Mutex<Inner>>,
    /// Bytes that have been written since the record was made.
    end: Arc<watch::Sender<u64>>,
}

#[derive(Debug, Default)]
struct Inner {
    /// None until something has been written.
    file: Option<Rotating>,
    /// Whether the last write to it failed, and that has been logged.
    failing: bool,
    kept: VecDeque<u8>,
}

impl Record {
    /// A record that will be in the file at `path`. Has no effect until something is written.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), inner: Arc::default(), end: Arc::new(watch::channel(0).0) }
    }

    /// Where it is on disk.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds bytes. What cannot be written to the disk is logged, once until it can be again, and kept in memory.
    pub fn append(&self, bytes: &[u8]) {
        let mut inner = self.lock();
        let written = write(&mut inner.file, &self.path, bytes);
        match &written {
            Err(error) if !inner.failing => {
                tracing::warn!(%error, path = %self.path.display(), "output cannot be kept on disk");
            }
            _ => {}
        }
        inner.failing = written.is_err();
        let excess = (inner.kept.len() + bytes.len()).saturating_sub(KEPT);
        let dropped = excess.min(inner.kept.len());
        inner.kept.drain(..dropped);
        inner.kept.extend(&bytes[excess - dropped..]);
        // With the lock held, so that the end is always that of what is kept.
        self.end.send_modify(|end| *end += bytes.len() as u64);
    }

    /// Where it ends now.
    pub fn end(&self) -> u64 {
        *self.end.borrow()
    }

    /// Where a new follower begins: [`REPLAY`] before the end, or as far before it as there is something.
    pub fn replay(&self) -> u64 {
        let inner = self.lock();
        self.end() - inner.kept.len().min(REPLAY) as u64
    }

    /// What is there from `from` on, at most `most` bytes.
    ///
    /// # Errors
    /// When some of it has been dropped already.
    pub fn read(&self, from: u64, most: usize) -> Result<Vec<u8>, Overrun> {
        let inner = self.lock();
        let start = self.end() - inner.kept.len() as u64;
        match from.checked_sub(start) {
            Some(skip) => Ok(inner.kept.iter().skip(skip as usize).take(most).copied().collect()),
            None => Err(Overrun { missed: start - from }),
        }
    }

    /// Waits until something comes after `from`.
    pub async fn grown(&self, from: u64) {
        // The sender is in self, so it cannot be gone.
        let _ = self.end.subscribe().wait_for(|end| *end > from).await;
    }

    /// Waits until what is at `from` has been dropped.
    pub async fn overrun(&self, from: u64) {
        let _ = self.end.subscribe().wait_for(|end| end.saturating_sub(KEPT as u64) > from).await;
    }

    /// What is on disk now, and where that ends in this record: whoever has read the one goes on with the other.
    ///
    /// # Errors
    /// When a file cannot be opened.
    pub fn on_disk(&self) -> io::Result<(Chain, u64)> {
        let _unchanged = self.lock();
        Ok((Chain::open(&self.path)?, self.end()))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
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
    fn a_follower_gets_everything_or_is_told_what_it_missed() {
        let (_dir, record) = record();
        assert_eq!((record.end(), record.replay(), record.read(0, 10)), (0, 0, Ok(vec![])));
        record.append(b"0123456789");
        let table: [(u64, usize, &[u8]); 4] = [(0, 4, b"0123"), (4, 100, b"456789"), (10, 5, b""), (11, 5, b"")];
        for (from, most, wanted) in table {
            assert_eq!(record.read(from, most).unwrap(), wanted, "{from}");
        }
        assert_eq!(record.replay(), 0);
        record.append(&vec![b'x'; KEPT]);
        assert_eq!(record.read(4, 1), Err(Overrun { missed: 6 }));
        assert_eq!(record.read(10, 1).unwrap(), b"x");
        assert_eq!(record.replay(), 10 + (KEPT - REPLAY) as u64);
        // More at once than is kept.
        record.append(&[vec![b'y'; KEPT], b"end".to_vec()].concat());
        assert_eq!(record.read(record.end() - 3, 100).unwrap(), b"end");
        assert_eq!(record.read(record.end() - KEPT as u64, KEPT).unwrap().len(), KEPT);
        assert_eq!(record.read(record.end() - KEPT as u64 - 1, 1), Err(Overrun { missed: 1 }));
    }

    #[test]
    fn what_cannot_be_kept_on_disk_is_still_followed() {
        let record = Record::new(Path::new("/nowhere/log"));
        record.append(b"x");
        assert_eq!(record.read(0, 10).unwrap(), b"x");
    }

    #[test]
    fn disk_and_memory_join_without_a_gap() {
        let (_dir, record) = record();
        record.append(b"before\n");
        let (chain, end) = record.on_disk().unwrap();
        record.append(b"after\n");
        let mut bytes = vec![0; 100];
        let read = chain.read_at(0, &mut bytes).unwrap();
        assert_eq!((&bytes[..read], record.read(end, 100).unwrap().as_slice()), (&b"before\n"[..], &b"after\n"[..]));
    }

    #[tokio::test]
    async fn followers_are_woken_by_growth_and_by_being_overrun() {
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
