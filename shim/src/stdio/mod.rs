//! A process's standard streams on the host: containerd's addresses for them, and the copies between those and the
//! guest's streams.
//!
//! | file             | content                                                            |
//! |------------------|--------------------------------------------------------------------|
//! | `streams.rs`     | the streams that a request names, and opening its outputs          |
//! | `copy.rs`        | the running copies, one per stream                                 |
//! | `raw.rs`         | how they move bytes on raw streams                                 |
//! | `messages.rs`    | how they move bytes with the guest's TTRPC service                 |
//! | `progress.rs`    | how far an output is                                               |
//! | `destination.rs` | parses addresses                                                   |
//! | `logger.rs`      | logging programs (`binary://`)                                     |
//! | `sink.rs`        | an open output, whatever its kind                                  |
//! | `fifo.rs`        | fifos and pipes                                                    |
//! | `file.rs`        | output files                                                       |
//! | `error.rs`       | why a stream cannot be opened, and why its copy ends early         |

mod copy;
mod destination;
mod error;
mod fifo;
mod file;
mod logger;
mod messages;
mod progress;
mod raw;
mod sink;
mod streams;

use tokio::io::AsyncRead;

pub(crate) use copy::{Input, Output};
pub(crate) use error::StdioError;
pub(crate) use logger::Logger;
pub(crate) use streams::{Outputs, Stdio};

/// Copies what an open raw stream delivers to its end. Returns the number of bytes. For the fuzz target.
pub(crate) async fn deliver_raw(stream: impl AsyncRead + Unpin) -> u64 {
    let progress = progress::Progress::new();
    match raw::deliver(stream, &mut sink::Sink::Nowhere, &progress).await {
        Ok(()) | Err(_) => progress.delivered(),
    }
}

/// Parses the address of an output. For the fuzz target.
pub(crate) fn parse_address(value: &str) {
    let _ = destination::Destination::parse("stdout", value);
}
