//! Overlays whose lower layers are ID-mapped: roots of containers with a user namespace, whose layers other containers
//! share. containerd asks for them with the options `uidmap=` and `gidmap=`.

use std::fs::{File, create_dir};
use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::mount::{DetachedTree, mount_filesystem};
use crate::host::id_map::{IdMap, MappedRange};
use crate::host::thread::with_own_root;

const LOWERDIR: &str = "lowerdir=";
/// The mount point of the overlay, beside those of the layers, which have numbers.
const MERGED: &str = "merged";

/// Takes the mapping out of the options of one of containerd's mounts.
///
/// # Errors
/// The option that is malformed, or that misses its counterpart.
pub(in crate::rootfs) fn take_id_map(options: &mut Vec<String>) -> Result<Option<IdMap>, String> {
    let (mut users, mut groups) = (None, None);
    for option in options.extract_if(.., |option| option.starts_with("uidmap=") || option.starts_with("gidmap=")) {
        let ranges = option.split_once('=').and_then(|(_, value)| value.split(',').map(range).collect());
        let ranges: Vec<MappedRange> = ranges.ok_or_else(|| option.clone())?;
        let read = if option.starts_with("uidmap=") { &mut users } else { &mut groups };
        *read = Some((ranges, option));
    }
    match (users, groups) {
        (None, None) => Ok(None),
        (Some((users, _)), Some((groups, _))) => Ok(Some(IdMap { users, groups })),
        (Some((_, alone)), None) | (None, Some((_, alone))) => Err(alone),
    }
}

/// INSIDE:OUTSIDE:COUNT.
fn range(text: &str) -> Option<MappedRange> {
    let mut numbers = text.split(':').map(|number| number.parse().ok());
    let range = MappedRange { inside: numbers.next()??, outside: numbers.next()??, count: numbers.next()?? };
    numbers.next().is_none().then_some(range)
}

/// Mounts an overlay whose lower layers have the mapping. The upper folder has none: it belongs to this container only.
///
/// # Errors
/// When a step fails; nothing is left.
pub(in crate::rootfs) fn mount_overlay(
    map: &IdMap,
    source: &str,
    target: &Path,
    flags: MsFlags,
    options: &[String],
) -> io::Result<()> {
    let namespace = map.namespace()?;
    // Nobody else sees the mounts of the layers.
    let tree = with_own_root(|| {
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        mount(Some("tmpfs"), target, Some("tmpfs"), MsFlags::empty(), Some("mode=700"))?;
        let mut data = Vec::new();
        for option in options {
            data.push(match option.strip_prefix(LOWERDIR) {
                Some(layers) => format!("{LOWERDIR}{}", map_layers(layers, target, &namespace)?),
                None => option.clone(),
            });
        }
        let merged = target.join(MERGED);
        create_dir(&merged)?;
        mount_filesystem("overlay", source, &merged, flags, &data.join(","), Some(target))?;
        DetachedTree::clone_of(&merged, false)
    })?;
    tree.attach(target)
}

/// Mounts the layers in `stage`. Returns their names there.
fn map_layers(layers: &str, stage: &Path, namespace: &File) -> io::Result<String> {
    if layers.contains('\\') {
        return Err(io::Error::other("a layer whose path contains a colon or a backslash cannot be ID-mapped"));
    }
    let mut names = Vec::new();
    for (number, layer) in layers.split(':').enumerate() {
        let name = number.to_string();
        let tree = DetachedTree::clone_of(Path::new(layer), false)?;
        tree.map_ids(namespace, false)?;
        create_dir(stage.join(&name))?;
        tree.attach(&stage.join(&name))?;
        names.push(name);
    }
    Ok(names.join(":"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, chown};

    use super::*;

    fn strings(options: &[&str]) -> Vec<String> {
        options.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_mapping_is_taken_from_the_options() {
        let mut options = strings(&["index=off", "uidmap=0:65536:65536", "gidmap=0:1:2,2:9:1", "ro"]);
        let range = |inside, outside, count| MappedRange { inside, outside, count };
        let expected = IdMap { users: vec![range(0, 65536, 65536)], groups: vec![range(0, 1, 2), range(2, 9, 1)] };
        assert_eq!(take_id_map(&mut options), Ok(Some(expected)));
        assert_eq!(options, ["index=off", "ro"]);
        assert_eq!(take_id_map(&mut options), Ok(None));
        for wrong in ["uidmap=0:1:2", "gidmap=0:1:2", "uidmap=0:1", "uidmap=0:1:2:3", "uidmap=", "uidmap=-1:1:1"] {
            assert_eq!(take_id_map(&mut strings(&[wrong])), Err(wrong.to_owned()));
        }
    }

    #[test]
    fn the_layers_of_an_overlay_are_mapped_and_the_upper_folder_is_not() {
        // On a disk: an overlay on another overlay, which /tmp may be, cannot be mapped.
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["a", "b", "upper", "work", "root"] {
            fs::create_dir(at(name)).unwrap();
        }
        for (path, owner) in [("a/of-a", 0), ("b/of-b", 5), ("upper/of-upper", 100_009)] {
            fs::write(at(path), "").unwrap();
            chown(at(path), Some(owner), Some(owner)).unwrap();
        }
        let ranges = vec![MappedRange { inside: 0, outside: 100_000, count: 65536 }];
        let map = IdMap { users: ranges.clone(), groups: ranges };
        let show = |name: &str| at(name).display().to_string();
        let options = [
            format!("lowerdir={}:{}", show("a"), show("b")),
            format!("upperdir={}", show("upper")),
            format!("workdir={}", show("work")),
        ];
        unshare_mounts();
        mount_overlay(&map, "overlay", &at("root"), MsFlags::empty(), &options).unwrap();
        for (name, owner) in [("of-a", 100_000), ("of-b", 100_005), ("of-upper", 100_009)] {
            let metadata = fs::metadata(at("root").join(name)).unwrap();
            assert_eq!((metadata.uid(), metadata.gid()), (owner, owner), "{name}");
        }
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let below = |line: &&str| line.contains(&show("root"));
        assert_eq!(table.lines().filter(below).count(), 1, "{table}");
        nix::mount::umount(&at("root")).unwrap();
    }

    /// What a test mounts is seen by its thread only.
    fn unshare_mounts() {
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    }
}
