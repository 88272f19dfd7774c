//! The layers of an overlay of the host's folders. Pure.

use std::path::PathBuf;

use super::root::HostRoot;

/// Options of overlayfs that do not change what the layers mean.
const NEUTRAL: [&str; 4] = ["index=off", "rw", "volatile", "xino=off"];
/// Most layers that become disks: a VM can have 255, and other containers need some.
const MAX_LAYERS: usize = 128;

/// An overlay's folders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layers {
    /// Those that do not change, the uppermost first.
    pub(crate) lower: Vec<PathBuf>,
    /// The one that takes changes.
    pub(crate) upper: PathBuf,
}

impl Layers {
    /// The layers of a root.
    ///
    /// # Errors
    /// Why the root has none that images could stand for.
    pub(crate) fn of(root: &HostRoot) -> Result<Self, &'static str> {
        let [mount] = &root.mounts[..] else { return Err("the root is not one overlay of folders") };
        if mount.type_ != "overlay" || !root.folders.is_empty() {
            return Err("the root is not one overlay of folders");
        }
        let (mut lower, mut upper) = (Vec::new(), None);
        for option in &mount.options {
            match option.split_once('=') {
                Some(("lowerdir", folders)) => lower = folders.split(':').map(PathBuf::from).collect(),
                Some(("upperdir", folder)) => upper = Some(PathBuf::from(folder)),
                Some(("workdir", _)) => {}
                _ if NEUTRAL.contains(&option.as_str()) => {}
                _ => return Err("the overlay has options that change what its layers mean"),
            }
        }
        // overlayfs escapes colons with backslashes; containerd's paths have neither.
        if lower.iter().any(|folder| !folder.is_absolute() || folder.to_string_lossy().contains('\\')) {
            return Err("the overlay has layers without an absolute path");
        }
        match upper {
            _ if lower.is_empty() => Err("the overlay has no lower layer"),
            _ if lower.len() > MAX_LAYERS => Err("the overlay has more layers than a VM can have disks for"),
            None => Err("the snapshot is read-only"),
            Some(upper) => Ok(Self { lower, upper }),
        }
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::types::mount::Mount;

    use super::*;

    #[test]
    fn only_plain_overlays_have_layers() {
        let root = |fs_type: &str, options: &[&str]| {
            let options = options.iter().map(ToString::to_string).collect();
            let mounts = vec![Mount { type_: fs_type.into(), options, ..Default::default() }];
            Layers::of(&HostRoot { mounts, ..HostRoot::default() })
        };
        let layers = |lower: &[&str]| Layers { lower: lower.iter().map(PathBuf::from).collect(), upper: "/u".into() };
        let (upper, work) = ("upperdir=/u", "workdir=/w");
        assert_eq!(root("overlay", &["index=off", work, upper, "lowerdir=/c:/b:/a"]), Ok(layers(&["/c", "/b", "/a"])));
        assert_eq!(root("overlay", &[work, upper, "lowerdir=/a"]), Ok(layers(&["/a"])));
        let many = format!("lowerdir={}", vec!["/a"; MAX_LAYERS + 1].join(":"));
        for (fs_type, options) in [
            ("bind", &["rbind", "rw"][..]),
            ("overlay", &["lowerdir=/b:/a"]),
            ("overlay", &[work, upper]),
            ("overlay", &[work, upper, "lowerdir=/a", "userxattr"]),
            ("overlay", &[work, upper, "lowerdir=/a", "redirect_dir=on"]),
            ("overlay", &[work, upper, "lowerdir=/a", "lowerdir+=/b"]),
            ("overlay", &[work, upper, "lowerdir=/a:/b::/data"]),
            ("overlay", &[work, upper, "lowerdir=/a\\:b"]),
            ("overlay", &[work, upper, "lowerdir=a"]),
            ("overlay", &[work, upper, &many]),
        ] {
            assert!(root(fs_type, options).is_err(), "{fs_type} {options:?}");
        }
        assert!(Layers::of(&HostRoot::default()).is_err());
    }
}
