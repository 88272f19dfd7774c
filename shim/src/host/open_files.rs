//! How many files a process may have open, and how many it has.

use std::fs;
use std::io;

use nix::sys::resource::{Resource, getrlimit};
use procfs::process::Process;

use crate::host::process::ProcessId;

/// Bit of CAP_SYS_RESOURCE, which raises hard limits (capability.h).
const CAP_SYS_RESOURCE: u64 = 1 << 24;
/// `/proc/self/uid_map` of the first user namespace. The kernel ignores CAP_SYS_RESOURCE of others.
const FIRST_NAMESPACE: [&str; 3] = ["0", "0", "4294967295"];

/// Up to what this process can set a child's limit of open files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileLimits {
    /// The own hard limit.
    pub hard: u64,
    /// The host's limit of limits (fs.nr_open).
    pub max: u64,
    /// The hard limit can be raised.
    pub raisable: bool,
}

impl FileLimits {
    /// Those of this process. What cannot be read is taken for the stricter case.
    pub(crate) fn of_process() -> Self {
        let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
        let max = fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|text| text.trim().parse().ok());
        let status = Process::myself().and_then(|own| own.status());
        let capable = status.is_ok_and(|status| status.capeff & CAP_SYS_RESOURCE != 0);
        let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        let first = map.split_whitespace().eq(FIRST_NAMESPACE);
        Self { hard, max: max.unwrap_or(hard), raisable: capable && first }
    }

    /// The limit that a child can have that wants this one.
    pub(crate) fn grant(&self, wanted: u64) -> u64 {
        wanted.min(self.max).min(if self.raisable { u64::MAX } else { self.hard })
    }
}

/// How many files a process has open.
///
/// # Errors
/// When the process is gone, or `/proc` cannot be read.
pub(crate) fn count(process: ProcessId) -> io::Result<u64> {
    let path = format!("/proc/{}/fd", process.pid);
    // Linux 6.2 and newer report the number as the folder's size, without a list of all of them.
    let count = match fs::metadata(&path)?.len() {
        0 => fs::read_dir(&path)?.count() as u64,
        count => count,
    };
    // Check after counting: the PID may belong to a later process.
    if process.exists()? { Ok(count) } else { Err(io::ErrorKind::NotFound.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_raised_only_as_far_as_the_host_allows() {
        let table = [
            (1024, 1_000_000, true, 131_072, 131_072),
            (1024, 1_000_000, false, 131_072, 1024),
            (524_288, 1_000_000, false, 131_072, 131_072),
            (1024, 65_536, true, 131_072, 65_536),
            (1_000_000, 65_536, false, 131_072, 65_536),
        ];
        for (hard, max, raisable, wanted, granted) in table {
            assert_eq!(FileLimits { hard, max, raisable }.grant(wanted), granted, "{hard} {max} {raisable} {wanted}");
        }
    }

    #[test]
    fn an_open_file_is_counted() {
        let own = ProcessId::own().unwrap();
        assert!(FileLimits::of_process().hard > 0);
        let files: Vec<fs::File> = (0..64).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        // Other tests of this process open and close files too.
        assert!(count(own).unwrap() >= files.len() as u64);
        let gone = ProcessId { start_time: own.start_time + 1, ..own };
        assert!(count(gone).is_err());
    }
}
