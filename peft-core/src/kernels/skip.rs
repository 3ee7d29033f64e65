//! The gradient that passes by a branch.
//!
//! In `y = f(norm(x)) + x` the value `x` gets two gradients. The sum's node comes first in the backward: it leaves its
//! own here, and the norm's node adds it while it writes the other, which saves a pass over both and a third tensor.

use burn::tensor::Tensor;
use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What a norm and the sum behind it share.
#[derive(Clone, Debug, Default)]
pub struct Skip(Arc<Slot>);

#[derive(Debug, Default)]
struct Slot {
    /// Whether a norm will take what is left.
    taken: AtomicBool,
    gradient: Mutex<Option<Box<dyn Any + Send>>>,
}

/// What is added to the result of linear maps.
#[derive(Clone, Debug)]
pub struct Residual {
    /// The value, shaped as the result.
    pub value: Tensor<2>,
    /// Where its gradient may be left, if a norm of the same value will look there.
    pub skip: Option<Skip>,
}

impl Skip {
    /// Promises that the gradient will be taken.
    pub(super) fn expect(&self) {
        self.0.taken.store(true, Ordering::Relaxed);
    }

    /// Leaves a gradient; gives it back where nobody will take it.
    pub(super) fn leave<T: Send + 'static>(&self, gradient: T) -> Option<T> {
        if !self.0.taken.load(Ordering::Relaxed) {
            return Some(gradient);
        }
        let mut slot = self.0.gradient.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_some() {
            return Some(gradient);
        }
        *slot = Some(Box::new(gradient));
        None
    }

    /// What was left.
    pub(super) fn take<T: 'static>(&self) -> Option<T> {
        let left = self.0.gradient.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        left.downcast().ok().map(|gradient| *gradient)
    }
}
