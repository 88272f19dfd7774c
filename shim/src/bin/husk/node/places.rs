//! Where an installation on a node keeps its files. Everything but the line or the block in containerd's configuration
//! is in one folder, which belongs to the installation.

/// The installation's folder. Its parent has to exist.
pub(crate) const FOLDER: &str = "/opt/husk";
/// The runtime that containerd starts.
pub(crate) const SHIM: &str = "/opt/husk/containerd-shim-husk-v1";
/// The drop-in that containerd's configuration imports.
pub(crate) const DROP_IN: &str = "/opt/husk/containerd.toml";
/// What the installation has found and created, written before anything else.
pub(crate) const RECORD: &str = "/opt/husk/node.json";
/// Exists while containerd runs with another configuration than the one on disk.
pub(crate) const PENDING: &str = "/opt/husk/restart-pending";
/// Suffix of files that replace others when they are complete.
pub(crate) const NEW: &str = ".husk-new";

/// A file that is copied to the node, its mode, and whether the node has to have it.
pub(crate) struct Artifact {
    pub(crate) name: &'static str,
    pub(crate) mode: u32,
    pub(crate) required: bool,
}

const fn artifact(name: &'static str, mode: u32, required: bool) -> Artifact {
    Artifact { name, mode, required }
}

/// The files of husk. Without a virtiofsd here, the shim uses the node's.
pub(crate) static ARTIFACTS: [Artifact; 6] = [
    artifact("containerd-shim-husk-v1", 0o755, true),
    artifact("husk", 0o755, true),
    artifact("virtiofsd", 0o755, false),
    artifact("vmlinux", 0o644, true),
    artifact("initrd.img", 0o644, true),
    artifact("initrd-debug.img", 0o644, true),
];

/// Paths that husk creates when it runs.
pub(crate) const RUNTIME: [&str; 3] = ["/etc/husk", "/etc/husk/metadata.key", "/run/husk"];
