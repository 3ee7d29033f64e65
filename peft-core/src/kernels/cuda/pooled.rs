//! Memory for what the kernels write.
//!
//! cubecl looks through all that its pool holds whenever it is asked for memory, which takes its thread longer than a launch
//! does. So what results let go is kept here, by size. It is free as soon as its last tensor is gone, even while work that
//! reads it is under way: what comes into it next is written by the engine, whose work runs after all that was enqueued
//! before.

use crate::kernels::pool::{Memory, Pool};
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::Client;
use cubecl::device::DeviceId;
use cubecl::server::Handle;
use std::cell::RefCell;
use std::collections::HashMap;

impl Memory for Handle {
    fn is_free(&self) -> bool {
        // But for cubecl's own.
        self.can_mut()
    }
}

thread_local! {
    /// Of each device. cubecl's streams are a thread's, too.
    static POOLS: RefCell<HashMap<DeviceId, Pool<Handle>>> = RefCell::default();
}

/// `bytes` for what work of the engine's writes, not filled.
pub fn block(client: &Client, bytes: usize) -> Handle {
    if bytes == 0 {
        return client.empty(0);
    }
    POOLS.with_borrow_mut(|pools| {
        pools.entry(client.service_id().device).or_default().take(bytes, |bytes| client.empty(bytes))
    })
}

/// Whether nobody else has the tensor.
pub fn is_alone(tensor: &CubeTensor) -> bool {
    let handle = &tensor.handle;
    let same = |kept: &Handle| kept.memory.descriptor() == handle.memory.descriptor();
    let without = |kept: Handle| {
        drop(kept);
        let alone = tensor.can_mut();
        let mut whole = handle.clone();
        (whole.offset_start, whole.offset_end) = (None, None);
        (whole, alone)
    };
    tensor.can_mut()
        || POOLS.with_borrow_mut(|pools| {
            let pool = pools.get_mut(&tensor.client.service_id().device)?;
            pool.aside(handle.size() as usize, same, without)
        }) == Some(true)
}

/// Gives back what no one used since the last call.
pub fn trim() {
    POOLS.with_borrow_mut(|pools| pools.values_mut().for_each(Pool::trim));
}
