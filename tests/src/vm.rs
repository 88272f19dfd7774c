//! A bare VM: our kernel, one static program as `/init`, a vsock device, and nothing else. For tests below the shim's level.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use husk_shim::vmm::kernel_cmdline::COMMON;

/// The machine that QEMU plays.
#[derive(Clone, Copy, Debug)]
pub enum Machine {
    /// virtio over MMIO, what sandboxes use.
    Microvm,
    /// virtio over PCI.
    Q35,
}

/// A running bare VM. Dropping it kills QEMU.
pub struct Vm {
    qemu: Child,
    folder: tempfile::TempDir,
}

/// What a bare VM is made of.
#[derive(Clone, Debug)]
pub struct Config {
    /// The machine that QEMU plays.
    pub machine: Machine,
    /// A static program, its `/init`.
    pub init: PathBuf,
    /// Further files of its initramfs; the folders that they are in are made.
    pub files: Vec<File>,
    /// Its memory, MiB.
    pub memory: u32,
    /// Added to the kernel's command line.
    pub kernel_parameters: String,
    /// Read-only block devices, in the order in which QEMU gets them.
    pub disks: Vec<Disk>,
    /// The guest's clock counts its instructions, one a nanosecond, instead of time: measures are the same whatever else the machine does.
    pub instruction_clock: bool,
}

/// A block device.
#[derive(Clone, Debug)]
pub struct Disk {
    /// By which the guest finds it.
    pub serial: String,
    /// What is on it: whole sectors.
    pub content: Vec<u8>,
}

/// A file, or with `link` a symbolic link.
#[derive(Clone, Debug)]
pub struct File {
    /// Where it stands, without the first slash.
    pub path: String,
    /// What is in it; a link's target.
    pub content: Vec<u8>,
    /// Whether it is a symbolic link. Other files may be executed.
    pub link: bool,
}

impl Config {
    /// A VM with nothing but `init`.
    pub fn bare(machine: Machine, init: &Path) -> Self {
        Config {
            machine,
            init: init.into(),
            files: Vec::new(),
            memory: 256,
            kernel_parameters: String::new(),
            disks: Vec::new(),
            instruction_clock: false,
        }
    }
}

impl Vm {
    /// Boots `init` (a static program) with `vsock` as QEMU's end of the vhost-user connection.
    pub fn boot(machine: Machine, init: &Path, vsock: OwnedFd) -> Result<Vm> {
        Self::boot_with(&Config::bare(machine, init), vsock)
    }

