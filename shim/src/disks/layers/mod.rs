//! Read-only images of the layers of root filesystems: made once for each layer, and shared by all VMs.
//!
//! | file          | contents                                                                         |
//! |---------------|----------------------------------------------------------------------------------|
//! | `identity.rs` | which folders are layers that never change, and what a folder is recognized by    |
//! | `tree.rs`     | the contents of a layer: their size, their digest, and whether they have changed |
//! | `stamp.rs`    | what an image is recognized by, so that no other file is taken for it            |
//! | `store.rs`    | the folder of the images: finds, requests, publishes                             |
//! | `room.rs`     | keeps the store within its size: the image that was used least recently goes first |
//! | `mkfs.rs`     | makes an image, with the host's `mkfs.erofs` in a jail                           |
//! | `builder.rs`  | the process that makes the requested images, one at a time on a host             |
//! | `launch.rs`   | starts that process                                                              |
//!
//! A layer's folder holds files of a stranger, but containerd has written it, and it does not change any more. An image
//! is named after the digest of the layer's contents. A link leads from the folder's identity to that name, so that a
//! container's start takes a few system calls for each layer.

pub mod builder;
mod identity;
pub mod launch;
pub(crate) mod mkfs;
mod room;
mod stamp;
pub mod store;
mod tree;

pub use store::Store;
