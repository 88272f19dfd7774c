//! The effects of the configuration: each key changes what is booted, or whether it is booted.

use oci_spec::runtime::LinuxNamespaceType;

use super::*;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use base64ct::{Base64Url, Encoding};

use crate::config::keys::KEYS;
use crate::config::load::parse;
use crate::config::settings::PoolSettings;
use crate::host::open_files::FileLimits;
use crate::vmm::Board;
use crate::vmm::factory::qemu::args::arguments;
use crate::vmm::factory::qemu::args::tests::FDS;

const SPEC: &str = include_str!("../rootfs/testdata/ctr-1.6.json");

const NAME: SandboxName<'_> = SandboxName { namespace: "ns", id: "c1" };

/// An annotation of these tests: adds a bind mount with this source.
const MOUNTED: &str = "test.mounted";
/// An annotation of these tests: adds a user namespace.
const IN_USER_NAMESPACE: &str = "test.in-user-namespace";
/// The annotation of a pod's sandbox container. These tests remove its PID namespace.
const POD_WITH_HOST_PID: (&str, &str) = ("io.kubernetes.cri.container-type", "sandbox");

/// A host without KVM whose files are all empty: `{host}/beside` has the files that are found without a configuration,
/// `{host}/other` the same files. Unless the configuration says otherwise, it accepts emulation.
struct TestHost {
    folder: tempfile::TempDir,
    places: Places,
}

/// What would be booted, or why nothing is.
type Outcome = Result<Booted, String>;

#[derive(Debug)]
struct Booted {
    plan: BootPlan,
    /// The guest's spec.
    spec: Spec,
    qemu: PathBuf,
    args: Vec<String>,
    pool: PoolSettings,
    root: PlannedRoot,
}

impl TestHost {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["beside", "other"] {
            let place = folder.path().join(name);
            std::fs::create_dir(&place).unwrap();
            for file in ["vmlinux", "initrd.img", "initrd-debug.img", "virtiofsd", "qemu-system-x86_64"] {
                std::fs::write(place.join(file), "").unwrap();
            }
        }
        for folder in ["other", "other/ns"].map(|name| folder.path().join(name)) {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("workspace"), "a secret").unwrap();
        }
        let volume = Base64Url::encode_string(folder.path().join("other").as_os_str().as_bytes());
        let volume = folder.path().join("other/direct").join(volume);
        std::fs::create_dir_all(&volume).unwrap();
        let info = r#"{"volume-type": "block", "device": "/dev/none", "fstype": "ext4"}"#;
        std::fs::write(volume.join("mountInfo.json"), info).unwrap();
        // The file stays when the listener is gone.
        drop(std::os::unix::net::UnixListener::bind(folder.path().join("other/socket")).unwrap());
        let beside = folder.path().join("beside");
        let places = Places {
            path: Some(beside.clone().into()),
            beside: Some(beside),
            kvm: false,
            vhost_vsock: true,
            state: folder.path().join("state"),
            accounts: folder.path().into(),
            files: FileLimits { hard: 20_000, max: 1_000_000, raisable: false },
        };
        Self { folder, places }
    }

    fn here(&self, text: &str) -> String {
        text.replace("{host}", self.folder.path().to_str().unwrap())
    }

    fn outcome(&self, config: &str) -> Outcome {
        // An annotation that is allowed by default.
        self.outcome_with(config, ("io.husk.vsock", "true"))
    }

    fn outcome_with(&self, config: &str, (name, value): (&str, &str)) -> Outcome {
        self.outcome_of(config, serde_json::json!({ name: value }), None)
    }

    fn outcome_of(&self, config: &str, annotations: serde_json::Value, booted_with: Option<&Extras>) -> Outcome {
        let mut spec: serde_json::Value = serde_json::from_str(SPEC).unwrap();
        if let Some(source) = annotations.get(MOUNTED) {
            let mount = serde_json::json!({"destination": "/in", "type": "bind", "source": source});
            spec["mounts"].as_array_mut().unwrap().push(mount);
        }
        if annotations.get(IN_USER_NAMESPACE).is_some() {
            spec["linux"]["namespaces"].as_array_mut().unwrap().push(serde_json::json!({"type": "user"}));
        }
        if annotations.get(POD_WITH_HOST_PID.0).is_some() {
            spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "pid");
        }
        spec["annotations"] = annotations;
        let booted_with = booted_with.map(|extras| BootedWith { extras: extras.clone(), user: None });
        self.outcome_of_spec(config, &spec, booted_with.as_ref())
    }

    fn outcome_of_spec(&self, config: &str, spec: &serde_json::Value, booted_with: Option<&BootedWith>) -> Outcome {
        std::fs::write(self.folder.path().join("config.json"), spec.to_string()).unwrap();
        let emulated = if config.contains("accel") { "" } else { "accel = \"tcg\"\n" };
        let config = parse(&format!("{emulated}{config}"), Path::new("/c.toml")).unwrap();
        let bundle = self.folder.path().display().to_string();
        let request = CreateTaskRequest { id: "c1".into(), bundle, ..Default::default() };
        let siblings = Siblings { first: booted_with.is_none(), booted_with, ..Siblings::NONE };
        let prepared = prepare_with(config, &self.places, &request, NAME, siblings).map_err(|e| e.to_string())?;
        let (_, plan) = plan(&prepared, Attachments::new("/share".into()));
        let Board::Qemu(board) = prepared.boot.config.board;
        let args = arguments(&plan.spec, board, &FDS);
        let pool = prepared.boot.config.pool;
        let (root, qemu) = (prepared.root, prepared.boot.host.vmm);
        Ok(Booted { plan, spec: prepared.rewritten.spec, qemu, args, pool, root })
    }
}

