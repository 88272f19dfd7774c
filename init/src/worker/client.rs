//! PID 1's side: starts a worker, asks it, and makes sure that neither outlives its deadline.

use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram as StdSocket;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
use tokio::net::UnixDatagram;
use tokio::sync::{Semaphore, SemaphorePermit, oneshot};
use tokio::time::timeout;
use tracing::level_filters::LevelFilter;

use super::{CONTROL_FD, GATE_FD, MESSAGE_MAX, NAME, Reply, Request};
use crate::error::{Error, Kind};
use crate::reaper::{Creation, Exit, Reaper};
use crate::spawn;
pub(crate) use crate::spawn::ChildStreams as Streams;

/// Time that an operation may take. Under TCG a create takes a fifth of a second; hooks have deadlines of their own, which must fit.
const DEADLINE: Duration = Duration::from_secs(30);
/// Time that it may wait for its turn before. Both together end before the host gives the call up, by default after 60 s.
const TURN: Duration = Duration::from_secs(25);

/// Starts workers.
#[derive(Debug)]
pub struct Workers {
    reaper: Arc<Reaper>,
    log: LevelFilter,
    places: Semaphore,
}

/// Workers at a time for each processor, and at least. More of them would not be faster together, but each would be slower: with two
/// hundred at once all would pass their deadline.
const PLACES_PER_CPU: usize = 2;
const PLACES_MIN: usize = 4;

impl Workers {
    /// Workers that log at `log`, reaped by `reaper`.
    pub fn new(reaper: Arc<Reaper>, log: LevelFilter) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get());
        Self { reaper, log, places: Semaphore::new(PLACES_MIN.max(PLACES_PER_CPU * cpus)) }
    }

    /// Has a worker do `request`. `creation` proves that the reaper keeps the exits of whatever it makes.
    ///
    /// # Errors
    /// What the worker answered; DeadlineExceeded, or Internal when it died: what it made is then killed as far as it had not entered
    /// the container's cgroup, which is the caller's to kill. DeadlineExceeded also when others kept it from its turn: nothing was begun then.
    pub async fn run(&self, creation: &Creation, request: &Request, streams: Streams) -> Result<Reply, Error> {
        let failed = |what: &str, source: io::Error| Error::internal(format_args!("{what} a worker"), &source);
        let _place = turn(&self.places).await?;
        let message = serde_json::to_vec(request).map_err(|e| failed("encode a request for", e.into()))?;
        let (worker, ours) = self.spawn(streams).map_err(|e| failed("start", e))?;
        let mut worker = Worker { pid: worker, exit: creation.exit_of(worker), reaper: &self.reaper };

        let answer = async {
            ours.send(&message).await.map_err(|e| failed("send a request to", e))?;
            worker.reply(&ours).await
        };
        match timeout(DEADLINE, answer).await {
            Ok(Ok(Reply::Failed(error))) => Err(error),
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(error)) => {
                worker.kill();
                Err(error)
            }
            Err(_) => {
                worker.kill();
                Err(Error::new(Kind::DeadlineExceeded, format!("a worker did not answer within {DEADLINE:?}")))
            }
        }
    }

    fn spawn(&self, streams: Streams) -> io::Result<(i32, UnixDatagram)> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let ours = StdSocket::from(ours);
        ours.set_nonblocking(true)?;
        let ours = UnixDatagram::from_std(ours)?;
        let mut more = vec![(&theirs, CONTROL_FD)];
        more.extend(streams.gate.as_ref().map(|gate| (gate, GATE_FD)));
        let args = [NAME.to_owned(), self.log.to_string()].map(|arg| CString::new(arg).unwrap_or_default());
        // A group of its own: what has not entered the container's cgroup yet can be killed with the worker.
        let pid = spawn::spawn_self(&args, &[], &streams, &more, true)?;
        Ok((pid, ours))
    }
}

/// A place for one worker, until it is dropped.
async fn turn(places: &Semaphore) -> Result<SemaphorePermit<'_>, Error> {
    match timeout(TURN, places.acquire()).await {
        Ok(Ok(place)) => Ok(place),
        Ok(Err(closed)) => Err(Error::internal("wait for a worker's place", &closed)),
        Err(_) => {
            let what = format!("other operations have kept every worker busy for {TURN:?}");
            Err(Error::new(Kind::DeadlineExceeded, what))
        }
    }
}

struct Worker<'a> {
    pid: i32,
    exit: oneshot::Receiver<Exit>,
    reaper: &'a Reaper,
}

impl Worker<'_> {
    async fn reply(&mut self, socket: &UnixDatagram) -> Result<Reply, Error> {
        let mut buffer = vec![0; MESSAGE_MAX];
        // The socket alone does not tell of a worker's death: a process that it cloned holds a copy of its end.
        let received = tokio::select! {
            biased;
            received = socket.recv(&mut buffer) => received,
            // Its last words may have come with its end. Not by try_recv: the runtime may not have heard of them yet, and would not look.
            exit = &mut self.exit => match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(received) if received > 0 => Ok(received),
                _ => return Err(died(exit.ok())),
            },
        };
        match received {
            Ok(0) => Err(died((&mut self.exit).await.ok())),
            Ok(received) => serde_json::from_slice(&buffer[..received])
                .map_err(|e| Error::internal("understand a worker's answer", &e)),
            Err(e) => Err(Error::internal("receive a worker's answer", &e)),
        }
    }

    fn kill(&self) {
        match self.reaper.kill_group(self.pid, libc::SIGKILL) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(error) => tracing::error!(worker = self.pid, %error, "kill a worker"),
        }
    }
}

fn died(exit: Option<Exit>) -> Error {
    let status = exit.map_or("unknown".into(), |exit| exit.status.to_string());
    Error::new(Kind::Internal, format!("a worker died without an answer, status {status}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_turn_comes_with_the_next_free_place_or_is_given_up() {
        let places = Semaphore::new(1);
        let place = turn(&places).await.unwrap();
        let late = turn(&places).await.unwrap_err();
        assert_eq!(late.kind, Kind::DeadlineExceeded);
        assert_eq!(late.message, "other operations have kept every worker busy for 25s");
        let (next, ()) = tokio::join!(turn(&places), async { drop(place) });
        assert!(next.is_ok());
    }
}
