//! The shim's modes: `start` creates the socket and starts the server, the server runs until its sandbox ends, `delete`
//! cleans up after a dead server, and `-info` prints what the runtime supports.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use husk_protos::chain::Chain;
use husk_protos::unknown::Known;
use procfs::ProcResult;
use procfs::process::Process;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::claim::{ClaimRequest, Claimed, claim};
use crate::config::names::{PATH_ENV, PLACED_ENV};
use crate::console;
use crate::containerd::address::socket_path;
use crate::containerd::bootstrap;
use crate::containerd::bootstrap::StartParams;
use crate::containerd::flags::Flags;
use crate::containerd::log::Log;
use crate::containerd::options;
use crate::containerd::options::RuntimeOptions;
use crate::containerd::publisher::Publisher;
use crate::ctl;
use crate::host::clients::Clients;
use crate::host::process::{ProcessId, wait_dead};
use crate::host::socket;
use crate::pool::handover::{Confirmation, Identity};
use crate::prepare::sandbox_of;
use crate::rootfs::spec::features;
use crate::sandbox::Sandbox;
use crate::sandbox::spare::Waited;
use crate::state::journal::Journal;
use crate::state::recent::EventKind;
use crate::state::{Owner, State, StateError, Step, base, check_identifier};
use crate::vm::cgroup;
use crate::vm::cgroup::Hierarchies;

/// The descriptor of the server's listening socket.
const LISTENER: i32 = 3;
/// Most bytes that `start` reads from stdin. containerd's own limit is 10 MiB, but its messages have some hundred
/// bytes.
const MAX_STDIN: u64 = 1 << 20;
/// The file of a bundle that identifies the process that `start` started.
const SERVER_FILE: &str = "husk-shim.json";
/// Time limit of `delete`. containerd's limit is 5 seconds, including the start of the program.
const DELETE_TIMEOUT: Duration = Duration::from_millis(4500);
/// Time limit for what `delete` undoes, in a process of its own. On a busy host it takes longer than containerd waits, and
/// containerd does not ask again.
const UNDO_TIMEOUT: Duration = Duration::from_secs(120);
/// The environment variable of that process.
const UNDO_ENV: &str = "HUSK_DELETE_UNDOES";
/// Pause after a failed accept, which means a lack of descriptors or memory. Without it the loop would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long the server waits at its end for its clients to close their connections.
const CLOSE_WAIT: Duration = Duration::from_secs(1);
/// How often the server looks whether containerd has forgotten it, and how long it waits for its first container or for
/// its sandbox, which containerd sends right after `start`.
const FORGOTTEN_CHECK: Duration = Duration::from_secs(120);
/// Exit status of a task whose shim is gone: that of SIGKILL.
const KILLED: u32 = 137;

/// What containerd has written to stdin.
fn read_stdin() -> Result<Vec<u8>> {
    let mut input = Vec::new();
    let stdin = io::stdin();
    if !io::IsTerminal::is_terminal(&stdin) {
        stdin.lock().take(MAX_STDIN).read_to_end(&mut input).context("read stdin")?;
    }
    Ok(input)
}

/// `-info`: prints a `RuntimeInfo`: the runtime's name and version, the options that containerd passes, and what of the
/// runtime spec a container can use.
///
/// # Errors
/// When stdin cannot be read or stdout cannot be written.
pub fn info() -> Result<()> {
    let features = Any {
        type_url: features::TYPE_URL.to_owned(),
        value: serde_json::to_vec(&features::features()).context("encode the features")?,
        ..Default::default()
    };
    let options = Any::parse_from_bytes(&read_stdin()?).ok().filter(|options| !options.type_url.is_empty());
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_owned(), ..Default::default() };
    let info = RuntimeInfo {
        name: "io.containerd.husk.v1".to_owned(),
        version: MessageField::some(version),
        options: options.into(),
        features: MessageField::some(features),
        annotations: HashMap::from([bootstrap::allowed_mounts()]),
        ..Default::default()
    };
    io::stdout().write_all(&info.write_to_bytes()?).context("write stdout")
}

