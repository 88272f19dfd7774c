//! Finds NICs that were plugged into the running machine. The kernel has no driver that would notice them: it searches
//! the PCI buses when it is asked to, and has probed what it has found when the request returns.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Write};

/// Searches for new NICs. Tests have their own.
pub(super) type Search = fn() -> io::Result<()>;

/// Searches the PCI buses (Documentation/ABI/testing/sysfs-bus-pci).
pub(super) fn search_pci() -> io::Result<()> {
    match OpenOptions::new().write(true).open("/sys/bus/pci/rescan") {
        Ok(mut file) => file.write_all(b"1"),
        // A kernel without PCI.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
