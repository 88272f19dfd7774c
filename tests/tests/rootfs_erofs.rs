//! Root filesystems whose lower layers are images that VMs share. What the images contain is in `layers.rs`.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use containerd_shim_protos::types::mount::Mount;
use husk_tests::artifacts::{Runtime, repository};
use husk_tests::bundle::spec;
use husk_tests::command::{self, wait_for};
use husk_tests::containerd::{Containerd, Setup};
use husk_tests::operator::husk_json;
use husk_tests::shim::Shim;
use serde_json::{Value, json};

/// Deadline for a program of this machine, and for the images of small layers.
const DEADLINE: Duration = Duration::from_secs(60);

fn sh(folder: &Path, script: &str) -> Result<String> {
    let mut command = Command::new("bash");
    command.args(["-ec", script]).current_dir(folder);
    Ok(command::run(command, None, DEADLINE)?.ok()?.text())
}

/// A daemon whose containers have images, and a snapshotter's folder with three layers.
struct Host {
    folder: tempfile::TempDir,
    containerd: Containerd,
    snapshots: AtomicU32,
}

impl Host {
    fn new(runtime: Runtime) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        // The guest's processes have other users.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let husk = format!("rootfs = \"erofs\"\nlayer_cache_dir = {:?}\n", folder.path().join("store"));
        let containerd = Containerd::with(Setup { husk, runtime: Some(runtime), ..Setup::default() })?;
        fs::create_dir(folder.path().join("snapshots"))?;
        fs::write(folder.path().join("metadata.db"), "")?;
        let host = Self { folder, containerd, snapshots: AtomicU32::new(100) };
        let base = host.layer(1)?;
        tree(&base)?;
        sh(
            &base,
            "mkdir -p opaque gone data; echo old >opaque/old; echo y >gone/y; echo z >z; echo kept >data/kept; ln data/kept data/link",
        )?;
        let middle = host.layer(2)?;
        let opaque = r#"python3 -c 'import os; os.setxattr("opaque", "trusted.overlay.opaque", b"y")'"#;
        sh(&middle, &format!("mkdir opaque; {opaque}; echo new >opaque/new; mknod gone c 0 0; chown 7:8 opaque/new"))?;
        sh(&host.layer(3)?, "mknod z c 0 0; mkdir data; echo top >data/top")?;
        Ok(host)
    }

    fn layer(&self, number: u32) -> Result<PathBuf> {
        let layer = self.folder.path().join(format!("snapshots/{number}/fs"));
        fs::create_dir_all(&layer)?;
        Ok(layer)
    }

    /// A new snapshot on the layers, as containerd mounts it.
    fn snapshot(&self) -> Result<Vec<Mount>> {
        let upper = self.layer(self.snapshots.fetch_add(1, Ordering::Relaxed))?;
        let work = upper.with_file_name("work");
        fs::create_dir_all(&work)?;
        let at = |number| self.layer(number).map(|path| path.display().to_string());
        let options = vec![
            "index=off".to_owned(),
            format!("workdir={}", work.display()),
            format!("upperdir={}", upper.display()),
            format!("lowerdir={}:{}:{}", at(3)?, at(2)?, at(1)?),
        ];
        Ok(vec![Mount { type_: "overlay".into(), source: "overlay".into(), options, ..Default::default() }])
    }

    /// Starts a container that sleeps on a snapshot.
    fn sleeping(&self, name: &str, rootfs: Vec<Mount>) -> Result<Shim<'_>> {
        let id = self.containerd.id(name);
        let mut shim = Shim::start(&self.containerd, &id, &spec(&id, &["sleep", "1000"]))?;
        shim.bundle.rootfs = rootfs;
        shim.run_detached()?;
        Ok(shim)
    }

    /// How a container has its root.
    fn root_of(&self, shim: &Shim<'_>) -> Result<String> {
        let status = husk_json(&self.containerd, &["status", &shim.bundle.id, "--json"])?;
        let root = &status["roots"][0];
        Ok(format!("{} {}", root["kind"].as_str().context("no kind")?, root["reason"].as_str().context("no reason")?))
    }

    fn images(&self) -> Result<Vec<Value>> {
        let listed = husk_json(&self.containerd, &["layers", "--json"])?;
        Ok(listed["images"].as_array().with_context(|| format!("{listed}"))?.clone())
    }

    /// Waits for images of all layers.
    fn await_images(&self) -> Result<()> {
        wait_for(DEADLINE, "the layers have images", || (self.images().ok()?.len() == 3).then_some(()))
            .with_context(|| self.log())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("store/builder.log")).unwrap_or_default()
    }
}

