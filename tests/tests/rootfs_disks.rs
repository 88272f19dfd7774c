//! Root filesystems that are not folders of the host: images and devices, which the guest's kernel mounts. The host's
//! never does.

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::ttrpc::{self, Code};
use containerd_shim_protos::types::mount::Mount;
use husk_tests::artifacts::{Runtime, Version, repository};
use husk_tests::bundle::{Bundle, spec};
use husk_tests::command;
use husk_tests::containerd::{Containerd, Setup};
use husk_tests::leftovers::Leftovers;
use husk_tests::shim::{Shim, Streams, code};
use serde_json::json;

/// Deadline for a program of this machine.
const DEADLINE: Duration = Duration::from_secs(60);
/// The folder of the erofs snapshotter.
const EROFS: &str = "io.containerd.snapshotter.v1.erofs";
/// The annotation by which containers share a sandbox.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// Runs a shell script of this machine, with the programs of the tests.
fn sh(script: &str, arguments: &[&Path]) -> Result<String> {
    let mut command = Command::new("sh");
    command.args(["-ec", script, "sh"]).args(arguments);
    let path = std::env::var("PATH").unwrap_or_default();
    let cache = repository().join(".cache");
    command.env("PATH", format!("{0}/erofs:{0}/mkfs:/usr/sbin:/sbin:{path}", cache.display()));
    Ok(command::run(command, None, DEADLINE)?.ok()?.text())
}

/// A containerd with the snapshotters `blockfile`, whose files are in `folder`, and `erofs`, whose files are below
/// containerd's root: its mount manager creates images only there.
fn with_snapshotters(folder: &Path) -> Result<Containerd> {
    let scratch = folder.join("scratch");
    sh("truncate -s 48M \"$1\"; mkfs.ext4 -q -F \"$1\"", &[&scratch])?;
    let folder = folder.display();
    let config = format!(
        r#"
[plugins."io.containerd.snapshotter.v1.blockfile"]
root_path = "{folder}/blockfile"
scratch_file = "{folder}/scratch"
fs_type = "ext4"
[plugins."io.containerd.snapshotter.v1.erofs"]
default_size = "64MiB"
[plugins."io.containerd.service.v1.diff-service"]
default = ["erofs", "walking"]
"#
    );
    Containerd::with(Setup { version: Some(Version::V2_4), config, ..Setup::default() })
}

/// Mounts of the host, in containerd's mount namespace, of filesystems on images, and loop devices of files in `folder`.
fn host_uses(containerd: &Containerd, folder: &Path) -> Result<Vec<String>> {
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", containerd.pid()))?;
    let of_image = |line: &&str| line.contains(" - erofs ") || line.contains(" /dev/loop");
    let mut uses: Vec<String> = mounts.lines().filter(of_image).map(str::to_owned).collect();
    let loops = sh("losetup --list --noheadings --output NAME,BACK-FILE", &[])?;
    let folder = folder.to_str().context("a path in UTF-8")?;
    let of_test = |line: &&str| line.contains(folder) || line.contains(EROFS);
    uses.extend(loops.lines().filter(of_test).map(str::to_owned));
    Ok(uses)
}

/// What a user can see of a root filesystem. The second start of the container finds what the first one has written.
const WRITES: &str = r#"
    if [ -e /data ]; then cat /data; stat -c '%n %a %u:%g %F' /data /d /d/l; ls /d /gone 2>&1; exit 0; fi
    grep ' / ' /proc/mounts | cut -d' ' -f3
    ls -A /
    stat -c '%n %a %u:%g %F' / /bin /etc /tmp
    echo written > /data; chown 7:8 /data
    mkdir /d /gone; chmod 2755 /d; ln -s ../data /d/l; mknod /d/null c 1 3; rmdir /gone
    mv /d /e && mv /e /d
    rm -r /tmp && mkdir /tmp
    dd if=/dev/zero of=/zero bs=64k count=16 2>/dev/null; stat -c '%s' /zero
    sync; echo 0123456789 > /d/rename && mv /d/rename /d/renamed && cat /d/renamed
