//! From what containerd asks, what the operator configured and what the host has, to what is to be done: everything is read and checked
//! before anything is made, and all that is wrong is told at once.

pub mod host;
pub mod size;

use std::collections::HashMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::CreateTaskRequest;
use husk_protos::extras::SERIAL;
use oci_spec::runtime::Spec;
use tracing::Level;

use crate::config::annotations;
use crate::config::extras::Extras;
use crate::config::load;
use crate::config::names;
use crate::config::problem::Problem;
use crate::config::settings::Config;
use crate::config::workspace::Workspace;
use crate::extras::files::{self, OpenedFile};
use crate::prepare::host::{Host, Places};
use crate::rootfs::spec::parse::parse;
use crate::rootfs::spec::{Context, Rewritten, rewrite};
use crate::vm::boot::Plan;
use crate::vm::cgroup::Hierarchies;
use crate::vmm as vm;
use crate::vmm::Vmm;
use crate::vmm::qemu::Qemu;

/// By this annotation the CRI plugin tells which pod a container belongs to.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// All that is wrong with a request.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("; "))]
pub struct Error(pub Vec<String>);

impl Error {
    fn one(error: impl Display) -> Self {
        Self(vec![error.to_string()])
    }
}

/// A container, ready to be made.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// What the guest gets, and what the host does for it.
    pub rewritten: Rewritten,
    /// The machine, should it have to be booted for this container.
    machine: vm::Spec,
    /// What its guest gets beside containers; a VM that is booted already has to have it.
    pub extras: Extras,
    /// The files of that, open, for a VM that is to be booted.
    pub sources: Vec<OpenedFile>,
    workspace: Option<Workspace>,
    host: Host,
    /// As the sandbox's annotations have it.
    config: Config,
}

/// Reads a bundle's `config.json`.
fn read_spec(bundle: &Path) -> Result<Spec, Error> {
    let path = bundle.join("config.json");
    let bytes = std::fs::read(&path).map_err(|error| Error::one(format!("read {}: {error}", path.display())))?;
    parse(&bytes).map_err(|problems| Error(texts(&problems.0)))
}

/// The sandbox that the container of this bundle belongs to: its pod's, or one of its own.
///
/// # Errors
///
/// When the bundle cannot be read.
pub fn sandbox_of(bundle: &Path, id: &str) -> Result<String, Error> {
    let spec = read_spec(bundle)?;
    let pod = spec.annotations().as_ref().and_then(|annotations| annotations.get(SANDBOX_ID));
    Ok(pod.map_or_else(|| id.to_owned(), Clone::clone))
}

/// Reads and checks everything that a container needs. `is_init` tells the pids of the sandbox's containers, `has` what its VM was booted with, if it
/// was.
///
/// # Errors
///
/// All that is wrong at once.
pub fn prepare(
    request: &CreateTaskRequest,
    sandbox: &str,
    is_init: &dyn Fn(u32) -> bool,
    has: Option<&Extras>,
) -> Result<Prepared, Error> {
    prepare_with(load::load().map_err(Error::one)?, &Places::of_process(), request, sandbox, is_init, has)
}

/// Opens the extras of a VM that is to be booted, or compares them with what it has.
fn sources(extras: &Extras, has: Option<&Extras>, config: &Config) -> Result<Vec<OpenedFile>, Vec<Problem>> {
    if let Some(has) = has {
        let beyond = extras.beyond(has);
        return if beyond.is_empty() { Ok(Vec::new()) } else { Err(beyond) };
    }
    match (files::open(extras, config.extras_max_mib), extras.missing()) {
        (Ok(sources), None) => Ok(sources),
        (opened, missing) => Err(opened.err().into_iter().flatten().chain(missing).collect()),
    }
}

