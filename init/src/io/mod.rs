//! The standard streams of processes: pipes, or a terminal, and who is attached to them.
//!
//! A stream has at most one reader or writer at a time: a second one is refused as long as the first one's connection lives. When
//! it goes, the pipe stays, and with it what the process writes up to the pipe's capacity; the next one goes on where it stopped.

mod input;
mod output;
pub mod service;
mod terminal;

pub use terminal::{Size, Wish, pair as terminal_pair};

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdRegisterError};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use crate::error::{Error, Kind};
use crate::worker::client;

/// Time that a stream may be open before its process is there: longer than a worker may take to make it.
const PROCESS_WAIT: Duration = Duration::from_secs(60);

/// Watches a descriptor for `interest`.
///
/// # Errors
/// When it cannot be watched; it comes back with the error.
pub fn watch_fd(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, AsyncFdRegisterError<OwnedFd>> {
    // SAFETY: an OwnedFd is open as long as it lives, always the same, and AsyncFd lends it out only by reference.
    unsafe { AsyncFd::register_with_interest(fd, interest) }
}

/// Which of its streams a process has: those that are not /dev/null.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// A stdin that a client writes.
    pub stdin: bool,
    /// A stdout that a client reads.
    pub stdout: bool,
    /// A stderr that a client reads.
    pub stderr: bool,
}

/// PID 1's ends of a process's streams.
#[derive(Debug)]
pub struct ProcessStreams {
    stdin: Slot,
    stdout: Slot,
    stderr: Slot,
    terminal: Option<terminal::Terminal>,
    exited: watch::Sender<bool>,
}

impl ProcessStreams {
    /// Makes the pipes. The other ends are the process's.
    ///
    /// # Errors
    /// When the descriptors run out.
    pub fn new(wanted: Wanted) -> io::Result<(Arc<Self>, client::Streams)> {
        let mut theirs = client::Streams::default();
        let (mut stdin, mut stdout, mut stderr) = (Slot::absent(), Slot::absent(), Slot::absent());
        if wanted.stdin {
            let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
            (stdin, theirs.stdin) = (Slot::idle(write)?, Some(read));
        }
        for (wanted, ours, theirs) in
            [(wanted.stdout, &mut stdout, &mut theirs.stdout), (wanted.stderr, &mut stderr, &mut theirs.stderr)]
        {
            if wanted {
                let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
                (*ours, *theirs) = (Slot::idle(read)?, Some(write));
            }
        }
        let exited = watch::Sender::new(false);
        Ok((Arc::new(Self { stdin, stdout, stderr, terminal: None, exited }), theirs))
    }

    /// Streams that will be a terminal.
    pub fn terminal() -> Arc<Self> {
        let [stdin, stdout, stderr] = [(); 3].map(|()| Slot::absent());
        let terminal = Some(terminal::Terminal::default());
        Arc::new(Self { stdin, stdout, stderr, terminal, exited: watch::Sender::new(false) })
    }

    /// The terminal is there: its master, of which those streams become copies that are wanted.
    ///
    /// # Errors
    /// When the descriptors run out, or the pty is none.
    pub fn open_terminal(&self, master: OwnedFd, wish: Wish, wanted: Wanted) -> io::Result<()> {
        let Some(terminal) = &self.terminal else { return Err(io::ErrorKind::InvalidInput.into()) };
        for (slot, wanted) in [(&self.stdin, wanted.stdin), (&self.stdout, wanted.stdout)] {
            if wanted {
                *slot.place() = Place::idle(master.try_clone()?)?;
            }
        }
        terminal.open(master, wish)
    }

    /// Changes the size of the terminal, if there is one.
    ///
    /// # Errors
    /// When it does not take it.
    pub fn resize(&self, size: Size) -> io::Result<()> {
        self.terminal.as_ref().map_or(Ok(()), |terminal| terminal.resize(size))
    }

    /// The process has exited: what is in its pipes now is what it wrote.
    pub fn exited(&self) {
        self.exited.send_replace(true);
    }

    /// Closes stdin: at once if nobody is attached to it, else as soon as they have gone. Twice is harmless.
    pub fn close_stdin(&self) {
        self.stdin.close();
    }
}

/// One stream's pipe, while nobody is attached to it.
#[derive(Debug)]
struct Slot(Mutex<Place>);

#[derive(Debug)]
enum Place {
    /// The process has /dev/null instead.
    Absent,
    Idle(OwnedFd),
    Attached {
        /// To be closed when it comes back.
        closing: bool,
    },
    Closed,
}

impl Place {
    fn idle(fd: OwnedFd) -> io::Result<Self> {
        // Only this end: the process's own end is another open file, and must block as programs expect.
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self::Idle(fd))
    }
}

