//! On which of the host's CPUs a VM's virtual CPUs run. The host's cgroup restricts all of the VM's processes; this
//! restricts the threads that execute guest code, and gives each a CPU of its own if there are as many.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::PathBuf;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::running::Vm;
use crate::vmm::VmmError;

/// The host's CPUs that run.
const ONLINE: &str = "/sys/devices/system/cpu/online";
/// Most CPUs that the kernel of an x86 host can have (`NR_CPUS`).
const MAX_CPUS: usize = 8192;

/// Why virtual CPUs do not run where they should.
#[derive(Debug, thiserror::Error)]
pub enum AffinityError {
    /// The VMM does not say which threads execute guest code.
    #[error("find the threads of the virtual CPUs")]
    Threads(#[source] VmmError),
    /// The host's kernel does not say which CPUs the VM may use.
    #[error("find the CPUs that the VM may use")]
    Allowed(#[source] io::Error),
    /// The host's kernel rejects the CPUs.
    #[error("let virtual CPU {number} run on CPUs {cpus} of the host")]
    Rejected {
        /// The virtual CPU.
        number: usize,
        /// The host's CPUs.
        cpus: String,
        /// The cause.
        source: io::Error,
    },
}

/// CPUs of the host.
pub(crate) type Cpus = BTreeSet<usize>;

/// Parses a list of CPUs in the kernel's form, such as `0-3,8`. `None` for what is none, and for groups such as
/// `0-7:1/2`.
pub(crate) fn parse_list(text: &str) -> Option<Cpus> {
    let mut cpus = Cpus::new();
    for part in text.trim().split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= MAX_CPUS {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// Why CPUs that a spec names are not some of the host's.
pub(crate) fn check_list(text: &str) -> Result<Cpus, String> {
    let cpus = parse_list(text).filter(|cpus| !cpus.is_empty());
    let cpus = cpus.ok_or("is not a list of CPUs, such as 0-3,8")?;
    let online = fs::read_to_string(ONLINE).map_err(|error| format!("read {ONLINE}: {error}"))?;
    let missing = cpus.difference(&parse_list(&online).unwrap_or_default()).next().copied();
    match missing {
        Some(cpu) => Err(format!("the host has no CPU {cpu}: it has {}", online.trim())),
        None => Ok(cpus),
    }
}

/// Where each of `threads` virtual CPUs runs. The guest uses the first `running` of them. If there are as many CPUs, each
/// has one of its own: its caches stay warm, and the guest's scheduler can rely on its view.
fn places(cpus: &Cpus, threads: usize, running: usize) -> Vec<Cpus> {
    let one_each = cpus.len() == running;
    let of = |number| match cpus.iter().nth(number) {
        Some(cpu) if one_each && number < running => Cpus::from([*cpu]),
        _ => cpus.clone(),
    };
    (0..threads).map(of).collect()
}

impl Vm {
    /// Lets the virtual CPUs run on these CPUs of the host, or on all that the VM's cgroup allows. The guest uses the
    /// first `running` virtual CPUs.
    ///
    /// # Errors
    ///
    /// When the VMM does not answer, or the host's kernel rejects the CPUs.
    pub(crate) async fn pin_vcpus(&self, cpus: Option<&Cpus>, running: usize) -> Result<(), AffinityError> {
        let threads = self.machine.vcpu_threads().await.map_err(AffinityError::Threads)?;
        let process = self.machine.process().pid;
        let allowed = allowed(process).map_err(AffinityError::Allowed)?;
        // cgroup v2 accepts CPUs that the host does not have, and ignores them.
        let named = cpus.map(|cpus| cpus & &allowed).filter(|cpus| !cpus.is_empty());
        // A thread that executes several virtual CPUs can run on any of them.
        let shared = threads.iter().collect::<BTreeSet<_>>().len() < threads.len();
        let running = if named.is_none() || shared { 0 } else { running };
        let places = places(&named.unwrap_or(allowed), threads.len(), running);
        for (number, (thread, cpus)) in threads.into_iter().zip(places).enumerate() {
            restrict(process, thread, &cpus).map_err(|source| {
                let cpus = cpus.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
                AffinityError::Rejected { number, cpus, source }
            })?;
        }
        Ok(())
    }
}

/// The CPUs that a process may use: those of its cgroup. Its first thread executes no virtual CPU.
fn allowed(process: u32) -> io::Result<Cpus> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    list.and_then(parse_list).ok_or_else(|| io::Error::other("the process's status names no CPUs"))
}

/// Restricts a thread of the machine's process. The VMM is not trusted to name one of its own.
fn restrict(process: u32, thread: i32, cpus: &Cpus) -> io::Result<()> {
    let folder = PathBuf::from(format!("/proc/{process}/task/{thread}"));
    if !folder.exists() {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("{} does not exist", folder.display())));
    }
    let mut set = CpuSet::new();
    // The set has room for 1024 CPUs.
    cpus.iter().filter(|cpu| **cpu < CpuSet::count()).try_for_each(|cpu| set.set(*cpu))?;
    Ok(sched_setaffinity(Pid::from_raw(thread), &set)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus<const N: usize>(numbers: [usize; N]) -> Cpus {
        Cpus::from(numbers)
    }

    #[test]
    fn lists_are_parsed_as_the_kernel_writes_them() {
        for (text, expected) in [
            ("0-1", Some(cpus([0, 1]))),
            ("3, 0-1,1\n", Some(cpus([0, 1, 3]))),
            ("", Some(cpus([]))),
            ("2-1", None),
            ("0-9999999", None),
            ("0-7:1/2", None),
            ("x", None),
        ] {
            assert_eq!(parse_list(text), expected, "{text}");
        }
    }

    #[test]
    fn cpus_that_the_host_lacks_are_named() {
        assert!(check_list("0").is_ok());
        for (text, expected) in [("8191", "the host has no CPU 8191: it has 0"), ("", "is not a list"), ("a", "is not")]
        {
            let error = check_list(text).unwrap_err();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }

    #[test]
    fn each_virtual_cpu_has_a_cpu_if_there_are_as_many() {
        let both = || cpus([2, 5]);
        for (threads, running, expected) in [
            (2, 2, vec![cpus([2]), cpus([5])]),
            (1, 1, vec![both()]),
            (3, 3, vec![both(), both(), both()]),
            // The third one is not in use.
            (3, 2, vec![cpus([2]), cpus([5]), both()]),
            (2, 0, vec![both(), both()]),
        ] {
            assert_eq!(places(&both(), threads, running), expected, "{threads} {running}");
        }
    }
}