"#;

/// Runs a container with a snapshotter twice: the second time with what it has written.
fn written(containerd: &Containerd, runtime: Runtime, snapshotter: &str) -> Result<String> {
    let id = containerd.id(snapshotter);
    let container = containerd.adopt(&id);
    let flags = ["run", "--snapshotter", snapshotter, "--runtime", runtime.name(), containerd.image()];
    let first = containerd.ctr(flags).args([container.id(), "sh", "-c", WRITES]).ok()?.text();
    let second = containerd.ctr(["task", "start", container.id()]).ok()?.text();
    Ok(format!("{first}\n{second}"))
}

#[test]
#[cfg_attr(runc, ignore = "compares with runc itself")]
fn containers_on_images_behave_as_with_runc_and_the_host_mounts_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let containerd = with_snapshotters(folder.path())?;
    for snapshotter in ["blockfile", "erofs"] {
        // First: containerd itself unpacks the image, with the host's kernel.
        let runc = written(&containerd, Runtime::Runc, snapshotter).context("under runc")?;
        let before = Leftovers::now(&containerd);
        let husk = written(&containerd, Runtime::Husk, snapshotter).context("under husk")?;
        ensure!(husk == runc, "{snapshotter}:\nhusk:\n{husk}\nrunc:\n{runc}");
        ensure!(husk.contains("written\n/data 644 7:8 regular file"), "{husk}");
        // The folder of all sandboxes stays.
        before.expect_none_since_but(&containerd, |line| line == "folder /run/husk")?;
    }
    let flags = |snapshotter| ["--snapshotter", snapshotter];
    let block = containerd.detached(&flags("blockfile"), "block", &["sleep", "1000"])?;
    let erofs = containerd.detached(&flags("erofs"), "erofs", &["sleep", "1000"])?;
    // A second container of a sandbox: its disks are plugged in later.
    let pod = format!("{SANDBOX_ID}={}", erofs.id());
    let second =
        containerd.detached(&["--snapshotter", "erofs", "--annotation", &pod], "second", &["sleep", "1000"])?;
    for container in [&block, &erofs, &second] {
        ensure!(container.exec(&["sh", "-c", "echo x > /x; cat /x"]).ok()?.text() == "x");
    }
    ensure!(host_uses(&containerd, folder.path())?.is_empty(), "{:#?}", host_uses(&containerd, folder.path())?);
    for container in [&second, &erofs, &block] {
        container.kill_and_wait()?;
        container.delete_task()?;
    }
    // The guest has unmounted what containerd now reads.
    let check = "for image in \"$1\"/snapshots/* \"$2\"/snapshots/*/rwlayer.img; do
        e2fsck -fn \"$image\" >/dev/null 2>&1 && echo clean || echo \"$image\"; done";
    let erofs = containerd.path("/run/containerd/root").join(EROFS);
    let checked = sh(check, &[&folder.path().join("blockfile"), &erofs])?;
    // The image's layer, and each container's image.
    ensure!(checked.lines().filter(|line| *line == "clean").count() >= 4, "{checked}");
    ensure!(checked.lines().all(|line| line == "clean"), "{checked}");
    Ok(())
}

