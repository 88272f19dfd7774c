//! Mounts the kernel's file systems from a table.

use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;

use nix::mount::{MsFlags, mount};

use super::error::{BootError, NameStep};

struct Mount {
    target: &'static str,
    kind: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const NO_SUID_EXEC_DEV: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC).union(MsFlags::MS_NODEV);

/// Mounted first: [`expedite_rcu`] writes to /sys before the other mounts.
const FIRST: [Mount; 2] = [
    Mount { target: "/proc", kind: "proc", flags: NO_SUID_EXEC_DEV, data: "" },
    Mount { target: "/sys", kind: "sysfs", flags: NO_SUID_EXEC_DEV, data: "" },
];

/// In mount order. /run allows executables because the hooks of bundles may be there.
const REST: [Mount; 6] = [
    Mount { target: "/dev", kind: "devtmpfs", flags: MsFlags::MS_NOSUID, data: "mode=0755" },
    Mount {
        target: "/dev/pts",
        kind: "devpts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: "gid=5,mode=0620,ptmxmode=0666",
    },
    Mount { target: "/dev/shm", kind: "tmpfs", flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), data: "mode=1777" },
    Mount { target: "/run", kind: "tmpfs", flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), data: "mode=0755" },
    Mount { target: "/tmp", kind: "tmpfs", flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), data: "mode=1777" },
    // Without favordynmods, every move of a process into a cgroup waits for an RCU grace period.
    Mount {
        target: crate::cgroup::ROOT,
        kind: "cgroup2",
        flags: NO_SUID_EXEC_DEV,
        data: "nsdelegate,memory_recursiveprot,favordynmods",
    },
];

/// Expedites RCU grace periods: the kernel interrupts each CPU instead of waiting for timer ticks. A grace period takes
/// some 10 µs instead of 8 ms, and the rest of the boot and every create wait for several. Busy CPUs pay with an
/// interrupt each, and a guest has few CPUs.
fn expedite_rcu() -> Result<(), BootError> {
    match std::fs::write("/sys/kernel/rcu_expedited", "1") {
        // A uniprocessor kernel has no grace periods to wait for.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
    .step(|| "write /sys/kernel/rcu_expedited".into())
}

pub(super) fn mount_all() -> Result<(), BootError> {
    mount_each(&FIRST)?;
    expedite_rcu()?;
    mount_each(&REST)
}

/// Mounts the entries in order. Creates the mount points, because an empty initramfs has none.
fn mount_each(mounts: &[Mount]) -> Result<(), BootError> {
    for &Mount { target, kind, flags, data } in mounts {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(target)
            .step(|| format!("create the mount point {target}"))?;
        match mount(Some(kind), target, Some(kind), flags, Some(data)) {
            // CONFIG_DEVTMPFS_MOUNT does not apply to an initramfs, but a root for debugging may have mounted devtmpfs
            // already.
            Err(nix::errno::Errno::EBUSY) if kind == "devtmpfs" => Ok(()),
            other => other,
        }
        .step(|| format!("mount {kind} on {target}"))?;
    }
    Ok(())
}
