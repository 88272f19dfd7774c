//! Terminals of processes: opened while the process is created, and resized later.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_protos::chain::Chain;
use tokio::time::timeout;

use super::Tasks;
use super::process::ProcessState;
use crate::error::{CallError, FailureKind};
use crate::io::{ProcessStreams, Size, StreamSet, TerminalSpec};
use crate::paths;
use crate::reaper::Creation;
use crate::spawn::ChildStreams;
use crate::worker::console::ConsoleSocket;
use crate::worker::{Reply, Request};

/// How long the terminal may take to arrive after the worker's reply. The worker sends it before the reply, so it is
/// already in the socket.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(5);

/// Reads the terminal's properties from the container's spec, and for an exec from the file that holds its process.
pub(super) fn read_spec(id: &str, exec: Option<&Path>) -> Result<TerminalSpec, CallError> {
    let read =
        |path: &Path| std::fs::read(path).map_err(|e| CallError::internal(format_args!("read {}", path.display()), &e));
    let config = read(&paths::bundle(id).join("config.json"))?;
    let exec = exec.map(read).transpose()?;
    TerminalSpec::read(&config, exec.as_deref()).map_err(|e| {
        let what = format!("terminal of a process in {id}: {}", Chain(&e));
        CallError::new(FailureKind::InvalidArgument, what)
    })
}

impl Tasks {
    /// Has a worker create a process with a terminal, and sets the terminal up before the process runs. `request`
    /// receives the path of the console socket.
    pub(super) async fn run_with_terminal(
        &self,
        creation: &Creation,
        request: impl FnOnce(PathBuf) -> Request,
        streams: &ProcessStreams,
        requested: StreamSet,
        spec: TerminalSpec,
    ) -> Result<Reply, CallError> {
        let (console, gate) = ConsoleSocket::new().map_err(|e| CallError::internal("create a console socket", &e))?;
        let request = request(console.path().to_owned());
        let ends = ChildStreams { gate: Some(gate), ..ChildStreams::default() };
        let work = self.workers.run(creation, &request, ends);
        tokio::pin!(work);
        let (received, early_reply) = receive_terminal(console.receive(), work.as_mut()).await?;
        let opened = received.and_then(|master| {
            streams.open_terminal(master, spec, requested)?;
            console.open_gate()
        });
        if opened.is_err() {
            // Ends the process, which waits at the gate.
            drop(console);
        }
        // A process that failed never passes its gate, so both the worker and the terminal report an error. The
        // worker's is the more specific one.
        let reply = match early_reply {
            Some(reply) => reply,
            None => work.await?,
        };
        opened.map_err(|e| CallError::internal("open a terminal", &e)).map(|()| reply)
    }

    /// Resizes a process's terminal, or sets the size that it will start with. Like runc's shim, succeeds for a process
    /// without a terminal. Fails with FailedPrecondition if the process has exited.
    pub(crate) fn resize(&self, id: &str, exec: &str, size: Size) -> Result<(), CallError> {
        let process = self.container(id)?.process(exec)?;
        if matches!(process.state(), ProcessState::Stopped { .. } | ProcessState::Deleted) {
            return Err(CallError::new(FailureKind::FailedPrecondition, "cannot resize a stopped container"));
        }
        process.streams.resize(size).map_err(|e| CallError::internal(format_args!("resize the terminal of {id}"), &e))
    }
}

/// Waits for the terminal that the worker's process sends. Also returns the worker's reply if that arrived first.
///
/// A busy PID 1 may see both at the same time. It takes two polls to receive the terminal, but only one to receive the
/// reply.
async fn receive_terminal(
    terminal: impl Future<Output = io::Result<OwnedFd>>,
    work: impl Future<Output = Result<Reply, CallError>>,
) -> Result<(io::Result<OwnedFd>, Option<Reply>), CallError> {
    tokio::pin!(terminal);
    let reply = tokio::select! {
        biased;
        received = &mut terminal => return Ok((received, None)),
        reply = work => reply?,
    };
    match timeout(ARRIVAL_TIMEOUT, terminal).await {
        Ok(received) => Ok((received, Some(reply))),
        Err(_) => {
            Err(CallError::new(FailureKind::Internal, format!("a worker replied {reply:?} without sending a terminal")))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_terminal_is_received_even_after_the_workers_reply() {
        let late = async {
            tokio::task::yield_now().await;
            Ok(OwnedFd::from(File::open("/dev/null")?))
        };
        let (received, reply) = receive_terminal(late, ready(Ok(Reply::Done))).await.unwrap();
        assert!(received.is_ok() && matches!(reply, Some(Reply::Done)));
        let failed = ready(Err(io::ErrorKind::InvalidData.into()));
        let (received, reply) = receive_terminal(failed, pending()).await.unwrap();
        assert!(received.is_err() && reply.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_missing_terminal_does_not_block_forever() {
        let failed = ready(Err(CallError::new(FailureKind::InvalidArgument, "why")));
        assert_eq!(receive_terminal(pending(), failed).await.unwrap_err().message, "why");
        let missing = receive_terminal(pending(), ready(Ok(Reply::Done))).await.unwrap_err();
        assert_eq!(missing.message, "a worker replied Done without sending a terminal");
    }
}
