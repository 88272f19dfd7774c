//! The agent's output: a file that is put aside when it is full, with the one before kept.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use husk_protos::extras::{SUPERVISOR_LOG, SUPERVISOR_LOG_BEFORE};
use tokio::io::Interest;

use crate::console;
use crate::io::watch_fd;

/// Largest size of the file, bytes.
const SIZE_MAX: usize = 1024 * 1024;
/// Bytes that are taken out of the pipe at once.
const CHUNK: usize = 4096;

/// The file.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    before: PathBuf,
    file: File,
    size: usize,
    size_max: usize,
}

impl Log {
    /// Begins it.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn create() -> io::Result<Self> {
        Self::create_at(SUPERVISOR_LOG.into(), SUPERVISOR_LOG_BEFORE.into(), SIZE_MAX)
    }

    fn create_at(path: PathBuf, before: PathBuf, size_max: usize) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        Ok(Self { file: File::create(&path)?, path, before, size: 0, size_max })
    }

    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(fits(bytes, self.size_max - self.size, self.size == 0));
            self.file.write_all(now)?;
            self.size += now.len();
            bytes = later;
            if !bytes.is_empty() {
                self.rotate()?;
            }
        }
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        fs::rename(&self.path, &self.before)?;
        (self.file, self.size) = (File::create(&self.path)?, 0);
        Ok(())
    }
}

/// How many of the bytes go into a file with this much room: lines are not cut, but those that are longer than a whole file.
fn fits(bytes: &[u8], room: usize, empty: bool) -> usize {
    if bytes.len() <= room {
        return bytes.len();
    }
    match bytes[..room].iter().rposition(|byte| *byte == b'\n') {
        Some(end) => end + 1,
        None if empty => room,
        None => 0,
    }
}

/// Writes what comes through the pipe, in debug also to the console, until nobody has its other end any more. What cannot be written is lost: an
/// agent is never held up for its log.
pub async fn keep(pipe: OwnedFd, mut log: Log, debug: bool) -> io::Result<()> {
    let pipe = watch_fd(pipe, Interest::READABLE)?;
    let mut failing = false;
    loop {
        let mut ready = pipe.readable().await?;
        // Not kept across waits: an agent that is silent costs no memory.
        let mut chunk = [0; CHUNK];
        let read = match ready.try_io(|pipe| Ok(nix::unistd::read(pipe.get_ref(), &mut chunk)?)) {
            Ok(Ok(0)) => return Ok(()),
            Ok(Ok(read)) => read,
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => continue,
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => continue,
        };
        let written = log.write(&chunk[..read]);
        if let Err(error) = &written
            && !failing
        {
            tracing::warn!(%error, "the supervisor agent's output cannot be written to {SUPERVISOR_LOG}, and is lost");
        }
        failing = written.is_err();
        if debug {
            console::write_bytes(&chunk[..read]);
        }
        // One that never stops writing must not keep PID 1 from all else.
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_stay_whole_where_they_fit_into_a_file() {
        let table = [
            (&b"ab\ncd\n"[..], 6, false, 6),
            (b"ab\ncd\n", 5, false, 3),
            (b"ab\ncd\n", 3, false, 3),
            (b"ab\ncd\n", 2, false, 0),
            (b"ab\ncd\n", 0, false, 0),
            (b"abcdef", 4, true, 4),
            (b"abcdef", 4, false, 0),
            (b"", 4, true, 0),
        ];
        for (bytes, room, empty, wanted) in table {
            assert_eq!(fits(bytes, room, empty), wanted, "{bytes:?} {room} {empty}");
        }
    }

    #[test]
    fn a_full_file_is_put_aside_and_one_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let [path, before] = ["log/now", "log/before"].map(|name| folder.path().join(name));
        let mut log = Log::create_at(path.clone(), before.clone(), 10).unwrap();
        let files = || [&before, &path].map(|path| fs::read_to_string(path).unwrap_or_default());
        let steps = [
            ("one\ntwo\n", ["", "one\ntwo\n"]),
            ("3\n", ["", "one\ntwo\n3\n"]),
            ("four\n", ["one\ntwo\n3\n", "four\n"]),
            ("five\nsix\nseven\n", ["four\nfive\n", "six\nseven\n"]),
            ("a line of its own that is long\n", ["at is long", "\n"]),
        ];
        for (bytes, wanted) in steps {
            log.write(bytes.as_bytes()).unwrap();
            assert_eq!(files(), wanted, "{bytes:?}");
        }
        assert_eq!(fs::read_dir(folder.path().join("log")).unwrap().count(), 2);
    }

    #[tokio::test]
    async fn what_comes_through_the_pipe_is_kept_until_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let [path, before] = ["now", "before"].map(|name| folder.path().join(name));
        let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let kept = tokio::spawn(keep(ours, Log::create_at(path.clone(), before, 1000).unwrap(), false));
        let mut theirs = tokio::net::unix::pipe::Sender::from_owned_fd(theirs).unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut theirs, &[b'x'; 1500]).await.unwrap();
        drop(theirs);
        kept.await.unwrap().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 500);
    }
}
