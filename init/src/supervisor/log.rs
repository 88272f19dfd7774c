//! The agent's log file. A full file is rotated; one rotated file is kept.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use husk_protos::chain::Chain;
use husk_protos::extras::{SUPERVISOR_LOG, SUPERVISOR_LOG_BEFORE};
use tokio::io::Interest;

use crate::console;
use crate::fd::watch_fd;

/// Largest size of the file, bytes.
const SIZE_MAX: usize = 1024 * 1024;
/// Bytes per read from the pipe.
const CHUNK: usize = 4096;

#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    rotated: PathBuf,
    file: File,
    size: usize,
    size_max: usize,
}

impl LogFile {
    /// # Errors
    /// When the file cannot be created.
    pub(super) fn create() -> io::Result<Self> {
        Self::create_at(SUPERVISOR_LOG.into(), SUPERVISOR_LOG_BEFORE.into(), SIZE_MAX)
    }

    fn create_at(path: PathBuf, rotated: PathBuf, size_max: usize) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        Ok(Self { file: File::create(&path)?, path, rotated, size: 0, size_max })
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
        fs::rename(&self.path, &self.rotated)?;
        (self.file, self.size) = (File::create(&self.path)?, 0);
        Ok(())
    }
}

/// How many of the bytes fit into a file with this much room. Only a line that is longer than a whole file is split.
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

/// Copies the agent's output from the pipe to the log, and in debug mode to the console, until every write end is
/// closed. Output that cannot be written is discarded: the log never blocks the agent.
pub(super) async fn copy(pipe: OwnedFd, mut log: LogFile, debug: bool) -> io::Result<()> {
    let pipe = watch_fd(pipe, Interest::READABLE)?;
    let mut failing = false;
    loop {
        let mut ready = pipe.readable().await?;
        // Not kept across waits: a silent agent costs no memory.
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
            tracing::warn!(
                error = %Chain(error),
                "failed to write the supervisor agent's output to {SUPERVISOR_LOG}; the output is lost"
            );
        }
        failing = written.is_err();
        if debug {
            console::write_bytes(&chunk[..read]);
        }
        // An agent that writes without pause must not starve the rest of PID 1.
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_fit_into_a_file_are_not_split() {
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
        for (bytes, room, empty, expected) in table {
            assert_eq!(fits(bytes, room, empty), expected, "{bytes:?} {room} {empty}");
        }
    }

    #[test]
    fn a_full_file_is_rotated_and_one_rotated_file_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let [path, rotated] = ["log/current", "log/rotated"].map(|name| folder.path().join(name));
        let mut log = LogFile::create_at(path.clone(), rotated.clone(), 10).unwrap();
        let files = || [&rotated, &path].map(|path| fs::read_to_string(path).unwrap_or_default());
        let steps = [
            ("one\ntwo\n", ["", "one\ntwo\n"]),
            ("3\n", ["", "one\ntwo\n3\n"]),
            ("four\n", ["one\ntwo\n3\n", "four\n"]),
            ("five\nsix\nseven\n", ["four\nfive\n", "six\nseven\n"]),
            ("a line of its own that is long\n", ["at is long", "\n"]),
        ];
        for (bytes, expected) in steps {
            log.write(bytes.as_bytes()).unwrap();
            assert_eq!(files(), expected, "{bytes:?}");
        }
        assert_eq!(fs::read_dir(folder.path().join("log")).unwrap().count(), 2);
    }

    #[tokio::test]
    async fn output_is_logged_until_the_pipe_ends() {
        let folder = tempfile::tempdir().unwrap();
        let [path, rotated] = ["current", "rotated"].map(|name| folder.path().join(name));
        let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let copied = tokio::spawn(copy(ours, LogFile::create_at(path.clone(), rotated, 1000).unwrap(), false));
        let mut theirs = tokio::net::unix::pipe::Sender::from_owned_fd(theirs).unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut theirs, &[b'x'; 1500]).await.unwrap();
        drop(theirs);
        copied.await.unwrap().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 500);
    }
}
