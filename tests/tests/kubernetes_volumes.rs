//! Volumes as the kubelet makes them, compared with runc: updates that programs notice, mounts that appear later, and
//! every kind of source.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::Runtime;
use husk_tests::bundle;
use husk_tests::command::wait_for;
use husk_tests::compare::same;
use husk_tests::containerd::Containerd;
use husk_tests::fifo;
use husk_tests::operator::{husk, husk_json};
use husk_tests::shim::Shim;
use husk_tests::vm::guest_program;
use serde_json::{Value, json};

/// Deadline for what takes a moment in an emulated VM.
const SOON: Duration = Duration::from_secs(60);
const SLEEP: [&str; 2] = ["sleep", "1000"];

fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    let options = [&["rbind"][..], options].concat();
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

/// A config map as the kubelet keeps it: a link that leads to the folder with the present contents.
struct ConfigMap(PathBuf);

impl ConfigMap {
    fn create(below: &Path) -> Result<Self> {
        let folder = below.join("pods/0a-1b/volumes/kubernetes.io~configmap/settings");
        fs::create_dir_all(&folder)?;
        let map = Self(folder);
        map.update("1", "old")?;
        symlink("..data/key", map.0.join("key"))?;
        Ok(map)
    }

    /// Writes new contents next to the present ones, replaces the link, and removes what it led to before
    /// (kubernetes, pkg/volume/util/atomic_writer.go).
    fn update(&self, version: &str, text: &str) -> Result<()> {
        let before = fs::read_link(self.0.join("..data")).ok();
        let name = format!("..2026_11_27_{version}");
        let folder = self.0.join(&name);
        fs::DirBuilder::new().mode(0o700).create(&folder)?;
        fs::set_permissions(&folder, Permissions::from_mode(0o755))?;
        fs::create_dir(folder.join("deep"))?;
        fs::write(folder.join("key"), text)?;
        fs::write(folder.join("deep/key"), text)?;
        symlink(&name, self.0.join("..data_tmp"))?;
        fs::rename(self.0.join("..data_tmp"), self.0.join("..data"))?;
        match before {
            Some(before) => fs::remove_dir_all(self.0.join(before)).context("remove the old contents"),
            None => Ok(()),
        }
    }
}

/// Reads lines until each of `last` has come.
fn lines_until(output: &mut fifo::Reader, last: &[&str]) -> Result<Vec<String>> {
    let mut lines: Vec<String> = Vec::new();
    while !last.iter().all(|last| lines.iter().any(|line| line == last)) {
        let line = output.read_until("\n", SOON).with_context(|| format!("after {lines:#?}"))?;
        lines.push(line.trim_end().to_owned());
    }
    Ok(lines)
}

/// The lines of each path in their order: events of different watches may come in another order. Without the contents of
/// the old folder: husk reports the end of the folder and of its watched files only.
fn by_path(lines: &[String]) -> String {
    let mut sorted: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (path, event) in lines.iter().filter_map(|line| line.split_once(": ")) {
        let of_path = sorted.entry(path).or_default();
        // The kernel merges equal events, unless the program has read the first one.
        if (path != "/config/..data" || !event.starts_with("delete ")) && of_path.last() != Some(&event) {
            of_path.push(event);
        }
    }
    format!("{sorted:#?}")
}

/// Starts `watching` in a container, and waits until it does.
fn watching(shim: &Shim<'_>, name: &str, paths: &[&str]) -> Result<fifo::Reader> {
    let (io, mut output, _errors) = shim.streams(name)?;
    shim.start_exec(name, &bundle::process(&[&["/watching"][..], paths].concat()), &io)?;
    output.read_until("ready\n", SOON)?;
    Ok(output)
}

