//! The kernel's file systems, as a table.

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

/// In the order in which they are mounted. /run must be able to hold executables: bundles' hooks may live there.
const MOUNTS: [Mount; 8] = [
    Mount { target: "/proc", kind: "proc", flags: NO_SUID_EXEC_DEV, data: "" },
    Mount { target: "/sys", kind: "sysfs", flags: NO_SUID_EXEC_DEV, data: "" },
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
    Mount {
        target: crate::cgroup::ROOT,
        kind: "cgroup2",
        flags: NO_SUID_EXEC_DEV,
        data: "nsdelegate,memory_recursiveprot",
    },
];

/// Mounts all of them, making the mount points that an empty initramfs lacks.
pub fn mount_all() -> Result<(), Error> {
    for Mount { target, kind, flags, data } in MOUNTS {
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
