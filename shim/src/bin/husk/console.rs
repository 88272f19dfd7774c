//! `husk console`: connects this terminal to the guest's serial console.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use husk_shim::console::SOCKET;
use husk_shim::console::endpoint::{Endpoint, Line};
use husk_shim::ctl::messages::NoParams;
use husk_shim::host::socket;
use husk_shim::state::State;
use husk_shim::state::life::VmState;
use husk_shim::state::status::Name;

use crate::client::CallError;
use crate::find;
use crate::print;
use crate::print::{or_dash, shown};
use crate::term::{Raw, Signals, exit_status};

/// Bytes of input that wait for a guest that does not read. Past that, keys are lost, as on any terminal, and a file is
/// read later.
const PENDING: usize = 64 * 1024;
/// Size of a read from the console or stdin.
const PIECE: usize = 16 * 1024;

pub(crate) fn run(id: &str, as_json: bool) -> Result<ExitCode> {
    let state = find::find(id)?;
    if as_json {
        let endpoint =
            endpoint(&state).with_context(|| format!("the console of {:?} is not served", state.sandbox()))?;
        print::json(&mut io::stdout(), &endpoint)?;
        return Ok(ExitCode::SUCCESS);
    }
    let stream = match (state.shim_lives(), socket::connect(state.dir(), SOCKET)) {
        (Ok(true), Ok(stream)) => stream,
        (Ok(false), _) => bail!(
            "the shim of {0:?} is dead and serves no console; `husk logs {0}` shows the console's output",
            state.sandbox()
        ),
        (_, Err(error)) => {
            bail!("connect to the console of {0:?}: {error}; `husk logs {0}` shows its output", state.sandbox())
        }
        (Err(error), _) => return Err(error.into()),
    };
    let stdin = io::stdin();
    let terminal = stdin.is_terminal();
    if terminal {
        writeln!(
            io::stderr(),
            "husk: connected to the console of {}; type ~. at the start of a line to leave",
            state.sandbox()
        )?;
    }
    let signals = Signals::catch(&[]).context("catch signals")?;
    let left = {
        let _raw = terminal.then(|| Raw::enter(stdin.as_fd())).transpose().context("put the terminal into raw mode")?;
        Session::new(stream, terminal)?.run(signals)?
    };
    match left {
        Left::ByUser => {}
        Left::Signal(signal) => return Ok(ExitCode::from(exit_status(signal))),
        Left::Closed => {
            writeln!(io::stderr(), "husk: {}", why_closed(&state, terminal))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn endpoint(state: &State) -> Result<Endpoint, CallError> {
    find::connect(state)?.call("compute.vm.console.endpoint", &NoParams {})
}

/// Why the shim has closed a console, for people.
fn why_closed(state: &State, terminal: bool) -> String {
    match endpoint(state) {
        Ok(Endpoint { machine: Line::Up, .. }) if terminal => {
            "this terminal reads too slowly, and the shim has disconnected it; the VM keeps running".to_owned()
        }
        Ok(Endpoint { machine: Line::Up, .. }) => "the input has ended; the VM keeps running".to_owned(),
        Ok(_) | Err(_) => {
            let status = find::status(state).status;
            let cause = status.transitions.last().map(|last| shown(&last.cause));
            match status.summary.state {
                // The shim is about to notice its death.
                Some(Name::Known(VmState::Running)) => {
                    format!("the console has ended; `husk status {}` shows why", state.sandbox())
                }
                vm => format!("the console has ended: the VM is {} ({})", or_dash(vm), or_dash(cause)),
            }
        }
    }
}

/// How a session ended.
enum Left {
    /// The user left, or the terminal is gone.
    ByUser,
    Signal(i32),
    /// The shim closed the connection.
    Closed,
}

struct Session {
    stream: UnixStream,
    /// Detects the escape sequence. `None` if the input is not typed.
    escape: Option<Escape>,
    pending: Vec<u8>,
    /// Stdin has not ended.
    open: bool,
}

impl Session {
    fn new(stream: UnixStream, terminal: bool) -> Result<Self> {
        stream.set_nonblocking(true)?;
        let escape = terminal.then(Escape::default);
        Ok(Self { stream, escape, pending: Vec::new(), open: true })
    }

    fn run(mut self, mut signals: Signals) -> Result<Left> {
        // Without std's buffer: poll(2) would not see what is in it.
        let mut stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let mut stdout = io::stdout().lock();
        let mut buffer = vec![0; PIECE];
        loop {
            // Keys are always read, or the escape sequence would have no effect while the guest does not read.
            let reads = self.open && (self.escape.is_some() || self.pending.len() < PENDING);
            let ready = signals.or_ready(&self.stream, !self.pending.is_empty(), reads)?;
            if ready.signal
                && let Some(&signal) = signals.take().first()
            {
                return Ok(Left::Signal(signal));
            }
            if ready.stream {
                match self.stream.read(&mut buffer) {
                    Ok(0) => return Ok(Left::Closed),
                    Ok(length) => {
                        stdout.write_all(&buffer[..length])?;
                        stdout.flush()?;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Left::Closed),
                    Err(error) => return Err(error).context("read the console"),
                }
            }
            if ready.stdin {
                match stdin.read(&mut buffer) {
                    Ok(0) => self.open = false,
                    Ok(length) => {
                        if self.typed(&buffer[..length]) {
                            return Ok(Left::ByUser);
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // The terminal is gone.
                    Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(Left::ByUser),
                    Err(error) => return Err(error).context("read stdin"),
                }
            }
            if self.send()? && !self.open {
                // The shim sends the remaining output, then closes the connection.
                self.stream.shutdown(std::net::Shutdown::Write).or_else(ignore_disconnected)?;
            }
        }
    }

    /// Queues input for the guest. True if it contains the escape sequence.
    fn typed(&mut self, bytes: &[u8]) -> bool {
        let (keys, leave) = match &mut self.escape {
            Some(escape) => escape.take(bytes),
            None => (bytes.to_vec(), false),
        };
        let room = if self.escape.is_some() { PENDING.saturating_sub(self.pending.len()) } else { usize::MAX };
        self.pending.extend(keys.into_iter().take(room));
        leave
    }

    /// Sends as much input as the shim accepts. True if none is left.
    fn send(&mut self) -> Result<bool> {
        while !self.pending.is_empty() {
            match self.stream.write(&self.pending) {
                Ok(length) => drop(self.pending.drain(..length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                // The remaining output is still to be read.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.pending.clear(),
                Err(error) => return Err(error).context("write to the console"),
            }
        }
        Ok(true)
    }
}

fn ignore_disconnected(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::NotConnected | io::ErrorKind::BrokenPipe => Ok(()),
        _ => Err(error),
    }
}

/// Detects the escape sequence `~.` at the start of a line. `~~` there stands for one `~`.
#[derive(Debug)]
struct Escape {
    line_start: bool,
    tilde: bool,
}

impl Default for Escape {
    fn default() -> Self {
        Self { line_start: true, tilde: false }
    }
}

impl Escape {
    /// The keys to send to the guest, and whether the escape sequence followed them.
    fn take(&mut self, keys: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::with_capacity(keys.len());
        for &key in keys {
            match (std::mem::take(&mut self.tilde), key) {
                (true, b'.') => return (out, true),
                (true, b'~') => out.push(b'~'),
                (true, other) => out.extend([b'~', other]),
                (false, b'~') if self.line_start => {
                    self.tilde = true;
                    continue;
                }
                (false, other) => out.push(other),
            }
            self.line_start = matches!(key, b'\r' | b'\n');
        }
        (out, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tilde_dot_leaves_at_the_start_of_a_line_only() {
        let table: &[(&str, &str, bool)] = &[
            ("~.", "", true),
            ("ls\r~.rest", "ls\r", true),
            ("ls\n~.", "ls\n", true),
            ("ls ~.", "ls ~.", false),
            ("~~.", "~.", false),
            ("~a~.", "~a~.", false),
            ("\r~\r~.", "\r~\r", true),
            ("~", "", false),
            ("a~~.\r", "a~~.\r", false),
        ];
        for (keys, expected, leaves) in table {
            for size in [1, 2, 100] {
                let (mut escape, mut out, mut left) = (Escape::default(), Vec::new(), false);
                for part in keys.as_bytes().chunks(size) {
                    if !left {
                        let (some, leave) = escape.take(part);
                        out.extend(some);
                        left = leave;
                    }
                }
                assert_eq!((String::from_utf8(out).unwrap().as_str(), left), (*expected, *leaves), "{keys:?} {size}");
            }
        }
    }
}
