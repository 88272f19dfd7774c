//! One of containerd's mounts: its transforms, its type, and what it refers to.

use std::path::Path;

use containerd_shim_protos::types::mount::Mount;

use super::options::{Format, NewFolder, take_folders, take_format};
use super::template::{Call, expand, range};
use super::view::HostView;
use crate::config::problem::Problem;

/// The transforms that containerd's mount manager leaves to husk.
pub(crate) const TRANSFORMS: [&str; 3] = ["format", "mkdir", "mkfs"];

/// Filesystems that the guest's kernel mounts from a disk.
const DISKS: [&str; 6] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "erofs"];
/// Stands around the number of a mount in an expanded text, because the guest decides where it mounts a disk.
pub(super) const MARK: char = '\u{1}';

/// What a mount is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A filesystem on a disk.
    Disk,
    /// An image that later mounts refer to.
    Loop,
    /// A folder.
    Bind,
    /// Overlays, and other filesystems without a disk.
    Other,
}

/// A mount without templates and transforms.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) index: usize,
    pub(super) kind: Kind,
    pub(super) fs_type: String,
    pub(super) source: String,
    pub(super) options: Vec<String>,
    /// Whether it has been changed.
    pub(super) transformed: bool,
    pub(super) folders: Vec<NewFolder<String>>,
    pub(super) format: Option<Format>,
}

fn is_disk_type(fs_type: &str) -> bool {
    DISKS.contains(&fs_type)
}

impl Part {
    /// Parses a mount that may refer to `earlier` ones.
    ///
    /// # Errors
    /// What husk does not support.
    pub(super) fn parse(index: usize, mount: &Mount, earlier: &[Self], view: &HostView<'_>) -> Result<Self, Problem> {
        let (transforms, fs_type) = match mount.type_.rsplit_once('/') {
            Some((transforms, fs_type)) => (Some(transforms), fs_type),
            None => (None, mount.type_.as_str()),
        };
        let mut part = Self {
            index,
            kind: Kind::Other,
            fs_type: fs_type.to_owned(),
            source: mount.source.clone(),
            options: mount.options.clone(),
            transformed: transforms.is_some(),
            folders: Vec::new(),
            format: None,
        };
        if !mount.target.is_empty() {
            return Err(part.problem("target", &mount.target, "mounts below the root are not supported"));
        }
        // The first one is the outermost: the others work on what it makes.
        for transform in transforms.into_iter().flat_map(|transforms| transforms.split('/')) {
            part.transform(transform, mount, earlier)?;
        }
        part.kind = part.classify(view)?;
        Ok(part)
    }

    pub(super) fn is_disk(&self) -> bool {
        self.kind == Kind::Disk
    }

    pub(super) fn problem(&self, field: &str, value: &str, why: impl Into<String>) -> Problem {
        Problem::quoted(format!("rootfs[{}].{field}", self.index), value, why)
    }

    fn transform(&mut self, transform: &str, mount: &Mount, earlier: &[Self]) -> Result<(), Problem> {
        match transform {
            "format" => {
                let value = |call| value(call, earlier);
                let source = expand(&self.source, &value);
                self.source = source.map_err(|why| self.problem("source", &self.source, why))?;
                for index in 0..self.options.len() {
                    let option = &self.options[index];
                    self.options[index] = expand(option, &value).map_err(|why| self.problem("options", option, why))?;
                }
            }
            "mkdir" => {
                let folders = take_folders(&mut self.options);
                self.folders = folders.map_err(|(option, why)| self.problem("options", &option, why))?;
            }
            "mkfs" => {
                let format = take_format(&mut self.options);
                self.format = Some(format.map_err(|(option, why)| self.problem("options", &option, why))?);
            }
            _ => {
                let why = format!("husk supports the transforms {}", TRANSFORMS.join(", "));
                return Err(self.problem("type", &mount.type_, why));
            }
        }
        Ok(())
    }

    fn classify(&self, view: &HostView<'_>) -> Result<Kind, Problem> {
        let source = Path::new(&self.source);
        let is_bind = self.fs_type == "bind" || self.options.iter().any(|option| option == "bind" || option == "rbind");
        let kind = match self.fs_type.as_str() {
            _ if is_bind => Kind::Bind,
            "loop" => Kind::Loop,
            // The btrfs snapshotter's own filesystem, which the host has mounted: two kernels would destroy it.
            "btrfs" if (view.is_busy)(source) => Kind::Other,
            fs_type if is_disk_type(fs_type) => Kind::Disk,
            fs_type if fs_type.starts_with("fuse") => {
                let why = "filesystems that need a mount helper are not supported";
                return Err(self.problem("type", fs_type, why));
            }
            fs_type if source.is_absolute() && (view.is_image)(source) => {
                let why = format!("husk mounts {} from an image or a device", DISKS.join(", "));
                return Err(self.problem("type", fs_type, why));
            }
            _ => Kind::Other,
        };
        match &self.format {
            Some(_) if !matches!(kind, Kind::Disk | Kind::Loop) => {
                Err(self.problem("type", &self.fs_type, "only filesystems on disks can be created"))
            }
            // What is created and what is mounted are the same, except for loop, whose users say what they mount.
            Some(format) if kind == Kind::Disk && format.fs_type != self.fs_type => {
                let why = format!("the image is created with {}", format.fs_type);
                Err(self.problem("type", &self.fs_type, why))
            }
            _ => Ok(kind),
        }
    }
}

/// The value of a call in a template.
fn value(call: Call, earlier: &[Part]) -> Result<String, String> {
    let part = |index: usize| earlier.get(index).ok_or_else(|| format!("there is no mount {index} before this one"));
    let place = |index: usize| {
        let part = part(index)?;
        Ok(match part.kind {
            Kind::Disk => format!("{MARK}{index}{MARK}"),
            Kind::Loop | Kind::Bind => part.source.clone(),
            Kind::Other => return Err(format!("mount {index} has the type {}, to which none may refer", part.fs_type)),
        })
    };
    match call {
        Call::Source(index) => Ok(part(index)?.source.clone()),
        Call::Mount(index) => place(index),
        Call::Overlay(first, last) => {
            // Before the range is made: it may be long.
            part(first.max(last))?;
            Ok(range(first, last).into_iter().map(place).collect::<Result<Vec<_>, String>>()?.join(":"))
        }
    }
}
