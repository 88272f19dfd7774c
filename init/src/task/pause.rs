//! Pause and Resume.

use std::time::Duration;

use tokio::time::timeout;

use super::Tasks;
use super::container::{Container, FreezerState};
use crate::cgroup::freezer;
use crate::error::{CallError, FailureKind};

/// How long the processes of a container may take to freeze or thaw: microseconds, unless one waits in the kernel.
const FREEZER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long starting execs may delay a pause.
const EXEC_STARTS_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the filesystems of disks may take to write everything back.
const FILESYSTEMS_TIMEOUT: Duration = Duration::from_secs(20);

impl Tasks {
    /// Freezes all processes of a container. Fails with FailedPrecondition unless the container is running. If a
    /// process does not freeze in time, thaws all of them and fails with DeadlineExceeded.
    pub(crate) async fn pause(&self, id: &str) -> Result<(), CallError> {
        let container = self.container(id)?;
        container.require_running("pause")?;
        container.set_freezer("pause", FreezerState::Thawed, FreezerState::Freezing)?;
        let frozen = self.freeze(&container).await;
        let state = if frozen.is_ok() { FreezerState::Frozen } else { FreezerState::Thawed };
        container.set_freezer("pause", FreezerState::Freezing, state)?;
        frozen?;
        self.publish_paused(&container);
        Ok(())
    }

    /// Thaws a container. Fails with FailedPrecondition unless the container is paused.
    pub(crate) async fn resume(&self, id: &str) -> Result<(), CallError> {
        let container = self.container(id)?;
        container.require_not_stopped("resume")?;
        container.set_freezer("resume", FreezerState::Frozen, FreezerState::Thawing)?;
        // First, and in any case: a program that waits for a frozen filesystem thaws only with it.
        self.disks.thaw(id);
        let thawed = freezer::thaw(&container.cgroup(), FREEZER_TIMEOUT)
            .await
            .map_err(|e| CallError::internal(format_args!("resume {id}"), &e));
        let state = if thawed.is_ok() { FreezerState::Thawed } else { FreezerState::Frozen };
        container.set_freezer("resume", FreezerState::Thawing, state)?;
        thawed?;
        self.publish_resumed(&container);
        Ok(())
    }

    /// Freezes the processes of a container, then the filesystems of its disks: what is on these is as after an unmount.
    async fn freeze(&self, container: &Container) -> Result<(), CallError> {
        freeze(container).await?;
        let frozen = timeout(FILESYSTEMS_TIMEOUT, self.disks.freeze(&container.id)).await;
        let frozen = frozen.unwrap_or_else(|_| {
            let what = format!("pause {}: its disks did not freeze within {FILESYSTEMS_TIMEOUT:?}", container.id);
            Err(CallError::new(FailureKind::DeadlineExceeded, what))
        });
        frozen.inspect_err(|_| {
            self.disks.thaw(&container.id);
            if let Err(error) = freezer::release(&container.cgroup()) {
                tracing::error!(container = container.id, %error, "failed to thaw a container whose disks do not freeze");
            }
        })
    }
}

async fn freeze(container: &Container) -> Result<(), CallError> {
    let late = |what: String| CallError::new(FailureKind::DeadlineExceeded, format!("pause {}: {what}", container.id));
    timeout(EXEC_STARTS_TIMEOUT, container.wait_for_starting_execs())
        .await
        .map_err(|_| late(format!("an exec did not start within {EXEC_STARTS_TIMEOUT:?}")))?;
    freezer::freeze(&container.cgroup(), FREEZER_TIMEOUT).await.map_err(|e| match e.kind() {
        std::io::ErrorKind::TimedOut => late(e.to_string()),
        _ => CallError::internal(format_args!("pause {}", container.id), &e),
    })?;
    // If the init has exited meanwhile, nobody would ever resume the processes that outlived it.
    container.require_not_stopped("pause").inspect_err(|_| {
        if let Err(error) = freezer::release(&container.cgroup()) {
            tracing::error!(container = container.id, %error, "failed to thaw the processes that outlived the init");
        }
    })
}
