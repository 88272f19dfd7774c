//! When a container can't be had: the message says what the user can do about it, and nothing is left behind.

use std::fs;

use anyhow::{Result, ensure};
use husk_tests::artifacts::Runtime;
use husk_tests::containerd::Configured;
use husk_tests::leftovers::Leftovers;

/// Runs a container that can't be had under this configuration; what `ctr` says of it.
fn refused(config: &str, flags: &[&str], args: &[&str]) -> Result<String> {
    let configured = Configured::start(config)?;
    let containerd = &configured.containerd;
    // The first use of containerd's namespace leaves folders that stay.
    let id = containerd.id("first");
    match config {
        "" => drop(containerd.run(&[], &id, &["true"]).ok()?),
        _ => drop(containerd.run(flags, &id, args).output()?),
    }
    let before = Leftovers::now(containerd);
    let ran = containerd.run(flags, &containerd.id("refused"), args).output()?;
    ensure!(ran.code() != 0 && ran.stdout.is_empty(), "it was not refused: {ran}");
    before.expect_none_since(containerd)?;
    Ok(ran.errors())
}

/// The same, about husk's own parts; nothing under runc.
fn husk_refuses(test: &str, config: &str, flags: &[&str], wanted: &[&str]) -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell(test) {
        return Ok(());
    }
    let message = refused(config, flags, &["true"])?;
    for part in wanted {
        ensure!(message.contains(part), "no {part:?} in: {message}");
    }
    Ok(())
}

#[test]
fn without_a_kernel_it_says_where_it_looked() -> Result<()> {
    let wanted = ["kernel path or restore snapshot is required", "/no/such/vmlinux", "/no/such/initrd"];
    let config = "kernel = \"/no/such/vmlinux\"\ninitrd = \"/no/such/initrd\"";
    husk_refuses("without_a_kernel_it_says_where_it_looked", config, &[], &wanted)
}

#[test]
fn a_kernel_that_is_none_is_named() -> Result<()> {
    husk_refuses("a_kernel_that_is_none_is_named", "kernel = \"/etc/passwd\"", &[], &["kernel"])
}

#[test]
fn an_initrd_without_an_init_ends_with_the_kernels_own_words() -> Result<()> {
    let config = "initrd = \"/etc/passwd\"";
    husk_refuses("an_initrd_without_an_init_ends_with_the_kernels_own_words", config, &[], &["Kernel panic"])
}

#[test]
fn without_qemu_it_names_the_program() -> Result<()> {
    husk_refuses("without_qemu_it_names_the_program", "qemu = \"/no/such/qemu\"", &[], &["/no/such/qemu"])
}

#[test]
fn a_qemu_that_fails_is_named_with_its_status() -> Result<()> {
    husk_refuses(
        "a_qemu_that_fails_is_named_with_its_status",
        "qemu = \"/bin/false\"",
        &[],
        &["QEMU exited with status 1"],
    )
}

#[test]
fn without_virtiofsd_it_names_the_program() -> Result<()> {
    let wanted = ["virtiofsd", "/no/such/virtiofsd"];
    husk_refuses("without_virtiofsd_it_names_the_program", "virtiofsd = \"/no/such/virtiofsd\"", &[], &wanted)
}

#[test]
fn a_virtiofsd_that_fails_ends_the_create() -> Result<()> {
    husk_refuses(
        "a_virtiofsd_that_fails_ends_the_create",
        "virtiofsd = \"/bin/false\"",
        &[],
        &["virtiofsd exited with status 1"],
    )
}

#[test]
fn a_guest_larger_than_the_host_is_refused_for_memory() -> Result<()> {
    // 100 TiB.
    let flags = ["--annotation", "io.husk.memory_mib=104857600"];
    husk_refuses("a_guest_larger_than_the_host_is_refused_for_memory", "", &flags, &["memory"])
}

#[test]
fn a_guest_too_small_to_boot_says_so() -> Result<()> {
    let flags = ["--annotation", "io.husk.memory_mib=16"];
    let wanted = ["io.husk.memory_mib", "16", "at least"];
    husk_refuses("a_guest_too_small_to_boot_says_so", "", &flags, &wanted)
}

#[test]
fn without_enough_huge_pages_it_says_how_many_there_are() -> Result<()> {
    // 100 TiB.
    let config = "hugepages = true\nmemory_mib = 104857600";
    let wanted = ["hugepages = true", "huge pages of", "and the host has"];
    husk_refuses("without_enough_huge_pages_it_says_how_many_there_are", config, &[], &wanted)
}

#[test]
fn a_bad_annotation_is_named_with_its_value_and_so_is_every_other() -> Result<()> {
    let flags = ["--annotation", "io.husk.vcpus=many", "--annotation", "io.husk.colour=green"];
    let wanted = ["io.husk.vcpus", "many", "io.husk.colour", "green"];
    husk_refuses("a_bad_annotation_is_named_with_its_value_and_so_is_every_other", "", &flags, &wanted)
}

#[test]
fn a_bad_configuration_is_named_by_file_key_and_value() -> Result<()> {
    let wanted = ["config.toml", "vcpus", "-2", "colour"];
    husk_refuses("a_bad_configuration_is_named_by_file_key_and_value", "vcpus = -2\ncolour = 1", &[], &wanted)
}

#[test]
fn a_missing_source_of_a_bind_mount_is_named() -> Result<()> {
    let mount = "type=bind,src=/no/such/source,dst=/data,options=rbind:rw";
    let message = refused("", &["--mount", mount], &["true"])?;
    ensure!(message.contains("/no/such/source"), "{message}");
    Ok(())
}

#[test]
fn a_command_that_is_not_there_is_named() -> Result<()> {
    let message = refused("", &[], &["/no/such/command"])?;
    ensure!(message.contains("/no/such/command"), "{message}");
    Ok(())
}

#[test]
fn a_refused_create_leaves_the_hosts_files_alone() -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("kept"), "kept")?;
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", folder.path().display());
    refused("", &["--mount", &mount], &["/no/such/command"])?;
    ensure!(fs::read_to_string(folder.path().join("kept"))? == "kept");
    Ok(())
}
