//! Extras: files of the host for the guest itself. Opens them and writes the disk on which they travel. What the annotations say is in
//! [`crate::config::extras`].

pub mod disk;
pub mod files;

#[cfg(test)]
mod tests;
