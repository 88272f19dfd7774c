//! A bare VM for tests below the shim: husk's kernel, one static program as `/init`, a vsock device, and nothing else.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use husk_shim::vmm::kernel_cmdline::COMMON;
use nix::sched::{CloneFlags, setns};
use serde_json::Value;

use crate::artifacts::repository;

/// QEMU's machine type.
#[derive(Clone, Copy, Debug)]
pub enum MachineType {
    /// virtio over MMIO, as sandboxes use it.
    Microvm,
    /// virtio over PCI.
    Q35,
}

/// A running bare VM. Dropping it kills QEMU.
pub struct Vm {
    qemu: Child,
    folder: tempfile::TempDir,
}

/// The parts of a bare VM.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// QEMU's machine type.
    pub machine: MachineType,
    /// A static program that becomes `/init`.
    pub init: PathBuf,
    /// More files of the initramfs. Their parent directories are created.
    pub files: Vec<InitramfsFile>,
    /// Memory in MiB.
    pub memory: u32,
    /// Appended to the kernel command line.
    pub kernel_parameters: String,
    /// Read-only block devices, in QEMU's order.
    pub disks: Vec<Disk>,
    /// The MACs of network cards that are connected to nothing.
    pub nics: Vec<[u8; 6]>,
    /// The guest has the console of a debug shell: see [`Vm::shell`].
    pub shell: bool,
    /// Makes the guest's clock count instructions, one per nanosecond, instead of time: measurements do not depend on
    /// the machine's load.
    pub instruction_clock: bool,
    /// Further arguments of QEMU, such as a network card.
    pub qemu_arguments: Vec<String>,
    /// The network namespace that QEMU runs in.
    pub network_namespace: Option<PathBuf>,
}

/// A block device.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The serial by which the guest finds it.
    pub serial: String,
    /// Content, a whole number of sectors.
    pub content: Vec<u8>,
}

/// A file of the initramfs, or with `link` a symbolic link.
#[derive(Clone, Debug)]
pub struct InitramfsFile {
    /// Path without the leading slash.
    pub path: String,
    /// Content, or the target of a link.
    pub content: Vec<u8>,
    /// Whether it is a symbolic link. Other files are executable.
    pub link: bool,
}

impl VmConfig {
    /// A VM with `init` only.
    pub fn bare(machine: MachineType, init: &Path) -> Self {
        VmConfig {
            machine,
            init: init.into(),
            files: Vec::new(),
            memory: 256,
            kernel_parameters: String::new(),
            disks: Vec::new(),
            nics: Vec::new(),
            shell: false,
            instruction_clock: false,
            qemu_arguments: Vec::new(),
            network_namespace: None,
        }
    }
}

impl Vm {
    /// Boots `init`, a static program, with `vsock` as QEMU's end of the vhost-user connection.
    pub fn boot(machine: MachineType, init: &Path, vsock: OwnedFd) -> Result<Vm> {
        Self::boot_with(&VmConfig::bare(machine, init), vsock)
    }

