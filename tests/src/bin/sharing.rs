//! What processes share through a folder besides its files, for two containers that mount one.
//!
//! `sharing hold FOLDER` listens on a Unix socket, holds locks, writes to a fifo and maps a file. It prints a line when
//! that is done, serves one client, and prints what the client has written to its mapping.
//! `sharing see FOLDER` prints what another process finds of that. `sharing answer FOLDER` does the same, and writes to
//! the mapped file through a mapping of its own.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;

const PAGE: usize = 4096;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["hold", folder] => hold(Path::new(folder)),
        ["see", folder] => see(Path::new(folder), false),
        ["answer", folder] => see(Path::new(folder), true),
        _ => Err(io::Error::other("usage: sharing hold | see | answer FOLDER")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Without a stderr, the exit code has to do.
            let _ = writeln!(io::stderr(), "sharing: {error}");
            ExitCode::FAILURE
        }
    }
}

fn hold(folder: &Path) -> io::Result<()> {
    let open =
        |name: &str| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(folder.join(name));
    let listener = UnixListener::bind(folder.join("socket"))?;
    let whole = open("flock")?;
    flock(&whole, libc::LOCK_EX)?;
    let record = open("fcntl")?;
    lock(&record, libc::F_WRLCK)?;
    mkfifo(&folder.join("fifo"))?;
    // Opened for both, a fifo does not wait for a reader.
    let mut fifo = open("fifo")?;
    fifo.write_all(b"through the fifo")?;
    let memory = open("memory")?;
    memory.set_len(PAGE as u64)?;
    let mapping = map(&memory, true)?;
    store(mapping, b'h');
    writeln!(io::stdout(), "holding")?;
    let (mut client, _) = listener.accept()?;
    client.write_all(b"through the socket")?;
    // Until the client has closed its end.
    client.read_to_end(&mut Vec::new())?;
    writeln!(io::stdout(), "the mapping has {}", char::from(load(mapping)))?;
    Ok(())
}

fn see(folder: &Path, answer: bool) -> io::Result<()> {
    let name = |error: io::Error| error.to_string();
    let busy = |result: io::Result<()>| match result {
        Ok(()) => "free".to_owned(),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => "busy".to_owned(),
        Err(error) => error.to_string(),
    };
    writeln!(
        io::stdout(),
        "flock: {}",
        busy(File::open(folder.join("flock")).and_then(|file| flock(&file, libc::LOCK_EX | libc::LOCK_NB)))
    )?;
    writeln!(
        io::stdout(),
        "fcntl: {}",
        busy(File::open(folder.join("fcntl")).and_then(|file| lock(&file, libc::F_RDLCK)))
    )?;
    let memory = OpenOptions::new().read(true).write(answer).open(folder.join("memory"))?;
    let mapping = map(&memory, answer)?;
    writeln!(io::stdout(), "memory: {}", char::from(load(mapping)))?;
    if answer {
        store(mapping, b'a');
        let mut fifo = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(folder.join("fifo"))?;
        let mut bytes = [0; 64];
        let read = fifo.read(&mut bytes).map(|length| String::from_utf8_lossy(&bytes[..length]).into_owned());
        writeln!(io::stdout(), "fifo: {}", read.unwrap_or_else(name))?;
        let mut text = String::new();
        // `hold` serves one client.
        let connected = UnixStream::connect(folder.join("socket")).and_then(|mut stream| {
            stream.shutdown(std::net::Shutdown::Write)?;
            stream.read_to_string(&mut text)
        });
        writeln!(io::stdout(), "socket: {}", connected.map_or_else(name, |_| text))?;
    }
    Ok(())
}

fn mkfifo(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path is a zero-terminated string that outlives the call.
    if unsafe { libc::mkfifo(path.as_ptr(), 0o700) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn flock(file: &File, operation: i32) -> io::Result<()> {
    // SAFETY: flock(2) takes integers.
    if unsafe { libc::flock(file.as_raw_fd(), operation) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Locks the whole file for this process, without waiting.
fn lock(file: &File, kind: i32) -> io::Result<()> {
    // SAFETY: all zeros are a valid structure, for the whole file.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = kind as i16;
    // SAFETY: the structure outlives the call.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw const range) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Maps the file's first page, shared, until the process exits.
fn map(file: &File, writable: bool) -> io::Result<*mut u8> {
    let access = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
    // SAFETY: the kernel chooses the address, so no memory of this process is replaced.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, access, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address.cast()) }
}

fn store(mapping: *mut u8, byte: u8) {
    // SAFETY: the pointer is from `map` with write access. Volatile, because others read the page.
    unsafe { mapping.write_volatile(byte) }
}

fn load(mapping: *mut u8) -> u8 {
    // SAFETY: the pointer is from `map`. Volatile, because others write to the page.
    unsafe { mapping.read_volatile() }
}
