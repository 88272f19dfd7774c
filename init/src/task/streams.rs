//! Creates the streams of a new process.

use std::sync::Arc;

use super::process::StdioRequest;
use crate::error::CallError;
use crate::io::{ProcessStreams, StreamSet};
use crate::spawn::ChildStreams;

/// A process has the streams that its request names. The others are /dev/null.
pub(super) fn requested(stdio: &StdioRequest) -> StreamSet {
    StreamSet { stdin: !stdio.stdin.is_empty(), stdout: !stdio.stdout.is_empty(), stderr: !stdio.stderr.is_empty() }
}

/// Creates PID 1's and the process's ends of the streams. A terminal's are created together with its process.
pub(super) fn create(stdio: &StdioRequest) -> Result<(Arc<ProcessStreams>, ChildStreams), CallError> {
    if stdio.terminal {
        return Ok((ProcessStreams::terminal(), ChildStreams::default()));
    }
    ProcessStreams::new(requested(stdio)).map_err(|e| CallError::internal("create pipes", &e))
}
