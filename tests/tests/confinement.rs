//! What a QEMU or a virtiofsd that a guest has taken over could reach: nothing of the host, and nothing of other VMs.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use husk_tests::containerd::{Container, Containerd};
use husk_tests::process::{self, Process};

/// The default of `vm_ids`.
const IDS: std::ops::Range<u32> = 0x7f00_0000..0x7f01_0000;
const NAMESPACES: [&str; 5] = ["mnt", "pid", "net", "ipc", "uts"];
/// CAP_CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD and SETFCAP: what the owner of every file needs.
const OF_VIRTIOFSD: &str = "00000000880000db";
const NONE: &str = "0000000000000000";

/// Tries to get at the memory, the files and the root of the process that its argument names, with an address in its
/// memory, and prints each attempt with its error or 0.
const ATTACK: &str = "
import ctypes, os, sys
pid, address = int(sys.argv[1]), int(sys.argv[2], 16)
libc = ctypes.CDLL(None, use_errno=True)
class Vector(ctypes.Structure):
    _fields_ = [('base', ctypes.c_void_p), ('length', ctypes.c_size_t)]
def read():
    memory = os.open(f'/proc/{pid}/mem', os.O_RDONLY)
    os.pread(memory, 16, address)
def call(function, *arguments):
    function.restype = ctypes.c_long
    if function(*arguments) < 0: raise OSError(ctypes.get_errno(), '')
def copy():
    own = ctypes.create_string_buffer(16)
    here, there = Vector(ctypes.addressof(own), 16), Vector(address, 16)
    call(libc.process_vm_readv, pid, ctypes.byref(here), ctypes.c_ulong(1), ctypes.byref(there), ctypes.c_ulong(1),
         ctypes.c_ulong(0))
def attempt(name, action):
    try: action(); print(name, 0)
    except OSError as error: print(name, error.errno)
attempt('mem', read)
attempt('process_vm_readv', copy)
attempt('root', lambda: os.listdir(f'/proc/{pid}/root'))
attempt('fd', lambda: os.listdir(f'/proc/{pid}/fd'))
# PTRACE_SEIZE, which does not stop the process. Ends with this one.
attempt('ptrace', lambda: call(libc.ptrace, ctypes.c_long(0x4206), ctypes.c_long(pid), None, None))
";
const EPERM: i32 = 1;
const EACCES: i32 = 13;

/// A VM's processes.
struct Vm {
    shim: Process,
    qemu: Process,
    /// The process of virtiofsd that serves the guest.
    virtiofsd: Process,
}

impl Vm {
    fn of(containerd: &Containerd, container: &Container<'_>) -> Result<Self> {
        let (shim, _) = containerd.shim_of(container.id())?;
        let server = containerd.shim_child(container.id(), "virtiofsd")?;
        let worker = process::descendants(server.pid).into_iter().next().context("virtiofsd has no child")?;
        Ok(Self { shim, qemu: containerd.qemu_of(container.id())?, virtiofsd: worker })
    }
}

fn namespace(process: &Process, name: &str) -> Result<PathBuf> {
    Ok(fs::read_link(format!("/proc/{}/ns/{name}", process.pid))?)
}

/// A hard limit in `/proc/<pid>/limits` (proc_pid_limits(5)); `None` for one that is unlimited.
fn hard_limit(process: &Process, name: &str) -> Result<Option<u64>> {
    let limits = fs::read_to_string(format!("/proc/{}/limits", process.pid))?;
    let line = limits.lines().find_map(|line| line.strip_prefix(name)).context(limits.clone())?;
    Ok(line.split_whitespace().nth(1).context("no hard limit")?.parse().ok())
}

/// The names in a folder of the root that a process has.
fn names(process: &Process, folder: &str) -> Result<Vec<String>> {
    let folder = fs::read_dir(format!("/proc/{}/root/{folder}", process.pid))?;
    folder.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// The mounts that a process sees: fields 5 and 6 of proc_pid_mountinfo(5).
fn mounts(process: &Process) -> Result<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{}/mountinfo", process.pid))?;
    Ok(text.lines().map(|line| line.split(' ').skip(4).take(2).collect::<Vec<_>>().join(" ")).collect())
}

