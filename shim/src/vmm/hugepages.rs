//! A guest's memory out of the host's huge pages: how much of it there can be. The pages are the host's default kind, and the kernel keeps them aside
//! for whoever maps them first (Documentation/admin-guide/mm/hugetlbpage.rst).

use crate::config::names::PATH;

/// Where the kernel tells how many there are.
const MEMINFO: &str = "/proc/meminfo";

/// Why a guest cannot have them.
#[derive(Debug, thiserror::Error)]
pub enum HugePagesError {
    /// Nobody knows how many there are.
    #[error("hugepages = true: read {MEMINFO}: {0}")]
    Read(std::io::Error),
    /// The host's kernel has none to give.
    #[error("hugepages = true: the host's kernel has no huge pages ({MEMINFO} has no {0})")]
    Unsupported(&'static str),
    /// There are too few.
    #[error(
        "hugepages = true: a guest of {memory_mib} MiB takes {wanted} huge pages of {page_kib} KiB, and the host has {free} free: give it more \
         (sysctl vm.nr_hugepages), or set hugepages = false in {}",
        PATH
    )]
    TooFew {
        /// The guest's memory.
        memory_mib: u64,
        /// Pages that it takes.
        wanted: u64,
        /// Size of one.
        page_kib: u64,
        /// Pages that nobody has, nor was promised.
        free: u64,
    },
}

/// The memory, MiB, of a guest that shall have `memory_mib`: whole huge pages of this host, as far as they are free.
///
/// # Errors
///
/// When there are none, or too few. Another VM may still take them before this one does; then it is QEMU that says so.
pub fn fit_host(memory_mib: u64) -> Result<u64, HugePagesError> {
    fit(memory_mib, &std::fs::read_to_string(MEMINFO).map_err(HugePagesError::Read)?)
}

fn fit(memory_mib: u64, meminfo: &str) -> Result<u64, HugePagesError> {
    let field = |name: &'static str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        number.ok_or(HugePagesError::Unsupported(name))
    };
    let page_kib = field("Hugepagesize")?;
    // Promised to a mapping that has not touched them yet.
    let free = field("HugePages_Free")?.saturating_sub(field("HugePages_Rsvd")?);
    let wanted = memory_mib.saturating_mul(1024).div_ceil(page_kib.max(1));
    if wanted > free {
        return Err(HugePagesError::TooFew { memory_mib, wanted, page_kib, free });
    }
    Ok(wanted.saturating_mul(page_kib) / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_has_whole_pages_that_are_free_or_is_told_how_many_are() {
        let host = |free: u64, reserved: u64, kib: u64| {
            format!(
                "MemTotal: 8 kB\nHugePages_Free:   {free}\nHugePages_Rsvd:   {reserved}\nHugepagesize:   {kib} kB\n"
            )
        };
        let too_few = |wanted: &str| Err(format!("takes {wanted} free: give it more"));
        let table = [
            (512, host(256, 0, 2048), Ok(512)),
            (511, host(256, 0, 2048), Ok(512)),
            (513, host(256, 0, 2048), too_few("257 huge pages of 2048 KiB, and the host has 256")),
            (512, host(256, 1, 2048), too_few("256 huge pages of 2048 KiB, and the host has 255")),
            (512, host(0, 0, 2048), too_few("256 huge pages of 2048 KiB, and the host has 0")),
            (512, host(1, 0, 1 << 20), Ok(1024)),
            (u64::MAX, host(1, 0, 2048), too_few("9007199254740992 huge pages of 2048 KiB, and the host has 1")),
            (512, "MemTotal: 8 kB\n".to_owned(), Err("the host's kernel has no huge pages".to_owned())),
        ];
        for (memory_mib, meminfo, expected) in table {
            match (fit(memory_mib, &meminfo), expected) {
                (Ok(fits), Ok(expected)) => assert_eq!(fits, expected, "{memory_mib} {meminfo}"),
                (Err(error), Err(part)) => assert!(error.to_string().contains(&part), "{error}"),
                (fits, expected) => panic!("{memory_mib} {meminfo}: {fits:?}, not {expected:?}"),
            }
        }
    }
}
