//! How the guest gets a root filesystem that consists of the host's folders. Pure.

use containerd_shim_protos::types::mount::Mount;

use super::root::RootPlan;
use crate::config::settings::RootfsMode;

/// How the guest gets a root filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RootKind {
    /// From the share: it reads and writes the host's files.
    Virtiofs,
    /// From the share, and it writes to a disk.
    Overlay,
    /// From images of the snapshot's layers, and it writes to a disk.
    Erofs,
    /// From disks.
    Disks,
}

impl RootKind {
    /// The name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Virtiofs => "virtiofs",
            Self::Overlay => "overlay",
            Self::Erofs => "erofs",
            Self::Disks => "disks",
        }
    }
}

/// How the guest gets a container's root filesystem, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RootChoice {
    pub(crate) kind: RootKind,
    pub(crate) why: &'static str,
}

/// What decides besides the mode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RootFacts {
    /// The container may not write to it (`root.readonly`).
    pub(crate) read_only: bool,
    /// It is the sandbox container of a pod, whose program writes nothing.
    pub(crate) of_pods_sandbox: bool,
    /// It is a container with a program of a pod that the CRI plugin has made.
    pub(crate) of_kubernetes: bool,
}

/// Why a root without images is not an overlay.
pub(crate) const READ_ONLY: &str = "the root is read-only";

/// Chooses. A root with images of its layers is an overlay until they are found.
pub(crate) fn choose(plan: &RootPlan, mode: RootfsMode, facts: RootFacts) -> RootChoice {
    let virtiofs = |why| RootChoice { kind: RootKind::Virtiofs, why };
    let overlay = |why| RootChoice { kind: RootKind::Overlay, why };
    match (plan, mode) {
        (RootPlan::Guest(_), _) => RootChoice { kind: RootKind::Disks, why: "the snapshotter uses images or devices" },
        (_, RootfsMode::Virtiofs) => virtiofs("configured"),
        _ if facts.of_pods_sandbox => virtiofs("a pod's sandbox container writes nothing"),
        // Without images, the guest would read the same files.
        (_, RootfsMode::Overlay) if facts.read_only => virtiofs(READ_ONLY),
        (RootPlan::Host(root), _) if root.mounts.last().is_some_and(is_read_only) => {
            virtiofs("the snapshot is read-only")
        }
        (_, RootfsMode::Overlay | RootfsMode::Erofs) => overlay("configured"),
        // The kubelet and the CRI plugin give each start of a container a new snapshot, and look into none.
        (_, RootfsMode::Auto) if facts.of_kubernetes => overlay("auto: Kubernetes uses a snapshot for one start only"),
        (_, RootfsMode::Auto) => virtiofs("auto: programs of the host may use the snapshot while the container runs"),
    }
}

/// Whether nobody can write to the filesystem of a mount.
fn is_read_only(mount: &Mount) -> bool {
    let has = |wanted: &str| mount.options.iter().any(|option| option == wanted);
    let is_view = mount.type_ == "overlay" && !mount.options.iter().any(|option| option.starts_with("upperdir="));
    is_view || (has("ro") && !has("rw"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::plan::{GuestRoot, HostRoot, Place, Top};

    #[test]
    fn auto_uses_an_overlay_only_where_nobody_looks_at_the_snapshot() {
        let host = |fs_type: &str, options: &[&str]| {
            let options = options.iter().map(ToString::to_string).collect();
            let mounts = vec![Mount { type_: fs_type.into(), options, ..Default::default() }];
            RootPlan::Host(HostRoot { mounts, folders: Vec::new() })
        };
        let writable = host("overlay", &["lowerdir=/a", "upperdir=/u", "workdir=/w"]);
        let folder = RootPlan::Host(HostRoot::default());
        let place = Place { disk: 0, path: String::new() };
        let top = Top::Folder { place, flags: nix::mount::MsFlags::empty() };
        let disks = RootPlan::Guest(GuestRoot { disks: Vec::new(), folders: Vec::new(), top });
        let facts = RootFacts { read_only: false, of_pods_sandbox: false, of_kubernetes: false };
        let kubernetes = RootFacts { of_kubernetes: true, ..facts };
        let sandbox = RootFacts { of_pods_sandbox: true, ..facts };
        let read_only = RootFacts { read_only: true, ..kubernetes };
        let (virtiofs, overlay) = (RootKind::Virtiofs, RootKind::Overlay);
        // The kinds for the modes virtiofs, overlay and auto. Those for erofs are the ones for overlay, unless the root is
        // read-only.
        let table = [
            (&writable, facts, [virtiofs, overlay, virtiofs]),
            (&writable, kubernetes, [virtiofs, overlay, overlay]),
            (&folder, facts, [virtiofs, overlay, virtiofs]),
            (&writable, sandbox, [virtiofs; 3]),
            (&writable, read_only, [virtiofs, virtiofs, overlay]),
            (&host("overlay", &["lowerdir=/a:/b"]), kubernetes, [virtiofs; 3]),
            (&host("bind", &["rbind", "ro"]), kubernetes, [virtiofs; 3]),
            (&host("bind", &["rbind", "rw"]), kubernetes, [virtiofs, overlay, overlay]),
            (&disks, kubernetes, [RootKind::Disks; 3]),
        ];
        for (plan, facts, expected) in table {
            let modes = [RootfsMode::Virtiofs, RootfsMode::Overlay, RootfsMode::Auto];
            assert_eq!(modes.map(|mode| choose(plan, mode, facts).kind), expected, "{plan:?} {facts:?}");
            let of_erofs = if facts.read_only { expected[2] } else { expected[1] };
            assert_eq!(choose(plan, RootfsMode::Erofs, facts).kind, of_erofs, "{plan:?} {facts:?}");
        }
    }
}
