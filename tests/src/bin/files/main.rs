//! Tries what a filesystem supports, from inside a container. `files FOLDER` prints one line for each check: its name, a
//! colon, and `works`, what differs from what is expected, or the error.
//!
//! `files as CAPABILITY WHAT PATH` does one thing as a user without privileges but this capability (a number of
//! linux/capability.h): the checks start it.

mod random;
mod system;

use std::ffi::{CString, OsStr};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::system::{BLOCK, call, expect, number};

const USER: usize = 1000;
/// Its supplementary groups.
const GROUPS: [u32; 3] = [5, 6, 8];
/// Numbers of linux/capability.h.
const CAP_DAC_OVERRIDE: &str = "1";
const CAP_MKNOD: &str = "27";
/// Not a capability.
const NO_CAPABILITY: &str = "64";
/// linux/fs.h.
const FS_IOC_GETFLAGS: usize = 0x8008_6601;
const FS_IOC_SETFLAGS: usize = 0x4008_6602;
const FS_APPEND_FL: libc::c_long = 0x20;
const STATX_BTIME: usize = 0x800;

type Check = (&'static str, fn(&Path) -> io::Result<()>);

const CHECKS: &[Check] = &[
    ("access ACL", access_acl),
    ("default ACL", default_acl),
    ("create through an ACL", create_through_acl),
    ("create through a supplementary group", create_through_group),
    ("O_TMPFILE", tmpfile),
    ("O_DIRECT", direct),
    ("user attribute", |at| attribute(at, "user.husk")),
    ("user attribute of a symbolic link", |at| refused(link_attribute(at, "user.husk"), libc::EPERM)),
    ("trusted attribute", |at| attribute(at, "trusted.husk")),
    ("trusted attribute of a symbolic link", |at| link_attribute(at, "trusted.husk")),
    ("security attribute", |at| attribute(at, "security.husk")),
    ("file capabilities", file_capabilities),
    ("overlayfs", overlay),
    ("lsattr", |at| flags(&make(at, "")?).map(drop)),
    ("chattr", chattr),
    ("birth time", birth_time),
    ("fallocate", |at| fallocate(at, 0, Some(3))),
    ("FALLOC_FL_KEEP_SIZE", |at| fallocate(at, libc::FALLOC_FL_KEEP_SIZE, Some(3))),
    ("FALLOC_FL_PUNCH_HOLE", |at| fallocate(at, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, None)),
    ("FALLOC_FL_ZERO_RANGE", |at| fallocate(at, libc::FALLOC_FL_ZERO_RANGE, None)),
    ("FALLOC_FL_COLLAPSE_RANGE", |at| fallocate(at, libc::FALLOC_FL_COLLAPSE_RANGE, None)),
    ("FALLOC_FL_INSERT_RANGE", |at| fallocate(at, libc::FALLOC_FL_INSERT_RANGE, None)),
    ("holes are found", holes),
    ("create with CAP_DAC_OVERRIDE", |at| as_user(at, CAP_DAC_OVERRIDE, "create")),
    ("mkdir with CAP_DAC_OVERRIDE", |at| as_user(at, CAP_DAC_OVERRIDE, "mkdir")),
    ("rename with CAP_DAC_OVERRIDE", |at| as_user(at, CAP_DAC_OVERRIDE, "rename")),
    ("mknod with CAP_MKNOD", |at| mode(at, 0o777).and_then(|()| as_user(at, CAP_MKNOD, "mknod"))),
    ("mknod", |at| mknod(&at.join("node"))),
    ("fifo", |at| node(&at.join("fifo"), libc::S_IFIFO, 0)),
    ("Unix socket", |at| UnixListener::bind(at.join("socket")).map(drop)),
    ("flock", flock),
    ("fcntl lock", |at| record_lock(at, libc::F_SETLK)),
    ("open file description lock", |at| record_lock(at, libc::F_OFD_SETLK)),
    ("lease", lease),
    ("inotify", inotify),
    ("RENAME_NOREPLACE", |at| refused(rename(at, libc::RENAME_NOREPLACE), libc::EEXIST)),
    ("RENAME_EXCHANGE", |at| rename(at, libc::RENAME_EXCHANGE)),
    ("RENAME_WHITEOUT", |at| rename(at, libc::RENAME_WHITEOUT)),
    ("copy_file_range", copy_range),
    ("file handle", file_handle),
    ("shared mapping", mapping),
    ("random operations", random::operations),
    ("append by two", append),
    ("set-user-ID is cleared by a write", clears_set_id),
    ("group of a set-group-ID folder", set_group_id),
    ("unlinked file", unlinked),
    ("hard link", hard_link),
    ("long names", long_names),
    ("time stamps", time_stamps),
    ("directory offsets", directory_offsets),
    ("file type in a directory", file_types),
    ("syncfs", syncfs),
    ("O_NOATIME", |at| OpenOptions::new().read(true).custom_flags(libc::O_NOATIME).open(make(at, "")?).map(drop)),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let arguments: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
    match arguments.as_slice() {
        ["as", capability, what, path] => match as_child(capability, what, Path::new(path)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => ExitCode::from(error.raw_os_error().unwrap_or(255) as u8),
        },
        [folder] => {
            for (number, (name, check)) in CHECKS.iter().enumerate() {
                let at = Path::new(folder).join(format!("check-{number}"));
                let outcome = fs::create_dir(&at).and_then(|()| check(&at));
                let outcome = outcome.map_or_else(|error| describe(&error), |()| "works".to_owned());
                // Without a stdout, nobody reads it.
                let _ = writeln!(io::stdout(), "{name}: {outcome}");
            }
            ExitCode::SUCCESS
        }
        _ => ExitCode::from(2),
    }
}

/// An error by its name in errno(3), if it is a usual one.
fn describe(error: &io::Error) -> String {
    let names = [
        (libc::EPERM, "EPERM"),
        (libc::EACCES, "EACCES"),
        (libc::EINVAL, "EINVAL"),
        (libc::ENOTTY, "ENOTTY"),
        (libc::EOPNOTSUPP, "EOPNOTSUPP"),
        (libc::ENODATA, "ENODATA"),
        (libc::EIO, "EIO"),
        (libc::ESTALE, "ESTALE"),
    ];
    let name = names.iter().find(|name| Some(name.0) == error.raw_os_error());
    name.map_or_else(|| error.to_string(), |name| name.1.to_owned())
}

fn c(text: impl AsRef<OsStr>) -> io::Result<CString> {
    Ok(CString::new(text.as_ref().as_bytes())?)
}

fn make(at: &Path, contents: &str) -> io::Result<PathBuf> {
    let path = at.join("file");
    fs::write(&path, contents)?;
    Ok(path)
}

fn mode(path: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(path, PermissionsExt::from_mode(mode))
}

/// Expects this error.
fn refused(result: io::Result<()>, errno: i32) -> io::Result<()> {
    match result {
        Ok(()) => expect(false, "was allowed"),
        Err(error) if error.raw_os_error() == Some(errno) => Ok(()),
        other => other,
    }
}

/// An ACL with an entry for [`USER`], as the kernel reads it (linux/posix_acl_xattr.h).
fn acl(user: u16, group: u16, other: u16) -> Vec<u8> {
    let nobody = u32::MAX;
    let entries = [(1, 6, nobody), (2, user, USER as u32), (4, group, nobody), (16, 7, nobody), (32, other, nobody)];
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(u16::to_le_bytes(tag));
        bytes.extend(u16::to_le_bytes(permissions));
        bytes.extend(u32::to_le_bytes(id));
    }
    bytes
}

