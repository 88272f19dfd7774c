//! The guest's kernel and initramfs: where they are looked for.

use std::path::{Path, PathBuf};

use super::names::PATH;
use super::problem::Problem;
use super::settings::Config;

/// Where an installation keeps kernel and initrd.
const SHARED: &str = "/usr/share/husk";

/// Where kernel and initrd are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifacts {
    /// An ELF kernel with a PVH entry.
    pub kernel: PathBuf,
    /// The initramfs with the init.
    pub initrd: PathBuf,
}

impl Config {
    /// Finds the guest's kernel and initrd: where the configuration says, else in `beside` (the folder of the shim's own binary), else where
    /// an installation keeps them. The initrd of a guest in `debug` mode is another one, beside the usual one; one that the configuration
    /// names itself is taken as it is.
    ///
    /// # Errors
    ///
    /// What was not found, with all the places.
    pub fn artifacts(&self, beside: Option<&Path>, debug: bool) -> Result<Artifacts, Vec<Problem>> {
        let find = |key: &str, what: &str, configured: &Option<PathBuf>, name: &str| {
            let (decided_by, looked) = match (configured, &self.image_dir) {
                (Some(path), _) => (Some((key, path)), vec![path.clone()]),
                (None, Some(folder)) => (Some(("image_dir", folder)), vec![folder.join(name)]),
                (None, None) => {
                    let folders = beside.into_iter().chain([Path::new(SHARED)]);
                    (None, folders.map(|folder| folder.join(name)).collect())
                }
            };
            looked.iter().find(|path| path.is_file()).cloned().ok_or_else(|| {
                let places: Vec<_> = looked.iter().map(|path| path.display().to_string()).collect();
                let places = places.join(", ");
                Problem {
                    key: decided_by.map_or(key, |(key, _)| key).to_owned(),
                    value: decided_by.map(|(_, path)| format!("{path:?}")),
                    why: format!(
                        "{what}; looked for {places}: build it (./task build), or set `{key}` or `image_dir` in {PATH}"
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
    fn the_guests_files_are_found_beside_the_shim_or_all_places_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::default();
        let missing = config.artifacts(Some(dir.path()), false).unwrap_err();
        let text = missing[0].to_string();
        let place = dir.path().join("vmlinux");
        assert_eq!(missing.len(), 2);
        assert!(text.starts_with("kernel: kernel path or restore snapshot is required; looked for "), "{text}");
        assert!(text.contains(place.to_str().unwrap()) && text.contains("/usr/share/husk/vmlinux"), "{text}");
        for name in ["vmlinux", "initrd.img"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(config.artifacts(Some(dir.path()), false).unwrap().kernel, place);
    }

    #[test]
    fn debug_mode_has_an_initrd_of_its_own_unless_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["vmlinux", "initrd.img"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let (usual, debug) = (dir.path().join("initrd.img"), dir.path().join("initrd-debug.img"));
        let config = Config::default();
        let text = config.artifacts(Some(dir.path()), true).unwrap_err()[0].to_string();
        let begins =
            format!("initrd: no initrd for debug mode found; looked for {}, /usr/share/husk/", debug.display());
        assert!(text.starts_with(&begins) && text.contains("./task build"), "{text}");
        std::fs::write(&debug, "").unwrap();
        let named = Config { initrd: Some(usual.clone()), ..Config::default() };
        let folder = Config { image_dir: Some(dir.path().to_owned()), ..Config::default() };
        let table =
            [(&config, false, &usual), (&config, true, &debug), (&folder, true, &debug), (&named, true, &usual)];
        for (config, mode, expected) in table {
            assert_eq!(config.artifacts(Some(dir.path()), mode).unwrap().initrd, *expected, "{mode} {config:?}");
        }
    }
}
