//! `husk exec`: a process in the VM itself, with this command's streams and exit status.

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::{Context, Result};
use base64ct::{Base64, Encoding};
use clap::Args;
use husk_shim::ctl::exec::AHEAD;
use husk_shim::ctl::rpc::{NO_SUCH_PROGRAM, NOT_EXECUTABLE};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::client::{LINE, Problem, Step, step};
use crate::find;
use crate::print::shown_lines;
use crate::term::{Ending, Raw, is_terminal, size};

/// Exit status when husk itself has failed; with 126 and 127, as env(1) and container tools have it.
const FAILED: u8 = 125;
/// Most bytes of input that are sent as one.
const PIECE: usize = 16 * 1024;
/// What a terminal takes for the end of what is typed (Ctrl-D).
const END_OF_TYPING: &[u8] = b"\x04";

/// What is to be run, and how.
#[derive(Args)]
pub struct Wanted {
    /// Give the process a terminal, also where stdin or stdout is none
    #[arg(short, long)]
    tty: bool,
    /// Give the process no terminal, also where stdin and stdout are one
    #[arg(short = 'T', long, conflicts_with = "tty")]
    no_tty: bool,
    /// Give the process no stdin; in a loop that reads, it would take what the loop is to read
    #[arg(short, long, conflicts_with = "tty")]
    no_stdin: bool,
    /// Set a variable of its environment
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// The folder in which it begins
    #[arg(short, long, value_name = "FOLDER", default_value = "/")]
    workdir: String,
    /// Print JSON: a line for each piece of output, {"stream", "data": base64}, and then {"exit_code"}
    #[arg(long, conflicts_with = "tty")]
    json: bool,
    /// The program, which is searched in PATH, and its arguments; a shell if there is none
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs it; never with the tool's usual exit code for a failure, which would pass for the process's.
pub fn run(id: &str, wanted: &Wanted) -> ExitCode {
    let failure = match relay(id, wanted) {
        Ok(code) => return ExitCode::from(code),
        Err(failure) => failure,
    };
    let code = match failure.downcast_ref() {
        // Whoever reads has enough.
        Some(Problem::Taker(error)) if error.kind() == io::ErrorKind::BrokenPipe => return ExitCode::SUCCESS,
        Some(Problem::Refused { code: NO_SUCH_PROGRAM, .. }) => 127,
        Some(Problem::Refused { code: NOT_EXECUTABLE, .. }) => 126,
        _ => FAILED,
    };
    // Parts of it may be a guest's words. Without stderr there is nobody to be told.
    let _ = writeln!(io::stderr(), "husk: {}", shown_lines(&format!("{failure:#}")));
    ExitCode::from(code)
}

fn relay(id: &str, wanted: &Wanted) -> Result<u8> {
    let state = find::find(id)?;
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let (typed, shown) = (is_terminal(stdin.as_fd()), is_terminal(stdout.as_fd()));
    let terminal = wanted.tty || typed && shown && !wanted.no_tty && !wanted.no_stdin && !wanted.json;

    let mut env = wanted.env.clone();
    let named = env.iter().any(|one| one.starts_with("TERM="));
    if let (true, Ok(kind)) = (terminal && shown && !named, std::env::var("TERM")) {
        env.push(format!("TERM={kind}"));
    }
    let args = if wanted.command.is_empty() { vec!["sh".to_owned()] } else { wanted.command.clone() };
    // Before the size is asked for, so that no change of it is missed.
    let signals = Ending::hold_back_with(&[Signal::SIGWINCH]).context("hold signals back")?;
    let (rows, columns) = if terminal { size(stdout.as_fd()).unwrap_or((24, 80)) } else { (0, 0) };
    let params = json!({
        "args": args, "env": env, "cwd": wanted.workdir, "terminal": terminal, "rows": rows, "columns": columns,
        "stdin": !wanted.no_stdin,
    });
    let stream = find::connect(&state)?.open("compute.vm.exec", params)?;
    let _raw = (terminal && typed).then(|| Raw::enter(stdin.as_fd())).transpose().context("make the terminal raw")?;
    Session::new(stream, terminal, wanted)?.run(&signals)
}

struct Session {
    stream: UnixStream,
    terminal: bool,
    json: bool,
    /// Whether more may come from stdin.
    open: bool,
    /// Of the shim's lines, what has no end yet.
    read: Vec<u8>,
    /// What the shim has not taken yet.
    write: Vec<u8>,
    /// Bytes of input that the shim has not passed on yet.
    ahead: usize,
    interrupted: bool,
}

impl Session {
    fn new(stream: UnixStream, terminal: bool, wanted: &Wanted) -> Result<Self> {
        stream.set_nonblocking(true)?;
        let (json, open) = (wanted.json, !wanted.no_stdin);
        let (read, write) = (Vec::new(), Vec::new());
        Ok(Self { stream, terminal, json, open, read, write, ahead: 0, interrupted: false })
    }

