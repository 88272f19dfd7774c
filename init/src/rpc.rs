//! Runs the handler of a call. A panic in a handler becomes an error, and a closed connection does not interrupt a
//! change.

use std::panic::AssertUnwindSafe;

use futures::FutureExt;

use crate::error::{CallError, FailureKind};

/// Runs a handler that changes something. It runs to completion even if its connection closes: ttrpc drops the handlers
/// of a closed connection, and a dropped create would leave half a container behind.
pub(crate) async fn handle_uninterrupted<T: Send + 'static>(
    handler: impl Future<Output = Result<T, CallError>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(handler).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(handler_panicked().into()),
    }
}

/// Runs a handler that may be dropped at any time.
pub(crate) async fn handle<T>(handler: impl Future<Output = Result<T, CallError>>) -> ttrpc::Result<T> {
    match AssertUnwindSafe(handler).catch_unwind().await {
        Ok(result) => Ok(result?),
        Err(_) => Err(handler_panicked().into()),
    }
}

fn handler_panicked() -> CallError {
    CallError::new(FailureKind::Internal, "the handler panicked; its message is on the guest's console")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_in_a_handler_is_returned_as_an_error() {
        for result in [handle_uninterrupted(async { panic!("one") }).await, handle(async { panic!("two") }).await] {
            let result: ttrpc::Result<()> = result;
            assert!(matches!(result, Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::INTERNAL));
        }
    }

    #[tokio::test]
    async fn a_change_completes_after_its_caller_disconnects() {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let call = handle_uninterrupted(async move {
            tokio::task::yield_now().await;
            // The caller is gone; a failed send shows in the assertion below.
            let _ = sender.send(());
            Ok(())
        });
        assert!(call.now_or_never().is_none());
        assert_eq!(receiver.await, Ok(()));
    }
}
