//! A terminal in raw mode, which is as it was again however the program ends, but for SIGKILL.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{self, SetArg, Termios};

/// What would end the program with its terminal raw.
const ENDING: [Signal; 4] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM, Signal::SIGQUIT];

/// A terminal that passes on every key as it is. Dropped, it is what it was before.
pub struct Raw<'a> {
    terminal: BorrowedFd<'a>,
    before: Termios,
}

impl<'a> Raw<'a> {
    /// Makes `terminal` raw.
    ///
    /// # Errors
    /// When it is no terminal.
    pub fn enter(terminal: BorrowedFd<'a>) -> io::Result<Self> {
        let before = termios::tcgetattr(terminal)?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        // What was typed ahead was meant for the program too.
        termios::tcsetattr(terminal, SetArg::TCSADRAIN, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Raw<'_> {
    fn drop(&mut self) {
        // It may be gone, with its window; then there is nothing to be restored.
        let _ = termios::tcsetattr(self.terminal, SetArg::TCSADRAIN, &self.before);
    }
}

/// What there is something of, or the end of.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    /// Signals.
    pub signal: bool,
    /// The stream.
    pub stream: bool,
    /// Stdin.
    pub stdin: bool,
}

/// Ending signals as something to wait for, so that the terminal is restored before they have their effect.
pub struct Ending(SignalFd);

impl Ending {
    /// Holds them back from now on, in this thread and those that it starts.
    ///
    /// # Errors
    /// What the system says.
    pub fn hold_back() -> io::Result<Self> {
        Self::hold_back_with(&[])
    }

    /// The same, and to be told of these as well.
    ///
    /// # Errors
    /// What the system says.
    pub fn hold_back_with(others: &[Signal]) -> io::Result<Self> {
        let signals: SigSet = ENDING.iter().chain(others).copied().collect();
        signals.thread_block()?;
        Ok(Self(SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?))
    }

    /// Readable when one has come.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Waits for one of them, for `stream` to be read or, if `writes`, written, and if `reads` for stdin; tells which.
    ///
    /// # Errors
    /// What the system says.
    pub fn or_ready(&self, stream: &impl AsFd, writes: bool, reads: bool) -> io::Result<Ready> {
        let stdin = io::stdin();
        let wanted = if writes { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let mut fds = vec![PollFd::new(self.as_fd(), PollFlags::POLLIN), PollFd::new(stream.as_fd(), wanted)];
        if reads {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                polled => polled?,
            };
            let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
            return Ok(Ready { signal: ready(&fds[0]), stream: ready(&fds[1]), stdin: fds.get(2).is_some_and(ready) });
        }
    }

    /// The one that has come, if any has.
    ///
    /// # Errors
    /// What the system says.
    pub fn came(&self) -> io::Result<Option<i32>> {
        Ok(self.0.read_signal()?.map(|info| info.ssi_signo as i32))
    }
}

/// A terminal's lines and columns.
///
/// # Errors
/// When it is no terminal.
pub fn size(terminal: BorrowedFd<'_>) -> io::Result<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize, into a variable that outlives the call.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((size.ws_row, size.ws_col))
}

/// Whether this is a terminal.
pub fn is_terminal(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: isatty takes a number and touches no memory of ours.
    unsafe { libc::isatty(fd.as_raw_fd()) == 1 }
}
