//! `husk metadata`: its output and its exit status.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

fn husk(config: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_husk")).args(args).env_clear().env("HUSK_CONFIG", config).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn the_public_key_belongs_to_the_hosts_key_which_is_created_if_it_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let (config, key) = (folder.path().join("config.toml"), folder.path().join("new/metadata.key"));
    std::fs::write(&config, format!("metadata_key = {key:?}\n")).unwrap();
    let printed = husk(&config, &["metadata", "public-key"]);
    assert_eq!((printed.status.code(), text(&printed.stderr)), (Some(0), ""));
    let pem = text(&printed.stdout);
    assert!(
        pem.starts_with("-----BEGIN PUBLIC KEY-----\nMCow") && pem.ends_with("\n-----END PUBLIC KEY-----\n"),
        "{pem}"
    );
    let again = husk(&config, &["metadata", "public-key"]);
    assert_eq!(text(&again.stdout), pem);
    let openssl = Command::new("openssl").args(["pkey", "-pubout", "-in"]).arg(&key).output().expect("run openssl");
    assert_eq!(text(&openssl.stdout), pem, "openssl reads another key in {}", key.display());

    let printed = husk(&config, &["metadata", "public-key", "--json"]);
    let jwk: serde_json::Value = serde_json::from_slice(&printed.stdout).unwrap();
    let fixed = ["kty", "crv", "alg", "use"].map(|member| jwk[member].as_str().unwrap());
    assert_eq!(fixed, ["OKP", "Ed25519", "EdDSA", "sig"]);
    // The last 32 of a SubjectPublicKeyInfo's 44 bytes, which begin inside a digit of Base64: 43 of the same digits are
    // 32 bytes and 2 bits.
    assert_eq!(jwk["x"].as_str().unwrap().len(), 43);
    assert_eq!(jwk["kid"].as_str().unwrap().len(), 43);
    assert!(jwk.get("d").is_none(), "{jwk}");
}

#[test]
fn a_key_that_others_may_read_is_rejected() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let (config, key) = (folder.path().join("config.toml"), folder.path().join("metadata.key"));
    std::fs::write(&config, format!("metadata_key = {key:?}\n")).unwrap();
    assert!(husk(&config, &["metadata", "public-key"]).status.success());
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let rejected = husk(&config, &["metadata", "public-key"]);
    let expected = format!(
        "husk: metadata key {}: mode 0644 gives other users access, so the key may be known: remove the file for a new key, or run chmod 600 on it\n",
        key.display()
    );
    assert_eq!((rejected.status.code(), text(&rejected.stderr)), (Some(1), expected.as_str()));
    assert_eq!(text(&rejected.stdout), "");
}

#[test]
fn the_help_explains_what_the_key_is_for() {
    let help = husk(Path::new("/none"), &["metadata", "public-key", "--help"]);
    for word in ["--json", "1027", "metadata_key", "kid"] {
        assert!(text(&help.stdout).contains(word), "{word}");
    }
}

/// A program that is killed when its test fails.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `husk metadata serve`, and its first line on stderr.
fn serve(config: &Path) -> (Server, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_husk"));
    command.args(["metadata", "serve"]).env_clear().env("HUSK_CONFIG", config).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    (Server(child), line)
}

#[test]
fn one_process_of_the_host_serves_the_kernels_vsock_until_sigterm() {
    let folder = tempfile::tempdir().unwrap();
    let (config, key) = (folder.path().join("config.toml"), folder.path().join("metadata.key"));
    std::fs::write(&config, format!("metadata_key = {key:?}\n")).unwrap();
    let (mut first, line) = serve(&config);
    assert!(
        line.contains("serving metadata to all VMs on the kernel's vsock device port=1027"),
        "vsock port 1027 of this machine: {line}"
    );
    let (mut second, line) = serve(&config);
    assert_eq!(line, "husk: answer on the kernel's vsock: listen on vsock port 1027 of the host: port is in use\n");
    assert_eq!(second.0.wait().unwrap().code(), Some(1));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(first.0.id() as i32), nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(first.0.wait().unwrap().code(), Some(0));
    assert!(!key.exists(), "the key was created although no VM has asked for a token");
}
