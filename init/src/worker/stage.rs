//! A folder for mounts that the worker makes for a container, and that libcontainer then binds. It is in a mount namespace
//! of the worker's own, so the mounts vanish with the worker.

use std::fs::create_dir;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// The folder, over the guest's own /tmp. Root of a user namespace can get there.
const FOLDER: &str = "/tmp";

/// The folder, made when it is first needed.
#[derive(Debug, Default)]
pub(super) struct Stage {
    made: bool,
}

impl Stage {
    /// A new mount point for the spec's mount `index`.
    pub(super) fn mount_point(&mut self, index: usize) -> io::Result<PathBuf> {
        if !self.made {
            unshare(CloneFlags::CLONE_NEWNS)?;
            // The container's mounts still follow those of the guest.
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)?;
            mount(Some("tmpfs"), FOLDER, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
            self.made = true;
        }
        let path = Path::new(FOLDER).join(index.to_string());
        create_dir(&path)?;
        Ok(path)
    }
}
