//! Makes an image of a layer with the host's `mkfs.erofs`, in a jail: names, attributes and contents come from a stranger.
//!
//! The program runs as root, because it has to read everybody's files and `trusted.` attributes, but with the two
//! capabilities for that only. It has no network and no other processes, its mounts are read-only and without devices, and
//! it has the system calls of the list below. Of all files it can write to the image alone, whose descriptor it inherits.
//!
//! The list has what mkfs.erofs 1.5 and 1.8 use (from strace), and a reserve for others.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use libc::c_long;
use nix::sched::CloneFlags;

use crate::disks::format::{FormatError, run_in};
use crate::disks::image::Image;
use crate::host::child::FIRST_FD;
use crate::host::jail::Jail;
use crate::host::jail::filter::{Filter, When};

/// The program, which Debian has in the package erofs-utils.
const PROGRAM: &str = "mkfs.erofs";
/// It writes whiteouts (devices 0:0) and overlayfs's attributes as they are, which is what overlayfs in the guest expects.
/// Nothing is compressed: a guest reads faster than it decompresses, and the host's page cache has the same bytes anyway.
const ARGS: [&str; 2] = ["--quiet", "--preserve-mtime"];

/// capabilities(7): read all files and folders, and their `trusted.` attributes.
const CAP_DAC_READ_SEARCH: u64 = 1 << 2;
const CAP_SYS_ADMIN: u64 = 1 << 21;

const SYSTEM_CALLS: &[c_long] = &[
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_close,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_execve,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_futex,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_getxattr,
    libc::SYS_ioctl,
    libc::SYS_lgetxattr,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_lseek,
    libc::SYS_lstat,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_prlimit64,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_read,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendfile,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_stat,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_wait4,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Writes an image of `layer` to an empty file, and returns when the host's disk has it.
///
/// # Errors
/// See [`FormatError`].
pub(super) async fn write(layer: &Path, image: &File, within: Duration) -> Result<(), FormatError> {
    let target = Image::inherited(FIRST_FD);
    let args = ARGS.into_iter().map(Into::into).chain([target.into(), layer.into()]).collect();
    run_in(Some(jail()), within, PROGRAM, args, &[], image).await?;
    Ok(image.sync_all()?)
}

/// Whether the host has the program.
///
/// # Errors
/// It is missing.
pub(crate) fn check() -> Result<(), FormatError> {
    crate::disks::format::find(PROGRAM).map(drop)
}

fn jail() -> Jail {
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    Jail {
        namespaces,
        user: None,
        loader: None,
        filter: Some(Filter::new(SYSTEM_CALLS.iter().map(|number| (*number, When::Always)))),
        capabilities: Some(CAP_DAC_READ_SEARCH | CAP_SYS_ADMIN),
        read_only: true,
    }
}
