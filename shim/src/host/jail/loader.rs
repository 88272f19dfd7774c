//! Keeps a process's memory from other processes with its user.
//!
//! The kernel lets nobody but root trace a process, read its memory or dump it, if its user could execute but not read
//! the program or its loader (`would_dump` in the kernel's fs/exec.c). Programs and loaders of distributions are readable
//! by everyone. So the loader (ld.so) is replaced, in the program's mount namespace, by a copy that is not.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use nix::fcntl::{OFlag, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;

use super::tmpfs;

/// The copy's name.
const NAME: &str = "loader";
/// Executable by everyone, readable by root.
const MODE: u32 = 0o711;
/// PT_INTERP (elf(5)).
const INTERPRETER: u64 = 3;
/// Most program headers and longest path that are read.
const MAX_HEADERS: u16 = 256;
const MAX_PATH: u64 = 4096;

/// A copy of a program's loader.
#[derive(Debug)]
pub(crate) struct Loader {
    /// The filesystem with the copy.
    files: OwnedFd,
    /// The copy, as the child finds it, which has the same descriptors until it executes the program.
    copy: CString,
    /// The filesystem's root, as the child finds it.
    folder: CString,
    /// Where the program expects its loader.
    path: CString,
}

impl Loader {
    /// Copies the loader of `program`. None if it has none that can be found: a script, or a static program.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub(crate) fn unreadable(program: &Path) -> io::Result<Option<Self>> {
        let Some(path) = interpreter(&File::open(program)?)? else { return Ok(None) };
        let text = fs::read(Path::new(std::ffi::OsStr::new(path.to_str().map_err(io::Error::other)?)))?;
        let files = tmpfs::create(libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV)?;
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let copy = File::from(openat(&files, NAME, flags, Mode::S_IRWXU)?);
        io::Write::write_all(&mut &copy, &text)?;
        // Whatever the umask is.
        copy.set_permissions(fs::Permissions::from_mode(MODE))?;
        let folder = format!("/proc/self/fd/{}", files.as_raw_fd());
        let copy = CString::new(format!("{folder}/{NAME}"))?;
        Ok(Some(Self { files, copy, folder: CString::new(folder)?, path }))
    }

    /// In the child, in its own mount namespace: mounts the copy over the loader.
    pub(super) fn mount(&self) -> io::Result<()> {
        // A mount that is in no namespace cannot be bound. The root is a place that every host has.
        tmpfs::mount_over_root(self.files.as_raw_fd())?;
        mount(Some(self.copy.as_c_str()), self.path.as_c_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        // What enters the namespace later would take what lies on top of the root for the root (setns(2)).
        umount2(self.folder.as_c_str(), MntFlags::MNT_DETACH)?;
        Ok(())
    }
}

/// The path of a program's loader, if it is a dynamic ELF program of 64 bits.
fn interpreter(program: &File) -> io::Result<Option<CString>> {
    let mut header = [0; 64];
    match program.read_exact_at(&mut header, 0) {
        // A script may be shorter.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    // 64 bits, little endian.
    if header[..6] != *b"\x7fELF\x02\x01" {
        return Ok(None);
    }
    let (offset, size, count) = (number(&header, 32, 8), number(&header, 54, 2), number(&header, 56, 2));
    for index in 0..count.min(MAX_HEADERS.into()) {
        let mut entry = [0; 56];
        program.read_exact_at(&mut entry, offset.saturating_add(index * size))?;
        if number(&entry, 0, 4) != INTERPRETER {
            continue;
        }
        let mut path = vec![0; number(&entry, 32, 8).min(MAX_PATH) as usize];
        program.read_exact_at(&mut path, number(&entry, 8, 8))?;
        let path = path.split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
        return Ok(Some(CString::new(std::ffi::OsString::from_vec(path).into_vec())?));
    }
    Ok(None)
}

fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_of_a_dynamic_program_is_found() {
        let shell = interpreter(&File::open("/bin/sh").unwrap()).unwrap().unwrap();
        assert!(Path::new(shell.to_str().unwrap()).is_absolute() && shell.to_bytes().ends_with(b".so.2"), "{shell:?}");
        for text in ["#!/bin/sh\n", "", &"#!/bin/sh\n#".repeat(20)] {
            let script = tempfile::NamedTempFile::new().unwrap();
            fs::write(script.path(), text).unwrap();
            assert!(Loader::unreadable(script.path()).unwrap().is_none());
        }
    }

    #[test]
    fn a_damaged_program_is_an_error() {
        let program = tempfile::NamedTempFile::new().unwrap();
        let mut bytes = fs::read("/bin/sh").unwrap();
        bytes.truncate(80);
        fs::write(program.path(), bytes).unwrap();
        assert_eq!(Loader::unreadable(program.path()).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
