//! A logging program that receives a process's output (containerd's `binary://`): stdout on descriptor 3, stderr on 4.
//! The program reports readiness by closing descriptor 5 or writing to it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_protos::chain::Chain;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::time::timeout;

use crate::host::cgroup::home;
use crate::host::child::{Child, Launch};
use crate::stdio::error::StdioError;
use crate::stdio::sink::Sink;

/// The protocol's descriptors.
const STDOUT: i32 = 3;
const STDERR: i32 = 4;
const READY: i32 = 5;

/// Time to become ready. The creation of the container waits for it.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// Time to exit after the end of its input.
const EXIT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time to exit after SIGTERM; containerd's value.
const TERM_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between the closing of a dying process's descriptors and its exit.
const DYING_TIMEOUT: Duration = Duration::from_secs(1);

/// A running logging program. Dropping it kills the program and the processes that it started. They also die with the
/// shim.
#[derive(Debug)]
pub(crate) struct Logger {
    path: PathBuf,
    child: Child,
}

impl Logger {
    /// Starts the program and waits until it is ready. Returns the sinks for stdout and stderr.
    ///
    /// # Errors
    /// [`StdioError::Logger`] when it does not start or does not become ready in time.
    pub(super) async fn start(
        field: &'static str,
        path: &Path,
        args: Vec<OsString>,
        container: &str,
        namespace: &str,
    ) -> Result<(Self, [Sink; 2]), StdioError> {
        let failed = |problem: String| StdioError::Logger { field, path: path.to_owned(), problem };
        let io_failed = |error: io::Error| failed(error.to_string());
        let pipes = || Ok([pipe2(OFlag::O_CLOEXEC)?, pipe2(OFlag::O_CLOEXEC)?, pipe2(OFlag::O_CLOEXEC)?]);
        let [stdout, stderr, ready] = pipes().map_err(|error: nix::Error| io_failed(error.into()))?;
        let sink = |fd: OwnedFd| pipe::Sender::from_owned_fd(fd).map(Sink::Pipe).map_err(io_failed);
        let sinks = [sink(stdout.1)?, sink(stderr.1)?];
        let mut is_ready = pipe::Receiver::from_owned_fd(ready.0).map_err(io_failed)?;
        let launch = Launch {
            program: path.to_owned(),
            args,
            env: vec![("CONTAINER_ID".into(), container.into()), ("CONTAINER_NAMESPACE".into(), namespace.into())],
            fds: vec![(stdout.0, STDOUT), (stderr.0, STDERR), (ready.1, READY)],
            jail: None,
            output: File::options().read(true).write(true).open("/dev/null").map_err(io_failed)?,
            cgroups: home::files().map_err(io_failed)?,
            leads: true,
        };
        let child = launch.spawn().map_err(|error| failed(Chain(&error).to_string()))?;
        let logger = Self { path: path.to_owned(), child };
        match timeout(READY_TIMEOUT, is_ready.read_u8()).await {
            Err(_) => Err(failed(format!("did not report readiness within {READY_TIMEOUT:?}"))),
            Ok(Ok(_)) => Ok((logger, sinks)),
            Ok(Err(_)) if logger.has_descriptors() => Ok((logger, sinks)),
            // The exit closed the descriptor.
            Ok(Err(_)) => match timeout(DYING_TIMEOUT, logger.child.exited()).await {
                Ok(exit) => Err(failed(format!("{exit} before it was ready"))),
                Err(_) => Err(failed("exited before it was ready".to_owned())),
            },
        }
    }

    /// Whether the program has open descriptors. One that only closed READY does. A dying one does not: the kernel
    /// detaches the descriptor table before it closes the files in it (do_exit, exit_files). Not `procfs`'s `fd_count`,
    /// which counts `.` and `..` for a process without descriptors.
    fn has_descriptors(&self) -> bool {
        let folder = format!("/proc/{}/fd", self.child.process().pid);
        fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
    }

    /// Waits for the program's exit, and terminates it if it does not exit. Close its pipes first: the end of its input
    /// asks it to exit.
    pub(crate) async fn end(self) {
        if timeout(EXIT_TIMEOUT, self.child.exited()).await.is_ok() {
            return;
        }
        self.child.signal(libc::SIGTERM);
        if timeout(TERM_TIMEOUT, self.child.exited()).await.is_err() {
            tracing::warn!(program = %self.path.display(), "killing a logging program that ignores SIGTERM");
        }
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        self.child.kill();
    }
}
