//! The sandboxes of this host, one of them by its id, and what is known of it: from its shim, else from the disk.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use husk_shim::state::{State, StateError, base};
use serde_json::{Value, json};

use crate::client::{Client, Problem};
use crate::print;

/// How long a shim may take for an answer before it counts as silent.
const ANSWER: Duration = Duration::from_secs(5);

/// All sandboxes, by namespace and id. One whose state cannot be read is reported, and does not hide the others.
pub fn sandboxes() -> Result<Vec<State>> {
    let mut found = Vec::new();
    for namespace in folders(&base())? {
        for sandbox in folders(&namespace)? {
            let (Some(namespace), Some(sandbox)) = (name(&namespace), name(&sandbox)) else { continue };
            match State::load(&base(), namespace, sandbox) {
                Ok(state) => found.push(state),
                // It has gone in between.
                Err(StateError::NotFound(_)) => {}
                Err(error) => writeln!(io::stderr(), "husk: {}", print::shown(&error.to_string()))?,
            }
        }
    }
    Ok(found)
}

fn folders(folder: &Path) -> Result<Vec<PathBuf>> {
    let listing = match fs::read_dir(folder) {
        Ok(listing) => listing,
        // No sandbox has been made yet, or the last one of the namespace has just gone.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            bail!("read {}: {error}: husk has to be run as root", folder.display())
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

/// The one sandbox that `id` means.
///
/// # Errors
/// When there is none, or more than one.
pub fn find(id: &str) -> Result<State> {
    let mut all = sandboxes()?;
    let ids: Vec<Ids<'_>> = all.iter().map(Ids::of).collect();
    let chosen = choose(id, &ids)?;
    Ok(all.swap_remove(chosen))
}

/// By what a sandbox is known.
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

/// The index of the sandbox that is meant: the whole id goes before a beginning, and a sandbox's before a container's.
fn choose(wanted: &str, all: &[Ids<'_>]) -> Result<usize> {
    let (namespace, id) = wanted.split_once('/').map_or((None, wanted), |(namespace, id)| (Some(namespace), id));
    if id.is_empty() {
        bail!("the id is empty; `husk list` shows those that there are");
    }
    type Fits = fn(&Ids<'_>, &str) -> bool;
    let rules: [Fits; 4] = [
        |ids, id| ids.sandbox == id,
        |ids, id| ids.containers.contains(&id),
        |ids, id| ids.sandbox.starts_with(id),
        |ids, id| ids.containers.iter().any(|container| container.starts_with(id)),
    ];
    for fits in rules {
        let here = |ids: &&Ids<'_>| namespace.is_none_or(|namespace| ids.namespace == namespace) && fits(ids, id);
        let fitting: Vec<&Ids<'_>> = all.iter().filter(here).collect();
        match fitting.as_slice() {
            [] => {}
            [one] => return all.iter().position(|ids| std::ptr::eq(ids, *one)).context("it is gone"),
            several => {
                let names: Vec<String> =
                    several.iter().map(|ids| format!("{}/{}", ids.namespace, ids.sandbox)).collect();
                bail!("{wanted:?} may be any of {}: give more of the id, or NAMESPACE/ID", names.join(", "));
            }
        }
    }
    bail!("no sandbox {wanted:?}; `husk list` shows those that there are")
}

/// What is known of a sandbox.
pub struct Known {
    /// As `compute.vm.status` tells it. What only a shim knows is missing from what the disk says.
    pub status: Value,
    /// Why the shim did not tell it, and it is from the disk.
    pub silent: Option<String>,
}

/// Asks the shim with `method`, and where it does not answer, reads with `read`.
pub fn known(state: &State, method: &str, read: impl Fn(&State) -> Value) -> Known {
    let silent = match connect(state).and_then(|mut client| client.call(method, json!({}))) {
        Ok(status) => return Known { status, silent: None },
        Err(problem) => problem.to_string(),
    };
    // Read again: the shim's last words may have come since.
    let status = match State::load(&base(), state.namespace(), state.sandbox()) {
        Ok(state) => read(&state),
        Err(_) => read(state),
    };
    Known { status, silent: Some(silent) }
}

/// The sandbox's shim.
///
/// # Errors
/// When it is dead or silent; the message says so.
pub fn connect(state: &State) -> Result<Client, Problem> {
    match state.shim_lives() {
        Ok(true) => Client::connect(state.dir(), ANSWER),
        Ok(false) => Err(Problem::Silent("its shim is dead".to_owned())),
        Err(error) => Err(Problem::Silent(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_means_one_sandbox_or_the_error_says_what_to_do() {
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
            ("web-", Err("\"web-\" may be any of a/web-1, b/web-1: give more of the id, or NAMESPACE/ID")),
            ("web-1", Err("\"web-1\" may be any of a/web-1, b/web-1: give more of the id, or NAMESPACE/ID")),
            ("db", Err("\"db\" may be any of b/pod7, c/twin: give more of the id, or NAMESPACE/ID")),
            ("x", Err("no sandbox \"x\"; `husk list` shows those that there are")),
            ("c/web", Err("no sandbox \"c/web\"; `husk list` shows those that there are")),
            ("", Err("the id is empty; `husk list` shows those that there are")),
            ("a/", Err("the id is empty; `husk list` shows those that there are")),
        ];
        for (id, wanted) in table {
            let chosen = choose(id, &all).map_err(|error| error.to_string());
            assert_eq!(chosen, wanted.map_err(str::to_owned), "{id}");
        }
    }
}
