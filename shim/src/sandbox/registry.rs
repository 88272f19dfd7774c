//! What a sandbox consists of: its VM and its containers, and how calls find them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::lock::lock;
use tokio::sync::watch;

use crate::console::GuestLogs;
use crate::containerd::publisher::Publisher;
use crate::disks::layers::Store;
use crate::forward::address::Forwarding;
use crate::forward::socket::Sockets;
use crate::host::cgroup::Limits;
use crate::network::{Claim, PrivateNamespace};
use crate::pool::request::PoolRequest;
use crate::prepare::{BootedWith, SandboxName};
use crate::rootfs::share::Share;
use crate::rootfs::spec::Demand;
use crate::rootfs::spec::resources::HostResources;
use crate::sandbox::container::Container;
use crate::sandbox::container::process::Process;
use crate::sandbox::disk_table::Disks;
use crate::sandbox::error::{SandboxError, not_found};
use crate::sandbox::managed::Managed;
use crate::sandbox::spare::{Spare, Waited};
use crate::sandbox::watch::Watches;
use crate::state::journal::Journal;
use crate::state::life::VmState;
use crate::vm::cgroup::HostCgroup;
use crate::vm::{BootError, Vm};

/// How long to wait for containerd's Shutdown after everything has been cleaned up.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(10);

/// The resources of the host that each container names.
pub(super) type Cpusets = BTreeMap<String, HostResources>;

/// The `oomScoreAdj` of each container, if its spec has one.
pub(super) type Scores = BTreeMap<String, Option<i32>>;

/// What each container requires of the VM's size.
pub(super) type Demands = BTreeMap<String, Demand>;

/// The outcome of a boot, shared by all containers that wait for it. `None` while the boot runs.
pub(super) type Booting = watch::Receiver<Option<Result<Arc<Vm>, Arc<BootError>>>>;

/// The place of the sandbox's VM.
pub(super) enum VmSlot {
    /// No container has requested the VM, or the last boot failed.
    Empty,
    /// The first container boots the VM; others wait for it.
    Booting(Booting),
    /// The VM runs, or died without a request to stop.
    Up(Arc<Vm>),
    /// The VM is being stopped or has stopped.
    Stopping,
}

/// The place of one container.
pub(super) enum ContainerSlot {
    /// The id is reserved; the container does not exist yet.
    Creating,
    Ready(Arc<Container>),
}

pub(super) struct Slots {
    pub(super) vm: VmSlot,
    /// A VM from the pool, for the first boot.
    pub(super) spare: Option<Spare>,
    /// What the VM was or is being booted with.
    pub(super) booted_with: BootedWith,
    /// The host's network namespace that the VM is connected to.
    pub(super) network: Option<Claim>,
    /// The network namespace that the shim has created.
    pub(super) private_network: Option<PrivateNamespace>,
    /// The container that uses the VM's network namespace if its spec asks for a new one.
    pub(super) first: Option<String>,
    pub(super) share: Option<Share>,
    /// Forwards connections inside the network namespace while the VM runs.
    pub(super) forwarding: Option<Forwarding>,
    pub(super) containers: HashMap<String, ContainerSlot>,
    /// The last container is being deleted, and the VM ends with it: there will be no other.
    pub(super) ends: bool,
    /// Volumes that another sandbox shares, of which the log has warned.
    pub(super) warned_of: HashSet<PathBuf>,
    /// The sandbox itself, if the Sandbox API manages it.
    pub(super) managed: Option<Managed>,
}

/// Images of layers that are to be made.
#[derive(Debug)]
pub(super) struct WantedLayers {
    pub(super) store: Store,
    pub(super) layers: Vec<PathBuf>,
}

/// The sandbox of one shim.
pub(crate) struct Sandbox {
    pub(super) id: String,
    pub(super) namespace: String,
    pub(super) journal: Journal,
    pub(super) publisher: Publisher,
    pub(super) guest_logs: GuestLogs,
    /// The Unix sockets of the host that containers mount.
    pub(super) sockets: Sockets,
    /// The sources whose changes by the host reach the guest.
    pub(super) watches: Watches,
    pub(super) disks: Disks,
    /// The cgroup of the sandbox's processes on the host. Locked while it is created, which blocks.
    pub(super) cgroup: tokio::sync::Mutex<Option<HostCgroup>>,
    /// The CPUs and memory nodes of the host that the containers name. Locked while the cgroup changes.
    pub(super) cpusets: tokio::sync::Mutex<Cpusets>,
    /// What the containers require of the VM's size.
    pub(super) demands: Mutex<Demands>,
    /// Locked while the VM grows.
    pub(super) growth: tokio::sync::Mutex<()>,
    /// The scores of the containers for the host's OOM killer.
    pub(super) oom_scores: Mutex<Scores>,
    /// The most memory that the sandbox's processes may take on the host, bytes, if its cgroup is to be limited.
    pub(super) host_memory: Mutex<Option<u64>>,
    /// The limits of the sandbox's cgroup.
    pub(super) host_limits: Mutex<Limits>,
    /// The shim has moved to the sandbox's cgroup.
    pub(super) in_cgroup: Mutex<bool>,
    /// The VM that replaces the one from the pool, once the first container runs.
    pub(super) refill: Mutex<Option<PoolRequest>>,
    /// Images of layers that are to be made after the next start.
    pub(super) wanted_layers: Mutex<Option<WantedLayers>>,
    slots: Mutex<Slots>,
    /// True after everything has been cleaned up.
    pub(super) ended: watch::Sender<bool>,
    /// True after containerd has requested the shutdown.
    pub(super) shutdown_requested: watch::Sender<bool>,
}