/// A folder with a static busybox, which becomes an image.
fn tree(folder: &Path) -> Result<PathBuf> {
    let root = folder.join("tree");
    for name in ["bin", "proc", "dev", "sys", "run", "tmp", "etc"] {
        fs::create_dir_all(root.join(name))?;
    }
    let busybox = sh("exec \"$1\"", &[&repository().join("rootfs/busybox")])?;
    fs::copy(&busybox, root.join("bin/busybox")).with_context(|| format!("copy {busybox}"))?;
    for applet in ["sh", "sleep", "cat", "ls", "true", "wc", "find", "sync"] {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    Ok(root)
}

fn mount(fs_type: &str, source: &Path, options: &[&str]) -> Mount {
    let options = options.iter().map(ToString::to_string).collect();
    Mount { type_: fs_type.into(), source: source.display().to_string(), options, ..Default::default() }
}

/// A root of erofs layers with a disk for changes, which husk creates.
fn layered(writable: &Path, layers: &[PathBuf]) -> Vec<Mount> {
    let size = ["X-containerd.mkfs.fs=ext4", "X-containerd.mkfs.size=16MiB", "rw", "loop"];
    let mut mounts = vec![mount("mkfs/ext4", writable, &size)];
    mounts.extend(layers.iter().map(|layer| mount("erofs", layer, &["ro", "loop"])));
    let lower = format!("lowerdir={{{{ overlay 1 {} }}}}", layers.len());
    let options = [
        "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
        "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
        "workdir={{ mount 0 }}/work",
        "upperdir={{ mount 0 }}/upper",
        &lower,
    ];
    mounts.push(mount("format/mkdir/overlay", Path::new("overlay"), &options));
    mounts
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn roots_on_xfs_and_btrfs_keep_what_a_container_writes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = tree(folder.path())?;
    // mkfs.xfs(8) copies files that a prototype names.
    let xfs = r#"cd "$1"; { echo boot; echo 0 0; echo d--755 0 0; cd tree
        for name in *; do
            echo "$name d--755 0 0"
            for file in $(ls "$name"); do
                if [ -h "$name/$file" ]; then echo "$file l--777 0 0 $(readlink "$name/$file")"
                else echo "$file ---755 0 0 $PWD/$name/$file"; fi
            done
            echo '$'
        done; echo '$'; } >proto; cd ..
        truncate -s 512M xfs; mkfs.xfs -q -p proto xfs
        mkdir roots; mv tree roots/sub; truncate -s 256M btrfs; mkfs.btrfs -q --rootdir roots --subvol rw:sub btrfs"#;
    sh(xfs, &[folder.path(), &base])?;
    let containerd = Containerd::shared_of(Version::V2_4)?;
    let script = "cat /kept 2>/dev/null; echo kept > /kept; cat /proc/mounts";
    for (fs_type, options, shown) in
        [("xfs", ["loop", "noatime"], " / xfs rw,noatime"), ("btrfs", ["loop", "subvol=sub"], ",subvol=/sub 0 0")]
    {
        for first in [true, false] {
            let id = containerd.id(fs_type);
            let mut shim = Shim::start(containerd, &id, &spec(&id, &["sh", "-c", script]))?;
            shim.bundle.rootfs = vec![mount(fs_type, &folder.path().join(fs_type), &options)];
            let (status, out, err) = shim.run().with_context(|| fs_type)?;
            ensure!(status == 0 && out.contains(shown), "{fs_type}: {status}\n{out}\n{err}");
            ensure!(out.starts_with("kept\n") != first, "{fs_type}, first {first}:\n{out}");
            shim.shutdown();
        }
    }
    Ok(())
}