fn set(path: &Path, name: &str, value: &[u8], call_number: libc::c_long) -> io::Result<()> {
    let (path, name) = (c(path)?, c(name)?);
    let arguments = [path.as_ptr() as usize, name.as_ptr() as usize, value.as_ptr() as usize, value.len(), 0, 0];
    call(call_number, arguments).map(drop)
}

fn get(path: &Path, name: &str) -> io::Result<Vec<u8>> {
    let (path, name, mut value) = (c(path)?, c(name)?, vec![0; 256]);
    let arguments = [path.as_ptr() as usize, name.as_ptr() as usize, value.as_mut_ptr() as usize, value.len(), 0, 0];
    value.truncate(call(libc::SYS_lgetxattr, arguments)?);
    Ok(value)
}

fn access_acl(at: &Path) -> io::Result<()> {
    let path = make(at, "text")?;
    mode(&path, 0o600)?;
    refused(as_child_of(at, NO_CAPABILITY, "read"), libc::EACCES)?;
    set(&path, "system.posix_acl_access", &acl(4, 0, 0), libc::SYS_setxattr)?;
    as_child_of(at, NO_CAPABILITY, "read")
}

fn default_acl(at: &Path) -> io::Result<()> {
    set(at, "system.posix_acl_default", &acl(6, 5, 0), libc::SYS_setxattr)?;
    let path = make(at, "")?;
    let (inherited, mode) = (get(&path, "system.posix_acl_access")?, path.metadata()?.mode() & 0o777);
    expect(inherited.len() == acl(0, 0, 0).len() && mode == 0o660, format!("mode {mode:o}"))
}

