//! Reads a rotated log as one file, oldest part first. Needs only the files, so it also works without a running shim.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::console::rotate;
use crate::console::rotate::older;

/// Bytes per read in a backward search.
const BLOCK: usize = 64 * 1024;

/// The parts of a log at the time of its opening. Later output is invisible; parts rotated away since remain readable.
#[derive(Debug)]
pub struct LogChain {
    /// The files with their lengths, oldest first.
    parts: Vec<(File, u64)>,
}

impl LogChain {
    /// Opens the log at `path`. A log that does not exist is empty.
    ///
    /// # Errors
    /// When a part cannot be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        let names = (1..=rotate::KEPT).rev().map(|number| older(path, number)).chain([path.to_owned()]);
        let mut parts = Vec::new();
        for name in names {
            match File::open(&name) {
                Ok(file) => {
                    let length = file.metadata()?.len();
                    parts.push((file, length));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self { parts })
    }

    /// Length of all parts, bytes.
    pub fn len(&self) -> u64 {
        self.parts.iter().map(|(_, length)| length).sum()
    }

    /// Whether the log is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads at `offset`, up to the end of a part or of `buffer`. Returns 0 only at the end of the log.
    ///
    /// # Errors
    /// Those of pread(2).
    pub fn read_at(&self, mut offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        for (file, length) in &self.parts {
            if offset < *length {
                let most = usize::try_from(length - offset).unwrap_or(usize::MAX).min(buffer.len());
                return file.read_at(&mut buffer[..most], offset);
            }
            offset -= length;
        }
        Ok(0)
    }

    /// The offset of the last `lines` lines. The last line may lack its newline.
    ///
    /// # Errors
    /// Those of pread(2).
    pub fn last_lines(&self, lines: usize) -> io::Result<u64> {
        let length = self.len();
        if lines == 0 {
            return Ok(length);
        }
        let mut block = vec![0; BLOCK];
        let (mut end, mut newlines) = (length, 0);
        while end > 0 {
            let start = end.saturating_sub(BLOCK as u64);
            let size = (end - start) as usize;
            self.fill(start, &mut block[..size])?;
            for at in (0..size).rev() {
                // The newline of the last line does not end the line before it.
                if block[at] == b'\n' && start + at as u64 + 1 != length {
                    newlines += 1;
                    if newlines == lines {
                        return Ok(start + at as u64 + 1);
                    }
                }
            }
            end = start;
        }
        Ok(0)
    }

    fn fill(&self, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            let read = self.read_at(offset, buffer)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            offset += read as u64;
            buffer = &mut buffer[read..];
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(parts: &[(&str, &[u8])]) -> (tempfile::TempDir, LogChain) {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in parts {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        let chain = LogChain::open(&dir.path().join("log")).unwrap();
        (dir, chain)
    }

    fn rest(chain: &LogChain, mut offset: u64) -> Vec<u8> {
        let (mut all, mut buffer) = (Vec::new(), [0; 3]);
        loop {
            let read = chain.read_at(offset, &mut buffer).unwrap();
            if read == 0 {
                return all;
            }
            all.extend_from_slice(&buffer[..read]);
            offset += read as u64;
        }
    }

    #[test]
    fn the_last_lines_are_found_across_parts() {
        let (_dir, chain) = chain(&[
            ("log.4", b"too old to be kept\n"),
            ("log.3", b"one\ntw"),
            ("log.1", b"o\nthree\n"),
            ("log", b"four\nfi"),
        ]);
        assert_eq!(chain.len(), 21);
        let table: [(usize, &[u8]); 8] = [
            (0, b""),
            (1, b"fi"),
            (2, b"four\nfi"),
            (3, b"three\nfour\nfi"),
            (4, b"two\nthree\nfour\nfi"),
            (5, b"one\ntwo\nthree\nfour\nfi"),
            (6, b"one\ntwo\nthree\nfour\nfi"),
            (usize::MAX, b"one\ntwo\nthree\nfour\nfi"),
        ];
        for (lines, expected) in table {
            assert_eq!(rest(&chain, chain.last_lines(lines).unwrap()), expected, "{lines}");
        }
    }

    #[test]
    fn the_last_lines_of_empty_and_of_newline_terminated_logs_are_found() {
        let (_dir, ended) = chain(&[("log", b"a\nb\n")]);
        assert_eq!(rest(&ended, ended.last_lines(1).unwrap()), b"b\n");
        let (_dir, none) = chain(&[]);
        assert!(none.is_empty() && none.last_lines(5).unwrap() == 0 && rest(&none, 0).is_empty());
        let long = [b"first\n".to_vec(), vec![b'x'; 3 * BLOCK], b"\nlast".to_vec()].concat();
        let (_dir, long) = chain(&[("log", &long)]);
        assert_eq!(rest(&long, long.last_lines(1).unwrap()), b"last");
        assert_eq!(long.last_lines(2).unwrap(), 6);
        assert_eq!(long.last_lines(3).unwrap(), 0);
    }
}