/// `start`: prints the address of the task's server. Starts the server unless the task's sandbox already has one.
///
/// # Errors
/// When the parameters are incomplete or invalid, or the server cannot be started.
pub fn start(flags: &Flags) -> Result<()> {
    let input = read_stdin()?;
    let start = bootstrap::read(flags, &input, std::env::var("TTRPC_ADDRESS").ok())?;
    // The server could not serve them, and `start` has to report that itself.
    check_identifier("namespace", &start.namespace)?;
    check_identifier("container id", &start.id)?;
    // The bundle of a sandbox that the Sandbox API creates has no spec.
    let sandbox = match Path::new("config.json").try_exists().context("look for config.json")? {
        true => sandbox_of(Path::new("."), &start.id)?,
        false => start.id.clone(),
    };
    check_identifier("sandbox id", &sandbox)?;
    let path = socket_path(start.socket_dir.as_deref(), &start.grpc_address, &start.namespace, &sandbox);
    let address = format!("unix://{}", path.display());
    // Before the new socket exists: a dead shim's socket had the same path.
    undo_dead(&start.namespace, &sandbox)?;
    if let Some(listener) = listen(&path)? {
        serve_new(&start, &sandbox, listener, &path)
            .inspect_err(|_| drop(fs::remove_file(&path)))
            .context("start the server")?;
    }
    // containerd 1.x reads this file after a restart to reconnect.
    fs::write("address", &address).context("write the file address")?;
    let mut stdout = io::stdout();
    stdout.write_all(&bootstrap::reply(&address, start.reply)?).context("write stdout")?;
    stdout.flush().context("write stdout")
}

/// Listens at `path`. Returns `None` if the sandbox's shim is already serving there.
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
    // A killed shim left the socket behind.
    fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
    let listener = UnixListener::bind(path).with_context(|| format!("bind {}", path.display()))?;
    Ok(Some(listener))
}

/// Gives a new sandbox a server: a shim that waits with a VM, or one that boots its own.
fn serve_new(start: &StartParams, sandbox: &str, listener: UnixListener, socket: &Path) -> Result<()> {
    let request = ClaimRequest { start, options: &valid_options(start), sandbox, socket };
    match claim(&request, &listener) {
        Claimed::Serves(member, shim) => {
            adjust_oom_score(shim.pid);
            // Without the note, `delete` might not find the shim.
            note_server(shim.pid).inspect_err(|_| drop(member.end(Duration::ZERO)))
        }
        Claimed::None => spawn_server(start, sandbox, listener, socket),
        Claimed::Failed => {
            // The shim may have taken the sandbox's name, and removed the socket with it.
            drop(listener);
            undo_dead(&start.namespace, sandbox)?;
            let listener = listen(socket)?.context("another shim serves the sandbox")?;
            spawn_server(start, sandbox, listener, socket)
        }
    }
}

fn spawn_server(start: &StartParams, sandbox: &str, listener: UnixListener, socket: &Path) -> Result<()> {
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
    let options = valid_options(start);
    // For a sandbox without a container: only `start` receives its options.
    command.envs(options.config_path.iter().map(|path| (PATH_ENV, path)));
    command.env_remove(PLACED_ENV).envs(options.shim_cgroup.iter().map(|cgroup| (PLACED_ENV, cgroup)));
    let fd = listener.as_raw_fd();
    // SAFETY: the closure calls only dup2, fcntl and setsid, which are async-signal-safe. `fd` is open until spawn()
    // returns.
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
            // A new session, so that signals from containerd's terminal do not reach the shim.
            nix::unistd::setsid()?;
            Ok(())
        })
    };
    let mut child = command.spawn().context("spawn")?;
    let placed = join_shim_cgroup(&options, child.id()).and_then(|()| note_server(child.id()));
    if placed.is_err() {
        // The error is reported; the child may have exited by itself.
        let _ = child.kill();
        let _ = child.wait();
        undo_dead(&start.namespace, sandbox)?;
    }
    placed?;
    adjust_oom_score(child.id());
    Ok(())
}

/// The runtime's options. Create rejects invalid ones, with a better error code than `start` has.
fn valid_options(start: &StartParams) -> RuntimeOptions {
    start.options.iter().find_map(|options| options::read(Some(options)).ok()).unwrap_or_default()
}