    /// Boots a VM with `vsock` as QEMU's end of the vhost-user connection.
    pub fn boot_with(config: &VmConfig, vsock: OwnedFd) -> Result<Vm> {
        let kernel = repository().join("out/vmlinux");
        ensure!(kernel.is_file(), "no kernel at {}: build it first", kernel.display());
        let folder = tempfile::tempdir().context("create the VM's directory")?;
        let initrd = folder.path().join("initrd");
        let init = std::fs::read(&config.init).with_context(|| format!("read {}", config.init.display()))?;
        std::fs::write(&initrd, cpio(&init, &config.files)).context("write the initramfs")?;
        let (options, bus) = match config.machine {
            MachineType::Microvm => ("microvm,acpi=off,rtc=on", "device"),
            MachineType::Q35 => ("q35", "pci"),
        };
        let fd = vsock.as_raw_fd();
        let memory = config.memory;
        // As the shim has it in VMs without KVM, such as these.
        let parameters = format!("{} init_on_alloc=0 {}", COMMON.join(" "), config.kernel_parameters);
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-smp", "1"])
            .args(["-m", &memory.to_string()])
            // As the shim's VMs: see vmm/qemu/args.rs.
            .args(["-cpu", "max,-erms,-fsrm"])
            .args(["-machine", &format!("{options},accel=tcg,memory-backend=mem")])
            .args(["-object", &format!("memory-backend-memfd,id=mem,size={memory}M,share=on")])
            .args([
                "-chardev",
                &format!("socket,id=vs,fd={fd}"),
                "-device",
                &format!("vhost-user-vsock-{bus},chardev=vs"),
            ])
            .args(["-append", &parameters])
            .args(if config.instruction_clock { &["-icount", "shift=0,sleep=off"][..] } else { &[] })
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initrd)
            .arg("-chardev")
            .arg(serial(folder.path()))
            .args(["-serial", "chardev:serial"])
            .arg("-qmp")
            .arg(prefixed("unix:", &folder.path().join("qmp,server=on,wait=off")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        if config.shell {
            let chardev = prefixed("socket,id=shell,server=on,wait=off,path=", &folder.path().join("shell"));
            command.arg("-chardev").arg(chardev).args(["-device", &format!("virtio-serial-{bus},max_ports=1")]);
            command.args(["-device", "virtconsole,chardev=shell"]);
        }
        for (number, disk) in config.disks.iter().enumerate() {
            let image = folder.path().join(format!("disk{number}"));
            std::fs::write(&image, &disk.content).context("write a disk")?;
            let mut drive = OsString::from(format!("if=none,id=disk{number},format=raw,read-only=on,file="));
            drive.push(image);
            let device = format!("virtio-blk-{bus},drive=disk{number},serial={}", disk.serial);
            command.arg("-drive").arg(drive).args(["-device", &device]);
        }
        for (number, mac) in config.nics.iter().enumerate() {
            let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
            let device = format!("virtio-net-{bus},netdev=net{number},mac={mac}");
            command.args(["-netdev", &format!("hubport,id=net{number},hubid={number}"), "-device", &device]);
        }
        command.args(&config.qemu_arguments);
        let open = |path: &PathBuf| File::open(path).with_context(|| format!("open {}", path.display()));
        let namespace = config.network_namespace.as_ref().map(open).transpose()?;
        // SAFETY: setns, fcntl and prctl are async-signal-safe, and the closure touches nothing else.
        unsafe {
            command.pre_exec(move || {
                if let Some(namespace) = &namespace {
                    setns(namespace, CloneFlags::CLONE_NEWNET)?;
                }
                if libc::fcntl(fd, libc::F_SETFD, 0) < 0 || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let qemu = command.spawn().context("start qemu-system-x86_64")?;
        Ok(Vm { qemu, folder })
    }

    /// QEMU's PID.
    pub fn pid(&self) -> u32 {
        self.qemu.id()
    }

    /// Output of the guest's kernel and `/init`.
    pub fn console(&self) -> String {
        let console = std::fs::read(self.folder.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&console).into_owned()
    }

    /// Connects to the console of the guest's debug shell, which accepts one client at a time. Output without a client is
    /// lost.
    pub fn shell(&self) -> Result<UnixStream> {
        UnixStream::connect(self.folder.path().join("shell")).context("connect to the shell's console")
    }

    /// Makes QEMU execute QMP commands without arguments, in order, and returns its replies.
    pub fn qmp(&self, commands: &[&str]) -> Result<Vec<Value>> {
        let stream = UnixStream::connect(self.folder.path().join("qmp")).context("connect to QMP")?;
        stream.set_read_timeout(Some(Duration::from_secs(10))).context("set a deadline for QMP")?;
        let mut lines = BufReader::new(&stream);
        let mut replies = Vec::new();
        for command in ["qmp_capabilities"].iter().chain(commands) {
            writeln!(&stream, "{{\"execute\":\"{command}\"}}").with_context(|| format!("send {command}"))?;
            loop {
                let mut reply = String::new();
                let n = lines.read_line(&mut reply).with_context(|| format!("wait for the reply to {command}"))?;
                ensure!(n > 0 && !reply.contains("\"error\""), "QMP {command}: {reply}");
                if reply.contains("\"return\"") {
                    replies.push(serde_json::from_str(&reply).with_context(|| format!("QMP {command}: {reply}"))?);
                    break;
                }
            }
        }
        Ok(replies)
    }

    /// Bytes of host code that QEMU has translated the guest's code to.
    pub fn translated_bytes(&self) -> Result<u64> {
        let replies = self.qmp(&["x-query-jit"])?;
        let value = replies.last().and_then(|reply| reply["return"]["human-readable-text"].as_str());
        let line = value.and_then(|text| text.lines().find_map(|line| line.trim().strip_prefix("gen code size")));
        let size = line.and_then(|sizes| sizes.trim().split('/').next()?.parse().ok());
        size.with_context(|| format!("no gen code size in {replies:?}"))
    }

    /// Kills QEMU, as a crash would.
    pub fn kill(&mut self) -> Result<()> {
        self.qemu.kill().context("kill QEMU")?;
        self.qemu.wait().context("wait for QEMU").map(|_| ())
    }

    /// Waits until QEMU exits.
    pub fn wait(&mut self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        loop {
            if let Some(status) = self.qemu.try_wait().context("wait for QEMU")? {
                ensure!(status.success(), "QEMU: {status}");
                return Ok(());
            }
            if Instant::now() > end {
                bail!("QEMU still runs after {deadline:?}");
            }
            // std has no wait with a deadline. This is the end of a test, not its synchronisation.
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // QEMU may be dead or reaped already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Builds a program of `src/bin/` for the guest and returns its path.
pub fn guest_program(name: &str) -> Result<PathBuf> {
    let workspace = repository();
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
    let output = Command::new(workspace.join("init/musl/cargo"))
        .args(["build", "--quiet", "--release", "-p", "husk-tests", "--bin", name])
        .env("CARGO_TARGET_DIR", &target)
        // `cargo test` sets RUSTFLAGS for the tests, not for this build.
        .env_remove("RUSTFLAGS")
        .output()
        .context("run init/musl/cargo")?;
    ensure!(output.status.success(), "build {name} for the guest: {}", String::from_utf8_lossy(&output.stderr));
    Ok(target.join("x86_64-unknown-linux-musl/release").join(name))
}

/// The serial console: a log file of everything printed.
fn serial(folder: &Path) -> OsString {
    prefixed("file,id=serial,path=", &folder.join("console"))
}

fn prefixed(prefix: &str, path: &Path) -> OsString {
    let mut argument = OsString::from(prefix);
    argument.push(path);
    argument
}

/// An initramfs (Documentation/driver-api/early-userspace/buffer-format.rst) with `/init`, `/dev/console` for its
/// output, and the given files.
pub fn cpio(init: &[u8], files: &[InitramfsFile]) -> Vec<u8> {
    let mut archive = Vec::with_capacity(init.len() + 1024);
    let mut entries: Vec<(&str, u32, u32, u32, &[u8])> =
        vec![("dev", 0o040755, 0, 0, &[]), ("dev/console", 0o020600, 5, 1, &[]), ("init", 0o100755, 0, 0, init)];
    // In sorted order, each directory precedes its contents.
    let folders: std::collections::BTreeSet<&str> = files
        .iter()
        .flat_map(|file| file.path.match_indices('/').map(|(end, _)| &file.path[..end]))
        .filter(|folder| *folder != "dev")
        .collect();
    entries.extend(folders.into_iter().map(|folder| (folder, 0o040755, 0, 0, &[][..])));
    for InitramfsFile { path, content, link } in files {
        entries.push((path, if *link { 0o120777 } else { 0o100755 }, 0, 0, content));
    }
    entries.push(("TRAILER!!!", 0, 0, 0, &[]));
    for (inode, (name, mode, major, minor, data)) in entries.into_iter().enumerate() {
        let fields =
            [inode as u32 + 1, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, major, minor, name.len() as u32 + 1, 0];
        archive.extend(b"070701");
        for field in fields {
            archive.extend(format!("{field:08x}").bytes());
        }
        archive.extend(name.bytes());
        archive.push(0);
        pad(&mut archive);
        archive.extend(data);
        pad(&mut archive);
    }
    archive
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}
