//! What starting a program costs in the guest: a VM whose clock counts instructions, with a root filesystem on a
//! virtio-fs share that contains a static and a dynamically linked program.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use husk_protos::SHARE_PATH;
use husk_shim::vmm::kernel_cmdline::EMULATION;
use serde_json::{Value, json};

use crate::guest::{Guest, config, spec};
use crate::share::Share;
use crate::vm::VmConfig;

/// Starts that precede a measurement. The first ones read the program from the host.
const WARM: u32 = 5;
/// What the shim passes to such a VM as well: the board, and that a clock counts instructions, one per nanosecond.
const BOARD: &str = "acpi=off pci=off tsc_early_khz=1000000 tsc=reliable lapic_timer_khz=1000000";
/// The clock counts instructions and, unlike in other tests' VMs, waits for virtiofsd, so that deadlines in the guest
/// hold. In the guest's time, the share's files are old enough to keep their pages
/// (kernel-config/patches/virtiofs-keep-pages.patch).
const CLOCK: [&str; 4] = ["-icount", "shift=0,sleep=on", "-rtc", "base=2035-01-01"];
/// As the shim's VMs have it: see `balloon.rs`.
const BALLOON: [&str; 2] = ["-device", "virtio-balloon-device,free-page-reporting=on,deflate-on-oom=on"];
/// Path of the dynamically linked program in the container.
const DYNAMIC: &str = "/bin/dynamic-true";

/// A program that exits at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// busybox, linked statically.
    Static,
    /// `true` of the host's distribution, with its dynamic linker and libc.
    Dynamic,
}

impl Program {
    fn path(self) -> &'static str {
        match self {
            Self::Static => "/bin/true",
            Self::Dynamic => DYNAMIC,
        }
    }
}

/// The share of one VM.
pub struct Programs {
    share: Share,
    // Removed after virtiofsd's end.
    _folder: tempfile::TempDir,
}

impl Programs {
    /// Fills the share with [`config`]'s root filesystem and the dynamically linked program.
    pub fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        for file in config()?.files {
            let path = folder.path().join(&file.path);
            fs::create_dir_all(path.parent().context("a file without a folder")?)?;
            if file.link {
                symlink(String::from_utf8(file.content)?, path)?;
            } else {
                fs::write(&path, file.content)?;
                fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
            }
        }
        add_dynamic(&folder.path().join("rootfs"))?;
        Ok(Self { share: Share::serve(folder.path())?, _folder: folder })
    }

    /// The VM, with the kernel parameters of the shim's VMs.
    pub fn vm(&self) -> Result<VmConfig> {
        Ok(VmConfig {
            files: Vec::new(),
            kernel_parameters: format!("{} {BOARD}", EMULATION.join(" ")),
            qemu_arguments: self.qemu_arguments().chain(CLOCK.map(String::from)).collect(),
            ..config()?
        })
    }

    /// As [`Self::vm`], with the machine's clock.
    pub fn vm_without_clock(&self) -> Result<VmConfig> {
        Ok(VmConfig { qemu_arguments: self.qemu_arguments().collect(), ..self.vm()? })
    }

    fn qemu_arguments(&self) -> impl Iterator<Item = String> {
        self.share.qemu_arguments().into_iter().chain(BALLOON.map(String::from))
    }

    /// Runs `true` in a container, and deletes that.
    pub async fn run(&self, guest: &Guest, id: &str) -> Result<()> {
        self.run_to_its_end(guest, id).await?;
        guest.delete(id, "").await.map(drop)
    }

    /// Runs `true` in a container.
    pub async fn run_to_its_end(&self, guest: &Guest, id: &str) -> Result<()> {
        let mut spec = spec(&["true"]);
        spec["root"]["path"] = Value::from(format!("{SHARE_PATH}/rootfs"));
        let (status, output) = guest.run_to_its_end(id, &spec).await?;
        ensure!(status == 0, "true: {status}: {output}");
        Ok(())
    }

    /// Runs the program `times` times in a container, after some times that are not counted, and returns the
    /// instructions that its processes execute each time, with those of the shell's fork and wait.
    ///
    /// The shell calls umask(2) before and after the counted times.
    pub async fn cost(&self, guest: &Guest, id: &str, program: Program, times: u32) -> Result<u64> {
        let path = program.path();
        let script = format!(
            "run() {{ i=0; while [ $i -lt $1 ]; do {path}; i=$((i+1)); done; }}
            used() {{ grep usage_usec /sys/fs/cgroup/cpu.stat; }}
            run {WARM}; used; umask >/dev/null; run {times}; umask >/dev/null; used"
        );
        let mut spec = spec(&["sh", "-c", &script]);
        spec["root"]["path"] = Value::from(format!("{SHARE_PATH}/rootfs"));
        let cgroup = json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]});
        spec["mounts"].as_array_mut().context("the spec has no mounts")?.push(cgroup);
        let namespaces = spec["linux"]["namespaces"].as_array_mut().context("the spec has no namespaces")?;
        namespaces.push(json!({"type": "cgroup"}));
        let (status, output) = guest.run(id, &spec).await?;
        ensure!(status == 0, "{path}: {status}: {output}");
        let used: Vec<u64> = output.lines().filter_map(|line| line.strip_prefix("usage_usec ")?.parse().ok()).collect();
        let [before, after] = used[..] else { anyhow::bail!("no CPU time in {output:?}") };
        // A microsecond is a thousand instructions.
        Ok((after - before) * 1000 / u64::from(times))
    }
}

/// Copies `true` and what ldd(1) prints for it.
fn add_dynamic(rootfs: &Path) -> Result<()> {
    let program = Path::new("/usr/bin/true");
    let output = Command::new("ldd").arg(program).output().context("run ldd")?;
    ensure!(output.status.success(), "ldd {}: {}", program.display(), String::from_utf8_lossy(&output.stderr));
    let libraries = String::from_utf8(output.stdout)?;
    let libraries: Vec<&str> = libraries.split_whitespace().filter(|word| word.starts_with('/')).collect();
    ensure!(libraries.len() >= 2, "{} needs no libraries: {libraries:?}", program.display());
    let to = |path: &str| rootfs.join(path.trim_start_matches('/'));
    fs::copy(program, to(DYNAMIC))?;
    for library in libraries {
        fs::create_dir_all(to(library).parent().context("a library without a folder")?)?;
        // Follows links: the container has no other names.
        fs::copy(library, to(library)).with_context(|| format!("copy {library}"))?;
    }
    // Without a cache, the dynamic linker searches several folders.
    fs::create_dir_all(rootfs.join("etc"))?;
    let output = Command::new("/sbin/ldconfig").arg("-r").arg(rootfs).output().context("run /sbin/ldconfig")?;
    ensure!(output.status.success(), "ldconfig: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
