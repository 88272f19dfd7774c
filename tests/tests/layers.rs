//! Images of layers on the host: what they contain, and that whatever happens to the process that makes them, nothing is
//! taken for an image that is none. How VMs use them is in `rootfs_erofs.rs`.
#![cfg(not(target_env = "musl"))]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::{built, repository};
use husk_tests::command::{self, wait_for};
use husk_tests::process;
use serde_json::Value;

/// For the images of a few small layers on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// A store, and the folder of a snapshotter.
struct Host {
    folder: tempfile::TempDir,
    mib: u64,
}

impl Host {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        fs::create_dir(folder.path().join("snapshots"))?;
        fs::write(folder.path().join("metadata.db"), "")?;
        Ok(Self { folder, mib: 256 })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes a layer by a shell script in its folder.
    fn layer(&self, number: u32, script: &str) -> Result<PathBuf> {
        let layer = self.path(&format!("snapshots/{number}/fs"));
        fs::create_dir_all(&layer)?;
        sh(&layer, script)?;
        Ok(layer)
    }

    /// Requests an image of each layer, as a shim does. Returns whether no builder works.
    fn request(&self, layers: &[&Path]) -> Result<bool> {
        use husk_shim::disks::layers::Store;
        let layers: Vec<PathBuf> = layers.iter().map(|layer| layer.to_path_buf()).collect();
        Ok(Store::new(self.path("store"), self.mib).request(&layers)?)
    }

    fn builder(&self) -> Result<Child> {
        let mut command = Command::new(built("containerd-shim-husk-v1")?);
        let store = serde_json::json!({"folder": self.path("store"), "mib": self.mib});
        command.arg("build-layers").env("HUSK_LAYER_STORE", store.to_string()).env("PATH", path()?);
        Ok(command.stdin(Stdio::null()).spawn()?)
    }

    /// Runs the builder to its end.
    fn build(&self) -> Result<()> {
        let status = self.builder()?.wait()?;
        ensure!(status.success(), "{status}\n{}", self.log());
        Ok(())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("store/builder.log")).unwrap_or_default()
    }

    /// What an operator sees.
    fn listed(&self) -> Result<Value> {
        let config = self.path("husk.toml");
        fs::write(&config, format!("layer_cache_dir = {:?}\nlayer_cache_mib = {}\n", self.path("store"), self.mib))?;
        let mut command = Command::new(built("husk")?);
        command.args(["layers", "--json"]).env("HUSK_CONFIG", &config);
        Ok(serde_json::from_slice(&command::run(command, None, DEADLINE)?.ok()?.stdout)?)
    }

    /// The images of layers, by the layers from which they were made.
    fn images(&self) -> Result<Vec<(PathBuf, String)>> {
        let listed = self.listed()?;
        let text = |value: &Value| value.as_str().map(str::to_owned).context("no text");
        let image = |image: &Value| Ok((PathBuf::from(text(&image["layer"])?), text(&image["digest"])?));
        listed["images"].as_array().context("no list")?.iter().map(image).collect()
    }
}

fn path() -> Result<String> {
    let path = std::env::var("PATH").context("PATH")?;
    Ok(format!("{}:/usr/sbin:/sbin:{path}", repository().join(".cache/erofs").display()))
}

fn sh(folder: &Path, script: &str) -> Result<String> {
    let mut command = Command::new("bash");
    command.args(["-ec", script]).current_dir(folder).env("PATH", path()?);
    Ok(command::run(command, None, DEADLINE)?.ok()?.text())
}

/// Sets an attribute with Python: not every machine has setfattr(1).
fn attribute(path: &str, name: &str, value: &str) -> String {
    format!("python3 -c 'import os; os.setxattr(\"{path}\", \"{name}\", {value}, follow_symlinks=False)'\n")
}

/// Everything that programs can see of a folder.
const LOOK: &str = r#"
import hashlib, os, stat, sys
for folder, names, files in os.walk("."):
    names.sort()
    for path in sorted(os.path.join(folder, name) for name in [*names, *files]):
        s = os.lstat(path)
        row = [path, oct(s.st_mode), s.st_uid, s.st_gid, s.st_mtime_ns]
        row += [] if stat.S_ISDIR(s.st_mode) else [s.st_nlink, s.st_size, s.st_rdev]
        if stat.S_ISREG(s.st_mode): row.append(hashlib.sha256(open(path, "rb").read()).hexdigest())
        if stat.S_ISLNK(s.st_mode): row.append(os.readlink(path))
        row += [(name, os.getxattr(path, name, follow_symlinks=False)) for name in sorted(os.listxattr(path, follow_symlinks=False))]
        print(row)
