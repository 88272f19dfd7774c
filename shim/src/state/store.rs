//! The folder of a sandbox and its `state.json`, whose journal is written before each effect.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::error::{StateError, UndoFailure, check_identifier, io_error};
use super::facts::{Boot, MachineRecord};
use super::life::{Life, VmState};
use super::undo::Step;
use super::{cid, life, tree};
use crate::host::hooks::{Hook, Subject};
use crate::host::process::ProcessId;

/// Where the state of all sandboxes lives, unless `HUSK_STATE_DIR` names another folder.
pub const BASE: &str = "/run/husk";
const BASE_ENV: &str = "HUSK_STATE_DIR";
pub(super) const FILE: &str = "state.json";
const NEW_FILE: &str = "state.json.new";
/// Version of the file's layout. A shim only ever meets files of another version after an upgrade under running sandboxes.
const VERSION: u32 = 1;
/// How often `create` begins anew when another shim removes the empty namespace folder at that very moment.
const CREATE_ATTEMPTS: u32 = 16;

/// Who a journal's step belongs to, and with whose end it is undone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    /// The whole sandbox.
    Sandbox,
    /// The container with this id.
    Container(String),
}

/// Writes down the steps of one owner, before their effects: [`State::record`] for those who need not know the state.
pub type Recorder<'a> = &'a mut dyn FnMut(Vec<Step>) -> Result<(), StateError>;

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    owner: Owner,
    #[serde(flatten)]
    step: Step,
}

#[derive(Debug, Serialize, Deserialize)]
struct Contents {
    version: u32,
    namespace: String,
    sandbox: String,
    shim: Option<ProcessId>,
    containers: BTreeMap<String, serde_json::Value>,
    /// Milliseconds since the epoch.
    created_ms: Option<u64>,
    /// None where nothing is known of it.
    vm: Option<Life>,
    /// The last one that was started.
    machine: Option<MachineRecord>,
    /// The last one that was tried.
    boot: Option<Boot>,
    journal: Vec<Entry>,
}

/// One sandbox's folder and what its `state.json` says. Whoever holds this is the only writer.
#[derive(Debug)]
pub struct State {
    dir: PathBuf,
    contents: Contents,
}

/// The folder that holds the state of all sandboxes: `HUSK_STATE_DIR`, else [`BASE`].
pub fn base() -> PathBuf {
    std::env::var_os(BASE_ENV).filter(|dir| !dir.is_empty()).map_or_else(|| BASE.into(), PathBuf::from)
}

/// The folder of a sandbox under `base`.
///
/// # Errors
/// [`StateError::Identifier`].
pub fn sandbox_dir(base: &Path, namespace: &str, sandbox: &str) -> Result<PathBuf, StateError> {
    check_identifier("namespace", namespace)?;
    check_identifier("sandbox id", sandbox)?;
    Ok(base.join(namespace).join(sandbox))
}