fn create_through_acl(at: &Path) -> io::Result<()> {
    mode(at, 0o700)?;
    refused(as_child_of(at, NO_CAPABILITY, "create"), libc::EACCES)?;
    set(at, "system.posix_acl_access", &acl(7, 0, 0), libc::SYS_setxattr)?;
    as_child_of(at, NO_CAPABILITY, "create")
}

fn create_through_group(at: &Path) -> io::Result<()> {
    std::os::unix::fs::chown(at, None, Some(GROUPS[2]))?;
    mode(at, 0o770)?;
    as_child_of(at, NO_CAPABILITY, "create")
}

fn tmpfile(at: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).open(at)?;
    let (from, to) = (c(format!("/proc/self/fd/{}", file.as_raw_fd()))?, c(at.join("linked"))?);
    let here = libc::AT_FDCWD as usize;
    let follow = libc::AT_SYMLINK_FOLLOW as usize;
    call(libc::SYS_linkat, [here, from.as_ptr() as usize, here, to.as_ptr() as usize, follow, 0]).map(drop)
}

fn direct(at: &Path) -> io::Result<()> {
    let path = make(at, &"x".repeat(BLOCK))?;
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?;
    let mut buffer = vec![0; 2 * BLOCK];
    let start = buffer.as_ptr().align_offset(BLOCK);
    let read = file.read_at(&mut buffer[start..start + BLOCK], 0)?;
    expect(read == BLOCK, format!("read {read} bytes"))
}

fn attribute(at: &Path, name: &str) -> io::Result<()> {
    let path = make(at, "")?;
    set(&path, name, b"value", libc::SYS_lsetxattr)?;
    expect(get(&path, name)? == b"value", "another value")?;
    let (path, wanted, mut list) = (c(&path)?, c(name)?, vec![0u8; 1024]);
    let length = call(libc::SYS_llistxattr, [path.as_ptr() as usize, list.as_mut_ptr() as usize, list.len(), 0, 0, 0])?;
    let listed = list[..length].split(|byte| *byte == 0).any(|listed| listed == wanted.as_bytes());
    expect(listed, "not listed")?;
    call(libc::SYS_lremovexattr, [path.as_ptr() as usize, wanted.as_ptr() as usize, 0, 0, 0, 0]).map(drop)
}

fn link_attribute(at: &Path, name: &str) -> io::Result<()> {
    let link = at.join("link");
    symlink("nowhere", &link)?;
    set(&link, name, b"value", libc::SYS_lsetxattr)
}

fn file_capabilities(at: &Path) -> io::Result<()> {
    let path = make(at, "")?;
    // Revision 2, effective, CAP_NET_RAW (linux/capability.h).
    let words: [u32; 5] = [0x0200_0001, 1 << 13, 0, 0, 0];
    let value: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    set(&path, "security.capability", &value, libc::SYS_setxattr)?;
    OpenOptions::new().append(true).open(&path)?.write_all(b"x")?;
    let left = get(&path, "security.capability");
    expect(left.is_err_and(|error| error.raw_os_error() == Some(libc::ENODATA)), "not cleared by a write")
}

