//! The shim that boots a VM for the pool and waits with it, until `start` gives it a sandbox, which it then serves.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use husk_protos::chain::Chain;
use tokio::net::UnixListener as Listener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};

use crate::console::GuestLogs;
use crate::containerd::log::Log;
use crate::host::socket;
use crate::network;
use crate::pool::handover::{Confirmation, Identity, receive};
use crate::pool::launch;
use crate::pool::members::{self, CLAIMED, OFFERED, join};
use crate::pool::request::PoolRequest;
use crate::prepare::{Attachments, Bootable};
use crate::rootfs::share::Share;
use crate::sandbox::rehearsal::rehearse;
use crate::sandbox::spare::{Spare, Waited};
use crate::serve::serve_as;
use crate::state::journal::Journal;
use crate::state::{Boot, Owner, POOL, base};
use crate::vm::Vm;

/// The log of a shim while it waits, in its directory.
const LOG: &str = "shim.log";
/// The socket, before it is offered.
const NEW: &str = "new.sock";
/// How often a waiting shim looks whether its VM still fits the host's configuration and files, and whether a claim has
/// come to nothing.
const CHECK: Duration = Duration::from_secs(60);
/// How long after a claim a process that has not connected counts as dead.
const CLAIM: Duration = Duration::from_secs(10);
/// How long `start` may take for each part of its message.
const HANDOVER: Duration = Duration::from_secs(2);
/// How long the kernel may take for a network namespace.
const NETWORK: Duration = Duration::from_secs(10);

/// `fill-pool`: starts as many waiting shims as the pool lacks, or one, if the pool has none of the requested kind.
///
/// # Errors
/// When the configuration or the host does not allow it, or a process cannot be started.
pub fn fill() -> Result<()> {
    let request = launch::requested()?;
    let boot = Bootable::for_pool("pool", &request)?;
    let Some(key) = boot.key() else { bail!("VMs with this configuration cannot wait in a pool") };
    let size = boot.config.pool.size as usize;
    let waiting = members::waiting(&base())?;
    let known = waiting.iter().any(|(member, _)| member.key() == key);
    let program = std::env::current_exe().context("find the shim's own binary")?;
    for _ in 0..size.saturating_sub(waiting.len()).max(usize::from(!known && size > 0)) {
        launch::wait(&program, &request).context("start a shim that waits")?;
    }
    // What waits with an older configuration or older files looks at once instead of later.
    for shim in waiting.iter().filter_map(|(_, state)| state.shim()) {
        shim.send_hangup().context("notify a waiting shim")?;
    }
    Ok(())
}

/// `wait-in-pool`: boots a VM and waits with it.
///
/// # Errors
/// When the VM does not boot, or something cannot be undone at the end.
pub fn wait() -> Result<()> {
    crate::host::child::reserve().context("reserve descriptors")?;
    crate::vmm::tsc::begin();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let waited = runtime.block_on(wait_with_vm());
    // Do not wait for threads in blocking calls.
    runtime.shutdown_background();
    waited
}

async fn wait_with_vm() -> Result<()> {
    // Before others can find this process: without a handler, the signal would end it.
    let asked = signal(SignalKind::hangup()).context("catch SIGHUP")?;
    let request = launch::requested()?;
    let boot = Bootable::for_pool("pool", &request)?;
    let Some(key) = boot.key() else { bail!("VMs with this configuration cannot wait in a pool") };
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(std::io::Error::other).context("choose a name")?;
    let joined = join(&base(), &key, boot.machine.memory_mib, &boot.config.pool, u64::from_ne_bytes(random))?;
    let Some(state) = joined else { return Ok(()) };
    let id = state.sandbox().to_owned();
    let journal = Journal::new(state);
    let log = Log::init_waiting(&journal.dir().join(LOG), POOL, &id).context("open the log")?;
    let kind = Kind { boot, request, key };
    let outcome = until_claimed(&kind, &journal, &log, asked).await;
    match outcome {
        Ok(Some((identity, listener, waited))) => {
            let served = serve_as(&identity, listener, journal.clone(), Some(waited)).await;
            if served.is_err() {
                journal.undo_all().await?;
            }
            served
        }
        Ok(None) => Ok(journal.undo_all().await?),
        Err(error) => {
            tracing::error!(error = %Chain(error.as_ref()), "failed to wait with a VM");
            journal.undo_all().await?;
            Err(error)
        }
    }
}

/// The sandbox that the shim has got, its listening socket, and what has waited for it.
type Given = (Identity, UnixListener, (Waited, Confirmation));

