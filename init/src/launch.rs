//! Starts programs outside of containers: the supervisor agent and an operator's commands. PID 1 executes its own
//! binary under [`NAME`]; that intermediate process resets what a program must not inherit from PID 1 and executes the
//! program. (PID 1 does not fork, so it cannot do this between fork and exec.)
//!
//! The intermediate process reports a failure through a pipe, which a successful exec closes.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use husk_protos::chain::Chain;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl, open};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::stat::Mode;
use nix::sys::termios::{self, ControlFlags, InputFlags, LocalFlags, OutputFlags, SetArg, SpecialCharacterIndices};
use nix::unistd::{chdir, dup2_stderr, dup2_stdin, dup2_stdout, execvp, pipe2, setsid};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::boot;
use crate::error::{CallError, FailureKind};
use crate::reaper::{Exit, Reaper};
use crate::spawn::{self, ChildStreams};

/// argv\[0\] of the intermediate process.
pub(crate) const NAME: &str = "husk-program";
/// Descriptor on which the intermediate process reports its failure.
const STATUS_FD: i32 = 3;
/// Most bytes of a failure report.
const STATUS_MAX: u64 = 1024;
/// Initial soft limit of open files, the usual default. A program may raise it.
const OPEN_FILES: u64 = 1024;
/// Time until the exec. The host has to deliver a program that is on the share.
const DEADLINE: Duration = Duration::from_secs(20);

/// The controlling terminal of a program.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ControllingTerminal<'a> {
    None,
    /// The program's stdin.
    Stdin,
    /// This device. It is reset to sane modes and becomes the program's standard streams.
    Device(&'a str),
}

/// A program to start.
#[derive(Debug)]
pub(crate) struct Program<'a> {
    /// Its name, which is searched for in PATH unless it contains a slash, and its arguments.
    pub(crate) args: &'a [String],
    /// Its complete environment.
    pub(crate) env: &'a [String],
    /// Its working directory.
    pub(crate) cwd: &'a str,
    /// The cgroup of the program and its children.
    pub(crate) group: &'a Path,
    /// proc_pid_oom_score_adj(5).
    pub(crate) oom_score_adj: &'a str,
    /// The program leads a new session.
    pub(crate) terminal: ControllingTerminal<'a>,
}

/// Starts a program. Returns its PID and the receiver of its exit.
///
/// # Errors
/// NotFound when the program does not exist, FailedPrecondition when it is not executable, InvalidArgument when its
/// working directory is unusable.
pub(crate) async fn launch(
    reaper: &Arc<Reaper>,
    program: &Program<'_>,
    streams: ChildStreams,
) -> Result<(i32, oneshot::Receiver<Exit>), CallError> {
    let failed = |error: std::io::Error| CallError::internal("start a process", &error);
    let group = program.group.to_string_lossy();
    let terminal = match program.terminal {
        ControllingTerminal::None => "",
        ControllingTerminal::Stdin => "-",
        ControllingTerminal::Device(path) => path,
    };
    let own = [NAME, &group, program.oom_score_adj, program.cwd, terminal];
    let args = c_strings(own.into_iter().chain(program.args.iter().map(String::as_str)))?;
    let env = c_strings(program.env.iter().map(String::as_str))?;

    let (status, status_writer) = pipe2(OFlag::O_CLOEXEC).map_err(|e| failed(e.into()))?;
    let creation = reaper.creation();
    let pid = spawn::spawn_self(&args, &env, &streams, &[(&status_writer, STATUS_FD)], false).map_err(failed)?;
    let exit = creation.exit_of(pid);
    // Only the new process may hold these ends, or the pipes would never reach end of file.
    drop((status_writer, streams));

    let mut report = Vec::new();
    let mut status = Receiver::from_owned_fd(status).map_err(failed)?.take(STATUS_MAX);
    match timeout(DEADLINE, status.read_to_end(&mut report)).await {
        Ok(Ok(0)) => Ok((pid, exit)),
        Ok(Ok(_)) => Err(parse_failure(&report)),
        Ok(Err(error)) => Err(failed(error)),
        Err(_) => {
            // Fails when the process has just exited.
            let _ = reaper.kill(pid, libc::SIGKILL);
            Err(CallError::new(
                FailureKind::DeadlineExceeded,
                format!("{:?} did not start within {DEADLINE:?}", program.args[0]),
            ))
        }
    }
}