fn overlay(at: &Path) -> io::Result<()> {
    for folder in ["lower/opaque", "lower/moved", "upper", "work", "merged"] {
        fs::create_dir_all(at.join(folder))?;
    }
    for file in ["lower/opaque/old", "lower/moved/file", "lower/removed", "lower/changed"] {
        fs::write(at.join(file), "lower")?;
    }
    let path = |name: &str| at.join(name).display().to_string();
    let options = c(format!("lowerdir={},upperdir={},workdir={}", path("lower"), path("upper"), path("work")))?;
    let (kind, merged) = (c("overlay")?, at.join("merged"));
    let target = c(&merged)?;
    let (kind, options) = (kind.as_ptr() as usize, options.as_ptr() as usize);
    call(libc::SYS_mount, [kind, target.as_ptr() as usize, kind, 0, options, 0])?;
    let used = (|| {
        fs::write(merged.join("changed"), "upper")?;
        fs::remove_file(merged.join("removed"))?;
        fs::remove_dir_all(merged.join("opaque"))?;
        fs::create_dir(merged.join("opaque"))?;
        expect(fs::read_dir(merged.join("opaque"))?.count() == 0, "the lower folder shows through")?;
        expect(!merged.join("removed").exists(), "a removed file is back")?;
        expect(fs::read(at.join("lower/changed"))? == b"lower", "the lower file has changed")
    })();
    call(libc::SYS_umount2, [target.as_ptr() as usize, 0, 0, 0, 0, 0])?;
    used
}

fn flags(path: &Path) -> io::Result<(File, libc::c_long)> {
    let file = File::open(path)?;
    let mut flags: libc::c_long = 0;
    call(libc::SYS_ioctl, [number(&file), FS_IOC_GETFLAGS, &raw mut flags as usize, 0, 0, 0])?;
    Ok((file, flags))
}

fn chattr(at: &Path) -> io::Result<()> {
    let (file, flags) = flags(&make(at, "")?)?;
    let change = |flags: libc::c_long| {
        call(libc::SYS_ioctl, [number(&file), FS_IOC_SETFLAGS, &raw const flags as usize, 0, 0, 0]).map(drop)
    };
    change(flags | FS_APPEND_FL)?;
    change(flags)
}

fn birth_time(at: &Path) -> io::Result<()> {
    let path = c(make(at, "")?)?;
    // struct statx (linux/stat.h): the mask of what is known comes first.
    let mut known = [0u32; 64];
    let (here, path) = (libc::AT_FDCWD as usize, path.as_ptr() as usize);
    call(libc::SYS_statx, [here, path, 0, STATX_BTIME, known.as_mut_ptr() as usize, 0])?;
    expect(known[0] as usize & STATX_BTIME != 0, "not known")
}

/// Applies a mode of fallocate(2) to the second of three blocks, or, if `allocate` is given, to that block behind the
/// end, and compares what is in the file then.
fn fallocate(at: &Path, mode: i32, allocate: Option<usize>) -> io::Result<()> {
    let blocks: Vec<u8> = [b'a', b'b', b'c'].iter().flat_map(|letter| vec![*letter; BLOCK]).collect();
    let path = at.join("file");
    fs::write(&path, &blocks)?;
    let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
    // What was read is cached.
    file.read_to_end(&mut Vec::new())?;
    let block = allocate.unwrap_or(1);
    call(libc::SYS_fallocate, [number(&file), mode as usize, block * BLOCK, BLOCK, 0, 0])?;
    let expected = match mode {
        0 => [&blocks[..], &[0; BLOCK]].concat(),
        libc::FALLOC_FL_KEEP_SIZE => blocks.clone(),
        libc::FALLOC_FL_COLLAPSE_RANGE => [&blocks[..BLOCK], &blocks[2 * BLOCK..]].concat(),
        libc::FALLOC_FL_INSERT_RANGE => [&blocks[..BLOCK], &[0; BLOCK], &blocks[BLOCK..]].concat(),
        _ => [&blocks[..BLOCK], &[0; BLOCK], &blocks[2 * BLOCK..]].concat(),
    };
    file.seek(SeekFrom::Start(0))?;
    let mut found = Vec::new();
    file.read_to_end(&mut found)?;
    expect(found == expected, "other contents")?;
    expect(file.metadata()?.len() == expected.len() as u64, "another size")?;
    // Data that is written later goes to the same place.
    file.write_at(b"later", 10)?;
    expect(fs::read(&path)?[10..15] == *b"later", "a later write is lost")
}

