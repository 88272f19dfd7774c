//! `husk`: the operator's look at the virtual machines of this host. Reads what the shims keep on disk, so it works when containerd is down.

mod metadata;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use husk_shim::config;
use husk_shim::host::{self, Places};
use husk_shim::state::{State, base};
use husk_shim::vm::life::Life;
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Looks into husk's virtual machines.
#[derive(Parser)]
#[command(name = "husk", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Lists the sandboxes of this host
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Shows what is known of one sandbox: its shim, its containers, and the state of its VM with how it came to it
    Status {
        /// The sandbox's id, or an unambiguous beginning of it
        id: String,
    },
    /// Prints the guest's console
    Logs {
        /// The sandbox's id, or an unambiguous beginning of it
        id: String,
        /// Only the last N lines
        #[arg(long, value_name = "N")]
        lines: Option<usize>,
    },
    /// Checks the configuration as the creation of a container does, and prints all that is wrong
    CheckConfig {
        /// The file; without it, the one that HUSK_CONFIG names, else /etc/husk/config.toml
        file: Option<PathBuf>,
    },
    /// What is to be known about the tokens that VMs get of the metadata service
    #[command(subcommand)]
    Metadata(metadata::Command),
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        // A reader such as `head` has enough.
        Err(error) if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _ = writeln!(io::stderr(), "husk: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::List { json } => list(json)?,
        Command::Status { id } => status(&find(&id)?)?,
        Command::Logs { id, lines } => logs(&find(&id)?, lines)?,
        Command::Metadata(command) => metadata::run(command)?,
        Command::CheckConfig { file } => return check_config(file.as_deref()),
    }
    Ok(ExitCode::SUCCESS)
}

/// All sandboxes, by namespace and id. One whose state cannot be read is reported, and does not hide the others.
fn sandboxes() -> Result<Vec<State>> {
    let mut found = Vec::new();
    for namespace in entries(base())? {
        for sandbox in entries(namespace.clone())? {
            let (Some(namespace), Some(sandbox)) = (name(&namespace), name(&sandbox)) else { continue };
            match State::load(&base(), &namespace, &sandbox) {
                Ok(state) => found.push(state),
                Err(error) => writeln!(io::stderr(), "husk: {error}")?,
            }
        }
    }
    Ok(found)
}

fn entries(folder: PathBuf) -> Result<Vec<PathBuf>> {
    let listing = match fs::read_dir(&folder) {
        Ok(listing) => listing,
        // No sandbox has been made yet, or the last one of the namespace has just gone.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("read {}", folder.display())),
    };
    let mut paths = listing.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()?;
    paths.retain(|path| path.is_dir());
    paths.sort();
    Ok(paths)
}

fn name(path: &Path) -> Option<String> {
    path.file_name()?.to_str().map(str::to_owned)
}

fn find(id: &str) -> Result<State> {
    let mut matching: Vec<State> = sandboxes()?.into_iter().filter(|state| state.sandbox().starts_with(id)).collect();
    if let Some(exact) = matching.iter().position(|state| state.sandbox() == id) {
        return Ok(matching.swap_remove(exact));
    }
    match matching.len() {
        0 => bail!("no sandbox {id:?}; `husk list` shows those that there are"),
        1 => Ok(matching.swap_remove(0)),
        _ => {
            let ids: Vec<_> = matching.iter().map(State::sandbox).collect();
            bail!("{id:?} may be any of {}", ids.join(", "))
        }
    }
}

fn summary(state: &State) -> Result<serde_json::Value> {
    Ok(json!({
        "sandbox": state.sandbox(),
        "namespace": state.namespace(),
        "shim_pid": state.shim().map(|shim| shim.pid),
        "shim_alive": state.shim_lives()?,
        "vm": state.vm().map(life),
        "containers": state.containers().keys().collect::<Vec<_>>(),
    }))
}

/// A time as people read it (RFC 3339); from a file, so it may be any number.
fn utc(ms: u64) -> String {
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).ok();
    time.and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_else(|| format!("{ms} ms after 1970"))
}

fn life(vm: &Life) -> serde_json::Value {
    let transitions = vm
        .transitions()
        .map(|made| json!({"from": made.from, "to": made.to, "cause": made.cause, "at": utc(made.at_ms)}));
    json!({"state": vm.state(), "transitions": transitions.collect::<Vec<_>>()})
}

fn list(as_json: bool) -> Result<()> {
    let sandboxes = sandboxes()?;
    let mut out = io::stdout().lock();
    if as_json {
        let all = sandboxes.iter().map(summary).collect::<Result<Vec<_>>>()?;
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
        return Ok(());
    }
    writeln!(out, "{:<32} {:<16} {:<12} {:>8} {:<5} CONTAINERS", "SANDBOX", "NAMESPACE", "STATE", "SHIM", "ALIVE")?;
    for state in &sandboxes {
        let pid = state.shim().map_or_else(|| "-".to_owned(), |shim| shim.pid.to_string());
        let alive = if state.shim_lives()? { "yes" } else { "no" };
        let containers = state.containers().keys().cloned().collect::<Vec<_>>().join(",");
        let vm = state.vm().map_or_else(|| "-".to_owned(), |vm| vm.state().to_string());
        let (sandbox, namespace) = (state.sandbox(), state.namespace());
        writeln!(out, "{sandbox:<32} {namespace:<16} {vm:<12} {pid:>8} {alive:<5} {containers}")?;
    }
    Ok(())
}

fn status(state: &State) -> Result<()> {
    writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&summary(state)?)?)?;
    Ok(())
}

fn logs(state: &State, lines: Option<usize>) -> Result<()> {
    let path = state.dir().join("console.log");
    let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    let skip = lines.map_or(0, |lines| all.len().saturating_sub(lines));
    let mut out = io::stdout().lock();
    for line in &all[skip..] {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

fn check_config(file: Option<&Path>) -> Result<ExitCode> {
    match host::check(file, &Places::of_process()) {
        Ok((path, true)) => writeln!(io::stdout(), "ok: {}", path.display())?,
        Ok((path, false)) => writeln!(io::stdout(), "ok: no {}, everything is as by default", path.display())?,
        Err(config::Error::Invalid { path, problems }) => {
            for problem in problems {
                writeln!(io::stderr(), "{}: {problem}", path.display())?;
            }
            return Ok(ExitCode::FAILURE);
        }
        Err(error) => return Err(error.into()),
    }
    Ok(ExitCode::SUCCESS)
}
