//! What containerd's mounts for a container's root mean: which of them the host mounts in the share, and which ones the
//! guest mounts from disks. Pure.
//!
//! | file          | contents                                                                 |
//! |---------------|--------------------------------------------------------------------------|
//! | `choice.rs`   | how the guest gets a root of the host's folders                          |
//! | `guest.rs`    | roots of disks                                                           |
//! | `host.rs`     | roots of the host's folders, and the only effects here: they are created |
//! | `layers.rs`   | the layers of an overlay of the host's folders                           |
//! | `options.rs`  | the options of filesystems, and those of containerd's mount manager      |
//! | `part.rs`     | one mount: its transforms, its type, and what it refers to               |
//! | `root.rs`     | what a root consists of                                                  |
//! | `template.rs` | the templates of containerd's mount manager                              |
//! | `view.rs`     | what a plan needs to know of the host                                    |
//!
//! The host's kernel never mounts a disk: its filesystem may have been written by a stranger, and a kernel trusts the
//! filesystems that it mounts. Folders and overlays of them are the host's own.
//!
//! From version 2.2, containerd's mount manager prepares mounts whose type begins with a transform, such as
//! `format/mkdir/overlay`, and mounts those on which they depend. husk claims what it does itself ([`TYPES`] and
//! [`TRANSFORMS`]). containerd keeps the numbers of mounts only if it mounts none itself, so husk claims all of them.

mod choice;
mod guest;
mod host;
mod layers;
mod options;
mod part;
mod root;
mod template;
mod view;

use containerd_shim_protos::types::mount::Mount;

pub(crate) use self::choice::{READ_ONLY, RootChoice, RootFacts, RootKind, choose};
pub(crate) use self::host::{FolderError, create_folders};
pub(crate) use self::layers::Layers;
pub(crate) use self::options::{NewFolder, is_known as is_known_option};
use self::part::Part;
pub(crate) use self::part::TRANSFORMS;
pub(crate) use self::root::{GuestRoot, HostRoot, Place, RootDisk, RootPlan, Top};
pub(crate) use self::view::HostView;
use crate::config::problem::Problem;

/// The types of mounts that containerd's mount manager leaves to husk, besides those that it never mounts.
pub(crate) const TYPES: [&str; 2] = ["erofs", "loop"];
/// Most mounts of a root: each may be a disk. containerd's limit is 255.
const MAX_MOUNTS: usize = 255;

/// Plans a root.
///
/// # Errors
/// What husk does not support, by field and value.
pub(crate) fn plan(mounts: &[Mount], view: &HostView<'_>) -> Result<RootPlan, Vec<Problem>> {
    if mounts.len() > MAX_MOUNTS {
        let why = format!("more than {MAX_MOUNTS} mounts are not supported");
        return Err(vec![Problem { key: "rootfs".into(), value: Some(mounts.len().to_string()), why }]);
    }
    let mut parts: Vec<Part> = Vec::new();
    let mut problems = Vec::new();
    for (index, mount) in mounts.iter().enumerate() {
        match Part::parse(index, mount, &parts, view) {
            Ok(part) => parts.push(part),
            // What refers to this mount would only cause further problems.
            Err(problem) => {
                problems.push(problem);
                break;
            }
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let planned = match parts.iter().any(Part::is_disk) {
        true => guest::root(parts, view).map(RootPlan::Guest),
        false => host::root(mounts, parts).map(RootPlan::Host),
    };
    planned.map_err(|problem| vec![problem])
}

#[cfg(test)]
mod tests;
