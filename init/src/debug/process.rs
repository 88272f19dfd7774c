//! Processes in the guest itself: started for an operator, and ended with all that they have started.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nix::errno::Errno;
use tokio::sync::watch;
use tokio::time::timeout;

use super::environment;
use crate::cgroup;
use crate::error::{Error, Kind};
use crate::io::{ProcessStreams, Size, Streams, Wanted, Wish, terminal_pair};
use crate::launch::{Program, Terminal, launch};
use crate::reaper::{Exit, Reaper};
use crate::spawn;

/// What a process with a terminal may take to end after a hang-up.
const HANG_UP: Duration = Duration::from_secs(2);
/// What anything may take to end after SIGKILL.
const KILL: Duration = Duration::from_secs(5);
/// The container whose processes these are, as far as streams are concerned.
const NO_CONTAINER: &str = "";

/// What is to be started.
#[derive(Debug)]
pub struct Wanting {
    /// Its name and arguments.
    pub args: Vec<String>,
    /// What its environment has beside the usual.
    pub env: Vec<String>,
    /// Where it begins.
    pub cwd: String,
    /// The size of its terminal, if it is to have one.
    pub terminal: Option<Size>,
    /// Without a terminal: whether it has a stdin.
    pub stdin: bool,
}

#[derive(Debug)]
struct Process {
    pid: i32,
    group: PathBuf,
    terminal: bool,
    streams: Arc<ProcessStreams>,
    exit: watch::Receiver<Option<Exit>>,
}

/// All of them, by id.
#[derive(Debug)]
pub struct Processes {
    reaper: Arc<Reaper>,
    streams: Arc<Streams>,
    next: AtomicU64,
    table: Mutex<HashMap<String, Arc<Process>>>,
}

impl Processes {
    /// None yet. Their streams become part of `streams`.
    pub fn new(reaper: Arc<Reaper>, streams: Arc<Streams>) -> Self {
        Self { reaper, streams, next: AtomicU64::new(1), table: Mutex::default() }
    }

    /// Starts one; its id and pid.
    ///
    /// # Errors
    /// As [`launch`].
    pub async fn start(&self, wanting: Wanting) -> Result<(String, i32), Error> {
        if wanting.args.is_empty() {
            return Err(Error::new(Kind::InvalidArgument, "args must name a program"));
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed).to_string();
        let group = Path::new(cgroup::DEBUG).join(format!("exec-{id}"));
        std::fs::create_dir(&group).map_err(|e| Error::internal("make a process's cgroup", &e))?;
        match self.start_in(&group, &wanting).await {
            Ok((process, told)) => {
                let pid = process.pid;
                self.streams.add(NO_CONTAINER, &id, process.streams.clone());
                self.table().insert(id.clone(), process.clone());
                tokio::spawn(attend(process, told));
                Ok((id, pid))
            }
            Err(error) => {
                remove(&group).await;
                Err(error)
            }
        }
    }

    async fn start_in(&self, group: &Path, wanting: &Wanting) -> Result<(Arc<Process>, Told), Error> {
        let failed = |e: std::io::Error| Error::internal("make a process's streams", &e);
        let wanted = Wanted { stdin: wanting.stdin, stdout: true, stderr: true };
        let (streams, ends) = match wanting.terminal {
            None => ProcessStreams::new(wanted).map_err(failed)?,
            Some(size) => {
                let streams = ProcessStreams::terminal();
                let (master, peer) = terminal_pair().map_err(failed)?;
                let wanted = Wanted { stdin: true, stdout: true, stderr: false };
                streams.open_terminal(master, Wish { size: Some(size), owner: 0 }, wanted).map_err(failed)?;
                let copy = || peer.try_clone().map(Some).map_err(failed);
                let ends = spawn::Streams { stdin: copy()?, stdout: copy()?, stderr: Some(peer), gate: None };
                (streams, ends)
            }
        };
        let terminal = wanting.terminal.is_some();
        let program = Program {
            args: &wanting.args,
            env: &environment(&wanting.env),
            cwd: if wanting.cwd.is_empty() { "/" } else { &wanting.cwd },
            group,
            oom_score_adj: "0",
            terminal: if terminal { Terminal::Stdin } else { Terminal::None },
        };
        let (pid, ended) = launch(&self.reaper, &program, ends).await?;
        let (tell, exit) = watch::channel(None);
        let process = Process { pid, group: group.to_owned(), terminal, streams, exit };
        Ok((Arc::new(process), Told { ended, tell }))
    }

