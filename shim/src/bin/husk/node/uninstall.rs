//! `husk node uninstall`.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use husk_shim::state::base;

use super::edit::{self, Sandboxer};
use super::host::Host;
use super::places::{ARTIFACTS, DROP_IN, FOLDER, PENDING, RECORD};
use super::record::Record;
use super::{containerd, files};
use crate::find;

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    host: Host,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let _lock = options.host.enter()?;
    if !files::exists(Path::new(FOLDER))? {
        writeln!(io::stdout(), "husk is not installed in {FOLDER}")?;
        return Ok(());
    }
    if let Some(sandbox) = sandbox()? {
        bail!("the sandbox {} exists: delete all pods and containers of husk on this node first", sandbox.display());
    }
    if let Some(record) = Record::read()? {
        unregister(&options.host, &record)?;
        record.remove_created()?;
    }
    // The record is the last: until then, the command can be repeated.
    let artifacts = ARTIFACTS.iter().map(|artifact| Path::new(FOLDER).join(artifact.name));
    for path in artifacts.chain([DROP_IN, PENDING, RECORD].map(PathBuf::from)) {
        files::remove(&path)?;
    }
    fs::remove_dir(FOLDER).with_context(|| format!("remove {FOLDER}"))?;
    writeln!(io::stdout(), "husk removed from {FOLDER}")?;
    Ok(())
}

/// A sandbox of this node, even if its state cannot be read.
fn sandbox() -> Result<Option<PathBuf>> {
    let folders = find::folders(&base())?.into_iter().map(|namespace| find::folders(&namespace));
    let sandboxes = folders.collect::<Result<Vec<_>>>()?;
    Ok(sandboxes.into_iter().flatten().find(|sandbox| sandbox.join("state.json").exists()))
}

/// Removes the runtime from containerd's configuration.
fn unregister(host: &Host, record: &Record) -> Result<()> {
    let config = &record.config;
    files::remove(&files::next(config))?;
    if let Some(text) = files::read(config)? {
        let bare = edit::remove(&text).with_context(|| format!("change {}", config.display()))?;
        let created = record.created_config()
            && [Sandboxer::Podsandbox, Sandboxer::Shim].iter().any(|sandboxer| edit::initial(*sandboxer) == bare);
        if bare != text {
            files::write(Path::new(PENDING), b"", 0o644)?;
            if created {
                files::remove(config)?;
            } else {
                files::prepare(config, bare.as_bytes(), 0o644)?;
                files::replace(config)?;
            }
        }
        if edit::registers(&bare) {
            let file = config.display();
            let what = "a runtime \"husk\" that this command has not added: remove it by hand";
            writeln!(io::stderr(), "husk: {file} has {what}")?;
        }
    }
    if files::exists(Path::new(PENDING))? {
        containerd::restart(&host.restart)?;
        files::remove(Path::new(PENDING))?;
    }
    Ok(())
}
