//! Work that blocks.

use crate::sandbox::error::SandboxError;

/// Runs work that may block on a thread for that. `what` names it if the thread ends without a result.
pub(super) async fn blocking<T: Send + 'static, E: Into<SandboxError> + Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, SandboxError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(Into::into),
        Err(error) => Err(SandboxError::Internal(format!("{what}: {error}"))),
    }
}
