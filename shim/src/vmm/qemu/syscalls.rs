//! The system calls that QEMU may use.
//!
//! The list has what QEMU 7.2 uses in husk's tests, on both boards, under TCG and KVM (from strace), and a reserve for
//! other versions of QEMU, glibc and the kernel: variants of the calls in use, asynchronous I/O of disks, and NUMA
//! policies. Calls that reach other processes, change namespaces or mounts, load code into the kernel, or create files
//! are not in it. QEMU's own `-sandbox` option adds a list of forbidden calls after QEMU's start. `SECURITY.md` describes the
//! reserve, and how to find the calls that a QEMU misses.
//!
//! Calls with a path remain, because QEMU opens its libraries and firmware after the filter is in force. They find
//! nothing once QEMU has lost the host's files. `execve` starts QEMU itself.

use libc::c_long;

use crate::host::jail::filter::{Filter, Permission, When};

/// Missing in the crate `libc` (asm/unistd_64.h).
const IO_PGETEVENTS: c_long = 333;

/// Memory, threads, signals and time.
const PROCESS: &[c_long] = &[
    libc::SYS_arch_prctl,
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_execve,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_get_mempolicy,
    libc::SYS_get_robust_list,
    libc::SYS_getcpu,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getitimer,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getpriority,
    libc::SYS_getrandom,
    libc::SYS_getresgid,
    libc::SYS_getresuid,
    libc::SYS_getrlimit,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_madvise,
    libc::SYS_mbind,
    libc::SYS_membarrier,
    libc::SYS_memfd_create,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_mlockall,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_msync,
    libc::SYS_munlock,
    libc::SYS_munlockall,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_prlimit64,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_get_priority_max,
    libc::SYS_sched_get_priority_min,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_yield,
    libc::SYS_seccomp,
    libc::SYS_set_mempolicy,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_setitimer,
    libc::SYS_setrlimit,
    libc::SYS_sigaltstack,
    libc::SYS_sysinfo,
    libc::SYS_tgkill,
    libc::SYS_time,
    libc::SYS_timer_create,
    libc::SYS_timer_delete,
    libc::SYS_timer_getoverrun,
    libc::SYS_timer_gettime,
    libc::SYS_timer_settime,
    libc::SYS_times,
    libc::SYS_uname,
];

