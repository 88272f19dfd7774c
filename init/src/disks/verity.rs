//! Disks with a hash tree: the kernel verifies each block that it reads (Documentation/admin-guide/device-mapper/verity.rst
//! in the kernel's source).
//!
//! The host knows the root hash. The superblock, in veritysetup's format, says how the tree is laid out. Nobody vouches
//! for it, and nobody has to: a tree with another layout has another root hash.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

use husk_protos::disks::DiskVerity;
use zeroize::Zeroizing;

use super::mapper::Target;

/// The size of the superblock (cryptsetup's lib/verity/verity.c, struct verity_sb).
const SUPERBLOCK: usize = 512;
const MAGIC: &[u8; 8] = b"verity\0\0";
/// The one algorithm: the guest's kernel has no others that are safe.
const ALGORITHM: &str = "sha256";
/// Of the algorithm, bytes.
const HASH: usize = 32;
const SALT_MAX: usize = 256;
/// A page: the kernel does not verify larger blocks.
const BLOCK_MAX: u32 = 4096;
const BLOCK_MIN: u32 = 512;
const SECTOR: u64 = 512;

/// What a superblock says.
#[derive(Debug, PartialEq, Eq)]
struct Superblock {
    data_block: u32,
    hash_block: u32,
    data_blocks: u64,
    /// Hexadecimal; `-` if there is none.
    salt: String,
}

/// The target that verifies the disk `device`, whose numbers are given as MAJOR:MINOR.
///
/// # Errors
/// The superblock cannot be read, or is not one that the kernel can use.
pub(super) fn target(device: &File, numbers: &str, bytes: u64, verity: &DiskVerity) -> io::Result<Target> {
    let mut superblock = [0; SUPERBLOCK];
    let read = device.read_exact_at(&mut superblock, verity.hash_offset);
    read.map_err(|error| invalid(format!("read at {}: {error}", verity.hash_offset)))?;
    let superblock = parse(&superblock).map_err(invalid)?;
    table(&superblock, numbers, bytes, verity).map_err(invalid)
}

fn invalid(why: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("the superblock of the hash tree: {why}"))
}

fn parse(bytes: &[u8; SUPERBLOCK]) -> Result<Superblock, String> {
    let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if &bytes[..8] != MAGIC {
        return Err("there is none".to_owned());
    }
    let (version, hash_type) = (number(8), number(12));
    if (version, hash_type) != (1, 1) {
        return Err(format!("version {version} with hash type {hash_type} is not supported, only 1 with 1"));
    }
    let algorithm = &bytes[32..64];
    let end = algorithm.iter().position(|byte| *byte == 0).unwrap_or(algorithm.len());
    if &algorithm[..end] != ALGORITHM.as_bytes() {
        let algorithm = String::from_utf8_lossy(&algorithm[..end]);
        return Err(format!("the hash algorithm {algorithm:?} is not supported, only {ALGORITHM:?}"));
    }
    let (data_block, hash_block) = (number(64), number(68));
    for block in [data_block, hash_block] {
        if !block.is_power_of_two() || !(BLOCK_MIN..=BLOCK_MAX).contains(&block) {
            return Err(format!("blocks of {block} bytes are not supported"));
        }
    }
    let data_blocks = u64::from(number(72)) | u64::from(number(76)) << 32;
    let salt = usize::from(u16::from_le_bytes([bytes[80], bytes[81]]));
    if salt > SALT_MAX {
        return Err(format!("a salt of {salt} bytes is too long"));
    }
    let salt = match salt {
        0 => "-".to_owned(),
        length => hex(&bytes[88..88 + length]),
    };
    Ok(Superblock { data_block, hash_block, data_blocks, salt })
}

