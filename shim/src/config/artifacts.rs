//! Finds the guest's kernel and initramfs.

use std::path::{Path, PathBuf};

use super::names::PATH;
use super::problem::Problem;
use super::settings::Config;

/// Where an installation puts kernel and initrd.
const SHARED: &str = "/usr/share/husk";

/// The guest's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Artifacts {
    /// An ELF kernel with a PVH entry.
    pub(crate) kernel: PathBuf,
    /// The initramfs with husk's init.
    pub(crate) initrd: PathBuf,
}

impl Config {
    /// Finds the guest's kernel and initrd: the configured files, else those in `beside` (the folder of the shim's own
    /// binary), else those of an installation. Debug mode has an initrd of its own in the same folder, but a configured
    /// initrd is used in either mode.
    ///
    /// # Errors
    ///
    /// The missing files, with all searched paths.
    pub(crate) fn artifacts(&self, beside: Option<&Path>, debug: bool) -> Result<Artifacts, Vec<Problem>> {
        let find = |key: &str, missing: &str, configured: &Option<PathBuf>, name: &str| {
            let (decided_by, searched) = match (configured, &self.image_dir) {
                (Some(path), _) => (Some((key, path)), vec![path.clone()]),
                (None, Some(folder)) => (Some(("image_dir", folder)), vec![folder.join(name)]),
                (None, None) => {
                    let folders = beside.into_iter().chain([Path::new(SHARED)]);
                    (None, folders.map(|folder| folder.join(name)).collect())
                }
            };
            searched.iter().find(|path| path.is_file()).cloned().ok_or_else(|| {
                let paths: Vec<_> = searched.iter().map(|path| path.display().to_string()).collect();
                let paths = paths.join(", ");
                Problem {
                    key: decided_by.map_or(key, |(key, _)| key).to_owned(),
                    value: decided_by.map(|(_, path)| format!("{path:?}")),
                    why: format!(
                        "{missing}; looked for {paths}: build it (./task build), or set `{key}` or `image_dir` in {PATH}"
                    ),
                }
            })
        };
        let kernel = find("kernel", "kernel path or restore snapshot is required", &self.kernel, "vmlinux");
        let (missing, name) = match debug {
            false => ("no initrd found", "initrd.img"),
            true => ("no initrd for debug mode found", "initrd-debug.img"),
        };
        let initrd = find("initrd", missing, &self.initrd, name);
        match (kernel, initrd) {
            (Ok(kernel), Ok(initrd)) => Ok(Artifacts { kernel, initrd }),
            (kernel, initrd) => Err([kernel.err(), initrd.err()].into_iter().flatten().collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_files_are_found_beside_the_shim_or_all_searched_paths_are_reported() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::default();
        let missing = config.artifacts(Some(dir.path()), false).unwrap_err();
        let text = missing[0].to_string();
        let kernel = dir.path().join("vmlinux");
        assert_eq!(missing.len(), 2);
        assert!(text.starts_with("kernel: kernel path or restore snapshot is required; looked for "), "{text}");
        assert!(text.contains(kernel.to_str().unwrap()) && text.contains("/usr/share/husk/vmlinux"), "{text}");
        for name in ["vmlinux", "initrd.img"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(config.artifacts(Some(dir.path()), false).unwrap().kernel, kernel);
    }

    #[test]
    fn debug_mode_has_its_own_initrd_unless_one_is_configured() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["vmlinux", "initrd.img"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let (plain, debug) = (dir.path().join("initrd.img"), dir.path().join("initrd-debug.img"));
        let config = Config::default();
        let text = config.artifacts(Some(dir.path()), true).unwrap_err()[0].to_string();
        let begins =
            format!("initrd: no initrd for debug mode found; looked for {}, /usr/share/husk/", debug.display());
        assert!(text.starts_with(&begins) && text.contains("./task build"), "{text}");
        std::fs::write(&debug, "").unwrap();
        let named = Config { initrd: Some(plain.clone()), ..Config::default() };
        let folder = Config { image_dir: Some(dir.path().to_owned()), ..Config::default() };
        let table =
            [(&config, false, &plain), (&config, true, &debug), (&folder, true, &debug), (&named, true, &plain)];
        for (config, mode, expected) in table {
            assert_eq!(config.artifacts(Some(dir.path()), mode).unwrap().initrd, *expected, "{mode} {config:?}");
        }
    }
}
