//! The guest without containerd and shim, booted by the shim crate's own code with the production plan.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use husk_protos::bundle::PutBundleRequest;
use husk_protos::system::{BootStep, Hello, InfoRequest, InfoResponse};
use husk_protos::{PORT_READY, SHARE_PATH};
use husk_shim::console::{Console, GuestLogs};
use husk_shim::prepare::{self, Attachments, Prepared, SandboxName, Siblings};
use husk_shim::state::journal::Journal;
use husk_shim::state::{Boot, State};
use husk_shim::vm::{BootPlan, Vm};
use husk_shim::vmm::{Accel, Machine, Sockets, Vmm};
use husk_tests::artifacts::{built, repository};
use husk_tests::{bundle, command, vm};
use husk_vsock::Device;

use crate::report::{Column, Report, Target};

/// A boot that takes longer has hung.
pub(crate) const BOOT: Duration = Duration::from_secs(30);
/// Deadline for the end of a stopped VM.
const END: Duration = Duration::from_secs(20);
/// How long the idle guest is measured.
const IDLE: Duration = Duration::from_secs(5);
/// Lines of the console shown with a failure.
const LINES: usize = 12;
const CONTAINER: &str = "bench";

/// Targets of the issue that introduced the benchmark.
const MAX_BINARY_MIB: f64 = 5.0;
const MAX_RSS_MIB: f64 = 4.0;
const MAX_READY_MINSTR: f64 = 8.0;

const MIB: f64 = (1 << 20) as f64;

/// The files that VMs boot from, in a temporary directory.
pub(crate) struct Kit {
    folder: tempfile::TempDir,
    prepared: Prepared,
}

impl Drop for Kit {
    fn drop(&mut self) {
        // The file goes with the directory, and containerds that start later inherit the environment.
        // SAFETY: as in `new`: no other thread reads the environment.
        unsafe { std::env::remove_var("HUSK_CONFIG") };
    }
}

impl Kit {
    /// Prepares a container as the shim does, with a rootfs from the test image.
    pub(crate) fn new() -> Result<Self> {
        // The shim calls this first as well: the result is passed to the guest at boot.
        husk_shim::vmm::tsc::begin();
        let folder = tempfile::Builder::new().prefix("husk-bench").tempdir()?;
        let config = folder.path().join("config.toml");
        let out = repository().join("out");
        std::fs::write(&config, format!("image_dir = {:?}\naccel = \"tcg\"\n", out.display()))?;
        let path = format!("{}:{}", out.display(), std::env::var("PATH").unwrap_or_default());
        // SAFETY: no other thread reads the environment: the running ones only reap processes or read pipes.
        unsafe {
            std::env::set_var("HUSK_CONFIG", &config);
            std::env::set_var("PATH", path);
        }
        unpack_image(&folder.path().join("share/rootfs"))?;
        let bundle = folder.path().join("bundle");
        std::fs::create_dir(&bundle)?;
        std::fs::write(bundle.join("config.json"), bundle::spec(CONTAINER, &["true"]).to_string())?;
        let request =
            api::CreateTaskRequest { id: CONTAINER.into(), bundle: bundle.display().to_string(), ..Default::default() };
        let mut prepared =
            prepare::prepare(&request, SandboxName { namespace: "bench", id: CONTAINER }, Siblings::NONE)?;
        let root = prepared.rewritten.spec.root_mut().as_mut().context("the spec has no root")?;
        root.set_path(Path::new(SHARE_PATH).join("rootfs"));
        Ok(Self { folder, prepared })
    }

    fn plan(&self, accel: Accel) -> (Box<dyn Vmm>, BootPlan) {
        let attachments = Attachments::new(self.folder.path().join("share"));
        let (vmm, mut plan) = prepare::plan(&self.prepared, attachments);
        plan.spec.accel = accel;
        plan.boot_timeout = BOOT;
        (vmm, plan)
    }

    /// Boots husk's guest and returns the time until it accepted calls.
    pub(crate) async fn boot(&self, accel: Accel) -> Result<(Booted, Duration)> {
        let (vmm, plan) = self.plan(accel);
        let journal = Journal::new(State::create(&self.folder.path().join("state"), "bench", CONTAINER)?);
        let started = Instant::now();
        let logs = GuestLogs::new(journal.dir());
        match Vm::boot(vmm.as_ref(), &plan, &journal, &logs, &mut Boot::begin()).await {
            Ok((vm, _events)) => Ok((Booted { vm, journal }, started.elapsed())),
            Err(error) => {
                journal.undo_all().await?;
                Err(error).context("boot husk's guest")
            }
        }
    }

