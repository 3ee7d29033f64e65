//! Work of our own on a GPU, in order with cubecl's.
//!
//! A closure runs on cubecl's device thread with the addresses of some of its buffers and enqueues kernels and matrix
//! products on a stream of our own. Events order it: the stream waits for everything that the context has enqueued
//! before, and the context waits for the stream before it runs anything later. So buffers may be handed back and forth, and
//! cubecl may reuse one as soon as its last handle is gone.

use super::addresses::Addresses;
use super::cublaslt::CublasLt;
use super::error::{self, Fault};
use super::pooled::block;
use super::queue::{Job, Queue};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::cuda::CudaRuntime;
use cubecl::device::DeviceId;
use cubecl::device_handle::DeviceHandle;
use cubecl::server::{BufferBinding, CopyDescriptor, Handle, Server as _};
use cubecl_environment::future::reader::read_sync;
use cubecl_environment::stream::StreamId;
use cubecl_runtime::runtime::Runtime;
use cudarc::driver::result;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

pub(super) type Server = <CudaRuntime as Runtime>::Server;

/// Memory that work is given, by its place among the addresses: buffers of cubecl's, and scratch that is the work's own
/// while it runs.
#[derive(Default)]
pub struct Buffers(Vec<Memory<Handle>>);

/// What an address belongs to.
enum Memory<B> {
    Buffer(B),
    /// Bytes of the queue's scratch.
    Scratch(usize),
}

/// Scratch up to so many bytes is the queue's and stays; more is taken from cubecl's pool, where others may have it after.
const MOST_SCRATCH: usize = 32 << 20;

/// Where scratch begins: at multiples of so many bytes.
const SCRATCH_ALIGNMENT: usize = 256;

impl<const N: usize> From<[&CubeTensor; N]> for Buffers {
    fn from(tensors: [&CubeTensor; N]) -> Self {
        let mut buffers = Self::default();
        for tensor in tensors {
            buffers.add(tensor);
        }
        buffers
    }
}

impl Buffers {
    fn push(&mut self, memory: Memory<Handle>) -> usize {
        self.0.push(memory);
        self.0.len() - 1
    }

    /// Adds one; returns its place.
    pub fn add(&mut self, tensor: &CubeTensor) -> usize {
        self.push(Memory::Buffer(tensor.handle.clone()))
    }

    /// Adds one whose rows lie one after another, which may be a copy.
    pub fn add_rows(&mut self, tensor: &CubeTensor) -> usize {
        if tensor.is_contiguous() {
            return self.add(tensor);
        }
        // cubecl's copy must come after what makes the tensor.
        flush();
        self.add(&into_contiguous(tensor.clone()))
    }

    /// Adds `bytes` that nobody sees but this work, not filled.
    pub fn add_scratch(&mut self, client: &Client, bytes: usize) -> usize {
        match bytes {
            0..=MOST_SCRATCH => self.push(Memory::Scratch(bytes)),
            _ => self.push(Memory::Buffer(block(client, bytes))),
        }
    }
}

/// What works on a device are given.
#[derive(Default)]
struct Engine {
    /// Absent before the first work.
    queue: Option<Queue>,
    addresses: Addresses,
}

static ENGINES: Mutex<Option<HashMap<DeviceId, Engine>>> = Mutex::new(None);

/// cuBLASLt, if it can be loaded here. Without it none of our kernels runs; the user is told once.
fn library() -> Option<&'static libloading::Library> {
    static LIBRARY: OnceLock<Option<&'static libloading::Library>> = OnceLock::new();
    *LIBRARY.get_or_init(|| {
        CublasLt::library()
            .inspect_err(|fault| eprintln!("warning: {}; training falls back to slower kernels", fault.0))
            .ok()
    })
}

/// Whether work of our own can run.
pub fn is_available() -> bool {
    library().is_some()
}

/// Where time went since the last call, if `PEFT_PROFILE` is in the environment: for each kind of work its name, how often
/// it ran, milliseconds of the device and milliseconds that enqueueing it took.
pub fn profile(client: &Client) -> Vec<(&'static str, usize, f64, f64)> {
    let device = client.service_id().device;
    let times = handle(device).submit_blocking(move |_| {
        let mut engines = ENGINES.lock().unwrap_or_else(PoisonError::into_inner);
        let engine = engines.as_mut().and_then(|engines| engines.get_mut(&device));
        engine.and_then(|engine| engine.queue.as_mut()).map(Queue::times).unwrap_or_default()
    });
    times.unwrap_or_default()
}

/// The way to cubecl's thread for a device.
fn handle(device: DeviceId) -> DeviceHandle<Server> {
    thread_local! {
        static HANDLES: RefCell<Vec<(DeviceId, DeviceHandle<Server>)>> = const { RefCell::new(Vec::new()) };
    }
    HANDLES.with_borrow_mut(|handles| match handles.iter().find(|(of, _)| *of == device) {
        Some((_, handle)) => handle.clone(),
        None => {
            let handle = DeviceHandle::new(device);
            handles.push((device, handle.clone()));
            handle
        }
    })
}

