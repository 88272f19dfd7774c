//! Tables: what ctr writes, and single changes to it.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::*;

const PLAIN: &str = include_str!("../testdata/ctr-1.6.json");
const PRIVILEGED: &str = include_str!("../testdata/ctr-1.6-privileged.json");

fn host(path: &Path) -> io::Result<Source> {
    let files: HashMap<&str, (&str, Kind)> = HashMap::from([
        ("/etc/hosts", ("/etc/hosts", Kind::File)),
        ("/bundle/data", ("/bundle/data", Kind::Dir)),
        ("/link", ("/srv/real", Kind::Dir)),
        ("/srv/null", ("/dev/null", Kind::CharDevice { major: 1, minor: 3 })),
        ("/dev/mem", ("/dev/mem", Kind::CharDevice { major: 1, minor: 1 })),
        ("/dev/sda", ("/dev/sda", Kind::BlockDevice)),
        ("/run/x.sock", ("/run/x.sock", Kind::Socket)),
        ("/run/fifo", ("/run/fifo", Kind::Fifo)),
    ]);
    match path.to_str().and_then(|path| files.get(path)) {
        Some((path, kind)) => Ok(Source { path: path.into(), kind: *kind }),
        None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
    }
}

fn run(spec: &Value, host_is_unified: bool) -> Result<Rewritten, Problems> {
    let spec = parse::parse(&serde_json::to_vec(spec).unwrap())?;
    let is_init = |pid| pid == 40;
    rewrite(
        spec,
        &Context { id: "c1", bundle: Path::new("/bundle"), host_is_unified, inspect: &host, is_init: &is_init },
    )
}

fn plain() -> Value {
    serde_json::from_str(PLAIN).unwrap()
}

/// The default spec with one more thing at a JSON pointer.
fn with(pointer: &str, value: Value) -> Value {
    let mut spec = plain();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    match spec.pointer_mut(parent).unwrap() {
        Value::Array(items) => items.push(value),
        Value::Object(fields) => {
            fields.insert(name.into(), value);
        }
        other => panic!("{other}"),
    }
    spec
}

#[test]
fn ctrs_default_spec_changes_in_two_places_only() {
    let rewritten = run(&plain(), true).unwrap();
    assert_eq!(rewritten.rootfs, Path::new("/bundle/rootfs"));
    assert_eq!(rewritten.cgroups_path.as_deref(), Some("/default/plain"));
    assert_eq!((rewritten.binds, rewritten.notes, rewritten.limits), (vec![], vec![], Limits::default()));
    let mut expected = plain();
    expected["root"]["path"] = json!("/run/husk/share/c1/rootfs");
    expected["linux"]["cgroupsPath"] = json!("/containers/c1");
    let expected: Spec = serde_json::from_value(expected).unwrap();
    assert_eq!(rewritten.spec, expected);
}

#[test]
fn a_privileged_container_gets_the_guests_devices() {
    let rewritten = run(&serde_json::from_str(PRIVILEGED).unwrap(), true).unwrap();
    let devices = rewritten.spec.linux().as_ref().unwrap().devices().as_ref().unwrap();
    assert_eq!(devices.iter().map(|d| d.path().to_str().unwrap()).collect::<Vec<_>>(), ["/dev/fuse", "/dev/null"]);
    assert_eq!(rewritten.notes, ["linux.devices: 3 devices of the host left out, the VM has not got them"]);
    assert_eq!(rewritten.limits, Limits { memory: Some(100_000_000), cpus: None });
    assert_eq!(rewritten.rootfs, Path::new("/srv/image"));
    let [bind] = &rewritten.binds[..] else { panic!("{:?}", rewritten.binds) };
    assert_eq!((bind.index, bind.read_only, bind.recursive), (7, true, true));
    assert_eq!(
        rewritten.spec.mounts().as_ref().unwrap()[7].source().as_deref(),
        Some(Path::new("/run/husk/share/c1/mounts/7"))
    );
}

#[test]
fn binds() {
    let bind = |source: &str, is_dir, read_only, recursive, follows_host| Bind {
        index: 7,
        source: source.into(),
        is_dir,
        read_only,
        recursive,
        follows_host,
    };
    for (mount, want) in [
        (json!({"type": "bind", "source": "/etc/hosts"}), bind("/etc/hosts", false, false, true, false)),
        (
            json!({"type": "bind", "source": "data", "options": ["bind"]}),
            bind("/bundle/data", true, false, false, false),
        ),
        (json!({"type": "none", "source": "/link", "options": ["rbind"]}), bind("/srv/real", true, false, true, false)),
        (json!({"source": "/link", "options": ["bind", "ro"]}), bind("/srv/real", true, true, false, false)),
        (json!({"source": "/link", "options": ["rbind", "rro"]}), bind("/srv/real", true, true, true, false)),
        (json!({"source": "/link", "options": ["rbind", "ro", "rw"]}), bind("/srv/real", true, false, true, false)),
        (json!({"source": "/link", "options": ["rbind", "rslave"]}), bind("/srv/real", true, false, true, true)),
        (json!({"source": "/link", "options": ["rbind", "rshared"]}), bind("/srv/real", true, false, true, true)),
        (
            json!({"source": "/link", "options": ["rbind", "rslave", "rprivate"]}),
            bind("/srv/real", true, false, true, false),
        ),
    ] {
        let mut mount = mount;
        mount["destination"] = json!("/in");
        let rewritten = run(&with("/mounts/-", mount.clone()), true).unwrap();
        assert_eq!(rewritten.binds, [want], "{mount}");
        let guest = rewritten.spec.mounts().as_ref().unwrap().last().unwrap().clone();
        assert_eq!(guest.source().as_deref(), Some(Path::new("/run/husk/share/c1/mounts/7")));
        assert_eq!(guest.options().is_some(), mount.get("options").is_some());
    }
}