fn holes(at: &Path) -> io::Result<()> {
    let file = File::create(at.join("file"))?;
    file.write_at(b"end", 16 * BLOCK as u64)?;
    let data = call(libc::SYS_lseek, [number(&file), 0, libc::SEEK_DATA as usize, 0, 0, 0])?;
    expect(data == 16 * BLOCK, format!("data at {data}"))
}

/// Does one thing in `at` as a user with one capability, which may be one that does nothing.
fn as_child_of(at: &Path, capability: &str, what: &str) -> io::Result<()> {
    let status = Command::new(std::env::current_exe()?).args(["as", capability, what]).arg(at).status()?;
    match status.code() {
        Some(0) => Ok(()),
        code => Err(io::Error::from_raw_os_error(code.unwrap_or(255))),
    }
}

fn as_user(at: &Path, capability: &str, what: &str) -> io::Result<()> {
    make(at, "")?;
    as_child_of(at, capability, what)
}

fn as_child(capability: &str, what: &str, at: &Path) -> io::Result<()> {
    let capability: u32 = capability.parse().map_err(io::Error::other)?;
    call(libc::SYS_prctl, [libc::PR_SET_KEEPCAPS as usize, 1, 0, 0, 0, 0])?;
    call(libc::SYS_setgroups, [GROUPS.len(), GROUPS.as_ptr() as usize, 0, 0, 0, 0])?;
    call(libc::SYS_setresgid, [USER, USER, USER, 0, 0, 0])?;
    call(libc::SYS_setresuid, [USER, USER, USER, 0, 0, 0])?;
    // Version 3 (linux/capability.h): effective, permitted and inheritable, the low words first.
    let header: [u32; 2] = [0x2008_0522, 0];
    let bits = if capability < 32 { 1 << capability } else { 0 };
    let data: [u32; 6] = [bits, bits, 0, 0, 0, 0];
    call(libc::SYS_capset, [header.as_ptr() as usize, data.as_ptr() as usize, 0, 0, 0, 0])?;
    match what {
        "read" => fs::read(at.join("file")).map(drop),
        "write" => OpenOptions::new().write(true).open(at.join("file"))?.write_all(b"new"),
        "create" => File::create_new(at.join("new")).map(drop),
        "mkdir" => fs::create_dir(at.join("new")),
        "rename" => fs::rename(at.join("file"), at.join("new")),
        "mknod" => mknod(&at.join("node")),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn node(path: &Path, kind: libc::mode_t, device: usize) -> io::Result<()> {
    let path = c(path)?;
    let mode = (kind | 0o644) as usize;
    call(libc::SYS_mknodat, [libc::AT_FDCWD as usize, path.as_ptr() as usize, mode, device, 0, 0]).map(drop)
}

/// Makes /dev/null.
fn mknod(path: &Path) -> io::Result<()> {
    node(path, libc::S_IFCHR, 1 << 8 | 3)?;
    expect(path.metadata()?.rdev() == (1 << 8 | 3), "another device")
}

/// Two open file descriptions of one file.
fn two(at: &Path) -> io::Result<(File, File)> {
    let path = make(at, "text")?;
    let open = || OpenOptions::new().read(true).write(true).open(&path);
    Ok((open()?, open()?))
}

fn flock(at: &Path) -> io::Result<()> {
    let (first, second) = two(at)?;
    let lock = |file: &File| {
        call(libc::SYS_flock, [number(file), (libc::LOCK_EX | libc::LOCK_NB) as usize, 0, 0, 0, 0]).map(drop)
    };
    lock(&first)?;
    refused(lock(&second), libc::EWOULDBLOCK)
}

fn record_lock(at: &Path, command: i32) -> io::Result<()> {
    let (first, second) = two(at)?;
    let lock = libc::flock { l_type: libc::F_WRLCK as _, l_whence: 0, l_start: 0, l_len: 1, l_pid: 0 };
    let set = |file: &File| {
        call(libc::SYS_fcntl, [number(file), command as usize, &raw const lock as usize, 0, 0, 0]).map(drop)
    };
    set(&first)?;
    // A process does not exclude itself, unless the lock belongs to the open file description.
    if command == libc::F_OFD_SETLK { refused(set(&second), libc::EAGAIN) } else { set(&second) }
}

fn lease(at: &Path) -> io::Result<()> {
    let file = File::open(make(at, "")?)?;
    call(libc::SYS_fcntl, [number(&file), libc::F_SETLEASE as usize, libc::F_RDLCK as usize, 0, 0, 0]).map(drop)
}

fn inotify(at: &Path) -> io::Result<()> {
    let fd = call(libc::SYS_inotify_init1, [libc::IN_NONBLOCK as usize, 0, 0, 0, 0, 0])?;
    // SAFETY: the descriptor is new and owned by nobody else.
    let mut events = unsafe { File::from_raw_fd(fd as RawFd) };
    let path = c(at)?;
    call(libc::SYS_inotify_add_watch, [fd, path.as_ptr() as usize, libc::IN_CREATE as usize, 0, 0, 0])?;
    make(at, "")?;
    expect(events.read(&mut [0; 512])? > 0, "no event")
}

fn rename(at: &Path, flags: libc::c_uint) -> io::Result<()> {
    let (from, to) = (at.join("from"), at.join("to"));
    fs::write(&from, "from")?;
    fs::write(&to, "to")?;
    let (old, new, here) = (c(&from)?, c(&to)?, libc::AT_FDCWD as usize);
    call(libc::SYS_renameat2, [here, old.as_ptr() as usize, here, new.as_ptr() as usize, flags as usize, 0])?;
    expect(fs::read(&to)? == b"from", "the target has not been replaced")?;
    match flags {
        libc::RENAME_EXCHANGE => expect(fs::read(&from)? == b"to", "not exchanged"),
        _ => expect(from.symlink_metadata()?.rdev() == 0, "no whiteout"),
    }
}

fn copy_range(at: &Path) -> io::Result<()> {
    let from = File::open(make(at, "some text")?)?;
    let to = File::create(at.join("copy"))?;
    let copied = call(libc::SYS_copy_file_range, [number(&from), 0, number(&to), 0, 9, 0])?;
    expect(copied == 9 && fs::read(at.join("copy"))? == b"some text", "other contents")
}

fn file_handle(at: &Path) -> io::Result<()> {
    let path = c(make(at, "")?)?;
    let (mut handle, mut mount) = ([128u32; 40], 0i32);
    let (here, path, into) = (libc::AT_FDCWD as usize, path.as_ptr() as usize, handle.as_mut_ptr() as usize);
    call(libc::SYS_name_to_handle_at, [here, path, into, &raw mut mount as usize, 0, 0])?;
    let folder = File::open(at)?;
    let opened = call(libc::SYS_open_by_handle_at, [number(&folder), handle.as_ptr() as usize, 0, 0, 0, 0])?;
    // SAFETY: the descriptor is new and owned by nobody else.
    drop(unsafe { File::from_raw_fd(opened as RawFd) });
    Ok(())
}

fn mapping(at: &Path) -> io::Result<()> {
    let path = make(at, &"x".repeat(BLOCK))?;
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let start = call(libc::SYS_mmap, [0, BLOCK, protection, libc::MAP_SHARED as usize, number(&file), 0])?;
    // SAFETY: the mapping is a block long and nothing else refers to it.
    unsafe { std::ptr::copy_nonoverlapping(b"mapped".as_ptr(), start as *mut u8, 6) };
    expect(fs::read(&path)?[..6] == *b"mapped", "a read does not see the mapping")?;
    file.write_at(b"written", 100)?;
    // SAFETY: the mapping is still there.
    let seen = unsafe { std::slice::from_raw_parts(start as *const u8, BLOCK) }[100..107].to_vec();
    call(libc::SYS_munmap, [start, BLOCK, 0, 0, 0, 0])?;
    expect(seen == *b"written", "the mapping does not see a write")
}

fn append(at: &Path) -> io::Result<()> {
    let path = make(at, "")?;
    let open = || OpenOptions::new().append(true).open(&path);
    let (mut first, mut second) = (open()?, open()?);
    for file in [&mut first, &mut second] {
        file.write_all(b"line\n")?;
    }
    expect(fs::read(&path)? == b"line\nline\n", "one overwrites the other")
}

fn clears_set_id(at: &Path) -> io::Result<()> {
    let path = make(at, "old")?;
    mode(&path, 0o4777)?;
    as_child_of(at, NO_CAPABILITY, "write")?;
    let mode = path.metadata()?.mode() & 0o7777;
    expect(mode == 0o777, format!("mode {mode:o}"))
}

fn set_group_id(at: &Path) -> io::Result<()> {
    std::os::unix::fs::chown(at, None, Some(7))?;
    mode(at, 0o2777)?;
    as_child_of(at, NO_CAPABILITY, "mkdir")?;
    let made = at.join("new").metadata()?;
    expect(made.gid() == 7 && made.mode() & 0o2000 != 0, format!("group {}, mode {:o}", made.gid(), made.mode()))
}

fn unlinked(at: &Path) -> io::Result<()> {
    let path = make(at, "text")?;
    let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
    fs::remove_file(&path)?;
    fs::write(&path, "another")?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    file.write_all(b"more")?;
    expect(text == "text" && file.metadata()?.nlink() == 0, format!("{text:?}"))
}

fn hard_link(at: &Path) -> io::Result<()> {
    let path = make(at, "text")?;
    let link = at.join("link");
    fs::hard_link(&path, &link)?;
    let (one, other) = (path.metadata()?, link.metadata()?);
    expect(one.ino() == other.ino() && one.nlink() == 2, format!("{} links", one.nlink()))
}

fn long_names(at: &Path) -> io::Result<()> {
    let name = "n".repeat(255);
    fs::write(at.join(&name), "")?;
    symlink("t".repeat(4095), at.join("link"))?;
    expect(fs::read_link(at.join("link"))?.as_os_str().len() == 4095, "the link is cut off")?;
    refused(fs::write(at.join(name + "n"), ""), libc::ENAMETOOLONG)
}

fn time_stamps(at: &Path) -> io::Result<()> {
    let path = make(at, "")?;
    let times = [libc::timespec { tv_sec: 1_000_000_000, tv_nsec: 123_456_789 }; 2];
    let name = c(&path)?;
    let arguments = [libc::AT_FDCWD as usize, name.as_ptr() as usize, times.as_ptr() as usize, 0, 0, 0];
    call(libc::SYS_utimensat, arguments)?;
    let set = path.metadata()?;
    expect((set.mtime(), set.mtime_nsec()) == (1_000_000_000, 123_456_789), format!("{} ns", set.mtime_nsec()))
}

fn directory_offsets(at: &Path) -> io::Result<()> {
    for n in 0..500 {
        fs::write(at.join(n.to_string()), "")?;
    }
    // Removes while it lists.
    let mut seen = 0;
    for entry in fs::read_dir(at)? {
        fs::remove_file(entry?.path())?;
        seen += 1;
    }
    expect(seen == 500 && fs::remove_dir(at).is_ok(), format!("{seen} of 500 entries"))
}

fn file_types(at: &Path) -> io::Result<()> {
    make(at, "")?;
    symlink("file", at.join("link"))?;
    fs::create_dir(at.join("folder"))?;
    let kinds = fs::read_dir(at)?.map(|entry| entry?.file_type()).collect::<io::Result<Vec<_>>>()?;
    let count = |is: fn(&fs::FileType) -> bool| kinds.iter().filter(|kind| is(kind)).count();
    expect([count(|k| k.is_file()), count(|k| k.is_dir()), count(|k| k.is_symlink())] == [1, 1, 1], "other types")
}

fn syncfs(at: &Path) -> io::Result<()> {
    let file = File::create(at.join("file"))?;
    call(libc::SYS_syncfs, [number(&file), 0, 0, 0, 0, 0]).map(drop)
}
