//! The metadata service for all VMs of a host whose connections the kernel's vsock device carries. The kernel reports a
//! caller's CID, the leases name the CID's sandbox, and the sandbox's state has the rest.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream;
use husk_protos::PORT_METADATA;
use husk_protos::chain::Chain;
use husk_protos::metadata::GetMetadataResponse;
use ttrpc::Code;

use crate::config::settings::TokenSettings;
use crate::config::workspace::Workspace;
use crate::metadata::issuer::{Issuer, response};
use crate::metadata::one_vm::workspace_file;
use crate::metadata::service::{MetadataSource, Refusal, serve};
use crate::metadata::token::Identity;
use crate::state::cid::{CidError, Leases};
use crate::state::{State, StateError};
use husk_vsock::kernel;

/// Why a caller cannot be identified. For the host's log: the caller only learns that it is unknown.
#[derive(Debug, thiserror::Error)]
enum UnknownCaller {
    #[error(transparent)]
    Cid(#[from] CidError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("no sandbox has leased the CID")]
    NotLeased,
    #[error("the sandbox {0}, which leased the CID, has another shim now")]
    Successor(String),
    #[error("the sandbox {0}, which leased the CID, has no machine with it")]
    Former(String),
    #[error("the QEMU of the sandbox {0}, which leased the CID, does not run")]
    Dead(String),
    #[error("read the workspace {}", path.display())]
    Workspace { path: PathBuf, source: std::io::Error },
    #[error("look up QEMU in /proc")]
    Process(#[source] std::io::Error),
}

/// The VM that has this CID now, and its workspace.
fn find(base: &Path, cid: u32) -> Result<(Identity, Option<Workspace>), UnknownCaller> {
    let holder = Leases::under(base).holder(cid)?.ok_or(UnknownCaller::NotLeased)?;
    let state = State::load(base, &holder.namespace, &holder.sandbox)?;
    if state.shim() != Some(holder.shim) {
        return Err(UnknownCaller::Successor(holder.sandbox));
    }
    // A sandbox whose VM failed to boot may have booted another one, with another CID.
    let machine =
        state.machine().filter(|machine| machine.cid == cid).ok_or(UnknownCaller::Former(holder.sandbox.clone()))?;
    // While QEMU runs, the kernel gives the CID to no other process.
    if !machine.process.runs().map_err(UnknownCaller::Process)? {
        return Err(UnknownCaller::Dead(holder.sandbox));
    }
    let path = workspace_file(state.dir());
    let workspace = Workspace::read_back(&path).map_err(|source| UnknownCaller::Workspace { path, source })?;
    Ok((Identity { namespace: holder.namespace, sandbox: holder.sandbox, cid }, workspace))
}

/// The metadata of all VMs whose state is under `base`.
struct AllVms {
    base: PathBuf,
    issuer: Issuer,
}

#[async_trait]
impl MetadataSource for AllVms {
    async fn get(&self, cid: u32, audience: String) -> Result<GetMetadataResponse, Refusal> {
        let base = self.base.clone();
        let found =
            tokio::task::spawn_blocking(move || find(&base, cid).map_err(|error| Chain(&error).to_string())).await;
        match found.unwrap_or_else(|error| Err(Chain(&error).to_string())) {
            Ok((identity, workspace)) => Ok(response(self.issuer.issue(identity, audience).await?, workspace.as_ref())),
            Err(error) => {
                tracing::debug!(cid, error, "a caller is not a VM of husk");
                Err(Refusal { code: Code::NOT_FOUND, message: format!("no VM of husk has CID {cid}") })
            }
        }
    }
}

/// Serves every guest on the host that connects to the port. Does not return.
///
/// # Errors
///
/// When the port is taken, or the kernel has no vsock.
pub async fn serve_all(base: PathBuf, settings: TokenSettings) -> Result<(), husk_vsock::VsockError> {
    let listener = kernel::KernelListener::bind(PORT_METADATA)?;
    tracing::info!(port = PORT_METADATA, "serving metadata to all VMs on the kernel's vsock device");
    let incoming = stream::unfold(listener, |listener| async move { Some((listener.accept().await, listener)) });
    serve(Box::pin(incoming), Arc::new(AllVms { base, issuer: Issuer::new(settings) })).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::process::ProcessId;
    use crate::state::lease::Holder;
    use crate::state::{MachineRecord, Owner, Step};
    use std::process::Command;

    fn machine(cid: u32, pid: u32) -> MachineRecord {
        MachineRecord {
            process: ProcessId::of(pid).unwrap().unwrap(),
            cid,
            vcpus: 1,
            max_vcpus: 1,
            memory_mib: 64,
            max_memory_mib: 64,
            cache_mib: 0,
            accel: String::new(),
            board: String::new(),
            kernel_file: String::new(),
            initrd_file: String::new(),
            debug: false,
            user_mode: false,
            ports: Vec::new(),
            kernel: None,
            init: None,
        }
    }

    #[tokio::test]
    async fn a_cid_identifies_the_vm_that_leased_it_while_its_qemu_runs() {
        let base = tempfile::tempdir().unwrap();
        let key = base.path().join("key");
        let settings = TokenSettings { key, lifetime: std::time::Duration::from_secs(1), host: None };
        let source = AllVms { base: base.path().to_owned(), issuer: Issuer::new(settings) };
        let refused = |cid: u32| {
            let message = format!("no VM of husk has CID {cid}");
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
            // Leased, but the VM has not started: another guest could have the CID.
            assert_eq!(source.get(cid, String::new()).await, refused(cid));
            state.set_machine(machine(cid, qemu.id()));
            state.save().unwrap();
            if let Some(workspace) = workspace {
                std::fs::write(workspace_file(state.dir()), workspace).unwrap();
            }
            let (identity, found) = find(base.path(), cid).unwrap();
            assert_eq!(identity, Identity { namespace: "ns".into(), sandbox: sandbox.into(), cid });
            assert_eq!(found.as_ref().map(Workspace::bytes), workspace.map(str::as_bytes));
            let response = source.get(cid, String::new()).await.unwrap();
            assert_eq!(response.workspace.as_deref(), workspace.map(str::as_bytes));
            assert_eq!(response.token.split('.').count(), 3);
            if sandbox == "s2" {
                qemu.kill().unwrap();
                qemu.wait().unwrap();
                assert_eq!(source.get(cid, String::new()).await, refused(cid));
            }
            vms.push((cid, qemu, state));
        }
        for cid in [0, 1, 2, 3, 6, 65535, u32::MAX] {
            assert_eq!(source.get(cid, String::new()).await, refused(cid));
        }
        let (cid, mut qemu, mut state) = vms.swap_remove(0);
        // After another boot with another CID, the first CID may belong to any VM.
        for (with, found) in [(7, false), (cid, true)] {
            state.set_machine(machine(with, qemu.id()));
            state.save().unwrap();
            assert_eq!(source.get(cid, String::new()).await.is_ok(), found, "{with}");
        }
        // The lease belongs to a dead shim; the sandbox has another shim without a lease.
        let path = base.path().join(".cids").join(cid.to_string());
        let lease = std::fs::read_to_string(&path).unwrap().replace("\"start_time\":", "\"start_time\":1");
        std::fs::write(&path, lease).unwrap();
        assert_eq!(source.get(cid, String::new()).await, refused(cid));
        qemu.kill().unwrap();
        qemu.wait().unwrap();
    }
}
