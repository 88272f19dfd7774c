//! The output of a process that works for a VM, such as QEMU or virtiofsd, in a rotated file.
//!
//! A guest can make these processes report errors without end. The output therefore comes through a pipe: the file is
//! small, gets a limited number of lines per second and the count of those left out, and a process whose output does
//! not end is reported as [`HelperLog::flooded`].

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_protos::lock::lock;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::console::lines::Lines;
use crate::console::rotate::Rotating;
use crate::host::rate::{Admitted, Bucket};
use crate::host::text::{clean, last_lines};

/// Size at which the file is rotated, bytes. One older file is kept.
const ROTATE: u64 = 512 * 1024;
/// A healthy process prints a few lines in its life.
const LIMITS: Limits = Limits { written: (256.0, 16.0), endless: (16_384.0, 256.0) };
/// Lines kept in memory, for error messages.
const TAIL: usize = 10;

/// Numbers of lines: at once, and per second in the long run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Those that the file gets.
    pub(crate) written: (f64, f64),
    /// Those beyond which a process is taken to be in an endless loop.
    pub(crate) endless: (f64, f64),
}

/// The log of one process. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct HelperLog(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    tail: Mutex<VecDeque<String>>,
    flooded: watch::Sender<Option<String>>,
    ended: watch::Sender<bool>,
}

impl HelperLog {
    /// Starts to record the output of the process `name` in the file at `path`. Returns the log, and what becomes the
    /// process's standard output and error. The process never waits for the disk. When the shim is gone, its writes
    /// fail.
    ///
    /// # Errors
    /// When the pipe or the file cannot be created.
    pub(crate) fn start(name: &str, path: &Path) -> io::Result<(Self, File)> {
        let (ours, theirs) = io::pipe()?;
        // Only this end becomes non-blocking: the other one belongs to a process that expects a blocking one.
        let ours = pipe::Receiver::from_owned_fd(OwnedFd::from(ours))?;
        let file = Rotating::open_with(path, ROTATE, 1)?;
        let log = Self::new();
        let intake = Intake::new(name, path, file, log.clone(), LIMITS, Instant::now());
        tokio::spawn(intake.run(ours));
        Ok((log, OwnedFd::from(theirs).into()))
    }

    pub(crate) fn new() -> Self {
        let (flooded, ended) = (watch::channel(None).0, watch::channel(false).0);
        Self(Arc::new(Shared { tail: Mutex::default(), flooded, ended }))
    }

    /// Why the process is taken to be in an endless loop, if it is.
    pub(crate) fn flood(&self) -> Option<String> {
        self.0.flooded.borrow().clone()
    }

    /// Waits until the process prints lines without end. Returns a cause of death.
    pub(crate) async fn flooded(&self) -> String {
        let flooded = self.0.flooded.subscribe().wait_for(Option::is_some).await.map_or(None, |cause| cause.clone());
        match flooded {
            Some(cause) => cause,
            // Cannot happen: self holds the sender.
            None => std::future::pending().await,
        }
    }

    /// The last lines that the process has printed, a few. Waits for its end, but not longer than `deadline`.
    pub(crate) async fn tail(&self, deadline: Duration) -> String {
        let mut ended = self.0.ended.subscribe();
        // After the deadline the tail is what has arrived so far.
        let _ = tokio::time::timeout(deadline, ended.wait_for(|ended| *ended)).await;
        let tail: Vec<String> = lock(&self.0.tail).iter().cloned().collect();
        last_lines(&tail.join("\n"), TAIL)
    }
}

/// Where the lines go that are kept.
pub(crate) trait Kept {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
}

impl Kept for Rotating {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        Self::append(self, bytes)
    }
}

/// Receives the output.
pub(crate) struct Intake<F> {
    name: String,
    path: PathBuf,
    file: F,
    log: HelperLog,
    lines: Lines,
    written: Bucket,
    endless: Bucket,
    began: Instant,
    count: u64,
    /// The last write to the file failed, which has been logged.
    failing: bool,
}

impl<F: Kept> Intake<F> {
    pub(crate) fn new(name: &str, path: &Path, file: F, log: HelperLog, limits: Limits, now: Instant) -> Self {
        Self {
            name: name.to_owned(),
            path: path.to_owned(),
            file,
            log,
            lines: Lines::default(),
            written: Bucket::new(limits.written.0, limits.written.1, now),
            endless: Bucket::new(limits.endless.0, limits.endless.1, now),
            began: now,
            count: 0,
            failing: false,
        }
    }

