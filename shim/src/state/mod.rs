//! What a sandbox leaves on the host's disk: its folder `/run/husk/<namespace>/<sandbox>/`, and in it `state.json` with
//! the facts that a later process needs, and the journal of undo steps.
//!
//! A step is recorded *before* its effect, so that whoever comes after a `kill -9` can undo everything, including the
//! effect that was under way. What steps there are and how each is undone is in [`undo`].

pub mod cid;
pub mod error;
pub mod facts;
pub mod journal;
pub mod life;
pub mod recent;
pub mod status;
pub mod store;
#[cfg(test)]
mod tests;
mod tree;
pub mod undo;

pub use error::{StateError, check_identifier};
pub use facts::{Boot, MachineRecord};
pub use store::{BASE, Owner, Recorder, State, base, sandbox_dir};
pub use undo::Step;
