//! A waiting VM's rehearsal: it creates, starts, executes in and deletes one container of its own. Afterwards its kernel,
//! its init and, without KVM, QEMU's translations of both are warm, and nothing of the container is left.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, StartRequest, WaitRequest,
};
use husk_protos::bundle::{PutBundleRequest, ReleaseRequest};
use husk_protos::events::Event;
use oci_spec::runtime::Spec;
use protobuf::well_known_types::any::Any;

use crate::guest::client::{Guest, GuestError, Metering};
use crate::rootfs::share::{self, Server, Share, ShareError, ShareRoot};
use crate::rootfs::spec::parse::parse;
use crate::rootfs::spec::{Context, rewrite};
use crate::state::journal::Journal;
use crate::state::{Owner, StateError, Step};
use crate::vm::Vm;
use crate::vm::cgroup::{CgroupError, Hierarchies};

/// The container's id, the name of its folder and of its program.
const ID: &str = "rehearsal";
const EXEC: &str = "exec";
const SPEC: &str = include_str!("rehearsal.json");
/// The topic of a container's last event.
const DELETED: &str = "/tasks/delete";
/// Time limit of the whole rehearsal.
const LIMIT: Duration = Duration::from_secs(60);
/// Most events of a rehearsal. An honest guest sends six.
const EVENTS: usize = 32;

/// The program of the container: an ELF executable for x86-64 that exits at once, or waits for a signal if it has an
/// argument. Both an image and a compiler would be larger.
const PROGRAM: [u8; 147] = program();

