//! Volumes whose filesystem the host leaves to the guest: block devices that are described in the folder and in the form
//! of Kata Containers' direct-assigned volumes, for which CSI drivers exist.
//!
//! Such a driver does not mount a volume. It describes the volume in `FOLDER/NAME/mountInfo.json`, where NAME is the path
//! at which the kubelet expects the mount, in the URL-safe alphabet of base64 (RFC 4648, section 5), with padding. A bind
//! mount of this path means the volume.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use base64ct::{Base64Url, Encoding};
use nix::mount::MsFlags;
use serde::Deserialize;

use super::mount::parse_options;
use super::plan::is_known_option;

const FILE: &str = "mountInfo.json";
/// Most bytes of a description.
const MOST: u64 = 64 * 1024;
/// The filesystems that the guest mounts, and can write to.
const FILESYSTEMS: [&str; 5] = ["ext2", "ext3", "ext4", "xfs", "btrfs"];

/// A block device with a filesystem that the guest mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DirectVolume {
    /// The device on the host.
    pub(crate) device: PathBuf,
    pub(crate) fs_type: String,
    pub(crate) flags: MsFlags,
    /// The filesystem's options.
    pub(crate) data: String,
}

/// The description.
#[derive(Debug, Deserialize)]
struct MountInfo {
    #[serde(rename = "volume-type")]
    volume_type: String,
    device: PathBuf,
    fstype: String,
    /// Null, if written by Go.
    #[serde(default)]
    metadata: Option<BTreeMap<String, String>>,
    #[serde(default)]
    options: Option<Vec<String>>,
}

/// Finds the direct-assigned volume that the bind mount of `source` means; none without a folder.
///
/// # Errors
/// Why it cannot be used.
pub(crate) fn find(folder: Option<&Path>, source: &Path) -> Result<Option<DirectVolume>, String> {
    let Some(folder) = folder else { return Ok(None) };
    let path = folder.join(Base64Url::encode_string(source.as_os_str().as_bytes())).join(FILE);
    let in_file = |why: String| format!("{}: {why}", path.display());
    let file = match File::open(&path) {
        Ok(file) => file,
        // The name of a long path is longer than that of a file can be.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidFilename) => return Ok(None),
        Err(error) => return Err(in_file(error.to_string())),
    };
    let mut text = String::new();
    file.take(MOST).read_to_string(&mut text).map_err(|error| in_file(error.to_string()))?;
    parse(&text).map(Some).map_err(in_file)
}

fn parse(text: &str) -> Result<DirectVolume, String> {
    let MountInfo { volume_type, device, fstype, metadata, options } =
        serde_json::from_str(text).map_err(|error| error.to_string())?;
    if volume_type != "block" {
        return Err(format!("volume-type {volume_type:?}: husk supports block"));
    }
    if !device.is_absolute() {
        return Err(format!("device {device:?}: is not an absolute path"));
    }
    if !FILESYSTEMS.contains(&fstype.as_str()) {
        return Err(format!("fstype {fstype:?}: husk supports {}", FILESYSTEMS.join(", ")));
    }
    // A description may say things that nothing has to act on, but not these: files would have the wrong owner.
    if let Some((key, value)) = metadata.iter().flatten().find(|(key, _)| key.starts_with("fsGroup")) {
        return Err(format!("metadata {key} = {value:?}: is not supported"));
    }
    let options = options.unwrap_or_default();
    let parsed = parse_options(&options).map_err(|option| format!("options {option:?}: is not supported"))?;
    if parsed.bind.is_some() {
        return Err("options \"bind\": is not supported".to_owned());
    }
    if let Some(option) = parsed.data.iter().find(|option| !is_known_option(&fstype, option)) {
        return Err(format!("options {option:?}: is not supported for {fstype} in the guest"));
    }
    Ok(DirectVolume { device, fs_type: fstype, flags: parsed.flags, data: parsed.data.join(",") })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_volume_is_found_by_the_path_that_the_kubelet_mounts() {
        let folder = tempfile::tempdir().unwrap();
        let source = Path::new("/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/pvc-?>/mount");
        // `printf %s PATH | basenc --base64url`.
        let name = "L3Zhci9saWIva3ViZWxldC9wb2RzLzEvdm9sdW1lcy9rdWJlcm5ldGVzLmlvfmNzaS9wdmMtPz4vbW91bnQ=";
        assert_eq!(find(Some(folder.path()), source), Ok(None));
        std::fs::create_dir(folder.path().join(name)).unwrap();
        let info = r#"{"volume-type": "block", "device": "/dev/sdf", "fstype": "ext4", "metadata": null,
            "options": ["noatime", "ro", "data=journal"]}"#;
        std::fs::write(folder.path().join(name).join(FILE), info).unwrap();
        let found = DirectVolume {
            device: "/dev/sdf".into(),
            fs_type: "ext4".into(),
            flags: MsFlags::MS_NOATIME | MsFlags::MS_RDONLY,
            data: "data=journal".into(),
        };
        assert_eq!(find(Some(folder.path()), source), Ok(Some(found)));
        assert_eq!(find(None, source), Ok(None));
        let long = format!("/{}", "x".repeat(300));
        assert_eq!(find(Some(folder.path()), Path::new(&long)), Ok(None));
        std::fs::write(folder.path().join(name).join(FILE), "{").unwrap();
        let error = find(Some(folder.path()), source).unwrap_err();
        assert!(error.contains("mountInfo.json: EOF while parsing"), "{error}");
    }

    #[test]
    fn what_the_guest_cannot_honour_is_rejected_by_name() {
        let table = [
            ("volume-type", json!("spdkvol"), "volume-type \"spdkvol\": husk supports block"),
            ("device", json!("sdf"), "device \"sdf\": is not an absolute path"),
            ("fstype", json!("ntfs"), "fstype \"ntfs\": husk supports ext2"),
            ("metadata", json!({"fsGroup": "7"}), "metadata fsGroup = \"7\": is not supported"),
            ("options", json!(["journal_path=/x"]), "options \"journal_path=/x\": is not supported for ext4"),
            ("options", json!(["bind"]), "options \"bind\": is not supported"),
            ("options", json!(["rshared"]), "options \"rshared\": is not supported"),
            ("fstype", Value::Null, "invalid type: null"),
        ];
        for (field, value, expected) in table {
            let mut info = json!({"volume-type": "block", "device": "/dev/sdf", "fstype": "ext4"});
            assert!(parse(&info.to_string()).is_ok());
            info[field] = value;
            let error = parse(&info.to_string()).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
