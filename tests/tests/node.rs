//! `husk node`: installs husk into the root folder of a node, registers it with real containerds, and removes it
//! without a trace. The folder has containerd's program, and scripts in the place of systemctl and QEMU; no containerd
//! runs.
#![cfg(not(target_env = "musl"))]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::{Version, built, repository};
use husk_tests::command::Output;
use husk_tests::on_every_containerd;
use husk_tests::root::Root;

const CONFIG: &str = "etc/containerd/config.toml";
/// A node's configuration as kubeadm's guide recommends it, with an import.
const VERSION_2: &str = r#"version = 2
imports = ["/etc/containerd/debug.toml"]
root = "/var/lib/containerd" # ours

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.example/pause:3.10"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = true"#;
const VERSION_3: &str = r#"version = 3
imports = ["/etc/containerd/*.toml.d"]

[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "registry.example/pause:3.10"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  SystemdCgroup = true
"#;

struct Node {
    root: Root,
    /// What is installed.
    source: tempfile::TempDir,
}

impl Node {
    /// A node with this containerd and this configuration.
    fn new(version: Version, config: Option<&str>) -> Result<Self> {
        let node = Self { root: Root::new()?, source: tempfile::tempdir()? };
        // The programs run; the guest's files are only copied.
        for program in ["husk", "containerd-shim-husk-v1"] {
            symlink(built(program)?, node.source.path().join(program))?;
        }
        for file in ["vmlinux", "initrd.img", "initrd-debug.img"] {
            fs::write(node.source.path().join(file), file)?;
        }
        node.root.script("usr/libexec/virtiofsd", "exit 1")?;
        fs::create_dir_all(node.path("etc/husk"))?;
        fs::write(node.path("etc/husk/config.toml"), "accel = \"tcg\"\n")?;
        let bin = node.path("usr/bin");
        fs::create_dir_all(&bin)?;
        fs::copy(version.bin()?.join("containerd"), bin.join("containerd"))?;
        node.root.script("usr/bin/qemu-system-x86_64", "exit 1")?;
        node.root.script("usr/bin/systemctl", "echo \"$@\" >>/test/restarts && [ ! -e /test/broken ]")?;
        if let Some(config) = config {
            fs::create_dir_all(node.path("etc/containerd"))?;
            fs::write(node.path(CONFIG), config)?;
            fs::write(node.path("etc/containerd/debug.toml"), "version = 2\n[debug]\n  level = \"debug\"\n")?;
        }
        Ok(node)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn husk(&self, arguments: &[&str]) -> Result<Output> {
        let text = |path: &Path| -> Result<String> { Ok(path.to_str().context("a path in UTF-8")?.to_owned()) };
        let (husk, root, source) = (text(&built("husk")?)?, text(self.root.path())?, text(self.source.path())?);
        let mut command = vec![husk.as_str(), "node"];
        command.extend(arguments);
        command.extend(["--root", &root]);
        if arguments.first() == Some(&"install") {
            command.extend(["--from", &source]);
        }
        self.root.beside(&command)
    }

    fn restarts(&self) -> Result<usize> {
        match fs::read_to_string(self.path("test/restarts")) {
            Ok(text) => {
                ensure!(text.lines().all(|line| line == "restart containerd"), "{text}");
                Ok(text.lines().count())
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// What containerd makes of its configuration, with one style of quotes.
    fn effective(&self) -> Result<String> {
        let dump = ["/usr/bin/containerd", "--config", "/etc/containerd/config.toml", "config", "dump"];
        Ok(self.root.run(&dump)?.ok()?.text().replace('\'', "\""))
    }

    fn expect(&self, before: &[String], what: &str) -> Result<()> {
        let after = self.root.tree()?;
        ensure!(after == before, "{what}:\n{after:#?}\ninstead of\n{before:#?}");
        Ok(())
    }
}

fn every_configuration_keeps_its_settings_and_is_restored(version: Version) -> Result<()> {
    let mut table = vec![(None, "podsandbox"), (Some("version = 2\n"), "podsandbox"), (Some(VERSION_2), "podsandbox")];
    if version == Version::V2_1 {
        table.extend([(Some(VERSION_3), "podsandbox"), (Some(VERSION_3), "shim"), (None, "shim")]);
    }
    for (config, sandboxer) in table {
        let node = Node::new(version, config)?;
        let before = node.root.tree()?;
        let arguments = ["install", "--sandboxer", sandboxer];
        node.husk(&arguments)?.ok().with_context(|| format!("{config:?}"))?;
        let effective = node.effective()?;
        let mut expected = vec![
            "runtimes.husk]",
            "runtime_type = \"/opt/husk/containerd-shim-husk-v1\"",
            "runtimes.runc]",
            "pod_annotations = [\"io.husk.*\"]",
        ];
        if config.is_some_and(|config| config.contains("SystemdCgroup")) {
            expected.extend(["SystemdCgroup = true", "= \"registry.example/pause:3.10\""]);
        }
        if sandboxer == "shim" {
            expected.push("sandboxer = \"shim\"");
        }
        for part in expected {
            ensure!(effective.contains(part), "{config:?}: no {part} in\n{effective}");
        }
        ensure!(node.root.run(&["/opt/husk/husk", "--version"])?.ok()?.text().starts_with("husk "));

        let installed = node.root.tree()?;
        let again = node.husk(&arguments)?.ok()?;
        ensure!(again.text().contains("is installed already"), "{again}");
        node.expect(&installed, "a second installation changed the node")?;
        ensure!(node.restarts()? == 1, "{} restarts", node.restarts()?);

        node.husk(&["uninstall"])?.ok()?;
        node.expect(&before, "the removal left")?;
        ensure!(node.restarts()? == 2, "{} restarts", node.restarts()?);
        node.husk(&["uninstall"])?.ok()?;
        ensure!(node.restarts()? == 2, "a removal of nothing restarted containerd");
    }
    Ok(())
}

on_every_containerd!(every_configuration_keeps_its_settings_and_is_restored);

#[test]
fn an_installation_killed_at_any_step_can_be_completed_and_removed() -> Result<()> {
    for (version, config) in [(Version::V1_7, VERSION_2), (Version::V2_1, VERSION_3)] {
        let node = Node::new(version, Some(config))?;
        let before = node.root.tree()?;
        // Each script kills its parent, the installer, or is what the step fails with.
        node.root.script("test/kill", "kill -KILL $PPID")?;
        node.root.script(
            "test/kill-next",
            "case $* in *.husk-new*) kill -KILL $PPID ;; esac; exec /usr/bin/containerd \"$@\"",
        )?;
        let steps: [&[&str]; 3] =
            [&["--containerd", "/test/kill"], &["--containerd", "/test/kill-next"], &["--restart", "/test/kill"]];
        for step in steps {
            let interrupted = [&["install"], step].concat();
            node.husk(&interrupted)?.expect_code(137)?;
            ensure!(node.root.tree()? != before, "{step:?}: interrupted before the first change");
            node.husk(&["uninstall"])?.ok()?;
            node.expect(&before, "the removal of a part left")?;

            node.husk(&interrupted)?.expect_code(137)?;
            let restarts = node.restarts()?;
            node.husk(&["install"])?.ok()?;
            ensure!(node.restarts()? == restarts + 1, "{step:?}: containerd was not restarted");
            ensure!(node.effective()?.contains("runtimes.husk]"), "{step:?}: {}", node.effective()?);
            // A removal that is killed, too.
            node.husk(&["uninstall", "--restart", "/test/kill"])?.expect_code(137)?;
            node.husk(&["uninstall"])?.ok()?;
            node.expect(&before, "the removal left")?;
        }
    }
    Ok(())
}

#[test]
fn a_node_that_cannot_run_husk_keeps_its_configuration() -> Result<()> {
    let node = Node::new(Version::V1_7, Some(VERSION_2))?;
    let configured = fs::read_to_string(node.path(CONFIG))?;
    let refused = |arguments: &[&str], expected: &str| -> Result<()> {
        let error = node.husk(arguments)?.expect_code(1)?.errors();
        ensure!(error.contains(expected), "no {expected:?} in {error}");
        ensure!(fs::read_to_string(node.path(CONFIG))? == configured, "{expected}: the configuration changed");
        Ok(())
    };
    // A configuration that requires KVM, which the folder lacks.
    let accepted = fs::read_to_string(node.path("etc/husk/config.toml"))?;
    fs::write(node.path("etc/husk/config.toml"), "")?;
    refused(&["install"], "set accel = \"tcg\" in /etc/husk/config.toml")?;
    fs::write(node.path("etc/husk/config.toml"), accepted)?;
    // A restart that fails.
    fs::write(node.path("test/broken"), "")?;
    refused(&["install"], "containerd does not start with husk")?;
    fs::remove_file(node.path("test/broken"))?;
    // No QEMU.
    fs::rename(node.path("usr/bin/qemu-system-x86_64"), node.path("test/qemu"))?;
    refused(&["install"], "this node cannot run husk's VMs")?;
    fs::rename(node.path("test/qemu"), node.path("usr/bin/qemu-system-x86_64"))?;
    // containerd 1 replaces the section of the main file by that of an import.
    let import = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  enable_selinux = false\n";
    fs::write(node.path("etc/containerd/debug.toml"), import)?;
    refused(&["install"], "containerd would not have the runtime \"husk\"")?;
    refused(&["install", "--sandboxer", "shim"], "version: 2: the sandboxer \"shim\" needs containerd 2")?;
    fs::write(node.path("etc/containerd/debug.toml"), "version = 2\n")?;
    // Pods.
    node.husk(&["install"])?.ok()?;
    let sandbox = node.path("run/husk/k8s.io/pod");
    fs::create_dir_all(&sandbox)?;
    fs::write(sandbox.join("state.json"), "")?;
    let error = node.husk(&["uninstall"])?.expect_code(1)?.errors();
    ensure!(error.contains("the sandbox /run/husk/k8s.io/pod exists"), "{error}");
    fs::remove_dir_all(node.path("run/husk/k8s.io"))?;
    node.husk(&["uninstall"])?.ok()?;
    ensure!(fs::read_to_string(node.path(CONFIG))? == configured, "the configuration changed");
    ensure!(!node.path("run/husk").exists() && !node.path("opt/husk").exists(), "something is left");

    // Version 1, and a folder of somebody else.
    fs::write(node.path(CONFIG), "disabled_plugins = []\n")?;
    let error = node.husk(&["install"])?.expect_code(1)?.errors();
    ensure!(error.contains("version: missing, which means version 1"), "{error}");
    fs::write(node.path("opt/husk/mine"), "")?;
    let error = node.husk(&["install"])?.expect_code(1)?.errors();
    ensure!(error.contains("/opt/husk contains \"mine\""), "{error}");
    Ok(())
}

#[test]
fn a_linked_configuration_keeps_its_link_owner_and_mode() -> Result<()> {
    let node = Node::new(Version::V2_1, None)?;
    fs::create_dir_all(node.path("etc/containerd"))?;
    fs::create_dir_all(node.path("usr/share/site"))?;
    let file = node.path("usr/share/site/containerd.toml");
    fs::write(&file, VERSION_3)?;
    std::os::unix::fs::chown(&file, Some(7), Some(8))?;
    symlink("/usr/share/site/containerd.toml", node.path(CONFIG))?;
    let before = node.root.tree()?;
    node.husk(&["install"])?.ok()?;
    ensure!(fs::read_link(node.path(CONFIG))? == Path::new("/usr/share/site/containerd.toml"), "the link was replaced");
    ensure!(fs::read_to_string(&file)?.contains("/opt/husk/containerd.toml"), "{}", fs::read_to_string(&file)?);
    // Another choice, as an upgrade may bring.
    node.husk(&["install", "--sandboxer", "shim"])?.ok()?;
    ensure!(node.effective()?.contains("sandboxer = \"shim\"") && node.restarts()? == 2, "{}", node.effective()?);
    node.husk(&["uninstall"])?.ok()?;
    node.expect(&before, "the removal left")
}

#[test]
fn the_manifests_name_this_version_the_runtime_and_the_label_that_the_installer_uses() -> Result<()> {
    let read = |name: &str| {
        let path = repository().join("setup/kubernetes").join(name);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    };
    let image = format!("husk-node:{}", env!("CARGO_PKG_VERSION"));
    for name in ["install", "uninstall"] {
        let manifest = read(&format!("{name}/daemonset.yaml"))?;
        let images: Vec<&str> = manifest.lines().filter_map(|line| line.trim().strip_prefix("image: ")).collect();
        ensure!(images == [&image; 3], "{name}: {images:?}");
        ensure!(manifest.contains(&format!("[/husk/husk, node, {name}, --root, /host]")), "{manifest}");
        let kustomization = read(&format!("{name}/kustomization.yaml"))?;
        ensure!(kustomization.contains(&format!("newTag: \"{}\"", env!("CARGO_PKG_VERSION"))), "{kustomization}");
    }
    let class = read("install/runtimeclass.yaml")?;
    ensure!(class.contains("\nhandler: husk\n") && class.contains("io.husk/runtime: \"true\""), "{class}");
    ensure!(read("install/daemonset.yaml")?.contains("io.husk/runtime=true]"), "another label");
    ensure!(read("uninstall/daemonset.yaml")?.contains("io.husk/runtime-]"), "another label");
    for (name, kind) in [("version-2", "io.containerd.grpc.v1.cri"), ("version-3", "io.containerd.cri.v1.runtime")] {
        let text = read(&format!("containerd/{name}.toml"))?;
        ensure!(text.contains(&format!("[plugins.\"{kind}\".containerd.runtimes.husk]")), "{text}");
    }
    Ok(())
}
