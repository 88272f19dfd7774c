//! Errors of the device and its connections.

use std::io;
use std::time::Duration;

/// Why the device, or a connection through it, failed. Display prints no cause; `source()` returns it.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The operating system refused a resource that the device needs.
    #[error("set up the vsock device")]
    Setup(#[source] io::Error),
    /// The device's thread could not be notified of a new connection.
    #[error("wake the vsock device's thread")]
    Wake(#[source] io::Error),
    /// A socket for a connection could not be created.
    #[error("open a stream for vsock port {port}")]
    Stream {
        /// The port, of the guest or of the host.
        port: u32,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The guest refused the connection, or the device has its maximum of connections.
    #[error("connect to vsock port {0} of the guest: connection refused")]
    Refused(u32),
    /// The guest did not answer before the deadline.
    #[error("connect to vsock port {port} of the guest: no answer within {deadline:?}")]
    TimedOut {
        /// The guest's port.
        port: u32,
        /// The caller's deadline.
        deadline: Duration,
    },
    /// Too many connection requests are queued for the device's thread.
    #[error("too many vsock connection requests are queued")]
    TooMany,
    /// The port already has a listener.
    #[error("listen on vsock port {0} of the host: port is in use")]
    PortInUse(u32),
    /// The device was stopped, or QEMU has closed its connection.
    #[error("the vsock device is closed")]
    Closed,
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn causes_are_returned_and_not_printed() {
        let cause = || io::Error::from(io::ErrorKind::PermissionDenied);
        let errors =
            [VsockError::Setup(cause()), VsockError::Wake(cause()), VsockError::Stream { port: 1, source: cause() }];
        for error in errors {
            let cause = error.source().map(ToString::to_string);
            assert_eq!(cause.as_deref(), Some("permission denied"), "{error}");
            assert!(!error.to_string().contains("permission denied"), "{error}");
        }
    }
}
