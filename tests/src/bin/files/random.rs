//! Random operations on one file, compared with a model of its contents in memory.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::system::{BLOCK, call, expect, number};

/// The file's largest size, in blocks.
const BLOCKS: usize = 32;
const OPERATIONS: usize = 600;

/// A xorshift generator: the same numbers in each run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// A mapping of the whole of the largest file.
struct Mapping {
    start: usize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // The program ends soon if this fails.
        let _ = call(libc::SYS_munmap, [self.start, BLOCKS * BLOCK, 0, 0, 0, 0]);
    }
}

/// Writes, reads, maps, cuts, and moves parts of a file at random, and compares each time.
pub(crate) fn operations(at: &Path) -> io::Result<()> {
    let path = at.join("file");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let shared = libc::MAP_SHARED as usize;
    let mapping = Mapping { start: call(libc::SYS_mmap, [0, BLOCKS * BLOCK, protection, shared, number(&file), 0])? };
    let mut model: Vec<u8> = Vec::new();
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for step in 0..OPERATIONS {
        let operation = operate(&file, &mapping, &mut model, &mut numbers)?;
        let same = compare(&file, &path, &mapping, &model, step)?;
        expect(same, format!("other contents after operation {step}, {operation}"))?;
    }
    Ok(())
}

fn operate(file: &File, mapping: &Mapping, model: &mut Vec<u8>, numbers: &mut Numbers) -> io::Result<&'static str> {
    let (offset, length) = (numbers.below(BLOCKS * BLOCK - 1), 1 + numbers.below(2 * BLOCK));
    let end = (offset + length).min(BLOCKS * BLOCK);
    let byte = 1 + numbers.below(255) as u8;
    let allocate = |mode: i32, offset: usize, length: usize| {
        call(libc::SYS_fallocate, [number(file), mode as usize, offset, length, 0, 0]).map(drop)
    };
    let blocks = model.len() / BLOCK;
    match numbers.below(8) {
        0 | 1 => {
            model.resize(model.len().max(end), 0);
            model[offset..end].fill(byte);
            file.write_all_at(&model[offset..end], offset as u64)?;
            Ok("a write")
        }
        2 if offset < model.len() => {
            let end = end.min(model.len());
            model[offset..end].fill(byte);
            // SAFETY: the mapping covers the file's largest size, and the file reaches to `end`.
            unsafe { std::ptr::write_bytes((mapping.start + offset) as *mut u8, byte, end - offset) };
            Ok("a write to the mapping")
        }
        3 => {
            model.resize(offset, 0);
            file.set_len(offset as u64)?;
            Ok("a change of size")
        }
        4 => {
            let until = end.min(model.len());
            if offset < until {
                model[offset..until].fill(0);
            }
            allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, length)?;
            Ok("FALLOC_FL_PUNCH_HOLE")
        }
        5 => {
            model.resize(model.len().max(end), 0);
            model[offset..end].fill(0);
            allocate(libc::FALLOC_FL_ZERO_RANGE, offset, end - offset)?;
            Ok("FALLOC_FL_ZERO_RANGE")
        }
        // These two move whole blocks before the end of the file.
        6 if blocks > 2 => {
            let (first, count) = (numbers.below(blocks - 1), 1);
            model.drain(first * BLOCK..(first + count) * BLOCK);
            allocate(libc::FALLOC_FL_COLLAPSE_RANGE, first * BLOCK, count * BLOCK)?;
            Ok("FALLOC_FL_COLLAPSE_RANGE")
        }
        7 if blocks > 1 && model.len() + BLOCK <= BLOCKS * BLOCK => {
            let first = numbers.below(blocks);
            model.splice(first * BLOCK..first * BLOCK, vec![0; BLOCK]);
            allocate(libc::FALLOC_FL_INSERT_RANGE, first * BLOCK, BLOCK)?;
            Ok("FALLOC_FL_INSERT_RANGE")
        }
        _ => Ok("nothing"),
    }
}

/// Compares the file with the model: by reading, through the mapping, and now and then through a new descriptor.
fn compare(file: &File, path: &Path, mapping: &Mapping, model: &[u8], step: usize) -> io::Result<bool> {
    let mut read = vec![0; model.len()];
    file.read_exact_at(&mut read, 0)?;
    // SAFETY: the mapping covers the file, which has the model's length, as checked below before it is read.
    let mapped = || unsafe { std::slice::from_raw_parts(mapping.start as *const u8, model.len()) };
    let fresh = || std::fs::read(path);
    Ok(file.metadata()?.len() == model.len() as u64
        && read == model
        && mapped() == model
        && (!step.is_multiple_of(16) || fresh()? == model))
}
