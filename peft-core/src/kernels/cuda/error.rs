//! What can go wrong on a GPU after the work was accepted.

use std::sync::{Mutex, PoisonError};

/// A failed call of CUDA's.
#[derive(Debug, Clone)]
pub struct Fault(pub String);

impl From<cudarc::driver::DriverError> for Fault {
    fn from(error: cudarc::driver::DriverError) -> Self {
        Self(format!("CUDA: {error}"))
    }
}

static FIRST: Mutex<Option<Fault>> = Mutex::new(None);

/// Remembers a fault of work that nobody waits for.
pub fn report(fault: Fault) {
    FIRST.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(fault);
}

/// The first fault so far.
pub fn first() -> Option<Fault> {
    FIRST.lock().unwrap_or_else(PoisonError::into_inner).clone()
}
