//! What programs need of the guest's kernel, and how it caches the host's files. kernel-config/README.md has the list.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::command::wait_for;
use husk_tests::containerd::{Configured, Container, Containerd};
use husk_tests::vm::guest_program;

/// Much more than a guest reads of its own accord.
const SIZE: usize = 4 << 20;

/// socketcall(SYS_SOCKET, {AF_VSOCK, SOCK_STREAM, 0}) through int 0x80; exits with its error.
const I386: &[u8] = b"\x6a\x00\x6a\x01\x6a\x28\x89\xe1\xb8\x66\x00\x00\x00\xbb\x01\x00\x00\x00\xcd\x80\
    \xf7\xd8\x89\xc3\xb8\x01\x00\x00\x00\xcd\x80";
/// time(NULL) at its address in the vsyscall page; exits with 0 if the result is positive.
const VSYSCALL: &[u8] = b"\x48\xc7\xc0\x00\x04\x60\xff\x31\xff\xff\xd0\x31\xff\x48\x85\xc0\x40\x0f\x9e\xc7\
    \xb8\x3c\x00\x00\x00\x0f\x05";
/// modify_ldt(0, NULL, 0); exits with its error.
const MODIFY_LDT: &[u8] = b"\xb8\x9a\x00\x00\x00\x31\xff\x31\xf6\x31\xd2\x0f\x05\xf7\xd8\x89\xc7\
    \xb8\x3c\x00\x00\x00\x0f\x05";

/// Stacks always differ; mappings only without `randmaps_once`, which VMs without KVM have.
const RANDOM: &str = r#"
    at() { sed -n "/$1/s/-.*//p" /proc/self/maps; }
    [ "$(at stack)" != "$(at stack)" ] && if grep -q randmaps_once /proc/cmdline; then
        [ "$(at vvar)" = "$(at vvar)" ]; else [ "$(at vvar)" != "$(at vvar)" ]; fi && echo random"#;

/// A static ELF executable with one segment that contains the whole file: elf(5).
fn elf(is_64_bit: bool, code: &[u8]) -> Vec<u8> {
    // Native words, and sizes and fields that depend on them.
    let (word, header, segment, machine, base) =
        if is_64_bit { (8, 64, 56, 62, 0x40_0000_u64) } else { (4, 52, 32, 3, 0x804_8000) };
    let words =
        |values: &[u64]| values.iter().flat_map(|value| value.to_le_bytes()[..word].to_vec()).collect::<Vec<u8>>();
    let halves = |values: &[u16]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let length = (header + segment + code.len()) as u64;
    let class = if is_64_bit { 2 } else { 1 };
    let readable_and_executable = 5u32.to_le_bytes();
    let mut file = [b"\x7fELF", &[class, 1, 1, 0][..], &[0; 8]].concat();
    file.extend(halves(&[2, machine]));
    file.extend(1u32.to_le_bytes());
    file.extend(words(&[base + (header + segment) as u64, header as u64, 0]));
    file.extend(0u32.to_le_bytes());
    file.extend(halves(&[header as u16, segment as u16, 1, 0, 0, 0]));
    file.extend(1u32.to_le_bytes());
    if is_64_bit {
        file.extend(readable_and_executable);
    }
    file.extend(words(&[0, base, base, length, length]));
    if !is_64_bit {
        file.extend(readable_and_executable);
    }
    file.extend(words(&[0x1000]));
    file.extend(code);
    file
}

