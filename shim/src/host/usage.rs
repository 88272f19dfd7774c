//! What processes of the host use: CPU time and memory.

use procfs::process::Process;
use procfs::{ProcError, ProcResult};

use super::process::ProcessId;

/// The use of some processes together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// CPU time in user mode and in the kernel, microseconds.
    pub(crate) user_usec: u64,
    pub(crate) system_usec: u64,
    /// Memory, bytes. Pages that several processes share count once (PSS, proc_pid_smaps(5)).
    pub(crate) memory: u64,
}

/// Measures processes. One that has exited uses nothing. Blocks: the kernel walks the page tables of each.
///
/// # Errors
/// A process cannot be examined.
pub(crate) fn of(processes: &[ProcessId]) -> ProcResult<Usage> {
    let mut sum = Usage::default();
    for process in processes {
        match of_one(process) {
            Ok(usage) => {
                sum.user_usec += usage.user_usec;
                sum.system_usec += usage.system_usec;
                sum.memory += usage.memory;
            }
            Err(ProcError::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sum)
}

/// The shared memory that a process has mapped and used, bytes. That of a VMM is its guest's.
///
/// # Errors
/// The process has exited, or cannot be examined.
pub(crate) fn shared_memory(process: ProcessId) -> ProcResult<u64> {
    let status = Process::new(process.pid.cast_signed())?.status()?;
    let kib = status.rssshmem.unwrap_or(0).saturating_add(status.hugetlbpages.unwrap_or(0));
    Ok(kib.saturating_mul(1024))
}

fn of_one(process: &ProcessId) -> ProcResult<Usage> {
    let process = Process::new(process.pid.cast_signed())?;
    let stat = process.stat()?;
    let usec = |ticks: u64| ticks.saturating_mul(1_000_000) / procfs::ticks_per_second();
    let maps = process.smaps_rollup()?;
    // Bytes: procfs converts the kernel's kB.
    let pss = maps.memory_map_rollup.iter().filter_map(|map| map.extension.map.get("Pss")).sum();
    Ok(Usage { user_usec: usec(stat.utime), system_usec: usec(stat.stime), memory: pss })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_uses_memory_and_one_that_is_gone_uses_nothing() {
        let own = ProcessId::own().unwrap();
        let usage = of(&[own]).unwrap();
        assert!(usage.memory > 1 << 20 && usage.memory < 4 << 30, "{usage:?}");
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let gone = ProcessId { pid: child.id(), ..own };
        child.wait().unwrap();
        assert_eq!(of(&[gone]).unwrap(), Usage::default());
    }
}
