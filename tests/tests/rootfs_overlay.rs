//! Root filesystems of which the guest has an overlay (`rootfs = "overlay"`): what the host finds in the snapshot.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::Runtime;
use husk_tests::command::{self, wait_for};
use husk_tests::containerd::{Configured, Container, Containerd};
use husk_tests::leftovers::Leftovers;
use husk_tests::operator::{husk, husk_json};
use serde_json::{Value, json};

/// Deadline for the images of small layers.
const IMAGES: Duration = Duration::from_secs(60);

/// Everything that a program can do to files of an image and to its own.
const WRITES: &str = r#"
    grep ' / ' /proc/mounts | cut -d' ' -f3
    echo written > /data; chown 7:8 /data; chmod 4750 /data
    mkdir -p /d/e/f; chmod 2755 /d; ln -s ../data /d/l; mknod /d/null c 1 3; mkfifo /d/fifo
    ln /data /d/e/link; dd if=/dev/zero of=/sparse bs=1 count=1 seek=1048575 2>/dev/null
    rm /etc/group; rm -r /etc/gone /tmp && mkdir /tmp && echo new > /tmp/new
    rm /etc/replaced && mkdir /etc/replaced && touch /etc/replaced/file
    rm -r /var && echo file > /var
    echo more >> /etc/kept; chmod 700 /etc; ln -sf /elsewhere /etc/link
    mv /d/e /d/moved; touch -d '2001-02-03 04:05:06' /d/moved/f
    dd if=/dev/urandom of=/random bs=64k count=40 2>/dev/null; md5sum < /random > /sum"#;
/// What the first start prepares: files of an earlier task in the same snapshot, besides those of the image.
const FIRST: &str = "mkdir -p /etc/gone/deep /var/old /etc/replaced.d; echo x > /etc/gone/deep/file; \
    echo x > /etc/replaced; echo kept > /etc/kept; ln -s /there /etc/link; echo old > /tmp/old; echo first done";
/// Shows a snapshot as the host sees it. Times differ between runs, except those that are set.
const SHOW: &str = r#"mkdir -p /run/view; eval "$("$CTR" --namespace "$NS" snapshots mounts /run/view "$ID")"
    cd /run/view
    find . \( -type d -printf '%P %y %m %U:%G\n' -o -printf '%P %y %m %U:%G %l %n\n' \) | sort
    find . -type f -newermt '2001-01-01' ! -newermt '2002-01-01'
    for f in data var tmp/new etc/kept etc/hosts; do echo "$f: $(cat $f 2>&1)"; done
    stat -c '%n %s %b' sparse; stat -c %y d/moved/f
    [ "$(md5sum < random)" = "$(cat sum)" ] && echo whole
    cd /; umount /run/view"#;

struct Host {
    scratch: tempfile::TempDir,
    configured: Configured,
}

impl Host {
    fn start(lines: &str) -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let config = format!("scratch_dir = {:?}\n{lines}", scratch.path());
        Ok(Self { configured: Configured::start(&config)?, scratch })
    }

    fn containerd(&self) -> &Containerd {
        &self.configured.containerd
    }

    /// Nothing has a name there.
    fn expect_no_files(&self) -> Result<()> {
        let left: Vec<_> = fs::read_dir(self.scratch.path())?.collect::<std::io::Result<_>>()?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    }
}

/// The snapshot of a container, as the host sees it.
fn snapshot(containerd: &Containerd, id: &str) -> Result<String> {
    let mut show = containerd.enter("sh");
    show.args(["-c", SHOW]).env("CTR", containerd.bin().join("ctr")).env("NS", husk_tests::containerd::NAMESPACE);
    show.env("ID", id);
    Ok(command::run(show, None, Duration::from_secs(60))?.ok()?.text())
}

/// A container that has run once. Its next start finds what the first one has written.
fn create<'a>(containerd: &'a Containerd, runtime: Runtime, name: &str) -> Result<Container<'a>> {
    let container = containerd.adopt(&containerd.id(name));
    let script = format!("if [ -e /etc/kept ]; then {WRITES}\nelse {FIRST}; fi");
    let flags = ["run", "--runtime", runtime.name(), containerd.image(), container.id(), "sh", "-ec", &script];
    let first = containerd.ctr(flags).ok()?.text();
    ensure!(first == "first done", "{first}");
    Ok(container)
}

