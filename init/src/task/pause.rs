//! Pause and Resume.

use std::time::Duration;

use tokio::time::timeout;

use super::Tasks;
use super::container::{Container, Freezer};
use crate::cgroup::freezer;
use crate::error::{Error, Kind};

/// Time that a container's processes may take to stop, or go on: microseconds, unless one waits in the kernel.
const SWITCH: Duration = Duration::from_secs(5);
/// Time that execs which are being started hold a pause up.
const STARTS: Duration = Duration::from_secs(5);

impl Tasks {
    /// Stops all processes of a container where they are.
    ///
    /// # Errors
    /// FailedPrecondition unless it runs; DeadlineExceeded when some of them do not stop: then all go on.
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        container.must_run("pause")?;
        container.switch("pause", Freezer::Thawed, Freezer::Freezing)?;
        let frozen = freeze(&container).await;
        let state = if frozen.is_ok() { Freezer::Frozen } else { Freezer::Thawed };
        container.switch("pause", Freezer::Freezing, state)?;
        frozen?;
        self.tell_paused(&container);
        Ok(())
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// FailedPrecondition unless it is paused.
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        container.must_be_there("resume")?;
        container.switch("resume", Freezer::Frozen, Freezer::Thawing)?;
        let thawed = freezer::thaw(&container.group(), SWITCH)
            .await
            .map_err(|e| Error::internal(format_args!("resume {id}"), &e));
        let state = if thawed.is_ok() { Freezer::Thawed } else { Freezer::Frozen };
        container.switch("resume", Freezer::Thawing, state)?;
        thawed?;
        self.tell_resumed(&container);
        Ok(())
    }
}

async fn freeze(container: &Container) -> Result<(), Error> {
    let late = |what: String| Error::new(Kind::DeadlineExceeded, format!("pause {}: {what}", container.id));
    timeout(STARTS, container.execs_started())
        .await
        .map_err(|_| late(format!("an exec is being started for {STARTS:?}")))?;
    freezer::freeze(&container.group(), SWITCH).await.map_err(|e| match e.kind() {
        std::io::ErrorKind::TimedOut => late(e.to_string()),
        _ => Error::internal(format_args!("pause {}", container.id), &e),
    })?;
    // Its init may have ended meanwhile: nobody would ever resume what it has left behind.
    container.must_be_there("pause").inspect_err(|_| {
        if let Err(error) = freezer::release(&container.group()) {
            tracing::error!(container = container.id, %error, "let go on what a container has left behind");
        }
    })
}
