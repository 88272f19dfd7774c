//! Terminals of processes: made together with the process, and resized.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::timeout;

use super::Tasks;
use super::process::State;
use crate::error::{Error, Kind};
use crate::io::{ProcessStreams, Size, StreamSet, TerminalSpec};
use crate::places;
use crate::reaper::Creation;
use crate::worker::client::Streams;
use crate::worker::console::Console;
use crate::worker::{Reply, Request};

/// What a container's spec says of its init's terminal, or, with the file of an exec's process, of that one's.
pub(super) fn wish(id: &str, exec: Option<&Path>) -> Result<TerminalSpec, Error> {
    let read =
        |path: &Path| std::fs::read(path).map_err(|e| Error::internal(format_args!("read {}", path.display()), &e));
    let config = read(&places::bundle(id).join("config.json"))?;
    let exec = exec.map(read).transpose()?;
    TerminalSpec::read(&config, exec.as_deref())
        .map_err(|e| Error::new(Kind::InvalidArgument, format!("the terminal of a process in {id}: {e}")))
}

impl Tasks {
    /// Has a worker make a process with a terminal, and the terminal ready before the process runs. `request` gets the console's path.
    pub(super) async fn run_with_terminal(
        &self,
        creation: &Creation,
        request: impl FnOnce(PathBuf) -> Request,
        streams: &ProcessStreams,
        wanted: StreamSet,
        wish: TerminalSpec,
    ) -> Result<Reply, Error> {
        let (console, gate) = Console::new().map_err(|e| Error::internal("make a console", &e))?;
        let request = request(console.path().to_owned());
        let ends = Streams { gate: Some(gate), ..Streams::default() };
        let work = self.workers.run(creation, &request, ends);
        tokio::pin!(work);
        let (received, answered) = terminal_of(console.receive(), work.as_mut()).await?;
        let opened = received.and_then(|master| {
            streams.open_terminal(master, wish, wanted)?;
            console.open_gate()
        });
        if opened.is_err() {
            // A process that waits for its terminal ends.
            drop(console);
        }
        // A process that has failed does not pass its gate: what is wrong with it is the better answer.
        let reply = match answered {
            Some(reply) => reply,
            None => work.await?,
        };
        opened.map_err(|e| Error::internal("open a terminal", &e)).map(|()| reply)
    }

    /// Changes the size of a process's terminal, or the one that it will have at its start. One without a terminal has nothing to
    /// change, which clients of runc's shim are told is fine.
    ///
    /// # Errors
    /// FailedPrecondition when it has ended.
    pub fn resize(&self, id: &str, exec: &str, size: Size) -> Result<(), Error> {
        let process = self.container(id)?.process(exec)?;
        if matches!(process.state(), State::Stopped { .. } | State::Deleted) {
            return Err(Error::new(Kind::FailedPrecondition, "cannot resize a stopped container"));
        }
        process.streams.resize(size).map_err(|e| Error::internal(format_args!("resize the terminal of {id}"), &e))
    }
}

/// Time that a terminal may take to be taken in once its worker has answered: it was sent before, and lies in its socket.
const ARRIVAL: Duration = Duration::from_secs(5);

/// The terminal that the worker's process sends, and the worker's reply if that was noticed first.
///
/// A busy PID 1 hears of both at once, and it takes two turns to receive the one, but a single one to receive the other.
async fn terminal_of(
    terminal: impl Future<Output = io::Result<OwnedFd>>,
    work: impl Future<Output = Result<Reply, Error>>,
) -> Result<(io::Result<OwnedFd>, Option<Reply>), Error> {
    tokio::pin!(terminal);
    let reply = tokio::select! {
        biased;
        received = &mut terminal => return Ok((received, None)),
        reply = work => reply?,
    };
    match timeout(ARRIVAL, terminal).await {
        Ok(received) => Ok((received, Some(reply))),
        Err(_) => Err(Error::new(Kind::Internal, format!("a worker answered {reply:?} without a terminal"))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_terminal_counts_that_comes_in_after_its_workers_reply() {
        let late = async {
            tokio::task::yield_now().await;
            Ok(OwnedFd::from(File::open("/dev/null")?))
        };
        let (received, reply) = terminal_of(late, ready(Ok(Reply::Done))).await.unwrap();
        assert!(received.is_ok() && matches!(reply, Some(Reply::Done)));
        let (received, reply) = terminal_of(ready(Err(io::ErrorKind::InvalidData.into())), pending()).await.unwrap();
        assert!(received.is_err() && reply.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_terminal_that_never_comes_is_not_waited_for() {
        let refused = terminal_of(pending(), ready(Err(Error::new(Kind::InvalidArgument, "why")))).await.unwrap_err();
        assert_eq!(refused.message, "why");
        let without = terminal_of(pending(), ready(Ok(Reply::Done))).await.unwrap_err();
        assert_eq!(without.message, "a worker answered Done without a terminal");
    }
}
