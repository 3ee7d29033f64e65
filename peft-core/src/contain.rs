//! Panics of other people's code on other people's data.
//!
//! The tokenizers and parquet crates assert, in places, that a file is as they expect. What a file can cause is an error
//! here.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`; a panic in it comes back as its message and is not printed. What `work` changed is then not to be used.
pub(crate) fn contained<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let loud = take_hook();
        set_hook(Box::new(move |info| {
            if !CONTAINED.get() {
                loud(info);
            }
        }));
    });
    let before = CONTAINED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    CONTAINED.set(before);
    result.map_err(|payload| match (payload.downcast_ref::<String>(), payload.downcast_ref::<&str>()) {
        (Some(message), _) => message.clone(),
        (None, Some(message)) => message.to_string(),
        (None, None) => "it panicked".to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::contained;

    #[test]
    fn a_panic_is_its_message() {
        assert_eq!(contained(|| 1), Ok(1));
        assert_eq!(contained(|| -> i32 { panic!("no {}", 7) }), Err("no 7".to_string()));
        assert_eq!(contained(|| -> i32 { panic!("no") }), Err("no".to_string()));
    }
}
