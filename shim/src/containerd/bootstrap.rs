//! What containerd passes to `start`, and the reply that it expects.
//!
//! Up to 2.2, containerd passes flags, the environment and an optional `Any` on stdin, and accepts a bare address from
//! shims that serve version 2 of the Task API, which all these releases support. Since 2.3 it sends a `BootstrapParams`
//! on stdin and expects a `BootstrapResult`. An `Any` also parses as `BootstrapParams`, because both begin with two
//! strings, so husk accepts a message as `BootstrapParams` only if it names this shim.

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, Extension, LogLevel};
use protobuf::well_known_types::any::Any;
use protobuf::{Enum, Message};

use crate::containerd::flags::Flags;
use crate::rootfs::plan::{TRANSFORMS, TYPES};

/// The number of `BootstrapResult`'s field `extensions`, which the messages of older versions lack.
const EXTENSIONS: u32 = 6;

/// The form of the reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReplyFormat {
    /// The bare address: Task API version 2.
    Address,
    /// A `BootstrapResult`: version 3.
    Bootstrap,
}

/// The parameters of `start`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct StartParams {
    /// The task's id.
    pub(crate) id: String,
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// containerd's gRPC socket; part of the identity of the shim's socket.
    pub(crate) grpc_address: String,
    /// containerd's TTRPC socket, for events.
    pub(crate) ttrpc_address: String,
    /// Log at debug level.
    pub(crate) debug: bool,
    /// The directory for the shim's socket, if containerd names one.
    pub(crate) socket_dir: Option<String>,
    /// The runtime's options in containerd's configuration, and other extensions.
    pub(crate) options: Vec<Any>,
    /// The form of the reply.
    pub(crate) reply: ReplyFormat,
}

/// A parameter of `start` that is missing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum BootstrapError {
    /// There is no address to send events to.
    #[error(
        "containerd passed no TTRPC address (TTRPC_ADDRESS in the environment, \
         or containerd_ttrpc_address in the bootstrap parameters)"
    )]
    NoTtrpcAddress,
    /// A flag is missing.
    #[error("flag -{0} is missing")]
    MissingFlag(&'static str),
}

/// Combines the flags, stdin and `TTRPC_ADDRESS` of the environment. As in containerd's own shims, the environment and
/// the flags supply the addresses that the bootstrap parameters lack.
///
/// # Errors
/// The first parameter that is missing.
pub(crate) fn read(flags: &Flags, stdin: &[u8], ttrpc_address: Option<String>) -> Result<StartParams, BootstrapError> {
    if flags.id.is_empty() {
        return Err(BootstrapError::MissingFlag("id"));
    }
    if flags.namespace.is_empty() {
        return Err(BootstrapError::MissingFlag("namespace"));
    }
    let params = BootstrapParams::parse_from_bytes(stdin)
        .ok()
        .filter(|params| params.instance_id == flags.id && params.namespace == flags.namespace);
    let or = |given: String, other: &str| if given.is_empty() { other.to_owned() } else { given };
    let ttrpc_address = ttrpc_address.unwrap_or_default();
    let start = match params {
        Some(params) => StartParams {
            id: params.instance_id,
            namespace: params.namespace,
            grpc_address: or(params.containerd_grpc_address, &flags.address),
            ttrpc_address: or(params.containerd_ttrpc_address, &ttrpc_address),
            debug: flags.debug || params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG.value(),
            socket_dir: params.socket_dir.filter(|dir| !dir.is_empty()),
            options: params.extensions.into_iter().filter_map(|extension| extension.value.into_option()).collect(),
            reply: ReplyFormat::Bootstrap,
        },
        None => StartParams {
            id: flags.id.clone(),
            namespace: flags.namespace.clone(),
            grpc_address: flags.address.clone(),
            ttrpc_address,
            debug: flags.debug,
            socket_dir: None,
            options: Any::parse_from_bytes(stdin)
                .ok()
                .filter(|options| !options.type_url.is_empty())
                .into_iter()
                .collect(),
            reply: ReplyFormat::Address,
        },
    };
    if start.ttrpc_address.is_empty() {
        return Err(BootstrapError::NoTtrpcAddress);
    }
    Ok(start)
}

/// containerd's `MountCapabilities`, an extension of the reply since 2.4: the types and transforms of mounts that husk
/// performs itself. Encoded by hand, because the messages of older versions lack it.
fn mount_capabilities() -> Any {
    // repeated string types = 1; repeated string transforms = 2;
    let mut value = Vec::new();
    for (field, names) in [(1_u8, &TYPES[..]), (2, &TRANSFORMS[..])] {
        for name in names {
            // The tag of a field with a length, and a length below 128 (protobuf.dev, "Encoding").
            value.extend([field << 3 | 2, name.len() as u8]);
            value.extend(name.bytes());
        }
    }
    let type_url = "type.googleapis.com/containerd.types.MountCapabilities".to_owned();
    Any { type_url, value, ..Default::default() }
}

/// The same for `-info`, where containerd 2.2 and 2.3 read it.
pub(crate) fn allowed_mounts() -> (String, String) {
    let transforms = TRANSFORMS.iter().map(|transform| format!("{transform}/*"));
    let all: Vec<String> = TYPES.iter().map(ToString::to_string).chain(transforms).collect();
    ("containerd.io/runtime-allow-mounts".to_owned(), all.join(","))
}

