//! A list of permitted system calls, as a program for the kernel (seccomp(2)). All others fail with ENOSYS, as on a kernel
//! that lacks them: programs then do without, or use an older call.
//!
//! libseccomp would be a C library more for the shim to depend on.

use std::io;

use nix::errno::Errno;

/// Offsets in `struct seccomp_data` (linux/seccomp.h).
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;
/// AUDIT_ARCH_X86_64 (linux/audit.h): EM_X86_64, 64 bits, little endian.
const ARCH_X86_64: u32 = 62 | 0x8000_0000 | 0x4000_0000;

/// The result of a call that is not permitted.
const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

/// When a system call is permitted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum When {
    /// Always.
    Always,
    /// If these bits of an argument have one of these values. The kernel ignores the argument's upper half, or the bits
    /// are in its lower one.
    Argument {
        /// The argument's index.
        index: u32,
        /// The bits.
        mask: u32,
        /// Their values.
        values: &'static [u32],
    },
}

/// A permitted system call, by its number.
pub(crate) type Permission = (libc::c_long, When);

/// The program. (`sock_filter` has no `Debug` in the crate `libc` without a feature.)
pub(crate) struct Filter(Vec<libc::sock_filter>);

impl std::fmt::Debug for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Filter({} instructions)", self.0.len())
    }
}

impl Filter {
    /// Permits these calls and no others.
    pub(crate) fn new(permitted: impl IntoIterator<Item = Permission>) -> Self {
        let mut code = vec![load(ARCH), jump_if(ARCH_X86_64, 1, 0), end(libc::SECCOMP_RET_KILL_PROCESS), load(NUMBER)];
        for (number, when) in permitted {
            let body = match when {
                When::Always => vec![end(libc::SECCOMP_RET_ALLOW)],
                When::Argument { index, mask, values } => {
                    let mut body = vec![load(ARGUMENTS + 8 * index), and(mask)];
                    for value in values {
                        body.extend([jump_if(*value, 0, 1), end(libc::SECCOMP_RET_ALLOW)]);
                    }
                    body.push(end(REFUSE));
                    body
                }
            };
            // A body has some dozen instructions at most, and its length fits a jump.
            code.push(jump_if(number as u32, 0, body.len() as u8));
            code.extend(body);
        }
        code.push(end(REFUSE));
        Self(code)
    }

    /// Applies it to the calling thread for good. Requires no_new_privs, or CAP_SYS_ADMIN.
    pub(super) fn install(&self) -> io::Result<()> {
        let program = libc::sock_fprog { len: self.0.len() as u16, filter: self.0.as_ptr().cast_mut() };
        // SAFETY: the kernel reads the structure and as many instructions as it names, all of which outlive the call.
        let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
        Ok(Errno::result(result).map(drop)?)
    }
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

/// Loads 32 bits of the call's data.
fn load(offset: u32) -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0, 0)
}

fn and(mask: u32) -> libc::sock_filter {
    instruction(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask, 0, 0)
}

/// Skips instructions: so many if what was loaded equals `value`, and so many if it does not.
fn jump_if(value: u32, equal: u8, different: u8) -> libc::sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, equal, different)
}

fn end(result: u32) -> libc::sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, result, 0, 0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What happens to calls on a thread with this filter: the error of each, 0 if it succeeds.
    pub(crate) fn errors(filter: Filter, calls: Vec<(libc::c_long, [libc::c_long; 3])>) -> Vec<i32> {
        let thread = std::thread::spawn(move || {
            nix::sys::prctl::set_no_new_privs().unwrap();
            let mut errors = vec![0; calls.len()];
            filter.install().unwrap();
            for ((number, [first, second, third]), error) in calls.into_iter().zip(&mut errors) {
                // SAFETY: the callers pass calls that touch no memory of this process.
                if unsafe { libc::syscall(number, first, second, third, 0, 0, 0) } < 0 {
                    *error = Errno::last_raw();
                }
            }
            errors
        });
        thread.join().unwrap()
    }

    /// What a thread needs to end, and to return its result.
    pub(crate) const TO_END: [libc::c_long; 9] = [
        libc::SYS_exit,
        libc::SYS_futex,
        libc::SYS_madvise,
        libc::SYS_mmap,
        libc::SYS_mprotect,
        libc::SYS_munmap,
        libc::SYS_rt_sigprocmask,
        libc::SYS_sigaltstack,
        libc::SYS_write,
    ];

    #[test]
    fn only_permitted_calls_with_permitted_arguments_reach_the_kernel() {
        const FAMILIES: &[u32] = &[libc::AF_UNIX as u32, libc::AF_INET as u32];
        let to_end = TO_END.map(|number| (number, When::Always));
        let conditional = [
            (libc::SYS_socket, When::Argument { index: 0, mask: u32::MAX, values: FAMILIES }),
            (libc::SYS_lseek, When::Argument { index: 2, mask: 4, values: &[4] }),
            (libc::SYS_getppid, When::Always),
        ];
        let (unix, netlink) = (libc::AF_UNIX.into(), libc::AF_NETLINK.into());
        let stream = libc::SOCK_STREAM.into();
        let calls = vec![
            (libc::SYS_getppid, [0, 0, 0]),
            (libc::SYS_getpgrp, [0, 0, 0]),
            (libc::SYS_socket, [unix, stream, 0]),
            (libc::SYS_socket, [netlink, stream, 0]),
            (libc::SYS_lseek, [-1, 0, 4]),
            (libc::SYS_lseek, [-1, 0, 12]),
            (libc::SYS_lseek, [-1, 0, 3]),
            // The same call in the x32 ABI.
            (libc::SYS_getppid | 0x4000_0000, [0, 0, 0]),
        ];
        let refused = libc::ENOSYS;
        let expected = [0, refused, 0, refused, libc::EBADF, libc::EBADF, refused, refused];
        assert_eq!(errors(Filter::new(to_end.into_iter().chain(conditional)), calls), expected);
    }
}
