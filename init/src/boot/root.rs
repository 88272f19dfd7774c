//! Makes `pivot_root` work on an initramfs.

use std::os::unix::fs::DirBuilderExt;

use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

use super::error::{BootError, NameStep};

const STAGE: &str = "/.root";

/// Gives the root mount a parent. `pivot_root(2)` fails while `/` is the kernel's first mount (rootfs), which has none;
/// a bind mount of `/` moved over `/` has one, and copies nothing.
///
/// Must run before anything else is mounted: the bind mount is not recursive.
pub(super) fn make_movable() -> Result<(), BootError> {
    std::fs::DirBuilder::new().mode(0o755).create(STAGE).step(|| format!("create {STAGE}"))?;
    mount(Some("/"), STAGE, None::<&str>, MsFlags::MS_BIND, None::<&str>).step(|| format!("bind / on {STAGE}"))?;
    chdir(STAGE).step(|| format!("enter {STAGE}"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).step(|| format!("move {STAGE} to /"))?;
    chroot(".").step(|| "chroot into the moved root".into())?;
    chdir("/").step(|| "enter the moved root".into())?;
    std::fs::remove_dir(STAGE).step(|| format!("remove {STAGE}"))
}
