//! The kernel's entropy pool: containers must never block on random numbers.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;

use husk_protos::chain::Chain;

use super::error::{BootError, NameStep};

const SEED: usize = 32;

/// `struct rand_pool_info` of linux/random.h, with room for one seed.
#[repr(C)]
struct PoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; SEED],
}

/// `_IOW('R', 0x03, int [2])`.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203_u32 as libc::Ioctl;
/// `_IO('R', 0x07)`.
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// Ensures that getrandom(2) does not block: unless the kernel has already credited RDRAND, credits a seed from the
/// hardware generator (virtio-rng).
pub(super) fn credit() -> Result<(), BootError> {
    if is_seeded() {
        return Ok(());
    }
    let mut seed = [0; SEED];
    match File::open("/dev/hwrng").and_then(|mut device| device.read_exact(&mut seed)) {
        Ok(()) => add(seed).step(|| "credit the entropy of /dev/hwrng".into()),
        Err(error) => {
            // Not fatal: the kernel collects jitter entropy within about a second.
            tracing::warn!(
                error = %Chain(&error),
                "no entropy yet: the CPU has no RDRAND and reading /dev/hwrng failed"
            );
            Ok(())
        }
    }
}

/// Random bytes, for a secret. Waits until the pool is seeded.
///
/// # Errors
/// The kernel has none.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: the buffer has this length and outlives the call.
    let read = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    if read == N as isize { Ok(bytes) } else { Err(io::Error::last_os_error()) }
}

/// Mixes the host's random bytes into the pool, and makes the kernel's generator depend on them at once.
///
/// # Errors
/// The seed has another length, or the kernel rejects it.
pub(crate) fn reseed(seed: &[u8]) -> io::Result<()> {
    let seed = seed.try_into().map_err(|_| io::Error::other("the seed does not have 32 bytes"))?;
    add(seed)?;
    let random = File::options().write(true).open("/dev/random")?;
    // SAFETY: the request takes no argument and the descriptor is open.
    let done = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn is_seeded() -> bool {
    let mut byte = 0u8;
    // SAFETY: the buffer is one byte long and outlives the call.
    unsafe { libc::getrandom((&raw mut byte).cast(), 1, libc::GRND_NONBLOCK) == 1 }
}

fn add(seed: [u8; SEED]) -> io::Result<()> {
    let info = PoolInfo { entropy_count: 8 * SEED as libc::c_int, buf_size: SEED as libc::c_int, buf: seed };
    let random = File::options().write(true).open("/dev/random")?;
    // SAFETY: RNDADDENTROPY reads a rand_pool_info and the `buf_size` bytes after its header, which is exactly this
    // struct. It outlives the call.
    let done = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