fn prepare_with(
    mut config: Config,
    places: &Places,
    request: &CreateTaskRequest,
    sandbox: &str,
    is_init: &dyn Fn(u32) -> bool,
    has: Option<&Extras>,
) -> Result<Prepared, Error> {
    let bundle = Path::new(&request.bundle);
    let mut spec = read_spec(bundle)?;

    let mut wrong = Vec::new();
    let mut check = |problems: Vec<String>| wrong.extend(problems);
    let no_annotations = HashMap::new();
    let annotations = annotations::read(spec.annotations().as_ref().unwrap_or(&no_annotations), &config)
        .map_err(|problems| check(texts(&problems)))
        .ok();
    let extras = annotations.as_ref().map(|annotations| annotations.extras.clone()).unwrap_or_default();
    let sources = sources(&extras, has, &config).map_err(|problems: Vec<Problem>| check(texts(&problems))).ok();
    // From here on nobody needs it, neither the guest, nor hooks, nor what is written down for them.
    if let Some(annotations) = spec.annotations_mut() {
        annotations.remove(names::WORKSPACE);
    }
    let context = Context {
        id: &request.id,
        bundle,
        host_is_unified: Hierarchies::of_host().map_err(Error::one)?.unified(),
        inspect: &crate::rootfs::share::inspect,
        is_init,
    };
    let rewritten = rewrite(spec, &context).map_err(|problems| check(texts(&problems.0))).ok();
    let debug = annotations.as_ref().and_then(|wanted| wanted.debug).unwrap_or(config.debug);
    let host = host::find(&config, places, debug).map_err(|missing| check(texts(&missing))).ok();

    let (Some(annotations), Some(sources), Some(rewritten), Some(host)) = (annotations, sources, rewritten, host)
    else {
        return Err(Error(wrong));
    };
    let (vcpus, memory_mib) = size::size(&config, &annotations, rewritten.limits);
    config.debug = debug;
    if debug {
        config.log_level = config.log_level.max(Level::DEBUG);
    }
    let mut kernel_params = vec![
        format!("husk.log={}", config.log_level.as_str().to_lowercase()),
        format!("husk.heartbeat_ms={}", config.heartbeat.as_millis()),
    ];
    if debug {
        // After `quiet`, and before what the configuration says of it.
        kernel_params.extend(["husk.debug=1", "loglevel=7"].map(str::to_owned));
    }
    kernel_params.extend(config.kernel_params.iter().cloned());
    if !extras.files.is_empty() {
        kernel_params.push(format!("husk.extras={SERIAL}"));
    }
    if extras.runs_supervisor() {
        kernel_params.push("husk.supervisor=1".to_owned());
    }
    let machine = vm::Spec {
        name: format!("husk-{sandbox}"),
        accel: host.accel,
        board: config.board,
        vcpus,
        tsc_khz: None,
        memory_mib,
        hugepages: config.hugepages,
        kernel: host.artifacts.kernel.clone(),
        initrd: host.artifacts.initrd.clone(),
        kernel_cid: None,
        disks: Vec::new(),
        kernel_params,
        user: Some(user(&config, host.accel)),
    };
    Ok(Prepared { rewritten, machine, extras, sources, workspace: annotations.workspace, host, config })
}

fn texts(problems: &[impl ToString]) -> Vec<String> {
    problems.iter().map(ToString::to_string).collect()
}

/// Who QEMU runs as: nobody of importance, but in the group that may open /dev/kvm if that is what it takes.
fn user(config: &Config, accel: vm::Accel) -> (u32, u32) {
    use std::os::unix::fs::MetadataExt;
    let (uid, gid) = config.qemu_user;
    match (accel, std::fs::metadata("/dev/kvm")) {
        (vm::Accel::Kvm, Ok(device)) if device.mode() & 0o006 != 0o006 && device.mode() & 0o060 == 0o060 => {
            (uid, device.gid())
        }
        _ => (uid, gid),
    }
}

/// What boots the machine of `prepared`, on the folder `share`, with the disk of its extras.
pub fn plan(prepared: &Prepared, share: PathBuf, extras: Option<vm::Disk>) -> (Box<dyn Vmm>, Plan) {
    let mut spec = prepared.machine.clone();
    spec.disks.extend(extras);
    // The guest has no clock of its own: it begins with the host's time, as late as possible.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    spec.kernel_params.push(format!("husk.epoch_ns={}", now.as_nanos()));
    // Late as well: the longer it is measured, the better.
    spec.tsc_khz = vm::tsc::khz();
    let plan = Plan {
        spec,
        carrier: prepared.host.carrier,
        virtiofsd: prepared.host.virtiofsd.clone(),
        share,
        boot_timeout: prepared.config.boot_timeout,
        call_timeout: prepared.config.call_timeout,
        heartbeat: prepared.config.heartbeat,
        guest_level: prepared.config.log_level,
        debug: prepared.config.debug,
        supervisor: prepared.extras.runs_supervisor(),
        cgroup: prepared.rewritten.cgroups_path.clone(),
        tokens: prepared.config.tokens.clone(),
        workspace: prepared.workspace.clone(),
    };
    (Box::new(Qemu { program: prepared.host.qemu.clone() }), plan)
}

#[cfg(test)]
mod tests;