/// What a program in a container notices of changes by the host.
fn noticed(containerd: &'static Containerd) -> Result<String> {
    let base = tempfile::tempdir()?;
    let map = ConfigMap::create(base.path())?;
    let (own, file) = (base.path().join("own"), base.path().join("app.conf"));
    fs::create_dir(&own)?;
    fs::write(&file, "old")?;
    let id = containerd.id("watches");
    let mut spec = bundle::spec(&id, &SLEEP);
    spec["annotations"] = json!({"io.husk.watch": "/own,/etc/app.conf"});
    let mounts = [
        bind(&guest_program("watching")?, "/watching", &["rprivate", "ro"]),
        bind(&map.0, "/config", &["rprivate", "ro"]),
        bind(&own, "/own", &["rprivate", "ro"]),
        bind(&file, "/etc/app.conf", &["rprivate", "ro"]),
    ];
    bundle::append(&mut spec, "/mounts", mounts);
    let shim = Shim::running(containerd, &id, &spec)?;

    let mut output = watching(&shim, "map", &["/config", "/config/..data", "/config/..data/deep/key", "/config/key"])?;
    map.update("2", "new")?;
    let ended = ["/config/..data: watch ended", "/config/..data/deep/key: watch ended", "/config/key: watch ended"];
    let mut lines = lines_until(&mut output, &ended)?;
    fs::write(map.0.join("..end"), "")?;
    lines.extend(lines_until(&mut output, &["/config: create ..end"])?);
    let mut seen = by_path(&lines);
    seen += &shim.script("read", "cat /config/key /config/..data/deep/key; ls -a /config")?;

    let mut output = watching(&shim, "own", &["/own", "/etc/app.conf"])?;
    OpenOptions::new().write(true).truncate(true).open(&file)?.write_all(b"new")?;
    fs::set_permissions(&file, Permissions::from_mode(0o600))?;
    let mut lines = lines_until(&mut output, &["/etc/app.conf: attributes"])?;
    fs::write(own.join("a"), "text")?;
    fs::rename(own.join("a"), own.join("b"))?;
    fs::create_dir(own.join("folder"))?;
    fs::remove_file(own.join("b"))?;
    fs::write(own.join("..end"), "")?;
    lines.extend(lines_until(&mut output, &["/own: create ..end"])?);
    seen += &by_path(&lines);
    seen += &shim.script("again", "cat /etc/app.conf; ls -a /own")?;
    if containerd.runtime() == Runtime::Husk {
        check_status(containerd, &id, &map.0)?;
    }
    Ok(seen)
}

fn check_status(containerd: &Containerd, id: &str, map: &Path) -> Result<()> {
    let status = husk_json(containerd, &["status", id, "--json"])?;
    let volumes = status["watches"]["volumes"].as_array().with_context(|| format!("no watches in {status}"))?;
    ensure!(volumes.len() == 3 && status["watches"]["overflows"] == 0, "{volumes:#?}");
    for volume in volumes {
        ensure!(volume["lost"] == 0 && volume["reported"] != 0 && volume.get("problem").is_none(), "{volumes:#?}");
    }
    let page = husk(containerd, &["status", id])?.ok()?.text();
    ensure!(page.contains(&format!("watched     {}: ", map.display())), "{page}");
    Ok(())
}

#[test]
fn a_program_notices_updates_of_a_config_map_and_of_watched_files() -> Result<()> {
    let seen = same(noticed)?;
    for expected in ["read\": [\n        \"new\"", "moved to ..data", "\"deleted\"", "written"] {
        ensure!(seen.contains(expected), "{expected}\n{seen}");
    }
    Ok(())
}

/// Mounts of the host that come and go below folders that a container has.
fn later_mounts(containerd: &'static Containerd, shim: &Shim<'_>, host: &Path) -> Result<String> {
    let late = host.join("late").display().to_string();
    containerd.sh(&format!("mount -t tmpfs t {late} && echo late > {late}/file"))?;
    // The guest may cache the file's absence for a moment.
    let read = |path: &str| shim.exec("late", &["cat", path]).ok().filter(|(status, _)| *status == 0);
    let followed = wait_for(SOON, "the later mount appears", || read("/follow/late/file"))?;
    let fixed =
        shim.script("fixed", "ls /fixed/late; touch /follow/late/by-container; mount | grep -c /fixed/late || true")?;
    let on_host = containerd.sh(&format!("ls {late}"))?.text();
    // Not lazily: nothing in the container uses it.
    let unmounted = || containerd.sh(&format!("umount {late}")).ok();
    wait_for(SOON, "the host can unmount it", unmounted)?;
    let gone = || shim.script("gone", "ls /follow/late").ok().filter(String::is_empty);
    wait_for(SOON, "the mount disappears", gone)?;
    Ok(format!("{followed:?} {fixed:?} {on_host:?}\n"))
}