impl Sandbox {
    /// The sandbox's name on this host.
    pub(super) fn name(&self) -> SandboxName<'_> {
        SandboxName { namespace: &self.namespace, id: &self.id }
    }

    /// An empty sandbox, perhaps with a VM that has waited for it.
    pub(crate) fn new(
        id: &str,
        namespace: &str,
        journal: Journal,
        publisher: Publisher,
        waited: Option<Waited>,
    ) -> Arc<Self> {
        let (spare, share, private_network, logs) = match waited {
            Some(Waited { spare, share, network, logs }) => (Some(spare), Some(share), Some(network), Some(logs)),
            None => (None, None, None, None),
        };
        Arc::new(Self {
            id: id.to_owned(),
            namespace: namespace.to_owned(),
            guest_logs: logs.unwrap_or_else(|| GuestLogs::new(journal.dir())),
            journal,
            publisher,
            sockets: Sockets::default(),
            watches: Watches::default(),
            disks: Disks::default(),
            cgroup: tokio::sync::Mutex::default(),
            cpusets: tokio::sync::Mutex::default(),
            demands: Mutex::default(),
            growth: tokio::sync::Mutex::default(),
            oom_scores: Mutex::default(),
            host_memory: Mutex::default(),
            host_limits: Mutex::default(),
            in_cgroup: Mutex::default(),
            refill: Mutex::default(),
            wanted_layers: Mutex::default(),
            slots: Mutex::new(Slots {
                vm: VmSlot::Empty,
                spare,
                booted_with: BootedWith::default(),
                network: None,
                private_network,
                first: None,
                share,
                forwarding: None,
                containers: HashMap::new(),
                ends: false,
                warned_of: HashSet::new(),
                managed: None,
            }),
            ended: watch::channel(false).0,
            shutdown_requested: watch::channel(false).0,
        })
    }

    /// Waits until everything has been cleaned up.
    pub(crate) async fn ended(&self) {
        // Cannot fail: self holds the sender.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// Waits until everything has been cleaned up and containerd has requested Shutdown, which it does after each
    /// Delete. The shim must not exit before: containerd may not have read the response to Delete yet, and its TTRPC
    /// client discards a response that is still unread when the connection closes.
    pub(crate) async fn finished(&self) {
        self.ended().await;
        let mut requested = self.shutdown_requested.subscribe();
        if tokio::time::timeout(SHUTDOWN_WAIT, requested.wait_for(|requested| *requested)).await.is_err() {
            tracing::warn!(waited_ms = SHUTDOWN_WAIT.as_millis() as u64, "containerd has not requested the shutdown");
        }
    }

    /// The PID of a container's holder; 0 while the container is being created.
    pub(crate) fn pid(&self, id: &str) -> Result<u32, SandboxError> {
        Ok(self.process(id, "")?.1.pid())
    }

    /// Replaces an error that may have come from the VM's death, such as that of a call that was lost on its way to the
    /// guest, with the cause of death, if the VM died. The shim may notice the death a moment after the lost call, so
    /// this waits for it.
    pub(crate) async fn explain(&self, error: SandboxError) -> SandboxError {
        let lost = error.may_be_death();
        let vm = match &self.lock().vm {
            VmSlot::Up(vm) if lost => vm.clone(),
            _ => return error,
        };
        vm.died_under_call().await.map_or(error, |cause| SandboxError::VmDead { cause })
    }

    pub(super) fn live_vm(&self) -> Result<Arc<Vm>, SandboxError> {
        match &self.lock().vm {
            VmSlot::Up(vm) => alive(vm),
            VmSlot::Stopping => Err(SandboxError::Stopping),
            VmSlot::Empty | VmSlot::Booting(_) => {
                Err(SandboxError::VmDead { cause: "it has not booted yet".to_owned() })
            }
        }
    }

    /// Records the VM's new state. A failure to record it is logged; the VM keeps running.
    pub(super) fn set_vm_state(&self, to: VmState, cause: &str) {
        if let Err(error) = self.journal.set_vm_state(to, cause) {
            tracing::error!(%to, cause, error = %Chain(&error), "failed to record the VM's state");
        }
    }

    pub(super) fn record_vm_death(&self, cause: &str) {
        if let Err(error) = self.journal.record_vm_death(cause) {
            tracing::error!(cause, error = %Chain(&error), "failed to record the VM's death");
        }
    }

    /// A container and its process with this exec id; an empty exec id stands for the init process.
    pub(super) fn process(&self, id: &str, exec_id: &str) -> Result<(Arc<Container>, Arc<Process>), SandboxError> {
        let container = self.container(id)?;
        let process = container.process(exec_id).ok_or_else(|| not_found("process", exec_id))?;
        Ok((container, process))
    }

    pub(super) fn container(&self, id: &str) -> Result<Arc<Container>, SandboxError> {
        match self.lock().containers.get(id) {
            Some(ContainerSlot::Ready(container)) => Ok(container.clone()),
            Some(ContainerSlot::Creating) | None => Err(not_found("task", id)),
        }
    }

    pub(super) fn containers(&self) -> Vec<Arc<Container>> {
        let slots = self.lock();
        let ready = slots.containers.values().filter_map(|slot| match slot {
            ContainerSlot::Ready(container) => Some(container.clone()),
            ContainerSlot::Creating => None,
        });
        ready.collect()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Slots> {
        lock(&self.slots)
    }
}

pub(super) fn alive(vm: &Arc<Vm>) -> Result<Arc<Vm>, SandboxError> {
    match vm.cause_of_death() {
        Some(cause) => Err(SandboxError::VmDead { cause }),
        None => Ok(vm.clone()),
    }
}
