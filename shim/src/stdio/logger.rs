//! A logging program, which takes a process's output (containerd's `binary://`): stdout on descriptor 3, stderr on 4; it closes 5, or
//! writes to it, when it is ready.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::time::timeout;

use crate::host::child::{Child, Launch};
use crate::stdio::{Error, Sink};

/// The descriptors of the protocol.
const STDOUT: i32 = 3;
const STDERR: i32 = 4;
const READY: i32 = 5;

/// Time that it has to get ready; the container's creation waits for it.
const READY_WAIT: Duration = Duration::from_secs(10);
/// Time that it has to end by itself when its input has ended.
const END_WAIT: Duration = Duration::from_secs(2);
/// Time that it has after SIGTERM, as containerd gives it.
const TERM_WAIT: Duration = Duration::from_secs(10);
/// Time that the end of a process that is ending already may take to be seen.
const DEATH_WAIT: Duration = Duration::from_secs(1);

/// A running logging program. It is killed when it is dropped, with what it has started, and when the shim ends, however that comes.
#[derive(Debug)]
pub struct Logger {
    path: PathBuf,
    child: Child,
}

impl Logger {
    /// Starts it, and waits until it is ready. The sinks are its stdout's and its stderr's pipe.
    ///
    /// # Errors
    /// [`Error::Logger`] when it does not start, or does not get ready in time.
    pub async fn start(
        field: &'static str,
        path: &Path,
        args: Vec<OsString>,
        container: &str,
        namespace: &str,
    ) -> Result<(Self, [Sink; 2]), Error> {
        let failed = |problem: String| Error::Logger { field, path: path.to_owned(), problem };
        let told = |error: std::io::Error| failed(error.to_string());
        let pipes = || Ok([pipe2(OFlag::O_CLOEXEC)?, pipe2(OFlag::O_CLOEXEC)?, pipe2(OFlag::O_CLOEXEC)?]);
        let [stdout, stderr, ready] = pipes().map_err(|error: nix::Error| told(error.into()))?;
        let sink = |fd: OwnedFd| pipe::Sender::from_owned_fd(fd).map(Sink::Pipe).map_err(told);
        let sinks = [sink(stdout.1)?, sink(stderr.1)?];
        let mut is_ready = pipe::Receiver::from_owned_fd(ready.0).map_err(told)?;
        let nowhere = || File::options().read(true).write(true).open("/dev/null").map_err(told);
        let launch = Launch {
            program: path.to_owned(),
            args,
            env: vec![("CONTAINER_ID".into(), container.into()), ("CONTAINER_NAMESPACE".into(), namespace.into())],
            fds: vec![(stdout.0, STDOUT), (stderr.0, STDERR), (ready.1, READY)],
            user: None,
            output: nowhere()?,
            cgroups: Vec::new(),
            leads: true,
        };
        let child = launch.spawn().map_err(|error| failed(error.to_string()))?;
        let logger = Self { path: path.to_owned(), child };
        match timeout(READY_WAIT, is_ready.read_u8()).await {
            Err(_) => Err(failed(format!("did not say within {READY_WAIT:?} that it is ready"))),
            Ok(Ok(_)) => Ok((logger, sinks)),
            Ok(Err(_)) if logger.has_descriptors() => Ok((logger, sinks)),
            // Its end has closed the descriptor, not itself.
            Ok(Err(_)) => match timeout(DEATH_WAIT, logger.child.exited()).await {
                Ok(ended) => Err(failed(format!("{ended} before it was ready"))),
                Err(_) => Err(failed("ended before it was ready".to_owned())),
            },
        }
    }

    /// The kernel takes a process's table of descriptors away before it closes what was in it (do_exit, exit_files): one that has closed its
    /// READY by itself still has others.
    fn has_descriptors(&self) -> bool {
        let folder = format!("/proc/{}/fd", self.child.process().pid);
        fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
    }

    /// Waits for its end. Its pipes must have been closed, which tells it that nothing more comes; if it does not end then, it is made to.
    pub async fn end(self) {
        if timeout(END_WAIT, self.child.exited()).await.is_ok() {
            return;
        }
        self.child.signal(libc::SIGTERM);
        if timeout(TERM_WAIT, self.child.exited()).await.is_err() {
            tracing::warn!(program = %self.path.display(), "the logging program does not end, and is killed");
        }
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        self.child.kill();
    }
}
