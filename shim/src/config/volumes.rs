//! The annotation with volumes: files of the host that become disks, each with a filesystem that a container mounts.

use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::verity::Verity;

/// Most volumes of a container.
const MAX: usize = 32;
/// Largest volume, MiB: 16 TiB, the limit of ext4 with blocks of 4 KiB and without further options.
const MAX_MIB: u64 = 16 << 20;
/// Longest path, bytes (PATH_MAX of Linux, with the final zero).
const PATH_MAX: usize = 4095;

/// A volume that a container mounts.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VolumeRequest {
    /// The file on the host. After [`parse`], it has no symbolic links.
    pub(crate) source: PathBuf,
    /// Where the container mounts it.
    pub(crate) destination: PathBuf,
    /// The size that the file must have at least, MiB.
    #[serde(default)]
    pub(crate) size_mib: Option<u64>,
    /// Enlarge a smaller file.
    #[serde(default)]
    pub(crate) grow: bool,
    /// The container may not write.
    #[serde(default)]
    pub(crate) read_only: bool,
    /// The hash tree by which the guest verifies what it reads. Only of a read-only volume.
    #[serde(default)]
    pub(crate) verity: Option<Verity>,
}

/// Reads the annotation. Sources must be below the folders `allowed`.
///
/// # Errors
/// The first problem of each volume.
pub(super) fn parse(text: &str, allowed: &[PathBuf]) -> Result<Vec<VolumeRequest>, String> {
    let volumes: Vec<VolumeRequest> = serde_json::from_str(text).map_err(|error| {
        format!("must be a JSON list of volumes, each with \"source\" and \"destination\": {error}")
    })?;
    if volumes.len() > MAX {
        return Err(format!("a container can have at most {MAX} volumes"));
    }
    let (mut read, mut problems) = (Vec::<VolumeRequest>::new(), Vec::new());
    for (index, volume) in volumes.into_iter().enumerate() {
        let twice = read.iter().any(|other| other.destination == volume.destination);
        let checked =
            if twice { Err("its destination is another volume's too".to_owned()) } else { check(volume, allowed) };
        match checked {
            Ok(volume) => read.push(volume),
            Err(why) => problems.push(format!("volume {index}: {why}")),
        }
    }
    if problems.is_empty() { Ok(read) } else { Err(problems.join("; ")) }
}

fn check(volume: VolumeRequest, allowed: &[PathBuf]) -> Result<VolumeRequest, String> {
    let VolumeRequest { source, destination, size_mib, grow, read_only, verity } = &volume;
    for (name, path) in [("source", source), ("destination", destination)] {
        if !is_plain(path) {
            return Err(format!("{name} {path:?}: must be the absolute path of a file or folder, without .."));
        }
    }
    if size_mib.is_some_and(|mib| !(1..=MAX_MIB).contains(&mib)) {
        return Err(format!("size_mib must be a number from 1 to {MAX_MIB}"));
    }
    if *grow && size_mib.is_none() {
        return Err("grow needs size_mib".to_owned());
    }
    if verity.is_some() && !read_only {
        return Err("verity needs \"read_only\": true".to_owned());
    }
    Ok(VolumeRequest { source: resolve(source, allowed)?, ..volume })
}

/// Whether a path is absolute, names something, and has no `..`.
fn is_plain(path: &Path) -> bool {
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    path.is_absolute()
        && path.file_name().is_some()
        && path.as_os_str().len() <= PATH_MAX
        && path.components().all(plain)
}

/// The source without symbolic links, if it is in an allowed folder. The file itself need not exist.
fn resolve(source: &Path, allowed: &[PathBuf]) -> Result<PathBuf, String> {
    let (Some(folder), Some(name)) = (source.parent(), source.file_name()) else {
        return Err(format!("source {source:?}: has no folder"));
    };
    let folder = fs::canonicalize(folder).map_err(|error| format!("source {source:?}: its folder: {error}"))?;
    // An entry may itself lead through symbolic links. One that does not exist allows nothing.
    let allows = |entry: &PathBuf| fs::canonicalize(entry).is_ok_and(|entry| folder.starts_with(entry));
    if !allowed.iter().any(allows) {
        return Err(format!(
            "source {source:?}: not in a folder that husk's configuration allows: add one to the key volume_dirs"
        ));
    }
    Ok(folder.join(name))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_files_below_allowed_folders_become_volumes() {
        let host = tempfile::tempdir().unwrap();
        let at = |name: &str| host.path().join(name);
        for name in ["volumes/below", "volumes-other", "elsewhere"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        symlink(at("elsewhere"), at("volumes/out")).unwrap();
        symlink(at("volumes"), at("link")).unwrap();
        let allowed = [at("volumes"), at("missing")];
        let read = |source: &str, rest: &str| {
            let source = at(source).display().to_string();
            parse(&format!(r#"[{{"source": "{source}", "destination": "/data"{rest}}}]"#), &allowed)
        };
        for (source, resolved) in [("volumes/a.img", "volumes/a.img"), ("link/below/b.img", "volumes/below/b.img")] {
            let expected = fs::canonicalize(host.path()).unwrap().join(resolved);
            assert_eq!(read(source, "").unwrap()[0].source, expected);
        }
        let verity = format!(r#", "verity": {{"root_hash": "{}", "hash_offset": 4096}}"#, "0f".repeat(32));
        let verified = read("volumes/a.img", &format!(r#"{verity}, "read_only": true"#)).unwrap();
        assert_eq!(verified[0].verity.unwrap().hash_offset, 4096);
        let table = [
            ("volumes-other/a.img", "", "add one to the key volume_dirs"),
            ("volumes/out/a.img", "", "add one to the key volume_dirs"),
            ("volumes/../elsewhere/a.img", "", "without .."),
            ("volumes/none/a.img", "", "its folder: No such file"),
            ("volumes/a.img", r#", "size_mib": 0"#, "size_mib must be a number from 1 to 16777216"),
            ("volumes/a.img", r#", "grow": true"#, "grow needs size_mib"),
            ("volumes/a.img", &verity, "verity needs \"read_only\": true"),
            ("volumes/a.img", r#", "verity": {"root_hash": "00", "hash_offset": 1}"#, "root_hash must have 64"),
            ("volumes/a.img", r#", "size": 1"#, "unknown field `size`"),
        ];
        for (source, rest, expected) in table {
            let error = read(source, rest).unwrap_err();
            assert!(error.contains(expected), "{source}{rest}: {error}");
        }
    }

    #[test]
    fn a_destination_is_that_of_one_volume() {
        let host = tempfile::tempdir().unwrap();
        let volume = |name: &str, destination: &str| {
            let source = host.path().join(name);
            serde_json::json!({"source": source, "destination": destination})
        };
        let read = |volumes: Vec<serde_json::Value>| {
            parse(&serde_json::Value::from(volumes).to_string(), &[host.path().to_owned()]).map(|read| read.len())
        };
        assert_eq!(read(vec![volume("a", "/a"), volume("a", "/b")]), Ok(2));
        for (volumes, expected) in [
            (vec![volume("a", "/a"), volume("b", "/a")], "volume 1: its destination is another volume's too"),
            (vec![volume("a", "/")], "volume 0: destination \"/\": must be the absolute path"),
            (vec![volume("a", "/a"); 33], "a container can have at most 32 volumes"),
        ] {
            let error = read(volumes).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
