//! Start of an init.

use std::sync::Arc;

use super::Tasks;
use super::container::Container;
use super::process::Step;
use crate::error::{Error, Kind};
use crate::worker::client::Streams;
use crate::worker::{Reply, Request, start};

impl Tasks {
    /// Starts a container's init, or an exec, and answers its pid.
    ///
    /// # Errors
    /// FailedPrecondition unless it waits for its start.
    pub async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<i32, Error> {
        let container = self.container(id)?;
        if exec.is_empty() { self.start_init(&container).await } else { self.start_exec(&container, exec).await }
    }

    async fn start_init(&self, container: &Arc<Container>) -> Result<i32, Error> {
        let pid = container.init.step(Step::Start)?.pid();
        let started = if container.start_hooks {
            self.start_with_hooks(container).await
        } else {
            // No await until the start is told: the exit that may follow at once is read from the reaper only after it.
            start::notify(&container.id)
        };
        // Also after a failure: the process is there, and its exit will come.
        container.init.step(Step::Started(pid))?;
        match started {
            Ok(()) => {
                self.tell_started(&container.init);
                Ok(pid)
            }
            Err(error) => {
                match self.reaper.kill(pid, libc::SIGKILL) {
                    Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                    Err(kill) => {
                        tracing::error!(container = container.id, error = %kill, "kill an init that did not start")
                    }
                }
                Err(error)
            }
        }
    }

    async fn start_with_hooks(&self, container: &Container) -> Result<(), Error> {
        let creation = self.reaper.creation();
        let request = Request::Start { id: container.id.clone() };
        match self.workers.run(&creation, &request, Streams::default()).await? {
            Reply::Done => Ok(()),
            other => Err(Error::new(Kind::Internal, format!("start {}: a worker answered {other:?}", container.id))),
        }
    }
}