fn c_strings<'a>(strings: impl Iterator<Item = &'a str>) -> Result<Vec<CString>, CallError> {
    let strings = strings.map(CString::new).collect::<Result<_, _>>();
    strings.map_err(|_| {
        CallError::new(FailureKind::InvalidArgument, "an argument or environment variable contains a NUL byte")
    })
}

/// Parses a failure report: one byte for the kind, then the message.
fn parse_failure(report: &[u8]) -> CallError {
    let kind = match report.first() {
        Some(b'n') => FailureKind::NotFound,
        Some(b'x') => FailureKind::FailedPrecondition,
        Some(b'c') => FailureKind::InvalidArgument,
        _ => FailureKind::Internal,
    };
    CallError::new(kind, String::from_utf8_lossy(report.get(1..).unwrap_or_default()))
}

/// Why the intermediate process failed: the byte for the kind, and the message.
struct LaunchFailure(u8, String);

/// Adds the name of a step to its error.
fn step<T, E: std::error::Error>(name: &str, result: Result<T, E>) -> Result<T, LaunchFailure> {
    result.map_err(|error| LaunchFailure(b'i', format!("{name}: {}", Chain(&error))))
}

/// Runs in the intermediate process: executes the program that `args` describe, or reports the failure.
pub(crate) fn become_program(args: impl Iterator<Item = String>) -> ExitCode {
    let args: Vec<String> = args.collect();
    let Err(LaunchFailure(kind, message)) = prepare(&args);
    // SAFETY: PID 1 has put the pipe on this descriptor, and nothing else in this process owns it.
    let mut status = File::from(unsafe { OwnedFd::from_raw_fd(STATUS_FD) });
    // Fails when PID 1 has stopped waiting; nobody needs the report then.
    let _ = status.write_all(&[&[kind], message.as_bytes()].concat());
    ExitCode::FAILURE
}

fn prepare(args: &[String]) -> Result<Infallible, LaunchFailure> {
    let [group, oom_score_adj, cwd, terminal, program @ ..] = args else {
        return Err(LaunchFailure(b'i', "too few arguments".into()));
    };
    // SAFETY: PID 1 has put the pipe on this descriptor; it stays open until the exec.
    let status = unsafe { BorrowedFd::borrow_raw(STATUS_FD) };
    step("keep the pipe", fcntl(status, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)))?;
    step("enter the cgroup", fs::write(format!("{group}/cgroup.procs"), "0"))?;
    step("set oom_score_adj", fs::write("/proc/self/oom_score_adj", oom_score_adj))?;
    step("reset the personality", boot::randomize_addresses())?;
    let hard_limit = step("read the limit of open files", getrlimit(Resource::RLIMIT_NOFILE))?.1;
    step("set the limit of open files", setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, hard_limit))?;
    step("start a session", setsid())?;
    match terminal.as_str() {
        "" => {}
        "-" => step("acquire the terminal", control_terminal())?,
        device => step(device, use_device(device))?,
    }
    chdir(cwd.as_str()).map_err(|error| LaunchFailure(b'c', format!("chdir to {cwd:?}: {}", error.desc())))?;
    // Rust's runtime ignores SIGPIPE, and a program would inherit that.
    // SAFETY: installs the default action, not a handler.
    step("reset SIGPIPE", unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) })?;
    let name = program.first().map_or("", String::as_str);
    let program: Vec<CString> = program.iter().map(|arg| CString::new(arg.as_str()).unwrap_or_default()).collect();
    let Err(error) = execvp(&CString::new(name).unwrap_or_default(), &program);
    Err(explain(name, error))
}

