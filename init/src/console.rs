//! The guest's console: PID 1's standard streams, and the message of a guest that gives up.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use husk_protos::FATAL_PREFIX;
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

/// Connects PID 1's standard streams to /dev/null and /dev/console. In an initramfs without a console node the kernel
/// could not, and a panic message would be lost. /dev must be mounted.
pub(crate) fn take_over() {
    let open = |path: &str| File::options().read(true).write(true).open(path).map(OwnedFd::from);
    let null = open("/dev/null");
    if let Ok(null) = &null {
        let _ = dup2_stdin(null);
    }
    // The host may boot a guest without a console (console=null); output is discarded then.
    if let Ok(out) = open("/dev/console").or(null) {
        let _ = dup2_stdout(&out);
        let _ = dup2_stderr(&out);
    }
}

/// Writes why the guest gives up, regardless of the log level. The host looks for this line.
pub(crate) fn fatal(reason: &str) {
    write(&format!("{FATAL_PREFIX}{reason}\n"));
}

/// Writes a line unless the console would block: a terminal that somebody has stopped must not stop PID 1. Lines that
/// are dropped here still reach the host.
pub(crate) fn show(line: &str) {
    let console = File::options().write(true).custom_flags(libc::O_NONBLOCK).open("/dev/console");
    let _ = console.and_then(|mut console| console.write_all(line.as_bytes()));
}

pub(crate) fn write(text: &str) {
    write_bytes(text.as_bytes());
}

/// Like [`write`], for output that may not be UTF-8.
pub(crate) fn write_bytes(bytes: &[u8]) {
    let written = File::options().write(true).open("/dev/console").and_then(|mut console| console.write_all(bytes));
    if written.is_err() {
        // Before /dev is mounted, PID 1 has only the descriptors that the kernel opened.
        let _ = std::io::stderr().write_all(bytes);
    }
}
