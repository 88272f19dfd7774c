//! A sandbox's directory and its `state.json`, which contains the journal. Steps are written before their effects.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::error::{StateError, UndoFailure, check_identifier, io_error};
use super::facts::{Boot, MachineRecord};
use super::images::ImageLeases;
use super::lease::Holder;
use super::life::{Life, VmState};
use super::places::{is_link, remove_empty, resolved, sandbox_dir};
use super::ports::PortLeases;
use super::undo::Step;
use super::users::UserLeases;
use super::volumes::VolumeLeases;
use super::{cid, life, tree};
use crate::host::hooks::{Hook, Subject};
use crate::host::process::ProcessId;

/// The default directory for the state of all sandboxes. `HUSK_STATE_DIR` overrides it.
pub const BASE: &str = "/run/husk";
const BASE_ENV: &str = "HUSK_STATE_DIR";
pub(super) const FILE: &str = "state.json";
const NEW_FILE: &str = "state.json.new";
/// Version of the file's format. A shim reads another version only after husk was upgraded while sandboxes were
/// running.
const VERSION: u32 = 1;
/// How often `create` retries when another shim removes the empty namespace directory at the same time.
const CREATE_ATTEMPTS: u32 = 16;

/// The owner of a journal's steps, which are undone when the owner is deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Owner {
    /// The whole sandbox.
    Sandbox,
    /// The container with this id.
    Container(String),
    /// The source with this number in the share. Several containers may use it.
    Volume(u64),
    /// The disk with this serial. Several containers may use it.
    Disk(String),
}

/// Records steps of one owner before their effects: [`State::record`] for code that does not access the state itself.
pub(crate) type Recorder<'a> = &'a mut dyn FnMut(Vec<Step>) -> Result<(), StateError>;

/// The steps of one owner on their way to be undone, last step first; see [`State::undoing`].
#[derive(Debug)]
pub(crate) struct Undoing {
    owner: Owner,
    steps: Vec<Step>,
}

/// What became of the steps of one owner; see [`State::undone`].
#[derive(Debug)]
pub(crate) struct Undone {
    owner: Owner,
    /// Those that are undone.
    steps: Vec<Step>,
    failures: Vec<UndoFailure>,
}

impl Undoing {
    /// Undoes the steps. A failing step does not stop the others. Blocks for about `within` at most, or as long as the
    /// kernel needs for an unmount.
    pub(crate) fn run(self, within: Duration) -> Undone {
        let deadline = Instant::now() + within;
        let mut undone = Undone { owner: self.owner, steps: Vec::new(), failures: Vec::new() };
        for step in self.steps {
            match undo_step(&step, deadline) {
                Ok(()) => undone.steps.push(step),
                Err(failure) => undone.failures.push(failure),
            }
        }
        undone
    }
}

