//! A sandbox's state on the host's disk: the directory `/run/husk/<namespace>/<sandbox>/`, and in it `state.json` with
//! the facts that later processes need and the journal of undo steps.
//!
//! Every step is recorded *before* its effect. After a `kill -9`, another process can therefore undo everything,
//! including an effect that was under way. `undo` defines the steps and how each is undone.

pub mod cid;
pub mod error;
pub mod facts;
pub mod images;
pub mod journal;
pub mod lease;
pub mod life;
pub mod links;
mod live_status;
mod places;
pub mod ports;
pub mod recent;
pub mod status;
pub mod store;
#[cfg(test)]
mod tests;
mod tree;
pub mod undo;
pub mod users;
pub mod volumes;
mod waiting;

pub use error::StateError;
pub(crate) use error::{check_identifier, io_error};
pub use facts::{Boot, MachineRecord};
pub use places::POOL;
pub use store::{BASE, State, base};
pub(crate) use store::{Owner, Recorder};
pub(crate) use undo::Step;