#[test]
#[cfg_attr(runc, ignore = "compares with runc itself")]
fn a_snapshot_has_what_the_container_has_written_as_with_runc() -> Result<()> {
    let host = Host::start("rootfs = \"overlay\"\n")?;
    let containerd = host.containerd();
    let seen = |runtime| -> Result<(String, String)> {
        let container = create(containerd, runtime, "writes")?;
        let printed = containerd.ctr(["task", "start", container.id()]).ok()?.text();
        ensure!(printed == "overlay", "{printed}");
        let changes = containerd.ctr(["snapshots", "diff", container.id()]).ok()?;
        let folder = tempfile::tempdir()?;
        let archive = folder.path().join("diff");
        fs::write(&archive, &changes.stdout)?;
        Ok((snapshot(containerd, container.id())?, listed(&archive)?))
    };
    let runc = seen(Runtime::Runc).context("under runc")?;
    let before = Leftovers::now(containerd);
    let husk = seen(Runtime::Husk).context("under husk")?;
    ensure!(husk.0 == runc.0, "husk:\n{}\nrunc:\n{}", husk.0, runc.0);
    ensure!(husk.0.ends_with("\nwhole") && husk.0.contains("data: written"), "{}", husk.0);
    ensure!(husk.1 == runc.1, "husk:\n{}\nrunc:\n{}", husk.1, runc.1);
    ensure!(husk.1.contains("etc/.wh.group"), "{}", husk.1);
    host.expect_no_files()?;
    before.expect_none_since_but(containerd, |line| line == "folder /run/husk")
}

/// The names in the archive of a difference, with owners, modes and kinds.
fn listed(archive: &Path) -> Result<String> {
    let mut tar = std::process::Command::new("tar");
    tar.args(["--list", "--verbose", "--numeric-owner", "--file"]).arg(archive);
    let text = command::run(tar, None, Duration::from_secs(60))?.ok()?.text();
    // Without sizes and times.
    let names = text.lines().map(|line| {
        let mut fields = line.split_whitespace();
        let kind = fields.by_ref().take(2).collect::<Vec<_>>().join(" ");
        format!("{kind} {}", fields.skip(3).collect::<Vec<_>>().join(" "))
    });
    let mut names: Vec<String> = names.collect();
    names.sort();
    Ok(names.join("\n"))
}