/// Folders that containerd, and the test's own bundles, leave.
const OF_CONTAINERD: [&str; 3] = ["folder /run/husk", "folder /run/bundles", "folder /run/containerd/s"];

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_root_can_have_a_hundred_layers() -> Result<()> {
    const LAYERS: usize = 100;
    let folder = tempfile::tempdir()?;
    let base = tree(folder.path())?;
    let script = "mkfs.erofs --quiet \"$1/0\" \"$2\"; mkdir \"$1/layer\"; cd \"$1/layer\"
        for n in $(seq 1 99); do rm -f *; touch $n; echo $n > top; mkfs.erofs --quiet ../$n . ; done";
    sh(script, &[folder.path(), &base])?;
    // The uppermost first.
    let layers: Vec<PathBuf> = (0..LAYERS).rev().map(|n| folder.path().join(n.to_string())).collect();
    let containerd = &Containerd::start(Version::V2_4)?;
    // What every test of a shim leaves mounted.
    containerd.unpacked_image()?;
    let before = Leftovers::now(containerd);
    let id = containerd.id("layers");
    let script = "cat /top; find / -maxdepth 1 -name '[1-9]*' | wc -l; echo x > /1; cat /1 /proc/mounts";
    let mut shim = Shim::start(containerd, &id, &spec(&id, &["sh", "-c", script]))?;
    shim.bundle.rootfs = layered(&folder.path().join("changes"), &layers);
    let (status, out, err) = shim.run()?;
    ensure!(status == 0 && out.starts_with("99\n99\nx\noverlay / overlay rw"), "{status}\n{out}\n{err}");
    shim.shutdown();
    before.expect_none_since_but(containerd, |line| OF_CONTAINERD.contains(&line))
}

/// Changes an image.
type Mutation = fn(&fs::File) -> Result<()>;

/// Images that a kernel must not trust: superblocks with false sizes and counts, and rubbish in what they point to. Byte
/// offsets: Documentation/filesystems/ext4/super.rst, and erofs_super_block in fs/erofs/erofs_fs.h.
const HOSTILE: [(&str, &str, Mutation); 7] = [
    ("ext4", "more blocks than the disk has", |image| Ok(image.write_all_at(&[0xff; 4], 1024 + 4)?)),
    ("ext4", "blocks of 2^31 bytes", |image| Ok(image.write_all_at(&[21, 0, 0, 0], 1024 + 0x18)?)),
    ("ext4", "groups of no inodes", |image| Ok(image.write_all_at(&[0; 4], 1024 + 0x28)?)),
    ("ext4", "rubbish for group descriptors", |image| Ok(image.write_all_at(&[0xa5; 512], 2048)?)),
    ("ext4", "rubbish for folders and inodes", |image| rubbish(image, 64 << 10, 2 << 20)),
    ("erofs", "a root inode behind the end", |image| Ok(image.write_all_at(&[0xff; 2], 1024 + 14)?)),
    ("erofs", "rubbish for inodes", |image| rubbish(image, 1024 + 128, 8 << 10)),
];

/// Writes bytes that repeat with no power of two.
fn rubbish(image: &fs::File, from: u64, length: usize) -> Result<()> {
    let bytes: Vec<u8> = (0..length).map(|n| (n * 7 % 251) as u8).collect();
    Ok(image.write_all_at(&bytes, from)?)
}

/// How many superblocks of each filesystem are changed by chance.
const FUZZED: u64 = 12;

