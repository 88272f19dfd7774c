//! A containerd with an image of Debian that has fio, git, PostgreSQL and Python, for programs that work with many files.
//! All snapshots are on a disk of this machine: on a tmpfs, nothing would ever have to be synced.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::artifacts::repository;
use crate::containerd::{Containerd, Ctr, Setup};

/// The image's name; see `tests/setup-debian`.
const IMAGE: &str = "docker.io/library/husk-debian:latest";
/// Deadline for the import of the image.
const IMPORT: Duration = Duration::from_secs(600);
/// Folder of this machine for files that are to be on a disk.
const ON_DISK: &str = "/var/tmp";

/// The containerd, and a folder on a disk for its snapshots and for volumes.
pub struct Debian {
    /// The daemon. Ends before its folder.
    pub containerd: Containerd,
    folder: tempfile::TempDir,
}

impl Debian {
    /// Starts a containerd and imports the image. Volumes may be in [`Self::folder`].
    pub fn start() -> Result<Self> {
        let archive = repository().join(".cache/debian/debian.tar");
        ensure!(archive.is_file(), "{} is missing: run tests/setup-debian first", archive.display());
        let folder = tempfile::Builder::new().prefix("husk-debian-").tempdir_in(ON_DISK).context("create a folder")?;
        let snapshots = folder.path().join("snapshots");
        let setup = Setup {
            config: format!("[plugins.\"io.containerd.snapshotter.v1.overlayfs\"]\nroot_path = {snapshots:?}\n"),
            husk: husk_config(folder.path()),
            ..Setup::default()
        };
        let containerd = Containerd::with(setup)?;
        containerd.ctr(["image", "import"]).arg(archive.display()).deadline(IMPORT).ok()?;
        Ok(Self { containerd, folder })
    }

    /// The folder on a disk.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a configuration of husk with more lines, for `ctr run --runtime-config-path`.
    pub fn config(&self, name: &str, lines: &str) -> Result<PathBuf> {
        let path = self.folder().join(format!("{name}.toml"));
        let text = crate::containerd::husk_config(&(husk_config(self.folder()) + lines));
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// `ctr run` with these flags, in a container with this id and this shell script.
    pub fn run(&self, flags: &[&str], id: &str, script: &str) -> Ctr<'_> {
        self.containerd.ctr(["run"]).args(flags).args([IMAGE, id, "bash", "-c", script])
    }
}

fn husk_config(folder: &Path) -> String {
    format!("volume_dirs = [{folder:?}]\nlayer_cache_dir = {:?}\n", folder.join("layers"))
}