/// Runs a script in the snapshot of a running container. Mounted like by containerd, read-only: a second mount with the
/// same upper folder would break the first one.
fn seen_by_host(containerd: &Containerd, id: &str, script: &str) -> Result<String> {
    let (ctr, ns) = (containerd.bin().join("ctr"), husk_tests::containerd::NAMESPACE);
    let script = format!(
        "of() {{ {} --namespace {ns} snapshots mounts /x {id} | grep -o \"$1=[^, ]*\" | cut -d= -f2; }}
        mkdir -p /run/seen; mount -t overlay overlay /run/seen -o \"ro,lowerdir=$(of upperdir):$(of lowerdir)\" || exit 1
        cd /run/seen; {script}; cd /; umount /run/seen; rmdir /run/seen",
        ctr.display()
    );
    Ok(containerd.sh(&script)?.text())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_paused_containers_snapshot_is_complete_and_a_full_disk_or_a_dead_vm_is_reported() -> Result<()> {
    let host = Host::start("rootfs = \"overlay\"\noverlay_mib = 32\n")?;
    let containerd = host.containerd();
    // The first container creates directories of containerd that remain.
    containerd.run(&[], &containerd.id("first"), &["true"]).ok()?;
    let before = Leftovers::now(containerd);
    let container = containerd.detached(&[], "paused", &["sleep", "1000"])?;
    let status = husk_json(containerd, &["status", "--json", container.id()])?;
    ensure!(status["roots"][0]["kind"] == "overlay" && status["disks"][0]["serial"] == "overlay-1", "{status}");
    let page = husk(containerd, &["status", container.id()])?.ok()?.text();
    ensure!(page.contains(&format!("root        of {}: overlay (configured)", container.id())), "{page}");

    container.script("mkdir -p /a/b; echo one > /a/b/f; echo one > /g; rm -r /etc")?;
    let view = |script: &str| seen_by_host(containerd, container.id(), script);
    let seen = view("ls -d a g etc 2>&1 | cut -c1-9")?;
    ensure!(seen.contains("etc") && !seen.contains("\na"), "written only to the disk: {seen}");
    for (change, expected) in
        [("true", "one one no"), ("rm -r /a/b; mkdir /a/c; echo two > /g; mkdir /etc", "no two yes")]
    {
        container.script(change)?;
        containerd.ctr(["task", "pause", container.id()]).ok()?;
        let shown = "echo $(cat a/b/f 2>/dev/null || echo no) $(cat g) $([ -d etc ] && echo yes || echo no)";
        let seen = view(shown)?;
        ensure!(seen == expected, "{change}: {seen}");
        containerd.ctr(["task", "resume", container.id()]).ok()?;
    }
    // The disk has a size. The container goes on, and everything that fits is kept.
    let filled = container
        .script("dd if=/dev/zero of=/fill bs=1M 2>&1 | grep -o 'No space left'; rm /fill; echo kept > /kept")?;
    ensure!(filled == "No space left", "{filled}");
    containerd.ctr(["task", "pause", container.id()]).ok()?;
    ensure!(view("cat kept; ls fill 2>&1 | grep -c 'No such'")? == "kept\n1");
    containerd.ctr(["task", "resume", container.id()]).ok()?;

    // What the VM has not copied dies with it, and the log says so. The rest is there, and the container starts again.
    container.script("echo lost > /lost")?;
    containerd.qemu_of(container.id())?.kill();
    container.await_status("STOPPED")?;
    containerd.await_logged("changes of the container's root filesystem are lost", 1)?;
    container.delete_task()?;
    ensure!(view("cat kept; ls lost 2>&1 | grep -c 'No such'")? == "kept\n1");
    host.expect_no_files()?;
    containerd.ctr(["task", "start", "--detach", container.id()]).ok()?;
    ensure!(container.script("cat /kept; ls /a")? == "kept\nc");
    container.kill_and_wait()?;
    container.delete_task()?;
    host.expect_no_files()?;
    before.expect_none_since_but(containerd, |line| line == "folder /run/husk")
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn auto_uses_an_overlay_for_a_container_of_kubernetes_only_and_images_when_there_are_some() -> Result<()> {
    let store = tempfile::tempdir()?;
    // The program that makes images waits for this lock: there are none as long as the test has it.
    let lock = fs::File::create(store.path().join("lock"))?;
    lock.lock()?;
    let host = Host::start(&format!("rootfs = \"auto\"\nlayer_cache_dir = {:?}\n", store.path()))?;
    let containerd = host.containerd();
    let alone = containerd.detached(&[], "alone", &["sleep", "1000"])?;
    let status = husk_json(containerd, &["status", "--json", alone.id()])?;
    ensure!(status["roots"][0]["kind"] == "virtiofs", "{status}");
    // A pod's containers, and one that may not write.
    let pod = format!("io.kubernetes.cri.sandbox-id={}", alone.id());
    let of_pod = ["--annotation", &pod, "--annotation", "io.kubernetes.cri.container-type=container"];
    let first = containerd.detached(&of_pod, "first", &["sleep", "1000"]);
    // The VM of a container without a pod may lack a controller for disks.
    ensure!(first.is_err_and(|error| format!("{error:#}").contains("disk")));
    let sandbox = containerd.id("pod");
    let pod = format!("io.kubernetes.cri.sandbox-id={sandbox}");
    let of_pod = ["--annotation", &pod, "--annotation", "io.kubernetes.cri.container-type=container"];
    let writes = containerd.detached(&of_pod, "writes", &["sleep", "1000"])?;
    let read_only = [&of_pod[..], &["--read-only"]].concat();
    let reads = containerd.detached(&read_only, "reads", &["sleep", "1000"])?;
    let chosen = [&of_pod[..], &["--annotation", "io.husk.rootfs=virtiofs"]].concat();
    let shares = containerd.detached(&chosen, "shares", &["sleep", "1000"])?;
    let root_of = |container: &Container<'_>| -> Result<Value> {
        let status = husk_json(containerd, &["status", "--json", &sandbox])?;
        let mut roots = status["roots"].as_array().into_iter().flatten();
        roots.find(|root| root["container"] == container.id()).cloned().with_context(|| status.to_string())
    };
    for (container, kind, reason) in [
        (&writes, "overlay", "the images of its layers are made in the background"),
        // The disk is for places of mounts.
        (&reads, "overlay", "the images of its layers are made in the background"),
        (&shares, "virtiofs", "configured"),
    ] {
        let root = root_of(container)?;
        ensure!(root["kind"] == kind && root["reason"] == reason, "{root}");
    }
    drop(lock);
    // The next container that needs images has them made.
    let again = containerd.detached(&of_pod, "again", &["sleep", "1000"])?;
    again.kill_and_wait()?;
    again.delete_task()?;
    wait_for(IMAGES, "both layers of the image have images", || {
        let layers = husk_json(containerd, &["layers", "--json"]).ok()?;
        (layers["images"].as_array()?.len() == 2).then_some(())
    })?;
    let later = containerd.detached(&of_pod, "later", &["sleep", "1000"])?;
    let (root, reason) = (root_of(&later)?, "auto: Kubernetes uses a snapshot for one start only");
    ensure!(root["kind"] == "erofs" && root["reason"] == reason, "{root}");
    let on_images = containerd.detached(&read_only, "on-images", &["sleep", "1000"])?;
    let root = root_of(&on_images)?;
    ensure!(root["kind"] == "erofs", "{root}");
    ensure!(on_images.script("ls /etc/passwd; echo x > /x || echo no")?.ends_with("/etc/passwd\nno"));
    on_images.kill_and_wait()?;
    on_images.delete_task()?;
    // Without images, the guest would read the same files through an overlay.
    let chosen = [&read_only[..], &["--annotation", "io.husk.rootfs=overlay"]].concat();
    let shared = containerd.detached(&chosen, "shared", &["sleep", "1000"])?;
    let root = root_of(&shared)?;
    ensure!(root["kind"] == "virtiofs" && root["reason"] == "the root is read-only", "{root}");
    later.script("echo x > /x")?;
    later.kill_and_wait()?;
    later.delete_task()?;
    // Another container's disk is its own, and ends with it.
    writes.script("echo x > /x")?;
    writes.kill_and_wait()?;
    writes.delete_task()?;
    let status = husk_json(containerd, &["status", "--json", &sandbox])?;
    let left = status["disks"].as_array().into_iter().flatten();
    ensure!(left.into_iter().all(|disk| disk["containers"] == json!([reads.id()])), "{status}");
    ensure!(reads.script("echo x > /x || echo no")?.ends_with("no"));
    Ok(())
}
