//! What one rendering of a template may spend.
//!
//! The engine counts its steps, but a single step can copy a string of any size, and a value that holds itself twice,
//! forty levels deep, is as large as a disk. So every operation pays here, before it runs, for the bytes it will read and
//! write. One account serves both ends: memory cannot exceed what was paid for, and neither can time.

use std::sync::atomic::{AtomicU64, Ordering};

use minijinja::value::{Object, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

/// The variable that holds the meter. No template can name it.
pub(super) const METER: &str = "<meter>";
/// Levels of lists and maps inside each other; also bounds the native stack of everything that descends into a value.
pub(super) const MAX_DEPTH: usize = 100;
/// The price of a value apart from its text.
const VALUE: usize = 16;

/// Why a rendering was stopped.
#[derive(Debug, thiserror::Error)]
#[error("memory limit")]
pub(super) struct OutOfMemory;

/// The account of one rendering.
#[derive(Debug)]
pub(super) struct Meter {
    left: AtomicU64,
}

impl Object for Meter {}

impl Meter {
    pub(super) fn new(bytes: u64) -> Self {
        Self { left: AtomicU64::new(bytes) }
    }

    /// Pays for `bytes`.
    pub(super) fn charge(&self, bytes: usize) -> Result<(), Error> {
        let bytes = bytes as u64;
        let paid =
            self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes));
        paid.map(drop).map_err(|_| {
            self.left.store(0, Ordering::Relaxed);
            Error::new(ErrorKind::InvalidOperation, "memory limit").with_source(OutOfMemory)
        })
    }

    /// Pays for a value's own text or list of items, without what the items hold.
    pub(super) fn charge_shallow(&self, value: &Value) -> Result<(), Error> {
        self.charge(shallow(value))
    }

    /// Pays for a value with everything in it, as often as it is in it. Every value costs `each` more, and `indent` more
    /// for each level it stands at.
    pub(super) fn charge_deep(&self, value: &Value, each: usize, indent: usize) -> Result<(), Error> {
        self.descend(value, 0, &|value, depth| {
            shallow(value).saturating_add(each).saturating_add(indent * depth)
        })
    }

    /// Refuses lists in lists without end. Texts cost nothing: they are shared, not copied.
    pub(super) fn check_depth(&self, value: &Value) -> Result<(), Error> {
        self.descend(value, 0, &|_, _| VALUE)
    }

    fn descend(
        &self,
        value: &Value,
        depth: usize,
        price: &dyn Fn(&Value, usize) -> usize,
    ) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "values are nested too deep"));
        }
        self.charge(price(value, depth))?;
        match value.kind() {
            ValueKind::Map => {
                for key in value.try_iter()? {
                    self.descend(&value.get_item(&key)?, depth + 1, price)?;
                    self.descend(&key, depth + 1, price)?;
                }
            }
            ValueKind::Seq | ValueKind::Iterable => {
                for item in value.try_iter()? {
                    self.descend(&item, depth + 1, price)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The items of a list, map or text, paid for.
    pub(super) fn items(&self, value: &Value) -> Result<Vec<Value>, Error> {
        if let Some(text) = value.as_str() {
            self.charge(text.len().saturating_mul(2 * VALUE))?;
        }
        let mut items = Vec::new();
        for item in value.try_iter()? {
            self.charge(2 * VALUE)?;
            items.push(item);
        }
        Ok(items)
    }

    /// A value that stands by itself: what would be worked out again at every use, for as long as it is used, is worked
    /// out once and paid for.
    pub(super) fn settle(&self, value: Value) -> Result<Value, Error> {
        match value.kind() {
            ValueKind::Iterable => Ok(Value::from(self.items(&value)?)),
            _ => self.charge_shallow(&value).map(|()| value),
        }
    }
}

/// The meter of the rendering that `state` belongs to.
pub(super) fn meter(state: &State) -> Result<std::sync::Arc<Meter>, Error> {
    state
        .lookup(METER)
        .and_then(|value| value.downcast_object::<Meter>())
        .ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "no meter"))
}

fn shallow(value: &Value) -> usize {
    match value.as_str() {
        Some(text) => VALUE + text.len(),
        None => VALUE.saturating_mul(1 + value.len().unwrap_or(0)),
    }
}
