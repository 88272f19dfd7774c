//! ctr's specs, and single changes to them.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde_json::{Value, json};

use super::findings::SpecProblems;
use super::*;
use crate::host::unix::Access;

const PLAIN: &str = include_str!("../testdata/ctr-1.6.json");
const PRIVILEGED: &str = include_str!("../testdata/ctr-1.6-privileged.json");

fn host(path: &Path) -> io::Result<HostFile> {
    let files: HashMap<&str, (&str, FileKind)> = HashMap::from([
        ("/etc/hosts", ("/etc/hosts", FileKind::File)),
        ("/bundle/data", ("/bundle/data", FileKind::Dir)),
        ("/link", ("/srv/real", FileKind::Dir)),
        ("/srv/null", ("/dev/null", FileKind::CharDevice { major: 1, minor: 3 })),
        ("/dev/mem", ("/dev/mem", FileKind::CharDevice { major: 1, minor: 1 })),
        ("/dev/sda", ("/dev/sda", FileKind::BlockDevice)),
        ("/run/x.sock", ("/run/x.sock", FileKind::Socket)),
        ("/var/run/y.sock", ("/run/y.sock", FileKind::Socket)),
        ("/run/fifo", ("/run/fifo", FileKind::Fifo)),
    ]);
    match path.to_str().and_then(|path| files.get(path)) {
        Some((path, kind)) => Ok(HostFile { path: path.into(), kind: *kind }),
        None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
    }
}

/// Rewrites a spec of a container that is not the sandbox's first.
fn run(spec: &Value, host_is_unified: bool) -> Result<Rewritten, SpecProblems> {
    run_as(spec, host_is_unified, false)
}

fn run_as(spec: &Value, host_is_unified: bool, first: bool) -> Result<Rewritten, SpecProblems> {
    let spec = parse::parse(&serde_json::to_vec(spec).unwrap())?.spec;
    let sibling = |pid| (pid == 4001).then_some(Sibling { guest_pid: 40, in_vms_network: false });
    let check_socket = |path: &Path| match path.to_str() {
        Some("/run/x.sock") => Err("is not allowed".to_owned()),
        _ => Ok(Access { mode: 0o660, uid: 0, gid: 7 }),
    };
    let bundle = Path::new("/bundle");
    let context = Context {
        id: "c1",
        bundle,
        host_is_unified,
        inspect: &host,
        check_socket: &check_socket,
        direct: &|_| Ok(None),
        watch: &[],
        first,
        sibling: &sibling,
    };
    rewrite(spec, &context)
}

/// Whether the container has a network namespace of its own in the guest.
fn has_network(rewritten: &Rewritten) -> bool {
    let namespaces = rewritten.spec.linux().as_ref().unwrap().namespaces().iter().flatten();
    namespaces.into_iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Network)
}

fn plain() -> Value {
    serde_json::from_str(PLAIN).unwrap()
}

/// The default spec with a value added at a JSON pointer.
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
fn of_ctrs_default_spec_only_the_root_and_the_cgroup_change() {
    let rewritten = run(&plain(), true).unwrap();
    assert_eq!(rewritten.rootfs, Path::new("/bundle/rootfs"));
    assert_eq!(rewritten.cgroups_path.as_deref(), Some("/default/plain"));
    assert_eq!((rewritten.binds, rewritten.notes, rewritten.limits), (vec![], vec![], SpecLimits::default()));
    let mut expected = plain();
    expected["root"]["path"] = json!("/run/husk/share/18446744073709551615/source");
    expected["linux"]["cgroupsPath"] = json!("/containers/c1");
    let expected: Spec = serde_json::from_value(expected).unwrap();
    assert_eq!(rewritten.spec, expected);
}

