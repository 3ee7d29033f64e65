//! Where memory of cubecl's lies on the device.
//!
//! Asking cubecl takes its thread about a microsecond a buffer, and a training step names some thousands. Memory stays where
//! it is while somebody holds it, and its identity is never given to other memory, so one question is enough.

use super::engine::Server;
use super::error::Fault;
use cubecl::server::{BufferBinding, ServerStorage};
use cubecl_environment::stream::StreamId;
use cubecl_runtime::memory_management::{ManagedMemoryId, WeakMemoryBinding};
use std::collections::HashMap;

/// Entries that are kept without a look at which of them still mean something.
const FEWEST_TO_PRUNE: usize = 4096;

/// The addresses of memory seen before.
#[derive(Default)]
pub struct Addresses {
    bases: HashMap<ManagedMemoryId, (WeakMemoryBinding, u64)>,
    /// How many there may be before those of memory that is gone are dropped.
    most: usize,
}

impl Addresses {
    /// The address of a buffer, which the caller keeps until the work on it is enqueued.
    pub fn of(
        &mut self,
        server: &mut Server,
        buffer: &BufferBinding,
        stream: StreamId,
    ) -> Result<u64, Fault> {
        let (id, offset) = (buffer.memory.id(), buffer.offset_start.unwrap_or(0));
        // What another thread of ours made waits for that thread's work, which cubecl sees to when it is asked.
        let own = buffer.stream == stream;
        if let Some((_, base)) = self.bases.get(&id).filter(|_| own) {
            return Ok(base + offset);
        }
        let resource = server.get_resource(buffer.clone(), stream);
        let resource = resource.map_err(|error| Fault(format!("CUDA: {error:?}")))?;
        let address = resource.resource().ptr;
        if own {
            if self.bases.len() >= self.most.max(FEWEST_TO_PRUNE) {
                self.bases.retain(|_, (memory, _)| memory.upgrade().is_some());
                self.most = 2 * self.bases.len();
            }
            self.bases.insert(id, (buffer.memory.downgrade(), address - offset));
        }
        Ok(address)
    }
}