    async fn run(mut self, mut from: pipe::Receiver) {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            match from.read(&mut buffer).await {
                Ok(0) => break,
                Ok(length) => self.take(&buffer[..length], Instant::now()),
                Err(error) => {
                    tracing::warn!(%error, process = self.name, "failed to read the output of a process");
                    break;
                }
            }
        }
        self.end();
    }

    pub(crate) fn take(&mut self, bytes: &[u8], now: Instant) {
        for line in self.lines.take(bytes) {
            self.line(&line, now);
        }
    }

    /// Writes what is left, and returns the file.
    pub(crate) fn end(mut self) -> F {
        if let Some(line) = self.lines.end() {
            self.line(&line, Instant::now());
        }
        if self.written.held_back() > 0 {
            self.write(&dropped(self.written.held_back()));
        }
        self.log.0.ended.send_replace(true);
        self.file
    }

    fn line(&mut self, line: &str, now: Instant) {
        self.count += 1;
        // Most lines of a flood end here.
        let admitted = self.written.admit(now);
        if let Admitted::Yes { held_back } = admitted {
            let line = clean(line);
            let mut tail = lock(&self.log.0.tail);
            while tail.len() >= TAIL {
                tail.pop_front();
            }
            tail.push_back(line.clone());
            drop(tail);
            let before = if held_back > 0 { dropped(held_back) } else { String::new() };
            self.write(&format!("{before}{line}\n"));
        }
        if self.endless.admit(now) == Admitted::No && self.log.0.flooded.borrow().is_none() {
            let (name, count, ms) = (&self.name, self.count, (now - self.began).as_millis());
            let cause =
                format!("{name} prints errors without end: {count} lines in {ms} ms, the last one: {}", clean(line));
            self.log.0.flooded.send_replace(Some(clean(&cause)));
        }
    }

    /// The first of several failures in a row is logged.
    fn write(&mut self, text: &str) {
        let written = self.file.append(text.as_bytes());
        if let (Err(error), false) = (&written, self.failing) {
            tracing::warn!(%error, path = %self.path.display(), "failed to write the output of a process to its file");
        }
        self.failing = written.is_err();
    }
}

fn dropped(lines: u64) -> String {
    format!("husk: {lines} lines were dropped here\n")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn size(dir: &tempfile::TempDir) -> u64 {
        dir.path().read_dir().unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
    }

    #[tokio::test]
    async fn the_output_of_a_process_is_kept_and_its_last_lines_explain_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (log, mut output) = HelperLog::start("a", &path).unwrap();
        for number in 0..30 {
            writeln!(output, "line {number}\x1b[2J").unwrap();
        }
        write!(output, "the end").unwrap();
        drop(output);
        let tail = log.tail(LONG).await;
        assert!(tail.starts_with("line 21[2J\n") && tail.ends_with("line 29[2J\nthe end"), "{tail}");
        let file = std::fs::read_to_string(&path).unwrap();
        assert!(file.starts_with("line 0[2J\nline 1[2J\n") && file.lines().count() == 31, "{file}");
        assert!(log.0.flooded.borrow().is_none());
    }

    #[tokio::test]
    async fn a_process_that_prints_without_end_fills_no_disk_and_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (log, mut output) = HelperLog::start("virtiofsd", &path).unwrap();
        let flood = std::thread::spawn(move || {
            let line = format!("[ERROR virtiofsd] {}\n", "x".repeat(170)).repeat(64);
            // 60 MB.
            (0..5000).all(|_| output.write_all(line.as_bytes()).is_ok())
        });
        let cause = tokio::time::timeout(LONG, log.flooded()).await.unwrap();
        assert!(cause.starts_with("virtiofsd prints errors without end: 16"), "{cause}");
        assert!(cause.ends_with(&"x".repeat(170)), "{cause}");
        let tail = log.tail(LONG).await;
        assert!(flood.join().unwrap(), "the process was blocked");
        assert!(tail.lines().count() > 1 && tail.len() <= 1000, "{tail}");
        assert!(size(&dir) <= 2 * (ROTATE + 8 * 1024), "{} bytes", size(&dir));
        let file = std::fs::read_to_string(&path).unwrap();
        let dropped: u64 = file.lines().filter_map(|line| line.split(' ').nth(1)?.parse::<u64>().ok()).sum();
        let written = file.lines().filter(|line| line.starts_with("[ERROR")).count() as u64;
        assert_eq!(dropped + written, 320_000);
    }

    #[test]
    fn a_process_that_prints_slowly_for_long_is_healthy_and_its_file_stays_small() {
        let (dir, now) = (tempfile::tempdir().unwrap(), Instant::now());
        let path = dir.path().join("log");
        let file = Rotating::open_with(&path, ROTATE, 1).unwrap();
        let log = HelperLog::new();
        let mut intake = Intake::new("a", &path, file, log.clone(), LIMITS, now);
        for second in 0..200 {
            let long = format!("{}\n", "y".repeat(900)).repeat(200);
            intake.take(long.as_bytes(), now + Duration::from_secs(second));
        }
        intake.end();
        assert!(log.0.flooded.borrow().is_none());
        assert!((ROTATE..=2 * (ROTATE + 8 * 1024)).contains(&size(&dir)), "{} bytes", size(&dir));
    }

    #[tokio::test]
    async fn an_endless_line_is_an_endless_output() {
        let dir = tempfile::tempdir().unwrap();
        let (log, mut output) = HelperLog::start("a", &dir.path().join("log")).unwrap();
        // Pieces of 8 KiB count as lines.
        std::thread::spawn(move || while output.write_all(&[b'x'; 64 * 1024]).is_ok() {});
        assert!(tokio::time::timeout(LONG, log.flooded()).await.unwrap().contains("without end"));
        assert!(size(&dir) <= 2 * (ROTATE + 8 * 1024), "{} bytes", size(&dir));
    }
}
