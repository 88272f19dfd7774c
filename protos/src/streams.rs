//! Raw streams: the bytes of one standard stream of a process on one vsock connection, without messages around them.
//!
//! The host's first frame ([`crate::frame`]) is a [`StreamRequest`](crate::stdio::StreamRequest). The guest waits for the
//! process and replies with one byte: [`CONNECTED`](crate::relay::CONNECTED), or the errno(3) of the failure.
//!
//! An output follows its reply as it is, and the guest closes the connection at its end. The process's exit does not
//! appear in it: the event of the exit carries the number of bytes that precede it, so that a child that has inherited
//! the output can neither delay the exit nor change what belongs before it. A number that a hostile guest invents moves
//! only the exit of its own process, within the host's deadlines.
//!
//! An input consists of chunks: a 32-bit big-endian length, and as many bytes. An empty chunk ends it: a half-close
//! cannot be told from a host that is gone. The guest then replies with another byte, after its last write.

/// Largest chunk of an input, bytes. The guest holds no chunk in memory.
pub const CHUNK_MAX: usize = 256 * 1024;
/// Length of a chunk's header, bytes.
pub const HEADER: usize = 4;
/// Capacity of pipes and fifos that carry streams, bytes (F_SETPIPE_SZ, fcntl(2)).
pub const PIPE_SIZE: usize = 256 * 1024;
/// Most bytes of an output between the pipes of guest and host. While the guest has room, it takes the whole pipe at once
/// and need not be woken in between.
pub const OUTPUT_WINDOW: u64 = 1024 * 1024;

/// The header of a chunk of `length` bytes, or of the end of the input for 0.
pub fn header(length: usize) -> [u8; HEADER] {
    (length as u32).to_be_bytes()
}

/// The length in a chunk's header. None if it is larger than [`CHUNK_MAX`].
pub fn length(header: [u8; HEADER]) -> Option<usize> {
    Some(u32::from_be_bytes(header) as usize).filter(|length| *length <= CHUNK_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_larger_than_the_limit_is_rejected() {
        for (size, expected) in [(0, Some(0)), (1, Some(1)), (CHUNK_MAX, Some(CHUNK_MAX)), (CHUNK_MAX + 1, None)] {
            assert_eq!(length(header(size)), expected, "{size}");
        }
        assert_eq!(length([0xff; HEADER]), None);
    }
}
