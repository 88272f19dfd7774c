//! `husk check-config`, as an operator sees it: what is printed where, and the exit status.
#![allow(clippy::unwrap_used, reason = "clippy.toml does not exempt helpers outside of #[test] functions")]

use std::path::Path;
use std::process::{Command, Output};

/// The program's own answer about the file at `path`, with nothing of the caller's environment in it.
fn check(path: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_husk")).arg("check-config").arg(path).env_clear().output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn every_error_has_its_line_with_key_value_and_what_is_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    let wrong = "accel = \"xen\"\nmemory_mib = 0\nqemu = \"/no/such/qemu\"\nvcpus = 0\nvirtiofsd = \"here\"\n\
                 kernel = \"/no/such/kernel\"\ninitrd = 7\n";
    std::fs::write(&path, wrong).unwrap();
    let output = check(&path);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stdout), "");
    let lines: Vec<&str> = text(&output.stderr).lines().collect();
    let expected = [
        "accel = \"xen\": must be one of \"auto\", \"kvm\", \"tcg\"",
        "initrd = 7: must be a string, and not an empty one",
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
fn a_good_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    let [kernel, initrd, program] = ["kernel", "initrd", "program"].map(|name| {
        let path = folder.path().join(name);
        std::fs::write(&path, "").unwrap();
        path
    });
    let good = format!(
        "accel = \"tcg\"\nkernel = {kernel:?}\ninitrd = {initrd:?}\nqemu = {program:?}\nvirtiofsd = {program:?}\nvcpus = 2\n"
    );
    std::fs::write(&path, good).unwrap();
    let output = check(&path);
    assert_eq!(text(&output.stderr), "");
    assert_eq!(text(&output.stdout), format!("ok: {}\n", path.display()));
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn what_is_no_toml_or_not_there_is_an_error_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    for (content, wanted) in [(None, "No such file"), (Some("vcpus = = 2\n"), "line 1")] {
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        let output = check(&path);
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1));
        assert!(errors.contains(path.to_str().unwrap()) && errors.contains(wanted), "{errors}");
    }
}
