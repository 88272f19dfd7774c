//! `/etc/husk/config.toml` (or the file that `HUSK_CONFIG` names): what a host's operator decides for all sandboxes. Reading and checking;
//! every error is told at once. Which keys there are is in `keys`; what the host has of what they name, in [`crate::prepare::host`].

pub mod annotations;
pub mod artifacts;
#[cfg(test)]
mod example_tests;
pub mod extras;
pub mod kernel_params;
pub mod keys;
pub mod load;
pub mod names;
pub mod problem;
pub mod settings;
pub mod values;
pub mod workspace;
