//! The socket's name, and the limits that keep its clients from holding up anybody but themselves.

use std::time::Duration;

/// The socket's name in the sandbox's folder.
pub const SOCKET: &str = "ctl.sock";

/// What a client may use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Bytes in a line, without its end.
    pub line: usize,
    /// Clients at once.
    pub clients: usize,
    /// Between two lines of a client, unless a call is running.
    pub idle: Duration,
    /// For the result of a unary method.
    pub answer: Duration,
    /// For a client to read a line. Long: a client whose user has stopped the terminal or reads in a pager shall not be
    /// disconnected.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            line: 1 << 20,
            clients: 64,
            idle: Duration::from_secs(60),
            answer: Duration::from_secs(10),
            stall: Duration::from_secs(300),
        }
    }
}
