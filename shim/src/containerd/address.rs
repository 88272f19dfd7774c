//! The address of a shim's socket.

use std::fmt::Write as _;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

/// The directory of shim sockets if containerd does not name one.
const SOCKET_DIR: &str = "/run/containerd/s";

/// The path of the socket of a sandbox's shim. Its name is the SHA-256 of containerd's socket, the namespace and the
/// sandbox, as containerd's own shims name theirs (containerd, pkg/shim/util_unix.go).
pub(crate) fn socket_path(socket_dir: Option<&str>, grpc_address: &str, namespace: &str, sandbox: &str) -> PathBuf {
    let identity = PathBuf::from(grpc_address).join(namespace).join(sandbox);
    let digest = Sha256::digest(identity.display().to_string());
    let mut name = String::with_capacity(2 * digest.len());
    for byte in &digest {
        // Writing to a String cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    PathBuf::from(socket_dir.unwrap_or(SOCKET_DIR)).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_named_as_containerd_names_them() {
        // The value that the tests of containerd's own Rust shim library expect.
        let name = "0ddfbd72d02b3551e75f3a0ed90b9965b533401be618f43a568bc522764e0ad0";
        for (directory, expected) in [(None, "/run/containerd/s"), (Some("/tmp/sockets/"), "/tmp/sockets")] {
            let path = socket_path(directory, "/run/containerd/containerd.sock", "default", "123");
            assert_eq!(path.display().to_string(), format!("{expected}/{name}"));
        }
    }
}
