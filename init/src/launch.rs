//! The step between PID 1 and a program that it starts beside the containers, the supervisor agent or an operator's: what the program must not have of PID 1 is taken off in a process between
//! the two, PID 1's own program once more, which then becomes it. (PID 1 cannot do that between a fork and an exec: it does not fork.)
//!
//! Why it could not be done comes back through a pipe, which an exec that succeeds closes.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

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
use crate::error::{Error, Kind};
use crate::reaper::{Exit, Reaper};
use crate::spawn::{self, Streams};

/// argv[0] of a process that is about to become a program.
pub const NAME: &str = "husk-program";
/// Where it says why it cannot.
const STATUS_FD: i32 = 3;
/// Most bytes of that.
const STATUS_MAX: u64 = 1024;
/// Open files at first, as everywhere; a program may raise it.
const OPEN_FILES: u64 = 1024;
/// Until it has become its program. A program on the share has to be read from the host.
const DEADLINE: Duration = Duration::from_secs(20);

/// The controlling terminal of a program.
#[derive(Debug, Clone, Copy)]
pub enum Terminal<'a> {
    /// It has none.
    None,
    /// What its stdin is.
    Stdin,
    /// This device, which is made fit for people, and becomes its streams.
    Device(&'a str),
}

/// What is to be started.
#[derive(Debug)]
pub struct Program<'a> {
    /// Its name, searched in PATH if it has no slash, and its arguments.
    pub args: &'a [String],
    /// All of its environment.
    pub env: &'a [String],
    /// Where it begins.
    pub cwd: &'a str,
    /// The cgroup that it is in, and all that it starts.
    pub group: &'a Path,
    /// How soon the OOM killer takes it (proc_pid_oom_score_adj(5)).
    pub oom_score_adj: &'a str,
    /// Of the session that it leads.
    pub terminal: Terminal<'a>,
}

/// Starts a program; its pid, and where its exit will be told.
///
/// # Errors
/// NotFound when there is no such program, FailedPrecondition when it cannot be executed, InvalidArgument when it cannot be in its folder.
pub async fn launch(
    reaper: &Arc<Reaper>,
    program: &Program<'_>,
    streams: Streams,
) -> Result<(i32, oneshot::Receiver<Exit>), Error> {
    let failed = |error: std::io::Error| Error::internal("start a process", &error);
    let group = program.group.to_string_lossy();
    let terminal = match program.terminal {
        Terminal::None => "",
        Terminal::Stdin => "-",
        Terminal::Device(path) => path,
    };
    let own = [NAME, &group, program.oom_score_adj, program.cwd, terminal];
    let args = words(own.into_iter().chain(program.args.iter().map(String::as_str)))?;
    let env = words(program.env.iter().map(String::as_str))?;

    let (status, theirs) = pipe2(OFlag::O_CLOEXEC).map_err(|e| failed(e.into()))?;
    let creation = reaper.creation();
    let pid = spawn::again(&args, &env, &streams, &[(&theirs, STATUS_FD)], false).map_err(failed)?;
    let exit = creation.exit_of(pid);
    // Their ends are the process's alone now: without that, neither pipe would ever come to its end.
    drop((theirs, streams));

    let mut said = Vec::new();
    let mut status = Receiver::from_owned_fd(status).map_err(failed)?.take(STATUS_MAX);
    match timeout(DEADLINE, status.read_to_end(&mut said)).await {
        Ok(Ok(0)) => Ok((pid, exit)),
        Ok(Ok(_)) => Err(refusal(&said)),
        Ok(Err(error)) => Err(failed(error)),
        Err(_) => {
            // It may have ended just now.
            let _ = reaper.kill(pid, libc::SIGKILL);
            Err(Error::new(Kind::DeadlineExceeded, format!("{:?} did not start within {DEADLINE:?}", program.args[0])))
        }
    }
}

fn words<'a>(words: impl Iterator<Item = &'a str>) -> Result<Vec<CString>, Error> {
    let words = words.map(CString::new).collect::<Result<_, _>>();
    words.map_err(|_| Error::new(Kind::InvalidArgument, "an argument or a variable has a NUL in it"))
}

/// Why a process did not become its program, as it goes through the pipe: a letter for the kind, and the words.
fn refusal(said: &[u8]) -> Error {
    let kind = match said.first() {
        Some(b'n') => Kind::NotFound,
        Some(b'x') => Kind::FailedPrecondition,
        Some(b'c') => Kind::InvalidArgument,
        _ => Kind::Internal,
    };
    Error::new(kind, String::from_utf8_lossy(said.get(1..).unwrap_or_default()))
}

struct Refused(u8, String);

/// Names the step in a refusal.
fn step<T, E: std::fmt::Display>(what: &str, done: Result<T, E>) -> Result<T, Refused> {
    done.map_err(|error| Refused(b'i', format!("{what}: {error}")))
}

