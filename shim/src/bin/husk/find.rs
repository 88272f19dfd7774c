//! Finds the sandboxes of this host, selects one by its id, and reads its status from its shim, or from disk if the
//! shim does not answer.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use husk_protos::chain::Chain;
use husk_shim::ctl::messages::NoParams;
use husk_shim::state::status;
use husk_shim::state::status::Status;
use husk_shim::state::{POOL, State, StateError, base};
use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};

use crate::client::{CallError, Client};
use crate::print;

/// Deadline for the result of a unary method.
const ANSWER: Duration = Duration::from_secs(5);

/// All sandboxes, ordered by namespace and id. A sandbox whose state cannot be read is reported on stderr and skipped.
pub(crate) fn sandboxes() -> Result<Vec<State>> {
    let mut found = Vec::new();
    for namespace in folders(&base())? {
        for sandbox in folders(&namespace)? {
            let (Some(namespace), Some(sandbox)) = (name(&namespace), name(&sandbox)) else { continue };
            // What waits in the pool is no sandbox, and what has left it is listed under its name.
            if namespace == POOL {
                continue;
            }
            match State::load(&base(), namespace, sandbox) {
                Ok(state) => found.push(state),
                // Deleted in the meantime.
                Err(StateError::NotFound(_)) => {}
                Err(error) => writeln!(io::stderr(), "husk: {}", print::shown(&Chain(&error).to_string()))?,
            }
        }
    }
    Ok(found)
}

/// The folders in a folder, sorted; none if it does not exist.
pub(crate) fn folders(folder: &Path) -> Result<Vec<PathBuf>> {
    let listing = match fs::read_dir(folder) {
        Ok(listing) => listing,
        // No sandbox has been created yet, or the last one of the namespace has just been deleted.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            bail!("read {}: {error}: run husk as root", folder.display())
        }
        Err(error) => return Err(error).with_context(|| format!("read {}", folder.display())),
    };
    let mut paths = listing.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()?;
    paths.retain(|path| path.is_dir());
    paths.sort();
    Ok(paths)
}

fn name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

/// The sandbox that `id` identifies.
///
/// # Errors
/// If there is none, or more than one.
pub(crate) fn find(id: &str) -> Result<State> {
    let mut all = sandboxes()?;
    let ids: Vec<Ids<'_>> = all.iter().map(Ids::of).collect();
    let chosen = choose(id, &ids)?;
    Ok(all.swap_remove(chosen))
}

/// The names of a sandbox.
struct Ids<'a> {
    namespace: &'a str,
    sandbox: &'a str,
    containers: Vec<&'a str>,
}

impl<'a> Ids<'a> {
    fn of(state: &'a State) -> Self {
        let containers = state.containers().keys().map(String::as_str).collect();
        Self { namespace: state.namespace(), sandbox: state.sandbox(), containers }
    }
}

/// The index of the sandbox that `id` identifies. A complete id takes precedence over a prefix, and a sandbox's id over
/// a container's.
fn choose(id: &str, all: &[Ids<'_>]) -> Result<usize> {
    let (namespace, name) = id.split_once('/').map_or((None, id), |(namespace, name)| (Some(namespace), name));
    if name.is_empty() {
        bail!("the id is empty; `husk list` shows all sandboxes");
    }
    type Matches = fn(&Ids<'_>, &str) -> bool;
    let rules: [Matches; 4] = [
        |ids, id| ids.sandbox == id,
        |ids, id| ids.containers.contains(&id),
        |ids, id| ids.sandbox.starts_with(id),
        |ids, id| ids.containers.iter().any(|container| container.starts_with(id)),
    ];
    for matches in rules {
        let chosen =
            |ids: &&Ids<'_>| namespace.is_none_or(|namespace| ids.namespace == namespace) && matches(ids, name);
        let candidates: Vec<&Ids<'_>> = all.iter().filter(chosen).collect();
        match candidates.as_slice() {
            [] => {}
            [one] => return all.iter().position(|ids| std::ptr::eq(ids, *one)).context("the sandbox is gone"),
            several => {
                let names: Vec<String> =
                    several.iter().map(|ids| format!("{}/{}", ids.namespace, ids.sandbox)).collect();
                bail!("{id:?} matches {}: use a longer prefix or NAMESPACE/ID", names.join(", "));
            }
        }
    }
    bail!("no sandbox {id:?}; `husk list` shows all sandboxes")
}

/// What is known about a sandbox.
pub(crate) struct Known<T> {
    /// From the shim. Without it, from disk, without what only the shim knows.
    pub(crate) status: T,
    /// Why the shim did not return it.
    pub(crate) silence: Option<String>,
}

/// As JSON: the status, and its source.
impl<T: Serialize> Serialize for Known<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(tag = "from", rename_all = "snake_case")]
        enum Source<'a> {
            Shim,
            Disk { because: &'a str },
        }
        #[derive(Serialize)]
        struct WithSource<'a, T> {
            #[serde(flatten)]
            status: &'a T,
            source: Source<'a>,
        }
        let source = self.silence.as_ref().map_or(Source::Shim, |because| Source::Disk { because });
        WithSource { status: &self.status, source }.serialize(serializer)
    }
}

