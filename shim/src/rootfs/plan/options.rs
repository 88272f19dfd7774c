//! The options of filesystems that the guest mounts, and those that containerd's mount manager would take.

use std::path::Path;

/// A folder that has to exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NewFolder<P> {
    pub(crate) place: P,
    /// Permission bits.
    pub(crate) mode: u32,
    /// User and group.
    pub(crate) owner: (u32, u32),
}

/// Prefixes of the options of containerd's mount manager.
const MKDIR: &str = "X-containerd.mkdir.";
const MKFS: &str = "X-containerd.mkfs.";
/// Permission bits of a folder without a mode.
const FOLDER_MODE: u32 = 0o700;

const EXT: &[&str] = &[
    "acl",
    "noacl",
    "barrier",
    "barrier=",
    "nobarrier",
    "commit=",
    "data=",
    "delalloc",
    "nodelalloc",
    "discard",
    "nodiscard",
    "errors=",
    "init_itable",
    "noinit_itable",
    "lazytime",
    "noload",
    "norecovery",
    "stripe=",
    "user_xattr",
    "nouser_xattr",
];
const XFS: &[&str] = &[
    "allocsize=",
    "attr2",
    "discard",
    "nodiscard",
    "inode32",
    "inode64",
    "largeio",
    "lazytime",
    "logbsize=",
    "logbufs=",
    "noalign",
    "norecovery",
    "nouuid",
    "sunit=",
    "swidth=",
];
const BTRFS: &[&str] = &[
    "compress",
    "compress=",
    "compress-force",
    "compress-force=",
    "discard",
    "discard=",
    "nodiscard",
    "nodatacow",
    "nodatasum",
    "space_cache",
    "space_cache=",
    "ssd",
    "nossd",
    "subvol=",
    "subvolid=",
];
const EROFS: &[&str] = &["acl", "noacl", "cache_strategy=", "user_xattr", "nouser_xattr"];
const OVERLAY: &[&str] =
    &["index=", "metacopy=", "nfs_export=", "redirect_dir=", "userxattr", "uuid=", "verity=", "volatile", "xino="];

/// Whether husk passes an option on to a filesystem of this type.
pub(crate) fn is_known(fs_type: &str, option: &str) -> bool {
    let known = match fs_type {
        "ext2" | "ext3" | "ext4" => EXT,
        "xfs" => XFS,
        "btrfs" => BTRFS,
        "erofs" => EROFS,
        "overlay" => OVERLAY,
        _ => return false,
    };
    // In the guest, a comma separates options.
    let name = option.split_inclusive('=').next().unwrap_or_default();
    known.contains(&name) && !option.contains(',')
}

/// An image that is created if it does not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    /// Bytes.
    pub(crate) size: u64,
    /// ext2, ext3, ext4 or xfs.
    pub(crate) fs_type: String,
    pub(crate) uuid: Option<String>,
}

/// Takes the options of `mkfs/` out of a mount's.
///
/// # Errors
/// The option, and what is wrong.
pub(super) fn take_format(options: &mut Vec<String>) -> Result<Format, (String, String)> {
    let mut format = Format { size: 0, fs_type: "ext4".to_owned(), uuid: None };
    for option in options.extract_if(.., |option| option.starts_with(MKFS)) {
        let fault = |why: &str| (option.clone(), why.to_owned());
        let (name, value) = option[MKFS.len()..].split_once('=').ok_or_else(|| fault("has no value"))?;
        match name {
            "size" => format.size = bytes(value).ok_or_else(|| fault("is no size, such as 1GiB"))?,
            "fs" if ["ext2", "ext3", "ext4", "xfs"].contains(&value) => format.fs_type = value.to_owned(),
            "fs" => return Err(fault("husk creates ext2, ext3, ext4 and xfs")),
            "uuid" if value.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-') => {
                format.uuid = Some(value.to_owned());
            }
            "uuid" => return Err(fault("is no UUID")),
            _ => return Err(fault("is not supported")),
        }
    }
    match format.size {
        0 => Err((format!("{MKFS}size"), "is missing or zero".to_owned())),
        _ => Ok(format),
    }
}

/// A size in containerd's notation: a decimal number with a unit, which is a power of 1024.
fn bytes(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_lowercase();
    let unit = unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit);
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    let scaled = number.parse::<f64>().ok()? * (1_u64 << shift) as f64;
    // An image is never larger than a file: 2^63 bytes.
    (scaled < i64::MAX as f64).then_some(scaled as u64)
}

