//! Where a spec's mounts end up, and what their options do. Each test runs under husk and under runc, and compares.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Result, ensure};
use husk_tests::bundle;
use husk_tests::compare::{same, tested};
use husk_tests::containerd::Containerd;
use husk_tests::shim::Shim;
use serde_json::{Value, json};

/// Runs a script in a container with these mounts beside the usual ones, and returns its output. `prepare` changes the
/// writable layer of the root before the container exists.
fn run(
    containerd: &'static Containerd,
    mounts: &[Value],
    script: &str,
    prepare: impl Fn(&Path) -> Result<()>,
) -> Result<String> {
    let id = containerd.id("mounts");
    let mut spec = bundle::spec(&id, &["sh", "-c", &format!("exec 2>&1; {script}")]);
    bundle::append(&mut spec, "/mounts", mounts.iter().cloned());
    let shim = Shim::start(containerd, &id, &spec)?;
    prepare(&shim.bundle.outside.join("upper"))?;
    let (status, out, err) = shim.run()?;
    ensure!(status == 0, "{mounts:?}: {status}\n{out}\n{err}");
    Ok(out)
}

fn as_it_is(_: &Path) -> Result<()> {
    Ok(())
}

fn tmpfs(destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options})
}

fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_file_can_be_mounted_over_a_link_whose_target_does_not_exist() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("resolv.conf");
    fs::write(&file, "nameserver 192.0.2.1\n")?;
    // The first target is below the tmpfs on /run, the second one is in the root itself.
    for (target, expected) in [
        ("../run/systemd/resolve/stub-resolv.conf", "/run/systemd/resolve/stub-resolv.conf"),
        ("/var/lib/absent/resolv.conf", "/var/lib/absent/resolv.conf"),
        ("../../../outside", "/outside"),
    ] {
        let mounts = [bind(&file, "/etc/resolv.conf", &["rbind", "ro"])];
        let script = "cat /etc/resolv.conf; readlink /etc/resolv.conf; grep -o '[^ ]*nameserver\\|[^ ]*resolv[^ ]* ' \
            /proc/mounts; readlink -f /etc/resolv.conf";
        let found = same(|containerd| {
            run(containerd, &mounts, script, |upper| {
                fs::create_dir_all(upper.join("etc"))?;
                Ok(symlink(target, upper.join("etc/resolv.conf"))?)
            })
        })?;
        ensure!(found.starts_with("nameserver 192.0.2.1\n") && found.ends_with(expected), "{found}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_destination_may_contain_dots_and_links() -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("file"), "data\n")?;
    let table = [
        ("/srv/../mnt/./data", "/mnt/data"),
        ("/../../up", "/up"),
        ("/linked/inner", "/real/inner"),
        ("/gone/inner", "/nowhere/inner"),
    ];
    for (destination, expected) in table {
        let script = format!("cat {expected}/file; grep -c ' {expected} ' /proc/mounts");
        let found = same(|containerd| {
            run(containerd, &[bind(folder.path(), destination, &["rbind"])], &script, |upper| {
                fs::create_dir_all(upper.join("real"))?;
                symlink("/real", upper.join("linked"))?;
                Ok(symlink("nowhere", upper.join("gone"))?)
            })
        })?;
        ensure!(found == "data\n1", "{destination}: {found}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_tmpfs_keeps_the_mode_of_the_folder_that_it_covers() -> Result<()> {
    let prepare = |upper: &Path| {
        for (name, mode) in [("plain", 0o2750), ("sticky", 0o1777), ("explicit", 0o755)] {
            fs::create_dir_all(upper.join(name))?;
            fs::set_permissions(upper.join(name), fs::Permissions::from_mode(mode))?;
        }
        Ok(())
    };
    let mounts = [tmpfs("/plain", &[]), tmpfs("/sticky", &["nosuid"]), tmpfs("/absent", &[])];
    let script = "stat -c '%n %a %u' /plain /sticky /absent";
    let found = same(|containerd| run(containerd, &mounts, script, prepare))?;
    ensure!(found == "/plain 2750 0\n/sticky 1777 0\n/absent 1777 0", "{found}");
    // As in runc since 1.1.6; before, the folder's mode counted even then.
    let found = run(tested()?, &[tmpfs("/explicit", &["mode=711"])], "stat -c '%a' /explicit", prepare)?;
    ensure!(found == "711", "{found}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_tmpfs_can_begin_with_the_contents_of_its_folder() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let hosts = folder.path().join("hosts");
    fs::write(&hosts, "192.0.2.7 host\n")?;
    let script = "cd /etc; find . | sort | xargs stat -c '%n %a %u:%g %F %s'; cat passwd conf/deep; readlink conf/link; \
        cat hosts; touch new && echo writable; echo x >> hosts || echo fixed; grep -c ' /etc tmpfs ' /proc/mounts; \
        [ -e /etc/passwd ] && dd if=/dev/zero of=/etc/big bs=64k count=40 2>/dev/null || echo full";
    for options in
        [&["tmpcopyup", "size=1m"][..], &["tmpcopyup", "nosuid", "ro", "size=1m"], &["size=1m", "tmpcopyup", "noexec"]]
    {
        let mounts = [tmpfs("/etc", options), bind(&hosts, "/etc/hosts", &["rbind", "ro"])];
        let found = same(|containerd| {
            run(containerd, &mounts, script, |upper| {
                fs::create_dir_all(upper.join("etc/conf"))?;
                fs::write(upper.join("etc/conf/deep"), "deep\n")?;
                fs::write(upper.join("etc/hosts"), "127.0.0.1 image\n")?;
                std::os::unix::fs::chown(upper.join("etc/conf/deep"), Some(1000), Some(50))?;
                fs::set_permissions(upper.join("etc/conf/deep"), fs::Permissions::from_mode(0o640))?;
                Ok(symlink("/nowhere", upper.join("etc/conf/link"))?)
            })
        })?;
        ensure!(found.contains("./conf/deep 640 1000:50 regular file 5"), "{found}");
        ensure!(found.contains("192.0.2.7 host\n") && found.ends_with("full"), "{found}");
        ensure!(found.contains("\nwritable\n") != options.contains(&"ro") && found.contains("fixed\n1\n"), "{found}");
    }
    // Its memory is the container's, and the volume below is not written to.
    ensure!(fs::read_to_string(&hosts)? == "192.0.2.7 host\n");
    let missing = same(|containerd| {
        run(containerd, &[tmpfs("/no/such", &["tmpcopyup"])], "ls -A /no/such; echo empty", as_it_is)
    })?;
    ensure!(missing == "empty", "{missing}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_tmpfs_that_copies_works_in_a_user_namespace() -> Result<()> {
    let containerd = tested()?;
    let id = containerd.id("copy-user");
    let script = "exec 2>&1; stat -c '%a %u:%g' /etc; cat /etc/hosts; touch /etc/new && echo writable";
    let mut spec = bundle::spec(&id, &["sh", "-c", script]);
    bundle::append(&mut spec, "/linux/namespaces", [json!({"type": "user"})]);
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    spec["linux"]["uidMappings"] = mapping.clone();
    spec["linux"]["gidMappings"] = mapping;
    bundle::append(&mut spec, "/mounts", [tmpfs("/etc", &["tmpcopyup"])]);
    let shim = Shim::start(containerd, &id, &spec)?;
    fs::create_dir_all(shim.bundle.outside.join("upper/etc"))?;
    fs::write(shim.bundle.outside.join("upper/etc/hosts"), "192.0.2.9 mine\n")?;
    let (status, out, err) = shim.run()?;
    ensure!(status == 0 && out == "755 0:0\n192.0.2.9 mine\nwritable", "{status}: {out}\n{err}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_filesystem_of_the_kernel_needs_no_source() -> Result<()> {
    let kinds = ["tmpfs", "proc", "mqueue", "devpts"];
    let mounts = kinds.map(|kind| json!({"destination": format!("/m/{kind}"), "type": kind}));
    let script = "grep ' /m/' /proc/mounts | cut -d ' ' -f 2,3; echo x > /m/tmpfs/x && cat /m/tmpfs/x";
    let found = same(|containerd| run(containerd, &mounts, script, as_it_is))?;
    ensure!(found.ends_with("/m/devpts devpts\nx"), "{found}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn mount_flags_and_filesystem_flags_take_effect() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let sets: [&[&str]; 9] = [
        &["ro", "nosuid", "nodev", "noexec", "relatime"],
        &["noatime", "nodiratime"],
        &["strictatime"],
        &["ro", "rw", "nosuid", "suid"],
        &["sync"],
        &["dirsync"],
        &["sync", "dirsync", "async"],
        &["size=2m", "nr_inodes=100", "uid=7", "gid=8", "mode=751"],
        &[
            "silent",
            "loud",
            "mand",
            "nomand",
            "iversion",
            "noiversion",
            "acl",
            "noacl",
            "exec",
            "dev",
            "atime",
            "diratime",
        ],
    ];
    for options in sets {
        // `inode64` is the default of some kernels, which others show.
        let script =
            "awk '$5 == \"/m\" {print $6; print $NF}' /proc/self/mountinfo | sed 's/,inode64//'; stat -c '%a %u %g' /m";
        let found = same(|containerd| run(containerd, &[tmpfs("/m", options)], script, as_it_is))?;
        for flag in ["ro", "noexec", "noatime", "sync", "dirsync", "size=2048k", "mode=751"] {
            let given = options.contains(&flag) || flag == "size=2048k" && options.contains(&"size=2m");
            let undone = [("ro", "rw"), ("sync", "async")].iter().any(|(on, off)| *on == flag && options.contains(off));
            let shown = found.split([',', '\n']).any(|word| word == flag);
            ensure!(shown == (given && !undone), "{options:?}: {flag}: {found}");
        }
    }
    let script = "awk '$5 == \"/m\" {print $6}' /proc/self/mountinfo";
    for options in
        [&["rbind", "ro", "nosuid", "nodev", "noexec"][..], &["bind", "noatime"], &["rbind", "sync", "dirsync"]]
    {
        let found = same(|containerd| {
            let flags = run(containerd, &[bind(folder.path(), "/m", options)], script, as_it_is)?;
            // The host's filesystem may have flags of its own.
            let mut flags: Vec<_> = flags.trim().split(',').filter(|flag| options.contains(flag)).collect();
            flags.sort_unstable();
            Ok(flags.join(","))
        })?;
        ensure!(
            found.contains("noexec") == options.contains(&"noexec") && !found.contains("sync"),
            "{options:?}: {found}"
        );
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn an_option_without_an_r_does_not_apply_to_mounts_below() -> Result<()> {
    let mounts = ["ro", "rro", "noexec", "rnoexec"];
    let script = mounts.map(|name| {
        format!(
            "for f in {name}/new {name}/below/new '{name}/below/in ner/new'; do touch \"/$f\"; done; \
             for f in {name}/run {name}/below/run; do /$f && echo /$f runs; done; \
             awk '$5 ~ \"^/{name}\" {{gsub(\",\", \" \", $6); print $5, $6}}' /proc/self/mountinfo | \
             grep -o '^/[^ ]*\\| ro\\| noexec'"
        )
    });
    let script = format!("{}; true", script.join(";")).replace("touch: ", "");
    let found = same(|containerd| {
        let top = Path::new("/run").join(containerd.id("options"));
        let folder = top.display();
        let run_script = "printf '#!/bin/sh\\n' > run && chmod 755 run";
        containerd.sh(&format!(
            "mkdir -p {folder}/below && cd {folder} && {run_script} && mount -t tmpfs t below && cd below && {run_script} \
             && mkdir 'in ner' && mount -t tmpfs t 'in ner'"
        ))?;
        let mounts = mounts.map(|name| bind(&top, &format!("/{name}"), &["rbind", name]));
        run(containerd, &mounts, &script, as_it_is)
    })?;
    for (part, expected) in [
        ("/ro/new: Read-only", true),
        ("/ro/below/new: Read-only", false),
        ("/ro/below/in ner/new: Read-only", false),
        ("/rro/below/in ner/new: Read-only", true),
        ("/noexec/run runs", false),
        ("/noexec/below/run runs", true),
        ("/rnoexec/below/run runs", false),
    ] {
        ensure!(found.contains(part) == expected, "{part}: {found}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_mount_has_the_propagation_that_its_options_name() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let script =
        r"sed -n 's/.* \/m [^ ]* \(.*\)- .*/\1/p' /proc/self/mountinfo | grep -o '^shared\|^unbindable' || true";
    for (propagation, expected) in
        [("rprivate", ""), ("shared", "shared"), ("rshared", "shared"), ("unbindable", "unbindable")]
    {
        for mount in [bind(folder.path(), "/m", &["rbind", propagation]), tmpfs("/m", &[propagation])] {
            let found = same(|containerd| run(containerd, std::slice::from_ref(&mount), script, as_it_is))?;
            ensure!(found.trim() == expected, "{mount}: {found}");
        }
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn an_option_that_nothing_applies_is_rejected_by_name() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let table = [
        (
            tmpfs("/m", &["ro", "frobnicate"]),
            r#"mounts[8].options "frobnicate": is neither a mount option nor one of tmpfs"#,
        ),
        (tmpfs("/m", &["size=abc"]), r#"mounts[8].options "size=abc": is not a size"#),
        (tmpfs("/m", &["remount"]), r#"mounts[8].options "remount": a container's mounts are new"#),
        (tmpfs("/m", &["nofail"]), r#"mounts[8].options "nofail": is an option for /etc/fstab"#),
        (
            bind(folder.path(), "/m", &["rbind", "size=1m"]),
            r#"mounts[8].options "size=1m": is not an option of a bind"#,
        ),
        (bind(folder.path(), "/m", &["rbind", "tmpcopyup"]), r#"mounts[8].options "tmpcopyup": applies to tmpfs only"#),
    ];
    for (mount, expected) in table {
        let id = tested()?.id("bad-option");
        let mut spec = bundle::spec(&id, &["true"]);
        bundle::append(&mut spec, "/mounts", [mount]);
        let message = Shim::start(tested()?, &id, &spec)?.create_error()?;
        ensure!(message.contains(expected), "{message}");
    }
    Ok(())
}
