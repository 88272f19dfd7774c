//! Locations of the artifacts under test, and errors that say how to build a missing one.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The shim that a test runs against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// husk: every container in a VM.
    Husk,
    /// containerd's own runc shim. A test that passes with runc expects what containerd users are used to.
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

    /// Whether the runtime is husk. Otherwise prints that the test is skipped: a test about VMs has no meaning for
    /// runc.
    pub fn is_husk_or_report_skip(self) -> bool {
        if self == Self::Runc {
            eprintln!("{}: skipped what applies to husk only", current_test());
        }
        self == Self::Husk
    }

    /// The value of `ctr run --runtime`.
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
    /// The version in Debian 12.
    V1_6,
    /// The version in Debian 13.
    V1_7,
    /// The first version in Debian with containerd's Sandbox API.
    V2_1,
    /// The newest version, built from its Go module. Starts shims with the bootstrap protocol, and has a mount manager.
    V2_4,
}

impl Version {
    /// All versions, the oldest first.
    pub const ALL: [Self; 4] = [Self::V1_6, Self::V1_7, Self::V2_1, Self::V2_4];

    /// Directory name under `.cache/containerd`, and prefix of the version.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6",
            Self::V1_7 => "1.7",
            Self::V2_1 => "2.1",
            Self::V2_4 => "2.4",
        }
    }

    /// `HUSK_TEST_CONTAINERD`, or the default for most tests.
    pub fn default_for_tests() -> Self {
        match env::var("HUSK_TEST_CONTAINERD").as_deref() {
            Err(_) | Ok("" | "2.1") => Self::V2_1,
            Ok("1.7") => Self::V1_7,
            Ok("1.6") => Self::V1_6,
            Ok("2.4") => Self::V2_4,
            Ok(other) => panic!("HUSK_TEST_CONTAINERD={other}: want 1.6, 1.7, 2.1 or 2.4"),
        }
    }

    /// Directory with `containerd`, `ctr` and `containerd-shim-runc-v2` of this version.
    pub fn bin(self) -> Result<PathBuf> {
        let unpacked = repository().join(".cache/containerd").join(self.name());
        let candidates = [unpacked.clone(), unpacked.join("bin"), unpacked.join("usr/bin")];
        match candidates.into_iter().find(|folder| folder.join("containerd").is_file()) {
            Some(folder) => Ok(folder),
            None => {
                bail!("containerd {} is not in {}: run `./task test-tools` first", self.name(), unpacked.display())
            }
        }
    }
}

/// The repository's root.
pub fn repository() -> &'static Path {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.parent().unwrap_or(crate_dir)
}

/// Name of the running test: the test harness names its threads after the tests.
pub fn current_test() -> String {
    std::thread::current().name().unwrap_or("a test").to_owned()
}

/// Returns from a test that has checked what also holds for runc, unless husk is the runtime under test. Prints that the
/// rest is skipped. A test of which nothing holds for runc has the attribute `cfg_attr(runc, ignore)` instead.
#[macro_export]
macro_rules! husk_only {
    () => {
        if !$crate::artifacts::Runtime::under_test().is_husk_or_report_skip() {
            return Ok(());
        }
    };
}

/// A file that the build writes to `out/`.
pub fn built(name: &str) -> Result<PathBuf> {
    let path = repository().join("out").join(name);
    path.metadata().with_context(|| format!("{} is missing: run `./task build` first", path.display()))?;
    Ok(path)
}

/// Turns each scenario, a function of a [`Version`] in the test file, into one test per containerd version, with the
/// scenario's attributes.
#[macro_export]
macro_rules! on_every_containerd {
    ($($(#[$attribute:meta])* $scenario:ident),* $(,)?) => {
        $crate::on_every_containerd!(@ containerd_1_6 V1_6 $($(#[$attribute])* $scenario),*);
        $crate::on_every_containerd!(@ containerd_1_7 V1_7 $($(#[$attribute])* $scenario),*);
        $crate::on_every_containerd!(@ containerd_2_1 V2_1 $($(#[$attribute])* $scenario),*);
        $crate::on_every_containerd!(@ containerd_2_4 V2_4 $($(#[$attribute])* $scenario),*);
    };
    (@ $module:ident $version:ident $($(#[$attribute:meta])* $scenario:ident),*) => {
        mod $module {
            $(#[test]
            $(#[$attribute])*
            fn $scenario() -> ::anyhow::Result<()> {
                super::$scenario($crate::artifacts::Version::$version)
            })*
        }
    };
}
