//! `husk node install`.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use husk_protos::chain::Chain;

use super::edit::{Edited, Sandboxer};
use super::host::Host;
use super::places::{ARTIFACTS, Artifact, DROP_IN, FOLDER, NEW, PENDING, RECORD, SHIM};
use super::record::Record;
use super::{command, containerd, edit, files};

/// Deadline for a program that only prints something.
const PROGRAM: Duration = Duration::from_secs(30);

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    host: Host,
    /// The folder with husk's programs, kernel and initramfs [default: the folder of this program]
    #[arg(long, value_name = "FOLDER")]
    from: Option<PathBuf>,
    /// containerd's configuration on the node. It is created if it does not exist
    #[arg(long, value_name = "FILE", default_value = "/etc/containerd/config.toml")]
    containerd_config: PathBuf,
    /// Who creates a pod's sandbox: containerd, with a pause container, or the shim, through the Sandbox API of
    /// containerd 2
    #[arg(long, value_name = "SANDBOXER", default_value = "podsandbox")]
    sandboxer: Sandboxer,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    // Opened before the root folder changes.
    let sources = open(options.from.as_deref())?;
    let _lock = options.host.enter()?;
    let config = resolve(&options.containerd_config)?;
    prepare_folder()?;
    let record = match Record::read()? {
        Some(record) => record,
        None => Record::write(&config)?,
    };
    ensure!(
        record.config == config,
        "husk is registered in {}, not in {}: run `husk node uninstall` first",
        record.config.display(),
        config.display()
    );
    for (artifact, source) in &sources {
        let path = Path::new(FOLDER).join(artifact.name);
        match source {
            Some(source) => files::install(source, &path, artifact.mode)?,
            None => files::remove(&path)?,
        }
    }
    check_programs(&sources)?;
    let changed = register(options, &config)?;
    let version = env!("CARGO_PKG_VERSION");
    let what = if changed { "installed" } else { "is installed already" };
    writeln!(io::stdout(), "husk {version} {what} in {FOLDER}, registered in {}", config.display())?;
    Ok(())
}

