//! Files: rootfs of both snapshotters, and host directories and files in a container.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::Runtime;
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;

/// `--mount` of a host path.
fn bind(source: &Path, destination: &str, options: &str) -> String {
    format!("type=bind,src={},dst={destination},options={options}", source.display())
}

/// Common operations on a rootfs. Prints a line for each that worked.
const COMMON_OPERATIONS: &str = r#"
cd /root
echo content > file && [ "$(cat file)" = content ] && echo write
echo more >> file && [ "$(wc -l < file)" = 2 ] && echo append
mkdir -p a/b/c && mv a/b/c a/d && rmdir a/b a/d a && echo folders
ln -s file soft && [ "$(readlink soft)" = file ] && cat soft > /dev/null && echo symlink
ln file hard && [ "$(stat -c %h file)" = 2 ] && echo hardlink
chmod 640 file && chown 1000:1001 file && [ "$(stat -c '%a %u %g' file)" = "640 1000 1001" ] && echo owner
touch -d '2020-01-02 03:04:05' file && [ "$(stat -c %Y file)" = 1577934245 ] && echo time
mkfifo pipe && [ -p pipe ] && echo fifo
exec 3<file && rm file hard && [ "$(cat <&3 | head -1)" = content ] && echo unlinked
mv /etc/group /etc/renamed && [ ! -e /etc/group ] && grep -q root /etc/renamed && echo lower-rename
rm /etc/renamed && [ ! -e /etc/renamed ] && echo lower-remove
rm -r /home && mkdir /home && [ -z "$(ls -A /home)" ] && echo opaque
dd if=/dev/urandom of=big bs=64k count=64 2>/dev/null && cp big copy && cmp big copy && echo big
for i in $(seq 300); do echo $i > many.$i; done && [ "$(ls | grep -c many)" = 300 ] && rm many.* && echo many
sync && echo sync
"#;

fn check_rootfs(flags: &[&str]) -> Result<()> {
    let containerd = Containerd::shared()?;
    let done = containerd.script(flags, "rootfs", COMMON_OPERATIONS)?;
    let expected = "write append folders symlink hardlink owner time fifo unlinked lower-rename lower-remove opaque big \
        many sync";
    ensure!(done.split_whitespace().eq(expected.split_whitespace()), "done: {done}\nexpected: {expected}");
    Ok(())
}

#[test]
fn an_overlayfs_rootfs_supports_common_operations() -> Result<()> {
    check_rootfs(&[])
}

#[test]
fn a_native_snapshotter_rootfs_supports_common_operations() -> Result<()> {
    check_rootfs(&["--snapshotter", "native"])
}

#[test]
fn a_containers_changes_do_not_appear_in_the_next_container() -> Result<()> {
    let containerd = Containerd::shared()?;
    containerd.script(&[], "first", "echo secret > /root/kept; rm /etc/passwd")?;
    let output = containerd.script(&[], "second", "ls /root; wc -l < /etc/passwd")?;
    ensure!(!output.contains("kept") && output.trim() != "0", "{output}");
    Ok(())
}

#[test]
fn a_host_directory_is_shared_both_ways() -> Result<()> {
    let containerd = Containerd::shared()?;
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("from-host"), "hello")?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    let script = "cat /data/from-host; echo answer > /data/from-guest; chown 1234:5678 /data/from-guest; \
        chmod 604 /data/from-guest; mkdir /data/folder; rm /data/from-host";
    let output = containerd.script(&["--mount", &bind(folder.path(), "/data", "rbind:rw")], "folder", script)?;
    ensure!(output == "hello", "{output}");
    let answer = folder.path().join("from-guest");
    let metadata = answer.metadata().context("the container's file is not on the host")?;
    ensure!(fs::read_to_string(answer)? == "answer\n" && metadata.mode() & 0o777 == 0o604, "{metadata:?}");
    ensure!((metadata.uid(), metadata.gid()) == (1234, 5678), "{metadata:?}");
    ensure!(folder.path().join("folder").is_dir() && !folder.path().join("from-host").exists());
    Ok(())
}

