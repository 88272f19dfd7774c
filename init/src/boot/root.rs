//! The move that lets `pivot_root` work on top of an initramfs.

use std::os::unix::fs::DirBuilderExt;

use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

use super::{Error, Step};

const STAGE: &str = "/.root";

/// Gives the root mount a parent: `pivot_root(2)` refuses to work while `/` is the kernel's first mount (rootfs), which has none.
/// A bind mount of `/` moved over `/` is a root like any other, and copies nothing.
///
/// Must come before anything else is mounted: the bind mount is not recursive.
pub fn make_movable() -> Result<(), Error> {
    std::fs::DirBuilder::new().mode(0o755).create(STAGE).step(|| format!("create {STAGE}"))?;
    mount(Some("/"), STAGE, None::<&str>, MsFlags::MS_BIND, None::<&str>).step(|| format!("bind / on {STAGE}"))?;
    chdir(STAGE).step(|| format!("enter {STAGE}"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).step(|| format!("move {STAGE} to /"))?;
    chroot(".").step(|| "chroot into the moved root".into())?;
    chdir("/").step(|| "enter the moved root".into())?;
    std::fs::remove_dir(STAGE).step(|| format!("remove {STAGE}"))
}
