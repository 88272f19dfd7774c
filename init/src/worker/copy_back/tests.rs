//! Compares what a real overlay shows with what its lower layer has afterwards.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::PathBuf;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{makedev, mknod};
use nix::sys::time::TimeSpec;

use super::copier::MESSAGE_MAX;
use super::*;
use crate::attributes::{Entry, is_overlays};

/// A filesystem with a lower layer, an upper layer and their overlay, in a mount namespace that ends with the test.
struct Layers {
    disk: tempfile::TempDir,
}

impl Layers {
    fn new(fill: impl Fn(&Path)) -> Self {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace, which needs root");
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>).unwrap();
        let layers = Self { disk: tempfile::tempdir().unwrap() };
        mount(Some("disk"), layers.disk.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        for name in ["lower", "upper", "work", "merged"] {
            fs::create_dir(layers.path(name)).unwrap();
        }
        fill(&layers.path("lower"));
        layers.mount();
        layers
    }

    fn path(&self, name: &str) -> PathBuf {
        self.disk.path().join(name)
    }

    fn mount(&self) {
        let [lower, upper, work] = ["lower", "upper", "work"].map(|name| self.path(name).display().to_string());
        let options =
            format!("lowerdir={lower},upperdir={upper},workdir={work},index=off,metacopy=off,redirect_dir=off");
        mount(Some("overlay"), &self.path("merged"), Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .unwrap();
    }

    /// Copies back, and compares.
    fn copy_back(&self) -> Report {
        let folder = |name: &str| Folder { disk: self.path(name).display().to_string(), path: String::new() };
        let report = super::copy_back(&folder("upper"), &folder("lower"), None).unwrap();
        // The overlay may remember what its lower layer had.
        umount2(&self.path("merged"), MntFlags::empty()).unwrap();
        self.mount();
        let (merged, lower) = (tree(&self.path("merged")), tree(&self.path("lower")));
        for (path, shown) in &merged {
            assert_eq!(lower.get(path), Some(shown), "{path}");
        }
        assert_eq!(merged.len(), lower.len(), "{merged:#?}\n{lower:#?}");
        report
    }
}

/// What can be seen of each file: its attributes, its content, and another name that it has.
fn tree(root: &Path) -> BTreeMap<String, String> {
    let mut seen = BTreeMap::new();
    let mut names: BTreeMap<u64, String> = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let mut entries: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        entries.push(folder.clone());
        entries.sort();
        for path in entries {
            let metadata = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(root).unwrap().display().to_string();
            if metadata.is_dir() && path != folder {
                folders.push(path);
                continue;
            }
            let content = match () {
                () if metadata.is_symlink() => fs::read_link(&path).unwrap().display().to_string(),
                () if metadata.is_file() => format!("{} bytes {:x}", metadata.len(), sum(&fs::read(&path).unwrap())),
                () => String::new(),
            };
            let link = match metadata.nlink() > 1 && !metadata.is_dir() {
                true => names.entry(metadata.ino()).or_insert_with(|| name.clone()).clone(),
                false => String::new(),
            };
            seen.insert(
                name,
                format!(
                    "{:o} {}:{} {:x} {}.{} {content:?} {link:?} {:?}",
                    metadata.mode(),
                    metadata.uid(),
                    metadata.gid(),
                    metadata.rdev(),
                    metadata.mtime(),
                    metadata.mtime_nsec(),
                    xattrs(&path)
                ),
            );
        }
    }
    seen
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(7, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
}

fn xattrs(path: &Path) -> Vec<(String, Vec<u8>)> {
    let folder: OwnedFd = File::open(path.parent().unwrap()).unwrap().into();
    let name = std::ffi::CString::new(path.file_name().unwrap().as_encoded_bytes()).unwrap();
    let entry = Entry { folder: &folder, name: &name };
    let names = entry.names().unwrap().into_iter().filter(|name| !is_overlays(name));
    let mut all: Vec<_> =
        names.map(|name| (name.to_string_lossy().into_owned(), entry.value(&name).unwrap().unwrap())).collect();
    all.sort();
    all
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
}

/// Writes files, as an image has them.
fn image(root: &Path) {
    for folder in ["etc/deep/er", "gone/a/b", "replaced/x", "kept/in", "opaque/old", "tofile", "acl"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    for file in
        ["etc/passwd", "etc/deep/er/f", "gone/a/b/c", "replaced/x/y", "kept/in/f", "opaque/old/f", "tofile/f", "todir"]
    {
        fs::write(root.join(file), file).unwrap();
    }
    fs::write(root.join("etc/linked"), "linked").unwrap();
    fs::hard_link(root.join("etc/linked"), root.join("etc/deep/linked")).unwrap();
    symlink("passwd", root.join("etc/link")).unwrap();
    set_xattr(&root.join("kept"), "trusted.old", b"1");
    set_xattr(&root.join("kept"), "trusted.changed", b"1");
}

#[test]
fn the_lower_layer_becomes_what_the_overlay_shows() {
    let layers = Layers::new(image);
    let root = layers.path("merged");
    // Files: written, appended, truncated, emptied, sparse.
    fs::write(root.join("new"), vec![7; (3 << 20) + 1]).unwrap();
    File::options().append(true).open(root.join("etc/passwd")).unwrap().write_at(b"+", 0).unwrap();
    File::options().write(true).open(root.join("etc/deep/er/f")).unwrap().set_len(3).unwrap();
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    sparse.write_all_at(b"middle", 32 << 20).unwrap();
    drop(sparse);
    fs::write(root.join("name with\nnewline"), "").unwrap();
    // Removed, replaced by another kind, removed and created again.
    fs::remove_dir_all(root.join("gone")).unwrap();
    fs::remove_dir_all(root.join("tofile")).unwrap();
    fs::write(root.join("tofile"), "a file").unwrap();
    fs::remove_file(root.join("todir")).unwrap();
    fs::create_dir_all(root.join("todir/below")).unwrap();
    fs::remove_dir_all(root.join("opaque")).unwrap();
    fs::create_dir_all(root.join("opaque/new")).unwrap();
    fs::write(root.join("opaque/new/f"), "new").unwrap();
    fs::remove_dir_all(root.join("replaced/x")).unwrap();
    symlink("/nowhere", root.join("replaced/x")).unwrap();
    fs::rename(root.join("etc/link"), root.join("etc/renamed")).unwrap();
    // Names, kinds, owners, modes, times, attributes.
    fs::hard_link(root.join("new"), root.join("etc/deep/new")).unwrap();
    fs::hard_link(root.join("replaced/x"), root.join("kept/in/x")).unwrap();
    fs::write(root.join("etc/linked"), "only one name of two").unwrap();
    mknod(&root.join("null"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o620), makedev(1, 3)).unwrap();
    mknod(&root.join("fifo"), SFlag::S_IFIFO, Mode::from_bits_truncate(0o604), 0).unwrap();
    mknod(&root.join("socket"), SFlag::S_IFSOCK, Mode::from_bits_truncate(0o777), 0).unwrap();
    chown(root.join("todir"), Some(5), Some(6)).unwrap();
    fs::set_permissions(root.join("todir"), fs::Permissions::from_mode(0o3711)).unwrap();
    fs::write(root.join("todir/suid"), "x").unwrap();
    chown(root.join("todir/suid"), Some(7), Some(8)).unwrap();
    fs::set_permissions(root.join("todir/suid"), fs::Permissions::from_mode(0o6755)).unwrap();
    set_xattr(&root.join("todir/suid"), "security.capability", &capability());
    set_xattr(&root.join("kept"), "trusted.changed", b"22");
    set_xattr(&root.join("kept"), "trusted.new", &vec![3; 3000]);
    rustix::fs::lremovexattr(root.join("kept"), "trusted.old").unwrap();
    chown(&root, Some(1), Some(2)).unwrap();
    let at = TimeSpec::new(1_000_000_000, 5);
    for name in ["todir", "new", "replaced/x"] {
        nix::sys::stat::utimensat(
            nix::fcntl::AT_FDCWD,
            &root.join(name),
            &at,
            &at,
            nix::sys::stat::UtimensatFlags::NoFollowSymlink,
        )
        .unwrap();
    }
    let report = layers.copy_back();
    assert_eq!((report.failed, report.rejected), (0, 0), "{report:?}");
    assert!((3 << 20..5 << 20).contains(&report.bytes), "holes stay holes: {report:?}");
    // Again, and after further changes by a container that goes on.
    let again = layers.copy_back();
    assert_eq!((again.failed, again.bytes), (0, report.bytes), "{again:?}");
    fs::remove_file(root.join("opaque/new/f")).unwrap();
    fs::remove_dir_all(root.join("todir/below")).unwrap();
    fs::remove_file(root.join("new")).unwrap();
    fs::write(root.join("etc/renamed2"), "2").unwrap();
    fs::remove_dir_all(root.join("kept")).unwrap();
    fs::create_dir(root.join("opaque/old")).unwrap();
    layers.copy_back();
}

/// CAP_NET_RAW, permitted (capabilities(7), version 2).
fn capability() -> [u8; 20] {
    let mut value = [0; 20];
    value[3] = 2;
    value[5] = 0x20;
    value
}

#[test]
fn what_cannot_be_copied_is_named_and_the_rest_is_copied() {
    let layers = Layers::new(|_| ());
    let root = layers.path("merged");
    let deep = root.join("d/".repeat(DEPTH_MAX + 2));
    fs::create_dir_all(&deep).unwrap();
    fs::write(root.join("last"), "x").unwrap();
    fs::write(root.join(".husk-copy-back"), "of the container").unwrap();
    let folder = |name: &str| Folder { disk: layers.path(name).display().to_string(), path: String::new() };
    let report = super::copy_back(&folder("upper"), &folder("lower"), None).unwrap();
    assert_eq!(report.failed, 2, "{report:?}");
    assert!(layers.path("lower/last").exists() && !layers.path("lower/.husk-copy-back").exists());
    assert!(report.failure.len() <= MESSAGE_MAX, "{report:?}");

    // A full filesystem ends the copy, with the path.
    mount(Some("full"), &layers.path("lower"), Some("tmpfs"), MsFlags::empty(), Some("size=64k")).unwrap();
    fs::write(layers.path("lower/last"), "old").unwrap();
    fs::write(layers.path("upper/last"), vec![1; 1 << 20]).unwrap();
    let error = super::copy_back(&folder("upper"), &folder("lower"), None).unwrap_err().message;
    assert!(error.contains("apply /last, and what follows: No space left"), "{error}");
    // The old file is complete.
    assert_eq!(fs::read(layers.path("lower/last")).unwrap(), b"old");
    assert_eq!(fs::read_dir(layers.path("lower")).unwrap().count(), 1);
}

#[test]
fn a_layer_that_changes_nothing_is_recognized() {
    let layers = Layers::new(image);
    let root = layers.path("merged");
    let folder = |name: &str| Folder { disk: layers.path(name).display().to_string(), path: String::new() };
    let is_nothing = || super::is_nothing(&folder("upper"), &folder("lower")).unwrap();
    // The upper folder gets the attributes of the other one.
    layers.copy_back();
    assert!(is_nothing());
    let changes: [(&str, &dyn Fn()); 6] = [
        ("mode", &|| fs::set_permissions(&root, fs::Permissions::from_mode(0o711)).unwrap()),
        ("owner", &|| chown(&root, Some(1), Some(2)).unwrap()),
        ("a new attribute", &|| set_xattr(&root, "trusted.a", b"1")),
        ("another value", &|| set_xattr(&root, "trusted.a", b"2")),
        ("no attribute", &|| rustix::fs::lremovexattr(&root, "trusted.a").unwrap()),
        ("a time", &|| File::open(&root).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap()),
    ];
    for (what, change) in changes {
        change();
        assert!(!is_nothing(), "{what}");
        layers.copy_back();
        assert!(is_nothing(), "{what}");
    }
    // What a copy has left that was interrupted.
    fs::write(layers.path("lower/.husk-copy-back"), "").unwrap();
    assert!(!is_nothing());
    layers.copy_back();
    fs::remove_file(root.join("etc/passwd")).unwrap();
    assert!(!is_nothing(), "a file is hidden");
}

/// An overlay of an image, and a copy of the image that the layer is applied to.
#[test]
fn what_a_copy_has_created_goes_with_a_later_one_although_the_images_have_no_trace_of_it() {
    let layers = Layers::new(image);
    let root = layers.path("merged");
    let disk = |path: &str| Folder { disk: layers.disk.path().display().to_string(), path: path.to_owned() };
    let merged = || Folder { disk: root.display().to_string(), path: String::new() };
    let target = disk("target");
    let copied =
        std::process::Command::new("cp").arg("-a").arg(layers.path("lower")).arg(layers.path("target")).status();
    assert!(copied.unwrap().success());
    let copy = |last| {
        let images = Images { merged: merged(), last };
        let report = super::copy_back(&disk("upper"), &target, Some(&images)).unwrap();
        assert_eq!(report.failed, 0, "{report:?}");
        assert_eq!(tree(&layers.path("target")), tree(&root));
    };
    fs::write(root.join("a"), "a").unwrap();
    fs::write(root.join("etc/b"), "b").unwrap();
    fs::create_dir_all(root.join("d/e")).unwrap();
    fs::write(root.join("d/e/f"), "f").unwrap();
    fs::create_dir(root.join("kept/new")).unwrap();
    fs::write(root.join("kept/new/old"), "old").unwrap();
    copy(false);
    // Files of the host that no copy has created stay, where the overlay shows none.
    fs::write(layers.path("target/etc/of-the-host"), "").unwrap();
    fs::remove_file(root.join("a")).unwrap();
    fs::rename(root.join("etc/b"), root.join("etc/c")).unwrap();
    fs::remove_dir_all(root.join("d")).unwrap();
    fs::remove_dir_all(root.join("kept/new")).unwrap();
    fs::create_dir(root.join("kept/new")).unwrap();
    fs::write(root.join("kept/new/young"), "young").unwrap();
    fs::remove_file(root.join("etc/passwd")).unwrap();
    let images = Images { merged: merged(), last: false };
    super::copy_back(&disk("upper"), &target, Some(&images)).unwrap();
    assert!(layers.path("target/etc/of-the-host").exists());
    fs::remove_file(layers.path("target/etc/of-the-host")).unwrap();
    copy(false);
    // What became of everything that the first copy has created.
    fs::remove_file(root.join("etc/c")).unwrap();
    fs::remove_dir_all(root.join("kept/new")).unwrap();
    symlink("/nowhere", root.join("kept/new")).unwrap();
    fs::write(root.join("last"), "").unwrap();
    copy(true);
    assert!(!super::is_nothing(&disk("upper"), &target).unwrap());
}