/// Changes a few bytes of a superblock, each seed in another way, and always in the same.
fn fuzz(image: &fs::File, fs_type: &str, seed: u64) -> Result<()> {
    let length = if fs_type == "erofs" { 128 } else { 1024 };
    // Marsaglia's xorshift64.
    let mut state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..1 + next() % 6 {
        // Not the magic number: the filesystem is to be recognized.
        let magic = if fs_type == "erofs" { 0..4 } else { 0x38..0x3a };
        let at = next() % length;
        if !magic.contains(&at) {
            image.write_all_at(&[next() as u8], 1024 + at)?;
        }
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_hostile_image_harms_only_its_own_vm() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = tree(folder.path())?;
    let images = "mkfs.erofs --quiet \"$1/erofs\" \"$2\"
        truncate -s 16M \"$1/ext4\"; mkfs.ext4 -q -F -b 1024 -d \"$2\" \"$1/ext4\"
        mkdir \"$1/links\"; ln -s / \"$1/links/upper\"; ln -s loop \"$1/links/loop\"; mkdir \"$1/links/work\"
        truncate -s 4M \"$1/link\"; mkfs.ext4 -q -F -d \"$1/links\" \"$1/link\"";
    sh(images, &[folder.path(), &base])?;
    let husk = format!("volume_dirs = [{:?}]\n", folder.path());
    let containerd = &Containerd::with(Setup { version: Some(Version::V2_4), husk, ..Setup::default() })?;
    let bystander = Shim::idle(containerd, "bystander")?;
    let before = Leftovers::now(containerd);

    // All in one sandbox, whose first container is well. If its VM dies, the next image gets another one.
    let mut victim = victim(containerd, folder.path())?;
    let fuzzed = (0..FUZZED).flat_map(|seed| ["ext4", "erofs"].map(|fs_type| (fs_type, format!("seed {seed}"), None)));
    let known = HOSTILE.into_iter().map(|(fs_type, what, mutate)| (fs_type, what.to_owned(), Some(mutate)));
    for (index, (fs_type, what, mutate)) in known.chain(fuzzed).enumerate() {
        let image = folder.path().join(format!("{fs_type}-{}", what.replace(' ', "-")));
        fs::copy(folder.path().join(fs_type), &image)?;
        let file = fs::OpenOptions::new().read(true).write(true).open(&image)?;
        match mutate {
            Some(mutate) => mutate(&file)?,
            None => fuzz(&file, fs_type, index as u64)?,
        }
        let created = create_beside(&victim, &[mount(fs_type, &image, &["loop", "rw"])], &[])?;
        eprintln!("{fs_type} with {what}: {created:?}");
        if fs_type == "ext4" {
            // The same as a volume, below a root that is well.
            let root = layered(&folder.path().join(format!("changes-{index}")), &[folder.path().join("erofs")]);
            let created = create_beside(&victim, &root, &[image])?;
            eprintln!("as a volume: {created:?}");
        }
        if victim.exec(&format!("alive-{index}"), &["true"]).is_err() {
            end(&victim)?;
            victim = self::victim(containerd, folder.path())?;
        }
    }
    // The link leads to the guest's own root, which the container would then write to.
    let mut mounts = layered(&folder.path().join("link"), &[folder.path().join("erofs")]);
    mounts[0] = mount("ext4", &folder.path().join("link"), &["rw", "loop"]);
    let created = create_beside(&victim, &mounts, &[])?;
    ensure!(format!("{created:?}").contains("on the disk at"), "{created:?}");

    ensure!(host_uses(containerd, folder.path())?.is_empty(), "{:#?}", host_uses(containerd, folder.path())?);
    ensure!(bystander.exec("alive", &["true"])?.0 == 0);
    end(&victim)?;
    before.expect_none_since(containerd)
}

/// A container that sleeps, whose root is an image in `folder`.
fn victim<'a>(containerd: &'a Containerd, folder: &Path) -> Result<Shim<'a>> {
    let id = containerd.id("victim");
    let image = folder.join(&id);
    fs::copy(folder.join("ext4"), &image)?;
    let mut shim = Shim::start(containerd, &id, &spec(&id, &["sleep", "1000"]))?;
    shim.bundle.rootfs = vec![mount("ext4", &image, &["loop", "rw"])];
    shim.run_detached()?;
    Ok(shim)
}

/// Ends a container, whose VM may be dead, and its shim.
fn end(shim: &Shim<'_>) -> Result<()> {
    // Fails if it has exited.
    let _ = shim.task.kill(&shim.bundle.id, "", 9);
    shim.task.wait(&shim.bundle.id, "")?;
    shim.task.delete(&shim.bundle.id, "")?;
    shim.shutdown();
    Ok(())
}

