//! Terminals of processes: made together with the process, and resized.

use std::path::{Path, PathBuf};

use super::Tasks;
use super::process::State;
use crate::error::{Error, Kind};
use crate::io::{ProcessStreams, Size, Wanted, Wish};
use crate::places;
use crate::reaper::Creation;
use crate::worker::client::Streams;
use crate::worker::console::Console;
use crate::worker::{Reply, Request};

/// What a container's spec says of its init's terminal, or, with the file of an exec's process, of that one's.
pub(super) fn wish(id: &str, exec: Option<&Path>) -> Result<Wish, Error> {
    let read =
        |path: &Path| std::fs::read(path).map_err(|e| Error::internal(format_args!("read {}", path.display()), &e));
    let config = read(&places::bundle(id).join("config.json"))?;
    let exec = exec.map(read).transpose()?;
    Wish::read(&config, exec.as_deref())
        .map_err(|e| Error::new(Kind::InvalidArgument, format!("the terminal of a process in {id}: {e}")))
}

impl Tasks {
    /// Has a worker make a process with a terminal, and the terminal ready before the process runs. `request` gets the console's path.
    pub(super) async fn run_with_terminal(
        &self,
        creation: &Creation,
        request: impl FnOnce(PathBuf) -> Request,
        streams: &ProcessStreams,
        wanted: Wanted,
        wish: Wish,
    ) -> Result<Reply, Error> {
        let (console, gate) = Console::new().map_err(|e| Error::internal("make a console", &e))?;
        let request = request(console.path().to_owned());
        let ends = Streams { gate: Some(gate), ..Streams::default() };
        let work = self.workers.run(creation, &request, ends);
        tokio::pin!(work);
        let received = tokio::select! {
            // The terminal first: its process may have been made already.
            biased;
            received = console.receive() => received,
            reply = &mut work => return no_terminal(reply),
        };
        let opened = received.and_then(|master| {
            streams.open_terminal(master, wish, wanted)?;
            console.open_gate()
        });
        if opened.is_err() {
            // A process that waits for its terminal ends.
            drop(console);
        }
        // A process that has failed does not pass its gate: what is wrong with it is the better answer.
        let reply = work.await?;
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

fn no_terminal(reply: Result<Reply, Error>) -> Result<Reply, Error> {
    let reply = reply?;
    Err(Error::new(Kind::Internal, format!("a worker answered {reply:?} without a terminal")))
}