    /// Boots a VM with `vsock` as QEMU's end of the vhost-user connection.
    pub fn boot_with(config: &Config, vsock: OwnedFd) -> Result<Vm> {
        let kernel = workspace().join("out/vmlinux");
        ensure!(kernel.is_file(), "there is no kernel at {}: build it first", kernel.display());
        let folder = tempfile::tempdir().context("make a folder for the VM")?;
        let initrd = folder.path().join("initrd");
        let init = std::fs::read(&config.init).with_context(|| format!("read {}", config.init.display()))?;
        std::fs::write(&initrd, cpio(&init, &config.files)).context("write the initramfs")?;
        let (options, bus) = match config.machine {
            Machine::Microvm => ("microvm,acpi=off,rtc=on", "device"),
            Machine::Q35 => ("q35", "pci"),
        };
        let fd = vsock.as_raw_fd();
        let memory = config.memory;
        let parameters = format!("{} {}", COMMON.join(" "), config.kernel_parameters);
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-smp", "1"])
            .args(["-m", &memory.to_string()])
            .args(["-cpu", "max"])
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
        for (number, disk) in config.disks.iter().enumerate() {
            let image = folder.path().join(format!("disk{number}"));
            std::fs::write(&image, &disk.content).context("write a disk")?;
            let mut drive = OsString::from(format!("if=none,id=disk{number},format=raw,read-only=on,file="));
            drive.push(image);
            let device = format!("virtio-blk-{bus},drive=disk{number},serial={}", disk.serial);
            command.arg("-drive").arg(drive).args(["-device", &device]);
        }
        // SAFETY: fcntl and prctl are async-signal-safe, and the closure touches nothing else.
        unsafe {
            command.pre_exec(move || {
                if libc::fcntl(fd, libc::F_SETFD, 0) < 0 || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let qemu = command.spawn().context("start qemu-system-x86_64")?;
        Ok(Vm { qemu, folder })
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.qemu.id()
    }

    /// What the guest's kernel and `/init` have printed.
    pub fn console(&self) -> String {
        let console = std::fs::read(self.folder.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&console).into_owned()
    }

    /// The other end of the guest's serial console. One at a time; what is printed while nobody has it is in [`Vm::console`] only.
    pub fn serial(&self) -> Result<UnixStream> {
        UnixStream::connect(self.folder.path().join("serial")).context("connect to the serial console")
    }

    /// Has QEMU execute QMP commands without arguments, in turn.
    pub fn qmp(&self, commands: &[&str]) -> Result<()> {
        let stream = UnixStream::connect(self.folder.path().join("qmp")).context("connect to QMP")?;
        stream.set_read_timeout(Some(Duration::from_secs(10))).context("set a deadline for QMP")?;
        let mut replies = BufReader::new(&stream);
        for command in ["qmp_capabilities"].iter().chain(commands) {
            writeln!(&stream, "{{\"execute\":\"{command}\"}}").with_context(|| format!("send {command}"))?;
            loop {
                let mut reply = String::new();
                let n = replies.read_line(&mut reply).with_context(|| format!("wait for the reply to {command}"))?;
                ensure!(n > 0 && !reply.contains("\"error\""), "QMP {command}: {reply}");
                if reply.contains("\"return\"") {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Kills QEMU, as a crash would.
    pub fn kill(&mut self) -> Result<()> {
        self.qemu.kill().context("kill QEMU")?;
        self.qemu.wait().context("wait for QEMU").map(|_| ())
    }

    /// Waits until QEMU has ended by itself.
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
            // There is no wait with a deadline in std; this is a test's end, not its synchronisation.
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Either may have happened already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Builds one of `src/bin/` for the guest and answers where it is.
pub fn guest_program(name: &str) -> Result<PathBuf> {
    let workspace = workspace();
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
    let output = Command::new(workspace.join("init/musl/cargo"))
        .args(["build", "--quiet", "--release", "-p", "husk-tests", "--bin", name])
        .env("CARGO_TARGET_DIR", &target)
        // What `cargo test` sets for the tests is not meant for another build.
        .env_remove("RUSTFLAGS")
        .output()
        .context("run init/musl/cargo")?;
    ensure!(output.status.success(), "build {name} for the guest: {}", String::from_utf8_lossy(&output.stderr));
    Ok(target.join("x86_64-unknown-linux-musl/release").join(name))
}

/// The repository.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// A socket for the serial console, beside a file with all that is printed.
fn serial(folder: &Path) -> OsString {
    let mut argument = prefixed("socket,id=serial,server=on,wait=off,path=", &folder.join("serial"));
    argument.push(prefixed(",logfile=", &folder.join("console")));
    argument
}

fn prefixed(prefix: &str, path: &Path) -> OsString {
    let mut argument = OsString::from(prefix);
    argument.push(path);
    argument
}

/// An initramfs (Documentation/driver-api/early-userspace/buffer-format.rst) with `/init`, `/dev/console` for its
/// output, and the given files.
pub fn cpio(init: &[u8], files: &[File]) -> Vec<u8> {
    let mut archive = Vec::with_capacity(init.len() + 1024);
    let mut entries: Vec<(&str, u32, u32, u32, &[u8])> =
        vec![("dev", 0o040755, 0, 0, &[]), ("dev/console", 0o020600, 5, 1, &[]), ("init", 0o100755, 0, 0, init)];
    // Sorted, each folder comes before what is in it.
    let folders: std::collections::BTreeSet<&str> = files
        .iter()
        .flat_map(|file| file.path.match_indices('/').map(|(end, _)| &file.path[..end]))
        .filter(|folder| *folder != "dev")
        .collect();
    entries.extend(folders.into_iter().map(|folder| (folder, 0o040755, 0, 0, &[][..])));
    for File { path, content, link } in files {
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
