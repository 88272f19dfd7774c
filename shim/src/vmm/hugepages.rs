//! Guest memory on the host's huge pages of the default size. The kernel reserves the pages for whoever maps them first
//! (Documentation/admin-guide/mm/hugetlbpage.rst).

use procfs::{Current, Meminfo, ProcError};

/// Why a guest gets no huge pages.
#[derive(Debug, thiserror::Error)]
pub enum HugePagesError {
    /// The number of free pages is unknown.
    #[error("hugepages = true: read /proc/meminfo")]
    Read(#[source] ProcError),
    /// The host's kernel is built without huge pages.
    #[error("hugepages = true: the host's kernel has no huge pages (/proc/meminfo has no {0})")]
    Unsupported(&'static str),
    /// Too few pages are free.
    #[error(
        "hugepages = true: a guest of {memory_mib} MiB takes {needed} huge pages of {page_kib} KiB, and the host has {free} \
         free: give it more (sysctl vm.nr_hugepages), or set hugepages = false in husk's configuration"
    )]
    TooFew {
        /// The guest's memory.
        memory_mib: u64,
        /// Pages for that memory.
        needed: u64,
        /// Size of a page.
        page_kib: u64,
        /// Free pages that no mapping has reserved.
        free: u64,
    },
}

/// The host's huge pages.
#[derive(Debug, Clone, Copy)]
struct Pool {
    page_kib: u64,
    /// Free pages that no mapping has reserved.
    free: u64,
}

/// Rounds `memory_mib` up to whole huge pages, if enough of them are free.
///
/// # Errors
///
/// When the host has no huge pages, or too few. Another VM may still take them before this one maps them; then the VMM
/// fails.
pub(crate) fn fit_host(memory_mib: u64) -> Result<u64, HugePagesError> {
    let meminfo = Meminfo::current().map_err(HugePagesError::Read)?;
    fit(memory_mib, pool(meminfo.hugepagesize, meminfo.hugepages_free, meminfo.hugepages_rsvd)?)
}

/// From the fields of `/proc/meminfo`: the size of a page in bytes, free pages, and those of them that are reserved by
/// mappings that have not touched them yet.
fn pool(page_bytes: Option<u64>, free: Option<u64>, reserved: Option<u64>) -> Result<Pool, HugePagesError> {
    let field = |name, value: Option<u64>| value.ok_or(HugePagesError::Unsupported(name));
    let page_kib = field("Hugepagesize", page_bytes)? / 1024;
    let free = field("HugePages_Free", free)?.saturating_sub(field("HugePages_Rsvd", reserved)?);
    Ok(Pool { page_kib: page_kib.max(1), free })
}

fn fit(memory_mib: u64, Pool { page_kib, free }: Pool) -> Result<u64, HugePagesError> {
    let needed = memory_mib.saturating_mul(1024).div_ceil(page_kib);
    if needed > free {
        return Err(HugePagesError::TooFew { memory_mib, needed, page_kib, free });
    }
    Ok(needed.saturating_mul(page_kib) / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pages_size_is_read_in_the_right_unit() {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let size = text.lines().find_map(|line| line.strip_prefix("Hugepagesize:")?.strip_suffix(" kB"));
        let meminfo = Meminfo::current().unwrap();
        let pool = pool(meminfo.hugepagesize, meminfo.hugepages_free, meminfo.hugepages_rsvd).ok();
        assert_eq!(pool.map(|pool| pool.page_kib), size.map(|kib| kib.trim().parse().unwrap()));
    }

    #[test]
    fn a_guest_gets_whole_free_pages_or_an_error_with_their_number() {
        let host = |free, reserved, kib: u64| (Some(kib * 1024), Some(free), Some(reserved));
        let too_few = |part: &str| Err(format!("takes {part} free: give it more"));
        let table = [
            (512, host(256, 0, 2048), Ok(512)),
            (511, host(256, 0, 2048), Ok(512)),
            (513, host(256, 0, 2048), too_few("257 huge pages of 2048 KiB, and the host has 256")),
            (512, host(256, 1, 2048), too_few("256 huge pages of 2048 KiB, and the host has 255")),
            (512, host(0, 0, 2048), too_few("256 huge pages of 2048 KiB, and the host has 0")),
            (512, host(1, 0, 1 << 20), Ok(1024)),
            (u64::MAX, host(1, 0, 2048), too_few("9007199254740992 huge pages of 2048 KiB, and the host has 1")),
            (512, (None, None, None), Err("the host's kernel has no huge pages".to_owned())),
        ];
        for (memory_mib, (page, free, reserved), expected) in table {
            match (pool(page, free, reserved).and_then(|pool| fit(memory_mib, pool)), expected) {
                (Ok(fits), Ok(expected)) => assert_eq!(fits, expected, "{memory_mib} {page:?} {free:?}"),
                (Err(error), Err(part)) => assert!(error.to_string().contains(&part), "{error}"),
                (fits, expected) => panic!("{memory_mib} {page:?} {free:?}: {fits:?}, expected {expected:?}"),
            }
        }
    }
}
