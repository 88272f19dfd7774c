//! The boot of a VM, step by step. On failure, the processes that were started are killed; the caller undoes what the
//! journal records.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_protos::events::Event;
use husk_protos::extras::SUPERVISOR_GRACE;
use husk_vsock::Stream;
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::cgroup;
use super::death::watch_death;
use super::error::{BootError, io};
use super::identity::identify;
use super::memory_target::MemoryTarget;
use super::network;
use super::on_failure::OnFailure;
use super::place::{open_cgroups, unprotect};
use super::plan::BootPlan;
use super::processes::{Processes, kill_share};
use super::ready::{Ready, ready};
use super::running::Vm;
use super::share_health::ShareHealth;
use super::{user, virtiofsd};
use crate::console::{Attached, GuestLogs, HelperLog};
use crate::guest::client::{Guest, Metering};
use crate::guest::clock;
use crate::guest::link::{self, HostPort, Link, NewLink};
use crate::guest::report::{self, GuestHealth, ReportSinks};
use crate::host::child::Child;
use crate::host::process::ProcessId;
use crate::host::run_delay::RunDelays;
use crate::state::facts::HostMilestone;
use crate::state::journal::Journal;
use crate::state::life::VmState;
use crate::state::{Boot, MachineRecord, Owner, StateError, Step};
use crate::vmm::{Machine, Sockets, Spec, Vmm, VmmError};

impl Vm {
    /// Boots a VM, adds the milestones to `reached`, and returns the VM with its events. The VM belongs to nobody in
    /// particular until [`Vm::identify`]. The caller records whether the VM is running, and undoes the journal's steps on
    /// failure.
    ///
    /// # Errors
    ///
    /// When a step fails, one of the VM's processes exits, or the guest is not ready in time. The VM's processes have
    /// been killed.
    pub async fn boot(
        vmm: &dyn Vmm,
        plan: &BootPlan,
        journal: &Journal,
        logs: &GuestLogs,
        reached: &mut Boot,
    ) -> Result<(Arc<Self>, Metering<Event>), BootError> {
        journal.set_vm_state_unsaved(VmState::Provisioning, "a container needs it")?;
        let NewLink { link, ready: mut ready_port, machine_end: vsock } = link::create(plan.carrier, journal).await?;
        // Before the machine starts: an agent in the guest may ask at once.
        identify(&link, plan, journal)?;
        let mut network = network::connect(vmm, plan, journal).await?;
        let (console, console_end, shell) = attach_console(logs, plan.spec.guest.debug)?;
        let cgroups = open_cgroups(plan)?;
        let (share_listener, share) = virtiofsd::socket(journal.dir())?;
        let (machine_log, output) = open_log(vmm.name(), vmm.id(), journal)?;
        let nics = std::mem::take(&mut network.nics);
        let sockets = Sockets { vsock, share: Some(share), nics, console: console_end, shell, log: output };
        let mut spec = linked(&plan.spec, &link, &ready_port, network.spare_nics());
        spec.user = Some(user::lease(plan, journal).await?);
        let machine = start_machine(vmm, &spec, sockets, journal, reached).await?;
        let kill_machine = OnFailure::new({
            let machine = machine.clone();
            move || machine.kill()
        });
        reached.reached(HostMilestone::VmmStarted);
        record_machine(vmm, &spec, machine.process(), link.cid(), journal)?;
        let confined = tokio::spawn(confine(machine.clone()));

        // After the machine, because virtiofsd is ready much sooner; and virtiofsd waits for its cgroup, which takes a
        // grace period of the host's kernel, while the machine starts. The machine joins the cgroup without that wait,
        // before the guest has any memory.
        let (share_log, output) = open_log("virtiofsd", "virtiofsd", journal)?;
        let share = start_share(plan, share_listener, output, &cgroups)?;
        reached.reached(HostMilestone::VirtiofsdStarted);
        let kill_share = OnFailure::new({
            let share = share.clone();
            move || kill_share(&share, &[])
        });
        journal.record(&Owner::Sandbox, [Step::Process { id: share.process(), name: "virtiofsd".into() }])?;
        place_machine(plan, vmm, machine.process(), cgroups)?;

        let processes = Processes { machine, share, console, logs: [machine_log, share_log] };
        let (reports, hello) = processes.hello(&mut ready_port, plan).await?;
        reached.hello_received(&hello);
        // Before a container runs. If the boot fails earlier, the machine is killed, and this ends.
        confined.await.map_err(|error| io("confine the machine")(std::io::Error::other(error)))??;
        let share_workers = record_share_workers(plan, &processes.share, journal)?;
        let health = Arc::new(GuestHealth::new(spec.guest.heartbeat));
        let ((death, dead), (failure, failed)) = (watch::channel(None), watch::channel(None));
        let Ready { guest, network, events } =
            ready(link, &hello, network, processes.machine.clone(), plan.call_timeout, dead.clone(), reached).await?;
        kill_machine.succeeded();
        kill_share.succeeded();
        let lost = lost(reports, sinks(&spec, logs, journal), health.clone(), processes.machine.process());
        let vm = Arc::new(Self {
            guest,
            hello,
            debug: spec.guest.debug,
            machine: processes.machine.clone(),
            share: processes.share.clone(),
            share_health: ShareHealth::new(&share_workers),
            share_workers: share_workers.clone(),
            open_files: plan.open_files,
            orderly: spec.guest.supervisor || spec.guest.debug,
            memory_target: MemoryTarget::new(plan.balloon_target_mib, spec.memory_mib),
            console: processes.console.clone(),
            logs: processes.logs.clone(),
            health,
            network: Mutex::new(network.map(Arc::new)),
            kill_timeout: plan.kill_timeout,
            shutdown_timeout: shutdown_timeout(plan),
            stopping: AtomicBool::new(false),
            failure,
            dead,
        });
        tokio::spawn(watch_death(processes, share_workers, lost, failed, death));
        tend(&vm, journal);
        Ok((vm, events))
    }
}

