//! What containerd says to `start`, and the form in which it wants the answer.
//!
//! Up to 2.2, containerd passes flags, the environment and an optional `Any` on stdin, and takes a bare address for a shim that
//! speaks version 2 of the Task API, which all of them do. From 2.3 on it sends a `BootstrapParams` on stdin and takes a
//! `BootstrapResult`. An `Any` parses as `BootstrapParams` too (both begin with two strings), so a message counts as the
//! latter only if it names this very shim.

use containerd_shim::bootstrap::{BootstrapParams, BootstrapResult, LogLevel};
use protobuf::{Enum, Message};

/// The form of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// The address and nothing else: Task API version 2.
    Address,
    /// A `BootstrapResult`: version 3.
    Bootstrap,
}

/// What the shim needs to know to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// The task's id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's gRPC socket; its path is part of the shim's socket's name.
    pub grpc_address: String,
    /// containerd's TTRPC socket, for events.
    pub ttrpc_address: String,
    /// Log everything.
    pub debug: bool,
    /// Where to put the shim's socket, if containerd says so.
    pub socket_dir: Option<String>,
    /// The form of the answer.
    pub reply: Reply,
}

/// Why `start` cannot be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// There is no address to send events to.
    #[error(
        "containerd gave no TTRPC address (TTRPC_ADDRESS in the environment, or containerd_ttrpc_address in the bootstrap parameters)"
    )]
    NoTtrpcAddress,
    /// A value is missing.
    #[error("flag -{0} is missing")]
    MissingFlag(&'static str),
}

/// Reads what came by the flags, on stdin and in the environment (`TTRPC_ADDRESS`).
pub fn read(flags: &containerd_shim::Flags, stdin: &[u8], ttrpc_address: Option<String>) -> Result<Start, Error> {
    if flags.id.is_empty() {
        return Err(Error::MissingFlag("id"));
    }
    if flags.namespace.is_empty() {
        return Err(Error::MissingFlag("namespace"));
    }
    let params = BootstrapParams::parse_from_bytes(stdin)
        .ok()
        .filter(|params| params.instance_id == flags.id && params.namespace == flags.namespace);
    let start = match params {
        Some(params) => Start {
            id: params.instance_id,
            namespace: params.namespace,
            grpc_address: params.containerd_grpc_address,
            ttrpc_address: params.containerd_ttrpc_address,
            debug: flags.debug || params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG.value(),
            socket_dir: params.socket_dir.filter(|dir| !dir.is_empty()),
            reply: Reply::Bootstrap,
        },
        None => Start {
            id: flags.id.clone(),
            namespace: flags.namespace.clone(),
            grpc_address: flags.address.clone(),
            ttrpc_address: ttrpc_address.unwrap_or_default(),
            debug: flags.debug,
            socket_dir: None,
            reply: Reply::Address,
        },
    };
    if start.ttrpc_address.is_empty() {
        return Err(Error::NoTtrpcAddress);
    }
    Ok(start)
}

/// The answer to `start`, as it goes to stdout.
///
/// # Errors
///
/// None in practice: encoding fails only on messages of 2 GiB.
pub fn answer(address: &str, reply: Reply) -> Result<Vec<u8>, protobuf::Error> {
    match reply {
        Reply::Address => Ok(address.as_bytes().to_vec()),
        Reply::Bootstrap => BootstrapResult {
            version: containerd_shim_protos::TASK_API_VERSION,
            address: address.to_owned(),
            protocol: "ttrpc".to_owned(),
            ..Default::default()
        }
        .write_to_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::well_known_types::any::Any;

    fn flags() -> containerd_shim::Flags {
        containerd_shim::Flags {
            id: "c1".into(),
            namespace: "default".into(),
            address: "/run/c.sock".into(),
            ..Default::default()
        }
    }

    fn bootstrap(id: &str) -> Vec<u8> {
        BootstrapParams {
            instance_id: id.into(),
            namespace: "default".into(),
            containerd_ttrpc_address: "/run/new.ttrpc".into(),
            containerd_grpc_address: "/run/new.sock".into(),
            socket_dir: Some("/run/sockets".into()),
            ..Default::default()
        }
        .write_to_bytes()
        .unwrap()
    }

    #[test]
    fn the_form_of_the_call_decides_the_form_of_the_answer() {
        let options = Any { type_url: "containerd.runc.v1.Options".into(), value: vec![1, 2], ..Default::default() }
            .write_to_bytes()
            .unwrap();
        let table: &[(&str, Vec<u8>, Reply, &str)] = &[
            ("nothing on stdin", vec![], Reply::Address, "/run/env.ttrpc"),
            ("runtime options on stdin", options, Reply::Address, "/run/env.ttrpc"),
            ("bootstrap parameters", bootstrap("c1"), Reply::Bootstrap, "/run/new.ttrpc"),
            ("somebody else's bootstrap parameters", bootstrap("c2"), Reply::Address, "/run/env.ttrpc"),
            ("no message at all", vec![0xff; 9], Reply::Address, "/run/env.ttrpc"),
        ];
        for (name, stdin, reply, address) in table {
            let start = read(&flags(), stdin, Some("/run/env.ttrpc".into())).unwrap();
            assert_eq!((start.reply, start.ttrpc_address.as_str()), (*reply, *address), "{name}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(read(&flags(), &[], None), Err(Error::NoTtrpcAddress));
        let no_id = containerd_shim::Flags { id: String::new(), ..flags() };
        assert_eq!(read(&no_id, &[], Some("/a".into())), Err(Error::MissingFlag("id")));
    }

    #[test]
    fn answers() {
        assert_eq!(answer("unix:///a", Reply::Address).unwrap(), b"unix:///a");
        let result = BootstrapResult::parse_from_bytes(&answer("unix:///a", Reply::Bootstrap).unwrap()).unwrap();
        assert_eq!((result.version, result.address.as_str(), result.protocol.as_str()), (3, "unix:///a", "ttrpc"));
    }
}
