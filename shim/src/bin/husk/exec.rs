//! `husk exec`: runs a process in the VM itself, with this command's streams and exit status.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::{Context, Result};
use base64ct::{Base64, Encoding};
use clap::Args;
use husk_protos::chain::Chain;
use husk_shim::ctl::messages::{
    EXEC_INPUT_AHEAD, ExecEnd, ExecInputParams, ExecParams, ExecPart, ExecResizeParams, ExecSignalParams, ExecStream,
};
use husk_shim::ctl::rpc;
use husk_shim::ctl::rpc::{NO_SUCH_PROGRAM, NOT_EXECUTABLE, Reply};
use serde::Serialize;
use signal_hook::consts::{SIGINT, SIGQUIT, SIGWINCH};

use crate::client::{CallError, LINE_MAX, decode, reply};
use crate::find;
use crate::print::shown_lines;
use crate::term::{Raw, Signals, exit_status, size};

/// Exit status when husk itself fails. 125, 126 and 127 have the same meaning in env(1) and in container tools.
const FAILED: u8 = 125;
/// Most bytes of input in one message.
const PIECE: usize = 16 * 1024;
/// Ctrl-D, which ends the input of a terminal.
const END_OF_TYPING: &[u8] = b"\x04";

/// What to run, and how.
#[derive(Args)]
pub(crate) struct Options {
    /// Allocate a terminal even if stdin or stdout is not one
    #[arg(short, long)]
    tty: bool,
    /// Allocate no terminal even if stdin and stdout are one
    #[arg(short = 'T', long, conflicts_with = "tty")]
    no_tty: bool,
    /// Connect no stdin. Use this inside a shell loop that reads stdin itself
    #[arg(short, long, conflicts_with = "tty")]
    no_stdin: bool,
    /// Set an environment variable; may be repeated
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Working directory of the process
    #[arg(short, long, value_name = "FOLDER", default_value = "/")]
    workdir: String,
    /// Print JSON, one object a line: {"stream", "data": base64} for output, then {"exit_code"}
    #[arg(long, conflicts_with = "tty")]
    json: bool,
    /// The program, which is looked up in PATH, and its arguments [default: sh]
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs a process. Failures of husk have their own exit status, because 1 could be the process's.
pub(crate) fn run(id: &str, options: &Options) -> ExitCode {
    let failure = match relay(id, options) {
        Ok(code) => return ExitCode::from(code),
        Err(failure) => failure,
    };
    let code = match failure.downcast_ref() {
        // The reader of the output, such as `head`, has exited.
        Some(CallError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => return ExitCode::SUCCESS,
        Some(CallError::Rejected(error)) if error.code == NO_SUCH_PROGRAM => 127,
        Some(CallError::Rejected(error)) if error.code == NOT_EXECUTABLE => 126,
        _ => FAILED,
    };
    // The message may contain text from a guest. If stderr is closed, the exit status has to do.
    let _ = writeln!(io::stderr(), "husk: {}", shown_lines(&Chain(failure.as_ref()).to_string()));
    ExitCode::from(code)
}

fn relay(id: &str, options: &Options) -> Result<u8> {
    let state = find::find(id)?;
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let (typed, shown) = (stdin.is_terminal(), stdout.is_terminal());
    let terminal = options.tty || typed && shown && !options.no_tty && !options.no_stdin && !options.json;

    let mut env = options.env.clone();
    let has_term = env.iter().any(|one| one.starts_with("TERM="));
    if let (true, Ok(kind)) = (terminal && shown && !has_term, std::env::var("TERM")) {
        env.push(format!("TERM={kind}"));
    }
    let args = if options.command.is_empty() { vec!["sh".to_owned()] } else { options.command.clone() };
    // Before the size is read: a change in between would be missed.
    let signals = Signals::catch(&[SIGWINCH]).context("catch signals")?;
    let (rows, columns) = if terminal { size(stdout.as_fd()).unwrap_or((24, 80)) } else { (0, 0) };
    let (cwd, has_input) = (options.workdir.clone(), !options.no_stdin);
    let params = ExecParams { args, env, cwd, terminal, rows, columns, stdin: has_input };
    let stream = find::connect(&state)?.open("compute.vm.exec", &params)?;
    let _raw =
        (terminal && typed).then(|| Raw::enter(stdin.as_fd())).transpose().context("put the terminal into raw mode")?;
    Session::new(stream, terminal, has_input, options.json)?.run(signals)
}

struct Session {
    stream: UnixStream,
    /// Without std's buffer: poll(2) would not see what is in it.
    stdin: File,
    terminal: bool,
    json: bool,
    /// Stdin has not ended.
    open: bool,
    /// The beginning of a line from the shim.
    read: Vec<u8>,
    /// Messages that the shim has not accepted yet.
    write: Vec<u8>,
    /// Bytes of input that the guest has not taken yet.
    ahead: usize,
    interrupted: bool,
}

impl Session {
    fn new(stream: UnixStream, terminal: bool, has_input: bool, json: bool) -> Result<Self> {
        stream.set_nonblocking(true)?;
        let stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let (read, write) = (Vec::new(), Vec::new());
        Ok(Self { stream, stdin, terminal, json, open: has_input, read, write, ahead: 0, interrupted: false })
    }

    fn run(mut self, mut signals: Signals) -> Result<u8> {
        loop {
            // When the shim or the guest falls behind, the input stays where it comes from.
            let reads = self.open && self.ahead < EXEC_INPUT_AHEAD && self.write.len() < LINE_MAX as usize;
            let ready = signals.or_ready(&self.stream, !self.write.is_empty(), reads)?;
            if ready.signal {
                for signal in signals.take() {
                    if let Some(code) = self.signalled(signal) {
                        return Ok(code);
                    }
                }
            }
            if ready.stdin {
                self.take_input()?;
            }
            self.send()?;
            if ready.stream
                && let Some(code) = self.receive()?
            {
                return Ok(code);
            }
        }
    }

    /// Handles a signal. Returns the exit status if the signal ends this command.
    fn signalled(&mut self, signal: i32) -> Option<u8> {
        match signal {
            SIGWINCH => {
                if let (true, Ok((rows, columns))) = (self.terminal, size(io::stdout().as_fd())) {
                    self.notify("exec.resize", &ExecResizeParams { rows, columns });
                }
                None
            }
            // The first one is for the process, the second one for this command.
            SIGINT | SIGQUIT if !self.terminal && !self.interrupted => {
                self.interrupted = true;
                self.notify("exec.signal", &ExecSignalParams { signal: signal.unsigned_abs() });
                None
            }
            // The shim ends the process when the connection closes.
            other => Some(exit_status(other)),
        }
    }

    fn take_input(&mut self) -> Result<()> {
        let mut buffer = [0; PIECE];
        let room = PIECE.min(EXEC_INPUT_AHEAD - self.ahead);
        match self.stdin.read(&mut buffer[..room]) {
            Ok(0) => self.end_of_input(),
            Ok(length) => self.input(&buffer[..length]),
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            // The terminal is gone.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => self.end_of_input(),
            Err(error) => return Err(error).context("read stdin"),
        }
        Ok(())
    }

    fn input(&mut self, data: &[u8]) {
        self.ahead += data.len();
        self.notify("exec.input", &ExecInputParams { data: Base64::encode_string(data), end: false });
    }

    fn end_of_input(&mut self) {
        self.open = false;
        if self.terminal {
            // The only way to end the input of a terminal that the process keeps open.
            self.input(END_OF_TYPING);
        } else {
            self.notify("exec.input", &ExecInputParams { data: String::new(), end: true });
        }
    }

    fn notify(&mut self, method: &str, params: &impl Serialize) {
        self.write.extend(rpc::notification(method, params));
    }

    fn send(&mut self) -> Result<()> {
        while !self.write.is_empty() {
            match self.stream.write(&self.write) {
                Ok(length) => drop(self.write.drain(..length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The shim's last messages are still to be read.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.write.clear(),
                Err(error) => return Err(error).context("write to the shim"),
            }
        }
        Ok(())
    }

    /// Handles the messages that have arrived. Returns the exit status if it is among them.
    fn receive(&mut self) -> Result<Option<u8>> {
        let mut buffer = [0; 64 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(0) => return Err(CallError::Closed.into()),
            Ok(length) => self.read.extend_from_slice(&buffer[..length]),
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(CallError::Closed.into()),
            Err(error) => return Err(error).context("read from the shim"),
        }
        while let Some(end) = self.read.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.read.drain(..=end).collect();
            match reply(&line)? {
                Reply::Notification(params) => self.notified(&decode(params)?)?,
                Reply::Response(response) => {
                    let end: ExecEnd = decode(response.map_err(CallError::Rejected)?)?;
                    if self.json {
                        write_json(&end)?;
                    }
                    return Ok(Some(end.exit_code));
                }
            }
        }
        if self.read.len() > LINE_MAX as usize {
            return Err(CallError::Malformed(format!("a line is longer than {LINE_MAX} bytes")).into());
        }
        Ok(None)
    }

    fn notified(&mut self, part: &ExecPart) -> Result<()> {
        match part {
            ExecPart::Taken { taken } => self.ahead = self.ahead.saturating_sub(*taken),
            ExecPart::Output { .. } if self.json => write_json(part)?,
            ExecPart::Output { stream, data } => {
                let data = Base64::decode_vec(data).map_err(|error| CallError::Malformed(error.to_string()))?;
                match stream {
                    ExecStream::Stdout => write(&io::stdout(), &data)?,
                    ExecStream::Stderr => write(&io::stderr(), &data)?,
                }
            }
        }
        Ok(())
    }
}

fn write_json(message: &impl Serialize) -> Result<()> {
    write(&io::stdout(), format!("{}\n", serde_json::to_value(message)?).as_bytes())
}

/// Writes at once, without std's buffer.
fn write(to: &impl AsFd, data: &[u8]) -> Result<()> {
    let mut file = File::from(to.as_fd().try_clone_to_owned()?);
    file.write_all(data).map_err(|error| CallError::Output(error).into())
}