/// Moves the server to the cgroup that the runtime's options name. Its processes follow, unless the spec names a cgroup.
fn join_shim_cgroup(options: &RuntimeOptions, server: u32) -> Result<()> {
    let Some(path) = &options.shim_cgroup else { return Ok(()) };
    let join = || -> Result<()> {
        let Some(server) = ProcessId::of(server)? else { bail!("the server has exited") };
        Ok(cgroup::join(&Hierarchies::of_host()?.open_existing(path)?, server)?)
    };
    join().with_context(|| format!("runtime option ShimCgroup {path:?}"))
}

/// Notes in the bundle which process serves the sandbox, for a `delete` that finds nothing but that process left.
fn note_server(server: u32) -> Result<()> {
    let note = || -> Result<()> { Ok(fs::write(SERVER_FILE, serde_json::to_vec(&ProcessId::of(server)?)?)?) };
    note().with_context(|| format!("write the file {SERVER_FILE}"))
}

/// The server that [`note_server`] noted, if it still runs.
fn noted_server(bundle: &Path) -> Option<ProcessId> {
    let noted: Option<ProcessId> = serde_json::from_slice(&fs::read(bundle.join(SERVER_FILE)).ok()?).ok()?;
    noted.filter(|server| server.runs().unwrap_or(false))
}

/// Makes the server a slightly better target for the OOM killer than containerd, as containerd's own shims do.
/// Otherwise the server and its VM would inherit containerd's protection.
fn adjust_oom_score(server: u32) {
    let adjust = || -> ProcResult<()> {
        let parent = Process::new(std::os::unix::process::parent_id().cast_signed())?.oom_score_adj()?;
        Process::new(server.cast_signed())?.set_oom_score_adj((parent + 1).min(1000))
    };
    // Best effort: the shim works with any score.
    let _ = adjust();
}

