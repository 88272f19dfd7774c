//! A program that watches files as many do, to reload them when they change.
//!
//! `watching PATH...` watches each path with inotify(7), following symbolic links. It prints `ready`, and a line for each
//! event. When `..data` is moved to a watched folder, it reads the last path at once, and prints that too. After the
//! creation of `..end` in the first path, it exits.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::ExitCode;

/// What a program watches that reloads files.
const MASK: u32 = libc::IN_CREATE
    | libc::IN_DELETE
    | libc::IN_MOVE
    | libc::IN_MODIFY
    | libc::IN_ATTRIB
    | libc::IN_CLOSE_WRITE
    | libc::IN_DELETE_SELF
    | libc::IN_MOVE_SELF;
const NAMES: [(u32, &str); 12] = [
    (libc::IN_CREATE, "create"),
    (libc::IN_DELETE, "delete"),
    (libc::IN_MOVED_FROM, "moved from"),
    (libc::IN_MOVED_TO, "moved to"),
    (libc::IN_MODIFY, "modify"),
    (libc::IN_ATTRIB, "attributes"),
    (libc::IN_CLOSE_WRITE, "written"),
    (libc::IN_DELETE_SELF, "deleted"),
    (libc::IN_MOVE_SELF, "moved"),
    (libc::IN_IGNORED, "watch ended"),
    (libc::IN_Q_OVERFLOW, "overflow"),
    (libc::IN_ISDIR, "of a folder"),
];
/// Descriptor, mask, cookie and the length of the name, 32 bits each.
const HEADER: usize = 16;

fn main() -> ExitCode {
    let paths: Vec<String> = std::env::args().skip(1).collect();
    match watch(&paths) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Without a stderr, the exit code has to do.
            let _ = writeln!(io::stderr(), "watching: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Event {
    watch: i32,
    mask: u32,
    name: String,
}

fn watch(paths: &[String]) -> io::Result<()> {
    // SAFETY: inotify_init1 takes no pointers.
    let inotify = returned(unsafe { libc::inotify_init1(libc::IN_CLOEXEC) })?;
    // SAFETY: the kernel has just created the descriptor, so nothing else owns it.
    let mut inotify = unsafe { File::from_raw_fd(inotify) };
    let mut watches = Vec::new();
    for path in paths {
        let path = CString::new(path.as_str())?;
        // SAFETY: the path is a zero-terminated string that outlives the call.
        watches.push(returned(unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), MASK) })?);
    }
    let mut out = io::stdout();
    writeln!(out, "ready")?;
    loop {
        for Event { watch, mask, name } in events(&mut inotify)? {
            let index = watches.iter().position(|known| *known == watch);
            let path = index.and_then(|index| paths.get(index)).map_or("?", String::as_str);
            let set: Vec<_> = NAMES.iter().filter(|(bit, _)| mask & bit != 0).map(|(_, name)| *name).collect();
            // A line is written at once.
            writeln!(out, "{path}: {} {name}", set.join(" "))?;
            if mask & libc::IN_MOVED_TO != 0 && name == "..data" {
                let read = paths.last().map(fs::read_to_string).transpose()?;
                writeln!(out, "read: {}", read.unwrap_or_default())?;
            }
            if index == Some(0) && mask & libc::IN_CREATE != 0 && name == "..end" {
                return Ok(());
            }
        }
    }
}

/// Waits for events.
fn events(inotify: &mut File) -> io::Result<Vec<Event>> {
    let mut buffer = [0; 8192];
    let length = inotify.read(&mut buffer)?;
    let mut rest = buffer.get(..length).unwrap_or_default();
    let mut events = Vec::new();
    while let Some((header, following)) = rest.split_first_chunk::<HEADER>() {
        let number = |at: usize| {
            let bytes = header.get(at..at + 4).and_then(|bytes| bytes.first_chunk()).copied();
            u32::from_ne_bytes(bytes.unwrap_or_default())
        };
        let (name, following) = following.split_at_checked(number(12) as usize).unwrap_or((following, &[]));
        let name = CStr::from_bytes_until_nul(name).map(CStr::to_string_lossy).unwrap_or_default();
        events.push(Event { watch: number(0).cast_signed(), mask: number(4), name: name.into_owned() });
        rest = following;
    }
    Ok(events)
}

fn returned(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
