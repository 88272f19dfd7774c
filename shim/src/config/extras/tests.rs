//! What the annotation may say and what not, and what a later container may ask for.

use super::*;

fn texts(problems: Vec<Problem>) -> Vec<String> {
    problems.iter().map(ToString::to_string).collect()
}

fn wanted(destination: &str, source: impl Into<PathBuf>, mode: u32) -> ExtraFile {
    ExtraFile { destination: destination.into(), source: source.into(), mode }
}

fn extras(files: Vec<ExtraFile>, supervisor: Option<bool>) -> Extras {
    Extras { files, supervisor }
}

#[test]
fn what_is_understood() {
    let table = [
        ("{}", vec![]),
        (
            r#" {"/run/husk/supervisor": {"source": "/a b", "mode": "755"}, "/etc/x": {"mode": "0", "source": "/s"}} "#,
            vec![wanted("/etc/x", "/s", 0), wanted("/run/husk/supervisor", "/a b", 0o755)],
        ),
        (r#"{"/ä/.b/..c": {"source": "/s/../t", "mode": "0777"}}"#, vec![wanted("/ä/.b/..c", "/s/../t", 0o777)]),
        // Like the kernel's and the init's, but not theirs.
        (r#"{"/process": {"source": "/s", "mode": "0644"}}"#, vec![wanted("/process", "/s", 0o644)]),
        (r#"{"/run/husky": {"source": "/s", "mode": "0644"}}"#, vec![wanted("/run/husky", "/s", 0o644)]),
        (r#"{"/tmp/x": {"source": "/s", "mode": "0644"}}"#, vec![wanted("/tmp/x", "/s", 0o644)]),
    ];
    for (text, expected) in table {
        assert_eq!(parse(text), Ok(expected), "{text}");
    }
}

#[test]
fn destinations_that_may_not_be_are_named_with_the_reason() {
    let long = format!("/{}", "x".repeat(256));
    let deep = format!("/{}", ["x"; 2048].join("/"));
    let kernels = |folder: &str| format!("outside of {folder}, which is the kernel's");
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
        (&deep, "may have 4095 bytes".to_owned()),
        ("/proc", kernels("/proc")),
        ("/proc/sys/kernel/core_pattern", kernels("/proc")),
        ("/sys/fs/cgroup/x", kernels("/sys")),
        ("/dev/shm/x", kernels("/dev")),
        ("/init", "must not be in /init".to_owned()),
        ("/run", "is a folder".to_owned()),
        ("/tmp", "is a folder".to_owned()),
        ("/var/log", "is a folder".to_owned()),
        ("/run/husk", "must not be in /run/husk".to_owned()),
        ("/run/husk/share/x", "must not be in /run/husk".to_owned()),
        ("/run/husk/state/x", "must not be in /run/husk".to_owned()),
        ("/run/husk/supervisor/x", "must not be in /run/husk".to_owned()),
        ("/run/husk-supervisor.pid", "must not be in /run/husk-supervisor.pid".to_owned()),
        ("/var/log/husk-supervisor.log", "must not be in /var/log/husk-supervisor.log".to_owned()),
        ("/var/log/husk-supervisor.log.1", "must not be in /var/log/husk-supervisor.log.1".to_owned()),
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
fn all_that_is_wrong_is_told_at_once_by_field_and_value() {
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
    let octal = "must be permission bits as a string of octal digits, \"0777\" at most";
    let expected = [
        "[\"/a\"].source = \"relative\": must be an absolute path of the host".to_owned(),
        format!("[\"/a\"].mode = \"0888\": {octal}"),
        "[\"/a\"].owner = 1: unknown; there are source and mode".to_owned(),
        "[\"/b\"].source: must be an absolute path of the host".to_owned(),
        format!("[\"/b\"].mode = 420: {octal}"),
        "[\"/c\"] = \"/source\": must be an object with \"source\" and \"mode\"".to_owned(),
        "[\"/d\"] = {\"mode\":\"0644\",\"source\":\"/s\"}: it is to be a file, and the folder of \"/d/e\" as well"
            .to_owned(),
        "[\"/d\"] = {\"mode\":\"0644\",\"source\":\"/t\"}: the destination is there twice".to_owned(),
        format!("[\"/d/e\"].mode = \"04755\": {octal}"),
        format!("[\"/f\"].mode = \"4755\": {octal}"),
        format!("[\"/g\"].mode = \"+7\": {octal}"),
        format!("[\"/h\"].mode = \"\": {octal}"),
    ];
    let problems = texts(parse(text).unwrap_err());
    assert_eq!(problems, expected.map(|rest| format!("annotation io.husk.extras.files{rest}")));
}

#[test]
fn what_is_no_object_is_refused() {
    let nested = "[".repeat(100_000);
    for text in ["", "[]", "null", "{", "{} {}", "{\"/a\": }", nested.as_str()] {
        let problems = texts(parse(text).unwrap_err());
        assert_eq!(problems.len(), 1);
        let named = format!("annotation io.husk.extras.files = {:?}: no JSON object", cut(text));
        assert!(problems[0].starts_with(&named) && problems[0].len() < 600, "{problems:?}");
    }
    let many: serde_json::Map<_, _> = (0..=FILES_MAX)
        .map(|number| (format!("/{number}"), serde_json::json!({"source": "/s", "mode": "0"})))
        .collect();
    let problems = texts(parse(&Value::from(many).to_string()).unwrap_err());
    assert_eq!(problems, ["annotation io.husk.extras.files = 257 files: at most 256 are possible"]);
}

#[test]
fn an_agent_runs_where_there_is_one_unless_it_is_not_wanted_and_has_to_be_there_if_it_is() {
    let agent = || vec![wanted(SUPERVISOR, "/agent", 0o600)];
    let table = [
        (agent(), None, true, false),
        (agent(), Some(true), true, false),
        (agent(), Some(false), false, false),
        (vec![wanted("/x", "/agent", 0)], None, false, false),
        (vec![wanted("/x", "/agent", 0)], Some(true), false, true),
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
fn a_later_container_may_ask_for_what_the_vm_has_and_for_nothing_else() {
    let (agent, file) = (wanted(SUPERVISOR, "/agent", 0o755), wanted("/x", "/s", 0o640));
    let has = extras(vec![agent.clone(), file.clone()], None);
    let without = extras(vec![agent.clone()], Some(false));
    let no_more = "the sandbox's VM was booted without it, and takes no extras any more";
    let table = [
        (&has, vec![], None, vec![]),
        (&has, vec![file.clone()], Some(true), vec![]),
        (&has, vec![file.clone(), agent.clone()], None, vec![]),
        (&without, vec![agent], Some(false), vec![]),
        (
            &has,
            vec![wanted("/x", "/other", 0o640), wanted("/x", "/s", 0o600), wanted("/y", "/s", 0o640)],
            Some(false),
            vec![
                format!("annotation io.husk.extras.files[\"/x\"] = \"/other\" with mode 0o640: {no_more}"),
                format!("annotation io.husk.extras.files[\"/x\"] = \"/s\" with mode 0o600: {no_more}"),
                format!("annotation io.husk.extras.files[\"/y\"] = \"/s\" with mode 0o640: {no_more}"),
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
    for (has, files, supervisor, expected) in table {
        assert_eq!(texts(extras(files, supervisor).beyond(has)), expected, "{has:?}");
    }
}