/// Serves the sandbox `flags.id` until it ends.
///
/// # Errors
/// When the server cannot start, or the sandbox cannot be shut down.
pub fn serve(flags: &Flags) -> Result<()> {
    crate::host::child::reserve().context("reserve descriptors")?;
    crate::vmm::tsc::begin();
    // SAFETY: `start` put the listening socket there, and nothing else in this process uses that number.
    let listener = unsafe { OwnedFd::from_raw_fd(LISTENER) };
    nix::fcntl::fcntl(&listener, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
        .context("the server is started by `start`, which passes it a socket")?;
    // One thread: ttrpc keeps the order of a stream's messages only on one, and an idle sandbox stays cheap.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let served = runtime.block_on(serve_sandbox(flags, UnixListener::from(listener)));
    // After a success the journal has removed the socket, and a socket at this path belongs to a successor.
    if served.is_err() && !flags.socket.is_empty() {
        let _ = fs::remove_file(&flags.socket);
    }
    // Do not wait for threads in blocking calls.
    runtime.shutdown_background();
    served
}

async fn serve_sandbox(flags: &Flags, listener: UnixListener) -> Result<()> {
    Log::init(Path::new("log"), flags.debug, &flags.namespace, &flags.id).context("open the log fifo")?;
    let state = create_state(&flags.namespace, &flags.id).inspect_err(|error| {
        tracing::error!(error = %Chain(error.as_ref()), "failed to create the sandbox's state");
    })?;
    let identity = Identity {
        namespace: flags.namespace.clone(),
        sandbox: flags.id.clone(),
        bundle: ".".into(),
        socket: PathBuf::from(&flags.socket),
        ttrpc_address: std::env::var("TTRPC_ADDRESS").context("TTRPC_ADDRESS")?,
        debug: flags.debug,
    };
    serve_as(&identity, listener, Journal::new(state), None).await
}

/// Serves a sandbox until it ends: one that boots a VM when it needs it, or one for which a VM has waited. Then `start`
/// waits for the confirmation.
///
/// # Errors
/// When the server cannot start, or the sandbox cannot be shut down.
pub(crate) async fn serve_as(
    identity: &Identity,
    listener: UnixListener,
    journal: Journal,
    waited: Option<(Waited, Confirmation)>,
) -> Result<()> {
    let (waited, confirmation) = waited.unzip();
    // One write for all. The sockets in the sandbox's directory would be removed with it; these steps remove them
    // earlier, so that no client finds a socket without a server.
    let operator_sockets = [ctl::SOCKET, console::SOCKET];
    let sockets = [identity.socket.clone()].into_iter().chain(operator_sockets.map(|name| journal.dir().join(name)));
    journal.record(&Owner::Sandbox, sockets.map(|path| Step::File { path }))?;
    let listen = |name| socket::listen(journal.dir(), name).and_then(tokio::net::UnixListener::from_std);
    let (control, console) = (listen(ctl::SOCKET), listen(console::SOCKET));
    let (control, console) = (control.context("listen on ctl.sock")?, console.context("listen on console.sock")?);
    let Identity { namespace, sandbox, ttrpc_address, .. } = identity;
    let publisher = Publisher::start(ttrpc_address, namespace, journal.recent().clone());
    let sandbox = Sandbox::new(sandbox, namespace, journal, publisher, waited);
    sandbox.guest_logs().console.serve(console);
    ctl::serve(control, sandbox.clone(), ctl::methods::METHODS, ctl::Limits::default());

    let mut services = crate::task_service::services(sandbox.clone());
    services.extend(crate::sandbox_service::services(sandbox.clone()));
    let clients = Clients::default();
    let accepted =
        accept(listener, Known::of(&mut services), clients.clone()).context("listen on the shim's socket")?;
    let mut server = Server::new().add_listener(accepted).register_service(services);
    server.start().await?;
    let version = env!("CARGO_PKG_VERSION");
    tracing::info!(version, "serving");
    sandbox.recent().note(EventKind::Sandbox, "the shim serves", serde_json::json!({"version": version}));
    if let Some(Err(error)) = confirmation.map(Confirmation::confirm) {
        tracing::warn!(%error, "`start` has given up");
        sandbox.shutdown(true).await?;
    }
    until_end(&sandbox, &clients).await?;
    // Sends the responses that are in progress.
    server.shutdown().await?;
    Ok(())
}

/// Waits for the sandbox's end, or ends it.
async fn until_end(sandbox: &Arc<Sandbox>, clients: &Clients) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("catch SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("catch SIGINT")?;
    let finished = async {
        sandbox.finished().await;
        // containerd reports a failed ShutdownSandbox if its connection closes before it has read the response.
        clients.gone(CLOSE_WAIT).await;
    };
    let forgotten = async {
        loop {
            tokio::time::sleep(FORGOTTEN_CHECK).await;
            // After the end of a forgotten sandbox, `finished` is ready.
            if let Err(error) = sandbox.end_if_forgotten().await {
                break error;
            }
        }
    };
    tokio::select! {
        () = finished => {}
        error = forgotten => return Err(error.into()),
        _ = terminate.recv() => sandbox.shutdown(true).await?,
        _ = interrupt.recv() => sandbox.shutdown(true).await?,
    }
    Ok(())
}

/// Accepts containerd's connections.
fn accept(listener: UnixListener, known: Known, clients: Clients) -> io::Result<Listener> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    Ok(Listener::new(futures::stream::unfold((listener, known, clients), |(listener, known, clients)| async move {
        let accepted = loop {
            match listener.accept().await {
                Ok((stream, _)) => break known.guard(clients.count(stream)),
                Err(error) => {
                    tracing::error!(%error, "failed to accept a connection of containerd");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        };
        Some((io::Result::Ok(accepted), (listener, known, clients)))
    })))
}

/// Undoes what a dead shim left of an earlier sandbox with this name.
fn undo_dead(namespace: &str, sandbox: &str) -> Result<()> {
    match State::load(&base(), namespace, sandbox) {
        Ok(state) if !state.shim_lives()? => state.undo_all(DELETE_TIMEOUT).context("clean up after an earlier shim"),
        // The server reports a state that cannot be read.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Creates the state of a new sandbox. `start` has undone an earlier one: by now that would remove the new socket.
fn create_state(namespace: &str, sandbox: &str) -> Result<State> {
    match State::create(&base(), namespace, sandbox) {
        Err(StateError::Exists(_)) => {
            let state = State::load(&base(), namespace, sandbox)?;
            bail!("sandbox {sandbox:?} has a state, of process {:?}", state.shim().map(|shim| shim.pid));
        }
        created => Ok(created?),
    }
}

/// `delete`: undoes what the task's shim left, if that shim is dead, and prints a `DeleteResponse`.
///
/// # Errors
/// When the cleanup fails, or the shim is alive and still needed.
pub fn delete(flags: &Flags) -> Result<()> {
    if std::env::var_os(UNDO_ENV).is_some() {
        return undo(flags);
    }
    let mut command = Command::new(std::env::current_exe().context("find the shim's own binary")?);
    command.args(std::env::args_os().skip(1)).env(UNDO_ENV, "1");
    // containerd reads the streams of `delete` until nothing has them open, even after it has killed `delete`.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: setsid is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            Ok(())
        })
    };
    let child = command.spawn().context("start the process that cleans up")?;
    let ended = match ProcessId::of(child.id())? {
        Some(process) => ended(process, DELETE_TIMEOUT)?,
        None => true,
    };
    ensure!(ended, "not clean after {DELETE_TIMEOUT:?}; process {} goes on", child.id());
    let output = child.wait_with_output().context("wait for the process that cleans up")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}", errors.trim().trim_start_matches("io.containerd.husk.v1: "));
    let response =
        DeleteResponse { exit_status: KILLED, exited_at: MessageField::some(Timestamp::now()), ..Default::default() };
    io::stdout().write_all(&response.write_to_bytes()?).context("write stdout")
}

