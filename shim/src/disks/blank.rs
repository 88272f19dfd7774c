//! Whether a file is provably blank: it has no byte that is not zero. Then it has neither a filesystem nor a partition
//! table nor data, wherever these are in the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

/// Most bytes that are read. The holes of a sparse file, and space that was only reserved, need not be.
const MOST: u64 = 1 << 30;
const CHUNK: usize = 1 << 20;

/// What a file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Only zeroes.
    Blank,
    /// Something else.
    Data,
    /// More written blocks than are examined.
    Unknown,
}

/// Examines a file.
///
/// # Errors
/// Those of lseek(2) and pread(2).
pub(super) fn examine(file: &File) -> io::Result<Content> {
    let (mut at, mut read, mut buffer) = (0, 0, vec![0; CHUNK]);
    loop {
        let start = match lseek(file, at, Whence::SeekData) {
            Ok(start) => start,
            // No data up to the end.
            Err(Errno::ENXIO) => return Ok(Content::Blank),
            Err(error) => return Err(error.into()),
        };
        let end = lseek(file, start, Whence::SeekHole)?;
        at = start;
        while at < end {
            let length = CHUNK.min(usize::try_from(end - at).unwrap_or(CHUNK));
            let part = &mut buffer[..length];
            file.read_exact_at(part, at as u64)?;
            if part.iter().any(|byte| *byte != 0) {
                return Ok(Content::Data);
            }
            read += length as u64;
            if read > MOST {
                return Ok(Content::Unknown);
            }
            at += length as i64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_makes_a_file_not_blank() {
        for at in [None, Some(0), Some(1080), Some(5 << 20), Some((64 << 20) - 1)] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(64 << 20).unwrap();
            // Written zeroes are zeroes.
            file.write_all_at(&[0; 8192], 1 << 20).unwrap();
            if let Some(at) = at {
                file.write_all_at(b"x", at).unwrap();
            }
            let expected = if at.is_some() { Content::Data } else { Content::Blank };
            assert_eq!(examine(&file).unwrap(), expected, "{at:?}");
        }
        assert_eq!(examine(&tempfile::tempfile().unwrap()).unwrap(), Content::Blank);
    }
}
