//! Keeps containers off the host's vsock ports, independent of their seccomp profile.
//!
//! husk's kernel lets a task give up AF_VSOCK for itself and its descendants. Other kernels need a seccomp filter, which
//! slows down every syscall and shows up in /proc/self/status.
//!
//! The filter is plain BPF: compiling one with libseccomp costs millions of instructions, which a container without a
//! profile would spend on two rules. The kernel runs all filters of a process and applies the strictest result, so the
//! container's own filter adds to this one.

use std::io;

use husk_protos::ANNOTATION_VSOCK;
use libc::{sock_filter, sock_fprog};
use oci_spec::runtime::Spec;

use crate::error::CallError;

/// `AUDIT_ARCH_*` of linux/audit.h: the ELF machine with the 64-bit and little-endian bits.
#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xC000_00B7;

/// Set in the syscall numbers of x32, which shares x86-64's architecture value.
const X32_BIT: u32 = 0x4000_0000;

/// An option of prctl(2) in husk's kernel (kernel-config/patches/forbid-vsock.patch).
const PR_FORBID_VSOCK: libc::c_int = 0x6875_736b;

/// Keeps this process and its descendants from creating vsock sockets, unless the spec's annotation allows them. The
/// worker, to which this applies too, needs none.
pub(super) fn forbid_vsock_unless_allowed(spec: &Spec) -> Result<(), CallError> {
    let annotation = spec.annotations().as_ref().and_then(|all| all.get(ANNOTATION_VSOCK));
    if annotation.is_some_and(|value| value == "true") {
        return Ok(());
    }
    forbid_vsock().map_err(|e| CallError::internal("block AF_VSOCK", &e))
}

fn forbid_vsock() -> io::Result<()> {
    // SAFETY: this option of prctl(2) takes no pointers, and a kernel that lacks it returns EINVAL.
    if unsafe { libc::prctl(PR_FORBID_VSOCK, 0, 0, 0, 0) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::EINVAL) => load(&program()),
        e => Err(e),
    }
}

fn load(program: &[sock_filter]) -> io::Result<()> {
    let program = sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: seccomp(2) copies the program, whose pointer and length describe a live slice. The worker has
    // CAP_SYS_ADMIN, so the call does not require no_new_privs, which the container's spec controls.
    let done = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// socket(AF_VSOCK, …) fails with EAFNOSUPPORT, as on a kernel without vsock. io_uring_setup fails with EPERM, because
/// IORING_OP_SOCKET creates sockets without passing a filter. Syscalls of a foreign architecture fail with ENOSYS,
/// because a filter cannot read the arguments of socketcall(2).
fn program() -> Vec<sock_filter> {
    // struct seccomp_data: nr at 0, arch at 4, args[0] at 16. The domain is an int, so its low half is enough, which is
    // first in little-endian.
    const NR: u32 = 0;
    const ARCHITECTURE: u32 = 4;
    const DOMAIN: u32 = 16;
    vec![
        load_word(ARCHITECTURE),
        skip_if_equal(ARCH, 1),
        ret(errno(libc::ENOSYS)),
        load_word(NR),
        instruction(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, !X32_BIT),
        skip_unless_equal(libc::SYS_io_uring_setup as u32, 1),
        ret(errno(libc::EPERM)),
        skip_unless_equal(libc::SYS_socket as u32, 3),
        load_word(DOMAIN),
        skip_unless_equal(libc::AF_VSOCK as u32, 1),
        ret(errno(libc::EAFNOSUPPORT)),
        ret(libc::SECCOMP_RET_ALLOW),
    ]
}

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

fn load_word(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

fn skip_if_equal(value: u32, skip: u8) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, skip, 0, value)
}

fn skip_unless_equal(value: u32, skip: u8) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, skip, value)
}

fn ret(value: u32) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, value)
}

fn errno(number: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | number as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Interprets the instructions that the program uses.
    fn run(program: &[sock_filter], arch: u32, nr: u32, arg0: u64) -> u32 {
        let mut data = [0u8; 64];
        data[0..4].copy_from_slice(&nr.to_le_bytes());
        data[4..8].copy_from_slice(&arch.to_le_bytes());
        data[16..24].copy_from_slice(&arg0.to_le_bytes());
        let (mut accumulator, mut at) = (0u32, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            match code as u32 {
                0x20 => accumulator = u32::from_le_bytes(data[k as usize..k as usize + 4].try_into().unwrap()),
                0x54 => accumulator &= k,
                0x15 => at += if accumulator == k { jt } else { jf } as usize,
                0x06 => return k,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn vsock_io_uring_and_foreign_architectures_are_blocked_and_nothing_else() {
        let program = program();
        let (socket, uring) = (libc::SYS_socket as u32, libc::SYS_io_uring_setup as u32);
        let vsock = libc::AF_VSOCK as u64;
        let errno = |number| 0x0005_0000 | number as u32;
        let cases = [
            (ARCH, socket, vsock, errno(libc::EAFNOSUPPORT)),
            (ARCH, socket | X32_BIT, vsock, errno(libc::EAFNOSUPPORT)),
            (ARCH, socket, vsock | 1 << 32, errno(libc::EAFNOSUPPORT)),
            (ARCH, socket, libc::AF_INET as u64, libc::SECCOMP_RET_ALLOW),
            (ARCH, socket, libc::AF_UNIX as u64, libc::SECCOMP_RET_ALLOW),
            (ARCH, uring, 8, errno(libc::EPERM)),
            (ARCH, libc::SYS_read as u32, vsock, libc::SECCOMP_RET_ALLOW),
            (0x4000_0003, socket, libc::AF_INET as u64, errno(libc::ENOSYS)),
        ];
        for (arch, nr, arg0, expected) in cases {
            assert_eq!(run(&program, arch, nr, arg0), expected, "arch {arch:#x} nr {nr:#x} arg {arg0:#x}");
        }
    }
}
