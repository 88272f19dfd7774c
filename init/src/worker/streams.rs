//! Gives a process's pipes to its user. Programs open them by name, and /dev/stdout leads to the pipe of stdout.
//!
//! PID 1 changes the owner of a terminal: [`crate::io`].

use std::io::{self, stderr, stdin, stdout};
use std::os::fd::AsFd;

use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{Uid, fchown};
use oci_spec::runtime::Spec;

use super::user_namespace::{self, Kind};

/// Makes the user `uid` of the container the owner of those standard streams of the worker that are pipes: the process
/// inherits them. Like runc, keeps the group.
pub(super) fn give_to(spec: &Spec, uid: u32) -> io::Result<()> {
    // A user without a mapping cannot run at all, and libcontainer reports that.
    let Some(owner) = user_namespace::in_guest(spec, Kind::User, uid)? else { return Ok(()) };
    let (stdin, stdout, stderr) = (stdin(), stdout(), stderr());
    for stream in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
        let found = fstat(stream)?;
        // The others are the guest's /dev/null.
        let is_pipe = SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT == SFlag::S_IFIFO;
        if is_pipe && found.st_uid != owner {
            fchown(stream, Some(Uid::from_raw(owner)), None)?;
        }
    }
    Ok(())
}
