//! A pseudo-terminal with a program in it: what a user at a terminal sees and types.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};

use crate::command::{describe, wait_for};
use crate::process;

/// A program in its own terminal. It is killed on drop.
pub struct Pty {
    master: File,
    child: Child,
    line: String,
    /// Output that was read but not yet matched by [`Self::expect`].
    unmatched: Vec<u8>,
}

impl Pty {
    /// Starts the program in a new terminal of this size, as its session leader.
    pub fn spawn(mut command: Command, rows: u16, columns: u16) -> Result<Self> {
        let line = describe(&command);
        let pty = openpty(&size(rows, columns), None).context("openpty")?;
        let slave = || -> Result<Stdio> { Ok(Stdio::from(pty.slave.try_clone()?)) };
        command.stdin(slave()?).stdout(slave()?).stderr(slave()?);
        // SAFETY: setsid(2) and ioctl(2) are async-signal-safe and touch nothing of the parent's memory.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            })
        };
        let child = command.spawn().with_context(|| format!("start `{line}`"))?;
        // The command holds copies of the slave, which would keep the terminal open.
        drop(command);
        nix::fcntl::fcntl(&pty.master, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
        nix::fcntl::fcntl(&pty.master, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
        Ok(Self { master: pty.master.into(), child, line, unmatched: Vec::new() })
    }

    /// Types `text`.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.master.write_all(text.as_bytes()).with_context(|| format!("type {text:?}"))
    }

    /// Reads until `needle` appears and returns the output before it.
    pub fn expect(&mut self, needle: &str, deadline: Duration) -> Result<String> {
        let started = Instant::now();
        loop {
            if let Some(at) = self.unmatched.windows(needle.len()).position(|part| part == needle.as_bytes()) {
                let rest = self.unmatched.split_off(at + needle.len());
                let mut before = std::mem::replace(&mut self.unmatched, rest);
                before.truncate(at);
                return Ok(String::from_utf8_lossy(&before).into_owned());
            }
            let left = deadline.saturating_sub(started.elapsed());
            if !self.read_some(left)? {
                let seen = String::from_utf8_lossy(&self.unmatched).into_owned();
                bail!("`{}`: no {needle:?} within {:.1?}; output: {seen:?}", self.line, started.elapsed());
            }
        }
    }

    /// Reads to the terminal's end, waits until the program exits, and returns the remaining output and the exit code.
    pub fn finish(mut self, deadline: Duration) -> Result<(String, i32)> {
        let started = Instant::now();
        while self.read_some(deadline.saturating_sub(started.elapsed()))? {}
        let what = format!("`{}` exits", self.line);
        let status = wait_for(deadline, &what, || self.child.try_wait().transpose())
            .with_context(|| String::from_utf8_lossy(&self.unmatched).into_owned())??;
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
        Ok((String::from_utf8_lossy(&self.unmatched).into_owned(), code))
    }

    /// Changes the terminal's size, as resizing a window does.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let size = size(rows, columns);
        // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
        nix::errno::Errno::result(unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })?;
        Ok(())
    }

    /// Returns false at the terminal's end and after the timeout.
    fn read_some(&mut self, within: Duration) -> Result<bool> {
        let timeout = PollTimeout::try_from(within).unwrap_or(PollTimeout::MAX);
        if poll(&mut [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)], timeout)? == 0 {
            return Ok(false);
        }
        let mut bytes = [0; 4096];
        match self.master.read(&mut bytes) {
            Ok(0) => Ok(false),
            // The last process has closed the terminal.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(false),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
            Err(error) => Err(error).context("read a terminal"),
            Ok(length) => {
                self.unmatched.extend_from_slice(&bytes[..length]);
                Ok(true)
            }
        }
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        process::kill_tree(self.child.id() as i32);
        // It is dead or already reaped.
        let _ = self.child.wait();
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}
