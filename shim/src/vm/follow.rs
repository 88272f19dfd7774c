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
use husk_vsock::VsockError;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use crate::forward::names::Names;
use crate::guest::client::{Guest, GuestError};
use crate::network::{Follower, NetworkError, NetworkStatus, ObjectError, Settled, Waiting};
use crate::vmm::{Machine, NicEnd, VmmError};

/// Deadline for all changes in the namespace.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);
/// How long to wait for more after the first notification: a plugin makes several changes in a row.
const BURST: Duration = Duration::from_millis(5);
/// Shortest time between two looks at a namespace that keeps changing.
const PAUSE: Duration = Duration::from_millis(100);
/// Callers that may wait for their turn. One look at the namespace answers all of them.
const CALLERS: usize = 16;
/// How much longer the thread that changes the namespace may take than its [`DEADLINE`]: the kernel does not interrupt a
/// system call that waits for RTNL.
const BLOCKED: Duration = Duration::from_secs(1);
/// Pauses before further attempts after a failure: the first, and the longest.
const RETRIES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Why the guest's network differs from the namespace's.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The namespace.
    #[error(transparent)]
    Namespace(#[from] NetworkError),
    /// Links of the namespace that the guest cannot have.
    #[error("{}", .0.iter().map(|problem| Chain(problem).to_string()).collect::<Vec<_>>().join("; "))]
    Links(Vec<ObjectError>),
    /// The machine cannot be given a network card.
    #[error(transparent)]
    Plug(#[from] VmmError),
    /// The guest has rejected its configuration, or cannot be called.
    #[error("configure the guest's network")]
    Guest(#[from] GuestError),
    /// The containers' DNS queries cannot be relayed.
    #[error("listen for the guest's DNS queries")]
    Names(#[from] VsockError),
    /// The task that follows the namespace has ended.
    #[error("the VM's network is no longer followed: the VM is stopping")]
    Ended,
    /// The kernel does not finish a change of the namespace.
    #[error("a change of the VM's network namespace is still running after {} ms", .0.as_millis())]
    Blocked(Duration),
    /// The guest, or the changes before this one, took too long.
    #[error("the guest does not have its network's changes after {} ms", .0.as_millis())]
    Deadline(Duration),
    /// A thread or a descriptor.
    #[error("follow the network namespace")]
    System(#[from] std::io::Error),
}

/// Shared by all callers that waited for it.
type Outcome = Result<(), Arc<FollowError>>;
type Reply = oneshot::Sender<Outcome>;
/// A thread that changes the namespace: the NICs' new state, and what the guest has to know.
type Change = JoinHandle<Result<(NetworkStatus, Result<Option<Settled>, NetworkError>), FollowError>>;

/// The links of the namespace that the guest does not have.
#[derive(Default)]
struct Missing {
    problems: Vec<ObjectError>,
    waiting: Vec<Waiting>,
}

/// A handle on the task. The task ends with it.
pub(super) struct Following {
    calls: mpsc::Sender<Reply>,
    status: watch::Receiver<NetworkStatus>,
    follower: Arc<Mutex<Option<Follower>>>,
    /// For a caller that waits.
    limit: Duration,
}

impl Following {
    /// Configures the guest, which has the configuration `applied`, and starts to follow the namespace, until `dead` has
    /// a value.
    pub(super) async fn start(
        follower: Follower,
        settled: Settled,
        applied: ConfigureNetworkRequest,
        names: Names,
        guest: Arc<Guest>,
        machine: Arc<dyn Machine>,
        dead: watch::Receiver<Option<String>>,
    ) -> Result<Self, FollowError> {
        // SAFETY: the descriptor stays the same and open: nothing replaces it, and `changes` owns it.
        let registered = unsafe { AsyncFd::register_with_interest(follower.changes()?, Interest::READABLE) };
        let changes = registered.map_err(|error| error.into_parts().1)?;
        let (status, published) = watch::channel(follower.status());
        let follower = Arc::new(Mutex::new(Some(follower)));
        // A call that changes nothing would only delay the boot.
        let applied = Some(applied);
        let limit = DEADLINE + BLOCKED + guest.call_timeout();
        let Settled { config: wanted, name_server, problems: _, waiting: _ } = settled;
        let running = None;
        let mut task =
            Task { follower: follower.clone(), names, guest, machine, running, wanted, name_server, applied, status };
        task.configure_guest().await?;
        let (calls, called) = mpsc::channel(CALLERS);
        tokio::spawn(task.run(changes, called, dead));
        Ok(Self { calls, status: published, follower, limit })
    }

    /// Returns when the guest has the network that the namespace has now.
    pub(super) async fn settle(&self) -> Outcome {
        ask(&self.calls, self.limit).await
    }

    /// What the VM's NICs are connected to.
    pub(super) fn status(&self) -> NetworkStatus {
        self.status.borrow().clone()
    }

    /// Stops following the namespace, and returns the NICs with all that they are connected to. The task ends with the
    /// handle. Waits for a change that has begun.
    pub(super) async fn leave(&self) -> Result<Follower, FollowError> {
        let follower = self.follower.clone();
        let mut leaving = tokio::task::spawn_blocking(move || lock(&follower).take());
        within(DEADLINE + BLOCKED, &mut leaving).await?.ok_or(FollowError::Ended)
    }

    /// Stops changing the namespace and removes the VM's taps, so that everything in it can be undone. Waits for a
    /// change that has begun, but not forever: a change whose deadline has passed makes no further request.
    pub(super) async fn stop(&self) {
        let follower = self.follower.clone();
        let mut stopping = tokio::task::spawn_blocking(move || match lock(&follower).take() {
            Some(follower) => follower.end(DEADLINE),
            None => Ok(()),
        });
        let stopped = within(DEADLINE + BLOCKED, &mut stopping).await;
        if let Err(error) = stopped.and_then(|ended| Ok(ended?)) {
            tracing::error!(error = %Chain(&error), "failed to stop following the network namespace");
        }
    }
}

/// Asks the task for the guest's network to be up to date.
async fn ask(calls: &mpsc::Sender<Reply>, limit: Duration) -> Outcome {
    let asked = async {
        let (reply, settled) = oneshot::channel();
        calls.send(reply).await.map_err(|_| FollowError::Ended)?;
        settled.await.map_err(|_| FollowError::Ended)?
    };
    timeout(limit, asked).await.unwrap_or_else(|_| Err(FollowError::Deadline(limit).into()))
}

/// Waits for a thread.
async fn within<T>(limit: Duration, thread: &mut JoinHandle<T>) -> Result<T, FollowError> {
    let done = timeout(limit, thread).await.map_err(|_| FollowError::Blocked(limit))?;
    Ok(done.map_err(std::io::Error::other)?)
}

/// The next callers that have not given up, at least one; none if all handles are gone. They are answered together, by a
/// look at the namespace that begins later, so that it shows what a caller has changed before.
async fn callers(calls: &mut mpsc::Receiver<Reply>) -> Option<Vec<Reply>> {
    let mut waiting = Vec::new();
    while waiting.is_empty() {
        if calls.recv_many(&mut waiting, CALLERS).await == 0 {
            return None;
        }
        waiting.retain(|reply| !reply.is_closed());
    }
    Some(waiting)
}

/// When to try again after a failure: the pauses double.
#[derive(Default)]
struct Retry(Option<(Instant, Duration)>);

impl Retry {
    fn note(&mut self, failed: bool) {
        let (first, longest) = RETRIES;
        let pause = self.0.map_or(first, |(_, last)| longest.min(2 * last));
        self.0 = failed.then(|| (Instant::now() + pause, pause));
    }

    /// Resolves when it is time, and never after a success.
    async fn due(&self) {
        match self.0 {
            Some((at, _)) => sleep_until(at).await,
            None => std::future::pending().await,
        }
    }
}

struct Task {
    /// None once the VM is being stopped. Locked only by blocking work.
    follower: Arc<Mutex<Option<Follower>>>,
    names: Names,
    guest: Arc<Guest>,
    machine: Arc<dyn Machine>,
    /// A change that was not finished in time. No other one can begin.
    running: Option<Change>,
    /// The configuration that the guest should have.
    wanted: ConfigureNetworkRequest,
    /// Whether docker's DNS server listens in the namespace.
    name_server: bool,
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
        let (mut earliest, mut retry) = (Instant::now(), Retry::default());
        loop {
            let waiting = tokio::select! {
                () = died(&mut dead) => return,
                waiting = callers(&mut calls) => match waiting {
                    Some(waiting) => waiting,
                    None => return,
                },
                noticed = burst(&changes, earliest) => {
                    if let Err(error) = noticed {
                        tracing::error!(%error, "failed to wait for changes of the network namespace");
                        return;
                    }
                    Vec::new()
                }
                () = retry.due() => Vec::new(),
            };
            // An error is logged and published.
            let settled = self.settle().await.map_err(Arc::new);
            let ended = settled.as_ref().is_err_and(|error| matches!(**error, FollowError::Ended));
            retry.note(settled.is_err());
            let asked = !waiting.is_empty();
            for reply in waiting {
                // Fails if the caller has given up.
                let _ = reply.send(settled.clone());
            }
            if ended {
                return;
            }
            if !asked {
                earliest = Instant::now() + PAUSE;
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
        // What an unfinished change has read may be older than what is asked for. Its problems still exist for the next.
        if let Some(running) = self.running.take() {
            self.finish(running).await?;
        }
        let problems = self.connect_all().await?;
        self.configure_guest().await?;
        if problems.is_empty() { Ok(()) } else { Err(FollowError::Links(problems)) }
    }

    /// Connects the links of the namespace, and gives the machine the network cards that it lacks for them. Returns
    /// what the guest cannot have.
    async fn connect_all(&mut self) -> Result<Vec<ObjectError>, FollowError> {
        let mut plugged = false;
        loop {
            let follower = self.follower.clone();
            let change = tokio::task::spawn_blocking(move || change(&follower, plugged));
            let Missing { mut problems, waiting } = self.finish(change).await?;
            // Ends, because the machine can be given only so many.
            let Some(first) = waiting.first() else { return Ok(problems) };
            match self.plug(first.clone()).await {
                Ok(()) => plugged = true,
                Err(FollowError::Ended) => return Err(FollowError::Ended),
                Err(error) => {
                    // The guest gets the rest of its network.
                    problems.extend(waiting.iter().map(|link| link.failed(&error)));
                    return Ok(problems);
                }
            }
        }
    }

    /// Gives the machine a network card.
    async fn plug(&self, link: Waiting) -> Result<(), FollowError> {
        let follower = self.follower.clone();
        let mut created = tokio::task::spawn_blocking(move || {
            let mut follower = lock(&follower);
            let follower = follower.as_mut().ok_or(FollowError::Ended)?;
            Ok::<_, FollowError>(follower.new_nic(&link, DEADLINE)?)
        });
        let nic = within(DEADLINE + BLOCKED, &mut created).await??;
        Ok(self.machine.plug(NicEnd { mac: nic.mac, taps: nic.taps }).await?)
    }

    /// Waits for a change of the namespace, and returns what the guest does not have.
    async fn finish(&mut self, mut change: Change) -> Result<Missing, FollowError> {
        let done = within(DEADLINE + BLOCKED, &mut change).await;
        if let Err(FollowError::Blocked(_)) = done {
            self.running = Some(change);
        }
        let (status, settled) = done??;
        self.status.send_modify(|published| {
            published.nics = status.nics;
        });
        let Some(settled) = settled? else { return Ok(Missing::default()) };
        self.wanted = settled.config;
        self.name_server = settled.name_server;
        Ok(Missing { problems: settled.problems, waiting: settled.waiting })
    }

    async fn configure_guest(&mut self) -> Result<(), FollowError> {
        if self.name_server {
            self.wanted.name_server_port = self.names.relay(&self.guest).await?;
        }
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

/// Gives the namespace's NICs what its links need. `plugged` tells that the machine has got the NIC that was created
/// for it. Blocks.
fn change(
    follower: &Mutex<Option<Follower>>,
    plugged: bool,
) -> Result<(NetworkStatus, Result<Option<Settled>, NetworkError>), FollowError> {
    let mut follower = lock(follower);
    let follower = follower.as_mut().ok_or(FollowError::Ended)?;
    if plugged {
        follower.plugged();
    }
    let settled = follower.settle(DEADLINE);
    Ok((follower.status(), settled))
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
        assert!(timeout(PAUSE, burst(&changes, Instant::now())).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_retried_ever_less_often_until_one_attempt_succeeds() {
        let mut retry = Retry::default();
        let mut pauses = Vec::new();
        for _ in 0..8 {
            retry.note(true);
            let start = Instant::now();
            retry.due().await;
            pauses.push(start.elapsed().as_secs());
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        retry.note(false);
        assert!(timeout(Duration::from_secs(3600), retry.due()).await.is_err());
        retry.note(true);
        timeout(RETRIES.0, retry.due()).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn everyone_who_waits_is_answered_at_once_and_nobody_waits_for_a_silent_guest_forever() {
        const LIMIT: Duration = Duration::from_secs(71);
        let (calls, mut called) = mpsc::channel(CALLERS);
        let start = Instant::now();
        // The task is busy with a guest that does not answer.
        for waited in futures::future::join_all((0..CALLERS + 1).map(|_| ask(&calls, LIMIT))).await {
            assert!(matches!(*waited.unwrap_err(), FollowError::Deadline(LIMIT)));
        }
        assert_eq!(start.elapsed(), LIMIT);

        let answer = async {
            // Without those that have given up, whose replies are still queued.
            let waiting = callers(&mut called).await.unwrap();
            assert_eq!(waiting.len(), 3);
            let outcome = Err(Arc::new(FollowError::Ended));
            waiting.into_iter().for_each(|reply| reply.send(outcome.clone()).unwrap());
        };
        let asked = futures::future::join_all((0..3).map(|_| ask(&calls, LIMIT)));
        let (answers, ()) = tokio::join!(asked, answer);
        assert!(answers.iter().all(|answer| matches!(**answer.as_ref().unwrap_err(), FollowError::Ended)));
        drop(calls);
        assert!(callers(&mut called).await.is_none());
    }

    #[tokio::test]
    async fn a_thread_that_the_kernel_blocks_is_not_awaited_forever() {
        let (release, blocked) = std::sync::mpsc::channel::<()>();
        let mut thread = tokio::task::spawn_blocking(move || blocked.recv().is_ok());
        let limit = Duration::from_millis(1);
        assert!(matches!(within(limit, &mut thread).await, Err(FollowError::Blocked(after)) if after == limit));
        // It can be awaited again.
        release.send(()).unwrap();
        assert!(within(DEADLINE, &mut thread).await.unwrap());
    }
}