/// The full status of a sandbox.
pub(crate) fn status(state: &State) -> Known<Status> {
    known(state, "compute.vm.status", status::of)
}

/// Calls the shim's `method`; if the shim does not answer, reads the disk with `read`.
pub(crate) fn known<T: DeserializeOwned>(state: &State, method: &str, read: impl Fn(&State) -> T) -> Known<T> {
    let silence = match connect(state).and_then(|mut client| client.call(method, &NoParams {})) {
        Ok(status) => return Known { status, silence: None },
        Err(error) => Chain(&error).to_string(),
    };
    // Read the state again: the shim may have written it since.
    let status = match State::load(&base(), state.namespace(), state.sandbox()) {
        Ok(state) => read(&state),
        Err(_) => read(state),
    };
    Known { status, silence: Some(silence) }
}

/// Connects to the sandbox's shim.
///
/// # Errors
/// If the shim is dead or does not accept the connection.
pub(crate) fn connect(state: &State) -> Result<Client, CallError> {
    match state.shim_lives() {
        Ok(true) => Client::connect(state.dir(), ANSWER),
        Ok(false) => Err(CallError::Unreachable("its shim is dead".to_owned())),
        Err(error) => Err(CallError::Unreachable(Chain(&error).to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_identifies_one_sandbox_or_the_error_says_what_to_do() {
        let ids = |namespace, sandbox, containers: &[&'static str]| Ids {
            namespace,
            sandbox,
            containers: containers.to_vec(),
        };
        let all = [
            ids("a", "web", &["web"]),
            ids("a", "web-1", &["web-1"]),
            ids("b", "pod7", &["db-1", "db-2"]),
            ids("b", "web-1", &["web-1"]),
            ids("c", "twin", &["db-2-copy"]),
        ];
        let table: &[(&str, Result<usize, &str>)] = &[
            ("web", Ok(0)),
            ("pod", Ok(2)),
            ("t", Ok(4)),
            ("b/web", Ok(3)),
            ("a/web", Ok(0)),
            ("b/w", Ok(3)),
            ("db-1", Ok(2)),
            ("db-2", Ok(2)),
            ("db-2-", Ok(4)),
            ("web-", Err("\"web-\" matches a/web-1, b/web-1: use a longer prefix or NAMESPACE/ID")),
            ("web-1", Err("\"web-1\" matches a/web-1, b/web-1: use a longer prefix or NAMESPACE/ID")),
            ("db", Err("\"db\" matches b/pod7, c/twin: use a longer prefix or NAMESPACE/ID")),
            ("x", Err("no sandbox \"x\"; `husk list` shows all sandboxes")),
            ("c/web", Err("no sandbox \"c/web\"; `husk list` shows all sandboxes")),
            ("", Err("the id is empty; `husk list` shows all sandboxes")),
            ("a/", Err("the id is empty; `husk list` shows all sandboxes")),
        ];
        for (id, expected) in table {
            let chosen = choose(id, &all).map_err(|error| error.to_string());
            assert_eq!(chosen, expected.map_err(str::to_owned), "{id}");
        }
    }
}
