//! virtiofsd's limit of open files. virtiofsd has a file open for each file that the guest has open, and one for each
//! inode that the guest's kernel caches. At the limit, the guest's lookups fail with ENFILE.

use crate::host::open_files;
use crate::host::process::ProcessId;
use crate::state::status::FilesStatus;

/// How many files virtiofsd 1.14 keeps for itself: one for each region of the guest's memory that there could be, and a
/// hundred more.
const RESERVED: u64 = 610;

/// virtiofsd's limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OpenFiles {
    /// The limit.
    pub(crate) limit: u64,
    /// The configured one, which the host may not allow.
    pub(crate) configured: u64,
}

impl OpenFiles {
    /// How many inodes the guest may cache. The other half is for files that are open in the guest, and for inodes that
    /// virtiofsd is yet to forget.
    pub(crate) fn cached_inodes(self) -> u64 {
        self.limit.saturating_sub(RESERVED) / 2
    }

    /// Warns if the limit is lower than the configured one.
    pub(super) fn warn_if_low(self) {
        let Self { limit, configured } = self;
        if limit < configured {
            tracing::warn!(
                limit,
                configured,
                "the host's limit of open files is lower than virtiofsd_open_files, so the VM caches fewer files and can \
                 have fewer open: raise LimitNOFILE of containerd's service, and fs.nr_open"
            );
        }
    }

    /// The limit, and how many files virtiofsd's processes have open.
    pub(super) fn status(self, workers: &[ProcessId]) -> FilesStatus {
        let counts = workers.iter().map(|worker| open_files::count(*worker).ok());
        FilesStatus { open: counts.sum(), limit: self.limit, configured: self.configured, problem: None }
    }
}