/// The outcomes of an attack on a process, by a process with these IDs, or by root.
fn attack(id: Option<u32>, target: &Process) -> Result<Vec<(String, i32)>> {
    let maps = fs::read_to_string(format!("/proc/{}/maps", target.pid))?;
    let readable = maps.lines().find(|line| line.contains(" r")).context("no readable memory")?;
    let address = readable.split('-').next().unwrap_or_default();
    let (pid, id) = (target.pid.to_string(), id.map(|id| id.to_string()));
    let mut command = std::process::Command::new(if id.is_some() { "setpriv" } else { "env" });
    if let Some(id) = &id {
        command.args(["--reuid", id, "--regid", id, "--clear-groups"]);
    }
    // Not one that only root can reach.
    let output = command.args(["/usr/bin/python3", "-c", ATTACK, &pid, address]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let outcome = |line: &str| Some((line.split(' ').next()?.to_owned(), line.split(' ').nth(1)?.parse().ok()?));
    text.lines().map(|line| outcome(line).with_context(|| line.to_owned())).collect()
}

fn expect_confined_qemu(vm: &Vm) -> Result<u32> {
    let qemu = &vm.qemu;
    let id: u32 = qemu.status("Uid")?.split(' ').next().unwrap_or_default().parse()?;
    ensure!(IDS.contains(&id), "{id}");
    let all = format!("{id} {id} {id} {id}");
    let expected = [
        ("Uid", all.as_str()),
        ("Gid", &all),
        ("Groups", ""),
        ("CapInh", NONE),
        ("CapPrm", NONE),
        ("CapEff", NONE),
        ("CapAmb", NONE),
        ("NoNewPrivs", "1"),
        // Filters: husk's and QEMU's own.
        ("Seccomp", "2"),
        ("Seccomp_filters", "2"),
    ];
    for (name, value) in expected {
        ensure!(qemu.status(name)? == value, "{name}: {}", qemu.status(name)?);
    }
    for (name, most) in [("Max processes", 1024), ("Max open files", 4096), ("Max core file size", 0)] {
        let hard = hard_limit(qemu, name)?;
        ensure!(hard.is_some_and(|hard| hard <= most), "{name}: {hard:?}");
    }
    ensure!(qemu.status("NSpid")?.ends_with(" 1"), "{}", qemu.status("NSpid")?);
    ensure!(mounts(qemu)? == ["/ ro,nosuid,nodev,noexec,relatime"], "{:?}", mounts(qemu)?);
    ensure!(fs::read_link(format!("/proc/{}/cwd", qemu.pid))?.as_os_str() == "/");
    // A process that can be dumped has its own user there.
    let memory = fs::metadata(format!("/proc/{}/mem", qemu.pid))?;
    ensure!((memory.uid(), memory.gid()) == (0, 0), "{memory:?}");
    Ok(id)
}

fn expect_confined_virtiofsd(vm: &Vm) -> Result<()> {
    let virtiofsd = &vm.virtiofsd;
    for (name, value) in [("CapEff", OF_VIRTIOFSD), ("CapPrm", OF_VIRTIOFSD), ("NoNewPrivs", "1"), ("Seccomp", "2")] {
        ensure!(virtiofsd.status(name)? == value, "{name}: {}", virtiofsd.status(name)?);
    }
    ensure!(
        hard_limit(virtiofsd, "Max core file size")? == Some(0) && hard_limit(virtiofsd, "Max open files")?.is_some()
    );
    // The share's entries have numbers.
    let root = names(virtiofsd, "")?;
    ensure!(!root.is_empty() && root.iter().all(|name| name.parse::<u64>().is_ok()), "{root:?}");
    let mounts = mounts(virtiofsd)?;
    ensure!(mounts.iter().all(|mount| mount.contains("nosuid,nodev")), "devices can be opened: {mounts:?}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_vms_processes_reach_neither_the_host_nor_another_vm() -> Result<()> {
    let containerd = Containerd::shared()?;
    let alone = containerd.detached(&[], "alone", &["sleep", "600"])?;
    let user = ["--annotation", "io.husk.network=user"];
    let connected = containerd.detached(&user, "connected", &["sleep", "600"])?;
    let (first, second) = (Vm::of(containerd, &alone)?, Vm::of(containerd, &connected)?);
    let ids = [expect_confined_qemu(&first)?, expect_confined_qemu(&second)?];
    ensure!(ids[0] != ids[1], "{ids:?}");
    for vm in [&first, &second] {
        expect_confined_virtiofsd(vm)?;
    }
    for name in NAMESPACES {
        let host = namespace(&first.shim, name)?;
        let of = [&first.qemu, &second.qemu, &first.virtiofsd, &second.virtiofsd].map(|one| namespace(one, name));
        let [one, other, server, other_server] = of;
        ensure!(one? != host && server? != host && other_server? != host, "{name}");
        // User mode connects the guest as a process of the host.
        ensure!((other? == host) == (name == "net"), "{name}");
    }
    ensure!(names(&first.qemu, "")?.is_empty(), "{:?}", names(&first.qemu, "")?);
    // QEMU looks for the host's resolver.
    ensure!(names(&second.qemu, "")? == ["etc"] && names(&second.qemu, "etc")? == ["resolv.conf"]);

    let targets = [&first.qemu, &second.qemu, &first.virtiofsd, &second.virtiofsd];
    for target in targets {
        // The attack works: root can do all of it.
        let by_root = attack(None, target)?;
        ensure!(by_root.len() == 5 && by_root.iter().all(|(_, error)| *error == 0), "{by_root:?}");
        for id in ids {
            // Nor does a process with the VM's own ID.
            let outcome = attack(Some(id), target)?;
            let refused = outcome.iter().all(|(_, error)| [EPERM, EACCES].contains(error));
            ensure!(outcome.len() == 5 && refused, "{id} attacks {}: {outcome:?}", target.name);
        }
    }
    Ok(())
}