impl State {
    /// Makes the folder of a new sandbox, with the calling process as its shim.
    ///
    /// # Errors
    /// [`StateError::Exists`] when the folder is there: [`State::load`] it, and decide by [`State::shim_lives`].
    pub fn create(base: &Path, namespace: &str, sandbox: &str) -> Result<Self, StateError> {
        let dir = sandbox_dir(base, namespace, sandbox)?;
        let shim = ProcessId::own().map_err(io_error("read the start time of this process in", Path::new("/proc")))?;
        let contents = Contents {
            version: VERSION,
            namespace: namespace.into(),
            sandbox: sandbox.into(),
            shim: Some(shim),
            containers: BTreeMap::new(),
            created_ms: Some(life::now_ms()),
            vm: Some(Life::default()),
            machine: None,
            boot: None,
            journal: Vec::new(),
        };
        let parent = base.join(namespace);
        for _ in 0..CREATE_ATTEMPTS {
            DirBuilder::new().recursive(true).mode(0o700).create(&parent).map_err(io_error("create", &parent))?;
            match DirBuilder::new().mode(0o700).create(&dir) {
                Ok(()) => {
                    let state = Self { dir, contents };
                    state.save()?;
                    return Ok(state);
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Err(StateError::Exists(dir)),
                // The last sandbox of this namespace was removed in between, and the namespace's folder with it.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(io_error("create", &dir)(e)),
            }
        }
        Err(io_error("create", &dir)(io::ErrorKind::NotFound.into()))
    }

    /// Reads the state of a sandbox, whoever made it.
    ///
    /// # Errors
    /// [`StateError::NotFound`], or [`StateError::Unreadable`] for a file that husk did not write.
    pub fn load(base: &Path, namespace: &str, sandbox: &str) -> Result<Self, StateError> {
        let dir = sandbox_dir(base, namespace, sandbox)?;
        if !dir.is_dir() {
            return Err(StateError::NotFound(dir));
        }
        let path = dir.join(FILE);
        let unreadable = |why: String| StateError::Unreadable { path: path.clone(), why };
        let contents = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice::<Contents>(&bytes).map_err(|e| unreadable(e.to_string()))?,
            // The shim was killed between making the folder and writing the file: nothing was recorded, so nothing
            // else was done.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Contents {
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
            },
            Err(e) => return Err(io_error("read", &path)(e)),
        };
        if contents.version != VERSION {
            return Err(unreadable(format!("version {}, but this husk knows version {VERSION}", contents.version)));
        }
        if contents.namespace != namespace || contents.sandbox != sandbox {
            return Err(unreadable(format!("it is about {}/{}", contents.namespace, contents.sandbox)));
        }
        Ok(Self { dir, contents })
    }

    /// The sandbox's folder, mode 0700.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The leases of CIDs on this host, which are beside all sandboxes.
    pub fn leases(&self) -> cid::Leases {
        // The folder is <base>/<namespace>/<sandbox>.
        cid::Leases::under(self.dir.ancestors().nth(2).unwrap_or(Path::new("/")))
    }

    /// containerd's namespace.
    pub fn namespace(&self) -> &str {
        &self.contents.namespace
    }

    /// The sandbox's id: the pod's, or the lone container's.
    pub fn sandbox(&self) -> &str {
        &self.contents.sandbox
    }

    /// The shim that serves, or served, this sandbox. `None` when it was killed before it could write it down.
    pub fn shim(&self) -> Option<ProcessId> {
        self.contents.shim
    }

    /// Makes the calling process the sandbox's shim: for a server that was forked by the process that created the state.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn adopt(&mut self) -> Result<(), StateError> {
        let own = ProcessId::own().map_err(io_error("read the start time of this process in", Path::new("/proc")))?;
        self.contents.shim = Some(own);
        self.save()
    }

    /// Whether the shim of this sandbox still runs.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn shim_lives(&self) -> Result<bool, StateError> {
        match self.contents.shim {
            Some(shim) => shim.runs().map_err(io_error("look for the shim in", Path::new("/proc"))),
            None => Ok(false),
        }
    }

    /// The containers, with what was noted about each.
    pub fn containers(&self) -> &BTreeMap<String, serde_json::Value> {
        &self.contents.containers
    }

    /// Notes a container, or replaces the note about it.
    ///
    /// # Errors
    /// [`StateError::Identifier`], or when the file cannot be written.
    pub fn set_container(&mut self, id: &str, note: serde_json::Value) -> Result<(), StateError> {
        check_identifier("container id", id)?;
        self.contents.containers.insert(id.into(), note);
        self.save()
    }

    /// The VM's state and how it came to it. `None` when the shim was killed before it could write that down.
    pub fn vm(&self) -> Option<&Life> {
        self.contents.vm.as_ref()
    }

    /// Notes that the VM is in another state now, and what it was in before. [`State::save`] writes it, or whatever is written next.
    ///
    /// # Errors
    /// [`StateError::Vm`].
    pub fn vm_enters(&mut self, to: VmState, cause: &str) -> Result<VmState, StateError> {
        let vm = self.contents.vm.get_or_insert_default();
        let from = vm.state();
        vm.enter(to, cause, life::now_ms())?;
        Ok(from)
    }

    /// When the sandbox was made, milliseconds since the epoch.
    pub fn created_ms(&self) -> Option<u64> {
        self.contents.created_ms
    }

    /// What the VM runs on, or ran on.
    pub fn machine(&self) -> Option<&MachineRecord> {
        self.contents.machine.as_ref()
    }

    /// Notes, or notes more of, what the VM runs on. Written with what is written next.
    pub fn set_machine(&mut self, machine: MachineRecord) {
        self.contents.machine = Some(machine);
    }

    /// What the VM's boot has reached.
    pub fn boot(&self) -> Option<&Boot> {
        self.contents.boot.as_ref()
    }

    /// Notes what a boot has reached. Written with what is written next.
    pub fn set_boot(&mut self, boot: Boot) {
        self.contents.boot = Some(boot);
    }

    /// The steps of `owner`, in the order in which they were recorded.
    pub fn steps(&self, owner: &Owner) -> impl Iterator<Item = &Step> {
        self.contents.journal.iter().filter(move |entry| entry.owner == *owner).map(|entry| &entry.step)
    }

    /// Writes steps down, before their effects are made. Several at once cost one write.
    ///
    /// A [`Step::Process`] is the exception: its pid is only known afterwards. A `kill -9` of the shim between the spawn
    /// and this call is covered by the kernel, which kills the children with the shim (`vm/launch.rs`).
    ///
    /// # Errors
    /// When the file cannot be written: then the effect must not be made.
    pub fn record(&mut self, owner: &Owner, steps: impl IntoIterator<Item = Step>) -> Result<(), StateError> {
        let before = self.contents.journal.len();
        self.contents.journal.extend(steps.into_iter().map(|step| Entry { owner: owner.clone(), step }));
        if self.contents.journal.len() == before {
            return Ok(());
        }
        self.save().inspect_err(|_| self.contents.journal.truncate(before))
    }

    /// Undoes what `owner` made, the last first, and forgets a container's note. Goes on after a failing step; steps that
    /// fail stay in the journal, so that a later call tries them again. Blocks for at most about `within`.
    ///
    /// # Errors
    /// [`StateError::Undo`] with every failure.
    pub fn undo(&mut self, owner: &Owner, within: Duration) -> Result<(), StateError> {
        let failures = self.undo_where(|of| of == owner, within);
        if let (Owner::Container(id), true) = (owner, failures.is_empty()) {
            self.contents.containers.remove(id);
        }
        self.save()?;
        if failures.is_empty() { Ok(()) } else { Err(StateError::Undo(failures)) }
    }

    /// The `poststop` hooks of a container that have not been run, and what they are told.
    pub fn poststop_hooks(&self, id: &str) -> Option<(Subject, Vec<Hook>)> {
        self.steps(&Owner::Container(id.to_owned())).find_map(|step| match step {
            Step::Hooks { container, poststop } => Some((container.clone(), poststop.clone())),
            _ => None,
        })
    }

    /// Notes that they have been run.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn poststop_hooks_ran(&mut self, id: &str) -> Result<(), StateError> {
        let of_it = |entry: &Entry| matches!(&entry.owner, Owner::Container(owner) if owner == id);
        self.contents.journal.retain(|entry| !(of_it(entry) && matches!(entry.step, Step::Hooks { .. })));
        self.save()
    }

    /// Undoes everything, the last first, and removes the sandbox's folder, and the namespace's when it is empty then.
    /// Blocks for at most about `within`. When something fails, `state.json` stays, with what is left to be undone.
    ///
    /// # Errors
    /// [`StateError::Undo`] with every failure.
    pub fn undo_all(mut self, within: Duration) -> Result<(), StateError> {
        let failures = self.undo_where(|_| true, within);
        if !failures.is_empty() {
            self.save()?;
            return Err(StateError::Undo(failures));
        }
        tree::remove(&self.dir).map_err(io_error("remove", &self.dir))?;
        let Some(namespace) = self.dir.parent() else { return Ok(()) };
        match fs::remove_dir(namespace) {
            Err(e) if !tree::is_gone(&e) && e.kind() != io::ErrorKind::DirectoryNotEmpty => {
                Err(io_error("remove", namespace)(e))
            }
            _ => Ok(()),
        }
    }

    fn undo_where(&mut self, chosen: impl Fn(&Owner) -> bool, within: Duration) -> Vec<UndoFailure> {
        let deadline = Instant::now() + within;
        let mut failures = Vec::new();
        let mut left = Vec::new();
        for entry in std::mem::take(&mut self.contents.journal).into_iter().rev() {
            if !chosen(&entry.owner) {
                left.push(entry);
            } else if let Err(source) = entry.step.undo(deadline) {
                failures.push(UndoFailure { step: entry.step.to_string(), source });
                left.push(entry);
            }
        }
        left.reverse();
        self.contents.journal = left;
        failures
    }

    /// Replaces the file in one rename. There is no fsync: after a crash of the host `/run` is empty anyway.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self) -> Result<(), StateError> {
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
