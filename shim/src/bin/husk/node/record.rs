//! What an installation has found on the node, so that its removal leaves nothing behind that was not there before.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::files;
use super::places::{RECORD, RUNTIME};

/// Version of the record's format.
const VERSION: u32 = 1;

/// The record, which is written before the first change.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    /// containerd's configuration, without symbolic links.
    pub(crate) config: PathBuf,
    /// Paths that did not exist: the configuration, its folder, and what husk creates when it runs. A folder precedes
    /// its files.
    absent: Vec<PathBuf>,
}

impl Record {
    /// Reads the record of an installation, complete or not.
    pub(crate) fn read() -> Result<Option<Self>> {
        let Some(text) = files::read(Path::new(RECORD))? else { return Ok(None) };
        let record: Self = serde_json::from_str(&text).with_context(|| format!("parse {RECORD}"))?;
        ensure!(record.version == VERSION, "{RECORD}: version {} is of another release of husk", record.version);
        Ok(Some(record))
    }

    /// Records the node as it is.
    pub(crate) fn write(config: &Path) -> Result<Self> {
        let mut absent = Vec::new();
        for path in config.parent().into_iter().chain([config]).chain(RUNTIME.map(Path::new)) {
            if !files::exists(path)? {
                absent.push(path.to_owned());
            }
        }
        let record = Self { version: VERSION, config: config.to_owned(), absent };
        files::write(Path::new(RECORD), serde_json::to_string_pretty(&record)?.as_bytes(), 0o644)?;
        Ok(record)
    }

    /// Whether the installation has created containerd's configuration.
    pub(crate) fn created_config(&self) -> bool {
        self.absent.contains(&self.config)
    }

    /// Removes what did not exist, except for containerd's configuration, and folders that are in use by now.
    pub(crate) fn remove_created(&self) -> Result<()> {
        for path in self.absent.iter().rev().filter(|path| **path != self.config) {
            let removed = if path.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) };
            match removed {
                Ok(()) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {}
                Err(error) => return Err(error).with_context(|| format!("remove {}", path.display())),
            }
        }
        Ok(())
    }
}
