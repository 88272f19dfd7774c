//! Opens the files that become a sandbox's extras.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use crate::config::extras::{ExtraFile, Extras, field, whole};
use crate::config::problem::Problem;

/// An opened source file.
#[derive(Debug, Clone)]
pub struct OpenedFile {
    pub(super) entry: ExtraFile,
    pub(super) file: Arc<File>,
    pub(super) size: u64,
}

/// Opens the source files of `extras`, which may have `max_mib` MiB together. The guest gets the opened files, even if
/// other files take over their paths.
///
/// # Errors
///
/// Every file that cannot be opened or is not a regular file, and a total size above the limit.
pub fn open(extras: &Extras, max_mib: u64) -> Result<Vec<OpenedFile>, Vec<Problem>> {
    let (mut sources, mut problems) = (Vec::new(), Vec::new());
    for entry in &extras.files {
        match open_file(&entry.source) {
            Ok((file, size)) => sources.push(OpenedFile { entry: entry.clone(), file: Arc::new(file), size }),
            Err(error) => problems.push(Problem {
                key: field(&entry.destination, "source"),
                value: Some(format!("{:?}", entry.source)),
                why: error.to_string(),
            }),
        }
    }
    let total = sources.iter().fold(0_u64, |total, source| total.saturating_add(source.size));
    if total > max_mib.saturating_mul(1 << 20) {
        problems.push(Problem {
            key: whole(),
            value: Some(format!("{total} bytes")),
            why: format!("more than extras_max_mib = {max_mib} in husk's configuration allows"),
        });
    }
    if problems.is_empty() { Ok(sources) } else { Err(problems) }
}

fn open_file(path: &Path) -> io::Result<(File, u64)> {
    // O_NONBLOCK: opening a fifo does not block.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok((file, metadata.len()))
}
