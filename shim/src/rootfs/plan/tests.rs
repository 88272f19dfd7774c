//! The mounts of containerd's snapshotters, and others.

use std::path::Path;

use nix::mount::MsFlags;

use super::*;
use crate::config::verity::Verity;
use crate::host::digest::Sha256Digest;

fn mount(fs_type: &str, source: &str, options: &[&str]) -> Mount {
    let options = options.iter().map(ToString::to_string).collect();
    Mount { type_: fs_type.into(), source: source.into(), options, ..Default::default() }
}

/// What the layer `/images/verified` has, and `/meta/verified` describes.
fn tree() -> Verity {
    Verity { root_hash: Sha256Digest::parse(&"e1".repeat(32)).unwrap(), hash_offset: 4096 }
}

/// `/images/` has images, and `/dev/busy` is mounted by the host.
fn planned(mounts: &[Mount]) -> Result<RootPlan, String> {
    let is_image = |path: &Path| path.starts_with("/images") || path.starts_with("/dev");
    let is_busy = |path: &Path| path == Path::new("/dev/busy");
    let verity = |path: &Path| match path.to_str().unwrap() {
        "/images/verified.dmverity" | "/meta/verified" => Ok(Some(tree())),
        "/images/damaged.dmverity" | "/meta/damaged" => Err("damaged".to_owned()),
        _ => Ok(None),
    };
    plan(mounts, &HostView { is_image: &is_image, is_busy: &is_busy, verity: &verity })
        .map_err(|all| crate::config::problem::join(&all))
}

fn disk(image: &str, fs_type: &str, flags: MsFlags, data: &str) -> RootDisk {
    RootDisk { image: image.into(), fs_type: fs_type.into(), flags, data: data.into(), format: None, verity: None }
}

fn at(disk: usize, path: &str) -> Place {
    Place { disk, path: path.into() }
}

fn guest(mounts: &[Mount]) -> GuestRoot {
    match planned(mounts).unwrap() {
        RootPlan::Guest(root) => root,
        RootPlan::Host(root) => panic!("{root:?}"),
    }
}

#[test]
fn a_filesystem_on_a_device_or_in_an_image_is_the_root() {
    let (rw, ro) = (MsFlags::empty(), MsFlags::MS_RDONLY);
    for (given, expected) in [
        // devmapper
        (mount("xfs", "/dev/mapper/p-1", &["nouuid"]), disk("/dev/mapper/p-1", "xfs", rw, "nouuid")),
        (mount("ext4", "/dev/mapper/p-2", &["ro"]), disk("/dev/mapper/p-2", "ext4", ro, "")),
        // blockfile
        (mount("ext4", "/images/1", &["loop", "rw"]), disk("/images/1", "ext4", rw, "")),
        (mount("ext4", "/images/1", &["loop", "ro", "noload"]), disk("/images/1", "ext4", ro, "noload")),
        (mount("btrfs", "/dev/sdx", &["subvolid=5"]), disk("/dev/sdx", "btrfs", rw, "subvolid=5")),
        (mount("erofs", "/images/l", &["ro", "loop"]), disk("/images/l", "erofs", ro, "")),
        (mount("erofs", "/images/l", &[]), disk("/images/l", "erofs", ro, "")),
    ] {
        let top = Top::Folder { place: at(0, ""), flags: MsFlags::empty() };
        assert_eq!(guest(&[given]), GuestRoot { disks: vec![expected], folders: Vec::new(), top });
    }
}