/// Describes a failed exec as runc (and so Go) does, which is also how the errors of containers read.
fn explain(name: &str, error: Errno) -> LaunchFailure {
    match error {
        Errno::ENOENT if !name.contains('/') => {
            LaunchFailure(b'n', format!("exec: {name:?}: executable file not found in $PATH"))
        }
        Errno::ENOENT => LaunchFailure(b'n', format!("exec: {name:?}: no such file or directory")),
        Errno::EACCES | Errno::ENOEXEC | Errno::EISDIR | Errno::EPERM | Errno::ENOTDIR => {
            LaunchFailure(b'x', format!("exec: {name:?}: {}", error.desc().to_lowercase()))
        }
        other => LaunchFailure(b'i', format!("exec: {name:?}: {}", other.desc().to_lowercase())),
    }
}

/// Makes stdin the session's controlling terminal.
fn control_terminal() -> nix::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    Errno::result(unsafe { libc::ioctl(0, libc::TIOCSCTTY as _, 0) }).map(drop)
}

fn use_device(path: &str) -> nix::Result<()> {
    let device = open(path, OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC, Mode::empty())?;
    dup2_stdin(&device)?;
    dup2_stdout(&device)?;
    dup2_stderr(&device)?;
    control_terminal()?;
    make_sane(device)
}

/// Resets the terminal modes, which the last program may have left unusable: like stty(1)'s `sane`, but without IXON.
/// With it, a Ctrl-S would stop all output to the console, including PID 1's log.
fn make_sane(device: OwnedFd) -> nix::Result<()> {
    let mut modes = termios::tcgetattr(&device)?;
    modes.input_flags = InputFlags::ICRNL | InputFlags::IUTF8 | InputFlags::BRKINT;
    modes.output_flags = OutputFlags::OPOST | OutputFlags::ONLCR;
    modes.control_flags |= ControlFlags::CREAD | ControlFlags::CLOCAL;
    let erase = LocalFlags::ECHOE | LocalFlags::ECHOK | LocalFlags::ECHOCTL | LocalFlags::ECHOKE;
    modes.local_flags = LocalFlags::ISIG | LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::IEXTEN | erase;
    // Ctrl-C, Ctrl-\, DEL, Ctrl-U, Ctrl-D, Ctrl-Z (INIT_C_CC in the kernel's asm-generic/termios.h).
    let keys = [
        (SpecialCharacterIndices::VINTR, 3),
        (SpecialCharacterIndices::VQUIT, 28),
        (SpecialCharacterIndices::VERASE, 127),
        (SpecialCharacterIndices::VKILL, 21),
        (SpecialCharacterIndices::VEOF, 4),
        (SpecialCharacterIndices::VSUSP, 26),
        (SpecialCharacterIndices::VMIN, 1),
        (SpecialCharacterIndices::VTIME, 0),
    ];
    for (key, byte) in keys {
        modes.control_chars[key as usize] = byte;
    }
    termios::tcsetattr(&device, SetArg::TCSANOW, &modes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_exec_keeps_its_kind_and_message_across_the_pipe() {
        let cases = [
            ("x", Errno::ENOENT, FailureKind::NotFound, "exec: \"x\": executable file not found in $PATH"),
            ("/x", Errno::ENOENT, FailureKind::NotFound, "exec: \"/x\": no such file or directory"),
            ("/x", Errno::EACCES, FailureKind::FailedPrecondition, "exec: \"/x\": permission denied"),
            ("/x", Errno::E2BIG, FailureKind::Internal, "exec: \"/x\": argument list too long"),
        ];
        for (name, errno, kind, expected) in cases {
            let LaunchFailure(letter, message) = explain(name, errno);
            let error = parse_failure(&[&[letter], message.as_bytes()].concat());
            assert_eq!((error.kind, error.message.as_str()), (kind, expected));
        }
    }

    #[test]
    fn an_argument_with_a_nul_byte_is_rejected() {
        assert_eq!(c_strings(["a", "b\0c"].into_iter()).unwrap_err().kind, FailureKind::InvalidArgument);
    }
}
