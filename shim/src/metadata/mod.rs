//! The metadata service: gives a VM a token that proves its identity to others, and its workspace configuration. The
//! caller is identified by the VM that it calls from.
//!
//! | file           | content                                                             |
//! |----------------|---------------------------------------------------------------------|
//! | `key.rs`       | the host's key: created once, read for each token                   |
//! | `token.rs`     | the token (pure)                                                    |
//! | `issuer.rs`    | reads the key, signs tokens and builds responses                    |
//! | `service.rs`   | TTRPC on connections from possibly hostile guests                   |
//! | `one_vm.rs`    | serves the VM of this shim                                          |
//! | `host.rs`      | serves all VMs of a host, on the kernel's vsock device              |
//!
//! Neither the key nor the workspace appears in a log, an error, a kernel command line or `state.json`.

pub mod host;
mod issuer;
pub mod key;
mod one_vm;
pub(crate) mod service;
pub(crate) mod token;

pub use one_vm::MetadataError;
pub(crate) use one_vm::provide;

#[cfg(test)]
mod tests;