/// A static busybox and its programs.
fn tree(root: &Path) -> Result<()> {
    for name in ["bin", "proc", "dev", "sys", "run", "tmp", "etc"] {
        fs::create_dir(root.join(name))?;
    }
    let busybox = sh(root, &format!("exec {:?}", repository().join("rootfs/busybox").display().to_string()))?;
    fs::copy(&busybox, root.join("bin/busybox")).with_context(|| format!("copy {busybox}"))?;
    for applet in [
        "sh", "sleep", "cat", "ls", "true", "find", "stat", "sort", "rm", "mkdir", "mv", "ln", "chown", "head",
        "md5sum",
    ] {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    Ok(())
}

/// What programs see, change, and see then.
const PROGRAM: &str =
    "look() { find / -xdev \\( -path /proc -o -path /sys -o -path /dev -o -path /run \\) -prune -o -print | sort |
        while read -r f; do stat -c '%n %A %u:%g %h %s %F' \"$f\" | sed 's/ [0-9]* directory/ directory/'; done; }
    look; cat /opaque/new /data/top /data/kept; stat -c %a /
    echo more >> /data/kept; cat /data/kept /data/link; rm -r /opaque; mkdir /opaque; mv /data /moved; ln /moved/top /t
    rm /bin/head; echo x >/new; look";

/// What the snapshot has then, on the host. Folders of an overlay have links as overlayfs likes.
const UPPER: &str = "find . \\( -type d -printf '%P %y %m %U:%G\\n' -o -printf '%P %y %m %U:%G %n\\n' \\) | sort
    cat moved/kept moved/link";

#[test]
#[cfg_attr(runc, ignore = "compares with runc itself")]
fn a_container_on_images_behaves_as_with_runc_and_the_first_one_does_not_wait() -> Result<()> {
    let run = |host: &Host, name: &str| {
        let id = host.containerd.id(name);
        let mut shim = Shim::start(&host.containerd, &id, &spec(&id, &["sh", "-c", PROGRAM]))?;
        shim.bundle.rootfs = host.snapshot()?;
        let (status, out, err) = shim.run()?;
        let merged = format!(
            "mkdir merged; mount -t overlay -o {} overlay merged; cd merged; {UPPER}",
            shim.bundle.rootfs[0].options.join(",")
        );
        let upper = sh(
            tempfile::tempdir()?.path(),
            &format!("exec unshare --mount bash -ec '{}'", merged.replace('\'', "'\\''")),
        )?;
        Ok::<_, anyhow::Error>((status, format!("{out}\n{err}\n{upper}")))
    };
    let runc = run(&Host::new(Runtime::Runc)?, "runc")?;
    ensure!(runc.0 == 0 && runc.1.contains("/new"), "{runc:?}");
    let host = Host::new(Runtime::Husk)?;
    let first = host.sleeping("first", host.snapshot()?)?;
    let root = host.root_of(&first)?;
    ensure!(root.contains("made in the background"), "{root}");
    host.await_images()?;
    ensure!(host.log().matches("the layer has an image").count() == 3, "{}", host.log());
    let husk = run(&host, "husk")?;
    ensure!(husk == runc, "husk:\n{}\nrunc:\n{}", husk.1, runc.1);
    let second = host.sleeping("second", host.snapshot()?)?;
    let root = host.root_of(&second)?;
    ensure!(root.starts_with("erofs "), "{root}");
    let mounts = second.script("mounts", "cat /proc/mounts")?;
    ensure!(mounts.contains("overlay / overlay rw"), "{mounts}");
    // Two VMs have the same images.
    let third = host.sleeping("third", host.snapshot()?)?;
    let images = host.images()?;
    ensure!(images.iter().all(|image| image["in_use"] == true), "{images:?}");
    let inodes = |shim: &Shim<'_>| -> Result<Vec<u64>> {
        let qemu = host.containerd.qemu_of(&shim.bundle.id)?;
        let links = fs::read_dir(format!("/proc/{}/fd", qemu.pid))?.filter_map(|fd| fs::metadata(fd.ok()?.path()).ok());
        let mut inodes: Vec<u64> = links.map(|metadata| metadata.ino()).collect();
        inodes.sort_unstable();
        Ok(inodes)
    };
    let stored = fs::read_dir(host.folder.path().join("store/images"))?.filter_map(|entry| entry.ok()?.metadata().ok());
    let shared = stored.filter(|file| file.len() > 4096).map(|file| file.ino()).collect::<Vec<_>>();
    for shim in [&second, &third] {
        let open = inodes(shim)?;
        ensure!(!shared.is_empty() && shared.iter().all(|inode| open.contains(inode)), "{shared:?} {open:?}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_damaged_image_and_a_changed_layer_are_never_used() -> Result<()> {
    let host = Host::new(Runtime::Husk)?;
    drop(host.sleeping("first", host.snapshot()?)?);
    host.await_images()?;
    // Two shims at once want what is missing now.
    sh(&host.layer(1)?, "echo changed >etc/changed; touch -d @1 .")?;
    let [one, other] = std::thread::scope(|scope| {
        let start = |name: &'static str| {
            let rootfs = host.snapshot();
            let host = &host;
            scope.spawn(move || host.sleeping(name, rootfs?))
        };
        [start("one"), start("other")].map(|started| started.join().map_err(|_| anyhow!("a thread panicked"))?)
    });
    let (one, other) = (one?, other?);
    for shim in [&one, &other] {
        ensure!(shim.script("cat", "cat /etc/changed")? == "changed", "{}", host.root_of(shim)?);
    }
    wait_for(DEADLINE, "the changed layer has an image", || (host.images().ok()?.len() == 4).then_some(()))
        .with_context(|| host.log())?;
    let changed = host.sleeping("changed", host.snapshot()?)?;
    let shown = changed.script("cat", "cat /etc/changed")?;
    ensure!(host.root_of(&changed)?.starts_with("erofs ") && shown == "changed", "{shown}");
    drop((one, other, changed));
    // A superblock that no kernel accepts, behind a stamp that fits.
    let images = host.images()?;
    for image in &images {
        let digest = image["digest"].as_str().context("no digest")?;
        let path = host.folder.path().join(format!("store/images/{digest}.erofs"));
        fs::OpenOptions::new().write(true).open(&path)?.write_all_at(&[0xff; 64], 1024)?;
        let metadata = path.metadata()?;
        let stamp = path.with_extension("json");
        let mut text: Value = serde_json::from_slice(&fs::read(&stamp)?)?;
        text["changed"] = json!([metadata.ctime(), metadata.ctime_nsec()]);
        fs::write(&stamp, text.to_string())?;
    }
    let damaged = host.sleeping("damaged", host.snapshot()?)?;
    let root = host.root_of(&damaged)?;
    ensure!(root.contains("cannot use the image"), "{root}");
    ensure!(damaged.script("cat", "cat /etc/changed /data/top")? == "changed\ntop");
    wait_for(DEADLINE, "a damaged image is made again", || host.log().contains("made again").then_some(()))
        .with_context(|| host.log())?;
    Ok(())
}

/// No image has a trace of a file that the container has created, and removes.
#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn what_a_container_removes_after_a_pause_is_not_in_its_snapshot() -> Result<()> {
    let host = Host::new(Runtime::Husk)?;
    drop(host.sleeping("first", host.snapshot()?)?);
    host.await_images()?;
    let rootfs = host.snapshot()?;
    let upper = rootfs[0].options.iter().find_map(|option| option.strip_prefix("upperdir=")).context("no upper")?;
    let upper = PathBuf::from(upper);
    let shim = host.sleeping("paused", rootfs)?;
    ensure!(host.root_of(&shim)?.starts_with("erofs "), "{}", host.root_of(&shim)?);
    // Without anything to copy, and with something.
    for (change, expected) in [
        ("true", ""),
        ("echo a >/a; echo b >/etc/b; mkdir -p /d/e; echo f >/d/e/f", "./a ./d/e/f ./etc/b"),
        ("rm /a; mv /etc/b /etc/c; rm -r /d; mkdir -p /d/e; echo g >/d/e/g", "./d/e/g ./etc/c"),
    ] {
        shim.script("change", change)?;
        shim.task.pause(&shim.bundle.id)?;
        let files = sh(&upper, "echo $(find . -type f | sort)")?;
        ensure!(files == expected, "{change}: {files:?}, not {expected:?}");
        shim.task.resume(&shim.bundle.id)?;
    }
    shim.script("last", "rm -r /d /etc/c; echo z >/z")?;
    shim.remove()?;
    let files = sh(&upper, "echo $(find . -type f | sort) $(find . -type c)")?;
    ensure!(files == "./z", "{files:?}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_root_of_a_hundred_layers_is_a_hundred_disks() -> Result<()> {
    const LAYERS: u32 = 100;
    let host = Host::new(Runtime::Husk)?;
    let mut lower = vec![host.layer(1)?.display().to_string()];
    for number in 1000..1000 + LAYERS - 1 {
        let layer = host.layer(number)?;
        fs::write(layer.join(format!("of-{number}")), number.to_string())?;
        fs::write(layer.join("top"), format!("{number}\n"))?;
        lower.insert(0, layer.display().to_string());
    }
    let snapshot = || -> Result<Vec<Mount>> {
        let mut mounts = host.snapshot()?;
        mounts[0].options.retain(|option| !option.starts_with("lowerdir="));
        mounts[0].options.push(format!("lowerdir={}", lower.join(":")));
        Ok(mounts)
    };
    drop(host.sleeping("first", snapshot()?)?);
    wait_for(DEADLINE, "all layers have images", || (host.images().ok()?.len() == LAYERS as usize).then_some(()))
        .with_context(|| host.log())?;
    let shim = host.sleeping("hundred", snapshot()?)?;
    ensure!(host.root_of(&shim)?.starts_with("erofs "), "{}", host.root_of(&shim)?);
    let top = (999 + LAYERS - 1).to_string();
    let shown = shim.script("look", "cat /top; ls / | grep -c of-; echo x >/top; cat /top")?;
    ensure!(shown == format!("{top}\n{}\nx", LAYERS - 1), "{shown}");
    shim.remove()?;
    Ok(())
}