#[test]
fn a_standard_device_is_bound_from_the_guest() {
    let mount = json!({"destination": "/in", "type": "bind", "source": "/srv/null", "options": ["bind"]});
    let rewritten = run(&with("/mounts/-", mount), true).unwrap();
    assert_eq!(rewritten.binds, []);
    let mounts = rewritten.spec.mounts().as_ref().unwrap();
    assert_eq!(mounts.last().unwrap().source().as_deref(), Some(Path::new("/dev/null")));
}

#[test]
fn a_cgroup_mount_shows_the_containers_own_part_as_on_v1() {
    let mount = json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]});
    for (unified, has_mount, added) in [(false, true, true), (true, true, false), (false, false, false)] {
        let spec = if has_mount { with("/mounts/-", mount.clone()) } else { plain() };
        let rewritten = run(&spec, unified).unwrap();
        let namespaces = rewritten.spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
        let found = namespaces.iter().any(|ns| ns.typ() == LinuxNamespaceType::Cgroup);
        assert_eq!(found, added, "unified {unified}, mount {has_mount}");
        assert_eq!(rewritten.notes.len(), usize::from(added));
    }
}

#[test]
fn what_protects_only_a_host_is_left_out_with_a_note() {
    for (pointer, gone) in [
        ("/process/apparmorProfile", "apparmor"),
        ("/process/selinuxLabel", "selinux"),
        ("/linux/mountLabel", "mountLabel"),
    ] {
        let rewritten = run(&with(pointer, json!("x")), true).unwrap();
        assert!(!serde_json::to_string(&rewritten.spec).unwrap().contains(gone), "{pointer}");
        assert!(rewritten.notes[0].contains(gone) && rewritten.notes[0].contains("\"x\""), "{:?}", rewritten.notes);
    }
}

