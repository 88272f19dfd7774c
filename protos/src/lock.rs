//! Locking without poison.

use std::sync::{Mutex, MutexGuard};

/// Locks a mutex. A panic in another holder does not spread: every holder leaves the data consistent before it calls
/// code that may panic.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