/// Descriptors, among them the sockets and devices that QEMU inherits or receives.
const DESCRIPTORS: &[c_long] = &[
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_epoll_create,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd,
    libc::SYS_eventfd2,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_io_cancel,
    libc::SYS_io_destroy,
    libc::SYS_io_getevents,
    IO_PGETEVENTS,
    libc::SYS_io_setup,
    libc::SYS_io_submit,
    libc::SYS_ioctl,
    libc::SYS_lseek,
    libc::SYS_pipe,
    libc::SYS_pipe2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pselect6,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_select,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_signalfd,
    libc::SYS_signalfd4,
    libc::SYS_sync_file_range,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Files that exist.
const FILES: &[c_long] = &[
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fchdir,
    libc::SYS_getcwd,
    libc::SYS_getdents,
    libc::SYS_getdents64,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_stat,
    libc::SYS_statfs,
    libc::SYS_statx,
];

/// Connections of user mode.
const CONNECTIONS: &[c_long] =
    &[libc::SYS_accept, libc::SYS_accept4, libc::SYS_bind, libc::SYS_connect, libc::SYS_listen];

const fn argument(index: u32, mask: u32, values: &'static [u32]) -> When {
    When::Argument { index, mask, values }
}

const THREAD: u32 = libc::CLONE_THREAD as u32;
const INTERNET: &[u32] = &[libc::AF_INET as u32, libc::AF_INET6 as u32];
const PRCTL: &[u32] = &[
    libc::PR_CAPBSET_READ as u32,
    libc::PR_GET_DUMPABLE as u32,
    libc::PR_GET_NAME as u32,
    libc::PR_GET_NO_NEW_PRIVS as u32,
    libc::PR_GET_SECCOMP as u32,
    libc::PR_MCE_KILL as u32,
    libc::PR_SET_NAME as u32,
    libc::PR_SET_NO_NEW_PRIVS as u32,
    libc::PR_SET_SECCOMP as u32,
    libc::PR_SET_THP_DISABLE as u32,
    libc::PR_SET_TIMERSLACK as u32,
    libc::PR_SET_VMA as u32,
];

/// The filter of a machine. `user_network`: QEMU connects the guest to the host's network by itself.
pub(super) fn filter(user_network: bool) -> Filter {
    let always = [PROCESS, DESCRIPTORS, FILES].concat().into_iter().map(|number| (number, When::Always));
    let conditional: [Permission; 3] = [
        // Threads and no processes. For clone3, whose flags are in memory, the C library then uses clone.
        (libc::SYS_clone, argument(0, THREAD, &[THREAD])),
        (libc::SYS_prctl, argument(0, u32::MAX, PRCTL)),
        // vhost-user back ends get one end of a pair.
        (libc::SYS_socketpair, argument(0, u32::MAX, &[libc::AF_UNIX as u32])),
    ];
    let connections = CONNECTIONS.iter().map(|number| (*number, When::Always));
    let internet = [(libc::SYS_socket, argument(0, u32::MAX, INTERNET))];
    let network = connections.chain(internet).filter(|_| user_network);
    Filter::new(always.chain(conditional).chain(network))
}

#[cfg(test)]
mod tests {
    use libc::c_int;

    use super::*;
    use crate::host::jail::filter::tests::errors;

    /// Calls with which a process that is taken over would go on: to other processes, to the kernel, to the network.
    const ATTACKS: &[c_long] = &[
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_bpf,
        libc::SYS_io_uring_setup,
        libc::SYS_userfaultfd,
        libc::SYS_perf_event_open,
        libc::SYS_keyctl,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_clone3,
        libc::SYS_clone,
        libc::SYS_execveat,
        libc::SYS_kill,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_mount,
        libc::SYS_open_tree,
        libc::SYS_chroot,
        libc::SYS_pivot_root,
        libc::SYS_setuid,
        libc::SYS_mknod,
        libc::SYS_unlink,
        libc::SYS_open_by_handle_at,
        libc::SYS_pidfd_getfd,
        libc::SYS_init_module,
        libc::SYS_kexec_load,
    ];
    const NETWORK: [c_long; 3] = [libc::SYS_socket, libc::SYS_connect, libc::SYS_bind];

    fn refused(user_network: bool, calls: &[(c_long, [c_long; 3])]) -> Vec<bool> {
        errors(filter(user_network), calls.to_vec()).into_iter().map(|error| error == libc::ENOSYS).collect()
    }

    #[test]
    fn a_machine_can_neither_reach_other_processes_nor_the_network_nor_change_the_host() {
        let calls: Vec<_> = ATTACKS.iter().chain(&NETWORK).map(|number| (*number, [0, 0, 0])).collect();
        for ((number, _), refused) in calls.iter().zip(refused(false, &calls)) {
            assert!(refused, "call {number}");
        }
    }

    #[test]
    fn a_machine_in_user_mode_has_internet_sockets_and_no_others() {
        let socket = |family: c_int, kind: c_int| (libc::SYS_socket, [family.into(), kind.into(), 0]);
        let calls = [
            socket(libc::AF_INET, libc::SOCK_STREAM),
            socket(libc::AF_INET6, libc::SOCK_DGRAM),
            socket(libc::AF_UNIX, libc::SOCK_STREAM),
            socket(libc::AF_NETLINK, libc::SOCK_RAW),
            socket(libc::AF_PACKET, libc::SOCK_RAW),
            socket(libc::AF_VSOCK, libc::SOCK_STREAM),
        ];
        assert_eq!(refused(true, &calls), [false, false, true, true, true, true]);
    }

    #[test]
    fn a_machine_cannot_escape_the_end_of_the_shim() {
        let calls = [
            (libc::SYS_prctl, [libc::PR_SET_PDEATHSIG.into(), 0, 0]),
            (libc::SYS_prctl, [libc::PR_GET_DUMPABLE.into(), 0, 0]),
        ];
        assert_eq!(refused(false, &calls), [true, false]);
    }
}
