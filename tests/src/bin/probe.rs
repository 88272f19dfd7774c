//! Asks the kernel for something from inside a container and says whether it got it: what a shell there can't try.
//!
//! `probe socket FAMILY` opens a stream socket of an address family (its number in linux/socket.h).

use std::io::{self, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
    let answer = match words.as_slice() {
        ["socket", family] => family.parse().map_err(io::Error::other).and_then(socket),
        _ => Err(io::Error::other("usage: probe socket FAMILY")),
    };
    let (line, code) = match answer {
        Ok(()) => ("granted".to_owned(), ExitCode::SUCCESS),
        Err(e) => (format!("refused: {e}"), ExitCode::FAILURE),
    };
    // Without a stdout the exit code says it.
    let _ = writeln!(io::stdout(), "{line}");
    code
}

fn socket(family: i32) -> io::Result<()> {
    // SAFETY: socket(2) takes numbers and gives a descriptor, which lives as long as the process.
    match unsafe { libc::socket(family, libc::SOCK_STREAM, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
