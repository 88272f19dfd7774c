//! Extras: files of the host for the guest itself. Opens them (`files.rs`) and writes them to the disk on which the
//! guest receives them (`disk.rs`). The annotations that request them are parsed in `config/extras/`.

pub mod disk;
pub mod files;

#[cfg(test)]
mod tests;