/// Undoes what the task's shim left.
fn undo(flags: &Flags) -> Result<()> {
    let deadline = Instant::now() + DELETE_TIMEOUT;
    // The bundle may be gone or incomplete. A container outside of a pod is its own sandbox.
    let bundle = if flags.bundle.is_empty() { Path::new(".") } else { Path::new(&flags.bundle) };
    let sandbox = sandbox_of(bundle, &flags.id).unwrap_or_else(|_| flags.id.clone());
    match State::load(&base(), &flags.namespace, &sandbox) {
        Ok(state) => clean_up(state, &flags.id, deadline),
        // A shim that has undone everything waits for Shutdown, which a client may not send after a failed Create.
        Err(StateError::NotFound(_)) => match noted_server(bundle) {
            Some(shim) => {
                end(shim, deadline)?;
                remove_socket(bundle)
            }
            None => Ok(()),
        },
        Err(error) => Err(error.into()),
    }
}

/// Removes the socket of a server that has ended before it could record the socket.
fn remove_socket(bundle: &Path) -> Result<()> {
    let address = fs::read_to_string(bundle.join("address")).unwrap_or_default();
    let Some(path) = address.strip_prefix("unix://").filter(|path| UnixStream::connect(path).is_err()) else {
        return Ok(());
    };
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).with_context(|| format!("remove {path}")),
        _ => Ok(()),
    }
}

fn clean_up(state: State, container: &str, deadline: Instant) -> Result<()> {
    let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
    let Some(shim) = state.shim().filter(|_| state.shim_lives().unwrap_or(true)) else {
        return Ok(state.undo_all(UNDO_TIMEOUT)?);
    };
    let others = state.containers().keys().any(|id| id != container);
    if others && !state.containers().contains_key(container) {
        // The shim serves the pod's other containers and has already undone this one.
        return Ok(());
    }
    if others {
        // containerd calls `delete` when it has lost its connection to the shim. A killed shim's sockets close before
        // the process counts as dead.
        ensure!(
            ended(shim, left(deadline) / 2)?,
            "the shim, process {}, is alive and serves {container:?} and other containers of its pod",
            shim.pid
        );
    } else {
        end(shim, deadline)?;
    }
    match State::load(&base(), state.namespace(), state.sandbox()) {
        Ok(state) => Ok(state.undo_all(UNDO_TIMEOUT)?),
        Err(StateError::NotFound(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Ends a shim that is not needed any more. A shim cleans up best by itself, so it is killed only if it does not end.
fn end(shim: ProcessId, deadline: Instant) -> Result<()> {
    shim.send_terminate().context("terminate the shim")?;
    if !ended(shim, deadline.saturating_duration_since(Instant::now()) / 2)? {
        shim.kill(UNDO_TIMEOUT).context("kill the shim")?;
    }
    Ok(())
}

fn ended(shim: ProcessId, within: Duration) -> io::Result<bool> {
    match shim.pidfd()? {
        Some(handle) => wait_dead(&handle, within),
        None => Ok(true),
    }
}
