//! Hash trees of images, in the format of veritysetup with its defaults: SHA-256, and blocks of 4096 bytes.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const BLOCK: usize = 4096;
const HASH: usize = 32;
const SALT: [u8; 4] = [0x5a, 0x17, 0, 0xff];

/// A hash tree that was appended to an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// Hexadecimal.
    pub root_hash: String,
    /// The superblock's offset: the size that the image had.
    pub hash_offset: u64,
}

impl Tree {
    /// Appends a tree to an image of whole blocks.
    pub fn append(image: &Path) -> Result<Self> {
        let mut image = File::options().read(true).write(true).open(image)?;
        let mut data = Vec::new();
        image.read_to_end(&mut data)?;
        ensure!(data.len().is_multiple_of(BLOCK) && data.len() > BLOCK, "{} bytes are not blocks", data.len());
        // Upwards, until one block has the hashes of all blocks of the level below.
        let mut levels = vec![level(&data)];
        while let Some(lower) = levels.last().filter(|lower| lower.len() > BLOCK) {
            levels.push(level(lower));
        }
        let root = levels.last().map(|top| hash(top)).unwrap_or_default();
        image.seek(SeekFrom::End(0))?;
        image.write_all(&superblock((data.len() / BLOCK) as u64))?;
        // The top comes first.
        for level in levels.iter().rev() {
            image.write_all(level)?;
        }
        image.sync_all()?;
        let root_hash = root.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { root_hash, hash_offset: data.len() as u64 })
    }

    /// As in the annotation with volumes.
    pub fn json(&self) -> Value {
        json!({"root_hash": self.root_hash, "hash_offset": self.hash_offset})
    }

    /// As containerd's erofs differ writes it.
    pub fn metadata(&self) -> String {
        json!({"roothash": self.root_hash, "hashoffset": self.hash_offset}).to_string()
    }
}

fn hash(block: &[u8]) -> Vec<u8> {
    Sha256::new().chain_update(SALT).chain_update(block).finalize().to_vec()
}

/// The hashes of all blocks, in whole blocks.
fn level(blocks: &[u8]) -> Vec<u8> {
    let mut hashes: Vec<u8> = blocks.chunks(BLOCK).flat_map(hash).collect();
    debug_assert_eq!(BLOCK % HASH, 0);
    hashes.resize(hashes.len().next_multiple_of(BLOCK), 0);
    hashes
}

/// A block, because the tree begins at the next one.
fn superblock(data_blocks: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    bytes[..8].copy_from_slice(b"verity\0\0");
    for (at, value) in [(8, 1_u32), (12, 1), (64, BLOCK as u32), (68, BLOCK as u32)] {
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    bytes[32..38].copy_from_slice(b"sha256");
    bytes[72..80].copy_from_slice(&data_blocks.to_le_bytes());
    bytes[80] = SALT.len() as u8;
    bytes[88..88 + SALT.len()].copy_from_slice(&SALT);
    bytes
}