#[test]
fn a_large_host_file_is_read_and_written_completely() -> Result<()> {
    let containerd = Containerd::shared()?;
    let folder = tempfile::tempdir()?;
    let bytes: Vec<u8> = (0..24_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(folder.path().join("large"), &bytes)?;
    let script = "sha256sum < /data/large; cp /data/large /data/copy; sha256sum < /data/copy";
    let sums = containerd.script(&["--mount", &bind(folder.path(), "/data", "rbind:rw")], "large", script)?;
    let sums: Vec<&str> = sums.lines().collect();
    ensure!(sums.len() == 2 && sums[0] == sums[1], "{sums:?}");
    ensure!(fs::read(folder.path().join("copy"))? == bytes, "the copy differs on the host");
    Ok(())
}

#[test]
fn a_read_only_directory_rejects_every_kind_of_write() -> Result<()> {
    let containerd = Containerd::shared()?;
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("file"), "kept")?;
    let script = "touch /data/new; echo x > /data/file; rm /data/file; chmod 777 /data/file; \
        mount -o remount,rw /data && echo x > /data/file; cat /data/file";
    // The host enforces it, so even a container that may remount cannot write.
    let flags = ["--mount", &bind(folder.path(), "/data", "rbind:ro"), "--cap-add", "CAP_SYS_ADMIN"];
    let ran = containerd.run(&flags, &containerd.id("ro"), &["sh", "-c", script]).output()?;
    if containerd.runtime() == Runtime::Husk {
        ensure!(fs::read_to_string(folder.path().join("file"))? == "kept", "{ran}");
    }
    ensure!(ran.errors().matches("Read-only file system").count() >= 4, "{ran}");
    ensure!(!folder.path().join("new").exists(), "{ran}");
    Ok(())
}

#[test]
fn a_single_host_file_can_be_read_and_written() -> Result<()> {
    let containerd = Containerd::shared()?;
    let folder = tempfile::tempdir()?;
    let (file, fixed, neighbour) = (folder.path().join("file"), folder.path().join("ro"), folder.path().join("next"));
    fs::write(&file, "host\n")?;
    fs::write(&fixed, "fixed\n")?;
    fs::write(&neighbour, "unseen\n")?;
    let flags = ["--mount", &bind(&file, "/etc/mine", "rbind:rw"), "--mount", &bind(&fixed, "/new/ro", "rbind:ro")];
    let script = "cat /etc/mine /new/ro; echo guest >> /etc/mine; ls /new; echo x >> /new/ro";
    let ran = containerd.run(&flags, &containerd.id("file"), &["sh", "-c", script]).output()?;
    ensure!(ran.text() == "host\nfixed\nro", "{ran}");
    ensure!(ran.errors().contains("Read-only file system"), "{ran}");
    ensure!(fs::read_to_string(&file)? == "host\nguest\n" && fs::read_to_string(&fixed)? == "fixed\n");
    Ok(())
}

#[test]
fn a_tmpfs_mount_has_the_size_and_mode_of_the_spec() -> Result<()> {
    let containerd = Containerd::shared()?;
    let mount = "type=tmpfs,src=tmpfs,dst=/scratch,options=size=1m:mode=711";
    let script = "grep ' /scratch ' /proc/mounts; stat -c %a /scratch; \
        dd if=/dev/zero of=/scratch/x bs=64k count=40 2>/dev/null || echo full";
    let output = containerd.script(&["--mount", mount], "tmpfs", script)?;
    ensure!(output.starts_with("tmpfs /scratch tmpfs ") && output.contains("size=1024k"), "{output}");
    ensure!(output.ends_with("711\nfull"), "{output}");
    Ok(())
}

#[test]
fn an_exec_and_the_container_see_the_same_files() -> Result<()> {
    let containerd = Containerd::shared()?;
    let folder = tempfile::tempdir()?;
    let flags = ["--mount", &bind(folder.path(), "/data", "rbind:rw")];
    let container = containerd.detached(&flags, "same", &["sleep", "1000"])?;
    container.script("echo one > /root/file; echo two > /data/file")?;
    ensure!(container.script("cat /root/file /data/file")? == "one\ntwo");
    fs::write(folder.path().join("file"), "three\n")?;
    let fresh = || container.script("cat /data/file").ok().filter(|text| text == "three");
    wait_for(Duration::from_secs(60), "the host's change appears", fresh)?;
    Ok(())
}

/// Programs such as the kubelet look for a folder's filesystem by its device number, and would take the mount of a sandbox
/// that ends for it.
#[test]
#[cfg_attr(runc, ignore = "about husk's own mounts")]
fn a_sandbox_shows_on_the_host_no_filesystem_that_is_mounted_elsewhere() -> Result<()> {
    let containerd = Containerd::shared()?;
    let folder = tempfile::tempdir()?;
    let mount = bind(folder.path(), "/data", "rbind:rw");
    let running = containerd.detached(&["--mount", &mount], "devices", &["sleep", "1000"])?;
    let table = fs::read_to_string(format!("/proc/{}/mountinfo", containerd.pid()))?;
    let (mut own, mut others) = (BTreeSet::new(), BTreeSet::new());
    for line in table.lines() {
        // proc_pid_mountinfo(5): ID, parent, device, root, mount point.
        let fields: Vec<&str> = line.split(' ').collect();
        let of_husk = fields[4].starts_with("/run/husk/");
        if of_husk { &mut own } else { &mut others }.insert(fields[2].to_owned());
    }
    ensure!(!own.is_empty() && own.is_disjoint(&others), "of husk: {own:?}, others: {others:?}\n{table}");
    drop(running);
    Ok(())
}
