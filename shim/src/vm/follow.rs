//! Passes the changes of a VM's network namespace on to its guest, as long as the VM runs.
//!
//! One task does it, one change after the other: when the kernel reports that something has changed, and when a caller
//! wants to be sure that the guest has everything.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::lock::lock;
use husk_protos::network::ConfigureNetworkRequest;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use crate::guest::client::{Guest, GuestError};
use crate::network::{Follower, NetworkError, NetworkStatus, ObjectError, Settled};

/// Deadline for all changes in the namespace.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);
/// How long to wait for more after the first notification: a plugin makes several changes in a row.
const BURST: Duration = Duration::from_millis(5);
/// Shortest time between two looks at a namespace that keeps changing.
const PAUSE: Duration = Duration::from_millis(100);
/// Callers that may wait for their turn.
const CALLERS: usize = 16;

/// Why the guest's network differs from the namespace's.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The namespace.
    #[error(transparent)]
    Namespace(#[from] NetworkError),
    /// Links of the namespace that the guest cannot have.
    #[error("{}", .0.iter().map(|problem| Chain(problem).to_string()).collect::<Vec<_>>().join("; "))]
    Links(Vec<ObjectError>),
    /// The guest has rejected its configuration, or cannot be called.
    #[error("configure the guest's network")]
    Guest(#[from] GuestError),
    /// The task that follows the namespace has ended.
    #[error("the VM's network is no longer followed: the VM is stopping")]
    Ended,
    /// A thread or a descriptor.
    #[error("follow the network namespace")]
    System(#[from] std::io::Error),
}

type Reply = oneshot::Sender<Result<(), FollowError>>;

/// A handle on the task. The task ends with it.
pub(super) struct Following {
    calls: mpsc::Sender<Reply>,
    status: watch::Receiver<NetworkStatus>,
    follower: Arc<Mutex<Option<Follower>>>,
}

impl Following {
    /// Configures the guest and starts to follow the namespace, until `dead` has a value.
    pub(super) async fn start(
        follower: Follower,
        settled: Settled,
        guest: Arc<Guest>,
        dead: watch::Receiver<Option<String>>,
    ) -> Result<Self, FollowError> {
        // SAFETY: the descriptor stays the same and open: nothing replaces it, and `changes` owns it.
        let registered = unsafe { AsyncFd::register_with_interest(follower.changes()?, Interest::READABLE) };
        let changes = registered.map_err(|error| error.into_parts().1)?;
        let (status, published) = watch::channel(follower.status());
        let follower = Arc::new(Mutex::new(Some(follower)));
        // A new guest has the empty configuration, and a call that changes nothing would only delay the boot.
        let applied = Some(ConfigureNetworkRequest::default());
        let mut task = Task { follower: follower.clone(), guest, wanted: settled.config, applied, status };
        task.configure_guest().await?;
        let (calls, called) = mpsc::channel(CALLERS);
        tokio::spawn(task.run(changes, called, dead));
        Ok(Self { calls, status: published, follower })
    }

    /// Returns when the guest has the network that the namespace has now.
    pub(super) async fn settle(&self) -> Result<(), FollowError> {
        let (reply, settled) = oneshot::channel();
        self.calls.send(reply).await.map_err(|_| FollowError::Ended)?;
        settled.await.map_err(|_| FollowError::Ended)?
    }

    /// What the VM's NICs are connected to.
    pub(super) fn status(&self) -> NetworkStatus {
        self.status.borrow().clone()
    }

    /// Stops changing the namespace, so that everything in it can be undone. Waits for a change that has begun.
    pub(super) async fn stop(&self) {
        let follower = self.follower.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || drop(lock(&follower).take())).await {
            tracing::error!(error = %Chain(&error), "failed to stop following the network namespace");
        }
    }
}

struct Task {
    /// None once the VM is being stopped. Locked only by blocking work.
    follower: Arc<Mutex<Option<Follower>>>,
    guest: Arc<Guest>,
    /// The configuration that the guest should have.
    wanted: ConfigureNetworkRequest,
    /// The one that it has.
    applied: Option<ConfigureNetworkRequest>,
    status: watch::Sender<NetworkStatus>,
}

impl Task {
    async fn run(
        mut self,
        changes: AsyncFd<OwnedFd>,
        mut calls: mpsc::Receiver<Reply>,
        mut dead: watch::Receiver<Option<String>>,
    ) {
        let mut earliest = Instant::now();
        loop {
            tokio::select! {
                () = died(&mut dead) => return,
                call = calls.recv() => {
                    let Some(reply) = call else { return };
                    // Fails if the caller has given up.
                    let _ = reply.send(self.settle().await);
                }
                noticed = burst(&changes, earliest) => {
                    // An error is logged and published; the next change or call tries again.
                    let ended = match noticed {
                        Ok(()) => matches!(self.settle().await, Err(FollowError::Ended)),
                        Err(error) => {
                            tracing::error!(%error, "failed to wait for changes of the network namespace");
                            true
                        }
                    };
                    if ended {
                        return;
                    }
                    earliest = Instant::now() + PAUSE;
                }
            }
        }
    }

    /// Gives the guest what the namespace has now, and publishes what it cannot have.
    async fn settle(&mut self) -> Result<(), FollowError> {
        let settled = self.settle_unpublished().await;
        let problems = match &settled {
            Ok(()) => Vec::new(),
            Err(FollowError::Ended) => return settled,
            Err(FollowError::Links(problems)) => problems.iter().map(|problem| Chain(problem).to_string()).collect(),
            Err(error) => vec![Chain(error).to_string()],
        };
        self.status.send_if_modified(|status| {
            for problem in problems.iter().filter(|problem| !status.problems.contains(problem)) {
                tracing::warn!(problem, "the guest's network differs from its namespace");
            }
            let changed = status.problems != problems;
            status.problems = problems;
            changed
        });
        settled
    }

    async fn settle_unpublished(&mut self) -> Result<(), FollowError> {
        let follower = self.follower.clone();
        let work = move || {
            let mut follower = lock(&follower);
            let follower = follower.as_mut().ok_or(FollowError::Ended)?;
            let settled = follower.settle(DEADLINE);
            Ok::<_, FollowError>((follower.status(), settled))
        };
        let (status, settled) = tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)??;
        self.status.send_modify(|published| {
            published.nics = status.nics;
        });
        let problems = match settled? {
            Some(settled) => {
                self.wanted = settled.config;
                settled.problems
            }
            None => Vec::new(),
        };
        self.configure_guest().await?;
        if problems.is_empty() { Ok(()) } else { Err(FollowError::Links(problems)) }
    }

    async fn configure_guest(&mut self) -> Result<(), FollowError> {
        if self.applied.as_ref() == Some(&self.wanted) {
            return Ok(());
        }
        // If the call fails, the guest may have a part of the configuration.
        self.applied = None;
        let configured = self.guest.network.configure(self.guest.context(), &self.wanted).await;
        configured.map_err(GuestError::from)?;
        tracing::debug!(nics = ?self.status.borrow().nics, "configured the guest's network");
        self.applied = Some(self.wanted.clone());
        Ok(())
    }
}

