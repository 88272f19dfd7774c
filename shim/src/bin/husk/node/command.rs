//! Runs a program of the node to its end, with a deadline.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use husk_shim::host::process::{pidfd_open, wait_dead};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Where the node's programs are. The environment of a container that installs husk names its own.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Output of a program that is kept, bytes. `containerd config dump` prints some 15 KiB.
const MAX_OUTPUT: u64 = 1 << 20;

/// Why a program has not done its work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    /// It cannot be started.
    #[error("start {program:?}")]
    Start { program: String, source: io::Error },
    /// A system call for waiting or for the output failed.
    #[error("{what} of {program:?}")]
    Io { what: &'static str, program: String, source: io::Error },
    /// It did not end in time.
    #[error("{line:?} did not exit within {} s", within.as_secs())]
    Deadline { line: String, within: Duration },
    /// It failed.
    #[error("{line:?} failed ({status}): {message}")]
    Failed { line: String, status: ExitStatus, message: String },
}

/// Runs the program and returns its stdout.
pub(crate) fn run(command: &mut Command, within: Duration) -> Result<String, CommandError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line = words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let failed = |what| {
        let program = program.clone();
        move |source| CommandError::Io { what, program, source }
    };
    // Files instead of pipes: the program never waits for a reader.
    let (out, mut out_reader) = buffer().map_err(failed("create a buffer for the output"))?;
    let (errors, mut errors_reader) = buffer().map_err(failed("create a buffer for the output"))?;
    command.env("PATH", PATH).stdin(Stdio::null()).stdout(out).stderr(errors);
    let mut child = command.spawn().map_err(|source| CommandError::Start { program: program.clone(), source })?;
    let ended = pidfd_open(child.id()).and_then(|pidfd| pidfd.map_or(Ok(true), |pidfd| wait_dead(pidfd, within)));
    if !matches!(ended, Ok(true)) {
        child.kill().map_err(failed("kill the process"))?;
    }
    let status = child.wait().map_err(failed("read the exit status"))?;
    if !ended.map_err(failed("wait for the end"))? {
        return Err(CommandError::Deadline { line, within });
    }
    let stdout = text(&mut out_reader).map_err(failed("read the output"))?;
    if !status.success() {
        let mut message = text(&mut errors_reader).map_err(failed("read the output"))?;
        message.push_str(&stdout);
        return Err(CommandError::Failed { line, status, message: message.trim().to_owned() });
    }
    Ok(stdout)
}

fn buffer() -> io::Result<(File, File)> {
    let file = File::from(memfd_create(c"output", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from)?);
    let reader = file.try_clone()?;
    Ok((file, reader))
}

fn text(file: &mut File) -> io::Result<String> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(MAX_OUTPUT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
