//! The node: its root folder, its programs, and the lock against a second run.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::places::FOLDER;

/// How to reach the node.
#[derive(Args)]
pub(crate) struct Host {
    /// The node's root folder. The node's programs run in it
    #[arg(long, value_name = "FOLDER", default_value = "/")]
    root: PathBuf,
    /// The node's containerd
    #[arg(long, value_name = "PROGRAM", default_value = "containerd")]
    pub(crate) containerd: String,
    /// The command that restarts containerd, split at spaces
    #[arg(long, value_name = "COMMAND", default_value = "systemctl restart containerd")]
    pub(crate) restart: String,
}

impl Host {
    /// Makes the node's root folder that of this process, and locks out other runs while the result exists.
    pub(crate) fn enter(&self) -> Result<File> {
        nix::unistd::chroot(&self.root).with_context(|| format!("chroot to {}", self.root.display()))?;
        std::env::set_current_dir("/").context("change to the root folder")?;
        let parent = Path::new(FOLDER).parent().unwrap_or(Path::new("/"));
        let folder = File::open(parent).with_context(|| {
            format!("open {} in {}: husk installs into {FOLDER}", parent.display(), self.root.display())
        })?;
        match folder.try_lock() {
            Ok(()) => Ok(folder),
            Err(TryLockError::WouldBlock) => bail!("another `husk node` is running on this node"),
            Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("lock {}", parent.display())),
        }
    }
}
