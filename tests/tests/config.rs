//! Settings of the configuration and of annotations take effect in the VM. `errors.rs` tests the rejected ones.

use std::fs;
use std::io::Write;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_shim::prepare::host::Places;
use husk_tests::artifacts::repository;
use husk_tests::command::{self, wait_for};
use husk_tests::containerd::Configured;

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_profile_and_kernel_parameters_take_effect_in_the_guest() -> Result<()> {
    let configured = Configured::start("profile = \"throughput\"\nkernel_params = [\"sysctl.vm.dirty_ratio=33\"]\n")?;
    let table: [(&[&str], &str); 3] = [
        (&[], "4\n33"),
        (&["--annotation", "io.husk.profile=low-latency"], "1\n33"),
        (&["--annotation", "io.husk.profile=low-latency", "--annotation", "io.husk.vcpus=2"], "2\n33"),
    ];
    for (flags, expected) in table {
        let script = "grep -c ^processor /proc/cpuinfo; cat /proc/sys/vm/dirty_ratio";
        let shown = configured.containerd.script(flags, "config", script)?;
        ensure!(shown == expected, "{flags:?}: {shown:?}, not {expected:?}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn without_kvm_a_container_starts_only_if_the_configuration_accepts_emulation() -> Result<()> {
    let configured = Configured::start("accel = \"auto\"\n")?;
    let containerd = &configured.containerd;
    let output = containerd.run(&[], &containerd.id("accel"), &["echo", "started"]).output()?;
    if Places::of_process().kvm {
        ensure!(output.code() == 0 && output.text() == "started", "{output}");
    } else {
        let parts = ["QEMU's security policy does not consider a security boundary", "set accel = "];
        let errors = output.errors();
        ensure!(output.code() != 0 && parts.iter().all(|part| errors.contains(part)), "{output}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_vm_boots_only_from_a_kernel_and_an_initramfs_with_the_configured_digests() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let out = repository().join("out");
    let mut keys = format!("image_dir = {:?}\n", folder.path());
    for name in ["vmlinux", "initrd.img"] {
        fs::copy(out.join(name), folder.path().join(name))?;
    }
    let digest = |name: &str| {
        let mut command = Command::new("sha256sum");
        command.arg(folder.path().join(name));
        let line = command::run(command, None, Duration::from_secs(60))?.ok()?.text();
        Ok::<_, anyhow::Error>(line.split(' ').next().unwrap_or_default().to_owned())
    };
    let (kernel, initrd) = (digest("vmlinux")?, digest("initrd.img")?);
    keys += &format!("kernel_sha256 = \"{kernel}\"\ninitrd_sha256 = \"{initrd}\"\n");
    let configured = Configured::start(&keys)?;
    let containerd = &configured.containerd;
    ensure!(containerd.script(&[], "verified", "echo booted")? == "booted");
    // The file has another byte at its end: QEMU would not notice.
    fs::OpenOptions::new().append(true).open(folder.path().join("initrd.img"))?.write_all(&[0])?;
    let output = containerd.run(&[], &containerd.id("changed"), &["true"]).output()?;
    let expected = format!(
        "the initrd {} has the SHA-256 digest {}, but initrd_sha256 is {initrd}",
        folder.path().join("initrd.img").display(),
        digest("initrd.img")?
    );
    ensure!(output.code() != 0 && output.errors().contains(&expected), "{output}");
    Ok(())
}

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Additional huge pages of the host, removed on drop.
struct HugePages {
    before: u64,
}

impl HugePages {
    fn add(pages: u64) -> Result<Self> {
        let before = fs::read_to_string(POOL)?.trim().parse()?;
        let more = Self { before };
        // Free memory may be in pieces after a build: sysctl/vm.rst, compact_memory.
        fs::write("/proc/sys/vm/compact_memory", "1")?;
        fs::write(POOL, (before + pages).to_string())?;
        let now: u64 = fs::read_to_string(POOL)?.trim().parse()?;
        ensure!(now == before + pages, "the host has no memory for {pages} more huge pages, only for {}", now - before);
        Ok(more)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = fs::write(POOL, self.before.to_string()) {
            eprintln!("{POOL} remains changed: {error}");
        }
    }
}

/// A value from `/proc/meminfo`.
fn meminfo(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next()).with_context(|| format!("no {name}"))?;
    Ok(number.parse()?)
}

/// Huge pages of the host that are neither used nor reserved.
fn available() -> Result<u64> {
    Ok(meminfo("HugePages_Free")? - meminfo("HugePages_Rsvd")?)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn guest_memory_comes_from_the_hosts_huge_pages_and_is_returned() -> Result<()> {
    let pages = (128 * 1024_u64).div_ceil(meminfo("Hugepagesize")?);
    let _more = HugePages::add(pages)?;
    let before = available()?;
    let configured = Configured::start("hugepages = true\nmemory_mib = 128\n")?;
    let container = configured.containerd.detached(&[], "huge", &["sleep", "1000"])?;
    ensure!(available()? == before - pages, "{} of {before} huge pages remain", available()?);
    drop(container);
    wait_for(Duration::from_secs(60), "the huge pages are returned", || (available().ok()? == before).then_some(()))
}
