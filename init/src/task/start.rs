//! Start of a container's init.

use std::sync::Arc;

use nix::errno::Errno;

use super::Tasks;
use super::container::Container;
use super::process::Transition;
use crate::error::CallError;
use crate::spawn::ChildStreams;
use crate::worker::{Reply, Request, start};

impl Tasks {
    /// Starts a container's init, or an exec, and returns its PID. Fails with FailedPrecondition unless the process
    /// waits for its start.
    pub(crate) async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<i32, CallError> {
        let container = self.container(id)?;
        if exec.is_empty() { self.start_init(&container).await } else { self.start_exec(&container, exec).await }
    }

    async fn start_init(&self, container: &Arc<Container>) -> Result<i32, CallError> {
        let pid = container.init.apply(Transition::Start)?.pid();
        let started = if container.start_hooks {
            self.start_with_hooks(container).await
        } else {
            // No await until the start is published: the exit, which may follow at once, is taken from the reaper after
            // it.
            start::notify(&container.id)
        };
        // Also after a failure: the process exists, and its exit will arrive.
        container.init.apply(Transition::Started(pid))?;
        match started {
            Ok(()) => {
                self.publish_start(&container.init);
                Ok(pid)
            }
            Err(error) => {
                match self.reaper.kill(pid, libc::SIGKILL) {
                    Ok(()) | Err(Errno::ESRCH) => {}
                    Err(error) => {
                        tracing::error!(container = container.id, %error, "failed to kill an init that did not start");
                    }
                }
                Err(error)
            }
        }
    }

    async fn start_with_hooks(&self, container: &Container) -> Result<(), CallError> {
        let creation = self.reaper.creation();
        let request = Request::Start { id: container.id.clone() };
        match self.workers.run(&creation, &request, ChildStreams::default()).await? {
            Reply::Done => Ok(()),
            other => Err(other.unexpected(&format!("start {}", container.id))),
        }
    }
}
