//! What a disk's hash tree (dm-verity) must lead to: the root hash that an annotation or containerd names.

use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Deserializer};

use crate::host::digest::Sha256Digest;

/// The largest file with metadata of containerd that is read, bytes.
const MOST: u64 = 64 << 10;

/// A hash tree that is appended to a disk's filesystem, in veritysetup's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Verity {
    /// The hash of the tree's root.
    #[serde(deserialize_with = "root_hash")]
    pub(crate) root_hash: Sha256Digest,
    /// The offset of the tree's superblock, bytes. The filesystem is before it.
    pub(crate) hash_offset: u64,
}

fn root_hash<'de, D: Deserializer<'de>>(from: D) -> Result<Sha256Digest, D::Error> {
    let text = String::deserialize(from)?;
    Sha256Digest::parse(&text).map_err(|_| serde::de::Error::custom("root_hash must have 64 hexadecimal digits"))
}

/// What containerd's erofs differ writes beside a layer.
#[derive(Deserialize)]
struct Metadata {
    roothash: String,
    hashoffset: u64,
    /// The image with the hash tree, if it is another one.
    #[serde(default)]
    hashdevice: String,
}

impl Verity {
    /// Reads the metadata that containerd has written to the file `path`. None if there is no such file.
    ///
    /// # Errors
    /// Why the file cannot be used: a layer must not lose its protection because its metadata is damaged.
    pub(crate) fn of_containerd(path: &Path) -> Result<Option<Self>, String> {
        let file = match std::fs::File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(format!("open {}: {error}", path.display())),
        };
        let mut text = String::new();
        let read = file.take(MOST).read_to_string(&mut text);
        read.map_err(|error| format!("read {}: {error}", path.display()))?;
        Self::parse(&text).map(Some).map_err(|why| format!("{}: {why}", path.display()))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let metadata: Metadata = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if !metadata.hashdevice.is_empty() {
            return Err(format!("a hash tree in another file ({:?}) is not supported", metadata.hashdevice));
        }
        let root_hash = Sha256Digest::parse(&metadata.roothash).map_err(|why| format!("roothash {why}"))?;
        Ok(Self { root_hash, hash_offset: metadata.hashoffset })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerds_metadata_is_read_or_rejected() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("layer.erofs.dmverity");
        assert_eq!(Verity::of_containerd(&path), Ok(None));
        let hash = "a7".repeat(32);
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Verity::of_containerd(&path)
        };
        let verity = Verity { root_hash: Sha256Digest::parse(&hash).unwrap(), hash_offset: 8192 };
        let text = format!(r#"{{"roothash": "{hash}", "hashoffset": 8192, "blocksize": 4096}}"#);
        assert_eq!(read(&text), Ok(Some(verity)));
        for (text, expected) in [
            ("".to_owned(), "EOF"),
            (text.replace("8192", "-1"), "invalid value"),
            (text.replace("a7a7", ""), "roothash must be"),
            (text.replace("\"hashoffset\"", "\"offset\""), "missing field `hashoffset`"),
            (text.replace("\"blocksize\": 4096", "\"hashdevice\": \"tree\""), "in another file (\"tree\")"),
        ] {
            let error = read(&text).unwrap_err();
            assert!(error.contains(expected) && error.contains("layer.erofs.dmverity"), "{text}: {error}");
        }
    }
}