    fn run(mut self, signals: &Ending) -> Result<u8> {
        loop {
            // What the shim is behind with does not grow: input waits where it comes from.
            let reads = self.open && self.ahead < AHEAD && self.write.len() < LINE as usize;
            let ready = signals.or_ready(&self.stream, !self.write.is_empty(), reads)?;
            if ready.signal
                && let Some(signal) = signals.came()?
                && let Some(code) = self.signalled(signal)
            {
                return Ok(code);
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

    /// The exit status, if the signal ends this command.
    fn signalled(&mut self, signal: i32) -> Option<u8> {
        match signal {
            libc::SIGWINCH => {
                if let (true, Ok((rows, columns))) = (self.terminal, size(io::stdout().as_fd())) {
                    self.tell("exec.resize", &json!({"rows": rows, "columns": columns}));
                }
                None
            }
            // It is for the process to say what that means; who says it twice means this command.
            libc::SIGINT | libc::SIGQUIT if !self.terminal && !self.interrupted => {
                self.interrupted = true;
                self.tell("exec.signal", &json!({"signal": signal}));
                None
            }
            // As a shell tells it. The shim ends the process when the connection ends.
            other => Some(128 + u8::try_from(other).unwrap_or(0)),
        }
    }

    fn take_input(&mut self) -> Result<()> {
        let mut buffer = [0; PIECE];
        let room = PIECE.min(AHEAD - self.ahead);
        // SAFETY: descriptor 0 is open as long as the program runs, and ManuallyDrop does not close it. Not by std's stdin, whose buffer poll(2)
        // would know nothing of.
        let mut stdin = ManuallyDrop::new(unsafe { File::from_raw_fd(io::stdin().as_raw_fd()) });
        match stdin.read(&mut buffer[..room]) {
            Ok(0) => self.end_of_input(),
            Ok(length) => self.input(&buffer[..length]),
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            // The terminal has gone.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => self.end_of_input(),
            Err(error) => return Err(error).context("read stdin"),
        }
        Ok(())
    }

    fn input(&mut self, data: &[u8]) {
        self.ahead += data.len();
        self.tell("exec.input", &json!({"data": Base64::encode_string(data)}));
    }

    fn end_of_input(&mut self) {
        self.open = false;
        if self.terminal {
            // A terminal has no other end, as long as the process has it.
            self.input(END_OF_TYPING);
        } else {
            self.tell("exec.input", &json!({"end": true}));
        }
    }

    fn tell(&mut self, method: &str, params: &Value) {
        let line = json!({"jsonrpc": "2.0", "method": method, "params": params});
        self.write.extend_from_slice(format!("{line}\n").as_bytes());
    }

    fn send(&mut self) -> Result<()> {
        while !self.write.is_empty() {
            match self.stream.write(&self.write) {
                Ok(length) => drop(self.write.drain(..length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Its last words are still to be read.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.write.clear(),
                Err(error) => return Err(error).context("write to the shim"),
            }
        }
        Ok(())
    }

    /// The exit status, if it has come.
    fn receive(&mut self) -> Result<Option<u8>> {
        let mut buffer = [0; 64 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(0) => return Err(Problem::Closed.into()),
            Ok(length) => self.read.extend_from_slice(&buffer[..length]),
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(Problem::Closed.into()),
            Err(error) => return Err(error).context("read from the shim"),
        }
        while let Some(end) = self.read.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.read.drain(..=end).collect();
            match step(&line)? {
                Step::Notification(params) => self.notified(&params)?,
                Step::Answer(answer) => {
                    let answer = answer?;
                    if self.json {
                        show(&io::stdout(), format!("{answer}\n").as_bytes())?;
                    }
                    let code = answer["exit_code"].as_u64().and_then(|code| u8::try_from(code).ok());
                    return Ok(Some(code.context("the shim's answer has no exit code")?));
                }
            }
        }
        if self.read.len() > LINE as usize {
            return Err(Problem::Garbled(format!("a line is longer than {LINE} bytes")).into());
        }
        Ok(None)
    }

    fn notified(&mut self, params: &Value) -> Result<()> {
        if let Some(taken) = params["taken"].as_u64() {
            self.ahead = self.ahead.saturating_sub(usize::try_from(taken).unwrap_or(usize::MAX));
            return Ok(());
        }
        if self.json {
            return show(&io::stdout(), format!("{params}\n").as_bytes());
        }
        let data = Base64::decode_vec(params["data"].as_str().unwrap_or_default())
            .map_err(|error| Problem::Garbled(error.to_string()))?;
        match params["stream"].as_str() {
            Some("stderr") => show(&io::stderr(), &data),
            _ => show(&io::stdout(), &data),
        }
    }
}

/// Writes at once, and around std's buffer.
fn show(to: &impl AsFd, data: &[u8]) -> Result<()> {
    let mut file = File::from(to.as_fd().try_clone_to_owned()?);
    file.write_all(data).map_err(|error| Problem::Taker(error).into())
}