    /// Boots the baseline guest and returns its hello, and the time until it arrived.
    pub(crate) async fn boot_floor(&self, accel: Accel, init: &Path) -> Result<(Hello, Duration)> {
        let (vmm, mut plan) = self.plan(accel);
        plan.spec.initrd = self.folder.path().join("floor.img");
        std::fs::write(&plan.spec.initrd, vm::cpio(&std::fs::read(init)?, &[]))?;
        let started = Instant::now();
        let (device, vsock) = Device::start(3)?;
        let mut ready = device.listen(PORT_READY)?;
        let (console, console_theirs) = std::os::unix::net::UnixStream::pair()?;
        console.set_nonblocking(true)?;
        let console = tokio::net::UnixStream::from_std(console)?;
        let console = Console::new(self.folder.path()).attach(console, None);
        let sockets = Sockets {
            vsock,
            share: None,
            nics: Vec::new(),
            console: console_theirs.into(),
            shell: None,
            log: tempfile::tempfile()?,
        };
        let machine: Arc<dyn Machine> = vmm.start(&plan.spec, sockets).await?.into();
        let hello = async {
            let mut stream = ready.accept().await?;
            anyhow::Ok(husk_protos::frame::read(&mut stream).await?)
        };
        let hello = tokio::time::timeout(BOOT, hello).await;
        let took = started.elapsed();
        machine.kill();
        tokio::time::timeout(END, machine.exited()).await.context("QEMU does not exit")?;
        let hello = hello.map_err(anyhow::Error::from).flatten();
        Ok((hello.with_context(|| format!("the baseline guest did not become ready: {}", console.tail(LINES)))?, took))
    }
}