/// Takes the options of `mkdir/` out of a mount's: `path=PATH[:MODE[:UID:GID]]`.
///
/// # Errors
/// The option, and what is wrong.
pub(super) fn take_folders(options: &mut Vec<String>) -> Result<Vec<NewFolder<String>>, (String, String)> {
    let taken: Vec<String> = options.extract_if(.., |option| option.starts_with(MKDIR)).collect();
    let folder = |option: &String| {
        let fault = |why: &str| (option.clone(), why.to_owned());
        let value = option[MKDIR.len()..].strip_prefix("path=").ok_or_else(|| fault("is not supported"))?;
        let mut fields = value.split(':');
        let place = fields.next().filter(|path| !path.is_empty()).ok_or_else(|| fault("has no path"))?.to_owned();
        let mode = fields.next().map_or(Some(FOLDER_MODE), |text| u32::from_str_radix(text, 8).ok());
        let mode = mode.filter(|mode| *mode <= 0o777).ok_or_else(|| fault("has no valid mode"))?;
        let ids = fields.map(str::parse).collect::<Result<Vec<u32>, _>>().map_err(|_| fault("has no valid owner"))?;
        match ids[..] {
            [] => Ok(NewFolder { place, mode, owner: (0, 0) }),
            [uid, gid] => Ok(NewFolder { place, mode, owner: (uid, gid) }),
            _ => Err(fault("has no valid owner")),
        }
    };
    taken.iter().map(folder).collect()
}

/// Whether a path below a filesystem's root stays there by its text.
pub(super) fn is_contained(path: &str) -> bool {
    Path::new(path).components().all(|part| matches!(part, std::path::Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(options: &[&str]) -> Vec<String> {
        options.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn only_options_of_the_filesystem_that_concern_no_file_of_the_host_are_known() {
        for (fs_type, option, known) in [
            ("ext4", "noload", true),
            ("ext4", "data=journal", true),
            ("ext4", "data", false),
            ("ext4", "journal_path=/etc/shadow", false),
            ("xfs", "nouuid", true),
            ("xfs", "logdev=/dev/sda", false),
            ("btrfs", "subvol=a/b", true),
            ("btrfs", "subvol=a,device=/dev/sda", false),
            ("btrfs", "device=/dev/sda", false),
            ("erofs", "device=/layer", false),
            ("overlay", "index=off", true),
            ("overlay", "lowerdir=/", false),
            ("vfat", "uid=0", false),
        ] {
            assert_eq!(is_known(fs_type, option), known, "{fs_type} {option}");
        }
    }

    #[test]
    fn formats_are_taken_from_the_options() {
        let mut options = strings(&["rw", "X-containerd.mkfs.size=1.5GiB", "X-containerd.mkfs.fs=xfs", "loop"]);
        let format = take_format(&mut options).unwrap();
        assert_eq!(format, Format { size: 3 << 29, fs_type: "xfs".into(), uuid: None });
        assert_eq!(options, ["rw", "loop"]);
        for (given, expected) in [("67108864", Some(1 << 26)), ("64m", Some(1 << 26)), ("2 kB", Some(2048))] {
            assert_eq!(bytes(given), expected, "{given}");
        }
        for wrong in ["", "x", "1p", "-1", "9000000000g"] {
            assert_eq!(bytes(wrong), None, "{wrong}");
        }
        for (options, option) in [
            (&["rw"][..], "X-containerd.mkfs.size"),
            (&["X-containerd.mkfs.size=0"], "X-containerd.mkfs.size"),
            (&["X-containerd.mkfs.fs=vfat"], "X-containerd.mkfs.fs=vfat"),
            (&["X-containerd.mkfs.uuid=--x"], "X-containerd.mkfs.uuid=--x"),
            (&["X-containerd.mkfs.x=1"], "X-containerd.mkfs.x=1"),
            (&["X-containerd.mkfs.size"], "X-containerd.mkfs.size"),
        ] {
            assert_eq!(take_format(&mut strings(options)).unwrap_err().0, option);
        }
    }

    #[test]
    fn folders_are_taken_from_the_options() {
        let path = |value: &str| format!("X-containerd.mkdir.path={value}");
        let mut options = vec![path("/a"), "rw".into(), path("/b:0755"), path("/c:1:2:3")];
        let folder = |place: &str, mode, owner| NewFolder { place: place.to_owned(), mode, owner };
        let expected = [folder("/a", 0o700, (0, 0)), folder("/b", 0o755, (0, 0)), folder("/c", 1, (2, 3))];
        assert_eq!(take_folders(&mut options).unwrap(), expected);
        assert_eq!(options, ["rw"]);
        for wrong in ["", ":0755", "/a:8", "/a:4755", "/a:0755:1", "/a:0755:1:2:3", "/a:0755:x:1"] {
            assert_eq!(take_folders(&mut vec![path(wrong)]).unwrap_err().0, path(wrong));
        }
        assert!(take_folders(&mut vec!["X-containerd.mkdir.mode=1".into()]).is_err());
        assert!(is_contained("a/b") && is_contained("") && !is_contained("../b") && !is_contained("/a"));
    }
}
