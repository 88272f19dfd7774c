//! How `start` gets a VM from the pool: it claims a waiting shim and hands the sandbox over. Whatever fails, the sandbox
//! boots a VM of its own.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use containerd_shim_protos::api::CreateTaskRequest;
use husk_protos::chain::Chain;

use crate::containerd::bootstrap::StartParams;
use crate::containerd::log::Log;
use crate::containerd::options::RuntimeOptions;
use crate::host::process::ProcessId;
use crate::pool::handover::{Identity, give};
use crate::pool::members::{Member, offered};
use crate::prepare::{SandboxName, Siblings, prepare};
use crate::state::{POOL, base};
use crate::vm::cgroup::Hierarchies;

/// How long the claimed shim may take for each step of the handover: a file, a link and two sockets.
const HANDOVER: Duration = Duration::from_secs(2);

/// The sandbox that needs a server.
pub(crate) struct ClaimRequest<'a> {
    /// What containerd has passed.
    pub(crate) start: &'a StartParams,
    /// The runtime's options.
    pub(crate) options: &'a RuntimeOptions,
    /// The sandbox's id.
    pub(crate) sandbox: &'a str,
    /// The path of its listening socket.
    pub(crate) socket: &'a Path,
}

/// What has come of it.
pub(crate) enum Claimed {
    /// This shim serves the sandbox.
    Serves(Member, ProcessId),
    /// No VM that fits was waiting.
    None,
    /// One was, but the handover failed. Its shim is dead, and all that it has made is undone.
    Failed,
}

/// Claims a VM for a sandbox, and gives its shim the listening socket.
pub(crate) fn claim(request: &ClaimRequest<'_>, listener: &UnixListener) -> Claimed {
    try_claim(request, listener).unwrap_or_else(|error| {
        log(request, &error);
        Claimed::Failed
    })
}

fn try_claim(request: &ClaimRequest<'_>, listener: &UnixListener) -> Result<Claimed> {
    let base = base();
    // Most hosts have no pool.
    if !base.join(POOL).is_dir() {
        return Ok(Claimed::None);
    }
    let Some(key) = key(request) else { return Ok(Claimed::None) };
    for member in offered(&base, &key)? {
        if !member.claim()? {
            continue;
        }
        // Nobody has looked at the pool since its shim has died.
        let Some(shim) = member.shim()? else {
            member.end(Duration::ZERO).context("undo what a dead waiting shim has left")?;
            continue;
        };
        return match hand_over(request, &member, shim, listener) {
            Ok(()) => Ok(Claimed::Serves(member, shim)),
            Err(error) => {
                log(request, &error);
                member.end(Duration::ZERO).context("end a waiting shim that does not take its sandbox")?;
                Ok(Claimed::Failed)
            }
        };
    }
    Ok(Claimed::None)
}

/// The key of the VM that the sandbox would boot. None if that cannot be told, for example because something is wrong
/// with its spec: Create reports that.
fn key(ClaimRequest { start, options, sandbox, .. }: &ClaimRequest<'_>) -> Option<String> {
    // A sandbox of the Sandbox API has no spec yet, and the pool's shims wait in the cgroup of others.
    if options.shim_cgroup.is_some() || !Path::new("config.json").exists() {
        return None;
    }
    let request = CreateTaskRequest {
        id: start.id.clone(),
        bundle: std::env::current_dir().ok()?.display().to_string(),
        options: start.options.first().cloned().into(),
        ..Default::default()
    };
    let name = SandboxName { namespace: &start.namespace, id: sandbox };
    let prepared = prepare(&request, name, Siblings::NONE).ok()?;
    prepared.pool_key().filter(|_| prepared.pool_size() > 0)
}

fn hand_over(request: &ClaimRequest<'_>, member: &Member, shim: ProcessId, listener: &UnixListener) -> Result<()> {
    // Where a new shim would be.
    Hierarchies::of_host()?.bring(shim).context("move it to the cgroup of `start`")?;
    let identity = Identity {
        namespace: request.start.namespace.clone(),
        sandbox: request.sandbox.to_owned(),
        bundle: fs::canonicalize(".").context("find the bundle")?,
        socket: request.socket.to_owned(),
        ttrpc_address: request.start.ttrpc_address.clone(),
        debug: request.start.debug,
    };
    give(&member.dir(), &identity, listener, HANDOVER).context("hand the sandbox over")
}

/// Logs why the sandbox boots a VM of its own. `start` must print nothing.
fn log(request: &ClaimRequest<'_>, error: &anyhow::Error) {
    let start = request.start;
    // Fails if the log is installed already, or if nobody reads it.
    let _ = Log::init(Path::new("log"), start.debug, &start.namespace, request.sandbox);
    tracing::warn!(error = %Chain(error.as_ref()), "a waiting shim did not take the sandbox, which boots its own VM");
}
