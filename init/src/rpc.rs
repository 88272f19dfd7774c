//! The border between a call and what serves it: panics and hang-ups end here.

use std::panic::AssertUnwindSafe;

use futures::FutureExt;

use crate::error::{Error, Kind};

/// What a handler gives back to ttrpc.
pub type Answer<T> = ttrpc::Result<T>;

/// Runs a call that changes something to its end, whatever becomes of the connection: ttrpc drops the handlers of one that has ended, and a
/// create dropped half-way would leave its half. A panic becomes an error.
pub async fn finish<T: Send + 'static>(call: impl Future<Output = Result<T, Error>> + Send + 'static) -> Answer<T> {
    match tokio::spawn(call).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(panicked().into()),
    }
}

/// Runs a call that may be dropped at any time. A panic becomes an error.
pub async fn answer<T>(call: impl Future<Output = Result<T, Error>>) -> Answer<T> {
    match AssertUnwindSafe(call).catch_unwind().await {
        Ok(result) => Ok(result?),
        Err(_) => Err(panicked().into()),
    }
}

fn panicked() -> Error {
    Error::new(Kind::Internal, "the handler panicked; its message is on the guest's console")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_handler_that_panics_is_answered_for() {
        for answered in [finish(async { panic!("one") }).await, answer(async { panic!("two") }).await] {
            let answered: Answer<()> = answered;
            assert!(matches!(answered, Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::INTERNAL));
        }
    }

    #[tokio::test]
    async fn a_change_goes_on_when_its_caller_hangs_up() {
        let (told, hears) = tokio::sync::oneshot::channel();
        let call = finish(async move {
            tokio::task::yield_now().await;
            // The caller is gone by now, and with it whoever would hear of an error here.
            let _ = told.send(());
            Ok(())
        });
        assert!(call.now_or_never().is_none());
        assert_eq!(hears.await, Ok(()));
    }
}
