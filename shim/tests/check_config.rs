//! `husk check-config`: its output and its exit status.

use std::path::Path;
use std::process::{Command, Output};

/// Runs the command on the file at `path`, with an empty environment.
fn check(path: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_husk")).arg("check-config").arg(path).env_clear().output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn every_problem_has_a_line_with_key_value_and_allowed_values() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    let invalid = "accel = \"xen\"\nmemory_mib = 0\nqemu = \"/no/such/qemu\"\nvcpus = 0\nvirtiofsd = \"here\"\n\
                 kernel = \"/no/such/kernel\"\ninitrd = 7\n";
    std::fs::write(&path, invalid).unwrap();
    let output = check(&path);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stdout), "");
    let lines: Vec<&str> = text(&output.stderr).lines().collect();
    let expected = [
        "accel = \"xen\": must be one of \"auto\", \"kvm\", \"tcg\"",
        "initrd = 7: must be a non-empty string",
        "memory_mib = 0: memory must be greater than zero",
        "vcpus = 0: vCPU count must be greater than zero",
        "virtiofsd = \"here\": must be an absolute path",
        "qemu = \"/no/such/qemu\": no QEMU found; looked for /no/such/qemu: install it",
    ];
    assert_eq!(lines.len(), expected.len(), "{lines:#?}");
    for (line, expected) in lines.iter().zip(expected) {
        assert!(line.starts_with(&format!("{}: {expected}", path.display())), "{line}");
    }
}

#[test]
fn a_valid_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    let [kernel, initrd, program] = ["kernel", "initrd", "program"].map(|name| {
        let path = folder.path().join(name);
        std::fs::write(&path, "").unwrap();
        path
    });
    let valid = format!(
        "accel = \"tcg\"\nkernel = {kernel:?}\ninitrd = {initrd:?}\nqemu = {program:?}\nvirtiofsd = {program:?}\nvcpus = 2\n"
    );
    std::fs::write(&path, valid).unwrap();
    let output = check(&path);
    assert_eq!(text(&output.stderr), "");
    assert_eq!(text(&output.stdout), format!("ok: {}\n", path.display()));
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_missing_file_and_invalid_toml_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    for (content, expected) in [(None, "No such file"), (Some("vcpus = = 2\n"), "line 1")] {
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        let output = check(&path);
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1));
        assert!(errors.contains(path.to_str().unwrap()) && errors.contains(expected), "{errors}");
    }
}