#[test]
fn limits() {
    for (resources, memory, cpus) in [
        (json!({}), None, None),
        (json!({"memory": {"limit": 5}}), Some(5), None),
        (json!({"memory": {"limit": -1}, "cpu": {"quota": -1}}), None, None),
        (json!({"memory": {"limit": 0}, "cpu": {"quota": 0}}), None, None),
        (json!({"cpu": {"quota": 150_000, "period": 100_000}}), None, Some(2)),
        (json!({"cpu": {"quota": 200_000, "period": 100_000}}), None, Some(2)),
        (json!({"cpu": {"quota": 1000}}), None, Some(1)),
        (json!({"cpu": {"quota": 10, "period": 0}}), None, Some(1)),
        (json!({"cpu": {"quota": i64::MAX, "period": 1}}), None, None),
    ] {
        let rewritten = run(&with("/linux/resources", resources.clone()), true).unwrap();
        assert_eq!(rewritten.limits, Limits { memory, cpus }, "{resources}");
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let hook = json!([{"path": "/usr/bin/hook"}]);
    let inward = |arg: &str| json!([{"path": "/usr/bin/containerd", "args": ["containerd", "oci-hook", arg]}]);
    let nerdctl = |networks: &str| {
        let mut spec = with("/hooks", json!({"poststop": hook}));
        spec["annotations"] = json!({"nerdctl/networks": networks});
        spec
    };
    let bind = |source: &str| json!({"destination": "/in", "type": "bind", "source": source});
    for (spec, want) in [
        (with("/mounts/-", bind("/nonexistent")), r#"mounts[7].source "/nonexistent": on the host: No such file"#),
        (with("/mounts/-", json!({"destination": "/in", "type": "bind"})), "mounts[7].source: is missing"),
        (with("/mounts/-", bind("/run/x.sock")), r#"mounts[7].source "/run/x.sock": a socket of the host has nobody"#),
        (with("/mounts/-", bind("/run/fifo")), r#"mounts[7].source "/run/fifo": a fifo of the host"#),
        (with("/mounts/-", bind("/dev/mem")), r#"mounts[7].source "/dev/mem": a device of the host"#),
        (with("/mounts/-", bind("/dev/sda")), r#"mounts[7].source "/dev/sda": a device of the host"#),
        (
            with("/mounts/-", json!({"destination": "/in", "type": "ext4", "source": "/dev/sda"})),
            r#"mounts[7].type "ext4": in a VM, a mount is a bind or one of bpf, cgroup,"#,
        ),
        (with("/mounts/-", json!({"destination": "/in"})), "mounts[7].type: is missing"),
        (
            with("/linux/namespaces/-", json!({"type": "network", "path": "/run/netns/x"})),
            r#"linux.namespaces[5].path "/run/netns/x": joining a network namespace of the host (CNI)"#,
        ),
        (
            with("/linux/namespaces/-", json!({"type": "ipc", "path": "/proc/7/ns/ipc"})),
            r#"linux.namespaces[5].path "/proc/7/ns/ipc": process 7 is not the init of a container of this sandbox"#,
        ),
        (
            with("/linux/devices", json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}])),
            r#"linux.devices[0].path "/dev/sda": device b 8:0 of the host"#,
        ),
        (
            with("/hooks", json!({"createContainer": hook})),
            r#"hooks.createContainer[0].path "/usr/bin/hook": a program of the host cannot run in the namespaces"#,
        ),
        (
            with("/hooks", json!({"createRuntime": inward("--pid={{pid}}")})),
            r#"hooks.createRuntime[0].path "/usr/bin/containerd": a program of the host cannot act on a container"#,
        ),
        (with("/hooks", json!({"prestart": inward("{{rootfs}}")})), "hooks.prestart[0].path"),
        (
            with("/hooks", json!({"poststop": [{"path": "bin/hook"}]})),
            r#"hooks.poststop[0].path "bin/hook": must be an absolute path"#,
        ),
        (
            with("/hooks", json!({"poststart": [{"path": "/hook", "timeout": 0}]})),
            r#"hooks.poststart[0].timeout "0": must be a number of seconds"#,
        ),
        (nerdctl(r#"["bridge"]"#), r#"annotations nerdctl/networks "[\"bridge\"]": networks of the host (CNI)"#),
        (with("/linux/intelRdt", json!({"closID": "a"})), "linux.intelRdt: "),
        (with("/linux/netDevices", json!({"eth1": {"name": "x"}})), r#"linux.netDevices "eth1": "#),
        (with("/root", Value::Null), "root: is missing"),
        (with("/linux", Value::Null), "linux: is missing"),
        (with("/process", Value::Null), "process: is missing"),
        (with("/vm", json!({"kernel": {"path": "/k"}})), "vm: "),
    ] {
        let Problems(problems) = run(&spec, true).unwrap_err();
        let text = problems.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert!(text.len() == 1 && text[0].starts_with(want), "{want}\n{text:?}");
    }
    run(&nerdctl(r#"["none"]"#), true).unwrap();
}

#[test]
fn hooks_are_the_hosts_or_the_guests() {
    let hook = |path: &str| json!([{"path": path, "args": ["a", "b"], "env": ["A=1"], "timeout": 5}]);
    let hooks = json!({
        "prestart": hook("/1"), "createRuntime": hook("/2"), "startContainer": hook("/3"),
        "poststart": hook("/4"), "poststop": hook("/5"),
    });
    let rewritten = run(&with("/hooks", hooks), true).unwrap();
    let paths = |hooks: &[crate::host::hooks::Hook]| {
        hooks.iter().map(|hook| format!("{} {}", hook.field, hook.path.display())).collect::<Vec<_>>()
    };
    assert_eq!(paths(&rewritten.hooks.create), ["hooks.prestart[0] /1", "hooks.createRuntime[0] /2"]);
    assert_eq!(paths(&rewritten.hooks.poststart), ["hooks.poststart[0] /4"]);
    assert_eq!(paths(&rewritten.hooks.poststop), ["hooks.poststop[0] /5"]);
    let first = &rewritten.hooks.create[0];
    assert_eq!(
        (&first.args[..], &first.env[..], first.timeout),
        (&["a".into(), "b".into()][..], &["A=1".into()][..], Some(5))
    );
    // In the container's own root, so in the guest.
    let left = serde_json::to_value(rewritten.spec.hooks()).unwrap();
    assert_eq!(left, json!({"startContainer": hook("/3")}));
    assert!(run(&plain(), true).unwrap().hooks.is_empty());
}

#[test]
fn all_problems_come_at_once() {
    let mut spec = with("/linux/namespaces/-", json!({"type": "network", "path": "/run/netns/x"}));
    spec["mounts"].as_array_mut().unwrap().push(json!({"destination": "/in", "type": "bind", "source": "/a"}));
    spec["mounts"].as_array_mut().unwrap().push(json!({"destination": "/in", "type": "bind", "source": "/b"}));
    let error = run(&spec, true).unwrap_err().to_string();
    for part in ["config.json: ", "linux.namespaces[5]", "mounts[7].source \"/a\"", "mounts[8].source \"/b\""] {
        assert!(error.contains(part), "{part}: {error}");
    }
}
