//! Undoing a step unless what follows succeeds.

/// Runs an action when dropped, unless [`OnFailure::succeeded`] was called.
pub(super) struct OnFailure<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> OnFailure<F> {
    pub(super) fn new(action: F) -> Self {
        Self(Some(action))
    }

    /// Drops the action without running it.
    pub(super) fn succeeded(mut self) {
        self.0 = None;
    }
}

impl<F: FnOnce()> Drop for OnFailure<F> {
    fn drop(&mut self) {
        if let Some(action) = self.0.take() {
            action();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn the_action_runs_only_without_success() {
        let runs = Cell::new(0);
        let count = || OnFailure::new(|| runs.set(runs.get() + 1));
        count().succeeded();
        assert_eq!(runs.get(), 0);
        drop(count());
        assert_eq!(runs.get(), 1);
    }
}
