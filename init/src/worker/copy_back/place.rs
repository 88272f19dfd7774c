//! Folders, as requests name them.

use std::os::fd::OwnedFd;

use husk_protos::bundle::DiskFolder;
use serde::{Deserialize, Serialize};

use super::pair::{SELF, reopen};
use crate::error::CallError;
use crate::roots;

/// A folder of a disk, or of the share.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Folder {
    pub(crate) disk: String,
    pub(crate) path: String,
}

/// An overlay whose lower layers are images.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Images {
    /// The overlay itself.
    pub(crate) merged: Folder,
    /// No other copy follows.
    pub(crate) last: bool,
}

impl Folder {
    /// The root of the disk.
    pub(super) fn beside(&self) -> Self {
        Self { disk: self.disk.clone(), path: String::new() }
    }

    pub(super) fn open(&self, what: &str) -> Result<OwnedFd, CallError> {
        let place = DiskFolder { disk: self.disk.clone(), path: self.path.clone(), ..Default::default() };
        let opened = roots::open(&place).and_then(|folder| reopen(&folder, SELF));
        opened.map_err(|error| CallError::internal(format_args!("copy back: open the {what} {self:?}"), &error))
    }
}
