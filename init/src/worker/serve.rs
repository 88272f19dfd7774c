//! The worker's life: one request in, one reply out.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::panic::catch_unwind;
use std::sync::Mutex;

use libcontainer::container::Container;
use libcontainer::error::LibcontainerError;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::de::DeserializeOwned;
use tracing::level_filters::LevelFilter;

use super::executor::Refusal;
use super::{CONTROL_FD, MESSAGE_MAX, Reply, Request, console, create, exec, start, update};
use crate::error::{Error, Kind, chain};
use crate::{boot, log, places};

/// Most of a diagnosis that goes into an error, bytes. What comes last is nearest to the cause's consequence; the cause comes first.
const DIAGNOSIS_MAX: u64 = 4096;

/// Serves the request on [`CONTROL_FD`]. Its process ends afterwards, whatever came of it.
///
/// # Errors
/// When the request cannot be received or the reply not be sent: nobody is there to be told.
pub fn run(level: &str) -> io::Result<()> {
    // SAFETY: PID 1 puts its socket on this descriptor for every worker, and nothing else in this process has taken it.
    let control = UnixDatagram::from(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    fcntl(&control, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    let diagnosis = Diagnosis::start(level.parse().unwrap_or(LevelFilter::WARN))?;

    let mut message = vec![0; MESSAGE_MAX];
    let received = control.recv(&mut message)?;
    let reply = match serde_json::from_slice(&message[..received]) {
        Ok(request) => {
            catch_unwind(|| serve(&request)).unwrap_or_else(|_| Err(Error::new(Kind::Internal, "a worker panicked")))
        }
        Err(error) => Err(Error::internal("understand a request", &error)),
    };
    let reply = reply.unwrap_or_else(|error| Reply::Failed(diagnosis.explain(error)));
    control.send(&serde_json::to_vec(&reply)?)?;
    Ok(())
}

fn serve(request: &Request) -> Result<Reply, Error> {
    boot::randomize_addresses().map_err(|e| Error::internal("reset the personality", &e))?;
    // PID 1's is not for its children. A spec's own value is set by libcontainer later.
    fs::write("/proc/self/oom_score_adj", "0").map_err(|e| Error::internal("reset oom_score_adj", &e))?;
    if let Request::Create { console: Some(_), .. } | Request::Exec { console: Some(_), .. } = request {
        console::keep_gate().map_err(|e| Error::internal("keep the gate", &e))?;
    }
    match request {
        Request::Create { id, bundle, console } => create::create(id, bundle, console.as_deref()).map(Reply::Created),
        Request::Exec { id, process, console } => exec::exec(id, process, console.as_deref()).map(Reply::Executed),
        Request::Update { id } => update::update(id).map(|()| Reply::Done),
        Request::Start { id } => start::start(id).map(|()| Reply::Done),
        Request::Delete { id } => load(id)?.delete(false).map(|()| Reply::Done).map_err(|e| explain("delete", id, &e)),
    }
}

/// libcontainer's record of a container.
pub(super) fn load(id: &str) -> Result<Container, Error> {
    Container::load(places::state(id)).map_err(|e| explain("load", id, &e))
}

/// What a file has in JSON. With the reader that the libraries use too: another would be another copy of all that decodes a spec.
pub(super) fn decode<T: DeserializeOwned>(file: File) -> serde_json::Result<T> {
    serde_json::from_reader(BufReader::new(file))
}

/// libcontainer's error, as the kind that it is.
pub(super) fn explain(what: &str, id: &str, error: &LibcontainerError) -> Error {
    let kind = match error {
        LibcontainerError::Exist => Kind::AlreadyExists,
        LibcontainerError::NoDirectory => Kind::NotFound,
        LibcontainerError::IncorrectStatus(_) => Kind::FailedPrecondition,
        LibcontainerError::InvalidSpec(_) | LibcontainerError::InvalidInput(_) | LibcontainerError::InvalidID(_) => {
            Kind::InvalidArgument
        }
        _ => Kind::Internal,
    };
    Error::new(kind, format!("{what} {id}: {}", chain(error)))
}

/// What failed to begin a process: why its program cannot be run, if that is known, as runc says it; else libcontainer's error.
pub(super) fn explain_start(what: &str, id: &str, refusal: &Refusal, error: &LibcontainerError) -> Error {
    match refusal.heard() {
        Some(why) => Error::new(Kind::Internal, format!("{what} {id}: unable to start container process: {why}")),
        None => explain(what, id, error),
    }
}

/// What libcontainer logs while it fails. Its errors often say no more than "failed syscall"; which one and on what stands only in its
/// log, written by processes that it has forked. A memory file that all of them share collects it.
struct Diagnosis(File);

impl Diagnosis {
    fn start(level: LevelFilter) -> io::Result<Self> {
        let file = File::from(memfd_create(c"diagnosis", MFdFlags::MFD_CLOEXEC)?);
        let writer = Mutex::new(file.try_clone()?);
        if level > LevelFilter::INFO {
            // A developer reads along on the console, with all its processes in order.
            log::start(level, |line| crate::console::show(&log::console_line(&line)));
        } else {
            log::start(LevelFilter::ERROR, move |line| {
                let mut writer = writer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                // A diagnosis that cannot be kept is one less; the error itself is told all the same.
                let _ = writer.write_all((log::text(&line) + "\n").as_bytes());
            });
        }
        Ok(Self(file))
    }

    fn explain(mut self, mut error: Error) -> Error {
        let mut text = String::new();
        let read =
            self.0.seek(SeekFrom::Start(0)).and_then(|_| (&self.0).take(DIAGNOSIS_MAX).read_to_string(&mut text));
        // The first line comes from deepest inside. Often the error has its end already.
        let told = |line: &str| line.split_once(": ").is_some_and(|(_, end)| error.message.contains(end));
        if let (Ok(_), Some(line)) = (read, text.lines().next().map(str::trim).filter(|line| !told(line))) {
            error.message = format!("{} ({line})", error.message);
        }
        error
    }
}
