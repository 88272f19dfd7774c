//! Runs a program until it exits or a deadline expires.

use std::fmt;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::process::{self, Process};

/// Limit for captured output: a test that produces more has gone wrong.
const MAX_OUTPUT: u64 = 512 * 1024 * 1024;

/// Exit status and output of a program.
pub struct Output {
    /// Wait status.
    pub status: ExitStatus,
    /// Complete stdout.
    pub stdout: Vec<u8>,
    /// Complete stderr.
    pub stderr: Vec<u8>,
    /// Time from start until exit and the end of both streams.
    pub took: Duration,
    /// The command line, for error messages.
    line: String,
}

impl Output {
    /// Exit code, or 128 + n for signal n.
    pub fn code(&self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or_default())
    }

    /// Stdout as text, without trailing whitespace.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// Stderr as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Returns the output if the exit code is `code`, otherwise an error with both streams.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        if self.code() != code {
            bail!("expected exit code {code}: {self}");
        }
        Ok(self)
    }

    /// Returns the output if the exit code is 0, otherwise an error with both streams.
    pub fn ok(self) -> Result<Self> {
        self.expect_code(0)
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shorten = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(4096)]).into_owned();
        write!(f, "`{}` exited with {} after {:.1?}", self.line, self.code(), self.took)?;
        write!(f, "\n--- stdout ---\n{}\n--- stderr ---\n{}", shorten(&self.stdout), shorten(&self.stderr))
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Runs `command` with `stdin` until it exits. After `deadline`, kills it with all its descendants and returns an error
/// with their output, and with the stacks of those in Go.
pub fn run(mut command: Command, stdin: Option<Vec<u8>>, deadline: Duration) -> Result<Output> {
    let line = describe(&command);
    command.stdin(if stdin.is_some() { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().with_context(|| format!("start `{line}`"))?;
    collect(child, stdin, line, deadline)
}

/// Waits for a child with piped streams; see [`run`].
fn collect(mut child: Child, stdin: Option<Vec<u8>>, line: String, deadline: Duration) -> Result<Output> {
    let started = Instant::now();
    let pid = child.id() as i32;
    if let (Some(bytes), Some(mut pipe)) = (stdin, child.stdin.take()) {
        // A program may exit before it has read everything.
        thread::spawn(move || drop(pipe.write_all(&bytes)));
    }
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let (ended, end) = mpsc::channel();
    thread::spawn(move || drop(ended.send(child.wait())));
    let left = || deadline.saturating_sub(started.elapsed());
    let status = match end.recv_timeout(left()) {
        Ok(status) => status.with_context(|| format!("wait for `{line}`"))?,
        Err(_) => {
            let below = process::descendants(pid);
            // Not the program itself, which may be nsenter: its own death would take the others with it.
            below.iter().for_each(Process::quit);
            let grace = Duration::from_secs(2);
            let err = stderr.recv_timeout(grace);
            process::kill_tree(pid);
            let (out, err) = (stdout.recv_timeout(grace), err.or_else(|_| stderr.recv_timeout(grace)));
            let (out, err) = (out.unwrap_or_default(), err.unwrap_or_default());
            let tree: Vec<String> = below.into_iter().map(|process| process.command).collect();
            bail!(
                "`{line}` did not exit within {deadline:?}\n--- stdout ---\n{}\n--- stderr ---\n{}\n--- descendants ---\n{}",
                String::from_utf8_lossy(&out),
                String::from_utf8_lossy(&err),
                tree.join("\n")
            );
        }
    };
    let stdout =
        stdout.recv_timeout(left()).with_context(|| format!("`{line}` has exited, but its stdout is still open"))?;
    let stderr =
        stderr.recv_timeout(left()).with_context(|| format!("`{line}` has exited, but its stderr is still open"))?;
    Ok(Output { status, stdout, stderr, took: started.elapsed(), line })
}

/// Reads a stream to its end in a separate thread.
fn drain(stream: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Vec<u8>> {
    let (done, result) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(stream) = stream {
            // After a read error, the test still gets what came before it.
            let _ = stream.take(MAX_OUTPUT).read_to_end(&mut bytes);
        }
        drop(done.send(bytes));
    });
    result
}

/// The command line, for error messages.
pub fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Polls `probe` until it returns a value. The last resort, for conditions without a notification.
pub fn wait_for<T>(deadline: Duration, what: &str, probe: impl FnMut() -> Option<T>) -> Result<T> {
    poll(Duration::from_millis(5), deadline, what, probe)
}

/// Like [`wait_for`], with this interval between the ends of the probes, which cost something.
pub fn poll<T>(interval: Duration, deadline: Duration, what: &str, mut probe: impl FnMut() -> Option<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(value) = probe() {
            return Ok(value);
        }
        if started.elapsed() > deadline {
            bail!("{what}: not within {deadline:?}");
        }
        thread::sleep(interval);
    }
}