/// What a container finds in volumes of every kind.
fn volumes(containerd: &'static Containerd) -> Result<String> {
    let id = containerd.id("volumes");
    // In the daemon's own mounts, which are shared as on a node with systemd.
    let base = Path::new("/run").join(format!("{id}-base"));
    let at = |name: &str| base.join(name);
    let shown = base.display();
    containerd.sh(&format!(
        "mkdir -p {shown}/host/early {shown}/host/late {shown}/mem {shown}/image {shown}/lower {shown}/group {shown}/path && cd {shown} && \
         mount -t tmpfs -o size=1m,mode=1777 m mem && mount -t tmpfs t host/early && echo early > host/early/file && \
         echo image > lower/file && mount -t overlay -o lowerdir=lower:path i image && \
         chgrp 2000 group && chmod 2775 group && \
         echo file > file && : > created && mkdir path/sub && echo sub > path/sub/file && \
         mkdir -p taken/sub && echo x > taken/file && mount -t tmpfs t taken/sub"
    ))?;
    let mut spec = bundle::spec(&id, &SLEEP);
    let (follow, private) = (["rslave", "rw"], ["rprivate", "rw"]);
    let mounts = [
        bind(&at("host"), "/follow", &follow),
        bind(&at("host"), "/fixed", &private),
        bind(&at("mem"), "/mem", &private),
        bind(&at("image"), "/image", &["rprivate", "ro"]),
        bind(&at("group"), "/group", &private),
        bind(&at("file"), "/etc/file", &private),
        bind(&at("created"), "/created", &private),
        bind(&at("path/sub"), "/sub", &private),
        bind(&at("path/sub/file"), "/sub-file", &private),
        bind(Path::new("/dev/null"), "/null", &private),
        bind(&at("taken"), "/taken", &private),
        bind(&at("taken"), "/taken-ro", &["rprivate", "ro"]),
        bind(&at("taken/file"), "/taken-file", &["rprivate", "ro"]),
    ];
    bundle::append(&mut spec, "/mounts", mounts);
    let shim = Shim::running(containerd, &id, &spec)?;
    let mut seen = shim.script(
        "look",
        "cat /follow/early/file /fixed/early/file; df -k /mem | tail -n 1 | awk '{print $2}'; dd if=/dev/zero of=/mem/big bs=64k count=40 2>&1 | grep -o 'No space.*'; \
         stat -c %s /mem/big; rm /mem/big; cat /image/file; touch /image/x 2>&1 | grep -o 'Read-only.*'; \
         cat /etc/file /sub/file /sub-file; echo more >> /sub-file; echo made > /created; echo x > /null; \
         stat -c '%a %u %g' /mem /group /created /image; stat -c %F /null",
    )?;
    let mut process = bundle::process(&[
        "sh",
        "-c",
        "umask 2; echo x > /group/file; mkdir /group/below; echo y > /mem/mine; \
         stat -c '%a %u %g %n' /group/* /mem/mine; id -G",
    ]);
    process["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [2000]});
    let (status, out, errors) = shim.exec_process("group", &process)?;
    seen += &format!("\n{status} {out} {errors}\n");
    seen += &containerd
        .sh(&format!("cd {shown} && cat path/sub/file created && stat -c '%a %u %g %n' group/* && df -k mem | wc -l"))?
        .text();
    seen += &later_mounts(containerd, &shim, &at("host"))?;
    // Mounts below a folder that a container has do not keep the host from removing the folder.
    let remove = format!("cd {shown} && umount taken/sub && rm -r taken && ls -d taken 2>&1 | grep -o 'No such.*'");
    seen += &containerd.sh(&remove)?.text();
    drop(shim);
    if containerd.runtime() == Runtime::Husk {
        check_rejections(containerd)?;
    }
    containerd.sh(&format!("cd {shown} && umount mem image host/early && cd / && rm -r {shown}"))?;
    Ok(seen)
}

/// Sources that a VM cannot have are rejected by name, before anything is created.
fn check_rejections(containerd: &Containerd) -> Result<()> {
    for (name, node) in [("disk", "b 7 0"), ("memory", "c 1 2")] {
        let id = containerd.id(name);
        let source = Path::new("/run").join(format!("{id}-node"));
        containerd.sh(&format!("mknod {} {node}", source.display()))?;
        let mut spec = bundle::spec(&id, &SLEEP);
        bundle::append(&mut spec, "/mounts", [bind(&source, "/node", &["rprivate", "rw"])]);
        let shim = Shim::start(containerd, &id, &spec)?;
        let error = shim.create_error()?;
        let why = format!("{:?}: a device of the host cannot be used in a VM", source.display().to_string());
        ensure!(error.contains(".source") && error.contains(&why), "{error}");
        shim.shutdown();
        containerd.sh(&format!("rm {}", source.display()))?;
    }
    Ok(())
}

#[test]
fn volumes_of_every_kind_behave_as_under_runc() -> Result<()> {
    let seen = same(volumes)?;
    for expected in ["No such file", "1024\nNo space left", "664 1000 2000 /group/file", "(0, \"late\")"] {
        ensure!(seen.contains(expected), "{expected}\n{seen}");
    }
    Ok(())
}
