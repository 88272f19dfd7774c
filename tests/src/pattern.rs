//! Bytes that encode their position in a stream. Both ends of a transfer derive them from the position alone, so each
//! received byte is checked, and a lost, repeated or displaced one is detected at once. Shared with the guest's
//! programs, so it uses only `std`.

use std::io::{self, Read, Write};

/// Length after which the bytes repeat: a prime, so that no buffer or packet size divides it.
const PERIOD: usize = 1_048_573;
/// Default number of bytes compared or written at a time.
const BLOCK: usize = 256 * 1024;

/// One period of the bytes, extended by one block so that a block can start anywhere in the period.
pub struct Pattern(Vec<u8>);

impl Pattern {
    /// Creates the bytes for streams with blocks of up to `block` bytes. Streams with different `seed`s differ.
    pub fn new(seed: u64, block: usize) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut bytes: Vec<u8> = Vec::with_capacity(PERIOD + block);
        while bytes.len() < PERIOD {
            // xorshift64 (Marsaglia, 2003)
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend(state.to_le_bytes());
        }
        bytes.truncate(PERIOD);
        for at in 0..block {
            bytes.push(bytes[at]);
        }
        Pattern(bytes)
    }

    /// The `len` bytes at position `at` of the stream. `len` must not exceed the block size of [`Pattern::new`].
    pub fn at(&self, at: u64, len: usize) -> &[u8] {
        let start = (at % PERIOD as u64) as usize;
        &self.0[start..start + len]
    }
}

/// Writes `total` bytes of the stream `seed`, `block` bytes per call.
pub fn write(to: &mut impl Write, seed: u64, total: u64, block: usize) -> io::Result<()> {
    let pattern = Pattern::new(seed, block);
    let mut at = 0;
    while at < total {
        let len = block.min((total - at) as usize);
        let n = to.write(pattern.at(at, len))?;
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        at += n as u64;
    }
    Ok(())
}

/// Reads to the end of the stream, but at most `limit` bytes, compares each byte with the stream `seed`, and returns
/// their number.
pub fn check(from: &mut impl Read, seed: u64, limit: u64) -> io::Result<u64> {
    let pattern = Pattern::new(seed, BLOCK);
    let mut buffer = vec![0; BLOCK];
    let mut at = 0;
    while at < limit {
        let room = BLOCK.min((limit - at) as usize);
        let n = match from.read(&mut buffer[..room]) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if buffer[..n] != *pattern.at(at, n) {
            let off = buffer[..n]
                .iter()
                .zip(pattern.at(at, n))
                .take_while(|(received, expected)| received == expected)
                .count();
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("wrong byte at {}", at + off as u64)));
        }
        at += n as u64;
    }
    Ok(at)
}
