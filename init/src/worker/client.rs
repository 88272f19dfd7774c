//! PID 1's side: starts a worker, sends it a request, and kills it if it misses its deadline.

use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram as StdSocket;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
use tokio::net::UnixDatagram;
use tokio::sync::{Semaphore, SemaphorePermit, oneshot};
use tokio::time::{Instant, timeout};
use tracing::level_filters::LevelFilter;

use super::{CONTROL_FD, GATE_FD, MESSAGE_MAX, NAME, Reply, Request};
use crate::error::{CallError, FailureKind};
use crate::paths;
use crate::reaper::{Creation, Exit, Reaper};
use crate::spawn::{self, ChildStreams};

/// How long an operation may take. A create takes a fifth of a second under TCG. Hooks have their own timeouts, which
/// must fit into this one.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(30);
/// How long an operation may wait for other workers. Together, both timeouts end before the host gives up the call, by
/// default after 60 s.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(25);

/// Workers that may run at the same time, for each processor and at least. More workers would slow each other down:
/// with two hundred at once, all would miss their deadline.
const WORKERS_PER_CPU: usize = 2;
const WORKERS_MIN: usize = 4;
/// Workers that may copy layers back at the same time. They take long, and must not keep the others waiting.
const COPIES: usize = 2;

#[derive(Debug)]
pub(crate) struct Workers {
    reaper: Arc<Reaper>,
    log: LevelFilter,
    slots: Semaphore,
    copies: Semaphore,
}

impl Workers {
    pub(crate) fn new(reaper: Arc<Reaper>, log: LevelFilter) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get());
        let slots = Semaphore::new(WORKERS_MIN.max(WORKERS_PER_CPU * cpus));
        Self { reaper, log, slots, copies: Semaphore::new(COPIES) }
    }

    /// Has a worker process `request`. `creation` ensures that the reaper keeps the exits of the processes that the
    /// worker creates.
    ///
    /// # Errors
    /// The worker's error. DeadlineExceeded if it does not reply in time, Internal if it dies: its processes are killed
    /// unless they have already entered the container's cgroup, which the caller has to kill. DeadlineExceeded also if
    /// no worker could start in time; nothing was done then.
    pub(crate) async fn run(
        &self,
        creation: &Creation,
        request: &Request,
        streams: ChildStreams,
    ) -> Result<Reply, CallError> {
        let _slot = acquire_slot(&self.slots, QUEUE_TIMEOUT).await?;
        self.run_within(OPERATION_TIMEOUT, creation, request, streams).await
    }

    /// Like [`Self::run`], for a request that copies files. It waits for other such requests only, and ends within `limit`.
    pub(crate) async fn copy(
        &self,
        creation: &Creation,
        request: &Request,
        limit: Duration,
    ) -> Result<Reply, CallError> {
        let started = Instant::now();
        let _slot = acquire_slot(&self.copies, limit).await?;
        let left = limit.saturating_sub(started.elapsed());
        self.run_within(left, creation, request, ChildStreams::default()).await
    }

    async fn run_within(
        &self,
        limit: Duration,
        creation: &Creation,
        request: &Request,
        streams: ChildStreams,
    ) -> Result<Reply, CallError> {
        let failed = |what: &str, source: io::Error| CallError::internal(format_args!("{what} a worker"), &source);
        let message = serde_json::to_vec(request).map_err(|e| failed("encode a request for", e.into()))?;
        let (pid, socket) = self.spawn(streams).map_err(|e| failed("start", e))?;
        let mut worker = Worker { pid, exit: creation.exit_of(pid), reaper: &self.reaper };

        let exchange = async {
            socket.send(&message).await.map_err(|e| failed("send a request to", e))?;
            worker.receive_reply(&socket).await
        };
        match timeout(limit, exchange).await {
            Ok(Ok(Reply::Failed(error))) => Err(error),
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(error)) => {
                worker.kill();
                Err(error)
            }
            Err(_) => {
                worker.kill();
                let what = format!("a worker did not reply within {limit:?}");
                Err(CallError::new(FailureKind::DeadlineExceeded, what))
            }
        }
    }

    fn spawn(&self, streams: ChildStreams) -> io::Result<(i32, UnixDatagram)> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let ours = StdSocket::from(ours);
        ours.set_nonblocking(true)?;
        let ours = UnixDatagram::from_std(ours)?;
        let mut more = vec![(&theirs, CONTROL_FD)];
        more.extend(streams.gate.as_ref().map(|gate| (gate, GATE_FD)));
        let args = [NAME.to_owned(), self.log.to_string()].map(|arg| CString::new(arg).unwrap_or_default());
        // Its own process group: processes that have not entered the container's cgroup yet are killed with the worker.
        // Only libcontainer looks there. A container's environment comes from its spec alone.
        let env = [CString::new(format!("PATH={}", paths::BIN)).unwrap_or_default()];
        let pid = spawn::spawn_self(&args, &env, &streams, &more, true)?;
        Ok((pid, ours))
    }
}

async fn acquire_slot(slots: &Semaphore, limit: Duration) -> Result<SemaphorePermit<'_>, CallError> {
    match timeout(limit, slots.acquire()).await {
        Ok(Ok(slot)) => Ok(slot),
        Ok(Err(closed)) => Err(CallError::internal("wait for a worker slot", &closed)),
        Err(_) => {
            let what = format!("other operations kept all workers busy for {limit:?}");
            Err(CallError::new(FailureKind::DeadlineExceeded, what))
        }
    }
}

struct Worker<'a> {
    pid: i32,
    exit: oneshot::Receiver<Exit>,
    reaper: &'a Reaper,
}

impl Worker<'_> {
    async fn receive_reply(&mut self, socket: &UnixDatagram) -> Result<Reply, CallError> {
        let mut buffer = vec![0; MESSAGE_MAX];
        // The socket alone does not reveal a worker's death: a process that the worker cloned holds a copy of its end.
        let received = tokio::select! {
            biased;
            received = socket.recv(&mut buffer) => received,
            // The reply may have arrived together with the exit. `try_recv` would miss it: it does not read before the
            // runtime has seen the socket become readable.
            exit = &mut self.exit => match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(received) if received > 0 => Ok(received),
                _ => return Err(died(exit.ok())),
            },
        };
        match received {
            Ok(0) => Err(died((&mut self.exit).await.ok())),
            Ok(received) => serde_json::from_slice(&buffer[..received])
                .map_err(|e| CallError::internal("decode a worker's reply", &e)),
            Err(e) => Err(CallError::internal("receive a worker's reply", &e)),
        }
    }

    fn kill(&self) {
        match self.reaper.kill_group(self.pid, libc::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => tracing::error!(worker = self.pid, %error, "failed to kill the worker"),
        }
    }
}

fn died(exit: Option<Exit>) -> CallError {
    let status = exit.map_or("unknown".into(), |exit| exit.status.to_string());
    CallError::new(FailureKind::Internal, format!("a worker exited without a reply, status {status}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_worker_waits_for_a_free_slot_but_not_forever() {
        let slots = Semaphore::new(1);
        let slot = acquire_slot(&slots, QUEUE_TIMEOUT).await.unwrap();
        let late = acquire_slot(&slots, QUEUE_TIMEOUT).await.unwrap_err();
        assert_eq!(late.kind, FailureKind::DeadlineExceeded);
        assert_eq!(late.message, "other operations kept all workers busy for 25s");
        let (next, ()) = tokio::join!(acquire_slot(&slots, QUEUE_TIMEOUT), async { drop(slot) });
        assert!(next.is_ok());
    }
}