fn install(path: &Path, content: &[u8]) -> Result<()> {
    fs::write(path, content)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn old_and_foreign_programs_run_and_io_uring_and_user_namespaces_follow_the_configuration() -> Result<()> {
    let folder = tempfile::tempdir()?;
    install(&folder.path().join("i386"), &elf(false, I386))?;
    install(&folder.path().join("vsyscall"), &elf(true, VSYSCALL))?;
    install(&folder.path().join("modify_ldt"), &elf(true, MODIFY_LDT))?;
    install(&folder.path().join("foreign"), b"HUSK runs\n")?;
    fs::copy(guest_program("probe")?, folder.path().join("probe"))?;
    let mount = format!("type=bind,src={},dst=/p,options=rbind:ro", folder.path().display());
    // 40 is AF_VSOCK, 1 is AF_UNIX (linux/socket.h).
    let table = [
        ("/p/i386; echo $?", "97"),
        ("/p/vsyscall; echo $?", "0"),
        ("/p/modify_ldt; echo $?", "0"),
        ("/p/probe uring 1", "granted"),
        ("/p/probe uring 40 | cut -d' ' -f1-5", "refused: Address family not supported"),
        (
            "cd /proc/sys/fs/binfmt_misc; mount -t binfmt_misc none .; cd .; cd ../binfmt_misc; \
          echo ':husk:M::HUSK::/bin/cat:' >register; /p/foreign",
            "HUSK runs",
        ),
        ("grep -c bytes /proc/self/io", "3"),
        ("wc -w </proc/self/schedstat", "3"),
        ("grep -cw autofs /proc/filesystems", "1"),
        ("grep ^Seccomp: /proc/self/status | cut -f2", "0"),
        (RANDOM, "random"),
        ("unshare -U true", "unshare: unshare(0x10000000): No space left on device"),
        ("cd /proc/sys/kernel; echo $(cat dmesg_restrict kptr_restrict unprivileged_bpf_disabled)", "1 2 2"),
    ];
    let script: Vec<&str> = table.iter().map(|(script, _)| *script).collect();
    let script = script.iter().map(|script| format!("({script}) 2>&1")).collect::<Vec<_>>().join("; ");
    let flags = ["--privileged", "--mount", &mount];
    let enabled = Configured::start("io_uring = true\nuser_namespaces = false\n")?;
    let output = enabled.containerd.script(&flags, "kernel", &script)?;
    let expected: Vec<&str> = table.iter().map(|(_, expected)| *expected).collect();
    ensure!(output.lines().eq(expected.iter().copied()), "{output}\n\nexpected: {expected:#?}");

    let mapped = ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"];
    let refused = enabled.containerd.run(&mapped, &enabled.containerd.id("mapped"), &["true"]).output()?;
    let why = "husk's configuration does not allow user namespaces: user_namespaces = false";
    ensure!(refused.code() != 0 && refused.errors().contains(why), "{refused}");

    let script = "/p/probe uring 1; unshare -U true && echo unshared";
    let output = Containerd::shared()?.script(&flags, "kernel", script)?;
    ensure!(output == "refused: Operation not permitted (os error 1)\nunshared", "{output}");
    Ok(())
}

/// Bytes that the container's virtiofsd has read from files.
fn read_from_host(container: &Container, containerd: &Containerd) -> Result<usize> {
    let (_, below) = containerd.shim_of(container.id())?;
    let mut sum = 0;
    for process in below.iter().filter(|process| process.name.starts_with("virtiofsd")) {
        let io = fs::read_to_string(format!("/proc/{}/io", process.pid))?;
        let read = io.lines().find_map(|line| line.strip_prefix("rchar: ")).context("no rchar in /proc/PID/io")?;
        sum += read.parse::<usize>()?;
    }
    ensure!(sum > 0, "no virtiofsd below the shim: {below:#?}");
    Ok(sum)
}

/// Writes the mark at the file's start and leaves its size and mtime.
fn overwrite(path: &Path, mark: &str) -> Result<()> {
    let mut file = fs::File::options().write(true).open(path)?;
    let modified = file.metadata()?.modified()?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(mark.as_bytes())?;
    Ok(file.set_modified(modified)?)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn an_open_sees_what_the_host_has_written_and_unchanged_files_are_not_read_again() -> Result<()> {
    let containerd = Containerd::shared()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("data");
    fs::write(&path, vec![b'-'; SIZE])?;
    overwrite(&path, "first")?;
    let shared = format!("type=bind,src={},dst=/shared,options=rbind:rw", folder.path().display());
    let sysfs = "type=bind,src=/sys/kernel,dst=/host,options=rbind:ro";
    let container = containerd.detached(&["--mount", &shared, "--mount", sysfs], "pages", &["sleep", "1000"])?;
    let script = "wc -c </shared/data; head -c 6 /shared/data";
    let shown = || container.script(script);
    let expected = |mark: &str, size| format!("{size}\n{mark}-");
    ensure!(shown()? == expected("first", SIZE));

    // Not while the ctime is so recent that the next change could leave it as it is.
    let reads = || -> Result<usize> {
        let before = read_from_host(&container, containerd)?;
        let shown = container.script("cat /shared/data >/dev/null; cat /shared/data | tail -c 1")?;
        ensure!(shown == "-", "{shown}");
        Ok(read_from_host(&container, containerd)? - before)
    };
    let what = "opens of an unchanged file cause no reads";
    wait_for(Duration::from_secs(60), what, || reads().map(|read| (read < SIZE / 2).then_some(())).transpose())??;

    overwrite(&path, "later")?;
    ensure!(shown()? == expected("later", SIZE), "after a change that leaves size and mtime: {}", shown()?);
    // The container reads between two changes that follow each other closely.
    for mark in ["fast1", "fast2", "fast3"] {
        overwrite(&path, mark)?;
        ensure!(shown()? == expected(mark, SIZE), "after one of several changes in a row: {}", shown()?);
    }
    fs::File::options().append(true).open(&path)?.write_all(b"more")?;
    ensure!(shown()? == expected("fast3", SIZE + 4), "after the file has grown: {}", shown()?);
    fs::write(&path, "short-")?;
    ensure!(shown()? == expected("short", 6), "after the file has been truncated: {}", shown()?);
    // The container's own changes, and the host's after them.
    let shown = container.script("echo -n inner- >/shared/data; wc -c </shared/data; cat /shared/data")?;
    ensure!(shown == expected("inner", 6) && fs::read_to_string(&path)? == "inner-", "{shown}");
    overwrite(&path, "outer")?;
    ensure!(container.script(script)? == expected("outer", 6), "after changes on both sides");

    // sysfs generates its files when they are read, and leaves their times.
    let sequence = || -> Result<u64> { Ok(container.script("cat /host/uevent_seqnum")?.parse()?) };
    let before = sequence()?;
    ensure!(Command::new("unshare").args(["--net", "true"]).status()?.success());
    ensure!(sequence()? > before, "a file of the host's sysfs does not change");
    Ok(())
}
