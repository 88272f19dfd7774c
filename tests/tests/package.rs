//! The Debian package: installed with dpkg into a folder that stands for a machine, and removed again. The folder has
//! this machine's libraries and a static busybox for the package's scripts, not a whole Debian.
#![cfg(not(target_env = "musl"))]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::repository;
use husk_tests::command::{self, Output};
use husk_tests::root::Root;

/// Deadline for a build of the package, and for each run of dpkg.
const DEADLINE: Duration = Duration::from_secs(120);

/// Builds the package of what is in `out/`. Compression takes most of the time and is dpkg-deb's business.
fn build(package: &Path, umask: &str, folder: &str) -> Result<()> {
    let script = repository().join("setup/package");
    let mut build = Command::new("sh");
    build.arg("-c").arg(format!("umask {umask} && cd {folder} && exec \"$0\"")).arg(script);
    build.env("HUSK_PACKAGE", package).env("HUSK_COMPRESSION", "none");
    build.env("TZ", if umask == "022" { "UTC" } else { "Asia/Tokyo" });
    command::run(build, None, DEADLINE)?.ok()?;
    Ok(())
}

/// A machine with dpkg's database, in which the package's dependencies are installed.
fn machine(package: &Path) -> Result<Root> {
    let root = Root::new()?;
    for folder in ["var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/triggers", "usr/bin", "run"] {
        fs::create_dir_all(root.path().join(folder))?;
    }
    let mut field = Command::new("dpkg-deb");
    field.arg("--field").arg(package).arg("Depends");
    let depends = command::run(field, None, DEADLINE)?.ok()?.text();
    let mut status = String::new();
    for dependency in depends.split(", ") {
        let name = dependency.split(' ').next().unwrap_or_default();
        let mut query = Command::new("dpkg-query");
        query.args(["--status", name]);
        let stanza =
            command::run(query, None, DEADLINE)?.ok().with_context(|| format!("the dependency {dependency}"))?;
        status.push_str(&format!("{}\n\n", stanza.text()));
    }
    fs::write(root.path().join("var/lib/dpkg/status"), status)?;
    // dpkg removes folders of a package that become empty, and /etc of a machine never is.
    fs::write(root.path().join("etc/hostname"), "machine\n")?;
    // Stands for QEMU, which husk looks for.
    let qemu = root.path().join("usr/bin/qemu-system-x86_64");
    fs::write(&qemu, "#!/bin/sh\n")?;
    fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755))?;
    Ok(root)
}

fn dpkg(root: &Root, arguments: &[&str]) -> Result<Output> {
    let mut dpkg = Command::new("dpkg");
    dpkg.arg(format!("--root={}", root.path().display())).args(arguments).env("LC_ALL", "C");
    command::run(dpkg, None, DEADLINE)
}

fn built() -> Result<(tempfile::TempDir, PathBuf)> {
    let folder = tempfile::tempdir()?;
    let package = folder.path().join("husk.deb");
    build(&package, "022", "/")?;
    Ok((folder, package))
}

#[test]
fn the_package_has_the_same_bytes_whatever_the_time_zone_umask_and_folder() -> Result<()> {
    let (folder, first) = built()?;
    let second = folder.path().join("second.deb");
    build(&second, "077", "/tmp")?;
    let mut compare = Command::new("cmp");
    compare.args([&first, &second]);
    command::run(compare, None, DEADLINE)?.ok()?;
    Ok(())
}

