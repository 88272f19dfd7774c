//! What an operator configures for all sandboxes (`/etc/husk/config.toml`) and what a user configures for one sandbox
//! (the `io.husk.` annotations). Parses and validates both, and reports every problem at once. Whether the host has
//! what the configuration names is checked in `prepare/host.rs`.
//!
//! | file               | content                                                                  |
//! |--------------------|--------------------------------------------------------------------------|
//! | `load.rs`          | reads the configuration file                                             |
//! | `keys.rs`          | its keys                                                                 |
//! | `settings.rs`      | the configuration as values, with defaults                               |
//! | `values.rs`        | checks of single values                                                  |
//! | `ids.rs`           | the user IDs that VMs may have                                           |
//! | `kernel_params.rs` | the kernel parameters that an operator may set                           |
//! | `artifacts.rs`     | finds the guest's kernel and initramfs                                   |
//! | `annotations.rs`   | reads the annotations                                                    |
//! | `extras/`          | the annotations about extras                                             |
//! | `ports.rs`         | the annotation with port mappings                                        |
//! | `verity.rs`        | the root hash of a disk                                                  |
//! | `volumes.rs`       | the annotation with volumes                                              |
//! | `workspace.rs`     | the annotation with the workspace configuration                          |
//! | `names.rs`         | paths, and the names of the annotations                                  |
//! | `problem.rs`       | a problem with a key or an annotation                                    |

pub(crate) mod annotations;
pub(crate) mod artifacts;
#[cfg(test)]
mod example_tests;
pub mod extras;
pub mod ids;
pub(crate) mod kernel_params;
pub(crate) mod keys;
pub mod load;
pub(crate) mod names;
pub(crate) mod ports;
pub mod problem;
pub mod settings;
pub(crate) mod values;
pub(crate) mod verity;
pub(crate) mod volumes;
pub(crate) mod workspace;