/// Encodes the reply to `start` for stdout.
///
/// # Errors
/// None in practice: encoding fails only for messages of 2 GiB.
pub(crate) fn reply(address: &str, format: ReplyFormat) -> Result<Vec<u8>, protobuf::Error> {
    match format {
        ReplyFormat::Address => Ok(address.as_bytes().to_vec()),
        ReplyFormat::Bootstrap => {
            let mut result = BootstrapResult {
                version: containerd_shim_protos::TASK_API_VERSION,
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
                ..Default::default()
            };
            let extension = Extension { value: Some(mount_capabilities()).into(), ..Default::default() };
            let unknown = result.special_fields.mut_unknown_fields();
            unknown.add_length_delimited(EXTENSIONS, extension.write_to_bytes()?);
            result.write_to_bytes()
        }
    }
}

#[cfg(test)]
mod tests {
    use protobuf::UnknownValueRef;

    use super::*;

    fn flags() -> Flags {
        Flags { id: "c1".into(), namespace: "default".into(), address: "/run/c.sock".into(), ..Default::default() }
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
    fn the_form_of_the_call_determines_the_form_of_the_reply() {
        let options = Any { type_url: "containerd.runc.v1.Options".into(), value: vec![1, 2], ..Default::default() }
            .write_to_bytes()
            .unwrap();
        let table: &[(&str, Vec<u8>, ReplyFormat, &str)] = &[
            ("empty stdin", vec![], ReplyFormat::Address, "/run/env.ttrpc"),
            ("runtime options on stdin", options, ReplyFormat::Address, "/run/env.ttrpc"),
            ("bootstrap parameters", bootstrap("c1"), ReplyFormat::Bootstrap, "/run/new.ttrpc"),
            ("another shim's bootstrap parameters", bootstrap("c2"), ReplyFormat::Address, "/run/env.ttrpc"),
            ("no valid message", vec![0xff; 9], ReplyFormat::Address, "/run/env.ttrpc"),
        ];
        for (name, stdin, reply, address) in table {
            let start = read(&flags(), stdin, Some("/run/env.ttrpc".into())).unwrap();
            assert_eq!((start.reply, start.ttrpc_address.as_str()), (*reply, *address), "{name}");
        }
    }

    #[test]
    fn addresses_that_the_parameters_lack_come_from_the_environment_and_the_flags() {
        let params = BootstrapParams { instance_id: "c1".into(), namespace: "default".into(), ..Default::default() };
        let start = read(&flags(), &params.write_to_bytes().unwrap(), Some("/run/env.ttrpc".into())).unwrap();
        assert_eq!(
            (start.reply, start.ttrpc_address.as_str(), start.grpc_address.as_str()),
            (ReplyFormat::Bootstrap, "/run/env.ttrpc", "/run/c.sock")
        );
        let missing = read(&flags(), &params.write_to_bytes().unwrap(), None);
        assert_eq!(missing, Err(BootstrapError::NoTtrpcAddress));
    }

    #[test]
    fn the_runtimes_options_are_found_on_stdin_in_both_forms() {
        let any = Any { type_url: "containerd.runc.v1.Options".into(), value: vec![1, 2], ..Default::default() };
        let mut params = BootstrapParams::parse_from_bytes(&bootstrap("c1")).unwrap();
        params.extensions.push(Extension { value: Some(any.clone()).into(), ..Default::default() });
        let old = any.write_to_bytes().unwrap();
        for stdin in [params.write_to_bytes().unwrap(), old] {
            assert_eq!(read(&flags(), &stdin, Some("/a".into())).unwrap().options, std::slice::from_ref(&any));
        }
        assert_eq!(read(&flags(), &[], Some("/a".into())).unwrap().options, []);
    }

    #[test]
    fn a_missing_parameter_is_named() {
        assert_eq!(read(&flags(), &[], None), Err(BootstrapError::NoTtrpcAddress));
        let no_id = Flags { id: String::new(), ..flags() };
        assert_eq!(read(&no_id, &[], Some("/a".into())), Err(BootstrapError::MissingFlag("id")));
    }

    #[test]
    fn replies() {
        assert_eq!(reply("unix:///a", ReplyFormat::Address).unwrap(), b"unix:///a");
        let bytes = reply("unix:///a", ReplyFormat::Bootstrap).unwrap();
        let result = BootstrapResult::parse_from_bytes(&bytes).unwrap();
        assert_eq!((result.version, result.address.as_str(), result.protocol.as_str()), (3, "unix:///a", "ttrpc"));
        let unknown: Vec<_> = result.special_fields.unknown_fields().iter().collect();
        let [(EXTENSIONS, UnknownValueRef::LengthDelimited(extension))] = unknown[..] else { panic!("{unknown:?}") };
        let extension = Extension::parse_from_bytes(extension).unwrap().value.unwrap();
        assert_eq!(extension.type_url, "type.googleapis.com/containerd.types.MountCapabilities");
        assert_eq!(extension.value, b"\x0a\x05erofs\x0a\x04loop\x12\x06format\x12\x05mkdir\x12\x04mkfs");
        assert_eq!(allowed_mounts().1, "erofs,loop,format/*,mkdir/*,mkfs/*");
    }
}