/// Boots a VM and waits until somebody has a sandbox for it. None if nobody has, or the VM cannot be used any more.
async fn until_claimed(kind: &Kind, journal: &Journal, log: &Log, asked: Signal) -> Result<Option<Given>> {
    let mut terminate = signal(SignalKind::terminate()).context("catch SIGTERM")?;
    let waited = tokio::select! {
        booted = boot_vm(kind, journal) => booted?,
        _ = terminate.recv() => return Ok(None),
    };
    let vm = waited.spare.vm.clone();
    let handed = tokio::select! {
        handed = offer(kind, journal, asked) => handed?,
        cause = vm.died() => {
            tracing::warn!(cause, "the waiting VM is dead");
            None
        }
        _ = terminate.recv() => None,
    };
    let Some((identity, listener, confirmation)) = handed else {
        vm.discard().await?;
        return Ok(None);
    };
    let Identity { namespace, sandbox, bundle, debug, .. } = &identity;
    journal.with(|state| state.adopt(namespace, sandbox))?;
    std::env::set_current_dir(bundle).context("enter the bundle")?;
    log.move_to("log".as_ref(), *debug, namespace, sandbox).context("open the log fifo")?;
    Ok(Some((identity, listener, (waited, confirmation))))
}

/// Boots the VM as a sandbox does, in a network namespace of its own and with an empty share.
async fn boot_vm(Kind { boot, key, .. }: &Kind, journal: &Journal) -> Result<Waited> {
    let mut record = |steps| journal.record(&Owner::Sandbox, steps);
    let share = Share::create(journal.dir(), &mut record)?;
    let network = tokio::task::spawn_blocking(|| network::create(NETWORK)).await??;
    let logs = GuestLogs::new(journal.dir());
    let attachments =
        Attachments { network: Some(network.claim().clone()), ..Attachments::new(share.path().to_owned()) };
    let (vmm, plan) = boot.plan(attachments, None, None);
    let mut reached = Boot::begin();
    let (vm, mut events) = Vm::boot(&*vmm, &plan, journal, &logs, &mut reached).await?;
    let last_event = rehearse(&vm, &share, journal, &mut events).await.context("rehearse")?;
    let spare = Spare { vm, events, last_event, key: key.clone(), boot: reached };
    Ok(Waited { spare, share, network, logs })
}

/// Offers the VM until somebody hands a sandbox over. None if the shim has withdrawn the offer.
async fn offer(
    kind: &Kind,
    journal: &Journal,
    mut asked: Signal,
) -> Result<Option<(Identity, UnixListener, Confirmation)>> {
    let offered = journal.dir().join(OFFERED);
    let listener = Listener::from_std(socket::listen(journal.dir(), NEW).context("listen")?)?;
    std::fs::rename(journal.dir().join(NEW), &offered).context("offer the VM")?;
    tracing::info!("the VM waits");
    let idle = Instant::now() + kind.boot.config.pool.idle;
    let mut check = interval_at(Instant::now() + CHECK, CHECK);
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut claimed = None;
    loop {
        let withdraw = tokio::select! {
            accepted = listener.accept() => {
                match hand_over(accepted.context("accept")?.0, &offered).await {
                    Ok(handed) => return Ok(Some(handed)),
                    Err(error) => tracing::warn!(error = %Chain(error.as_ref()), "no sandbox was handed over"),
                }
                false
            }
            () = sleep_until(idle) => true,
            _ = check.tick() => kind.is_stale().await,
            _ = asked.recv() => kind.is_stale().await,
        };
        if !offered.exists() {
            // A process that claims the VM connects at once, or has died.
            if claimed.get_or_insert_with(Instant::now).elapsed() >= CLAIM {
                tracing::warn!("a claim has come to nothing");
                return Ok(None);
            }
        } else if withdraw && std::fs::rename(&offered, journal.dir().join(CLAIMED)).is_ok() {
            tracing::info!("the VM does not wait any longer");
            return Ok(None);
        }
    }
}

async fn hand_over(stream: tokio::net::UnixStream, offered: &Path) -> Result<(Identity, UnixListener, Confirmation)> {
    let stream = stream.into_std()?;
    let handed = tokio::task::spawn_blocking(move || receive(stream, HANDOVER)).await??;
    // Whoever has not claimed it would have to share it.
    if offered.exists() { bail!("the VM was not claimed before") } else { Ok(handed) }
}

/// The kind of VM that waits.
struct Kind {
    boot: Bootable,
    request: PoolRequest,
    key: String,
}

impl Kind {
    /// Whether another VM would be booted by now.
    async fn is_stale(&self) -> bool {
        let request = self.request.clone();
        // An error counts as a change: no sandbox could boot a VM.
        let now = tokio::task::spawn_blocking(move || Bootable::for_pool("pool", &request).ok()?.key()).await;
        now.ok().flatten().as_ref() != Some(&self.key)
    }
}
