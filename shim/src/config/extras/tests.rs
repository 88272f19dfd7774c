//! Valid and invalid annotations, and the extras that a later container may request.

use super::*;

pub(crate) fn texts(problems: Vec<Problem>) -> Vec<String> {
    problems.iter().map(ToString::to_string).collect()
}

pub(crate) fn file(destination: &str, source: impl Into<PathBuf>, mode: u32) -> ExtraFile {
    ExtraFile { destination: destination.into(), source: source.into(), mode }
}

pub(crate) fn extras(files: Vec<ExtraFile>, supervisor: Option<bool>) -> Extras {
    Extras { files, supervisor }
}

#[test]
fn valid_annotations_are_parsed() {
    let table = [
        ("{}", vec![]),
        (
            r#" {"/run/husk/supervisor": {"source": "/a b", "mode": "755"}, "/etc/x": {"mode": "0", "source": "/s"}} "#,
            vec![file("/etc/x", "/s", 0), file("/run/husk/supervisor", "/a b", 0o755)],
        ),
        (r#"{"/ä/.b/..c": {"source": "/s/../t", "mode": "0777"}}"#, vec![file("/ä/.b/..c", "/s/../t", 0o777)]),
        // Similar to paths of the kernel and the init, but allowed.
        (r#"{"/process": {"source": "/s", "mode": "0644"}}"#, vec![file("/process", "/s", 0o644)]),
        (r#"{"/run/husky": {"source": "/s", "mode": "0644"}}"#, vec![file("/run/husky", "/s", 0o644)]),
        (r#"{"/tmp/x": {"source": "/s", "mode": "0644"}}"#, vec![file("/tmp/x", "/s", 0o644)]),
    ];
    for (text, expected) in table {
        assert_eq!(parse(text), Ok(expected), "{text}");
    }
}

#[test]
fn invalid_destinations_are_reported_with_the_reason() {
    let long = format!("/{}", "x".repeat(256));
    let deep = format!("/{}", ["x"; 2048].join("/"));
    let kernels = |folder: &str| format!("outside of {folder}, which belongs to the kernel");
    let husks = |path: &str| format!("outside of {path}, which belongs to husk");
    let table = [
        ("", "must be an absolute path".to_owned()),
        ("etc/x", "must be an absolute path".to_owned()),
        ("/", "must be clean".to_owned()),
        ("/a/", "must be clean".to_owned()),
        ("//a", "must be clean".to_owned()),
        ("/a//b", "must be clean".to_owned()),
        ("/a/./b", "must be clean".to_owned()),
        ("/a/../b", "must be clean".to_owned()),
        ("/..", "must be clean".to_owned()),
        ("/a\0", "must be clean".to_owned()),
        (&long, "each name in it 255".to_owned()),
        (&deep, "at most 4095 bytes".to_owned()),
        ("/proc", kernels("/proc")),
        ("/proc/sys/kernel/core_pattern", kernels("/proc")),
        ("/sys/fs/cgroup/x", kernels("/sys")),
        ("/dev/shm/x", kernels("/dev")),
        ("/init", husks("/init")),
        ("/run", "is a folder".to_owned()),
        ("/tmp", "is a folder".to_owned()),
        ("/var/log", "is a folder".to_owned()),
        ("/run/husk", husks("/run/husk")),
        ("/run/husk/share/x", husks("/run/husk")),
        ("/run/husk/state/x", husks("/run/husk")),
        ("/run/husk/supervisor/x", husks("/run/husk")),
        ("/run/husk-supervisor.pid", husks("/run/husk-supervisor.pid")),
        ("/var/log/husk-supervisor.log", husks("/var/log/husk-supervisor.log")),
        ("/var/log/husk-supervisor.log.1", husks("/var/log/husk-supervisor.log.1")),
    ];
    for (destination, reason) in table {
        let text = serde_json::json!({ destination: {"source": "/s", "mode": "0644"} }).to_string();
        let problems = texts(parse(&text).unwrap_err());
        assert_eq!(problems.len(), 1, "{problems:?}");
        let named = format!("annotation io.husk.extras.files[{:?}] = {{", cut(destination));
        assert!(problems[0].starts_with(&named) && problems[0].contains(&reason), "{}", problems[0]);
    }
}

#[test]
fn every_problem_is_reported_with_field_and_value() {
    let text = r#"{
        "/a": {"source": "relative", "mode": "0888", "owner": 1},
        "/b": {"mode": 420},
        "/c": "/source",
        "/d": {"source": "/s", "mode": "0644"},
        "/d": {"source": "/t", "mode": "0644"},
        "/d/e": {"source": "/s", "mode": "04755"},
        "/f": {"source": "/s", "mode": "4755"},
        "/g": {"source": "/s", "mode": "+7"},
        "/h": {"source": "/s", "mode": ""}
    }"#;
    let octal = "must be permission bits as a string of octal digits, at most \"0777\"";
    let expected = [
        "[\"/a\"].source = \"relative\": must be an absolute path on the host".to_owned(),
        format!("[\"/a\"].mode = \"0888\": {octal}"),
        "[\"/a\"].owner = 1: unknown field; the fields are source and mode".to_owned(),
        "[\"/b\"].source: must be an absolute path on the host".to_owned(),
        format!("[\"/b\"].mode = 420: {octal}"),
        "[\"/c\"] = \"/source\": must be an object with \"source\" and \"mode\"".to_owned(),
        "[\"/d\"] = {\"mode\":\"0644\",\"source\":\"/s\"}: the destination cannot be a file and the folder of \"/d/e\""
            .to_owned(),
        "[\"/d\"] = {\"mode\":\"0644\",\"source\":\"/t\"}: duplicate destination".to_owned(),
        format!("[\"/d/e\"].mode = \"04755\": {octal}"),
        format!("[\"/f\"].mode = \"4755\": {octal}"),
        format!("[\"/g\"].mode = \"+7\": {octal}"),
        format!("[\"/h\"].mode = \"\": {octal}"),
    ];
    let problems = texts(parse(text).unwrap_err());
    assert_eq!(problems, expected.map(|rest| format!("annotation io.husk.extras.files{rest}")));
}

#[test]
fn values_other_than_an_object_are_rejected() {
    let nested = "[".repeat(100_000);
    for text in ["", "[]", "null", "{", "{} {}", "{\"/a\": }", nested.as_str()] {
        let problems = texts(parse(text).unwrap_err());
        assert_eq!(problems.len(), 1);
        let named = format!("annotation io.husk.extras.files = {:?}: must be a JSON object", cut(text));
        assert!(problems[0].starts_with(&named) && problems[0].len() < 600, "{problems:?}");
    }
    let many: serde_json::Map<_, _> = (0..=FILES_MAX)
        .map(|number| (format!("/{number}"), serde_json::json!({"source": "/s", "mode": "0"})))
        .collect();
    let problems = texts(parse(&Value::from(many).to_string()).unwrap_err());
    assert_eq!(problems, ["annotation io.husk.extras.files = 257 files: at most 256 are allowed"]);
}

#[test]
fn an_agent_runs_unless_disabled_and_must_exist_if_enabled() {
    let agent = || vec![file(SUPERVISOR, "/agent", 0o600)];
    let table = [
        (agent(), None, true, false),
        (agent(), Some(true), true, false),
        (agent(), Some(false), false, false),
        (vec![file("/x", "/agent", 0)], None, false, false),
        (vec![file("/x", "/agent", 0)], Some(true), false, true),
        (vec![], None, false, false),
        (vec![], Some(false), false, false),
        (vec![], Some(true), false, true),
    ];
    for (files, supervisor, runs, missing) in table {
        let extras = extras(files, supervisor);
        assert_eq!((extras.runs_supervisor(), extras.missing().is_some()), (runs, missing), "{extras:?}");
    }
    assert_eq!(
        extras(vec![], Some(true)).missing().unwrap().to_string(),
        "annotation io.husk.supervisor = \"true\": there is no agent: annotation io.husk.extras.files has no \"/run/husk/supervisor\""
    );
}

#[test]
fn a_later_container_may_request_only_extras_that_the_vm_has() {
    let (agent, plain) = (file(SUPERVISOR, "/agent", 0o755), file("/x", "/s", 0o640));
    let with = extras(vec![agent.clone(), plain.clone()], None);
    let without = extras(vec![agent.clone()], Some(false));
    let too_late = "the sandbox's VM was booted without it, and extras cannot be added later";
    let table = [
        (&with, vec![], None, vec![]),
        (&with, vec![plain.clone()], Some(true), vec![]),
        (&with, vec![plain.clone(), agent.clone()], None, vec![]),
        (&without, vec![agent], Some(false), vec![]),
        (
            &with,
            vec![file("/x", "/other", 0o640), file("/x", "/s", 0o600), file("/y", "/s", 0o640)],
            Some(false),
            vec![
                format!("annotation io.husk.extras.files[\"/x\"] = \"/other\" with mode 0o640: {too_late}"),
                format!("annotation io.husk.extras.files[\"/x\"] = \"/s\" with mode 0o600: {too_late}"),
                format!("annotation io.husk.extras.files[\"/y\"] = \"/s\" with mode 0o640: {too_late}"),
                "annotation io.husk.supervisor = \"false\": the sandbox's VM was booted with a supervisor agent".into(),
            ],
        ),
        (
            &without,
            vec![],
            Some(true),
            vec![
                "annotation io.husk.supervisor = \"true\": the sandbox's VM was booted without a supervisor agent"
                    .into(),
            ],
        ),
    ];
    for (present, files, supervisor, expected) in table {
        assert_eq!(texts(extras(files, supervisor).beyond(present)), expected, "{present:?}");
    }
}
