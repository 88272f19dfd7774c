//! Raw mode for a terminal, and signals as events, so that the terminal is restored whatever ends the program, SIGKILL
//! excepted.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{self, SetArg, Termios};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

/// The signals that would end the program while its terminal is raw.
const ENDING: [i32; 4] = [SIGHUP, SIGINT, SIGTERM, SIGQUIT];

/// A terminal in raw mode, which passes on every key. Dropping this restores the terminal.
pub(crate) struct Raw<'a> {
    terminal: BorrowedFd<'a>,
    before: Termios,
}

impl<'a> Raw<'a> {
    /// Puts `terminal` into raw mode.
    ///
    /// # Errors
    /// If it is not a terminal.
    pub(crate) fn enter(terminal: BorrowedFd<'a>) -> io::Result<Self> {
        let before = termios::tcgetattr(terminal)?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        // TCSADRAIN keeps what was typed ahead: it is meant for the guest too.
        termios::tcsetattr(terminal, SetArg::TCSADRAIN, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Raw<'_> {
    fn drop(&mut self) {
        // Fails when the terminal's window has been closed. Then there is nothing to restore.
        let _ = termios::tcsetattr(self.terminal, SetArg::TCSADRAIN, &self.before);
    }
}

/// What is ready, or has ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ready {
    /// Signals.
    pub(crate) signal: bool,
    /// The stream.
    pub(crate) stream: bool,
    /// Stdin.
    pub(crate) stdin: bool,
}

/// Signals as events. Their handlers write to a socket pair, which a loop polls beside its streams.
pub(crate) struct Signals(SignalDelivery<UnixStream, SignalOnly>);

impl Signals {
    /// Catches the signals that would end the program, and `others`.
    ///
    /// # Errors
    /// If no socket pair or handler can be created.
    pub(crate) fn catch(others: &[i32]) -> io::Result<Self> {
        let (read, write) = UnixStream::pair()?;
        Ok(Self(SignalDelivery::with_pipe(read, write, SignalOnly, ENDING.iter().chain(others))?))
    }

    /// Waits for a signal, for `stream` to be readable or, with `writes`, writable, and with `reads` for stdin.
    ///
    /// # Errors
    /// poll(2)'s.
    pub(crate) fn or_ready(&self, stream: &impl AsFd, writes: bool, reads: bool) -> io::Result<Ready> {
        let stdin = io::stdin();
        let events = if writes { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let signals = self.0.get_read().as_fd();
        let mut fds = vec![PollFd::new(signals, PollFlags::POLLIN), PollFd::new(stream.as_fd(), events)];
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

    /// The signals since the last call, each once.
    pub(crate) fn take(&mut self) -> Vec<i32> {
        self.0.pending().collect()
    }
}

/// The exit status for a program that a signal ended, as shells report it.
pub(crate) fn exit_status(signal: i32) -> u8 {
    u8::try_from(signal).ok().and_then(|signal| signal.checked_add(128)).unwrap_or(u8::MAX)
}

/// A terminal's lines and columns.
///
/// # Errors
/// If it is not a terminal.
pub(crate) fn size(terminal: BorrowedFd<'_>) -> io::Result<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize, into a variable that outlives the call.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((size.ws_row, size.ws_col))
}

#[cfg(test)]
mod tests {
    use signal_hook::consts::{SIGUSR1, SIGWINCH};
    use signal_hook::low_level::raise;

    use super::*;

    #[test]
    fn caught_signals_wake_the_loop_and_are_reported_once() {
        // The ending signals are caught in the whole test process too, which nobody signals.
        let mut signals = Signals::catch(&[SIGUSR1, SIGWINCH]).unwrap();
        let (stream, mut other) = UnixStream::pair().unwrap();
        for signal in [SIGUSR1, SIGWINCH, SIGUSR1] {
            raise(signal).unwrap();
        }
        let ready = signals.or_ready(&stream, false, false).unwrap();
        assert!(ready.signal && !ready.stream && !ready.stdin);
        let mut taken = signals.take();
        taken.sort_unstable();
        assert_eq!(taken, [SIGUSR1, SIGWINCH]);
        assert!(signals.take().is_empty());
        io::Write::write_all(&mut other, b"x").unwrap();
        let ready = signals.or_ready(&stream, false, false).unwrap();
        assert!(!ready.signal && ready.stream);
        assert_eq!((exit_status(SIGTERM), exit_status(1000)), (143, 255));
    }
}
