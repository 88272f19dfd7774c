//! A holder: the process that represents a container on the host. It waits in a network namespace until it is killed.
//!
//! containerd, hooks and operators know a container by the PID of a process on the host. The container's own processes
//! exist only in the guest, so each container has a holder there. Its program is an ELF file of some 160 bytes: an idle
//! copy of the shim would cost megabytes. The file is in a sealed memfd, so nothing has to be installed.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;

use super::child::{self, Child, LaunchError};

/// The process's name in `ps` and `top`, at most 15 bytes (PR_SET_NAME), and the memfd's name.
const NAME: &CStr = c"husk-holder";
/// Where the program is loaded: the traditional address of static programs.
const BASE: u64 = 0x40_0000;
/// Lengths of the ELF header and of a program header (elf(5)).
const EHDR: usize = 64;
const PHDR: usize = 56;
/// The program starts after the headers.
const START: u64 = BASE + (EHDR + PHDR) as u64;

/// `prctl(PR_SET_NAME, NAME); for (;;) pause();`
#[cfg(target_arch = "x86_64")]
mod arch {
    /// EM_X86_64.
    pub(super) const MACHINE: u16 = 62;
    /// The name's address follows the first part of the code.
    pub(super) const CODE: (&[u8], &[u8]) = (
        &[
            0xb8, 157, 0, 0, 0, // mov eax, 157 (prctl)
            0xbf, 15, 0, 0, 0,    // mov edi, 15 (PR_SET_NAME)
            0xbe, // mov esi, …
        ],
        &[
            0x0f, 0x05, // syscall
            0xb8, 34, 0, 0, 0, // again: mov eax, 34 (pause)
            0x0f, 0x05, // syscall
            0xeb, 0xf7, // jmp again
        ],
    );
}

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the holder's program exists for x86_64 only: add a module `arch` with its ELF machine and code");

/// The program, ready to be executed.
static PROGRAM: LazyLock<io::Result<File>> = LazyLock::new(|| seal(&program()));

