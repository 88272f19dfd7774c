//! Prints an error together with its causes.
//!
//! husk's errors print only their own context and return their cause from [`source()`](Error::source). Code that shows
//! an error to a user, a log or a peer prints it through [`Chain`].

use std::error::Error;
use std::fmt::{self, Display, Formatter};

/// Displays an error and its causes, separated by `: `, outermost first.
///
/// Omits a cause that the text already ends with: some libraries both print their cause and return it.
pub struct Chain<'a>(pub &'a (dyn Error + 'a));

impl Display for Chain<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut text = self.0.to_string();
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let own = error.to_string();
            if text != own && !text.ends_with(&format!(": {own}")) {
                text.push_str(": ");
                text.push_str(&own);
            }
            cause = error.source();
        }
        f.write_str(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number on Linux.
    const EACCES: i32 = 13;

    #[derive(Debug, thiserror::Error)]
    enum Sample {
        #[error("open /x")]
        Open(#[source] std::io::Error),
        #[error("open /x: {0}")]
        Repeats(#[source] std::io::Error),
        #[error("run /opt/start")]
        Suffix(#[source] Box<Sample>),
        #[error("start")]
        Start,
        #[error("start the VM")]
        Nested(#[source] Box<Sample>),
        #[error(transparent)]
        Transparent(Box<Sample>),
        #[error("no cause")]
        Lone,
    }

    #[test]
    fn every_cause_is_printed_once() {
        let denied = || std::io::Error::from_raw_os_error(EACCES);
        let table = [
            (Sample::Open(denied()), "open /x: Permission denied (os error 13)"),
            (Sample::Repeats(denied()), "open /x: Permission denied (os error 13)"),
            (
                Sample::Nested(Box::new(Sample::Repeats(denied()))),
                "start the VM: open /x: Permission denied (os error 13)",
            ),
            (Sample::Transparent(Box::new(Sample::Open(denied()))), "open /x: Permission denied (os error 13)"),
            (Sample::Suffix(Box::new(Sample::Start)), "run /opt/start: start"),
            (Sample::Lone, "no cause"),
        ];
        for (error, expected) in table {
            assert_eq!(Chain(&error).to_string(), expected);
        }
    }
}
