//! The three lives of the shim's binary: `start` makes the socket and forks the server, the server serves until its sandbox has ended, and
//! `delete` cleans up after a server that is no more.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim::{Flags, StartOpts};
use containerd_shim_protos::api::DeleteResponse;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use tokio::signal::unix::{SignalKind, signal};

use crate::console;
use crate::containerd::bootstrap;
use crate::containerd::bootstrap::Start;
use crate::containerd::publisher::Publisher;
use crate::ctl;
use crate::host::process::{ProcessId, wait_dead};
use crate::host::socket;
use crate::prepare::sandbox_of;
use crate::sandbox::Sandbox;
use crate::state::journal::Journal;
use crate::state::recent::EventKind;
use crate::state::{Owner, State, StateError, Step, base};

/// Where the server inherits its listening socket.
const LISTENER: i32 = 3;
/// containerd's limit for what it sends on stdin is 10 MiB; husk needs nothing of that size.
const MAX_STDIN: u64 = 1 << 20;
/// What is left of containerd's 5 seconds for `delete` after starting it.
const DELETE: Duration = Duration::from_millis(4500);
/// Exit status of a task whose shim is gone: as if by SIGKILL.
const KILLED: u32 = 137;

/// `start`: prints the address of the server for this task, which is forked unless the task's sandbox has one already.
pub fn start(flags: &Flags) -> Result<()> {
    let mut input = Vec::new();
    let stdin = io::stdin();
    if !io::IsTerminal::is_terminal(&stdin) {
        stdin.lock().take(MAX_STDIN).read_to_end(&mut input).context("read stdin")?;
    }
    let start = bootstrap::read(flags, &input, std::env::var("TTRPC_ADDRESS").ok())?;
    let sandbox = sandbox_of(Path::new("."), &start.id)?;
    let opts = StartOpts {
        address: start.grpc_address.clone(),
        namespace: start.namespace.clone(),
        socket_dir: start.socket_dir.clone(),
        ..Default::default()
    };
    let address = opts.socket_address(&sandbox);
    let path = PathBuf::from(address.trim_start_matches("unix://"));
    if let Some(listener) = listen(&path)? {
        spawn_server(&start, &sandbox, listener, &path)
            .inspect_err(|_| drop(fs::remove_file(&path)))
            .context("start the server")?;
    }
    // containerd 1.x finds the shim again by this file when it is restarted.
    fs::write("address", &address).context("write address")?;
    let mut stdout = io::stdout();
    stdout.write_all(&bootstrap::answer(&address, start.reply)?).context("write stdout")?;
    stdout.flush().context("write stdout")
}

/// The socket at `path`; none if somebody serves there: the shim of the same sandbox.
fn listen(path: &Path) -> Result<Option<UnixListener>> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    match UnixListener::bind(path) {
        Ok(listener) => return Ok(Some(listener)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        Err(error) => return Err(error).with_context(|| format!("bind {}", path.display())),
    }
    if UnixStream::connect(path).is_ok() {
        return Ok(None);
    }
    // Left behind by a shim that was killed.
    fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
    let listener = UnixListener::bind(path).with_context(|| format!("bind {}", path.display()))?;
    Ok(Some(listener))
}

fn spawn_server(start: &Start, sandbox: &str, listener: UnixListener, socket: &Path) -> Result<()> {
    let mut args: Vec<OsString> = vec!["-namespace".into(), start.namespace.clone().into()];
    args.extend(["-id".into(), sandbox.into(), "-address".into(), start.grpc_address.clone().into()]);
    args.extend(["-socket".into(), socket.into()]);
    if start.debug {
        args.push("-debug".into());
    }
    let mut command = Command::new(std::env::current_exe().context("find the shim's own binary")?);
    command
        .args(args)
        .env("TTRPC_ADDRESS", &start.ttrpc_address)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let fd = listener.as_raw_fd();
    // SAFETY: between fork and exec only dup2, fcntl and setsid are called, all async-signal-safe; `fd` is open until spawn() returns.
    unsafe {
        command.pre_exec(move || {
            if fd == LISTENER {
                // dup2 onto itself would leave close-on-exec set.
                nix::fcntl::fcntl(
                    std::os::fd::BorrowedFd::borrow_raw(fd),
                    nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
                )?;
            } else if libc::dup2(fd, LISTENER) < 0 {
                return Err(io::Error::last_os_error());
            }
            // A session of its own: signals for containerd's terminal are not for the shim.
            nix::unistd::setsid()?;
            Ok(())
        })
    };
    let child = command.spawn().context("spawn")?;
    adjust_oom_score(child.id());
    Ok(())
}

/// The server is a bit less precious than containerd, as containerd's own shims are; without this it would inherit containerd's
/// protection, and the VM with it.
fn adjust_oom_score(pid: u32) {
    let score = |pid: u32| -> Option<i32> {
        fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).ok()?.trim().parse().ok()
    };
    if let Some(parent) = score(std::os::unix::process::parent_id()) {
        // Best effort: only a privileged caller may lower it, and nothing depends on it.
        let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), (parent + 1).min(1000).to_string());
    }
}