#[test]
fn layers_and_a_disk_for_changes_are_an_overlay() {
    let (rw, ro) = (MsFlags::empty(), MsFlags::MS_RDONLY);
    let layer = |n: u32| mount("erofs", &format!("/images/{n}"), &["ro", "loop"]);
    let writable =
        mount("mkfs/ext4", "/images/w", &["X-containerd.mkfs.fs=ext4", "X-containerd.mkfs.size=64MiB", "rw", "loop"]);
    let overlay = mount(
        "format/mkdir/overlay",
        "overlay",
        &[
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
            "workdir={{ mount 0 }}/work",
            "upperdir={{ mount 0 }}/upper",
            "lowerdir={{ overlay 1 2 }}",
            "index=off",
        ],
    );
    // As the erofs snapshotter passes them; containerd may have created the image.
    let formatted = mount("ext4", "/images/w", &["rw", "loop"]);
    for (writable, creates) in [(writable.clone(), true), (formatted, false)] {
        let root = guest(&[writable, layer(1), layer(2), overlay.clone()]);
        assert_eq!(root.disks[0].format.as_ref().map(|format| format.size), creates.then_some(64 << 20));
        assert_eq!((root.disks[0].read_only(), root.disks[2].read_only()), (false, true));
        let folder = |path| NewFolder { place: at(0, path), mode: 0o755, owner: (0, 0) };
        assert_eq!(root.folders, [folder("upper"), folder("work")]);
        let top = Top::Overlay {
            lower: vec![at(1, ""), at(2, "")],
            upper: Some((at(0, "upper"), at(0, "work"))),
            flags: rw,
            data: vec!["index=off".into()],
        };
        assert_eq!(root.top, top);
    }
    // A container without an image.
    let bind = mount(
        "format/mkdir/bind",
        "{{ mount 0 }}/upper",
        &["X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "rw", "rbind"],
    );
    let root = guest(&[writable, bind]);
    assert_eq!(root.top, Top::Folder { place: at(0, "upper"), flags: rw });
    // Views.
    let view = guest(&[layer(1), layer(2), mount("format/mkdir/overlay", "overlay", &["lowerdir={{ overlay 0 1 }}"])]);
    let lower = vec![at(0, ""), at(1, "")];
    assert_eq!(view.top, Top::Overlay { lower, upper: None, flags: rw, data: Vec::new() });
    let bind = mount("format/bind", "{{ mount 0 }}", &["ro", "rbind"]);
    assert_eq!(guest(&[layer(1), bind]).top, Top::Folder { place: at(0, ""), flags: ro });
}

#[test]
fn an_image_that_a_loop_mount_creates_is_the_disk_of_what_refers_to_it() {
    let options = &["X-containerd.mkfs.size=1GiB", "X-containerd.mkfs.fs=xfs"];
    let image = mount("mkfs/loop", "/images/x", options);
    let root = guest(&[image, mount("format/xfs", "{{ source 0 }}", &[])]);
    assert_eq!((root.disks.len(), root.disks[0].image.as_path()), (1, Path::new("/images/x")));
    assert_eq!(root.disks[0].format.as_ref().unwrap().fs_type, "xfs");
}

#[test]
fn folders_of_the_host_stay_on_the_host() {
    let host = |mounts: &[Mount]| match planned(mounts).unwrap() {
        RootPlan::Host(root) => root,
        RootPlan::Guest(root) => panic!("{root:?}"),
    };
    assert_eq!(host(&[]), HostRoot::default());
    for plain in [
        mount("overlay", "overlay", &["lowerdir=/a", "upperdir=/b", "workdir=/c"]),
        mount("bind", "/a", &["rbind", "ro"]),
        mount("btrfs", "/dev/busy", &["subvolid=256"]),
        mount("tmpfs", "tmpfs", &[]),
    ] {
        let mounts = [mount("bind", "/below", &["bind"]), plain];
        assert_eq!(host(&mounts), HostRoot { mounts: mounts.to_vec(), folders: Vec::new() });
    }
    let layers = [mount("bind", "/a", &["bind"]), mount("bind", "/b", &["bind"])];
    let options = ["X-containerd.mkdir.path=/u:0750:1:2", "lowerdir={{ overlay 1 0 }}", "upperdir=/u", "workdir=/w"];
    let [first, second] = layers;
    let root = host(&[first, second, mount("format/mkdir/overlay", "overlay", &options)]);
    let expected = mount("overlay", "overlay", &["lowerdir=/b:/a", "upperdir=/u", "workdir=/w"]);
    let folders = vec![NewFolder { place: "/u".into(), mode: 0o750, owner: (1, 2) }];
    assert_eq!(root, HostRoot { mounts: vec![expected], folders });
}

#[test]
fn what_is_not_supported_is_named_by_field_and_value() {
    let layer = || mount("erofs", "/images/1", &["ro", "loop"]);
    let overlay = |options: &[&str]| mount("format/overlay", "overlay", options);
    for (mounts, expected) in [
        (vec![mount("x/ext4", "/images/1", &[])], "rootfs[0].type = \"x/ext4\": husk supports the transforms format"),
        (vec![mount("ext4", "images/1", &[])], "rootfs[0].source = \"images/1\": is not the absolute path"),
        (vec![mount("ext4", "/images/1", &["journal_path=/x"])], "rootfs[0].options = \"journal_path=/x\": is not"),
        (vec![mount("ext4", "/images/1", &["uidmap=0:1:2"])], "rootfs[0].options = \"uidmap=0:1:2\": is not"),
        (vec![mount("erofs", "/images/1", &["device=/images/2"])], "rootfs[0].options = \"device=/images/2\": is not"),
        (
            vec![mount("erofs", "/images/1", &["X-containerd.dmverity=/m"])],
            "rootfs[0].options = \"X-containerd.dmverity=/m\": there is no /m",
        ),
        (vec![mount("squashfs", "/images/1", &[])], "rootfs[0].type = \"squashfs\": husk mounts ext2"),
        (vec![mount("fuse3.x", "/images/1", &[])], "rootfs[0].type = \"fuse3.x\": filesystems that need"),
        (vec![mount("mkfs/ext4", "/images/1", &[])], "rootfs[0].options = \"X-containerd.mkfs.size\": is missing"),
        (vec![mount("mkfs/bind", "/a", &["X-containerd.mkfs.size=1m"])], "rootfs[0].type = \"bind\": only"),
        (vec![mount("mkfs/xfs", "/images/1", &["X-containerd.mkfs.size=1m"])], "rootfs[0].type = \"xfs\": the image"),
        (vec![mount("loop", "/images/1", &[])], "rootfs[0].type = \"loop\": no mount"),
        (vec![layer(), mount("overlay", "o", &["lowerdir=/a"])], "rootfs[1].options = \"lowerdir=/a\": is a folder of"),
        (
            vec![layer(), overlay(&["lowerdir={{ mount 1 }}"])],
            "rootfs[1].options = \"lowerdir={{ mount 1 }}\": there is",
        ),
        (vec![layer(), overlay(&["lowerdir={{ overlay 0 99999999999 }}"])], "rootfs[1].options = \"lowerdir={{ ov"),
        (
            vec![layer(), overlay(&["lowerdir={{ mount 0 }}/../..", "ro"])],
            "rootfs[1].options = \"lowerdir={{ mount 0 }}/../..\": leads out",
        ),
        (
            vec![layer(), overlay(&["lowerdir={{ mount 0 }}", "upperdir={{ mount 0 }}/u"])],
            "rootfs[1].options = \"\": up",
        ),
        (vec![layer(), mount("bind", "/a", &["bind"])], "rootfs[1].source = \"/a\": is a folder of the host"),
        (vec![mount("bind", "/a", &["bind"]), layer()], "rootfs[0].type = \"bind\": in a root that consists"),
        (vec![Mount { target: "etc".into(), ..layer() }], "rootfs[0].target = \"etc\": mounts below the root"),
        (vec![layer(); 256], "rootfs = 256: more than 255 mounts"),
    ] {
        let error = planned(&mounts).unwrap_err();
        assert!(error.starts_with(expected), "{expected}\n{error}");
    }
}

#[test]
fn a_layer_with_a_hash_tree_is_verified() {
    let layer = |source: &str, option: &str| {
        let options: Vec<&str> = ["ro", "loop"].into_iter().chain((!option.is_empty()).then_some(option)).collect();
        planned(&[mount("erofs", source, &options)])
    };
    for (source, option, expected) in [
        ("/images/verified", "", Some(tree())),
        ("/images/verified", "X-containerd.dmverity=auto", Some(tree())),
        ("/images/verified", "X-containerd.dmverity=on", Some(tree())),
        ("/images/verified", "X-containerd.dmverity=off", None),
        ("/images/1", "", None),
        ("/images/1", "X-containerd.dmverity=auto", None),
        ("/images/1", "X-containerd.dmverity=/meta/verified", Some(tree())),
    ] {
        let RootPlan::Guest(root) = layer(source, option).unwrap() else { panic!("{source} {option}") };
        assert_eq!((root.disks[0].verity, root.disks[0].data.as_str()), (expected, ""), "{source} {option}");
    }
    for (source, option, expected) in [
        ("/images/damaged", "", "rootfs[0].source = \"/images/damaged\": damaged"),
        ("/images/1", "X-containerd.dmverity=/meta/damaged", "damaged"),
        ("/images/1", "X-containerd.dmverity=on", "there is no /images/1.dmverity"),
        ("/images/1", "X-containerd.dmverity=maybe", "must be auto, on, off, or the absolute path"),
        ("/images/1", "X-containerd.dmverity.root-hash=00", "is not supported"),
    ] {
        let error = layer(source, option).unwrap_err();
        assert!(error.contains(expected), "{source} {option}: {error}");
    }
}
