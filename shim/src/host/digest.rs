//! SHA-256 digests of files, and copies that nobody can change any more.
//!
//! A digest says nothing about a file that somebody may write to in the next moment, under the same name or through a
//! descriptor. Therefore the program that needs the verified contents reads a copy: the bytes that were hashed are those
//! that were copied, and the copy is sealed.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use sha2::{Digest, Sha256};

/// How much of a file is in memory at a time.
const CHUNK: usize = 1 << 18;
/// The largest file that is hashed. A file that grows meanwhile ends here.
const MOST: u64 = 1 << 30;

/// The digest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Sha256Digest([u8; 32]);

impl Sha256Digest {
    /// Parses 64 hexadecimal digits.
    ///
    /// # Errors
    /// What is allowed.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let invalid = || "must be a SHA-256 digest of 64 hexadecimal digits, as sha256sum prints it".to_owned();
        let mut digest = [0; 32];
        let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return Err(invalid()) };
        if pairs.len() != digest.len() {
            return Err(invalid());
        }
        for (byte, pair) in digest.iter_mut().zip(pairs) {
            *byte = digit(pair[0]).zip(digit(pair[1])).map(|(high, low)| high << 4 | low).ok_or_else(invalid)?;
        }
        Ok(Self(digest))
    }

    /// The digest of what was hashed.
    pub(crate) fn finish(hash: Sha256) -> Self {
        Self(hash.finalize().into())
    }

    /// The digest itself.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The digest of a file, from its current offset.
///
/// # Errors
/// Those of read(2), and FileTooLarge.
pub(crate) fn of(file: &File) -> io::Result<Sha256Digest> {
    copy(file, &mut io::sink())
}

/// A copy of a file, from its current offset, with the copy's digest. Every process that has the copy can read it, and
/// none can change it.
///
/// # Errors
/// Those of read(2), memfd_create(2) and write(2), and FileTooLarge.
pub(crate) fn sealed_copy(file: &File) -> io::Result<(File, Sha256Digest)> {
    let mut copied = File::from(memfd_create(c"husk-verified", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    let digest = copy(file, &mut copied)?;
    fcntl(&copied, FcntlArg::F_ADD_SEALS(SealFlag::all()))?;
    Ok((copied, digest))
}

fn copy(file: &File, to: &mut impl Write) -> io::Result<Sha256Digest> {
    let too_large = || io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {MOST} bytes"));
    if file.metadata()?.len() > MOST {
        return Err(too_large());
    }
    let (mut from, mut hash, mut buffer) = (file.take(MOST + 1), Sha256::new(), vec![0; CHUNK]);
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => {
                hash.update(&buffer[..length]);
                to.write_all(&buffer[..length])?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    match from.limit() {
        0 => Err(too_large()),
        _ => Ok(Sha256Digest::finish(hash)),
    }
}

fn digit(character: u8) -> Option<u8> {
    char::from(character).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

impl fmt::Display for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_sealed_copy_is_what_was_hashed_whatever_becomes_of_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let contents: Vec<u8> = (0..CHUNK * 2 + 7).map(|n| (n % 251) as u8).collect();
        std::fs::write(file.path(), &contents).unwrap();
        let expected = of(&File::open(file.path()).unwrap()).unwrap();
        let (copied, digest) = sealed_copy(&File::open(file.path()).unwrap()).unwrap();
        assert_eq!(digest, expected);
        assert_eq!(digest.0[..], Sha256::digest(&contents)[..]);
        // A writer that the path's owner has, after the digest.
        std::fs::write(file.path(), "something else").unwrap();
        let link = format!("/proc/self/fd/{}", copied.as_raw_fd());
        assert!(std::fs::read(&link).unwrap() == contents);
        assert!(copied.write_at(b"x", 0).is_err());
        assert!(copied.set_len(1).is_err() && copied.set_len(1 << 21).is_err());
        let again = File::options().write(true).open(&link);
        assert!(again.is_err() || again.unwrap().write_at(b"x", 0).is_err());
        assert!(fcntl(&copied, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_err());
    }

    #[test]
    fn a_file_that_is_too_large_has_no_digest() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MOST + 1).unwrap();
        assert_eq!(of(&file).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }

    #[test]
    fn a_digest_is_what_sha256sum_prints() {
        let text = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Sha256Digest::parse(text).unwrap().to_string(), text);
        assert_eq!(Sha256Digest::parse(&text.to_uppercase()).unwrap().to_string(), text);
        for wrong in
            ["", &text[1..], &text[2..], &format!("{text}00"), &text.replace('e', "g"), &text.replace("e3", "+3")]
        {
            assert!(Sha256Digest::parse(wrong).unwrap_err().contains("64 hexadecimal digits"), "{wrong}");
        }
    }
}