fn undo_step(step: &Step, deadline: Instant) -> Result<(), UndoFailure> {
    step.undo(deadline).map_err(|source| UndoFailure { step: step.to_string(), source })
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    owner: Owner,
    #[serde(flatten)]
    step: Step,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Contents {
    version: u32,
    pub(super) namespace: String,
    pub(super) sandbox: String,
    shim: Option<ProcessId>,
    containers: BTreeMap<String, serde_json::Value>,
    /// Milliseconds since the epoch.
    pub(super) created_ms: Option<u64>,
    /// `None` if the shim was killed before it could write the file.
    vm: Option<Life>,
    /// The machine that was started last.
    machine: Option<MachineRecord>,
    /// The last attempt to boot.
    boot: Option<Boot>,
    journal: Vec<Entry>,
}

/// Reads a file's bytes, and reads what would be written of them again. For the fuzz target.
pub(crate) fn reread(bytes: &[u8]) {
    if let Ok(contents) = serde_json::from_slice::<Contents>(bytes) {
        let again = serde_json::to_vec(&contents).and_then(|json| serde_json::from_slice::<Contents>(&json));
        assert!(again.is_ok(), "a state that husk has written is not one: {again:?}");
    }
}

impl Contents {
    /// A sandbox about which nothing is recorded.
    fn empty(namespace: &str, sandbox: &str) -> Self {
        Self {
            version: VERSION,
            namespace: namespace.into(),
            sandbox: sandbox.into(),
            shim: None,
            containers: BTreeMap::new(),
            created_ms: None,
            vm: None,
            machine: None,
            boot: None,
            journal: Vec::new(),
        }
    }
}

/// A sandbox's directory and the contents of its `state.json`. The process that holds this value is the only writer.
#[derive(Debug)]
pub struct State {
    pub(super) dir: PathBuf,
    pub(super) contents: Contents,
}

/// The directory for the state of all sandboxes: `HUSK_STATE_DIR`, or else [`BASE`].
pub fn base() -> PathBuf {
    std::env::var_os(BASE_ENV).filter(|dir| !dir.is_empty()).map_or_else(|| BASE.into(), PathBuf::from)
}

impl State {
    /// Creates the directory of a new sandbox, with the calling process as its shim.
    ///
    /// # Errors
    /// [`StateError::Exists`] if the directory exists. Then call [`State::load`] and [`State::shim_lives`] to decide
    /// what to do.
    pub fn create(base: &Path, namespace: &str, sandbox: &str) -> Result<Self, StateError> {
        let dir = sandbox_dir(base, namespace, sandbox)?;
        if is_link(&dir) {
            return Err(StateError::Exists(dir));
        }
        Self::create_in(dir, namespace, sandbox)
    }

    pub(super) fn create_in(dir: PathBuf, namespace: &str, sandbox: &str) -> Result<Self, StateError> {
        let shim = ProcessId::own().map_err(io_error("read the start time of this process in", Path::new("/proc")))?;
        let contents = Contents {
            shim: Some(shim),
            created_ms: Some(life::now_ms()),
            vm: Some(Life::default()),
            ..Contents::empty(namespace, sandbox)
        };
        let parent = dir.parent().unwrap_or(Path::new("/")).to_owned();
        for _ in 0..CREATE_ATTEMPTS {
            DirBuilder::new().recursive(true).mode(0o700).create(&parent).map_err(io_error("create", &parent))?;
            match DirBuilder::new().mode(0o700).create(&dir) {
                Ok(()) => {
                    let state = Self { dir, contents };
                    state.save()?;
                    return Ok(state);
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Err(StateError::Exists(dir)),
                // The namespace's last sandbox was removed in between, and the namespace's directory with it.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(io_error("create", &dir)(e)),
            }
        }
        Err(io_error("create", &dir)(io::ErrorKind::NotFound.into()))
    }

    /// Reads the state of a sandbox, which another process may have created.
    ///
    /// # Errors
    /// [`StateError::NotFound`], or [`StateError::Unreadable`] for a file that husk did not write.
    pub fn load(base: &Path, namespace: &str, sandbox: &str) -> Result<Self, StateError> {
        let dir = sandbox_dir(base, namespace, sandbox)?;
        if !dir.is_dir() {
            return Err(StateError::NotFound(dir));
        }
        let state = Self::load_in(resolved(base, dir), namespace, sandbox)?;
        if state.contents.namespace != namespace || state.contents.sandbox != sandbox {
            let Contents { namespace, sandbox, .. } = &state.contents;
            let why = format!("belongs to sandbox {namespace}/{sandbox}");
            return Err(StateError::Unreadable { path: state.dir.join(FILE), why });
        }
        Ok(state)
    }

    /// Reads the state in a directory, whichever sandbox it belongs to. Without a file, it is that of the named one.
    pub(super) fn load_in(dir: PathBuf, namespace: &str, sandbox: &str) -> Result<Self, StateError> {
        let path = dir.join(FILE);
        let unreadable = |why: String| StateError::Unreadable { path: path.clone(), why };
        let contents = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice::<Contents>(&bytes).map_err(|e| unreadable(e.to_string()))?,
            // The shim was killed between creating the directory and writing the file. No step was recorded, so there
            // is nothing to undo.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Contents::empty(namespace, sandbox),
            Err(e) => return Err(io_error("read", &path)(e)),
        };
        if contents.version != VERSION {
            return Err(unreadable(format!("version {}, but this husk supports version {VERSION}", contents.version)));
        }
        Ok(Self { dir, contents })
    }

    /// The sandbox's directory, mode 0700.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The leases of CIDs on this host.
    pub(crate) fn leases(&self) -> cid::Leases {
        // The directory is <base>/<namespace>/<sandbox>.
        cid::Leases::under(self.dir.ancestors().nth(2).unwrap_or(Path::new("/")))
    }

    /// The leases of the host's folders and files.
    pub(crate) fn volume_leases(&self) -> VolumeLeases {
        VolumeLeases::under(self.dir.ancestors().nth(2).unwrap_or(Path::new("/")))
    }

    /// The leases of disk images on this host.
    pub(crate) fn image_leases(&self) -> ImageLeases {
        ImageLeases::under(self.dir.ancestors().nth(2).unwrap_or(Path::new("/")))
    }

    /// The leases of user IDs on this host.
    pub(crate) fn user_leases(&self) -> UserLeases {
        UserLeases::under(self.dir.ancestors().nth(2).unwrap_or(Path::new("/")))
    }

    /// The leases of the host's ports.
    pub(crate) fn port_leases(&self) -> PortLeases {
        PortLeases::under(self.dir.ancestors().nth(2).unwrap_or(Path::new("/")))
    }

    /// containerd's namespace.
    pub fn namespace(&self) -> &str {
        &self.contents.namespace
    }

    /// The sandbox's id: the id of the pod or of the single container.
    pub fn sandbox(&self) -> &str {
        &self.contents.sandbox
    }

    /// The shim that serves or served this sandbox. `None` if it was killed before it could write the file.
    pub fn shim(&self) -> Option<ProcessId> {
        self.contents.shim
    }

    /// The sandbox as the holder of leases.
    ///
    /// # Errors
    /// [`StateError::NotFound`] if it has no shim.
    pub(crate) fn holder(&self) -> Result<Holder, StateError> {
        let shim = self.shim().ok_or_else(|| StateError::NotFound(self.dir().to_owned()))?;
        Ok(Holder { namespace: self.namespace().to_owned(), sandbox: self.sandbox().to_owned(), shim })
    }

    /// Whether the sandbox's shim is running.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn shim_lives(&self) -> Result<bool, StateError> {
        match self.contents.shim {
            Some(shim) => shim.runs().map_err(io_error("look for the shim in", Path::new("/proc"))),
            None => Ok(false),
        }
    }

    /// The containers, each with its recorded facts.
    pub fn containers(&self) -> &BTreeMap<String, serde_json::Value> {
        &self.contents.containers
    }

    /// Adds a container, or replaces its recorded facts.
    ///
    /// # Errors
    /// [`StateError::Identifier`], or the file cannot be written.
    pub(crate) fn set_container(&mut self, id: &str, facts: serde_json::Value) -> Result<(), StateError> {
        check_identifier("container id", id)?;
        self.contents.containers.insert(id.into(), facts);
        self.save()
    }

    /// The VM's state and its transitions. `None` if the shim was killed before it could write the file.
    pub fn vm(&self) -> Option<&Life> {
        self.contents.vm.as_ref()
    }

    /// Changes the VM's state and returns the old one. [`State::save`] or the next change writes it.
    ///
    /// # Errors
    /// [`StateError::Transition`].
    pub(crate) fn set_vm_state(&mut self, to: VmState, cause: &str) -> Result<VmState, StateError> {
        let vm = self.contents.vm.get_or_insert_default();
        let from = vm.state();
        vm.enter(to, cause, life::now_ms())?;
        Ok(from)
    }

    /// When the sandbox was created, in milliseconds since the epoch.
    pub fn created_ms(&self) -> Option<u64> {
        self.contents.created_ms
    }

    /// The machine that runs or ran the VM.
    pub fn machine(&self) -> Option<&MachineRecord> {
        self.contents.machine.as_ref()
    }

    /// Records the machine, or more facts about it. The next change writes it.
    pub(crate) fn set_machine(&mut self, machine: MachineRecord) {
        self.contents.machine = Some(machine);
    }

    /// The milestones that the VM's boot has reached.
    pub fn boot(&self) -> Option<&Boot> {
        self.contents.boot.as_ref()
    }

    /// Records the milestones of a boot. The next change writes them.
    pub(crate) fn set_boot(&mut self, boot: Boot) {
        self.contents.boot = Some(boot);
    }

    /// The steps of `owner` in the order in which they were recorded.
    pub(crate) fn steps(&self, owner: &Owner) -> impl Iterator<Item = &Step> {
        self.contents.journal.iter().filter(move |entry| entry.owner == *owner).map(|entry| &entry.step)
    }

    /// Records steps. Call it before their effects happen. Several steps in one call cost one write.
    ///
    /// [`Step::Process`] is the exception: its PID is known only afterwards. If the shim is killed between the spawn
    /// and this call, the kernel kills its children with it (`host/child.rs`).
    ///
    /// # Errors
    /// The file cannot be written. The effects must not happen then.
    pub(crate) fn record(&mut self, owner: &Owner, steps: impl IntoIterator<Item = Step>) -> Result<(), StateError> {
        let before = self.contents.journal.len();
        self.contents.journal.extend(steps.into_iter().map(|step| Entry { owner: owner.clone(), step }));
        if self.contents.journal.len() == before {
            return Ok(());
        }
        self.save().inspect_err(|_| self.contents.journal.truncate(before))
    }

    /// The steps of `owner`, to be undone without the state.
    pub(crate) fn undoing(&self, owner: Owner) -> Undoing {
        let mut steps: Vec<Step> = self.steps(&owner).cloned().collect();
        steps.reverse();
        Undoing { owner, steps }
    }

    /// Removes what was undone from the journal, and the facts of a container of which nothing is left. A step that
    /// failed stays, so that a later call retries it.
    ///
    /// # Errors
    /// [`StateError::Undo`] with every failure; the file cannot be written.
    pub(crate) fn undone(&mut self, undone: Undone) -> Result<(), StateError> {
        let Undone { owner, steps, failures } = undone;
        let journal = &mut self.contents.journal;
        for step in steps {
            let of = |entry: &Entry| entry.owner == owner && entry.step == step;
            journal.iter().rposition(of).map(|position| journal.remove(position));
        }
        if let (Owner::Container(id), true) = (&owner, failures.is_empty()) {
            self.contents.containers.remove(id);
        }
        self.save()?;
        if failures.is_empty() { Ok(()) } else { Err(StateError::Undo(failures)) }
    }

    /// The `poststop` hooks of a container that have not run yet, and the container's description for them.
    pub(crate) fn poststop_hooks(&self, id: &str) -> Option<(Subject, Vec<Hook>)> {
        self.steps(&Owner::Container(id.to_owned())).find_map(|step| match step {
            Step::Hooks { container, poststop } => Some((container.clone(), poststop.clone())),
            _ => None,
        })
    }

    /// Removes a container's `poststop` hooks from the journal after they have run.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn remove_poststop_hooks(&mut self, id: &str) -> Result<(), StateError> {
        let owned = |entry: &Entry| matches!(&entry.owner, Owner::Container(owner) if owner == id);
        self.contents.journal.retain(|entry| !(owned(entry) && matches!(entry.step, Step::Hooks { .. })));
        self.save()
    }

    /// Undoes all steps, last step first. Removes the sandbox's directory, and the namespace's directory if it is empty
    /// then. Blocks for about `within` at most. If steps fail, `state.json` stays and lists them.
    ///
    /// # Errors
    /// [`StateError::Undo`] with every failure.
    pub(crate) fn undo_all(mut self, within: Duration) -> Result<(), StateError> {
        let deadline = Instant::now() + within;
        let mut failures = Vec::new();
        let mut kept = Vec::new();
        for entry in std::mem::take(&mut self.contents.journal).into_iter().rev() {
            if let Err(failure) = undo_step(&entry.step, deadline) {
                failures.push(failure);
                kept.push(entry);
            }
        }
        kept.reverse();
        self.contents.journal = kept;
        if !failures.is_empty() {
            self.save()?;
            return Err(StateError::Undo(failures));
        }
        // First: what is left without its name is found in the pool.
        self.remove_link()?;
        tree::remove(&self.dir).map_err(io_error("remove", &self.dir))?;
        self.dir.parent().map_or(Ok(()), remove_empty)
    }

    /// Replaces the file by rename, without fsync: after a crash of the host `/run` is empty anyway.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn save(&self) -> Result<(), StateError> {
        let path = self.dir.join(FILE);
        let new = self.dir.join(NEW_FILE);
        let write = || -> io::Result<()> {
            let bytes = serde_json::to_vec(&self.contents)?;
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?.write_all(&bytes)?;
            fs::rename(&new, &path)
        };
        write().map_err(io_error("write", &path))
    }
}
