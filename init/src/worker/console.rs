//! The console socket, on which PID 1 receives a process's terminal, and the gate that delays the process until the
//! terminal is set up.
//!
//! libcontainer opens the pty in the container's own devpts and sends its master to a socket. It sets neither the
//! terminal's size nor its owner, and an exec runs immediately. So the process waits at a gate, a pipe, before it
//! executes its program, until PID 1 has received the master and set up the terminal.

use std::fs::File;
use std::io::{self, IoSliceMut, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::cmsg_space;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::pipe2;
use tokio::io::Interest;
use tokio::net::UnixListener;

use super::GATE_FD;
use crate::paths;

/// PID 1's side during the creation of a process with a terminal.
#[derive(Debug)]
pub(crate) struct ConsoleSocket {
    path: PathBuf,
    listener: UnixListener,
    gate: OwnedFd,
}

impl ConsoleSocket {
    /// Creates the socket and the gate. Also returns the process's end of the gate, for the streams of its worker.
    pub(crate) fn new() -> io::Result<(Self, OwnedFd)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let (theirs, gate) = pipe2(OFlag::O_CLOEXEC)?;
        let path = Path::new(paths::RUN).join(format!("console-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let listener = UnixListener::bind(&path)?;
        Ok((Self { path, listener, gate }, theirs))
    }

    /// The path to which the worker sends the master.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the master. The caller limits the wait by the lifetime of the worker. Fails unless exactly one
    /// descriptor arrives.
    pub(crate) async fn receive(&self) -> io::Result<OwnedFd> {
        let (stream, _) = self.listener.accept().await?;
        stream.async_io(Interest::READABLE, || receive_descriptor(stream.as_raw_fd())).await
    }

    /// Lets the process continue. If the gate is dropped unopened, the process exits.
    pub(crate) fn open_gate(&self) -> io::Result<()> {
        nix::unistd::write(&self.gate, b"\n")?;
        Ok(())
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "failed to remove a console socket");
        }
    }
}

/// Receives the single descriptor of a message (SCM_RIGHTS, unix(7)). The buffer has no room for more, and the kernel
/// closes the rest.
fn receive_descriptor(socket: i32) -> io::Result<OwnedFd> {
    let (mut text, mut space) = ([0; 64], cmsg_space!(i32));
    let mut parts = [IoSliceMut::new(&mut text)];
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let [fd] = fds[..]
        {
            // SAFETY: the kernel has just created this descriptor for the message, and nothing else owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the message contains no terminal"))
}

/// In the worker: hides the gate from programs that run before the process does, such as hooks. Fails if the worker has
/// no gate.
pub(super) fn protect_gate() -> io::Result<()> {
    // SAFETY: if a worker has a gate, it is this descriptor, and the worker never closes it.
    let gate = unsafe { BorrowedFd::borrow_raw(GATE_FD) };
    fcntl(gate, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(())
}

/// In the process: waits until PID 1 has set up the terminal. Fails if PID 1 gives up.
pub(super) fn pass_gate() -> io::Result<()> {
    // SAFETY: the process inherited the worker's gate as this descriptor, and only this call uses it.
    let mut gate = File::from(unsafe { OwnedFd::from_raw_fd(GATE_FD) });
    gate.read_exact(&mut [0])
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{ControlMessage, UnixAddr, sendmsg};

    use super::*;

    #[test]
    fn a_message_with_one_descriptor_is_accepted_and_any_other_rejected() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let send = |fds: &[i32]| {
            let rights = [ControlMessage::ScmRights(fds)];
            let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
            sendmsg::<UnixAddr>(theirs.as_raw_fd(), &[IoSlice::new(b"x")], rights, MsgFlags::empty(), None).unwrap();
        };
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        send(&[write.as_raw_fd()]);
        drop(write);
        nix::unistd::write(receive_descriptor(ours.as_raw_fd()).unwrap(), b"through").unwrap();
        let mut text = String::new();
        File::from(read).read_to_string(&mut text).unwrap();
        assert_eq!(text, "through", "the end of the file shows that no copy is left");
        send(&[]);
        assert_eq!(receive_descriptor(ours.as_raw_fd()).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