/// The value of one of QEMU's arguments.
fn value(outcome: &Outcome, option: &str) -> String {
    let Ok(Booted { args, .. }) = outcome else { return "refused".to_owned() };
    args.windows(2).find(|pair| pair[0] == option).map(|pair| pair[1].clone()).unwrap_or_default()
}

/// The word of the kernel's command line that starts with `beginning`.
fn word(outcome: &Outcome, beginning: &str) -> String {
    let line = value(outcome, "-append");
    line.split(' ').find(|word| word.starts_with(beginning)).unwrap_or("no such word").to_owned()
}

/// A property of what would be booted, or why nothing is.
fn booted(outcome: &Outcome, show: fn(&Booted) -> String) -> String {
    outcome.as_ref().map_or_else(Clone::clone, show)
}

/// A property of the overlay.
fn overlay(outcome: &Outcome, show: fn(&root::Overlay) -> String) -> String {
    let overlay = outcome.as_ref().map(|booted| booted.root.overlay.as_ref().map(show));
    overlay.map_or_else(Clone::clone, |shown| shown.unwrap_or_default())
}

/// A key, a value, the property that the value changes, and the property's expected beginning.
type Proof = (&'static str, &'static str, fn(&Outcome) -> String, &'static str);

const PROOFS: &[Proof] = &[
    ("vcpus", "3", |o| value(o, "-smp"), "3"),
    ("max_vcpus", "4", |o| value(o, "-smp"), "4"),
    ("profile", "\"throughput\"", |o| value(o, "-smp"), "4"),
    ("max_memory_mib", "300", |o| value(o, "-m"), "300M"),
    ("memory_mib", "300", |o| value(o, "-m"), "300M"),
    ("balloon_target_mib", "300", |o| booted(o, |b| format!("{:?}", b.plan.balloon_target_mib)), "Some(300)"),
    ("hugepages", "true", |o| value(o, "-object"), "memory-backend-memfd,id=memory,size=512M,share=on,hugetlb=on"),
    (
        "kernel",
        "\"{host}/other/vmlinux\"",
        |o| booted(o, |b| b.plan.spec.kernel.display().to_string()),
        "{host}/other/vmlinux",
    ),
    (
        "initrd",
        "\"{host}/other/initrd.img\"",
        |o| booted(o, |b| b.plan.spec.initrd.display().to_string()),
        "{host}/other/initrd.img",
    ),
    (
        "kernel_sha256",
        "\"ABababababababababababababababababababababababababababababababab\"",
        |o| booted(o, |b| format!("{:?}", b.plan.spec.kernel_sha256)),
        "Some(abab",
    ),
    (
        "initrd_sha256",
        "\"cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd\"",
        |o| booted(o, |b| format!("{:?}", b.plan.spec.initrd_sha256)),
        "Some(cdcd",
    ),
    (
        "image_dir",
        "\"{host}/other\"",
        |o| booted(o, |b| format!("{} {}", b.plan.spec.kernel.display(), b.plan.spec.initrd.display())),
        "{host}/other/vmlinux {host}/other/initrd.img",
    ),
    ("accel", "\"kvm\"", |o| booted(o, |b| format!("{:?}", b.plan.spec.accel)), "accel = \"kvm\": no hardware"),
    ("tcg_cache_mib", "96", |o| value(o, "-accel"), "tcg,thread=multi,tb-size=96"),
    ("vsock", "\"vhost\"", |o| booted(o, |b| format!("{:?}", b.plan.carrier)), "Kernel"),
    ("streams", "\"ttrpc\"", |o| booted(o, |b| b.plan.raw_streams.to_string()), "false"),
    ("machine", "\"q35\"", |o| value(o, "-machine"), "q35,"),
    (
        "qemu",
        "\"{host}/other/qemu-system-x86_64\"",
        |o| booted(o, |b| b.qemu.display().to_string()),
        "{host}/other/qemu-system-x86_64",
    ),
    ("vm_ids", "\"7000:8\"", |o| booted(o, |b| b.plan.ids.to_string()), "7000:8"),
    (
        "virtiofsd",
        "\"{host}/other/virtiofsd\"",
        |o| booted(o, |b| b.plan.virtiofsd.display().to_string()),
        "{host}/other/virtiofsd",
    ),
    ("virtiofsd_open_files", "3000", |o| booted(o, |b| b.plan.open_files.limit.to_string()), "3000"),
    ("network", "\"user\"", |o| value(o, "-netdev"), "user,id=user,"),
    // Addresses of no host (RFC 5737): the check that follows finds out.
    (
        "port_addresses",
        "[\"192.0.2.1\"]\nnetwork = \"user\"",
        |o| booted(o, |_| "a VM".to_owned()),
        "annotation io.husk.ports: the host's port 192.0.2.1:8000/tcp: 192.0.2.1 is not an address of this host",
    ),
    (
        "port_ranges",
        "true\nport_addresses = [\"192.0.2.1\"]\nnetwork = \"user\"",
        |o| booted(o, |_| "a VM".to_owned()),
        "annotation io.husk.ports: the host's port 192.0.2.1:8000/tcp: 192.0.2.1 is not an address of this host",
    ),
    ("host_pid", "\"pod\"", |o| booted(o, |_| "a VM".to_owned()), "a VM"),
    ("io_uring", "true", |o| word(o, "sysctl.kernel.io_uring"), "sysctl.kernel.io_uring_disabled=0"),
    (
        "user_namespaces",
        "false",
        |o| booted(o, |_| "a VM".to_owned()),
        "linux.namespaces[].type = \"user\": husk's configuration does not allow user namespaces: user_namespaces = false",
    ),
    ("kernel_params", "[\"nosmt\"]", |o| word(o, "nosmt"), "nosmt"),
    (
        "debug",
        "true",
        |o| booted(o, |b| format!("{} {}", b.plan.spec.guest.debug, b.plan.spec.initrd.display())),
        "true {host}/beside/initrd-debug.img",
    ),
    ("log_level", "\"debug\"", |o| word(o, "husk.log="), "husk.log=debug"),
    ("kill_timeout_ms", "6", |o| booted(o, |b| format!("{:?}", b.plan.kill_timeout)), "6ms"),
    ("boot_timeout_ms", "5", |o| booted(o, |b| format!("{:?}", b.plan.boot_timeout)), "5ms"),
    ("call_timeout_ms", "6", |o| booted(o, |b| format!("{:?}", b.plan.call_timeout)), "6ms"),
    ("heartbeat_interval_ms", "7", |o| word(o, "husk.heartbeat_ms="), "husk.heartbeat_ms=7"),
    (
        "extras_max_mib",
        "0\nallowed_annotations = [\"io.husk.extras.files\"]",
        |o| booted(o, |_| "a VM".to_owned()),
        "annotation io.husk.extras.files = 8 bytes: more than extras_max_mib = 0",
    ),
    (
        "allowed_annotations",
        "[\"io.husk.vcpus\"]",
        |o| booted(o, |_| "a VM".to_owned()),
        "annotation io.husk.vsock = \"true\": not among the allowed_annotations",
    ),
    (
        "metadata_key",
        "\"{host}/other/key\"",
        |o| booted(o, |b| b.plan.tokens.key.display().to_string()),
        "{host}/other/key",
    ),
    ("pool", "3", |o| booted(o, |b| b.pool.size.to_string()), "3"),
    ("pool_idle_ms", "8", |o| booted(o, |b| format!("{:?}", b.pool.idle)), "8ms"),
    ("pool_max_memory_mib", "900", |o| booted(o, |b| format!("{:?}", b.pool.max_memory_mib)), "Some(900)"),
    ("network_spare_nics", "2", |o| booted(o, |b| b.plan.spare_nics.to_string()), "2"),
    ("token_host", "\"node-7\"", |o| booted(o, |b| format!("{:?}", b.plan.tokens.host)), "Some(\"node-7\")"),
    ("token_lifetime_ms", "7", |o| booted(o, |b| format!("{:?}", b.plan.tokens.lifetime)), "7ms"),
    (
        "workspace_dir",
        "\"{host}/other\"",
        |o| booted(o, |b| format!("{:?}", b.plan.workspace)),
        "Some(Workspace(8 bytes))",
    ),
    ("volume_dirs", "[\"{host}/other\"]", |o| booted(o, |b| b.plan.spec.guest.disks.to_string()), "true"),
    ("direct_volume_dir", "\"{host}/other/direct\"", |o| booted(o, |b| b.plan.spec.guest.disks.to_string()), "true"),
    (
        "rootfs",
        "\"overlay\"",
        |o| booted(o, |b| format!("{:?} {}", b.root.choice.kind, b.plan.spec.guest.disks)),
        "Overlay true",
    ),
    (
        "layer_cache_dir",
        "\"/layers\"",
        |o| overlay(o, |overlay| overlay.store.folder().display().to_string()),
        "/layers",
    ),
    ("layer_cache_mib", "64", |o| overlay(o, |overlay| overlay.store.limit().to_string()), "67108864"),
    ("overlay_mib", "64", |o| overlay(o, |overlay| overlay.scratch.mib.to_string()), "64"),
    ("copy_back_timeout_ms", "8", |o| overlay(o, |overlay| format!("{:?}", overlay.timeout)), "Some(8ms)"),
    (
        "scratch_dir",
        "\"/none\"",
        |o| booted(o, |_| "a VM".to_owned()),
        "scratch_dir = \"/none\": is not a folder of the host",
    ),
    ("sockets", "[\"{host}/other/\"]", |o| booted(o, |b| b.spec.mounts().iter().flatten().count().to_string()), "8"),
];

/// The annotation that a key needs to have an effect.
const WITH: &[(&str, (&str, &str))] = &[
    ("port_addresses", ("io.husk.ports", "tcp:192.0.2.1:8000:80")),
    ("port_ranges", ("io.husk.ports", "tcp:192.0.2.1:8000-8001:80-81")),
    ("workspace_dir", ("io.husk.workspace", "{host}/other/ns/workspace")),
    ("user_namespaces", (IN_USER_NAMESPACE, "true")),
    ("host_pid", POD_WITH_HOST_PID),
    ("sockets", (MOUNTED, "{host}/other/socket")),
    ("volume_dirs", ("io.husk.volumes", r#"[{"source": "{host}/other/a.img", "destination": "/data"}]"#)),
    ("direct_volume_dir", (MOUNTED, "{host}/other")),
    ("scratch_dir", ("io.husk.scratch_mib", "64")),
    ("overlay_mib", ("io.husk.rootfs", "overlay")),
    ("copy_back_timeout_ms", ("io.husk.rootfs", "overlay")),
    ("layer_cache_dir", ("io.husk.rootfs", "overlay")),
    ("layer_cache_mib", ("io.husk.rootfs", "overlay")),
    ("extras_max_mib", ("io.husk.extras.files", r#"{"/x": {"source": "{host}/other/workspace", "mode": "0644"}}"#)),
];

#[test]
fn every_key_has_an_effect() {
    let host = TestHost::new();
    assert!(host.outcome("").is_ok(), "{:?}", host.outcome("").err());
    for key in KEYS {
        let proof = PROOFS.iter().find(|proof| proof.0 == key.name);
        let (_, given, show, expected) = proof.unwrap_or_else(|| panic!("the test has no effect for {}", key.name));
        let line = host.here(&format!("{} = {given}\n", key.name));
        let with = WITH.iter().find(|with| with.0 == key.name).map_or(("io.husk.vsock", "true"), |with| with.1);
        let with = (with.0, host.here(with.1));
        let outcome = |config: &str| host.outcome_with(config, (with.0, &with.1));
        let (expected, shows) = (host.here(expected), show(&outcome(&line)));
        assert!(shows.starts_with(&expected), "{line}{shows}, expected {expected}");
        let before = show(&outcome(""));
        assert!(!before.starts_with(&expected), "{line}{before} without the key too");
    }
}

#[test]
fn an_annotation_overrides_the_configured_debug_mode() {
    // The configuration, the annotation, and the expected kernel parameter, initramfs and log level.
    let table = [
        ("", None, "no such word", "initrd.img", "warn"),
        ("debug = true", None, "husk.debug=1", "initrd-debug.img", "debug"),
        ("debug = true\nlog_level = \"trace\"", None, "husk.debug=1", "initrd-debug.img", "trace"),
        ("", Some("true"), "husk.debug=1", "initrd-debug.img", "debug"),
        ("debug = true", Some("false"), "no such word", "initrd.img", "warn"),
        ("initrd = \"{host}/other/initrd.img\"", Some("true"), "husk.debug=1", "initrd.img", "debug"),
    ];
    let host = TestHost::new();
    for (text, annotation, parameter, initrd, level) in table {
        let annotations = match annotation {
            Some(value) => serde_json::json!({ "io.husk.debug": value }),
            None => serde_json::json!({}),
        };
        let outcome = host.outcome_of(&host.here(text), annotations, None);
        assert_eq!(word(&outcome, "husk.debug"), parameter, "{text} {annotation:?}");
        assert_eq!(word(&outcome, "husk.log="), format!("husk.log={level}"), "{text} {annotation:?}");
        let shown = booted(&outcome, |b| b.plan.spec.initrd.file_name().unwrap().display().to_string());
        assert_eq!(shown, initrd, "{text} {annotation:?}");
    }
    std::fs::remove_file(host.folder.path().join("beside/initrd-debug.img")).unwrap();
    let refused = booted(&host.outcome_with("", ("io.husk.debug", "true")), |_| "a VM".to_owned());
    assert!(refused.starts_with("initrd: no initrd for debug mode found; looked for "), "{refused}");
}

#[test]
fn extras_are_given_to_a_new_vm_and_compared_with_those_of_a_booted_one() {
    let host = TestHost::new();
    let allowed = "allowed_annotations = [\"io.husk.extras.files\", \"io.husk.supervisor\"]";
    let words = ["husk.extras", "husk.supervisor"];
    let without = host.outcome("");
    assert_eq!(words.map(|name| word(&without, name)), ["no such word"; 2]);
    assert_eq!(without.map(|booted| booted.plan.spec.guest.supervisor), Ok(false));

    let [agent, none] = ["other/workspace", "none"].map(|name| host.here(&format!("{{host}}/{name}")));
    let asked = |path: &str, supervisor: &str| {
        let files = serde_json::json!({"/run/husk/supervisor": {"source": path, "mode": "0755"}}).to_string();
        serde_json::json!({ "io.husk.extras.files": files, "io.husk.supervisor": supervisor })
    };
    let run = host.outcome_of(allowed, asked(&agent, "true"), None);
    assert_eq!(words.map(|name| word(&run, name)), ["husk.extras=husk-extras", "husk.supervisor=1"]);
    assert_eq!(run.map(|booted| booted.plan.spec.guest.supervisor), Ok(true));
    let not_run = host.outcome_of(allowed, asked(&agent, "false"), None);
    assert_eq!(words.map(|name| word(&not_run, name)), ["husk.extras=husk-extras", "no such word"]);
    // Reported together with other problems.
    let no_agent = serde_json::json!({ "io.husk.supervisor": "true" });
    let refused = host.outcome_of(&format!("{allowed}\nkernel = \"/k\""), no_agent, None).unwrap_err();
    assert!(refused.contains("\"true\": there is no agent") && refused.contains("kernel = \"/k\""), "{refused}");
    // The files of a booted VM are not opened again.
    let booted_with = Extras {
        files: crate::config::extras::parse(asked(&none, "")["io.husk.extras.files"].as_str().unwrap()).unwrap(),
        supervisor: None,
    };
    assert!(host.outcome_of(allowed, asked(&none, "true"), Some(&booted_with)).is_ok());
    let refused = host.outcome_of(allowed, asked(&agent, "false"), Some(&booted_with)).unwrap_err();
    assert!(
        refused.contains("extras cannot be added later") && refused.contains("booted with a supervisor"),
        "{refused}"
    );
}

#[test]
fn every_key_and_every_annotation_has_a_row_in_the_documentation() {
    let page = include_str!("../../../docs/configuration.md");
    let names = KEYS.iter().map(|key| key.name).chain(crate::config::names::NAMES);
    let missing: Vec<_> = names.filter(|name| !page.contains(&format!("\n| `{name}` |"))).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn only_the_metadata_service_gets_the_workspace() {
    let host = TestHost::new();
    let json = r#"{"password": "hunter2"}"#;
    let Booted { plan, spec, args, .. } = host.outcome_with("", ("io.husk.workspace", json)).map_err(drop).unwrap();
    assert_eq!(plan.workspace.as_ref().unwrap().bytes(), json.as_bytes());
    let elsewhere = format!("{plan:?} {spec:?} {} {args:?}", serde_json::to_string(&spec).unwrap());
    assert!(!elsewhere.contains("hunter2") && !elsewhere.contains("io.husk.workspace"), "{elsewhere}");
    let refused = host.outcome_with("", ("io.husk.workspace", &json.replace('}', ""))).err().unwrap();
    assert_eq!(
        refused,
        "annotation io.husk.workspace = (22 bytes): must be JSON, or the absolute path of a file: EOF while parsing an object at line 1 column 22"
    );
}

/// A container's network, as the guest's namespaces and the machine's arguments show it.
fn network(outcome: &Outcome) -> String {
    booted(outcome, |booted| {
        let linux = booted.spec.linux().as_ref().unwrap();
        let mut namespaces = linux.namespaces().iter().flatten();
        let own = namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::Network);
        let user = booted.args.iter().any(|arg| arg.starts_with("user,id=user"));
        format!("{} namespace, {} card", if own { "a new" } else { "the VM's" }, if user { "a" } else { "no" })
    })
}

#[test]
fn user_mode_is_for_containers_that_nothing_else_connects() {
    type Change = fn(&mut serde_json::Value);
    const USER: &str = "network = \"user\"";
    const CONNECTED: &str = "the VM's namespace, a card";
    const LONELY: &str = "the VM's namespace, no card";
    let host = TestHost::new();
    let hook: Change = |spec| spec["hooks"] = serde_json::json!({"createRuntime": [{"path": "/bin/true"}]});
    let cni: Change = |spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        let network = namespaces.iter_mut().find(|namespace| namespace["type"] == "network").unwrap();
        network["path"] = "/nonexistent/netns".into();
    };
    let userns: Change = |spec| {
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(serde_json::json!({"type": "user"}));
    };
    let conflict = "annotation io.husk.network = \"user\": the spec names the network namespace /nonexistent/netns (linux.namespaces[";
    let no_namespace = "linux.namespaces[4].path: open the network namespace /nonexistent/netns";
    let table: [(&str, serde_json::Value, Change, &str); 11] = [
        ("", serde_json::json!({}), |_| (), LONELY),
        (USER, serde_json::json!({}), |_| (), CONNECTED),
        ("", serde_json::json!({"io.husk.network": "user"}), |_| (), CONNECTED),
        (USER, serde_json::json!({"io.husk.network": "none"}), |_| (), LONELY),
        // What connects a network in a hook keeps its network, unless the annotation asks for another one.
        (USER, serde_json::json!({}), hook, LONELY),
        ("", serde_json::json!({"io.husk.network": "user"}), hook, CONNECTED),
        // The configuration's default does not conflict with a namespace.
        (USER, serde_json::json!({}), cni, no_namespace),
        ("", serde_json::json!({"io.husk.network": "user"}), cni, conflict),
        (
            "",
            serde_json::json!({"io.husk.network": "none"}),
            cni,
            "annotation io.husk.network = \"none\": the spec names",
        ),
        (
            "",
            serde_json::json!({"io.husk.ports": "tcp:18080:80"}),
            |_| (),
            "annotation io.husk.ports = 127.0.0.1:18080/tcp -> 80: ports need user-mode networking",
        ),
        (
            USER,
            serde_json::json!({}),
            userns,
            "config.json: linux.namespaces: a container with a user namespace cannot use user-mode networking yet",
        ),
    ];
    for (config, annotations, change, expected) in table {
        let mut spec: serde_json::Value = serde_json::from_str(SPEC).unwrap();
        spec["annotations"] = annotations.clone();
        change(&mut spec);
        let shown = network(&host.outcome_of_spec(config, &spec, None));
        assert!(shown.contains(expected), "{config} {annotations}: {shown}");
    }
}

#[test]
fn a_later_container_has_the_network_of_its_vm() {
    let host = TestHost::new();
    let outcome = |annotations: serde_json::Value, user: Option<UserNetwork>| {
        let mut spec: serde_json::Value = serde_json::from_str(SPEC).unwrap();
        spec["annotations"] = annotations;
        host.outcome_of_spec("", &spec, Some(&BootedWith { user, ..BootedWith::default() }))
    };
    // A port in use: that of the sandbox itself.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mapping = serde_json::json!({"io.husk.network": "user", "io.husk.ports": format!("tcp:{port}:80")});
    let refused = booted(&host.outcome_of("", mapping.clone(), None), |_| "a VM".to_owned());
    let expected = format!("annotation io.husk.ports: the host's port 127.0.0.1:{port}/tcp is in use by ");
    assert!(refused.starts_with(&expected) && refused.contains("PID"), "{refused}");

    let user = || {
        let host = crate::network::user::HostPort {
            protocol: crate::network::user::Protocol::Tcp,
            address: std::net::Ipv4Addr::LOCALHOST,
            port,
        };
        Some(UserNetwork { ports: vec![crate::network::user::PortMapping { host, guest: 80 }] })
    };
    let table = [
        (serde_json::json!({}), user(), "the VM's namespace"),
        (mapping.clone(), user(), "the VM's namespace"),
        (serde_json::json!({}), None, "a new namespace"),
        (serde_json::json!({"io.husk.network": "none"}), user(), "booted with user-mode networking"),
        (serde_json::json!({"io.husk.network": "user"}), None, "booted without user-mode networking"),
        (mapping, None, "io.husk.network = \"user\": the sandbox's VM was booted without"),
        (
            serde_json::json!({"io.husk.ports": format!("udp:{port}:80")}),
            user(),
            "/udp -> 80: the sandbox's VM was booted without it, and ports cannot be added later",
        ),
    ];
    for (annotations, user, expected) in table {
        let shown = network(&outcome(annotations.clone(), user));
        assert!(shown.contains(expected), "{annotations}: {shown}");
    }
}
