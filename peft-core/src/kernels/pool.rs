//! Memory that results of one size take one after another.
//!
//! A training step asks for the sizes that the one before it asked for, so what is let go waits here for the next result of
//! its size.

use std::collections::BTreeMap;

/// A hold on memory.
pub(super) trait Memory: Clone {
    /// Whether this hold is the last one.
    fn is_free(&self) -> bool;
}

struct Block<M> {
    memory: M,
    /// Trims up to its last use.
    epoch: u64,
}

/// Blocks by their bytes.
pub(super) struct Pool<M> {
    blocks: BTreeMap<usize, Vec<Block<M>>>,
    /// The count of trims.
    epoch: u64,
    /// Whether nothing is left to give back that no one took since the last trim.
    spent: bool,
}

impl<M> Default for Pool<M> {
    fn default() -> Self {
        Self { blocks: BTreeMap::new(), epoch: 0, spent: false }
    }
}

impl<M: Memory> Pool<M> {
    /// Memory of `bytes`: a free block, or else a new one.
    pub fn take(&mut self, bytes: usize, allocate: impl FnOnce(usize) -> M) -> M {
        let epoch = self.epoch;
        let of_size = self.blocks.get_mut(&bytes);
        let free = of_size.and_then(|blocks| blocks.iter_mut().find(|block| block.memory.is_free()));
        if let Some(block) = free {
            block.epoch = epoch;
            return block.memory.clone();
        }
        if !self.spent {
            self.make_room(bytes);
        }
        let memory = allocate(bytes);
        self.blocks.entry(bytes).or_default().push(Block { memory: memory.clone(), epoch });
        memory
    }

    /// Gives back free blocks that no one took since the last trim, the largest first, until they make up `bytes`: a step
    /// of other sizes than the one before does not hold the blocks of both.
    fn make_room(&mut self, bytes: usize) {
        let (mut given, epoch) = (0, self.epoch);
        for (size, blocks) in self.blocks.iter_mut().rev() {
            blocks.retain(|block| {
                let stays = given >= bytes || block.epoch == epoch || !block.memory.is_free();
                given += if stays { 0 } else { *size };
                stays
            });
            if given >= bytes {
                return;
            }
        }
        self.spent = true;
    }

    /// Gives back the free blocks that no one took since the last call.
    pub fn trim(&mut self) {
        let epoch = self.epoch;
        self.blocks.retain(|_, blocks| {
            blocks.retain(|block| block.epoch == epoch || !block.memory.is_free());
            !blocks.is_empty()
        });
        self.epoch += 1;
        self.spent = false;
    }

    /// What `of` says while the block of `bytes` that `is` tells is out of the pool; it returns the block's memory with it.
    pub fn aside<R>(
        &mut self,
        bytes: usize,
        is: impl Fn(&M) -> bool,
        of: impl FnOnce(M) -> (M, R),
    ) -> Option<R> {
        let blocks = self.blocks.get_mut(&bytes)?;
        let place = blocks.iter().position(|block| is(&block.memory))?;
        let Block { memory, epoch } = blocks.remove(place);
        let (memory, said) = of(memory);
        blocks.insert(place, Block { memory, epoch });
        Some(said)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;

    impl Memory for Rc<usize> {
        fn is_free(&self) -> bool {
            Rc::strong_count(self) == 1
        }
    }

    /// A pool whose blocks are numbered.
    #[derive(Default)]
    struct Numbered {
        pool: Pool<Rc<usize>>,
        made: Cell<usize>,
    }

    impl Numbered {
        fn take(&mut self, bytes: usize) -> Rc<usize> {
            let made = &self.made;
            self.pool.take(bytes, |_| Rc::new(made.replace(made.get() + 1)))
        }

        fn held(&self) -> Vec<usize> {
            let mut numbers: Vec<usize> =
                self.pool.blocks.values().flatten().map(|block| *block.memory).collect();
            numbers.sort_unstable();
            numbers
        }
    }

    #[test]
    fn what_is_let_go_serves_the_next_of_its_size() {
        let mut pool = Numbered::default();
        let (first, second) = (pool.take(100), pool.take(100));
        assert_eq!((*first, *second), (0, 1));
        drop(first);
        assert_eq!(*pool.take(101), 2, "another size");
        assert_eq!(*pool.take(100), 0);
        // The one just taken was let go at once.
        let (again, more) = (pool.take(100), pool.take(100));
        assert_eq!((*again, *more, *second), (0, 3, 1));
    }

    #[test]
    fn trims_leave_what_was_used_since_the_last() {
        let mut pool = Numbered::default();
        let kept = pool.take(10);
        drop((pool.take(20), pool.take(30)));
        pool.pool.trim();
        assert_eq!(pool.held(), [0, 1, 2]);
        drop(pool.take(30));
        pool.pool.trim();
        assert_eq!(pool.held(), [0, 2]);
        pool.pool.trim();
        assert_eq!(pool.held(), [*kept]);
    }

    #[test]
    fn blocks_of_another_step_make_room_the_largest_first() {
        let mut pool = Numbered::default();
        let in_use = pool.take(500);
        drop((pool.take(10), pool.take(200), pool.take(300)));
        pool.pool.trim();
        let of_this_step = pool.take(200);
        assert_eq!(*of_this_step, 2);
        drop(of_this_step);
        drop(pool.take(250));
        assert_eq!(pool.held(), [0, 1, 2, 4], "300 made room for 250, 200 is of this step");
        drop(pool.take(600));
        assert_eq!(pool.held(), [0, 2, 4, 5], "10 went too, though it was not enough");
        drop(in_use);
        drop(pool.take(700));
        assert_eq!(pool.held(), [0, 2, 4, 5, 6], "nothing was left to look for");
        pool.pool.trim();
        drop(pool.take(800));
        assert_eq!(pool.held(), [2, 4, 7], "of the step before, 700 and 600 made room");
    }

    #[test]
    fn a_block_set_aside_comes_back_in_its_place() {
        let mut pool = Numbered::default();
        let (first, second) = (pool.take(8), pool.take(8));
        let alone = |of: &Rc<usize>| {
            let copy = of.clone();
            move |memory: Rc<usize>| {
                drop(memory);
                // `of` and the copy are left, and whoever else has it.
                let said = Rc::strong_count(&copy) == 2;
                (copy, said)
            }
        };
        assert_eq!(pool.pool.aside(8, |memory| **memory == 0, alone(&first)), Some(true));
        let other = second.clone();
        assert_eq!(pool.pool.aside(8, |memory| **memory == 1, alone(&second)), Some(false));
        assert_eq!(pool.pool.aside(9, |_| true, alone(&first)), None);
        assert_eq!(pool.pool.aside(8, |memory| **memory == 7, alone(&first)), None);
        drop((first, second, other));
        assert_eq!((*pool.take(8), pool.held()), (0, vec![0, 1]));
    }
}
