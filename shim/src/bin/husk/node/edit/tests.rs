use super::*;

const IMPORT: &str = "imports = [\"/opt/husk/containerd.toml\"] # husk";

/// Configurations of every shape, and the text that has to be in the result.
fn table() -> Vec<(&'static str, String)> {
    let cri = DEFAULT_RUNTIME;
    let runc = "runtimes.runc]";
    let ours = "runtime_type = \"/opt/husk/containerd-shim-husk-v1\"";
    vec![
        ("version = 2\n", format!("version = 2\n{BEGIN}{DEFAULT_RUNTIME}")),
        ("version = 2", format!("version = 2\n{BEGIN_AFTER_OPEN_LINE}{DEFAULT_RUNTIME}")),
        ("version = 2\r\nroot = '/x'\r\n", ours.to_owned()),
        (Box::leak(format!("version = 2\n{cri}").into_boxed_str()), format!("{cri}{BEGIN}[plugins")),
        (
            Box::leak(format!("version = 2\n{cri}# end").into_boxed_str()),
            format!("{runc}\n  runtime_type = \"io.containerd.runc.v2\"\n# end\n{BEGIN_AFTER_OPEN_LINE}[plugins"),
        ),
        ("imports = [\"/a.toml\"]\nversion = 2\n", "imports = [\"/a.toml\"]\n".to_owned()),
        ("version = 3\n", format!("version = 3\n{IMPORT}\n")),
        ("version = 3", format!("version = 3\n{IMPORT}")),
        ("# a comment\r\nversion = 3 # three\r\n[grpc]\r\n", format!("version = 3 # three\r\n{IMPORT}\n[grpc]\r\n")),
        ("root = '/x'\nversion=0x3\nstate = '/y'\n[grpc]\naddress = '/z'\n", format!("version=0x3\n{IMPORT}\nstate")),
        ("version = 4\nimports = []\n", "imports = [\"/opt/husk/containerd.toml\"]\n".to_owned()),
        ("version = 3\nimports = [ ] # none\n", "imports = [\"/opt/husk/containerd.toml\" ] # none".to_owned()),
        (
            "imports = ['/etc/containerd/conf.d/*.toml']\nversion = 3\n",
            "imports = [\"/opt/husk/containerd.toml\", '/etc".to_owned(),
        ),
        (
            "version = 3\nimports = [\n  '/a.toml', # first\n  '/b.toml',\n]\n[plugins]\n",
            "imports = [\"/opt/husk/containerd.toml\", \n  '/a.toml', # first\n".to_owned(),
        ),
        (
            "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.husky]\n",
            format!("{IMPORT}\n[plugins"),
        ),
    ]
}

#[test]
fn removing_husk_restores_every_configuration_byte_for_byte_and_adding_it_twice_changes_nothing() {
    for (before, part) in table() {
        let added = add(before, Sandboxer::Podsandbox).unwrap_or_else(|error| panic!("{before:?}: {error}"));
        assert!(added.text.contains(&part), "{before:?}:\n{}\nlacks\n{part}", added.text);
        assert_eq!(add(&added.text, Sandboxer::Podsandbox).unwrap(), added, "{before:?}");
        assert_eq!(remove(&added.text).unwrap(), before);
        assert_eq!(remove(before).unwrap(), before);
        let version_2 = before.contains("version = 2");
        assert!(registers(if version_2 { &added.text } else { added.drop_in.as_ref().unwrap() }), "{before:?}");
        assert!(!registers(before) && added.drop_in.is_none() == version_2, "{before:?}");
    }
}

#[test]
fn what_people_change_after_the_installation_stays() {
    let of = |text: &str| add(text, Sandboxer::Podsandbox).unwrap().text;
    let table = [
        // Text after the block.
        (format!("{}[debug]\n", of("version = 2\n")), "version = 2\n[debug]\n"),
        (format!("{}[debug]\n", of("version = 2")), "version = 2\n[debug]\n"),
        (format!("{}\n[debug]\n", of("version = 3")), "version = 3\n[debug]\n"),
        // Imports around husk's.
        (
            of("version = 3\n").replace("\"] # husk", "\", '/a.toml'] # ours"),
            "version = 3\nimports = ['/a.toml'] # ours\n",
        ),
        (of("version = 3\n").replace("[\"", "['/a.toml', \""), "version = 3\nimports = ['/a.toml'] # husk\n"),
        (
            of("version = 3\n").replace("[\"", "[\n '/a.toml',\n \"").replace("] #", ",\n] #"),
            "version = 3\nimports = [\n '/a.toml',\n \n] # husk\n",
        ),
        (of("version = 3\n").replace(" # husk", ""), "version = 3\nimports = []\n"),
    ];
    for (changed, expected) in table {
        assert_eq!(of(&changed), changed);
        assert_eq!(remove(&changed).unwrap(), expected, "{changed}");
    }
    // A new version of the block, and a migrated file.
    let old = of("version = 2\n").replace("io.husk.*", "io.husk.old");
    assert_eq!(of(&old), of("version = 2\n"));
    let migrated = of("version = 2\n").replace("version = 2", "version = 3");
    assert_eq!(of(&migrated), of("version = 3\n"));
}

#[test]
fn what_cannot_be_changed_safely_is_rejected_by_name() {
    let husk = |plugin: &str| format!("[plugins.\"{plugin}\".containerd.runtimes.husk]\nruntime_type = 'x'\n");
    let two = format!("version = 2\n{}", husk("io.containerd.grpc.v1.cri"));
    let three = format!("version = 3\n{}", husk("io.containerd.cri.v1.runtime"));
    let table = [
        ("", "version: missing, which means version 1: "),
        ("disabled_plugins = ['cri']\n", "version: missing"),
        ("version = 1\n", "version: 1: "),
        ("version = '2'\n", "version: string: "),
        ("version = 3\nimports = '/a.toml'\n", "imports: expected an array of paths"),
        ("version = 3\nimports = [1]\n", "imports: expected an array of paths"),
        ("version = 3\n\n[debug\n", "line 3: "),
        (&two, "plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.husk: already configured"),
        (&three, "plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.husk: already configured"),
        ("version = 2\nplugins = {}\n", "inline table"),
        (Box::leak(format!("version = 2\n{BEGIN}x = 1\n").into_boxed_str()), "line 2: husk's block begins here"),
    ];
    for (text, expected) in table {
        let error = add(text, Sandboxer::Podsandbox).unwrap_err().to_string();
        assert!(error.contains(expected), "{text:?}: {error}");
    }
    let error = add("version = 2\n", Sandboxer::Shim).unwrap_err().to_string();
    assert!(error.starts_with("version: 2: the sandboxer \"shim\" needs containerd 2"), "{error}");
    assert!(add("version = 3\n", Sandboxer::Shim).unwrap().drop_in.unwrap().contains("sandboxer = \"shim\"\n"));
}