/// Where the guest's log lines and its supervisor's status go.
fn sinks(spec: &Spec, logs: &GuestLogs, journal: &Journal) -> ReportSinks {
    ReportSinks { level: spec.guest.log_level, file: logs.init.clone(), recent: journal.recent().clone() }
}

async fn confine(machine: Arc<dyn Machine>) -> Result<(), VmmError> {
    machine.confine().await
}

/// Receives the guest's reports until it is lost, and returns the reason.
async fn lost(reports: Stream, sinks: ReportSinks, health: Arc<GuestHealth>, machine: ProcessId) -> String {
    report::receive(reports, sinks, &health, || RunDelays::of(machine)).await
}

/// Keeps the guest's clock correct and looks after its share until the VM is dead.
fn tend(vm: &Vm, journal: &Journal) {
    tokio::spawn(vm.share_health.clone().watch(journal.recent().clone(), vm.dead.clone(), vm.failure.clone()));
    tokio::spawn(keep_clock(vm.guest.clone(), vm.health.clone(), vm.dead.clone()));
}

/// Keeps the guest's clock correct until the VM is dead.
async fn keep_clock(guest: Arc<Guest>, health: Arc<GuestHealth>, mut dead: watch::Receiver<Option<String>>) {
    tokio::select! {
        _ = dead.wait_for(Option::is_some) => {}
        () = clock::keep(&guest, health.clock(), health.snapshot().interval) => {}
    }
}

/// Adds what depends on the link and on the network to the spec of the machine.
fn linked(spec: &Spec, link: &Link, ready: &HostPort, held_nics: Vec<[u8; 6]>) -> Spec {
    let mut spec = spec.clone();
    if let Link::Kernel(cid) = link {
        spec.kernel_cid = Some(*cid);
    }
    spec.guest.ready_port = ready.port();
    spec.guest.held_nics = held_nics;
    spec
}

/// Attaches the console, and returns the machine's end of its socket, and in debug mode that of the shell's console.
fn attach_console(logs: &GuestLogs, debug: bool) -> Result<(Attached, OwnedFd, Option<OwnedFd>), BootError> {
    let pair = || {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((UnixStream::from_std(ours)?, OwnedFd::from(theirs)))
    };
    let pair = || pair().map_err(io("create a socket pair for the console"));
    let (serial, machine_end) = pair()?;
    let (shell, shell_end) =
        if debug { pair().map(|(ours, theirs)| (Some(ours), Some(theirs)))? } else { (None, None) };
    Ok((logs.console.attach(serial, shell), machine_end, shell_end))
}

