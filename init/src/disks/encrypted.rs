//! Disks that the guest encrypts (Documentation/admin-guide/device-mapper/dm-crypt.rst in the kernel's source). The key
//! exists only here: it is made when the disk is attached, and the kernel forgets it with the device.
//!
//! The host has made a filesystem on the disk. The guest encrypts in place what the filesystem's maker has written; what
//! else is on the disk has no contents, and decrypts to something random, as on a used disk.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

use husk_protos::disks::{DiskEncryption, DiskExtent};
use nix::errno::Errno;
use zeroize::Zeroizing;

use super::mapper::Target;

/// Two keys of AES-256, as XTS takes them.
const KEY: usize = 64;
const SECTOR: u64 = 512;
/// What is encrypted at a time, bytes: a block of the filesystem. Sectors would each take as much preparation.
const BLOCK: u64 = 4096;
const CHUNK: usize = 1 << 20;

/// The target that encrypts a disk with these numbers, MAJOR:MINOR, with a new key.
///
/// # Errors
/// Those of getrandom(2).
pub(super) fn target(numbers: &str, bytes: u64) -> io::Result<Target> {
    let mut key = Zeroizing::new([0; KEY]);
    random(&mut key)?;
    Ok(table(numbers, bytes, &key))
}

fn table(numbers: &str, bytes: u64, key: &[u8; KEY]) -> Target {
    // Discards pass: the host sees anyway which parts of the file were never written.
    let (before, after) = ("aes-xts-plain64 ", format!(" 0 {numbers} 0 2 allow_discards sector_size:{BLOCK}"));
    // Allocated once: a growing text would leave copies of the key behind.
    let mut parameters = Zeroizing::new(String::with_capacity(before.len() + 2 * KEY + after.len()));
    parameters.push_str(before);
    for byte in key {
        for digit in [byte >> 4, byte & 15] {
            parameters.push(char::from_digit(digit.into(), 16).unwrap_or('0'));
        }
    }
    parameters.push_str(&after);
    Target { kind: "crypt", sectors: bytes / SECTOR, read_only: false, parameters }
}

fn random(key: &mut [u8; KEY]) -> io::Result<()> {
    // SAFETY: the kernel writes at most KEY bytes to the array. Up to 256 bytes come whole (getrandom(2)).
    match Errno::result(unsafe { libc::getrandom(key.as_mut_ptr().cast(), KEY, 0) })? {
        read if usize::try_from(read) == Ok(KEY) => Ok(()),
        read => Err(io::Error::other(format!("the kernel has given {read} of {KEY} random bytes"))),
    }
}

/// Encrypts what has been written to the disk `plain` of this size, by copying it to the device `encrypted`, which lies
/// over it.
///
/// # Errors
/// Those of the disk, and InvalidInput for extents outside of it.
pub(super) fn encrypt(plain: &File, encrypted: &File, bytes: u64, request: &DiskEncryption) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    for DiskExtent { offset, length, .. } in &request.written {
        let end =
            offset.checked_add(*length).filter(|end| *end <= bytes && offset % SECTOR == 0 && length % SECTOR == 0);
        let end = end.ok_or_else(|| {
            io::Error::new(
                ErrorKind::InvalidInput,
                format!("{length} bytes at {offset} are no part of a disk of {bytes}"),
            )
        })?;
        let mut at = *offset;
        while at < end {
            let part = usize::try_from(end - at).map_or(CHUNK, |left| left.min(CHUNK));
            plain.read_exact_at(&mut buffer[..part], at)?;
            encrypted.write_all_at(&buffer[..part], at)?;
            at += part as u64;
        }
    }
    encrypted.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_the_key_in_hexadecimal() {
        let mut key = [0; KEY];
        (key[0], key[63]) = (0xa1, 0x0f);
        let target = table("8:32", 1 << 20, &key);
        let zeroes = "00".repeat(62);
        assert_eq!(
            *target.parameters,
            format!("aes-xts-plain64 a1{zeroes}0f 0 8:32 0 2 allow_discards sector_size:4096")
        );
        assert_eq!(target.parameters.capacity(), target.parameters.len());
        assert_eq!((target.kind, target.sectors, target.read_only), ("crypt", 2048, false));
    }

    #[test]
    fn no_key_is_used_twice() {
        let keys: Vec<String> = (0..3).map(|_| target("8:0", 512).unwrap().parameters.to_string()).collect();
        assert!(keys[0] != keys[1] && keys[1] != keys[2] && keys[0] != keys[2]);
        assert!(!keys[0].contains(&"00".repeat(KEY)));
    }

    #[test]
    fn exactly_what_was_written_is_copied() {
        let (plain, encrypted) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let size = 4 << 20;
        plain.write_all_at(&vec![b'p'; size], 0).unwrap();
        encrypted.write_all_at(&vec![b'e'; size], 0).unwrap();
        let extent = |offset, length| DiskExtent { offset, length, ..Default::default() };
        let request = |written| DiskEncryption { written, ..Default::default() };
        let written = vec![extent(512, 512), extent(1 << 20, (1 << 20) + 1024)];
        encrypt(&plain, &encrypted, size as u64, &request(written)).unwrap();
        let mut copied = vec![0; size];
        encrypted.read_exact_at(&mut copied, 0).unwrap();
        for (at, byte) in copied.iter().enumerate() {
            let expected = (512..1024).contains(&at) || (1 << 20..(2 << 20) + 1024).contains(&at);
            assert_eq!(*byte == b'p', expected, "{at}");
        }
        for (offset, length) in [(100, 512), (512, 100), (4 << 20, 512), (u64::MAX - 511, 512)] {
            let error = encrypt(&plain, &encrypted, size as u64, &request(vec![extent(offset, length)])).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{offset} {length}");
        }
    }
}
