//! The program's allocator.

use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

unsafe extern "C" {
    /// mimalloc's own; the crate exports it only with more features.
    fn mi_collect(force: bool);
}

/// Hands freed memory back to the system, which mimalloc otherwise keeps for a second or more.
pub fn collect() {
    // SAFETY: mimalloc is this program's allocator, and the call may be made at any time from any thread.
    unsafe { mi_collect(true) }
}