#[test]
fn the_share_decides_where_the_guest_finds_a_containers_files() {
    let mut rewritten =
        run(&with("/mounts/-", json!({"destination": "/in", "source": "/link", "options": ["rbind"]})), true).unwrap();
    rewritten.add_file("/host/file".into(), Path::new("/etc/file"));
    let indexes: Vec<usize> = rewritten.binds.iter().map(|bind| bind.index).collect();
    let binds = indexes.iter().map(|index| (*index, format!("/share/{index}").into())).collect();
    rewritten.place(Places { root: "/share/root".into(), binds, below: Vec::new() });
    assert_eq!(rewritten.spec.root().as_ref().unwrap().path(), Path::new("/share/root"));
    let mounts = rewritten.spec.mounts().as_ref().unwrap();
    let placed: Vec<_> = mounts.iter().filter(|mount| mount.source().as_ref().unwrap().starts_with("/share")).collect();
    let expected = [("/in", indexes[0]), ("/etc/file", indexes[1])];
    assert_eq!(placed.len(), 2);
    for (mount, (destination, index)) in placed.iter().zip(expected) {
        assert_eq!(mount.destination(), Path::new(destination));
        assert_eq!(mount.source().as_deref(), Some(Path::new(&format!("/share/{index}"))));
    }
}

#[test]
fn a_privileged_container_gets_the_guests_devices() {
    let rewritten = run(&serde_json::from_str(PRIVILEGED).unwrap(), true).unwrap();
    let devices = rewritten.spec.linux().as_ref().unwrap().devices().as_ref().unwrap();
    assert_eq!(devices.iter().map(|d| d.path().to_str().unwrap()).collect::<Vec<_>>(), ["/dev/fuse", "/dev/null"]);
    assert_eq!(rewritten.notes, ["linux.devices: removed 3 host devices, which the VM does not have"]);
    assert_eq!(rewritten.limits, SpecLimits { memory: Some(100_000_000), cpus: None });
    assert_eq!(rewritten.rootfs, Path::new("/srv/image"));
    let [bind] = &rewritten.binds[..] else { panic!("{:?}", rewritten.binds) };
    assert_eq!((bind.index, bind.read_only, bind.recursive), (7, true, true));
    assert_eq!(
        rewritten.spec.mounts().as_ref().unwrap()[7].source().as_deref(),
        Some(Path::new("/run/husk/share/18446744073709551615/source"))
    );
}