/// Bytes of the device's memory that nobody uses, and all of them.
pub fn memory(client: &Client) -> Option<(u64, u64)> {
    let device = handle(client.service_id().device);
    // cubecl's thread has the device's context.
    let (free, total) = device.submit_blocking(|_| result::mem_get_info().ok()).ok().flatten()?;
    Some((free as u64, total as u64))
}

/// Asks for the first `count` elements of `size` bytes of a buffer, and returns what waits for them.
pub fn read_later(
    client: &Client,
    buffer: &Handle,
    count: usize,
    size: usize,
) -> impl FnOnce() -> Result<Bytes, Fault> + 'static {
    let (stream, binding) = (StreamId::current(), buffer.clone().binding());
    let wanted = CopyDescriptor::new(binding, [count].into(), [1].into(), size);
    let asked =
        handle(client.service_id().device).submit_blocking(move |server| server.read(vec![wanted], stream));
    move || {
        let asked = asked.map_err(|error| Fault(format!("CUDA: {error:?}")))?;
        let read = read_sync(asked).map_err(|error| Fault(format!("CUDA: {error:?}")))?;
        read.into_iter().next().ok_or_else(|| Fault("CUDA: nothing was read".to_string()))
    }
}

/// Work with the buffers whose addresses it is given.
struct Task {
    label: &'static str,
    memory: Vec<Memory<BufferBinding>>,
    job: Job,
}

thread_local! {
    /// What [`together`] has gathered.
    static GATHERED: RefCell<Option<Vec<(DeviceId, Task)>>> = const { RefCell::new(None) };
}

/// Gathers what `work` submits and hands it to the device at once, between one pair of events. `work` may do nothing with
/// the results but submit more.
pub fn together<R>(work: impl FnOnce() -> R) -> R {
    if GATHERED.with_borrow(Option::is_some) {
        return work();
    }
    GATHERED.set(Some(Vec::new()));
    let result = work();
    flush();
    GATHERED.set(None);
    result
}

/// Hands over what was gathered so far.
pub fn flush() {
    let tasks =
        GATHERED.with_borrow_mut(|gathered| gathered.as_mut().map(std::mem::take)).unwrap_or_default();
    let mut tasks = tasks.into_iter().peekable();
    while let Some((device, task)) = tasks.next() {
        let mut of_device = vec![task];
        while let Some((_, task)) = tasks.next_if(|(other, _)| *other == device) {
            of_device.push(task);
        }
        send(device, of_device);
    }
}

/// Enqueues `work` on the device of `client`; it is given the addresses of `memory`, in their order. What goes wrong is
/// reported to [`error::first`].
pub fn submit(
    label: &'static str,
    client: &Client,
    memory: impl Into<Buffers>,
    work: impl FnOnce(&mut Queue, &[u64]) -> Result<(), Fault> + Send + 'static,
) {
    let device = client.service_id().device;
    let memory = memory.into().0.into_iter().map(|memory| match memory {
        Memory::Buffer(handle) => Memory::Buffer(handle.binding()),
        Memory::Scratch(bytes) => Memory::Scratch(bytes),
    });
    let task = Task { label, memory: memory.collect(), job: Box::new(work) };
    let alone = GATHERED.with_borrow_mut(|gathered| match gathered {
        Some(gathered) => {
            gathered.push((device, task));
            None
        }
        None => Some(task),
    });
    if let Some(task) = alone {
        send(device, vec![task]);
    }
}

fn send(device: DeviceId, tasks: Vec<Task>) {
    let Some(library) = library() else { return };
    let stream = StreamId::current();
    handle(device).submit(move |server| {
        let run = || -> Result<(), Fault> {
            let mut engines = ENGINES.lock().unwrap_or_else(PoisonError::into_inner);
            let Engine { queue, addresses } = engines.get_or_insert_default().entry(device).or_default();
            // Their memory is theirs until the work is enqueued.
            let (mut buffers, mut jobs) = (Vec::new(), Vec::with_capacity(tasks.len()));
            let mut most_scratch = 0;
            for Task { label, memory, job } in tasks {
                let (mut places, mut scratch) = (Vec::with_capacity(memory.len()), 0);
                for memory in memory {
                    places.push(match memory {
                        Memory::Buffer(buffer) => {
                            let address = addresses.of(server, &buffer, stream)?;
                            buffers.push(buffer);
                            Memory::Buffer(address)
                        }
                        Memory::Scratch(bytes) => {
                            let start = scratch;
                            scratch += bytes.next_multiple_of(SCRATCH_ALIGNMENT);
                            Memory::Scratch(start)
                        }
                    });
                }
                most_scratch = most_scratch.max(scratch);
                jobs.push((label, places, job));
            }
            // The context is current on this thread since a buffer was asked for.
            let queue = match queue {
                Some(queue) => queue,
                None => queue.insert(Queue::new(library)?),
            };
            let scratch = queue.scratch(most_scratch)?;
            let address = |memory| match memory {
                Memory::Buffer(address) => address,
                Memory::Scratch(start) => scratch + start as u64,
            };
            let jobs = jobs
                .into_iter()
                .map(|(label, memory, job)| (label, memory.into_iter().map(address).collect(), job))
                .collect();
            queue.ordered(jobs)
        };
        if let Err(fault) = run() {
            error::report(fault);
        }
    });
}
