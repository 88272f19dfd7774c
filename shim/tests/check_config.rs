//! `husk check-config`: its output and its exit status.
#![allow(clippy::unwrap_used, reason = "clippy.toml exempts #[test] functions only, not their helpers")]

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

/// The digest of an empty file.
const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[test]
fn a_valid_file_is_named_with_the_digests_of_what_vms_boot_from() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    let [kernel, initrd, program] = ["kernel", "initrd", "program"].map(|name| {
        let path = folder.path().join(name);
        std::fs::write(&path, "").unwrap();
        path
    });
    let valid = format!(
        "accel = \"tcg\"\nkernel = {kernel:?}\ninitrd = {initrd:?}\nqemu = {program:?}\nvirtiofsd = {program:?}\nvcpus = 2\n\
         kernel_sha256 = \"{}\"\n",
        EMPTY.to_uppercase()
    );
    std::fs::write(&path, &valid).unwrap();
    let output = check(&path);
    assert_eq!(text(&output.stderr), "");
    let digests = format!(
        "kernel_sha256 = \"{EMPTY}\" # {}, verified at each boot\ninitrd_sha256 = \"{EMPTY}\" # {}\n",
        kernel.display(),
        initrd.display()
    );
    assert_eq!(text(&output.stdout), format!("ok: {}\n{digests}", path.display()));
    assert_eq!(output.status.code(), Some(0));
    // The digests can be pasted.
    std::fs::write(&path, format!("{}{digests}", valid.replace("kernel_sha256", "#"))).unwrap();
    assert_eq!(check(&path).status.code(), Some(0));

    std::fs::write(&kernel, "x").unwrap();
    let output = check(&path);
    assert_eq!(output.status.code(), Some(1));
    let found = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881";
    let problem = format!("kernel_sha256 = \"{EMPTY}\": {} has the SHA-256 digest {found}\n", kernel.display());
    assert_eq!(text(&output.stderr), format!("{}: {problem}", path.display()));
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
