//! Where the things under test are, and what to say when one is missing.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The shim that a test runs against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// husk: every container in a VM.
    Husk,
    /// containerd's own runc shim: shows that a test expects what containerd's users are used to.
    Runc,
}

impl Runtime {
    /// `HUSK_TEST_RUNTIME`: `husk` (also when unset) or `runc`.
    pub fn under_test() -> Self {
        match env::var("HUSK_TEST_RUNTIME").as_deref() {
            Err(_) | Ok("" | "husk") => Self::Husk,
            Ok("runc") => Self::Runc,
            Ok(other) => panic!("HUSK_TEST_RUNTIME={other}: want husk or runc"),
        }
    }

    /// Says on the terminal why a test about VMs does nothing under runc.
    pub fn is_husk_or_tell(self, test: &str) -> bool {
        if self == Self::Runc {
            eprintln!("{test}: about husk alone, nothing to do with runc");
        }
        self == Self::Husk
    }

    /// What `ctr run --runtime` wants.
    pub fn name(self) -> &'static str {
        match self {
            Self::Husk => "io.containerd.husk.v1",
            Self::Runc => "io.containerd.runc.v2",
        }
    }

    /// File name of the shim's binary.
    pub fn shim(self) -> &'static str {
        match self {
            Self::Husk => "containerd-shim-husk-v1",
            Self::Runc => "containerd-shim-runc-v2",
        }
    }
}

/// A release line of containerd that husk works with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Debian 12's.
    V1_6,
    /// Debian 13's.
    V1_7,
    /// The present one.
    V2_1,
}

impl Version {
    /// Folder name under `.cache/containerd`, and how the version begins.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6",
            Self::V1_7 => "1.7",
            Self::V2_1 => "2.1",
        }
    }

    /// `HUSK_TEST_CONTAINERD`, or the one that most tests run with.
    pub fn default_for_tests() -> Self {
        match env::var("HUSK_TEST_CONTAINERD").as_deref() {
            Err(_) | Ok("" | "2.1") => Self::V2_1,
            Ok("1.7") => Self::V1_7,
            Ok("1.6") => Self::V1_6,
            Ok(other) => panic!("HUSK_TEST_CONTAINERD={other}: want 1.6, 1.7 or 2.1"),
        }
    }

    /// Folder with `containerd`, `ctr` and `containerd-shim-runc-v2` of this version.
    pub fn bin(self) -> Result<PathBuf> {
        let unpacked = repository().join(".cache/containerd").join(self.name());
        let candidates = [unpacked.clone(), unpacked.join("bin"), unpacked.join("usr/bin")];
        match candidates.into_iter().find(|folder| folder.join("containerd").is_file()) {
            Some(folder) => Ok(folder),
            None => {
                bail!("containerd {} is not in {}: run `./task build` first", self.name(), unpacked.display())
            }
        }
    }
}

/// The top of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the repository")
}

/// A file that the build leaves in `out/`.
pub fn built(name: &str) -> Result<PathBuf> {
    let path = repository().join("out").join(name);
    path.metadata().with_context(|| format!("{} is missing: run `./task build` first", path.display()))?;
    Ok(path)
}

/// Each scenario, a function of a [`Version`] in the test file, as one test per containerd.
#[macro_export]
macro_rules! on_every_containerd {
    ($($scenario:ident),* $(,)?) => {
        $crate::on_every_containerd!(@ containerd_1_6 V1_6 $($scenario),*);
        $crate::on_every_containerd!(@ containerd_1_7 V1_7 $($scenario),*);
        $crate::on_every_containerd!(@ containerd_2_1 V2_1 $($scenario),*);
    };
    (@ $module:ident $version:ident $($scenario:ident),*) => {
        mod $module {
            $(#[test]
            fn $scenario() -> ::anyhow::Result<()> {
                super::$scenario($crate::artifacts::Version::$version)
            })*
        }
    };
}