fn table(superblock: &Superblock, numbers: &str, bytes: u64, verity: &DiskVerity) -> Result<Target, String> {
    let Superblock { data_block, hash_block, data_blocks, salt } = superblock;
    let data = data_blocks.checked_mul(u64::from(*data_block)).filter(|data| *data > 0);
    let data = data.ok_or_else(|| format!("{data_blocks} blocks of {data_block} bytes are no disk"))?;
    if data > verity.hash_offset || verity.hash_offset > bytes {
        let offset = verity.hash_offset;
        return Err(format!("{data} bytes of data, a hash tree at {offset} and {bytes} bytes of disk do not agree"));
    }
    if verity.root_hash.len() != HASH {
        return Err(format!("a root hash of {} bytes is none of {ALGORITHM}", verity.root_hash.len()));
    }
    // The tree begins at the next block.
    let tree = (verity.hash_offset + SUPERBLOCK as u64).div_ceil(u64::from(*hash_block));
    let root = hex(&verity.root_hash);
    // One block device has both.
    let parameters =
        format!("1 {numbers} {numbers} {data_block} {hash_block} {data_blocks} {tree} {ALGORITHM} {root} {salt}");
    Ok(Target { kind: "verity", sectors: data / SECTOR, read_only: true, parameters: Zeroizing::new(parameters) })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As veritysetup writes it, with 300 blocks of data.
    fn superblock() -> [u8; SUPERBLOCK] {
        let mut bytes = [0; SUPERBLOCK];
        bytes[..8].copy_from_slice(MAGIC);
        for (at, value) in [(8, 1_u32), (12, 1), (64, 4096), (68, 4096), (72, 300)] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes[32..38].copy_from_slice(b"sha256");
        bytes[80] = 2;
        bytes[88..90].copy_from_slice(&[0xab, 0x01]);
        bytes
    }

    fn verity(hash_offset: u64) -> DiskVerity {
        DiskVerity { root_hash: vec![0x5a; 32], hash_offset, ..Default::default() }
    }

    #[test]
    fn the_table_is_that_of_the_superblock() {
        let disk = tempfile::tempfile().unwrap();
        disk.write_all_at(&superblock(), 301 * 4096).unwrap();
        let target = target(&disk, "8:16", 400 * 4096, &verity(301 * 4096)).unwrap();
        let root = "5a".repeat(32);
        assert_eq!(*target.parameters, format!("1 8:16 8:16 4096 4096 300 302 sha256 {root} ab01"));
        assert_eq!((target.kind, target.sectors, target.read_only), ("verity", 2400, true));
        let mut without_salt = superblock();
        without_salt[80] = 0;
        assert_eq!(parse(&without_salt).unwrap().salt, "-");
    }

    #[test]
    fn a_superblock_that_the_kernel_cannot_use_is_rejected_by_what_is_wrong() {
        let wrong: [(usize, &[u8], &str); 9] = [
            (0, b"V", "there is none"),
            (8, &[2], "version 2 with hash type 1"),
            (12, &[0], "version 1 with hash type 0"),
            (32, b"md5\0", "the hash algorithm \"md5\""),
            (32, &[b'x'; 32], "the hash algorithm \"xxxx"),
            (64, &[0, 32], "blocks of 8192 bytes"),
            (68, &[0, 0, 0, 0], "blocks of 0 bytes"),
            (80, &[1, 1], "a salt of 257 bytes"),
            (79, &[0xff], "are no disk"),
        ];
        for (at, bytes, expected) in wrong {
            let mut superblock = superblock();
            superblock[at..at + bytes.len()].copy_from_slice(bytes);
            let made = parse(&superblock).and_then(|read| table(&read, "8:0", 1 << 30, &verity(1 << 29)));
            let error = made.unwrap_err();
            assert!(error.contains(expected), "{at}: {error}");
        }
        let read = parse(&superblock()).unwrap();
        for (bytes, offset) in [(1 << 30, 299 * 4096), (300 * 4096, 301 * 4096)] {
            assert!(table(&read, "8:0", bytes, &verity(offset)).unwrap_err().contains("do not agree"));
        }
    }
}