/// Resolves when the VM is dead, or its handle dropped.
async fn died(dead: &mut watch::Receiver<Option<String>>) {
    // An error means that the handle was dropped.
    let _ = dead.wait_for(Option::is_some).await;
}

/// Waits for a change, and then for the end of the burst that it begins, but not before `earliest`. The notifications
/// stay in the socket, so nothing is lost if this is cancelled and the caller settles.
async fn burst(changes: &AsyncFd<OwnedFd>, earliest: Instant) -> std::io::Result<()> {
    changes.readable().await?.clear_ready();
    sleep_until(earliest.max(Instant::now() + BURST)).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn changes_are_gathered_and_a_namespace_that_never_rests_is_read_ten_times_a_second() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        // SAFETY: the descriptor stays the same and open.
        let changes = unsafe { AsyncFd::register_with_interest(ours.into(), Interest::READABLE) }.unwrap();
        for (earliest, expected) in [(Duration::ZERO, BURST), (PAUSE, PAUSE)] {
            theirs.write_all(b"x").unwrap();
            let start = Instant::now();
            burst(&changes, start + earliest).await.unwrap();
            assert_eq!(start.elapsed(), expected);
        }
        // The same notifications do not wake the reader twice.
        assert!(tokio::time::timeout(PAUSE, burst(&changes, Instant::now())).await.is_err());
    }
}
