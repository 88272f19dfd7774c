//! The kernel's file systems, as a table.

use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;

use nix::mount::{MsFlags, mount};

use super::{Error, Step};

struct Mount {
    target: &'static str,
    kind: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const NO_SUID_EXEC_DEV: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC).union(MsFlags::MS_NODEV);

/// What the other mounts are told by.
const FIRST: [Mount; 2] = [
    Mount { target: "/proc", kind: "proc", flags: NO_SUID_EXEC_DEV, data: "" },
    Mount { target: "/sys", kind: "sysfs", flags: NO_SUID_EXEC_DEV, data: "" },
];

/// In the order in which they are mounted. /run must be able to hold executables: bundles' hooks may live there.
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
    // favordynmods: without it every move of a process into a cgroup waits for an RCU grace period.
    Mount {
        target: crate::cgroup::ROOT,
        kind: "cgroup2",
        flags: NO_SUID_EXEC_DEV,
        data: "nsdelegate,memory_recursiveprot,favordynmods",
    },
];

/// Has the kernel wait for its readers (RCU) by asking each processor instead of by waiting for ticks: some 10 µs in place of 8 ms, for
/// each that the rest of the boot and every create has to wait for. It costs busy processors an interrupt each, and a guest has few.
fn hurry_rcu() -> Result<(), Error> {
    match std::fs::write("/sys/kernel/rcu_expedited", "1") {
        // A kernel for one processor has no such wait.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
    .step(|| "write /sys/kernel/rcu_expedited".into())
}

/// Mounts all of them.
pub fn mount_all() -> Result<(), Error> {
    mount_each(&FIRST)?;
    hurry_rcu()?;
    mount_each(&REST)
}

/// Makes the mount points that an empty initramfs lacks.
fn mount_each(mounts: &[Mount]) -> Result<(), Error> {
    for &Mount { target, kind, flags, data } in mounts {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(target)
            .step(|| format!("create the mount point {target}"))?;
        match mount(Some(kind), target, Some(kind), flags, Some(data)) {
            // CONFIG_DEVTMPFS_MOUNT does not reach an initramfs, but a debugging root may have mounted it already.
            Err(nix::errno::Errno::EBUSY) if kind == "devtmpfs" => Ok(()),
            other => other,
        }
        .step(|| format!("mount {kind} on {target}"))?;
    }
    Ok(())
}