"#;

/// What an overlay of folders or images shows, the uppermost first. In a mount namespace of its own.
fn look(host: &Host, lower: &[PathBuf]) -> Result<String> {
    let mut script = String::from("mkdir -p merged; mount -t tmpfs none merged; mkdir merged/root; n=0; lower=\n");
    for path in lower {
        script.push_str(&format!(
            "n=$((n+1)); mkdir merged/$n
            if [ -d {0:?} ]; then mount --bind {0:?} merged/$n; else mount -t erofs -o loop,ro {0:?} merged/$n; fi
            lower=$lower:merged/$n\n",
            path.display().to_string()
        ));
    }
    fs::write(host.path("look.py"), LOOK)?;
    script.push_str(
        "mount -t overlay -o ro,lowerdir=${lower#:} overlay merged/root; cd merged/root; python3 ../../look.py",
    );
    let script = script.replace("../../look.py", &host.path("look.py").display().to_string());
    sh(host.folder.path(), &format!("exec unshare --mount bash -ec {}", quoted(&script)))
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn images_show_what_the_layers_show() -> Result<()> {
    let host = Host::new()?;
    let capability = r#"bytes.fromhex("0100000200040000000000000000000000000000")"#;
    let base = host.layer(
        1,
        &format!(
            "mkdir -p etc/conf.d opaque gone dev; truncate -s 1M sparse; echo a > etc/a; chown 70000:7 etc/a; chmod 4751 etc/a; ln etc/a etc/b
            echo x > etc/conf.d/x; echo old > opaque/old; echo y > gone/y; echo z > z; touch -d @1.123456789 sparse
            ln -s /etc/passwd link; chown -h 5:6 link; mknod dev/null c 1 3; mknod dev/disk b 8 1; mkfifo fifo
            head -c 3000001 /dev/urandom > data; echo prog > prog; mkdir -m 1777 tmp; chmod 700 .
            python3 -c 'open(b\"\\xff\\n name\", \"w\")'
            {}{}{}",
            attribute("prog", "security.capability", capability),
            attribute("etc", "user.note", "b\"n\" * 100"),
            attribute("etc/a", "trusted.note", "b\"\"")
        ),
    )?;
    let middle = host.layer(
        2,
        &format!(
            "mkdir opaque; echo new > opaque/new; mknod gone c 0 0; mkdir -p etc/conf.d; mknod etc/conf.d/x c 0 0; {}",
            attribute("opaque", "trusted.overlay.opaque", "b\"y\"")
        ),
    )?;
    let top = host.layer(
        3,
        "mkdir gone; echo back > gone/back; mknod z c 0 0; mkdir -p deep/er; echo d > deep/er/d; chmod 711 .",
    )?;
    host.request(&[&top, &middle, &base])?;
    host.build()?;
    let images = host.images()?;
    let image = |layer: &PathBuf| {
        let found = images.iter().find(|(made, _)| made == layer).with_context(|| host.log())?;
        Ok(host.path("store/images").join(format!("{}.erofs", found.1)))
    };
    let layers = [top, middle, base];
    let of_images = layers.iter().map(image).collect::<Result<Vec<_>>>()?;
    let (expected, found) = (look(&host, &layers)?, look(&host, &of_images)?);
    ensure!(found == expected, "layers:\n{expected}\nimages:\n{found}");
    // The script has looked at what it was to look at.
    for part in ["opaque/new", "gone/back", "security.capability", "trusted.note", "70000", "1123456789", "'./etc/b'"] {
        ensure!(found.contains(part), "{part} is missing:\n{found}");
    }
    for part in ["./opaque/old", "./gone/y", "./z'", "./etc/conf.d/x"] {
        ensure!(!found.contains(part), "{part} is there:\n{found}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn each_content_has_one_image_and_a_changed_or_damaged_one_is_made_again() -> Result<()> {
    let host = Host::new()?;
    let script = "echo a > a; touch -d @1 a .";
    let (one, other) = (host.layer(1, script)?, host.layer(2, script)?);
    // Four at once: one works, and the others see that.
    host.request(&[&one, &other])?;
    let builders = (0..4).map(|_| host.builder()).collect::<Result<Vec<_>>>()?;
    for mut builder in builders {
        ensure!(builder.wait()?.success());
    }
    let first = host.images()?;
    ensure!(first.len() == 1, "{first:?}\n{}", host.log());
    ensure!(host.log().matches("the layer has an image").count() == 2, "{}", host.log());
    // A change of the layer.
    sh(&one, "echo b > b; touch -d @1 .")?;
    host.request(&[&one])?;
    host.build()?;
    let second = host.images()?;
    ensure!(second.len() == 2 && second.iter().filter(|image| first.contains(image)).count() == 1, "{second:?}");
    // Damage that no ctime shows cannot be made here; the next best is damage to the stamp's digest.
    let digest = &second.iter().find(|(layer, _)| *layer == one).context("no image")?.1;
    let (image, stamp) =
        (host.path(&format!("store/images/{digest}.erofs")), host.path(&format!("store/images/{digest}.json")));
    let text = fs::read_to_string(&stamp)?;
    let sha256 = serde_json::from_str::<Value>(&text)?["sha256"].as_str().context("no digest")?.to_owned();
    fs::write(&stamp, text.replace(&sha256, &"0".repeat(64)))?;
    host.request(&[&one])?;
    host.build()?;
    ensure!(host.log().contains("is damaged, and is made again"), "{}", host.log());
    ensure!(!fs::read_to_string(&stamp)?.contains(&"0".repeat(64)) && host.images()?.len() == 2, "{}", host.log());
    // A file that was cut short.
    fs::OpenOptions::new().write(true).open(&image)?.set_len(4096)?;
    ensure!(host.images()?.len() == 1);
    host.request(&[&one])?;
    host.build()?;
    ensure!(host.images()?.len() == 2, "{}", host.log());
    // A layer that is gone, and one that cannot have an image.
    fs::remove_dir_all(other.parent().context("a parent")?)?;
    let reference = host.layer(3, &format!("mkdir d; {}", attribute("d", "trusted.overlay.redirect", "b\"/x\"")))?;
    let large = host.layer(4, "truncate -s 1T large")?;
    host.request(&[&reference, &large])?;
    host.build()?;
    let listed = host.listed()?;
    let failures = listed["failures"].to_string();
    ensure!(failures.contains("trusted.overlay.redirect") && failures.contains("layer_cache_mib = 256"), "{failures}");
    ensure!(host.images()?.len() == 2 && fs::read_dir(host.path("store/wanted"))?.count() == 0);
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_killed_builder_leaves_nothing_that_is_taken_for_an_image() -> Result<()> {
    let host = Host::new()?;
    let layers: Vec<PathBuf> = (1..=4)
        .map(|number| {
            host.layer(number, &format!("head -c 2000000 /dev/urandom > {number}; mkdir d; touch d/{{1..200}}"))
        })
        .collect::<Result<_>>()?;
    let paths: Vec<&Path> = layers.iter().map(PathBuf::as_path).collect();
    let mut complete = 0;
    // Kills at different moments of four builds, which take some 100 ms each on an idle machine.
    for round in 0..12 {
        host.request(&paths)?;
        let mut builder = host.builder()?;
        std::thread::sleep(Duration::from_millis(20 * round));
        builder.kill()?;
        builder.wait()?;
        let images = host.images()?;
        ensure!(images.len() >= complete, "{images:?}");
        complete = images.len();
        for (_, digest) in &images {
            let image = host.path(&format!("store/images/{digest}.erofs"));
            let stamp: Value = serde_json::from_slice(&fs::read(image.with_extension("json"))?)?;
            let sha256 =
                sh(host.folder.path(), &format!("sha256sum {:?} | cut -d' ' -f1", image.display().to_string()))?;
            ensure!(stamp["sha256"] == sha256.as_str(), "{stamp} {sha256}");
        }
    }
    wait_for(DEADLINE, "mkfs.erofs has ended with the builder", || {
        let store = host.path("snapshots").display().to_string();
        let all_ended = process::all().iter().all(|process| !process.command.contains(&store));
        (all_ended && host.request(&paths).is_ok_and(|free| free)).then_some(())
    })?;
    host.build()?;
    ensure!(host.images()?.len() == layers.len(), "{}", host.log());
    // An image and a stamp for each layer, and nothing else.
    let names = fs::read_dir(host.path("store/images"))?.count();
    ensure!(names == 2 * layers.len() && fs::read_dir(host.path("store/wanted"))?.count() == 0, "{names} files");
    Ok(())
}