#[test]
fn the_package_installs_its_programs_run_and_nothing_is_left_after_purge() -> Result<()> {
    let (_folder, package) = built()?;
    let package = package.to_str().context("a path in UTF-8")?;
    let root = machine(Path::new(package))?;
    let before = root.tree()?;

    dpkg(&root, &["--install", package])?.ok()?;
    let config = root.path().join("etc/husk/config.toml");
    let changed = format!("{}accel = \"tcg\"\n", fs::read_to_string(&config)?);
    fs::write(&config, &changed)?;
    let version = env!("CARGO_PKG_VERSION");
    let table: [(&[&str], String); 5] = [
        (&["/usr/bin/husk", "--version"], format!("husk {version}")),
        (&["/usr/bin/containerd-shim-husk-v1", "-v"], format!("containerd-shim-husk-v1 {version}")),
        (&["/bin/sh", "-c", "/usr/bin/husk check-config | head -n 1"], "ok: /etc/husk/config.toml".to_owned()),
        (
            &["/bin/sh", "-c", "gunzip -c /usr/share/man/man8/husk.8.gz | head -n 1"],
            format!(".TH HUSK 8 \"\" \"husk {version}\""),
        ),
        (
            &["/bin/sh", "-c", "gunzip -c /usr/share/man/man5/husk-config.5.gz | grep -c '^.B virtiofsd_open_files'"],
            "1".to_owned(),
        ),
    ];
    for (arguments, expected) in table {
        let shown = root.run(arguments)?.ok()?.text();
        ensure!(shown == expected, "{arguments:?}: {shown:?}, not {expected:?}");
    }
    for completion in
        ["bash-completion/completions/husk", "zsh/vendor-completions/_husk", "fish/vendor_completions.d/husk.fish"]
    {
        let text = fs::read_to_string(root.path().join("usr/share").join(completion)).context(completion)?;
        ensure!(text.contains("boot-profile"), "{completion}: {text}");
    }

    // An upgrade keeps the operator's configuration.
    dpkg(&root, &["--install", package])?.ok()?;
    ensure!(fs::read_to_string(&config)? == changed, "the configuration was replaced");

    // What husk creates when it runs.
    fs::write(root.path().join("etc/husk/metadata.key"), "")?;
    let sandbox = root.path().join("run/husk/k8s.io/pod");
    fs::create_dir_all(&sandbox)?;
    fs::write(sandbox.join("state.json"), "{}")?;
    let refused = dpkg(&root, &["--remove", "husk"])?.expect_code(1)?.errors();
    ensure!(refused.contains("the sandbox /run/husk/k8s.io/pod exists"), "{refused}");
    root.run(&["/usr/bin/husk", "--version"])?.ok()?;
    fs::remove_dir_all(root.path().join("run/husk/k8s.io"))?;

    dpkg(&root, &["--remove", "husk"])?.ok()?;
    let left = root.tree()?.into_iter().filter(|line| !before.contains(line));
    let left: Vec<String> = left.map(|line| line.split(' ').next().unwrap_or_default().to_owned()).collect();
    ensure!(
        left == ["./etc/husk", "./etc/husk/config.toml", "./etc/husk/metadata.key"],
        "left after removal: {left:?}"
    );
    dpkg(&root, &["--purge", "husk"])?.ok()?;
    let after = root.tree()?;
    ensure!(after == before, "{after:#?}\nwas before the installation:\n{before:#?}");
    Ok(())
}

#[test]
fn the_unit_is_disabled_and_its_link_is_gone_after_removal() -> Result<()> {
    let (_folder, package) = built()?;
    let package = package.to_str().context("a path in UTF-8")?;
    let root = machine(Path::new(package))?;
    // The part of systemctl that works without systemd.
    root.script(
        "usr/bin/systemctl",
        "[ \"$*\" = '--no-reload disable husk-metadata.service husk-pool.service' ] &&
            rm -f /etc/systemd/system/multi-user.target.wants/husk-metadata.service",
    )?;
    let wants = root.path().join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants)?;
    let before = root.tree()?;
    dpkg(&root, &["--install", package])?.ok()?;
    let unit = fs::read_to_string(root.path().join("usr/lib/systemd/system/husk-metadata.service"))?;
    ensure!(unit.contains("\nExecStart=/usr/bin/husk metadata serve\n"), "{unit}");
    ensure!(fs::read_dir(&wants)?.next().is_none(), "the unit is enabled");
    symlink("/usr/lib/systemd/system/husk-metadata.service", wants.join("husk-metadata.service"))?;
    dpkg(&root, &["--purge", "husk"])?.ok()?;
    let after = root.tree()?;
    ensure!(after == before, "{after:#?}\nwas before the installation:\n{before:#?}");
    Ok(())
}

/// Unpacks both layers of an image, whose other blobs are JSON.
const UNPACK: &str = r#"set -e
cd "$0"
tar xf image.tar
mkdir root
for blob in blobs/sha256/*; do
    [ "$(head -c 1 $blob)" = '{' ] || tar xf $blob -C root
done"#;

#[test]
fn the_image_for_nodes_is_reproducible_and_brings_what_its_programs_need() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("image.tar");
    for (umask, output) in [("077", folder.path().join("other.tar")), ("022", image.clone())] {
        let mut build = Command::new("sh");
        build.arg("-c").arg(format!("umask {umask} && exec \"$0\"")).arg(repository().join("setup/node-image"));
        build.env("HUSK_NODE_IMAGE", output);
        command::run(build, None, DEADLINE)?.ok()?;
    }
    let mut compare = Command::new("cmp");
    compare.arg(&image).arg(folder.path().join("other.tar"));
    command::run(compare, None, DEADLINE)?.ok()?;

    let mut unpack = Command::new("sh");
    unpack.args(["-c", UNPACK]).arg(folder.path());
    command::run(unpack, None, DEADLINE)?.ok()?;
    let version = format!("husk {}", env!("CARGO_PKG_VERSION"));
    // The commands of the manifests, as the users that run them.
    for (user, arguments, expected) in [
        ("0:0", &["/husk/husk", "--version"][..], version.as_str()),
        ("65534:65534", &["/bin/kubectl", "version", "--client"], "Client Version: v1."),
        ("65534:65534", &["/bin/busybox", "sleep", "0"], ""),
    ] {
        let mut chroot = Command::new("chroot");
        chroot.arg(format!("--userspec={user}")).arg(folder.path().join("root")).args(arguments).env_clear();
        chroot.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let shown = command::run(chroot, None, DEADLINE)?.ok()?.text();
        ensure!(shown.starts_with(expected), "{arguments:?}: {shown:?}, not {expected:?}");
    }
    Ok(())
}