#[test]
fn a_device_of_the_guest_can_be_added_to_a_privileged_container() {
    let mut spec: Value = serde_json::from_str(PRIVILEGED).unwrap();
    // As `ctr run --privileged --device /dev/fuse` does.
    let fuse = json!({"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o600});
    spec["linux"]["devices"].as_array_mut().unwrap().push(fuse);
    let rule = json!({"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"});
    spec["linux"]["resources"]["devices"].as_array_mut().unwrap().push(rule);
    let rewritten = run(&spec, true).unwrap();
    let devices = rewritten.spec.linux().as_ref().unwrap().devices().as_ref().unwrap();
    let found = devices.iter().map(|d| (d.path().to_str().unwrap(), d.file_mode())).collect::<Vec<_>>();
    assert_eq!((found[0], found[1].0, found.len()), (("/dev/fuse", Some(0o600)), "/dev/null", 2));

    // A later rule denies what the earlier one has allowed, and the message remains short.
    let disks: Vec<_> =
        (0..100).map(|n| json!({"path": format!("/dev/d{n}"), "type": "c", "major": 8, "minor": n})).collect();
    spec["linux"]["devices"] = json!(disks);
    spec["linux"]["resources"]["devices"].as_array_mut().unwrap().push(json!({"allow": false, "access": "rwm"}));
    let problems = run(&spec, true).unwrap_err().to_string();
    assert!(problems.ends_with("/dev/d3 (c 8:3), /dev/d4 (c 8:4) and 95 more"), "{problems}");
}

#[test]
fn a_block_device_gets_the_guests_numbers_and_no_rule_names_a_device_that_is_not_the_containers() {
    let mut spec: Value = serde_json::from_str(PRIVILEGED).unwrap();
    let device = |path: &str, minor: i64| json!({"path": path, "type": "b", "major": 8, "minor": minor});
    // One device under two paths.
    spec["linux"]["devices"] = json!([device("/dev/a", 0), device("/dev/b", 16), device("/dev/again", 0)]);
    let rule =
        |minor: i64, access: &str| json!({"allow": true, "type": "b", "major": 8, "minor": minor, "access": access});
    spec["linux"]["resources"]["devices"] =
        json!([{"allow": false, "access": "rwm"}, rule(0, "rwm"), rule(16, "r"), rule(32, "rwm")]);
    let mut rewritten = run(&spec, true).unwrap();
    let found: Vec<_> = rewritten.block_devices.iter().map(|device| (device.minor, device.read_only)).collect();
    assert_eq!(found, [(0, false), (16, true)]);
    // The numbers of one are those of the other on the host.
    rewritten.place_devices(&[((8, 0), (8, 16)), ((8, 16), (8, 48))]);
    let linux = rewritten.spec.linux().as_ref().unwrap();
    let minors: Vec<_> = linux.devices().iter().flatten().map(|device| device.minor()).collect();
    assert_eq!(minors, [16, 48, 16]);
    let rules = linux.resources().as_ref().unwrap().devices().as_ref().unwrap();
    assert_eq!(rules.iter().map(|rule| rule.minor()).collect::<Vec<_>>(), [None, Some(16), Some(48)]);
}

#[test]
fn a_disk_is_mounted_before_what_is_mounted_below_it() {
    let below = json!({"destination": "/data/below", "type": "tmpfs"});
    let mut rewritten = run(&with("/mounts/-", below), true).unwrap();
    for (serial, destination) in [("volume-1", "/data"), ("volume-2", "/database")] {
        rewritten.mount_disk(Path::new(&format!("/run/husk/disks/{serial}")), Path::new(destination), false);
    }
    let mounts = rewritten.spec.mounts().as_ref().unwrap();
    let last: Vec<_> = mounts[mounts.len() - 3..].iter().map(|mount| mount.destination().to_str().unwrap()).collect();
    assert_eq!(last, ["/data", "/data/below", "/database"]);
}

#[test]
fn a_filesystem_of_the_kernel_needs_no_source() {
    for source in [Value::Null, json!("")] {
        let mut mount = json!({"destination": "/in", "type": "tmpfs"});
        mount["source"] = source;
        let rewritten = run(&with("/mounts/-", mount), true).unwrap();
        let mounts = rewritten.spec.mounts().as_ref().unwrap();
        assert_eq!(mounts.last().unwrap().source().as_deref(), Some(Path::new("tmpfs")));
    }
}

#[test]
fn bind_mounts_follow_their_options() {
    let bind = |source: &str, is_dir, read_only, recursive, follows_host| Bind {
        index: 7,
        source: source.into(),
        is_dir,
        read_only,
        read_only_below: false,
        own_options: read_only,
        recursive,
        follows_host,
        watched: false,
        id_map: None,
    };
    let with_below = |read_only, read_only_below, own_options| Bind {
        read_only,
        read_only_below,
        own_options,
        ..bind("/srv/real", true, false, true, false)
    };
    for (mount, expected) in [
        (json!({"type": "bind", "source": "/etc/hosts"}), bind("/etc/hosts", false, false, true, false)),
        (
            json!({"type": "bind", "source": "data", "options": ["bind"]}),
            bind("/bundle/data", true, false, false, false),
        ),
        (json!({"type": "none", "source": "/link", "options": ["rbind"]}), bind("/srv/real", true, false, true, false)),
        (json!({"source": "/link", "options": ["bind", "ro"]}), bind("/srv/real", true, true, false, false)),
        (json!({"source": "/link", "options": ["rbind", "rro"]}), with_below(true, true, false)),
        (json!({"source": "/link", "options": ["rbind", "ro", "rrw"]}), with_below(false, false, true)),
        (json!({"source": "/link", "options": ["rbind", "ro", "rw"]}), with_below(false, false, true)),
        (json!({"source": "/link", "options": ["rbind", "noexec"]}), with_below(false, false, true)),
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
        assert_eq!(rewritten.binds, [expected], "{mount}");
        let guest = rewritten.spec.mounts().as_ref().unwrap().last().unwrap().clone();
        assert_eq!(guest.source().as_deref(), Some(Path::new("/run/husk/share/18446744073709551615/source")));
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
fn a_cgroup_mount_shows_only_the_containers_cgroups_as_on_v1() {
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
fn security_labels_are_removed_with_a_note() {
    for (pointer, removed) in [
        ("/process/apparmorProfile", "apparmor"),
        ("/process/selinuxLabel", "selinux"),
        ("/linux/mountLabel", "mountLabel"),
    ] {
        let rewritten = run(&with(pointer, json!("x")), true).unwrap();
        assert!(!serde_json::to_string(&rewritten.spec).unwrap().contains(removed), "{pointer}");
        assert!(rewritten.notes[0].contains(removed) && rewritten.notes[0].contains("\"x\""), "{:?}", rewritten.notes);
    }
}

#[test]
fn limits_come_from_memory_and_cpu_quota() {
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
        assert_eq!(rewritten.limits, SpecLimits { memory, cpus }, "{resources}");
    }
}

/// Checks that each spec has one problem that starts with the expected text.
fn assert_rejected<const N: usize>(table: [(Value, &str); N]) {
    for (spec, expected) in table {
        let SpecProblems(problems) = run(&spec, true).unwrap_err();
        let text = problems.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert!(text.len() == 1 && text[0].starts_with(expected), "{expected}\n{text:?}");
    }
}

#[test]
fn a_socket_is_relayed_to_the_file_that_its_path_leads_to() {
    let mount = json!({"destination": "/in", "type": "bind", "source": "/var/run/y.sock", "options": ["rbind", "ro"]});
    let rewritten = run(&with("/mounts/-", mount), true).unwrap();
    let access = Access { mode: 0o660, uid: 0, gid: 7 };
    assert_eq!(rewritten.sockets, [SocketMount { index: 7, path: "/run/y.sock".into(), access }]);
    assert_eq!(rewritten.binds, []);
    let source = rewritten.spec.mounts().as_ref().unwrap()[7].source().clone();
    assert_eq!(source.unwrap(), Path::new("/run/husk/sockets/c1/7"));
}

#[test]
fn mounts_that_need_the_host_are_rejected() {
    let bind = |source: &str| json!({"destination": "/in", "type": "bind", "source": source});
    assert_rejected([
        (with("/mounts/-", bind("/nonexistent")), r#"mounts[7].source "/nonexistent": on the host: No such file"#),
        (with("/mounts/-", json!({"destination": "/in", "type": "bind"})), "mounts[7].source: is missing"),
        (with("/mounts/-", bind("/run/x.sock")), r#"mounts[7].source "/run/x.sock": is not allowed"#),
        (with("/mounts/-", bind("/run/fifo")), r#"mounts[7].source "/run/fifo": a fifo of the host"#),
        (with("/mounts/-", bind("/dev/mem")), r#"mounts[7].source "/dev/mem": a device of the host"#),
        (with("/mounts/-", bind("/dev/sda")), r#"mounts[7].source "/dev/sda": a device of the host"#),
        (
            with("/mounts/-", json!({"destination": "/in", "type": "ext4", "source": "/dev/sda"})),
            r#"mounts[7].type "ext4": in a VM, a mount must be a bind mount or one of bpf, cgroup,"#,
        ),
        (with("/mounts/-", json!({"destination": "/in"})), "mounts[7].type: is missing"),
    ]);
}

#[test]
fn namespaces_devices_and_resources_of_the_host_are_rejected() {
    assert_rejected([
        (
            with("/linux/namespaces/-", json!({"type": "network", "path": "run/netns/x"})),
            r#"linux.namespaces[5].path "run/netns/x": joining a net namespace by its path on the host"#,
        ),
        (
            with("/linux/namespaces/-", json!({"type": "ipc", "path": "/proc/7/ns/ipc"})),
            r#"linux.namespaces[5].path "/proc/7/ns/ipc": process 7 does not represent a running container of this sandbox"#,
        ),
        (
            with("/linux/devices", json!([{"path": "/dev/sg0", "type": "c", "major": 21, "minor": 0}])),
            "linux.devices: devices of the host cannot be used in a VM: /dev/sg0 (c 21:0)",
        ),
        (with("/linux/intelRdt", json!({"closID": "a"})), "linux.intelRdt: "),
        (with("/linux/netDevices", json!({"eth1": {"name": "x"}})), r#"linux.netDevices "eth1": "#),
        (with("/root", Value::Null), "root: is missing"),
        (with("/linux", Value::Null), "linux: is missing"),
        (with("/process", Value::Null), "process: is missing"),
        (with("/vm", json!({"kernel": {"path": "/k"}})), "vm: "),
    ]);
}

#[test]
fn a_network_namespace_of_the_host_comes_alone_and_without_a_user_namespace() {
    let network = |path: &str| json!({"type": "network", "path": path});
    assert_rejected([
        (
            with("/linux/namespaces", json!([network("/run/netns/x"), {"type": "user"}])),
            r#"linux.namespaces[0].path "/run/netns/x": a container with a user namespace cannot use"#,
        ),
        (
            with("/linux/namespaces", json!([network("/run/netns/x"), network("/run/netns/y")])),
            r#"linux.namespaces[1].path "/run/netns/y": the spec names another network namespace already"#,
        ),
    ]);
}

#[test]
fn a_container_in_a_network_namespace_of_the_host_uses_the_vms() {
    let mut spec = with("/linux/namespaces", json!([{"type": "pid"}]));
    assert_eq!(run(&spec, true).unwrap().network, NetworkRequest::Shared);
    spec["linux"]["namespaces"] = json!([{"type": "network", "path": "/run/netns/x"}, {"type": "pid"}]);
    let rewritten = run(&spec, true).unwrap();
    assert!(!has_network(&rewritten));
    let field = "linux.namespaces[0].path".to_owned();
    assert_eq!(rewritten.network, NetworkRequest::OfHost(HostNetwork { field, path: "/run/netns/x".into() }));
}

#[test]
fn a_new_network_namespace_of_the_first_container_is_the_vms() {
    let table = [
        (json!([{"type": "network"}]), true, false),
        (json!([{"type": "network", "path": ""}]), true, false),
        (json!([{"type": "network"}]), false, true),
        // The VM's network namespace belongs to another user namespace.
        (json!([{"type": "network"}, {"type": "user"}]), true, true),
    ];
    for (namespaces, first, own) in table {
        let rewritten = run_as(&with("/linux/namespaces", namespaces.clone()), true, first).unwrap();
        assert_eq!((&rewritten.network, has_network(&rewritten)), (&NetworkRequest::New, own), "{namespaces} {first}");
    }
}

#[test]
fn hooks_that_act_inside_the_container_are_rejected() {
    let hook = json!([{"path": "/usr/bin/hook"}]);
    let inward = |arg: &str| json!([{"path": "/usr/bin/containerd", "args": ["containerd", "oci-hook", arg]}]);
    assert_rejected([
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
    ]);
}

#[test]
fn nerdctl_announces_the_links_that_its_hooks_add() {
    let table = [
        (r#"["bridge"]"#, 1),
        (r#"["front","back"]"#, 2),
        (r#"["none"]"#, 0),
        (r#"["host"]"#, 0),
        (r#"["container:0f"]"#, 0),
        ("front", 0),
    ];
    for (networks, links) in table {
        let spec = with("/annotations", json!({"nerdctl/networks": networks}));
        assert_eq!(run(&spec, true).unwrap().announced_links, links, "{networks}");
    }
    assert_eq!(run(&with("/hostname", json!("x")), true).unwrap().announced_links, 0);
}

#[test]
fn hooks_run_on_the_host_or_in_the_guest() {
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
    // Programs in the container's root, so the guest runs them.
    let left = serde_json::to_value(rewritten.spec.hooks()).unwrap();
    assert_eq!(left, json!({"startContainer": hook("/3")}));
    assert!(run(&plain(), true).unwrap().hooks.is_empty());
}

#[test]
fn all_problems_are_reported_at_once() {
    let mut spec = with("/linux/namespaces/-", json!({"type": "network", "path": "run/netns/x"}));
    spec["mounts"].as_array_mut().unwrap().push(json!({"destination": "/in", "type": "bind", "source": "/a"}));
    spec["mounts"].as_array_mut().unwrap().push(json!({"destination": "/in", "type": "bind", "source": "/b"}));
    let error = run(&spec, true).unwrap_err().to_string();
    for part in ["config.json: ", "linux.namespaces[5]", "mounts[7].source \"/a\"", "mounts[8].source \"/b\""] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn a_container_ends_with_its_init_process_if_it_has_its_own_pids_and_cannot_mount() {
    let without_pids = {
        let mut spec = plain();
        spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "pid");
        spec
    };
    let joined = {
        let mut spec = plain();
        spec["linux"]["namespaces"][0]["path"] = "/proc/4001/ns/pid".into();
        spec
    };
    for (name, spec, expected) in [
        ("ctr's default", plain(), true),
        ("the VM's PID namespace", without_pids, false),
        ("another container's", joined, false),
        ("may mount", with("/process/capabilities/bounding/-", "CAP_SYS_ADMIN".into()), false),
        ("all capabilities", with("/process/capabilities", Value::Null), false),
    ] {
        assert_eq!(run(&spec, true).unwrap().ends_with_init(), expected, "{name}");
    }
}