/// Unpacks the layers of the test image, an OCI layout.
fn unpack_image(rootfs: &Path) -> Result<()> {
    let image = built("images/busybox.tar")?;
    std::fs::create_dir_all(rootfs)?;
    let script = r#"set -e
layout=$(mktemp -d); trap 'rm -rf "$layout"' EXIT
tar -x -f "$1" -C "$layout"
for blob in "$layout"/blobs/sha256/*; do
    # Every archive is a layer.
    if tar -t -f "$blob" >/dev/null 2>&1; then tar -x -f "$blob" -C "$2"; fi
done
test -e "$2/bin/sh""#;
    let mut unpack = std::process::Command::new("sh");
    unpack.args(["-c", script, "sh"]).arg(&image).arg(rootfs);
    command::run(unpack, None, Duration::from_secs(60))?.ok()?;
    Ok(())
}

/// The baseline guest's program.
pub(crate) fn floor_init() -> Result<PathBuf> {
    vm::guest_program("floor-init")
}

/// A booted guest of husk.
pub(crate) struct Booted {
    /// The VM.
    pub(crate) vm: Arc<Vm>,
    journal: Journal,
}

impl Booted {
    async fn info(&self) -> Result<InfoResponse> {
        Ok(self.vm.guest.system.info(self.vm.guest.context(), &InfoRequest::new()).await?)
    }

    /// Shuts the guest down and removes its files.
    pub(crate) async fn stop(self) -> Result<()> {
        tokio::time::timeout(END, self.vm.stop(std::future::ready(()))).await.context("the VM did not stop")??;
        self.journal.undo_all().await?;
        Ok(())
    }
}

/// Millions of instructions since the kernel's clock started: with `-icount shift=0`, one instruction takes a
/// nanosecond.
fn minstr(hello: &Hello, step: BootStep) -> Result<f64> {
    let found = hello.timeline.iter().find(|milestone| milestone.step == step.into());
    Ok(found.with_context(|| format!("no milestone {step:?} in {:?}", hello.timeline))?.boottime_ns as f64 / 1e6)
}

/// Millions of instructions between two reports: of PID 1 with its workers, and of containers.
fn spent(from: &InfoResponse, to: &InfoResponse) -> (f64, f64) {
    // A microsecond is a thousand instructions.
    let million = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1000.0;
    (million(from.init_cpu_usec, to.init_cpu_usec), million(from.containers_cpu_usec, to.containers_cpu_usec))
}

/// Measures the boot and one container, in instructions.
pub(crate) async fn run(report: &mut Report) -> Result<()> {
    let kit = Kit::new()?;
    let (floor, _) = kit.boot_floor(Accel::TcgCounted, &floor_init()?).await?;
    let (booted, _) = kit.boot(Accel::TcgCounted).await?;
    let hello = booted.vm.hello.clone();
    let to_init = [(Column::Husk, minstr(&hello, BootStep::INIT)?), (Column::Floor, minstr(&floor, BootStep::INIT)?)];
    report.row("kernel's clock starts -> PID 1", "M instr", &to_init, Target::Any);
    let to_ready =
        |hello: &Hello| Ok::<_, anyhow::Error>(minstr(hello, BootStep::READY)? - minstr(hello, BootStep::INIT)?);
    let ready = [(Column::Husk, to_ready(&hello)?), (Column::Floor, to_ready(&floor)?)];
    report.row("PID 1 -> ready", "M instr", &ready, Target::AtMost(MAX_READY_MINSTR));
    for pair in hello.timeline.windows(2) {
        let [from, to] = [&pair[0], &pair[1]].map(|milestone| milestone.step.enum_value_or_default());
        let name = format!("  {from:?} -> {to:?}");
        let took = pair[1].boottime_ns.saturating_sub(pair[0].boottime_ns) as f64 / 1e6;
        report.row(&name, "M instr", &[(Column::Husk, took)], Target::Any);
    }
    one_container(&booted, &kit, report).await?;
    booted.stop().await
}

async fn one_container(booted: &Booted, kit: &Kit, report: &mut Report) -> Result<()> {
    let guest = &booted.vm.guest;
    let spec = serde_json::to_vec(&kit.prepared.rewritten.spec)?;
    let put = PutBundleRequest { id: CONTAINER.into(), spec, ..Default::default() };
    let path = guest.bundle.put(guest.context(), &put).await?.path;

    // Two reports in a row show the cost of a report.
    let before = booted.info().await?;
    let from = booted.info().await?;
    let (cost, _) = spent(&before, &from);
    let create = api::CreateTaskRequest { id: CONTAINER.into(), bundle: path, ..Default::default() };
    guest.task.create(guest.context(), &create).await?;
    let created = booted.info().await?;
    let start = api::StartRequest { id: CONTAINER.into(), ..Default::default() };
    guest.task.start(guest.context(), &start).await?;
    let wait = api::WaitRequest { id: CONTAINER.into(), ..Default::default() };
    let status = guest.task.wait(guest.context(), &wait).await?.exit_status;
    ensure!(status == 0, "the container exited with {status}");
    let ended = booted.info().await?;
    let delete = api::DeleteRequest { id: CONTAINER.into(), ..Default::default() };
    guest.task.delete(guest.context(), &delete).await?;
    let deleted = booted.info().await?;

    let steps =
        [("Create", &from, &created), ("Start, run `true`, Wait", &created, &ended), ("Delete", &ended, &deleted)];
    let mut sum = 0.0;
    for (name, from, to) in steps {
        let (init, containers) = spent(from, to);
        let total = (init - cost).max(0.0) + containers;
        sum += total;
        report.row(&format!("  {name}"), "M instr", &[(Column::Husk, total)], Target::Any);
    }
    report.row("Create + Start + Wait + Delete, idle time excluded", "M instr", &[(Column::Husk, sum)], Target::Any);
    Ok(())
}

/// Measures the size of the init, and its activity in an idle guest.
pub(crate) async fn footprint(report: &mut Report) -> Result<()> {
    let binary = built("husk-init")?.metadata()?.len() as f64 / MIB;
    report.row("size of the init's binary", "MiB", &[(Column::Husk, binary)], Target::AtMost(MAX_BINARY_MIB));
    let kit = Kit::new()?;
    let (booted, _) = kit.boot(Accel::Tcg).await?;
    let before = booted.info().await?;
    let from = booted.info().await?;
    // The measurement is that nothing happens.
    tokio::time::sleep(IDLE).await;
    let to = booted.info().await?;
    let rss = to.init_rss_bytes as f64 / MIB;
    report.row("RSS of the init, idle", "MiB", &[(Column::Husk, rss)], Target::AtMost(MAX_RSS_MIB));
    let used = to.memory_total_bytes.saturating_sub(to.memory_available_bytes) as f64 / MIB;
    report.row("guest memory not available to containers", "MiB", &[(Column::Husk, used)], Target::Any);
    let per_report = from.init_context_switches.saturating_sub(before.init_context_switches);
    let switches = to.init_context_switches.saturating_sub(from.init_context_switches).saturating_sub(per_report);
    let rate = switches as f64 / IDLE.as_secs_f64();
    report.row("wake-ups of the init, idle guest", "per s", &[(Column::Husk, rate)], Target::AtMost(0.0));
    booted.stop().await
}
