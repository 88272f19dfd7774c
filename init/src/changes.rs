//! Reports changes of the host's files to the programs that watch them with inotify(7) or fanotify(7).

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use husk_protos::SHARE_PATH;
use husk_protos::changes::{Change, SHARE_SOURCE, take};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::error::{CallError, FailureKind};

/// An option of prctl(2) in husk's kernel (kernel-config/patches/virtiofs-host-events.patch).
const PR_HOST_FS_EVENT: libc::c_int = 0x6875_736c;

/// Reports changes of the source with this number in the share.
pub(crate) fn report(entry: u64, mut changes: &[u8]) -> Result<(), CallError> {
    let path = Path::new(SHARE_PATH).join(entry.to_string()).join(SHARE_SOURCE);
    let failed = |e: Errno| match e {
        Errno::EINVAL => {
            let what = "the guest's kernel does not report changes of the host: it lacks virtiofs-host-events.patch";
            CallError::new(FailureKind::FailedPrecondition, what)
        }
        e => CallError::internal(format_args!("report changes of {}", path.display()), &e),
    };
    // As a folder first: only then does the kernel mount a source that is not mounted yet.
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let source = match open(&path, flags | OFlag::O_DIRECTORY, Mode::empty()) {
        Err(Errno::ENOTDIR) => open(&path, flags, Mode::empty()),
        opened => opened,
    };
    let source = source.map_err(failed)?;
    while let Some(change) = take(&mut changes) {
        host_event(&source, change).map_err(failed)?;
    }
    // Watches of deleted files, also of those in folders that the host does not watch.
    host_event(&source, Change { mask: 0, cookie: 0, name: b"" }).map_err(failed)
}

fn host_event(source: &impl AsFd, Change { mask, cookie, name }: Change<'_>) -> Result<(), Errno> {
    let name = CString::new(name).map_err(|_| Errno::ENOENT)?;
    let pointer = if name.is_empty() { std::ptr::null() } else { name.as_ptr() };
    // SAFETY: the name is null or a zero-terminated string that outlives the call, which only reads it. A kernel that
    // lacks the option returns EINVAL.
    let result = unsafe {
        libc::prctl(
            PR_HOST_FS_EVENT,
            source.as_fd().as_raw_fd() as libc::c_ulong,
            pointer,
            libc::c_ulong::from(mask),
            libc::c_ulong::from(cookie),
        )
    };
    Errno::result(result).map(drop)
}