    /// Its exit status, when it and all that it has started have ended.
    ///
    /// # Errors
    /// NotFound.
    pub async fn wait(&self, id: &str) -> Result<u32, Error> {
        let mut exit = self.find(id)?.exit.clone();
        let ended = exit.wait_for(Option::is_some).await;
        let status = ended.ok().and_then(|exit| exit.map(|exit| exit.status));
        status.ok_or_else(|| Error::new(Kind::Internal, format!("process {id} is not attended to any more")))
    }

    /// Changes the size of its terminal.
    ///
    /// # Errors
    /// NotFound.
    pub fn resize(&self, id: &str, size: Size) -> Result<(), Error> {
        let process = self.find(id)?;
        process
            .streams
            .resize(size)
            .map_err(|e| Error::internal(format_args!("resize the terminal of process {id}"), &e))
    }

    /// Sends a signal to its process group.
    ///
    /// # Errors
    /// NotFound, also when it has ended; InvalidArgument for what is no signal.
    pub fn signal(&self, id: &str, signal: u32) -> Result<(), Error> {
        let process = self.find(id)?;
        // 0 sends none, and 64 is the last (signal(7)).
        let signal = i32::try_from(signal).ok().filter(|signal| (1..=64).contains(signal));
        let signal = signal.ok_or_else(|| Error::new(Kind::InvalidArgument, "signal must be 1 to 64"))?;
        match self.reaper.kill_group(process.pid, signal) {
            Ok(()) => Ok(()),
            Err(Errno::ESRCH) => Err(Error::new(Kind::NotFound, format!("process {id} has ended"))),
            Err(error) => Err(Error::internal(format_args!("send signal {signal} to process {id}"), &error)),
        }
    }

    /// Forgets it, and ends it if it runs.
    ///
    /// # Errors
    /// DeadlineExceeded when it outlives SIGKILL.
    pub async fn end(&self, id: &str) -> Result<(), Error> {
        let Some(process) = self.table().remove(id) else { return Ok(()) };
        self.streams.remove(NO_CONTAINER, id);
        let mut exit = process.exit.clone();
        if process.terminal && exit.borrow().is_none() {
            // What the terminal's hang-up does. That itself would have to wait for whoever is attached to it still. A program that is stopped
            // hears nothing until it goes on.
            for signal in [libc::SIGHUP, libc::SIGCONT] {
                // It may just have ended.
                let _ = self.reaper.kill_group(process.pid, signal);
            }
            if timeout(HANG_UP, exit.wait_for(Option::is_some)).await.is_ok() {
                return Ok(());
            }
        }
        cgroup::kill(&process.group).map_err(|e| Error::internal(format_args!("kill process {id}"), &e))?;
        match timeout(KILL + KILL, exit.wait_for(Option::is_some)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::new(
                Kind::DeadlineExceeded,
                format!("process {id} is there {:?} after SIGKILL", KILL + KILL),
            )),
        }
    }

    fn find(&self, id: &str) -> Result<Arc<Process>, Error> {
        let found = self.table().get(id).cloned();
        found.ok_or_else(|| Error::new(Kind::NotFound, format!("there is no process {id:?}")))
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.table.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Where a process's exit comes from, and goes to.
struct Told {
    ended: tokio::sync::oneshot::Receiver<Exit>,
    tell: watch::Sender<Option<Exit>>,
}

/// Waits for a process's end, and ends what it leaves behind: an operator's command that is over has to be over.
async fn attend(process: Arc<Process>, told: Told) {
    // The reaper lives as long as the guest: it tells every exit.
    let Ok(exit) = told.ended.await else { return };
    process.streams.exited();
    remove(&process.group).await;
    told.tell.send_replace(Some(exit));
}

async fn remove(group: &Path) {
    if let Err(error) = cgroup::remove(group, KILL).await {
        tracing::warn!(%error, "remove a process's cgroup");
    }
}
