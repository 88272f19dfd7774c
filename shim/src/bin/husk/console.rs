//! `husk console`: the guest's serial console on this terminal.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use husk_shim::console::SOCKET;
use husk_shim::host::socket;
use husk_shim::state::State;
use husk_shim::state::status;
use serde_json::json;

use crate::find;
use crate::print::field;
use crate::term::{Ending, Raw, is_terminal};

/// Bytes that are typed and not yet taken by a guest that may not read. Past that, keys are lost as at any terminal, and a file waits.
const PENDING: usize = 64 * 1024;
/// The guest's output is written to the terminal in pieces of this size.
const PIECE: usize = 16 * 1024;

pub fn run(id: &str, as_json: bool) -> Result<ExitCode> {
    let state = find::find(id)?;
    if as_json {
        let endpoint =
            find::connect(&state).and_then(|mut client| client.call("compute.vm.console.endpoint", json!({})));
        let endpoint = endpoint.with_context(|| format!("the console of {:?} is not served", state.sandbox()))?;
        writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&endpoint)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let stream = match (state.shim_lives(), socket::connect(state.dir(), SOCKET)) {
        (Ok(true), Ok(stream)) => stream,
        (Ok(false), _) => bail!(
            "the shim of {0:?} is dead, and its console with it; `husk logs {0}` shows what was on it",
            state.sandbox()
        ),
        (_, Err(error)) => {
            bail!("the console of {0:?}: {error}; `husk logs {0}` shows what was on it", state.sandbox())
        }
        (Err(error), _) => return Err(error.into()),
    };
    let stdin = io::stdin();
    let terminal = is_terminal(stdin.as_fd());
    if terminal {
        writeln!(io::stderr(), "husk: the console of {}; ~. at the beginning of a line leaves it", state.sandbox())?;
    }
    let ending = Ending::hold_back().context("hold signals back")?;
    let left = {
        let _raw = terminal.then(|| Raw::enter(stdin.as_fd())).transpose().context("make the terminal raw")?;
        Session::new(stream, terminal)?.run(&ending)?
    };
    match left {
        Left::Asked => {}
        Left::Signal(signal) => {
            // As a shell tells it.
            return Ok(ExitCode::from(128 + u8::try_from(signal).unwrap_or(0)));
        }
        Left::Closed => {
            writeln!(io::stderr(), "husk: {}", why_closed(&state, terminal))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Why the shim has closed a console, for people.
fn why_closed(state: &State, terminal: bool) -> String {
    let endpoint = find::connect(state).and_then(|mut client| client.call("compute.vm.console.endpoint", json!({})));
    match endpoint {
        Ok(endpoint) if endpoint["machine"] == "up" && terminal => {
            "this terminal was too slow, and the console has dropped it; the VM runs on".to_owned()
        }
        Ok(endpoint) if endpoint["machine"] == "up" => "the input has ended; the VM runs on".to_owned(),
        _ => {
            let known = find::known(state, "compute.vm.status", status::of);
            let last = known.status["transitions"].as_array().and_then(|all| all.last()).cloned().unwrap_or_default();
            match (field(&known.status["state"]).as_str(), field(&last["cause"])) {
                // Its death is just being noticed.
                ("Running", _) => format!("the console has ended; `husk status {}` tells why", state.sandbox()),
                (vm, cause) => format!("the console has ended: the VM is {vm} ({cause})"),
            }
        }
    }
}

/// Why a session is over.
enum Left {
    Asked,
    Signal(i32),
    Closed,
}

struct Session {
    stream: UnixStream,
    /// Where to look for the way out; none if what comes is not typed.
    escape: Option<Escape>,
    pending: Vec<u8>,
    /// Whether more may come from stdin.
    open: bool,
}

impl Session {
    fn new(stream: UnixStream, terminal: bool) -> Result<Self> {
        stream.set_nonblocking(true)?;
        let escape = terminal.then(Escape::default);
        Ok(Self { stream, escape, pending: Vec::new(), open: true })
    }

    fn run(mut self, ending: &Ending) -> Result<Left> {
        // Not through a buffer, of which poll(2) would know nothing.
        let mut stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let mut stdout = io::stdout().lock();
        let mut buffer = vec![0; PIECE];
        loop {
            // Keys are always looked at, or there would be no way out of a guest that does not read.
            let reads = self.open && (self.escape.is_some() || self.pending.len() < PENDING);
            let ready = ending.or_ready(&self.stream, !self.pending.is_empty(), reads)?;
            if ready.signal
                && let Some(signal) = ending.came()?
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
                            return Ok(Left::Asked);
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // The terminal has gone.
                    Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(Left::Asked),
                    Err(error) => return Err(error).context("read stdin"),
                }
            }
            if self.send()? && !self.open {
                // What is there still comes, then the shim closes.
                self.stream.shutdown(std::net::Shutdown::Write).or_else(ignore_gone)?;
            }
        }
    }

    /// True when the way out is among it.
    fn typed(&mut self, bytes: &[u8]) -> bool {
        let (keys, leave) = match &mut self.escape {
            Some(escape) => escape.take(bytes),
            None => (bytes.to_vec(), false),
        };
        let room = if self.escape.is_some() { PENDING.saturating_sub(self.pending.len()) } else { usize::MAX };
        self.pending.extend(keys.into_iter().take(room));
        leave
    }

    /// Sends what the shim takes; true when nothing is left.
    fn send(&mut self) -> Result<bool> {
        while !self.pending.is_empty() {
            match self.stream.write(&self.pending) {
                Ok(length) => drop(self.pending.drain(..length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                // Its last words are still to be read.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.pending.clear(),
                Err(error) => return Err(error).context("write to the console"),
            }
        }
        Ok(true)
    }
}

fn ignore_gone(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::NotConnected | io::ErrorKind::BrokenPipe => Ok(()),
        _ => Err(error),
    }
}

/// Finds `~.` at the beginning of a line among what is typed; `~~` stands for one `~` there.
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
    /// What goes to the guest of these keys, and whether the way out came after it.
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
    fn the_way_out_is_a_tilde_and_a_dot_at_the_beginning_of_a_line() {
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
        for (keys, wanted, leaves) in table {
            for size in [1, 2, 100] {
                let (mut escape, mut out, mut left) = (Escape::default(), Vec::new(), false);
                for part in keys.as_bytes().chunks(size) {
                    if !left {
                        let (some, leave) = escape.take(part);
                        out.extend(some);
                        left = leave;
                    }
                }
                assert_eq!((String::from_utf8(out).unwrap().as_str(), left), (*wanted, *leaves), "{keys:?} {size}");
            }
        }
    }
}