/// Serves the sandbox `flags.id` until it has ended.
pub fn serve(flags: &Flags) -> Result<()> {
    crate::host::child::reserve().context("reserve descriptors")?;
    crate::vmm::tsc::begin();
    // SAFETY: `start` has put the listening socket there, and nobody else in this process uses that number.
    let listener = unsafe { OwnedFd::from_raw_fd(LISTENER) };
    nix::fcntl::fcntl(&listener, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
        .context("the server is started by `start`, which passes it a socket")?;
    // One thread: ttrpc keeps the order of a stream's messages only then, and an idle sandbox costs little.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let served = runtime.block_on(serve_sandbox(flags, UnixListener::from(listener)));
    // Otherwise it went with everything else that the journal names, and what is there now is the socket of a successor.
    if served.is_err() && !flags.socket.is_empty() {
        let _ = fs::remove_file(&flags.socket);
    }
    // Nothing that still hangs in a blocking call may keep the process.
    runtime.shutdown_background();
    served
}

async fn serve_sandbox(flags: &Flags, listener: UnixListener) -> Result<()> {
    crate::containerd::log::init(Path::new("log"), flags.debug, &flags.namespace, &flags.id)
        .context("open the log fifo")?;
    let state = create_state(&flags.namespace, &flags.id).inspect_err(|error| tracing::error!(%error, "no state"))?;
    let journal = Journal::new(state);
    // In one write. What is in the sandbox's folder would go with it, but until then nobody shall find a socket that nobody serves.
    let operators = [ctl::SOCKET, console::SOCKET];
    let sockets = [PathBuf::from(&flags.socket)].into_iter().chain(operators.map(|name| journal.dir().join(name)));
    journal.record(&Owner::Sandbox, sockets.map(|path| Step::File { path }))?;
    let listen = |name| socket::listen(journal.dir(), name).and_then(tokio::net::UnixListener::from_std);
    let (control, console) = (listen(ctl::SOCKET), listen(console::SOCKET));
    let (control, console) = (control.context("listen on ctl.sock")?, console.context("listen on console.sock")?);
    let ttrpc_address = std::env::var("TTRPC_ADDRESS").context("TTRPC_ADDRESS")?;
    let publisher = Publisher::start(&ttrpc_address, &flags.namespace, journal.recent().clone());
    let sandbox = Sandbox::new(&flags.id, &flags.namespace, journal, publisher);
    sandbox.guest_logs().console.serve(console);
    ctl::serve(control, sandbox.clone(), ctl::methods::METHODS, ctl::Limits::default());

    // SAFETY: the descriptor is a listening unix socket, given up here and owned by the server from now on.
    let server = unsafe { ttrpc::r#async::Server::new().add_unix_listener(listener.into_raw_fd()) }?;
    let mut server = server.register_service(crate::task_service::services(sandbox.clone()));
    server.start().await?;
    let version = env!("CARGO_PKG_VERSION");
    tracing::info!(version, "serving");
    sandbox.recent().note(EventKind::Sandbox, "the shim serves", serde_json::json!({"version": version}));

    let mut terminate = signal(SignalKind::terminate()).context("catch SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("catch SIGINT")?;
    tokio::select! {
        () = sandbox.finished() => {}
        _ = terminate.recv() => sandbox.shutdown(true).await?,
        _ = interrupt.recv() => sandbox.shutdown(true).await?,
    }
    // Answers that are under way are still sent.
    server.shutdown().await?;
    Ok(())
}

/// The state of a new sandbox; what a dead shim has left of an earlier one of this name is undone first.
fn create_state(namespace: &str, sandbox: &str) -> Result<State> {
    match State::create(&base(), namespace, sandbox) {
        Err(StateError::Exists(_)) => {
            let state = State::load(&base(), namespace, sandbox)?;
            if state.shim_lives()? {
                bail!("sandbox {sandbox:?} is served by process {:?} already", state.shim().map(|shim| shim.pid));
            }
            state.undo_all(DELETE).context("clean up after an earlier shim")?;
            Ok(State::create(&base(), namespace, sandbox)?)
        }
        created => Ok(created?),
    }
}

/// `delete`: removes what the task's shim has left, if that shim is dead, and prints a `DeleteResponse`.
pub fn delete(flags: &Flags) -> Result<()> {
    let deadline = Instant::now() + DELETE;
    // The bundle may be gone, or half written; a lone container is its own sandbox.
    let bundle = if flags.bundle.is_empty() { Path::new(".") } else { Path::new(&flags.bundle) };
    let sandbox = sandbox_of(bundle, &flags.id).unwrap_or_else(|_| flags.id.clone());
    match State::load(&base(), &flags.namespace, &sandbox) {
        Ok(state) => clean_up(state, &flags.id, deadline)?,
        Err(StateError::NotFound(_)) => {}
        Err(error) => return Err(error.into()),
    }
    let response =
        DeleteResponse { exit_status: KILLED, exited_at: MessageField::some(Timestamp::now()), ..Default::default() };
    io::stdout().write_all(&response.write_to_bytes()?).context("write stdout")
}

fn clean_up(state: State, container: &str, deadline: Instant) -> Result<()> {
    let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
    let Some(shim) = state.shim().filter(|_| state.shim_lives().unwrap_or(true)) else {
        return Ok(state.undo_all(left(deadline))?);
    };
    let others = state.containers().keys().any(|id| id != container);
    if others && !state.containers().contains_key(container) {
        // It serves others of the pod; what was this one's it has undone itself.
        return Ok(());
    }
    // containerd asks for this when it has lost the shim. A killed one's sockets close before it counts as dead, and one on its way out does
    // what is left to do better itself.
    if !ended(shim, left(deadline) / 2)? {
        ensure!(!others, "the shim, process {}, lives, and serves {container:?} and others of its pod", shim.pid);
        shim.kill(Duration::from_millis(500)).context("end the shim")?;
    }
    match State::load(&base(), state.namespace(), state.sandbox()) {
        Ok(state) => Ok(state.undo_all(left(deadline))?),
        Err(StateError::NotFound(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn ended(shim: ProcessId, within: Duration) -> io::Result<bool> {
    match shim.pidfd()? {
        Some(handle) => wait_dead(&handle, within),
        None => Ok(true),
    }
}
