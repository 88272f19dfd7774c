//! Containers that cannot be created: the error tells the user what to do, and nothing is left behind.

use std::fs;

use anyhow::{Result, ensure};
use husk_tests::containerd::Configured;
use husk_tests::leftovers::Leftovers;

/// Tries to run a container that this configuration makes impossible, and returns ctr's error output.
fn create_error(config: &str, flags: &[&str], args: &[&str]) -> Result<String> {
    let configured = Configured::start(config)?;
    let containerd = &configured.containerd;
    // The first use of containerd's namespace creates directories that remain.
    let id = containerd.id("first");
    match config {
        "" => drop(containerd.run(&[], &id, &["true"]).ok()?),
        _ => drop(containerd.run(flags, &id, args).output()?),
    }
    let before = Leftovers::now(containerd);
    let ran = containerd.run(flags, &containerd.id("refused"), args).output()?;
    ensure!(ran.code() != 0 && ran.stdout.is_empty(), "the container was created: {ran}");
    before.expect_none_since(containerd)?;
    Ok(ran.errors())
}

/// Checks the error of a container that husk cannot create.
fn husk_rejects(config: &str, flags: &[&str], expected: &[&str]) -> Result<()> {
    let message = create_error(config, flags, &["true"])?;
    for part in expected {
        ensure!(message.contains(part), "no {part:?} in: {message}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_missing_kernel_error_names_the_searched_paths() -> Result<()> {
    let expected = ["kernel path or restore snapshot is required", "/no/such/vmlinux", "/no/such/initrd"];
    let config = "kernel = \"/no/such/vmlinux\"\ninitrd = \"/no/such/initrd\"";
    husk_rejects(config, &[], &expected)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_file_that_is_no_kernel_is_named() -> Result<()> {
    husk_rejects("kernel = \"/etc/passwd\"", &[], &["kernel"])
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn an_initrd_without_an_init_is_reported_with_the_kernels_panic() -> Result<()> {
    let config = "initrd = \"/etc/passwd\"";
    husk_rejects(config, &[], &["Kernel panic"])
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_missing_qemu_is_named() -> Result<()> {
    husk_rejects("qemu = \"/no/such/qemu\"", &[], &["/no/such/qemu"])
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_failing_qemu_is_reported_with_its_status() -> Result<()> {
    husk_rejects("qemu = \"/bin/false\"", &[], &["QEMU exited with status 1"])
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_missing_virtiofsd_is_named() -> Result<()> {
    let expected = ["virtiofsd", "/no/such/virtiofsd"];
    husk_rejects("virtiofsd = \"/no/such/virtiofsd\"", &[], &expected)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_failing_virtiofsd_is_reported_with_its_status() -> Result<()> {
    husk_rejects("virtiofsd = \"/bin/false\"", &[], &["virtiofsd exited with status 1"])
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_guest_larger_than_the_host_is_rejected() -> Result<()> {
    // 100 TiB.
    let flags = ["--annotation", "io.husk.memory_mib=104857600"];
    husk_rejects("", &flags, &["memory"])
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_guest_too_small_to_boot_is_rejected_with_the_minimum() -> Result<()> {
    let flags = ["--annotation", "io.husk.memory_mib=16"];
    let expected = ["io.husk.memory_mib", "16", "at least"];
    husk_rejects("", &flags, &expected)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_lack_of_huge_pages_is_reported_with_the_hosts_number() -> Result<()> {
    // 100 TiB.
    let config = "hugepages = true\nmemory_mib = 104857600";
    let expected = ["hugepages = true", "huge pages of", "and the host has"];
    husk_rejects(config, &[], &expected)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn all_invalid_annotations_are_named_with_their_values() -> Result<()> {
    let flags = ["--annotation", "io.husk.vcpus=many", "--annotation", "io.husk.colour=green"];
    let expected = ["io.husk.vcpus", "many", "io.husk.colour", "green"];
    husk_rejects("", &flags, &expected)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn all_invalid_configuration_keys_are_named_with_file_and_value() -> Result<()> {
    let expected = ["husk.toml", "vcpus", "-2", "colour"];
    husk_rejects("vcpus = -2\ncolour = 1", &[], &expected)
}

#[test]
fn a_missing_source_of_a_bind_mount_is_named() -> Result<()> {
    let mount = "type=bind,src=/no/such/source,dst=/data,options=rbind:rw";
    let message = create_error("", &["--mount", mount], &["true"])?;
    ensure!(message.contains("/no/such/source"), "{message}");
    Ok(())
}

#[test]
fn a_missing_command_is_named() -> Result<()> {
    let message = create_error("", &[], &["/no/such/command"])?;
    ensure!(message.contains("/no/such/command"), "{message}");
    Ok(())
}

#[test]
fn a_failed_create_does_not_touch_the_hosts_files() -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("kept"), "kept")?;
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", folder.path().display());
    create_error("", &["--mount", &mount], &["/no/such/command"])?;
    ensure!(fs::read_to_string(folder.path().join("kept"))? == "kept");
    Ok(())
}
