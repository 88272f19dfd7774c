//! The worker's side: receives one request, serves it and sends the reply.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::panic::catch_unwind;
use std::sync::Mutex;

use husk_protos::lock::lock;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use tracing::level_filters::LevelFilter;

use super::libcontainer::{call_error, load};
use super::{CONTROL_FD, MESSAGE_MAX, Reply, Request, console, copy_back, create, exec, start, update};
use crate::error::{CallError, FailureKind};
use crate::{boot, log};

/// Bytes of diagnostics that are read to complete an error. The cause comes first, its consequences later.
const DIAGNOSTICS_MAX: u64 = 4096;

/// Serves the request on [`CONTROL_FD`]; the process exits afterwards. Fails if the request cannot be received or the
/// reply cannot be sent. PID 1 cannot receive that error either, and sees only the exit.
pub(crate) fn run(level: &str) -> io::Result<()> {
    // SAFETY: PID 1 starts every worker with its socket as this descriptor, and nothing else in this process owns it.
    let control = UnixDatagram::from(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    fcntl(&control, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    let diagnostics = Diagnostics::start(level.parse().unwrap_or(LevelFilter::WARN))?;

    let mut message = vec![0; MESSAGE_MAX];
    let received = control.recv(&mut message)?;
    let reply = match serde_json::from_slice(&message[..received]) {
        Ok(request) => catch_unwind(|| serve(&request))
            .unwrap_or_else(|_| Err(CallError::new(FailureKind::Internal, "a worker panicked"))),
        Err(error) => Err(CallError::internal("decode a request", &error)),
    };
    let reply = reply.unwrap_or_else(|error| Reply::Failed(diagnostics.complete(error)));
    control.send(&serde_json::to_vec(&reply)?)?;
    Ok(())
}

fn serve(request: &Request) -> Result<Reply, CallError> {
    boot::randomize_addresses().map_err(|e| CallError::internal("reset the personality", &e))?;
    // Containers must not inherit PID 1's value. libcontainer sets the spec's own value later.
    fs::write("/proc/self/oom_score_adj", "0").map_err(|e| CallError::internal("reset oom_score_adj", &e))?;
    if let Request::Create { console: Some(_), .. } | Request::Exec { console: Some(_), .. } = request {
        console::protect_gate().map_err(|e| CallError::internal("protect the gate", &e))?;
    }
    match request {
        Request::Create { id, bundle, console } => create::create(id, bundle, console.as_deref()).map(Reply::Created),
        Request::Exec { id, process, console } => exec::exec(id, process, console.as_deref()).map(Reply::Executed),
        Request::Update { id } => update::update(id).map(Reply::Updated),
        Request::Start { id } => start::start(id).map(|()| Reply::Done),
        Request::CopyBack { upper, target, images } => {
            copy_back::copy_back(upper, target, images.as_ref()).map(Reply::CopiedBack)
        }
        Request::Delete { id } => {
            load(id)?.delete(false).map(|()| Reply::Done).map_err(|e| call_error("delete", id, &e))
        }
    }
}

/// Collects libcontainer's log to complete its errors. These often say only "failed syscall"; the log names the call
/// and its subject, but is written by forked processes. They all share this memory file.
struct Diagnostics(File);

impl Diagnostics {
    fn start(level: LevelFilter) -> io::Result<Self> {
        let file = File::from(memfd_create(c"diagnostics", MFdFlags::MFD_CLOEXEC)?);
        let writer = Mutex::new(file.try_clone()?);
        if level > LevelFilter::INFO {
            // For a developer, write the log of all processes to the console, in order.
            log::start(level, |line| crate::console::show(&log::console_line(&line)));
        } else {
            log::start(LevelFilter::ERROR, move |line| {
                // A lost line costs only detail: the error itself is still returned.
                let _ = lock(&writer).write_all((log::text(&line) + "\n").as_bytes());
            });
        }
        Ok(Self(file))
    }

    /// Appends the first log line to an error, unless the error already contains its end. The first line comes from the
    /// innermost call.
    fn complete(mut self, mut error: CallError) -> CallError {
        let mut text = String::new();
        let read =
            self.0.seek(SeekFrom::Start(0)).and_then(|_| (&self.0).take(DIAGNOSTICS_MAX).read_to_string(&mut text));
        let repeated = |line: &str| line.split_once(": ").is_some_and(|(_, end)| error.message.contains(end));
        if let (Ok(_), Some(line)) = (read, text.lines().next().map(str::trim).filter(|line| !repeated(line))) {
            error.message = format!("{} ({line})", error.message);
        }
        error
    }
}