/// The ELF file.
fn program() -> Vec<u8> {
    let (before, after) = arch::CODE;
    let name = START + (before.len() + size_of::<u32>() + after.len()) as u64;
    let length = name - BASE + NAME.count_bytes() as u64 + 1;
    let mut file = Vec::new();
    // 64 bits, little endian, version 1.
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // ET_EXEC, the machine, version 1.
    file.extend([2u16.to_le_bytes(), arch::MACHINE.to_le_bytes()].concat());
    file.extend(1u32.to_le_bytes());
    // Entry point, program headers, no section headers, no flags.
    file.extend([START, EHDR as u64, 0].map(u64::to_le_bytes).concat());
    file.extend(0u32.to_le_bytes());
    file.extend([EHDR as u16, PHDR as u16, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
    // PT_LOAD of the whole file, PF_R | PF_X.
    file.extend([1u32, 5].map(u32::to_le_bytes).concat());
    file.extend([0, BASE, BASE, length, length, 0x1000].map(u64::to_le_bytes).concat());
    file.extend(before);
    file.extend((name as u32).to_le_bytes());
    file.extend(after);
    file.extend(NAME.to_bytes_with_nul());
    file
}

/// Writes a program to a memfd that can no longer be changed.
fn seal(program: &[u8]) -> io::Result<File> {
    let mut file = memfd()?;
    file.write_all(program)?;
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    // SAFETY: the descriptor is open, and the argument is a number.
    Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
    Ok(file)
}

fn memfd() -> io::Result<File> {
    // MFD_EXEC since Linux 6.3: vm.memfd_noexec may make others not executable. Older kernels do not know it.
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is zero-terminated and outlives the call.
    let create = |flags| Errno::result(unsafe { libc::memfd_create(NAME.as_ptr(), flags) });
    let fd = create(flags | libc::MFD_EXEC).or_else(|error| match error {
        Errno::EINVAL => create(flags),
        other => Err(other),
    })?;
    // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// Starts a holder in a network namespace, or in the shim's own. `container` is shown by `ps`.
///
/// The holder has no capabilities, no open files and a session of its own, and dies with the shim. Its user is the
/// shim's, root, so that no unprivileged process of the host can kill or trace it: another VM's machine, for example.
///
/// # Errors
/// When it cannot be started; no process is left.
pub(crate) fn start(container: &str, netns: Option<File>) -> Result<Child, LaunchError> {
    let program = PROGRAM.as_ref().map_err(|error| child::failed("create its program")(child::clone_error(error)))?;
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command.arg0(format!("{}: {container}", NAME.to_string_lossy())).env_clear().current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let parent = std::process::id();
    let namespace = netns.as_ref().map(AsRawFd::as_raw_fd);
    // SAFETY: `isolate` makes only async-signal-safe calls and touches no memory that was not allocated before the
    // fork. `netns` stays open until `spawn` returns.
    unsafe { command.pre_exec(move || isolate(namespace, parent)) };
    child::spawn(command, false, false)
}

/// Starts a holder in a new user namespace, for the caller to give it a mapping. It dies with the calling thread.
///
/// # Errors
/// When it cannot be started; no process is left.
pub(super) fn start_in_user_namespace() -> io::Result<std::process::Child> {
    let program = PROGRAM.as_ref().map_err(child::clone_error)?;
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command.arg0(NAME.to_string_lossy().as_ref()).env_clear().current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let parent = std::process::id();
    // SAFETY: unshare(2) and `isolate` are async-signal-safe and touch no memory that was not allocated before the fork.
    unsafe {
        command.pre_exec(move || {
            unshare(CloneFlags::CLONE_NEWUSER)?;
            isolate(None, parent)
        })
    };
    command.spawn()
}

/// In the child: takes away everything that a holder does not need.
fn isolate(netns: Option<RawFd>, parent: u32) -> io::Result<()> {
    if let Some(netns) = netns {
        // SAFETY: the caller keeps the descriptor open.
        setns(unsafe { std::os::fd::BorrowedFd::borrow_raw(netns) }, CloneFlags::CLONE_NEWNET)?;
    }
    nix::unistd::setsid()?;
    for signal in 1..=libc::SIGRTMAX() {
        // Fails for SIGKILL, SIGSTOP and those of the C library.
        // SAFETY: SIG_DFL is a valid disposition, and no code runs in this process any more that relies on another.
        let _ = unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    prctl::set_no_new_privs()?;
    // With no_new_privs, root does not get them back at exec (cap_bprm_creds_from_file in security/commoncap.c).
    drop_capabilities()?;
    child::die_with(parent)?;
    child::close_at_exec()
}

fn drop_capabilities() -> io::Result<()> {
    /// `struct __user_cap_header_struct` of linux/capability.h. PID 0 is the caller.
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    // _LINUX_CAPABILITY_VERSION_3.
    let header = Header { version: 0x2008_0522, pid: 0 };
    // Two `struct __user_cap_data_struct`: effective, permitted and inheritable.
    let none = [[0u32; 3]; 2];
    // SAFETY: both structures have the layout that version 3 requires, and outlive the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn inode_of_network(pid: u32) -> String {
        fs::read_link(format!("/proc/{pid}/ns/net")).unwrap().to_string_lossy().into_owned()
    }

    fn status(pid: u32, field: &str) -> String {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
        line.trim().to_owned()
    }

    #[tokio::test]
    async fn a_holder_waits_in_its_namespace_without_privileges_or_files_until_it_is_killed() {
        let namespace = crate::network::create(std::time::Duration::from_secs(5)).unwrap();
        let holder = start("default/c1", Some(File::open(&namespace.claim().netns).unwrap())).unwrap();
        let pid = holder.process().pid;
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        assert_eq!(command, "husk-holder: default/c1\0");
        let own = inode_of_network(std::process::id());
        assert_ne!(inode_of_network(pid), own);
        assert_eq!(inode_of_network(pid), format!("net:[{}]", namespace.claim().inode));
        // It sets its name first: wait for the state in which it pauses.
        while !status(pid, "State").starts_with('S') {
            tokio::task::yield_now().await;
        }
        assert_eq!(status(pid, "Name"), "husk-holder");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(status(pid, set), "0000000000000000", "{set}");
        }
        assert_eq!(status(pid, "NoNewPrivs"), "1");
        // Signals 1 to 31: the C library does not reset its own.
        assert_eq!(u64::from_str_radix(&status(pid, "SigIgn"), 16).unwrap() & 0x7fff_ffff, 0);
        let open: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|fd| fd.unwrap().path()).collect();
        assert!(open.len() == 3 && open.iter().all(|fd| fs::read_link(fd).unwrap().ends_with("dev/null")), "{open:?}");
        let stat = procfs::process::Process::new(pid.cast_signed()).unwrap().stat().unwrap();
        assert_eq!(stat.session, pid.cast_signed());
        holder.kill();
        assert_eq!(holder.exited().await.to_string(), "was killed by signal 9");
    }

    #[tokio::test]
    async fn a_holder_without_a_namespace_has_the_shims() {
        let holder = start("default/c1", None).unwrap();
        assert_eq!(inode_of_network(holder.process().pid), inode_of_network(std::process::id()));
        holder.kill();
        holder.exited().await;
    }

    #[tokio::test]
    async fn a_holder_is_small() {
        let holder = start("default/c1", None).unwrap();
        let pid = holder.process().pid;
        while !status(pid, "State").starts_with('S') {
            tokio::task::yield_now().await;
        }
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let rss = rollup.lines().find(|line| line.starts_with("Rss:")).unwrap();
        let kib: u64 = rss.split_whitespace().nth(1).unwrap().parse().unwrap();
        // With some 60 KiB in the kernel (its stack, page tables and task), a holder is far below the 300 KiB that each container may take.
        assert!(kib <= 64, "{rollup}");
        holder.kill();
        holder.exited().await;
    }
}
