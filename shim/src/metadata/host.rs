//! The metadata service for all VMs of a host, where the kernel's vsock device carries their connections: it tells the CID that one comes from, the
//! leases whose that is, and the sandbox's state the rest.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream;
use husk_protos::PORT_METADATA;
use husk_protos::metadata::GetMetadataResponse;
use ttrpc::Code;

use crate::config::settings::TokenSettings;
use crate::config::workspace::Workspace;
use crate::metadata::service::{Refusal, Source, serve};
use crate::metadata::token::Identity;
use crate::metadata::{Issuer, response, workspace_file};
use crate::state::cid::{CidError, Leases};
use crate::state::{State, StateError};
use husk_vsock::kernel;

/// Why a caller is nobody's VM. For the host's log: a caller learns no more than that it is not known.
#[derive(Debug, thiserror::Error)]
enum Unknown {
    #[error("{0}")]
    Cid(#[from] CidError),
    #[error("{0}")]
    State(#[from] StateError),
    #[error("no sandbox has leased it")]
    NotLeased,
    #[error("the sandbox {0} that has leased it has another shim by now")]
    Successor(String),
    #[error("the sandbox {0} that has leased it has no machine with it")]
    Former(String),
    #[error("the sandbox {0} that has leased it has no QEMU that runs")]
    Dead(String),
    #[error("read the workspace {}: {source}", path.display())]
    Workspace { path: PathBuf, source: std::io::Error },
    #[error("look for QEMU in /proc: {0}")]
    Process(std::io::Error),
}

/// Which VM has this CID now, and its workspace.
fn find(base: &Path, cid: u32) -> Result<(Identity, Option<Workspace>), Unknown> {
    let holder = Leases::under(base).holder(cid)?.ok_or(Unknown::NotLeased)?;
    let state = State::load(base, &holder.namespace, &holder.sandbox)?;
    if state.shim() != Some(holder.shim) {
        return Err(Unknown::Successor(holder.sandbox));
    }
    // A sandbox whose VM did not come up may have booted another.
    let machine =
        state.machine().filter(|machine| machine.cid == cid).ok_or(Unknown::Former(holder.sandbox.clone()))?;
    // While it lives, the kernel gives the CID to nobody else.
    if !machine.process.runs().map_err(Unknown::Process)? {
        return Err(Unknown::Dead(holder.sandbox));
    }
    let path = workspace_file(state.dir());
    let workspace = Workspace::read_back(&path).map_err(|source| Unknown::Workspace { path, source })?;
    Ok((Identity { namespace: holder.namespace, sandbox: holder.sandbox, cid }, workspace))
}

/// Answers for all VMs whose state is under `base`.
struct AllVms {
    base: PathBuf,
    issuer: Issuer,
}

#[async_trait]
impl Source for AllVms {
    async fn get(&self, cid: u32) -> Result<GetMetadataResponse, Refusal> {
        let base = self.base.clone();
        let found = tokio::task::spawn_blocking(move || find(&base, cid).map_err(|error| error.to_string())).await;
        match found.unwrap_or_else(|error| Err(error.to_string())) {
            Ok((identity, workspace)) => Ok(response(self.issuer.issue(identity).await?, workspace.as_ref())),
            Err(error) => {
                tracing::debug!(cid, error, "a caller that is no VM of husk's");
                Err(Refusal { code: Code::NOT_FOUND, message: format!("no VM of husk's has CID {cid}") })
            }
        }
    }
}

/// Answers every guest of the machine that dials the port, without end.
///
/// # Errors
///
/// When the port cannot be listened on: another process does, or the kernel has no vsock.
pub async fn serve_all(base: PathBuf, settings: TokenSettings) -> Result<(), husk_vsock::VsockError> {
    let listener = kernel::KernelListener::bind(PORT_METADATA)?;
    tracing::info!(port = PORT_METADATA, "answering all VMs on the kernel's vsock");
    let incoming = stream::unfold(listener, |listener| async move { Some((listener.accept().await, listener)) });
    serve(Box::pin(incoming), Arc::new(AllVms { base, issuer: Issuer::new(settings) })).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::process::ProcessId;
    use crate::state::cid::Holder;
    use crate::state::{MachineRecord, Owner, Step};
    use std::process::Command;

    fn machine(cid: u32, pid: u32) -> MachineRecord {
        MachineRecord {
            process: ProcessId::of(pid).unwrap().unwrap(),
            cid,
            vcpus: 1,
            memory_mib: 64,
            accel: String::new(),
            board: String::new(),
            kernel_file: String::new(),
            initrd_file: String::new(),
            debug: false,
            kernel: None,
            init: None,
        }
    }

    #[tokio::test]
    async fn a_cid_is_the_vm_that_has_leased_it_as_long_as_its_qemu_lives() {
        let base = tempfile::tempdir().unwrap();
        let key = base.path().join("key");
        let settings = TokenSettings { key, lifetime: std::time::Duration::from_secs(1) };
        let source = AllVms { base: base.path().to_owned(), issuer: Issuer::new(settings) };
        let refused = |cid: u32| {
            let message = format!("no VM of husk's has CID {cid}");
            Err(Refusal { code: Code::NOT_FOUND, message })
        };
        let leases = Leases::under(base.path());
        let mut vms = Vec::new();
        for (sandbox, workspace) in [("s1", Some("one")), ("s2", None)] {
            let mut qemu = Command::new("sleep").arg("60").spawn().unwrap();
            let mut state = State::create(base.path(), "ns", sandbox).unwrap();
            let (namespace, name) = ("ns".to_owned(), sandbox.to_owned());
            let holder = Holder { namespace, sandbox: name, shim: ProcessId::own().unwrap() };
            let shim = holder.shim;
            let mut record = |cid| state.record(&Owner::Sandbox, [Step::Cid { cid, leases: leases.clone(), shim }]);
            let cid = leases.lease(4..=9, &holder, &mut record, &mut |_| Ok(true)).unwrap();
            // Leased, but not started: another's guest could have the CID.
            assert_eq!(source.get(cid).await, refused(cid));
            state.set_machine(machine(cid, qemu.id()));
            state.save().unwrap();
            if let Some(workspace) = workspace {
                std::fs::write(workspace_file(state.dir()), workspace).unwrap();
            }
            let (identity, found) = find(base.path(), cid).unwrap();
            assert_eq!(identity, Identity { namespace: "ns".into(), sandbox: sandbox.into(), cid });
            assert_eq!(found.as_ref().map(Workspace::bytes), workspace.map(str::as_bytes));
            let answer = source.get(cid).await.unwrap();
            assert_eq!(answer.workspace.as_deref(), workspace.map(str::as_bytes));
            assert_eq!(answer.token.split('.').count(), 3);
            if sandbox == "s2" {
                qemu.kill().unwrap();
                qemu.wait().unwrap();
                assert_eq!(source.get(cid).await, refused(cid));
            }
            vms.push((cid, qemu, state));
        }
        for cid in [0, 1, 2, 3, 6, 65535, u32::MAX] {
            assert_eq!(source.get(cid).await, refused(cid));
        }
        let (cid, mut qemu, mut state) = vms.swap_remove(0);
        // It boots again, with another CID: the one before may be anybody's.
        for (with, found) in [(7, false), (cid, true)] {
            state.set_machine(machine(with, qemu.id()));
            state.save().unwrap();
            assert_eq!(source.get(cid).await.is_ok(), found, "{with}");
        }
        // Its lease is a dead shim's, and the sandbox of that name has a shim that has none.
        let path = base.path().join(".cids").join(cid.to_string());
        let lease = std::fs::read_to_string(&path).unwrap().replace("\"start_time\":", "\"start_time\":1");
        std::fs::write(&path, lease).unwrap();
        assert_eq!(source.get(cid).await, refused(cid));
        qemu.kill().unwrap();
        qemu.wait().unwrap();
    }
}