fn open(from: Option<&Path>) -> Result<Vec<(&'static Artifact, Option<File>)>> {
    let own = std::env::current_exe().context("find this program's folder")?;
    let folder = from.or_else(|| own.parent()).unwrap_or(Path::new("/"));
    let open = |artifact: &'static Artifact| {
        let path = folder.join(artifact.name);
        match File::open(&path) {
            Ok(file) => Ok((artifact, Some(file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !artifact.required => Ok((artifact, None)),
            Err(error) => Err(error).with_context(|| format!("open {}, which is to be installed", path.display())),
        }
    };
    ARTIFACTS.iter().map(open).collect()
}

/// The configuration's path without symbolic links, because the file that they lead to is replaced.
fn resolve(config: &Path) -> Result<PathBuf> {
    ensure!(config.is_absolute(), "--containerd-config {}: expected an absolute path", config.display());
    if files::exists(config)? {
        return fs::canonicalize(config).with_context(|| format!("follow {}", config.display()));
    }
    Ok(config.to_owned())
}

/// Creates the installation's folder. Nobody else's files may be in it: the removal of husk removes the folder.
fn prepare_folder() -> Result<()> {
    create_folder(Path::new(FOLDER))?;
    let own: Vec<&str> =
        ARTIFACTS.iter().map(|artifact| artifact.name).chain([DROP_IN, RECORD, PENDING].map(file_name)).collect();
    for entry in fs::read_dir(FOLDER).with_context(|| format!("read {FOLDER}"))? {
        let name = entry.with_context(|| format!("read {FOLDER}"))?.file_name();
        let known = name.to_str().is_some_and(|name| own.contains(&name.strip_suffix(NEW).unwrap_or(name)));
        ensure!(known, "{FOLDER} contains {name:?}, which is not husk's: move it away");
    }
    Ok(())
}

fn file_name(path: &'static str) -> &'static str {
    path.rsplit('/').next().unwrap_or(path)
}

fn create_folder(path: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        created => created.with_context(|| format!("create {}", path.display())),
    }
}

/// Runs each program on the node, which may lack a library, and checks that the node has what husk needs.
fn check_programs(sources: &[(&Artifact, Option<File>)]) -> Result<()> {
    for (artifact, source) in sources {
        let flag = match artifact.name {
            "containerd-shim-husk-v1" => "-v",
            "husk" | "virtiofsd" => "--version",
            _ => continue,
        };
        if source.is_some() {
            command::run(Command::new(Path::new(FOLDER).join(artifact.name)).arg(flag), PROGRAM)
                .with_context(|| format!("{} does not run on this node", artifact.name))?;
        }
    }
    let husk = Path::new(SHIM).with_file_name("husk");
    command::run(Command::new(husk).arg("check-config"), PROGRAM).context("this node cannot run husk's VMs")?;
    Ok(())
}

/// Registers the runtime with containerd. Returns false if it was registered.
fn register(options: &Options, config: &Path) -> Result<bool> {
    let before = Files { config: files::read(config)?, drop_in: files::read(Path::new(DROP_IN))? };
    let text = before.config.clone().unwrap_or_else(|| edit::initial(options.sandboxer).to_owned());
    let Edited { text, drop_in } =
        edit::add(&text, options.sandboxer).with_context(|| format!("change {}", config.display()))?;
    let after = Files { config: Some(text), drop_in };
    if before == after && !files::exists(Path::new(PENDING))? {
        return Ok(false);
    }
    files::write(Path::new(PENDING), b"", 0o644)?;
    if let Some(parent) = config.parent() {
        create_folder(parent)?;
    }
    let present = if before.config.is_some() {
        containerd::effective(&options.host.containerd, config)?
    } else {
        // What containerd uses without a file. containerd 1.6 does not print it without one.
        files::prepare(config, edit::initial(options.sandboxer).as_bytes(), 0o644)?;
        containerd::effective(&options.host.containerd, &files::next(config))?
    };
    after.write_drop_in()?;
    let next = after.prepare(config)?;
    let checked =
        containerd::effective(&options.host.containerd, &next).and_then(|next| containerd::check(&present, &next));
    if let Err(error) = checked {
        files::remove(&next)?;
        before.write_drop_in()?;
        return Err(error).with_context(|| format!("{} stays as it is", config.display()));
    }
    files::replace(config)?;
    if let Err(error) = containerd::restart(&options.host.restart) {
        before.restore(config)?;
        let again = match containerd::restart(&options.host.restart) {
            Ok(()) => "containerd runs with its old configuration again".to_owned(),
            Err(again) => format!("it does not start with its old configuration either: {}", Chain(again.as_ref())),
        };
        bail!("containerd does not start with husk: {}; {again}", Chain(error.as_ref()));
    }
    files::remove(Path::new(PENDING))?;
    Ok(true)
}

/// The texts that register the runtime. `None`: no such file.
#[derive(PartialEq, Eq)]
struct Files {
    config: Option<String>,
    drop_in: Option<String>,
}

impl Files {
    fn write_drop_in(&self) -> Result<()> {
        match &self.drop_in {
            Some(text) => files::write(Path::new(DROP_IN), text.as_bytes(), 0o644),
            None => files::remove(Path::new(DROP_IN)),
        }
    }

    /// Writes the next version of containerd's configuration and returns its path.
    fn prepare(&self, config: &Path) -> Result<PathBuf> {
        files::prepare(config, self.config.as_deref().unwrap_or_default().as_bytes(), 0o644)?;
        Ok(files::next(config))
    }

    fn restore(&self, config: &Path) -> Result<()> {
        if self.config.is_some() {
            self.prepare(config)?;
            files::replace(config)?;
        } else {
            files::remove(config)?;
        }
        self.write_drop_in()
    }
}
