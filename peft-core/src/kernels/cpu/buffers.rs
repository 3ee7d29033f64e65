//! Memory that is used again: a fresh large allocation costs a page fault for every 4 KiB on first touch, as long as
//! computing its contents takes. Blocks come back to the pool when their [`Buffer`] is dropped.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Blocks start on a cache line.
const ALIGN: usize = 64;
/// Blocks from this size on ask for huge pages.
const HUGE: usize = 4 << 20;

static POOL: Mutex<Pool> = Mutex::new(Pool { idle: BTreeMap::new(), epoch: 0 });

/// The idle blocks by their size, and the count of trims.
struct Pool {
    idle: BTreeMap<usize, Vec<Block>>,
    epoch: u64,
}

impl Pool {
    /// Frees blocks that no one took since the last trim, the largest first, until `bytes` are free or none is left: a
    /// step of other sizes than the one before does not hold the blocks of both.
    fn make_room(&mut self, bytes: usize) {
        let (mut freed, epoch) = (0, self.epoch);
        for (size, blocks) in self.idle.iter_mut().rev() {
            blocks.retain(|block| {
                let keep = block.epoch == epoch || freed >= bytes;
                freed += if keep { 0 } else { *size };
                keep
            });
        }
    }

    /// Frees the idle blocks that no one took since the last call.
    fn trim(&mut self) {
        let epoch = self.epoch;
        self.epoch += 1;
        for blocks in self.idle.values_mut() {
            blocks.retain(|block| block.epoch == epoch);
        }
        self.idle.retain(|_, blocks| !blocks.is_empty());
    }
}

/// A block of initialised memory.
struct Block {
    base: *mut u8,
    /// Usable bytes, `ALIGN` more are allocated.
    size: usize,
    /// Trims up to its last use.
    epoch: u64,
}

// SAFETY: a block is owned memory.
unsafe impl Send for Block {}
// SAFETY: as above; nothing of it is shared but through slices.
unsafe impl Sync for Block {}

impl Block {
    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size + ALIGN, 16).unwrap_or_else(|_| panic!("a buffer of {size} bytes"))
    }

    /// A block of zeros: for large sizes the allocator hands out untouched pages.
    fn new(size: usize) -> Self {
        let layout = Self::layout(size);
        // SAFETY: the size is not zero.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        #[cfg(target_os = "linux")]
        if size >= HUGE {
            const PAGE: usize = 4096;
            let skipped = base.align_offset(PAGE);
            // SAFETY: whole pages inside the allocation; the advice does not change their contents.
            unsafe {
                libc::madvise(base.add(skipped).cast(), (size - skipped) & !(PAGE - 1), libc::MADV_HUGEPAGE)
            };
        }
        Self { base, size, epoch: 0 }
    }

    fn start(&self) -> *mut f32 {
        self.base.wrapping_add(self.base.align_offset(ALIGN)).cast()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { dealloc(self.base, Self::layout(self.size)) }
    }
}

fn pool() -> MutexGuard<'static, Pool> {
    // A panic elsewhere leaves the pool's lists whole.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The size served for `bytes`: at most an eighth more.
fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(4096);
    bytes.next_multiple_of(1 << (bytes.ilog2() - 3))
}

/// `len` numbers on a cache line, with whatever values they had in their last use.
pub(crate) struct Buffer {
    /// Absent only while dropping.
    block: Option<Block>,
    start: *mut f32,
    len: usize,
}

// SAFETY: owned memory.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for Buffer {}

/// Takes `len` numbers of arbitrary value out of the pool.
pub(crate) fn take(len: usize) -> Buffer {
    let size = size_class(len * size_of::<f32>());
    let mut pool = pool();
    let epoch = pool.epoch;
    let fitting = pool.idle.range_mut(size..=size + size / 4).find(|(_, blocks)| !blocks.is_empty());
    let block = fitting.and_then(|(_, blocks)| blocks.pop());
    if block.is_none() {
        pool.make_room(size);
    }
    drop(pool);
    let mut block = block.unwrap_or_else(|| Block::new(size));
    block.epoch = epoch;
    Buffer { start: block.start(), block: Some(block), len }
}

/// Frees the idle blocks that no one took since the last call: to be called once a training step, it bounds the pool
/// by what a step needs.
pub(crate) fn trim() {
    #[cfg(test)]
    let _turn = tests::untrimmed();
    pool().trim();
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            pool().idle.entry(block.size).or_default().push(block);
        }
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: the block holds `len` initialised numbers.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and the block is ours alone.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// While it is held no other test trims the pool, which they share. Sizes that they do not take are left to be chosen.
    pub(crate) fn untrimmed() -> MutexGuard<'static, ()> {
        static TURN: Mutex<()> = Mutex::new(());
        TURN.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[test]
    fn classes_hold_their_bytes() {
        for bytes in [1, 4096, 4097, 5000, 1 << 20, (1 << 20) + 1, 123_456_789] {
            let class = size_class(bytes);
            assert!(class >= bytes && (class <= bytes + bytes / 8 || class == 4096), "{bytes}: {class}");
            assert_eq!(size_class(class), class);
        }
    }

    #[test]
    fn blocks_come_back_and_are_trimmed() {
        let (_turn, len) = (untrimmed(), 777_777);
        let mut buffer = take(len);
        assert_eq!(buffer.as_ptr().align_offset(ALIGN), 0);
        buffer[len - 1] = 5.0;
        let start = buffer.as_ptr();
        drop(buffer);
        let again = take(len);
        assert_eq!((again.as_ptr(), again[len - 1], again.len()), (start, 5.0, len));
        let held = |len: usize| pool().idle.get(&size_class(len * 4)).map_or(0, Vec::len);
        drop(again);
        pool().trim();
        assert_eq!(held(len), 1, "used since the last trim");
        // Something larger than all that is idle takes the room of what was not used since.
        drop(take(64 * len));
        assert_eq!(held(len), 0, "in the way");
        drop((take(len), take(len + len / 2)));
        pool().trim();
        pool().trim();
        assert_eq!(held(len), 0, "not used since the last trim");
    }
}