impl Slot {
    fn absent() -> Self {
        Self(Mutex::new(Place::Absent))
    }

    fn idle(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self(Mutex::new(Place::idle(fd)?)))
    }

    fn close(&self) {
        let mut place = self.place();
        match *place {
            Place::Idle(_) => *place = Place::Closed,
            Place::Attached { .. } => *place = Place::Attached { closing: true },
            Place::Absent | Place::Closed => {}
        }
    }

    /// Takes the pipe; none if it has come to its end.
    fn attach(&self, name: &str) -> Result<Option<OwnedFd>, Error> {
        let mut place = self.place();
        match std::mem::replace(&mut *place, Place::Attached { closing: false }) {
            Place::Idle(fd) => Ok(Some(fd)),
            other => {
                let answer = match other {
                    Place::Attached { .. } => {
                        Err(Error::new(Kind::AlreadyExists, format!("{name} has a stream attached already")))
                    }
                    Place::Absent => Err(Error::new(Kind::NotFound, format!("the process has no {name}"))),
                    _ => Ok(None),
                };
                *place = other;
                answer
            }
        }
    }

    /// Gives the pipe back to be attached to again, or none when it has come to its end.
    fn detach(&self, fd: Option<OwnedFd>) {
        let mut place = self.place();
        let closing = matches!(*place, Place::Attached { closing: true });
        *place = fd.filter(|_| !closing).map_or(Place::Closed, Place::Idle);
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The streams of all processes, by container and exec.
#[derive(Debug, Default)]
pub struct Streams {
    table: Mutex<HashMap<(String, String), Arc<ProcessStreams>>>,
    added: Notify,
}

impl Streams {
    /// Makes a process's streams known to those that wait for them.
    pub fn add(&self, container: &str, exec: &str, streams: Arc<ProcessStreams>) {
        self.table().insert((container.into(), exec.into()), streams);
        self.added.notify_waiters();
    }

    /// Forgets a process's streams. Who is attached goes on to the end.
    pub fn remove(&self, container: &str, exec: &str) {
        self.table().remove(&(container.into(), exec.into()));
    }

    /// The streams of a process, which may come to be a little later.
    ///
    /// # Errors
    /// NotFound when it does not come.
    pub async fn find(&self, container: &str, exec: &str) -> Result<Arc<ProcessStreams>, Error> {
        let key = (container.to_owned(), exec.to_owned());
        let found = async {
            loop {
                // Asked for before the look, so that a process that is added in between is not missed.
                let added = self.added.notified();
                if let Some(streams) = self.table().get(&key) {
                    return streams.clone();
                }
                added.await;
            }
        };
        timeout(PROCESS_WAIT, found).await.map_err(|_| {
            let what = if exec.is_empty() { container.to_owned() } else { format!("{exec} in {container}") };
            Error::new(Kind::NotFound, format!("{what} did not come within {PROCESS_WAIT:?}"))
        })
    }

    fn table(&self) -> MutexGuard<'_, HashMap<(String, String), Arc<ProcessStreams>>> {
        self.table.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_attached_to_once_and_again_after_it_was_left() {
        let (read, _write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let slot = Slot::idle(read).unwrap();
        let fd = slot.attach("stdout").unwrap();
        assert_eq!(slot.attach("stdout").unwrap_err().kind, Kind::AlreadyExists);
        slot.detach(fd);
        let fd = slot.attach("stdout").unwrap();
        assert!(fd.is_some());
        slot.detach(None);
        assert!(slot.attach("stdout").unwrap().is_none(), "it has come to its end");
        assert_eq!(Slot::absent().attach("stderr").unwrap_err().kind, Kind::NotFound);
    }

    #[test]
    fn a_close_waits_for_who_is_attached() {
        let (_read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let slot = Slot::idle(write).unwrap();
        let fd = slot.attach("stdin").unwrap();
        slot.close();
        slot.close();
        slot.detach(fd);
        assert!(slot.attach("stdin").unwrap().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_may_come_before_its_process() {
        let streams = Arc::new(Streams::default());
        let waiting = tokio::spawn({
            let streams = streams.clone();
            async move { streams.find("c", "e").await.map(drop) }
        });
        tokio::task::yield_now().await;
        let (ours, _theirs) = ProcessStreams::new(Wanted::default()).unwrap();
        streams.add("c", "", ours.clone());
        streams.add("c", "e", ours);
        assert_eq!(waiting.await.unwrap(), Ok(()));
        assert_eq!(streams.find("c", "other").await.unwrap_err().kind, Kind::NotFound);
    }
}