/// In the new process: becomes the program that `args` say, or tells why not.
pub fn become_program(args: impl Iterator<Item = String>) -> ExitCode {
    let args: Vec<String> = args.collect();
    let Err(Refused(kind, words)) = prepare(&args);
    // SAFETY: PID 1 has put the pipe on this descriptor, and nothing else in this process has taken it.
    let mut status = File::from(unsafe { OwnedFd::from_raw_fd(STATUS_FD) });
    // PID 1 may have given it up; then nobody wants to know.
    let _ = status.write_all(&[&[kind], words.as_bytes()].concat());
    ExitCode::FAILURE
}

fn prepare(args: &[String]) -> Result<Infallible, Refused> {
    let [group, oom_score_adj, cwd, terminal, program @ ..] = args else {
        return Err(Refused(b'i', "too few arguments".into()));
    };
    // SAFETY: as in become_program; it is open until the exec.
    let status = unsafe { BorrowedFd::borrow_raw(STATUS_FD) };
    step("keep the pipe", fcntl(status, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)))?;
    step("enter the cgroup", fs::write(format!("{group}/cgroup.procs"), "0"))?;
    step("set oom_score_adj", fs::write("/proc/self/oom_score_adj", oom_score_adj))?;
    step("reset the personality", boot::randomize_addresses())?;
    let most = step("read the limit of open files", getrlimit(Resource::RLIMIT_NOFILE))?.1;
    step("set the limit of open files", setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, most))?;
    step("begin a session", setsid())?;
    match terminal.as_str() {
        "" => {}
        "-" => step("take the terminal", control_terminal())?,
        device => step(device, take_device(device))?,
    }
    chdir(cwd.as_str()).map_err(|error| Refused(b'c', format!("chdir to {cwd:?}: {}", error.desc())))?;
    // Rust's runtime ignores it, and an exec would pass that on.
    // SAFETY: the default action is no handler that could do anything wrong.
    step("reset SIGPIPE", unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) })?;
    let name = program.first().map_or("", String::as_str);
    let program: Vec<CString> = program.iter().map(|word| CString::new(word.as_str()).unwrap_or_default()).collect();
    let Err(error) = execvp(&CString::new(name).unwrap_or_default(), &program);
    Err(explain(name, error))
}

/// In the words that containers' errors have (runc's, and so Go's).
fn explain(name: &str, error: Errno) -> Refused {
    match error {
        Errno::ENOENT if !name.contains('/') => {
            Refused(b'n', format!("exec: {name:?}: executable file not found in $PATH"))
        }
        Errno::ENOENT => Refused(b'n', format!("exec: {name:?}: no such file or directory")),
        Errno::EACCES | Errno::ENOEXEC | Errno::EISDIR | Errno::EPERM | Errno::ENOTDIR => {
            Refused(b'x', format!("exec: {name:?}: {}", error.desc().to_lowercase()))
        }
        other => Refused(b'i', format!("exec: {name:?}: {}", other.desc().to_lowercase())),
    }
}

/// Makes stdin this session's controlling terminal.
fn control_terminal() -> nix::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    Errno::result(unsafe { libc::ioctl(0, libc::TIOCSCTTY as _, 0) }).map(drop)
}

fn take_device(path: &str) -> nix::Result<()> {
    let device = open(path, OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC, Mode::empty())?;
    dup2_stdin(&device)?;
    dup2_stdout(&device)?;
    dup2_stderr(&device)?;
    control_terminal()?;
    make_sane(device)
}

/// What the last program has left of the terminal's modes, be it an editor that was killed, is put right; as stty(1)'s `sane`, but for IXON: a
/// Ctrl-S would stop all that is written to the console, PID 1's log too.
fn make_sane(device: OwnedFd) -> nix::Result<()> {
    let mut modes = termios::tcgetattr(&device)?;
    modes.input_flags = InputFlags::ICRNL | InputFlags::IUTF8 | InputFlags::BRKINT;
    modes.output_flags = OutputFlags::OPOST | OutputFlags::ONLCR;
    modes.control_flags |= ControlFlags::CREAD | ControlFlags::CLOCAL;
    let erasing = LocalFlags::ECHOE | LocalFlags::ECHOK | LocalFlags::ECHOCTL | LocalFlags::ECHOKE;
    modes.local_flags = LocalFlags::ISIG | LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::IEXTEN | erasing;
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
    fn a_refusal_comes_through_the_pipe_as_it_was() {
        let cases = [
            ("x", Errno::ENOENT, Kind::NotFound, "exec: \"x\": executable file not found in $PATH"),
            ("/x", Errno::ENOENT, Kind::NotFound, "exec: \"/x\": no such file or directory"),
            ("/x", Errno::EACCES, Kind::FailedPrecondition, "exec: \"/x\": permission denied"),
            ("/x", Errno::E2BIG, Kind::Internal, "exec: \"/x\": argument list too long"),
        ];
        for (name, errno, kind, words) in cases {
            let Refused(letter, said) = explain(name, errno);
            let error = refusal(&[&[letter], said.as_bytes()].concat());
            assert_eq!((error.kind, error.message.as_str()), (kind, words));
        }
    }

    #[test]
    fn a_word_with_a_nul_is_refused() {
        assert_eq!(words(["a", "b\0c"].into_iter()).unwrap_err().kind, Kind::InvalidArgument);
    }
}
