//! The VMMs that husk can run. Only this file and a VMM's own folder name one; everything else uses the [`Vmm`] trait.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::vmm::machine::Vmm;

// Declared here, and not in mod.rs, so that a new VMM changes no other file.
#[path = "qemu/mod.rs"]
pub(crate) mod qemu;

/// A board, and with it the VMM that emulates it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Board {
    /// One of QEMU's.
    Qemu(qemu::board::Board),
}

impl Board {
    /// Whether machines have virtual CPUs to spare unless the configuration says otherwise.
    pub(crate) fn has_spare_vcpus(self) -> bool {
        match self {
            Self::Qemu(board) => board.has_spare_vcpus(),
        }
    }

    /// Whether the memory of a running machine can grow.
    pub(crate) fn has_spare_memory(self) -> bool {
        match self {
            Self::Qemu(board) => board.has_spare_memory(),
        }
    }
}

impl Default for Board {
    fn default() -> Self {
        Self::Qemu(qemu::board::Board::Microvm)
    }
}

/// The boards of all VMMs, with their names in the configuration.
pub(crate) fn boards() -> Vec<(&'static str, Board)> {
    qemu::board::NAMES.map(|(name, board)| (name, Board::Qemu(board))).to_vec()
}

/// The configured programs, one for each VMM.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Programs<'a> {
    /// A path, or a name that is searched for in `PATH`.
    pub(crate) qemu: &'a Path,
}

/// A VMM's program does not exist.
#[derive(Debug, thiserror::Error)]
#[error("no {vmm} found; looked for {}: install it ({hint})", paths(looked))]
pub(crate) struct ProgramNotFound {
    /// The configuration key that names the program.
    pub(crate) key: &'static str,
    /// That key's value.
    pub(crate) configured: PathBuf,
    vmm: &'static str,
    hint: &'static str,
    looked: Vec<PathBuf>,
}

fn paths(looked: &[PathBuf]) -> String {
    looked.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Finds the program that emulates `board`. `path` is the environment variable of that name.
pub(crate) fn find(board: Board, programs: Programs<'_>, path: Option<&OsStr>) -> Result<PathBuf, ProgramNotFound> {
    let (configured, vmm, key, hint) = match board {
        Board::Qemu(_) => (programs.qemu, qemu::NAME, "qemu", qemu::INSTALL_HINT),
    };
    let looked: Vec<PathBuf> = if configured.components().count() > 1 {
        vec![configured.to_owned()]
    } else {
        path.into_iter().flat_map(std::env::split_paths).map(|folder| folder.join(configured)).collect()
    };
    let found = looked.iter().find(|path| path.is_file()).cloned();
    found.ok_or(ProgramNotFound { key, configured: configured.to_owned(), vmm, hint, looked })
}

/// The VMM that emulates `board` with `program`.
pub(crate) fn create(board: Board, program: PathBuf) -> Box<dyn Vmm> {
    match board {
        Board::Qemu(board) => Box::new(qemu::Qemu { program, board }),
    }
}

/// Reads what the hostile process of a machine sends on its control connection. Returns the errors. For the fuzz target.
pub(crate) async fn read_control(bytes: &[u8]) -> Vec<String> {
    qemu::read_control(bytes).await
}
