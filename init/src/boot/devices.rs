//! The kernel's entropy: reading random numbers must never block a container.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;

use super::{Error, Step};

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

/// Makes sure that getrandom(2) does not block: the kernel has credited RDRAND by itself, or a seed is taken from the hardware
/// generator (virtio-rng) and credited.
pub fn credit_entropy() -> Result<(), Error> {
    if is_seeded() {
        return Ok(());
    }
    let mut seed = [0; SEED];
    match File::open("/dev/hwrng").and_then(|mut device| device.read_exact(&mut seed)) {
        Ok(()) => credit(seed).step(|| "credit the entropy of /dev/hwrng".into()),
        Err(error) => {
            // Not fatal: the kernel gathers jitter by itself, it only takes a second.
            tracing::warn!(%error, "no entropy yet: the CPU has no RDRAND and /dev/hwrng cannot be read");
            Ok(())
        }
    }
}

fn is_seeded() -> bool {
    let mut byte = 0u8;
    // SAFETY: the buffer is one byte long and outlives the call.
    unsafe { libc::getrandom((&raw mut byte).cast(), 1, libc::GRND_NONBLOCK) == 1 }
}

fn credit(seed: [u8; SEED]) -> io::Result<()> {
    let info = PoolInfo { entropy_count: 8 * SEED as libc::c_int, buf_size: SEED as libc::c_int, buf: seed };
    let random = File::options().write(true).open("/dev/random")?;
    // SAFETY: RNDADDENTROPY reads a rand_pool_info and `buf_size` bytes after its header: exactly this struct, which outlives the call.
    let done = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
