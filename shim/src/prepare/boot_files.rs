//! The digests of the guest's kernel and initramfs, for `husk check-config`. A boot verifies them by itself, on the very
//! bytes that it uses.

use std::fs::File;
use std::path::PathBuf;

use crate::config::artifacts::Artifacts;
use crate::config::problem::Problem;
use crate::config::settings::Config;
use crate::host::digest::{self, Sha256Digest};

/// A file that VMs boot from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootFile {
    /// The configuration key with the digest that the file must have.
    pub key: &'static str,
    /// Where the file is.
    pub path: PathBuf,
    /// Its digest now.
    pub sha256: Sha256Digest,
    /// Whether the configuration has the key.
    pub verified: bool,
}

/// Computes the digests.
///
/// # Errors
/// The files that cannot be read, and those that are not what the configuration says.
pub(super) fn examine(config: &Config, artifacts: &Artifacts) -> Result<Vec<BootFile>, Vec<Problem>> {
    let files = [
        ("kernel_sha256", &artifacts.kernel, config.kernel_sha256),
        ("initrd_sha256", &artifacts.initrd, config.initrd_sha256),
    ];
    let (mut examined, mut problems) = (Vec::new(), Vec::new());
    for (key, path, expected) in files {
        let value = expected.map(|expected| format!("\"{expected}\""));
        let problem = |why| Problem { key: key.to_owned(), value, why };
        match File::open(path).and_then(|file| digest::of(&file)) {
            Ok(sha256) if expected.is_none_or(|expected| expected == sha256) => {
                examined.push(BootFile { key, path: path.clone(), sha256, verified: expected.is_some() });
            }
            Ok(found) => problems.push(problem(format!("{} has the SHA-256 digest {found}", path.display()))),
            Err(error) => problems.push(problem(format!("read {}: {error}", path.display()))),
        }
    }
    if problems.is_empty() { Ok(examined) } else { Err(problems) }
}
