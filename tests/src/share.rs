//! virtiofsd for a VM without a shim: serves a folder of the host to the guest.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use husk_protos::SHARE_TAG;

use crate::artifacts::built;

const SOCKET: &str = "socket";

/// A running virtiofsd for one VM. It exits with its VM.
pub struct Share {
    virtiofsd: Child,
    place: tempfile::TempDir,
}

impl Share {
    /// Serves `folder`.
    pub fn serve(folder: &Path) -> Result<Share> {
        let place = tempfile::tempdir().context("create a folder for virtiofsd's socket")?;
        let listener = UnixListener::bind(place.path().join(SOCKET)).context("bind virtiofsd's socket")?;
        let fd = listener.as_raw_fd();
        let mut command = Command::new(built("virtiofsd")?);
        command.arg(format!("--fd={fd}")).arg("--shared-dir").arg(folder);
        command.args(["--sandbox=namespace", "--announce-submounts", "--posix-acl", "--cache=auto"]);
        command.args(["--inode-file-handles=never", "--log-level=warn"]).stdin(Stdio::null());
        // SAFETY: fcntl and prctl are async-signal-safe, and the closure touches nothing else.
        unsafe {
            command.pre_exec(move || {
                if libc::fcntl(fd, libc::F_SETFD, 0) < 0 || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let virtiofsd = command.spawn().context("start virtiofsd")?;
        Ok(Share { virtiofsd, place })
    }

    /// QEMU's arguments for the device, of a machine with virtio over MMIO.
    pub fn qemu_arguments(&self) -> [String; 4] {
        let socket = self.place.path().join(SOCKET);
        let device = format!("vhost-user-fs-device,chardev=share,tag={SHARE_TAG}");
        ["-chardev".into(), format!("socket,id=share,path={}", socket.display()), "-device".into(), device]
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        // It may be dead or reaped already. Its worker ends with the connection to QEMU.
        let _ = self.virtiofsd.kill();
        let _ = self.virtiofsd.wait();
    }
}