/// Creates a container with this root and these volumes in a shim's sandbox, and deletes it if that works.
fn create_beside(shim: &Shim<'_>, rootfs: &[Mount], volumes: &[PathBuf]) -> Result<ttrpc::Result<u32>> {
    let containerd = shim.containerd();
    let id = containerd.id("hostile");
    let mut spec = spec(&id, &["true"]);
    spec["annotations"] = json!({SANDBOX_ID: shim.bundle.id});
    let volumes: Vec<_> = volumes.iter().map(|image| json!({"source": image, "destination": "/volume"})).collect();
    spec["annotations"]["io.husk.volumes"] = json!(volumes).to_string().into();
    let bundle = Bundle::write(containerd, &id, &spec)?;
    let request = api::CreateTaskRequest {
        id: id.clone(),
        bundle: bundle.path.display().to_string(),
        rootfs: rootfs.to_vec(),
        ..Default::default()
    };
    let created: ttrpc::Result<api::CreateTaskResponse> = shim.task.call("Create", &request);
    if created.is_ok() {
        shim.task.delete(&id, "")?;
    }
    Ok(created.map(|response| response.pid))
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn an_unsupported_root_is_rejected_by_name_before_a_vm_boots() -> Result<()> {
    let containerd = Containerd::shared_of(Version::V2_4)?;
    let layer = mount("erofs", Path::new("/layer"), &["ro", "loop", "X-containerd.dmverity=/m"]);
    let journal = mount("ext4", Path::new("/image"), &["journal_path=/etc/shadow"]);
    for (rootfs, expected) in [
        (layer, "rootfs[0].options = \"X-containerd.dmverity=/m\": there is no /m"),
        (journal, "rootfs[0].options = \"journal_path=/etc/shadow\": is not supported for ext4 in the guest"),
    ] {
        let id = containerd.id("unsupported");
        let mut shim = Shim::start(containerd, &id, &spec(&id, &["true"]))?;
        shim.bundle.rootfs = vec![rootfs];
        let created: ttrpc::Result<api::CreateTaskResponse> =
            shim.task.call("Create", &shim.create_request(&Streams::default()));
        ensure!(code(&created) == Some(Code::INVALID_ARGUMENT), "{created:?}");
        ensure!(format!("{created:?}").replace('\\', "").contains(expected), "{created:?}");
        shim.shutdown();
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_block_device_is_a_root_that_the_host_cannot_mount_meanwhile() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = tree(folder.path())?;
    let image = folder.path().join("image");
    sh("truncate -s 16M \"$1\"; mkfs.ext4 -q -F -d \"$2\" \"$1\"", &[&image, &base])?;
    let device = Device(sh("losetup --find --show \"$1\"", &[&image])?);
    let containerd = Containerd::shared_of(Version::V2_4)?;
    let id = containerd.id("device");
    let mut shim = Shim::start(containerd, &id, &spec(&id, &["sleep", "1000"]))?;
    shim.bundle.rootfs = vec![mount("ext4", Path::new(&device.0), &["noatime"])];
    shim.run_detached()?;
    let script = "echo kept > /kept; sync; cat /kept; cat /proc/mounts";
    let shown = shim.script("write", script)?;
    ensure!(shown.starts_with("kept\n") && shown.contains(" / ext4 rw,noatime"), "{shown}");
    let mounted = sh("mount \"$1\" \"$2\" 2>&1 || true", &[Path::new(&device.0), &base])?;
    ensure!(mounted.contains("busy") || mounted.contains("already mounted"), "{mounted}");
    // A second VM.
    let other = containerd.id("other");
    let mut second = Shim::start(containerd, &other, &spec(&other, &["true"]))?;
    second.bundle.rootfs = shim.bundle.rootfs.clone();
    let error = second.create_error()?;
    ensure!(error.contains(&device.0), "{error}");
    second.shutdown();
    end(&shim)?;
    let kept = sh("mount -o ro \"$1\" \"$2\"; cat \"$2/kept\"; umount \"$2\"", &[Path::new(&device.0), &base])?;
    ensure!(kept == "kept", "{kept}");
    Ok(())
}

/// A loop device of this machine, which ends with the test.
struct Device(String);

impl Drop for Device {
    fn drop(&mut self) {
        let _ = sh("losetup --detach \"$1\"", &[Path::new(&self.0)]);
    }
}
