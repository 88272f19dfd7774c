//! Error messages of both programs: each cause is printed once.

use std::path::Path;
use std::process::{Command, Output};

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Asserts that the program failed with one line that names `path` and contains `cause` once.
fn assert_printed_once(output: &Output, path: &Path, cause: &str) {
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    assert!(errors.contains(path.to_str().unwrap()), "{errors}");
    assert_eq!(errors.matches(cause).count(), 1, "{errors}");
}

#[test]
fn husk_prints_why_its_configuration_cannot_be_read_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nonexistent.toml");
    for arguments in [&["metadata", "public-key"], &["metadata", "serve"]] {
        let mut husk = Command::new(env!("CARGO_BIN_EXE_husk"));
        let output = husk.args(arguments).env_clear().env("HUSK_CONFIG", &path).output().unwrap();
        assert_printed_once(&output, &path, "No such file or directory (os error 2)");
    }
    let mut husk = Command::new(env!("CARGO_BIN_EXE_husk"));
    let output = husk.arg("check-config").arg(&path).env_clear().output().unwrap();
    assert_printed_once(&output, &path, "No such file or directory (os error 2)");
}

#[test]
fn the_shims_delete_prints_why_a_state_cannot_be_read_once() {
    // Even root cannot read a folder as a file, nor this text as JSON.
    for (cause, content) in [("Is a directory (os error 21)", None), ("expected value at line 1", Some("unreadable"))] {
        let base = tempfile::tempdir().unwrap();
        let bundle = tempfile::tempdir().unwrap();
        let sandbox = base.path().join("default/web");
        std::fs::create_dir_all(&sandbox).unwrap();
        let path = sandbox.join("state.json");
        match content {
            Some(content) => std::fs::write(path, content).unwrap(),
            None => std::fs::create_dir(path).unwrap(),
        }
        let mut shim = Command::new(env!("CARGO_BIN_EXE_containerd-shim-husk-v1"));
        shim.args(["-namespace", "default", "-id", "web", "-bundle"]).arg(bundle.path()).arg("delete");
        let output = shim.env_clear().env("HUSK_STATE_DIR", base.path()).output().unwrap();
        assert_printed_once(&output, &sandbox, cause);
        assert_eq!(text(&output.stdout), "");
    }
}

#[test]
fn husk_list_reports_an_unreadable_state_once_and_goes_on() {
    let base = tempfile::tempdir().unwrap();
    let state = base.path().join("default/web/state.json");
    std::fs::create_dir_all(&state).unwrap();
    let mut husk = Command::new(env!("CARGO_BIN_EXE_husk"));
    let output = husk.arg("list").env_clear().env("HUSK_STATE_DIR", base.path()).output().unwrap();
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    assert_eq!(errors.matches("Is a directory (os error 21)").count(), 1, "{errors}");
    assert!(text(&output.stdout).starts_with("SANDBOX"), "{}", text(&output.stdout));
}
