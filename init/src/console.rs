//! The console as PID 1's standard streams, and the last words of a guest that cannot go on.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

/// Puts PID 1's standard streams on /dev/null and /dev/console, once /dev is there. An initramfs without a console node leaves them
/// elsewhere, and a panic message would go there too.
pub fn take_over() {
    let open = |path: &str| File::options().read(true).write(true).open(path).map(OwnedFd::from);
    let null = open("/dev/null");
    if let Ok(null) = &null {
        let _ = dup2_stdin(null);
    }
    // A guest without a console (console=null) is a choice of the host: what is written then goes nowhere.
    if let Ok(out) = open("/dev/console").or(null) {
        let _ = dup2_stdout(&out);
        let _ = dup2_stderr(&out);
    }
}

/// Says why the guest ends, on the console, whatever the log level is.
pub fn last_words(reason: &str) {
    let line = format!("husk: fatal: {reason}\n");
    write(&line);
}

/// Shows a line on the console if that takes it now: a terminal that somebody has stopped must not stop PID 1.
pub fn show(line: &str) {
    let console = File::options().write(true).custom_flags(libc::O_NONBLOCK).open("/dev/console");
    // What it does not take, the host has.
    let _ = console.and_then(|mut console| console.write_all(line.as_bytes()));
}

/// Writes on the console.
pub fn write(text: &str) {
    write_bytes(text.as_bytes());
}

/// Writes what may be no text on the console.
pub fn write_bytes(bytes: &[u8]) {
    let written = File::options().write(true).open("/dev/console").and_then(|mut console| console.write_all(bytes));
    if written.is_err() {
        // Before /dev is mounted there is only what the kernel opened for PID 1.
        let _ = std::io::stderr().write_all(bytes);
    }
}