/// Starts to record the output of the process `name` in the file `<id>.log`. Returns its log, and its output.
fn open_log(name: &str, id: &str, journal: &Journal) -> Result<(HelperLog, File), BootError> {
    let path = journal.dir().join(format!("{id}.log"));
    HelperLog::start(name, &path).map_err(io(format!("open {}", path.display())))
}

async fn start_machine(
    vmm: &dyn Vmm,
    spec: &Spec,
    sockets: Sockets,
    journal: &Journal,
    reached: &mut Boot,
) -> Result<Arc<dyn Machine>, BootError> {
    let (vcpus, memory_mib, accel) = (spec.vcpus, spec.memory_mib, spec.accel);
    let configured = format!("ready to start with vcpus={vcpus} memory_mib={memory_mib} accel={accel:?}");
    journal.set_vm_state_unsaved(VmState::Configured, &configured)?;
    reached.reached(HostMilestone::Configured);
    Ok(vmm.start(spec, sockets).await?.into())
}

/// Records the machine, its state and its process. Only the last call writes to disk, for all three: the boot waits for
/// each write.
fn record_machine(
    vmm: &dyn Vmm,
    spec: &Spec,
    process: ProcessId,
    cid: u32,
    journal: &Journal,
) -> Result<(), StateError> {
    let record = MachineRecord {
        process,
        cid,
        vcpus: spec.vcpus,
        max_vcpus: spec.max_vcpus,
        memory_mib: spec.memory_mib,
        max_memory_mib: spec.max_memory_mib,
        cache_mib: vmm.cache_mib(spec),
        accel: format!("{:?}", spec.accel),
        board: vmm.board().to_owned(),
        kernel_file: spec.kernel.display().to_string(),
        initrd_file: spec.initrd.display().to_string(),
        debug: spec.guest.debug,
        user_mode: spec.user_network.is_some(),
        ports: spec.user_network.iter().flat_map(|user| &user.ports).map(ToString::to_string).collect(),
        kernel: None,
        init: None,
    };
    journal.with(|state| {
        state.set_machine(record);
        Ok(())
    })?;
    journal.set_vm_state_unsaved(VmState::Starting, &format!("{} runs as process {}", vmm.name(), process.pid))?;
    journal.record(&Owner::Sandbox, [Step::Process { id: process, name: vmm.id().into() }])
}

fn start_share(
    plan: &BootPlan,
    listener: UnixListener,
    output: File,
    cgroups: &[File],
) -> Result<Arc<Child>, BootError> {
    plan.open_files.warn_if_low();
    let cgroups = cgroups.iter().map(File::try_clone).collect::<std::io::Result<_>>();
    let cgroups = cgroups.map_err(io("duplicate the descriptor of cgroup.procs"))?;
    let share = virtiofsd::start(&plan.virtiofsd, &plan.share, plan.open_files, listener, output, cgroups)?;
    unprotect(plan, share.process()).inspect_err(|_| share.kill())?;
    Ok(Arc::new(share))
}

/// Moves the machine's process to the VM's cgroup, and takes containerd's protection from the OOM killer away from it.
fn place_machine(plan: &BootPlan, vmm: &dyn Vmm, machine: ProcessId, cgroups: Vec<File>) -> Result<(), BootError> {
    unprotect(plan, machine)?;
    // If the process has exited, the wait for the hello reports why.
    cgroup::join(&cgroups, machine).map_err(io(format!("move {} to the VM's cgroup", vmm.name())))
}

/// Records virtiofsd's children. virtiofsd serves from a child that is the first process of its own PID namespace and
/// does not die with its parent. The child exists by the time of the hello, because it has served the guest.
fn record_share_workers(plan: &BootPlan, share: &Child, journal: &Journal) -> Result<Vec<ProcessId>, BootError> {
    let workers = share.process().children().map_err(io("list virtiofsd's children"))?;
    let step = |id: &ProcessId| Step::Process { id: *id, name: "virtiofsd's worker".into() };
    journal.record(&Owner::Sandbox, workers.iter().map(step))?;
    // One that was started before virtiofsd's own score had changed.
    workers.iter().try_for_each(|worker| unprotect(plan, *worker))?;
    Ok(workers)
}

/// The deadline for the guest's shutdown. A supervisor agent gets extra time to exit.
fn shutdown_timeout(plan: &BootPlan) -> Duration {
    plan.kill_timeout + if plan.spec.guest.supervisor { SUPERVISOR_GRACE } else { Duration::ZERO }
}