/// Why a VM does not rehearse. It is not used then: what fails here would fail for a container.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RehearsalError {
    /// The container's files.
    #[error("write the files of the rehearsal")]
    Files(#[source] io::Error),
    /// The share.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The journal.
    #[error(transparent)]
    State(#[from] StateError),
    /// The host's cgroups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The container's spec.
    #[error("prepare the spec of the rehearsal: {0}")]
    Spec(String),
    /// The guest.
    #[error("{step} the rehearsal's container")]
    Guest {
        /// What it was asked for.
        step: &'static str,
        /// Its answer.
        source: GuestError,
    },
    /// The exec ended differently.
    #[error("the rehearsal's exec exited with {0}")]
    Exit(u32),
    /// The guest's events.
    #[error("the guest's events of the rehearsal are wrong")]
    Events,
    /// It takes too long.
    #[error("the rehearsal is not over after {} ms", LIMIT.as_millis())]
    Deadline,
    /// A thread.
    #[error("run a thread for the rehearsal")]
    Thread(#[from] tokio::task::JoinError),
}

/// Rehearses in a VM that has no sandbox. Returns the number of the last of its events.
///
/// # Errors
/// A step fails. The VM cannot be used then.
pub(crate) async fn rehearse(
    vm: &Arc<Vm>,
    share: &Share,
    journal: &Journal,
    events: &mut Metering<Event>,
) -> Result<u64, RehearsalError> {
    let rehearsal = async {
        let spec = add_container(vm, share, journal).await?;
        run(&vm.guest, spec).await?;
        let last = last_event(events).await?;
        remove_container(vm, share, journal).await?;
        Ok(last)
    };
    tokio::time::timeout(LIMIT, rehearsal).await.map_err(|_| RehearsalError::Deadline)?
}

/// Adds the container's root to the share, as for any container, and returns its spec for the guest.
async fn add_container(vm: &Arc<Vm>, share: &Share, journal: &Journal) -> Result<Vec<u8>, RehearsalError> {
    let (vm, share, journal) = (vm.clone(), share.clone(), journal.clone());
    let added = tokio::task::spawn_blocking(move || {
        let bundle = journal.dir().join(ID);
        journal.record(&Owner::Container(ID.to_owned()), [Step::Tree { path: bundle.clone() }])?;
        write_files(&bundle).map_err(RehearsalError::Files)?;
        let failed = |problem: String| RehearsalError::Spec(problem);
        let spec: Spec = parse(SPEC.as_bytes()).map_err(|problems| failed(format!("{:?}", problems.0)))?.spec;
        let context = Context {
            id: ID,
            bundle: &bundle,
            host_is_unified: Hierarchies::of_host()?.unified(),
            inspect: &share::inspect,
            check_socket: &|_| Err("not in a rehearsal".to_owned()),
            direct: &|_| Ok(None),
            watch: &[],
            first: true,
            sibling: &|_| None,
        };
        let mut rewritten = rewrite(spec, &context).map_err(|problems| failed(format!("{:?}", problems.0)))?;
        let mut record = |owner: &Owner, steps: Vec<Step>| journal.record(owner, steps);
        let places = share.add_container(
            &mut record,
            ID,
            ShareRoot::Stacked { mounts: &[], rootfs: &rewritten.rootfs },
            &rewritten.binds,
        )?;
        rewritten.place(places);
        share.attach(Server { open: || vm.share_namespace(), root: Path::new("/") }, ID)?;
        serde_json::to_vec(&rewritten.spec).map_err(|error| failed(error.to_string()))
    });
    added.await?
}

fn write_files(bundle: &Path) -> io::Result<()> {
    let root: PathBuf = bundle.join("rootfs");
    DirBuilder::new().recursive(true).mode(0o755).create(&root)?;
    // Mount points: the guest may not create some of them on a host's folder in every case.
    for name in ["proc", "dev", "sys", "run"] {
        fs::create_dir(root.join(name))?;
    }
    OpenOptions::new().write(true).create_new(true).mode(0o755).open(root.join(ID))?.write_all(&PROGRAM)
}

/// The container's life.
async fn run(guest: &Guest, spec: Vec<u8>) -> Result<(), RehearsalError> {
    let failed = |step| move |error: ttrpc::Error| RehearsalError::Guest { step, source: error.into() };
    let id = || ID.to_owned();
    let put = PutBundleRequest { id: id(), spec, ..Default::default() };
    let bundle = guest.bundle.put(guest.context(), &put).await.map_err(failed("send the bundle of"))?.path;
    let create = CreateTaskRequest { id: id(), bundle, ..Default::default() };
    guest.task.create(guest.context(), &create).await.map_err(failed("create"))?;
    let start = StartRequest { id: id(), ..Default::default() };
    guest.task.start(guest.context(), &start).await.map_err(failed("start"))?;
    let process = serde_json::json!({
        "user": {"uid": 0, "gid": 0}, "args": [format!("/{ID}")], "cwd": "/", "noNewPrivileges": true,
    });
    let process = Any { value: process.to_string().into_bytes(), ..Default::default() };
    let exec =
        ExecProcessRequest { id: id(), exec_id: EXEC.to_owned(), spec: Some(process).into(), ..Default::default() };
    guest.task.exec(guest.context(), &exec).await.map_err(failed("execute in"))?;
    let start = StartRequest { id: id(), exec_id: EXEC.to_owned(), ..Default::default() };
    guest.task.start(guest.context(), &start).await.map_err(failed("start the exec in"))?;
    let wait = WaitRequest { id: id(), exec_id: EXEC.to_owned(), ..Default::default() };
    let exit = guest.task.wait(guest.context(), &wait).await.map_err(failed("wait for the exec in"))?;
    if exit.exit_status != 0 {
        return Err(RehearsalError::Exit(exit.exit_status));
    }
    let delete = DeleteRequest { id: id(), exec_id: EXEC.to_owned(), ..Default::default() };
    guest.task.delete(guest.context(), &delete).await.map_err(failed("delete the exec in"))?;
    let kill = KillRequest { id: id(), signal: libc::SIGKILL as u32, ..Default::default() };
    guest.task.kill(guest.context(), &kill).await.map_err(failed("kill"))?;
    let wait = WaitRequest { id: id(), ..Default::default() };
    guest.task.wait(guest.context(), &wait).await.map_err(failed("wait for"))?;
    let delete = DeleteRequest { id: id(), ..Default::default() };
    guest.task.delete(guest.context(), &delete).await.map_err(failed("delete"))?;
    Ok(())
}

/// Reads the events of the rehearsal, and returns the last one's number.
async fn last_event(events: &mut Metering<Event>) -> Result<u64, RehearsalError> {
    for number in 1..=EVENTS as u64 {
        let event = events.recv().await.map_err(|source| RehearsalError::Guest { step: "report", source })?;
        match event {
            Some(event) if event.sequence == number && event.topic == DELETED => return Ok(number),
            Some(event) if event.sequence == number => {}
            _ => return Err(RehearsalError::Events),
        }
    }
    Err(RehearsalError::Events)
}

/// Removes the container from the share, makes the guest forget its files, and undoes what it has left on the host.
async fn remove_container(vm: &Arc<Vm>, share: &Share, journal: &Journal) -> Result<(), RehearsalError> {
    let released = {
        let (share, journal) = (share.clone(), journal.clone());
        let mut record = move |owner: &Owner, steps: Vec<Step>| journal.record(owner, steps);
        tokio::task::spawn_blocking(move || share.release(&mut record, ID)).await?
    };
    let request = ReleaseRequest { entries: released.entries, ..Default::default() };
    let answered = vm.guest.bundle.release(vm.guest.context(), &request).await;
    answered.map_err(|error| RehearsalError::Guest { step: "forget", source: error.into() })?;
    Ok(journal.undo(Owner::Container(ID.to_owned())).await?)
}

/// See [`PROGRAM`]: an ELF header, a program header for one segment with everything, and the code.
const fn program() -> [u8; 147] {
    const ADDRESS: u8 = 0x40;
    const HEADERS: u8 = 64 + 56;
    let mut elf = [0; 147];
    let header: [u8; 20] = [0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0x3e, 0];
    // cmp qword [rsp], 1; jne wait; xor edi, edi; mov eax, 60 (exit); syscall; wait: mov eax, 34 (pause); syscall; jmp wait
    let code: [u8; 27] = [
        0x48, 0x83, 0x3c, 0x24, 1, 0x75, 9, 0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 5, 0xb8, 34, 0, 0, 0, 0x0f, 5, 0xeb,
        0xf7, 0, 0,
    ];
    put(&mut elf, 0, &header);
    put(&mut elf, HEADERS as usize, &code);
    // e_version, e_entry 0x400078, e_phoff, e_ehsize, e_phentsize, e_phnum.
    elf[20] = 1;
    elf[24] = HEADERS;
    elf[26] = ADDRESS;
    elf[32] = 64;
    elf[52] = 64;
    elf[54] = 56;
    elf[56] = 1;
    // p_type PT_LOAD, p_flags read and execute, p_offset 0, p_vaddr and p_paddr 0x400000, p_filesz, p_memsz, p_align.
    elf[64] = 1;
    elf[68] = 5;
    elf[82] = ADDRESS;
    elf[90] = ADDRESS;
    elf[96] = 147;
    elf[104] = 147;
    elf[113] = 0x10;
    elf
}

const fn put(elf: &mut [u8], at: usize, bytes: &[u8]) {
    let mut next = 0;
    while next < bytes.len() {
        elf[at + next] = bytes[next];
        next += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_program_exits_at_once_or_waits_for_a_signal() {
        let folder = tempfile::tempdir().unwrap();
        write_files(folder.path()).unwrap();
        let program = folder.path().join("rootfs").join(ID);
        // Executing a file that another thread's child still has open for writing fails.
        let spawn = |arguments: &[&str]| loop {
            match Command::new(&program).args(arguments).spawn() {
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {}
                spawned => return spawned.unwrap(),
            }
        };
        assert!(spawn(&[]).wait().unwrap().success());
        let mut waiting = spawn(&["wait"]);
        assert!(waiting.try_wait().unwrap().is_none());
        waiting.kill().unwrap();
        assert!(!waiting.wait().unwrap().success());
    }
}
