//! All output of a guest.

use std::path::Path;

use crate::console::record::Record;
use crate::console::serial::Console;

/// The file with the init's log, in the sandbox's directory.
pub const INIT_LOG: &str = "guest.log";

/// A guest's output. Clones share it.
#[derive(Debug, Clone)]
pub struct GuestLogs {
    /// The console.
    pub console: Console,
    /// The log of the init.
    pub init: Record,
}

impl GuestLogs {
    /// The output of the sandbox in `folder`. Creates no file before there is output.
    pub fn new(folder: &Path) -> Self {
        Self { console: Console::new(folder), init: Record::new(&folder.join(INIT_LOG)) }
    }
}
