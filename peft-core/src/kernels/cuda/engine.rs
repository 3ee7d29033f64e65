//! Work of our own on a GPU, in order with cubecl's.
//!
//! A closure runs on cubecl's device thread with the addresses of some of its buffers and enqueues kernels and matrix
//! products on a stream of our own. Events order it: the stream waits for everything that the context has enqueued
//! before, and the context waits for the stream before it runs anything later. So buffers may be handed back and forth, and
//! cubecl may reuse one as soon as its last handle is gone.

use super::commands::{Command, Function, Graph};
use super::cublaslt::{CublasLt, Product, WORKSPACE};
use super::error::{self, Fault};
use super::pooled::block;
use crate::kernels::repeats::{Coming, Repeats};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::cuda::CudaRuntime;
use cubecl::device::DeviceId;
use cubecl::device_handle::DeviceHandle;
use cubecl::server::{BufferBinding, CopyDescriptor, Handle, Server as _, ServerStorage};
use cubecl_environment::future::reader::read_sync;
use cubecl_environment::stream::StreamId;
use cubecl_runtime::runtime::Runtime;
use cudarc::driver::{result, sys};
use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_void};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

type Server = <CudaRuntime as Runtime>::Server;

/// CUDA C and the constant that it is compiled with. Two are the same if their names and constants are.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// Its name.
    pub name: &'static str,
    /// The text.
    pub code: &'static str,
    /// A constant.
    pub constant: Option<(&'static str, usize)>,
}

impl Source {
    fn key(&self) -> SourceKey {
        (self.name, self.constant)
    }
}

/// What tells sources apart; their texts are too long to be compared at every launch.
type SourceKey = (&'static str, Option<(&'static str, usize)>);

/// How a kernel is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Launch {
    /// Blocks.
    pub grid: (usize, usize, usize),
    /// Threads of a block.
    pub block: (usize, usize),
    /// Bytes of dynamic shared memory.
    pub shared: usize,
}

impl Launch {
    /// `blocks` blocks of `threads` threads.
    pub fn new(blocks: usize, threads: usize) -> Self {
        Self { grid: (blocks, 1, 1), block: (threads, 1), shared: 0 }
    }
}

/// A kernel's arguments, in order.
#[derive(Debug, Default, PartialEq, Eq, Hash)]
pub struct Arguments {
    words: Vec<u64>,
    starts: Vec<usize>,
}

impl Arguments {
    fn words(mut self, words: &[u64]) -> Self {
        self.starts.push(self.words.len());
        self.words.extend(words);
        self
    }

    /// An address; 0 is none.
    pub fn address(self, address: u64) -> Self {
        self.words(&[address])
    }

    /// An `int`.
    pub fn int(self, value: usize) -> Self {
        self.words(&[u64::from(value as u32)])
    }

    /// A `float`.
    pub fn float(self, value: f32) -> Self {
        self.words(&[u64::from(value.to_bits())])
    }

    /// A structure of whole words.
    pub fn structure(self, words: &[u64]) -> Self {
        self.words(words)
    }
}

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

/// Fewer commands cost the host no more than a graph costs the device.
const FEWEST_OF_GRAPH: usize = 4;

/// Counters that kernels share; they run one after another.
pub const COUNTERS: usize = 4096;

/// What the closures enqueue work on.
pub struct Queue {
    context: sys::CUcontext,
    stream: sys::CUstream,
    before: sys::CUevent,
    after: sys::CUevent,
    workspace: u64,
    /// [`COUNTERS`] zeros.
    counters: u64,
    /// Where scratch is, and its bytes. Works run one after another, so it serves each of them whole.
    scratch: (u64, usize),
    cublas: CublasLt,
    /// What the closures that run want enqueued.
    commands: Vec<Command>,
    graphs: Repeats<Command, Graph>,
    /// Whether lists of commands may become graphs: not on a driver that refused one.
    records: bool,
    functions: HashMap<(SourceKey, &'static str), Function>,
    constants: HashMap<(SourceKey, &'static str), Vec<i32>>,
    modules: HashMap<SourceKey, sys::CUmodule>,
    /// Times of what was enqueued, where they are asked for.
    profile: Option<Vec<(&'static str, sys::CUevent, sys::CUevent, Duration)>>,
    architecture: &'static str,
}

// SAFETY: CUDA's handles may be used from any thread with the context current, and a mutex guards the queue.
unsafe impl Send for Queue {}

static QUEUES: Mutex<Option<HashMap<DeviceId, Queue>>> = Mutex::new(None);

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

impl Queue {
    /// On the current context.
    fn new(library: &'static libloading::Library) -> Result<Self, Fault> {
        use sys::CUdevice_attribute_enum as Attribute;
        let mut context = std::ptr::null_mut();
        // SAFETY: plain calls of the driver with a current context, which cubecl's thread has.
        unsafe {
            sys::cuCtxGetCurrent(&mut context).result()?;
            let mut device = 0;
            sys::cuCtxGetDevice(&mut device).result()?;
            let capability = |attribute| result::device::get_attribute(device, attribute);
            let major = capability(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = capability(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
            Ok(Self {
                context,
                stream: result::stream::create(result::stream::StreamKind::NonBlocking)?,
                before: event()?,
                after: event()?,
                workspace: result::malloc_sync(WORKSPACE)?,
                counters: {
                    let counters = result::malloc_sync(4 * COUNTERS)?;
                    result::memset_d8_sync(counters, 0, 4 * COUNTERS)?;
                    counters
                },
                scratch: (0, 0),
                cublas: CublasLt::new(library)?,
                commands: Vec::new(),
                graphs: Repeats::default(),
                records: true,
                functions: HashMap::new(),
                constants: HashMap::new(),
                modules: HashMap::new(),
                profile: std::env::var_os("PEFT_PROFILE").map(|_| Vec::new()),
                // Hopper's own instructions are behind a name of their own.
                architecture: match (major, minor) {
                    (9, 0) => "compute_90a",
                    _ => format!("compute_{major}{minor}").leak(),
                },
            })
        }
    }

    /// Enqueues a matrix product: `C = α·op(A)·op(B) + β·D`.
    #[allow(clippy::too_many_arguments)]
    pub fn product(
        &mut self,
        product: &Product,
        alpha: f32,
        a: u64,
        b: u64,
        beta: f32,
        d: u64,
        c: u64,
    ) -> Result<(), Fault> {
        if product.m > 0 && product.n > 0 {
            let (alpha, beta) = (alpha.to_bits(), beta.to_bits());
            self.commands.push(Command::Product { product: *product, alpha, a, b, beta, d, c });
        }
        Ok(())
    }

    /// Enqueues a copy of `bytes`.
    pub fn copy(&mut self, from: u64, to: u64, bytes: usize) -> Result<(), Fault> {
        self.commands.push(Command::Copy { from, to, bytes });
        Ok(())
    }

    /// Hands what was enqueued to the device: as a graph if it waits for us and was told the same before, else command by
    /// command, which the device runs more closely one after another.
    fn hand_over(&mut self) -> Result<(), Fault> {
        let commands = std::mem::take(&mut self.commands);
        if !self.records || commands.len() < FEWEST_OF_GRAPH || !self.is_idle() {
            return self.tell(&commands);
        }
        match self.graphs.coming(&commands) {
            Coming::First => {
                self.tell(&commands)?;
                self.graphs.remember(commands, None);
            }
            Coming::Again => match Graph::record(self.stream, || self.tell(&commands)) {
                Ok(graph) => {
                    graph.launch(self.stream)?;
                    self.graphs.remember(commands, Some(graph));
                }
                Err(_) => {
                    self.records = false;
                    self.tell(&commands)?;
                }
            },
            Coming::Made(graph) => graph.launch(self.stream)?,
        }
        Ok(())
    }

    /// Whether the device is through with all that it was handed.
    fn is_idle(&self) -> bool {
        // SAFETY: the event is of this context.
        unsafe { sys::cuEventQuery(self.after) == sys::CUresult::CUDA_SUCCESS }
    }

    /// Tells the device commands one by one.
    fn tell(&mut self, commands: &[Command]) -> Result<(), Fault> {
        for command in commands {
            match command {
                Command::Kernel { name, function, launch, arguments } => {
                    self.launch_now(name, *function, *launch, arguments)?;
                }
                Command::Product { product, alpha, a, b, beta, d, c } => {
                    let (alpha, beta) = (f32::from_bits(*alpha), f32::from_bits(*beta));
                    let (workspace, stream) = (self.workspace, self.stream.cast());
                    // SAFETY: the addresses are those of buffers that the closure was given.
                    unsafe {
                        self.cublas.enqueue(product, alpha, *a, *b, beta, *d, *c, workspace, stream)?;
                    }
                }
                // SAFETY: as above.
                Command::Copy { from, to, bytes } => unsafe {
                    result::memcpy_dtod_async(*to, *from, *bytes, self.stream)?;
                },
            }
        }
        Ok(())
    }

    /// Where `bytes` of scratch are.
    fn scratch(&mut self, bytes: usize) -> Result<u64, Fault> {
        if bytes > self.scratch.1 {
            let size = bytes.next_power_of_two();
            // SAFETY: nothing uses the old one once the stream is idle.
            unsafe {
                result::stream::synchronize(self.stream)?;
                if self.scratch.1 > 0 {
                    result::free_sync(self.scratch.0)?;
                }
                self.scratch = (0, 0);
                self.scratch = (result::malloc_sync(size)?, size);
            }
        }
        Ok(self.scratch.0)
    }

    /// Where [`COUNTERS`] 32-bit zeros stand, which a kernel may change if it leaves zeros.
    pub fn counters(&self) -> u64 {
        self.counters
    }

    /// Enqueues a kernel.
    pub fn launch(
        &mut self,
        source: Source,
        name: &'static str,
        launch: Launch,
        arguments: Arguments,
    ) -> Result<(), Fault> {
        let (x, y, z) = launch.grid;
        if x > 0 && y > 0 && z > 0 {
            let function = self.function(source, name)?;
            self.commands.push(Command::Kernel { name, function, launch, arguments });
        }
        Ok(())
    }

    fn launch_now(
        &self,
        name: &str,
        function: Function,
        launch: Launch,
        arguments: &Arguments,
    ) -> Result<(), Fault> {
        let Launch { grid, block, shared } = launch;
        let Arguments { words, starts } = arguments;
        // The driver only reads them.
        let mut pointers: Vec<*mut c_void> =
            starts.iter().map(|start| (&raw const words[*start]).cast_mut().cast()).collect();
        let grid = (grid.0 as u32, grid.1 as u32, grid.2 as u32);
        let block = (block.0 as u32, block.1 as u32, 1);
        // SAFETY: the arguments are what the kernel of that name takes, on buffers that the closure was given.
        unsafe {
            result::launch_kernel(function.0, grid, block, shared as u32, self.stream, &mut pointers)
                .map_err(|error| Fault(format!("CUDA: launch of {name}: {error}")))
        }
    }

    fn module(&mut self, source: Source) -> Result<sys::CUmodule, Fault> {
        if let Some(module) = self.modules.get(&source.key()) {
            return Ok(*module);
        }
        let options = CompileOptions {
            arch: Some(self.architecture),
            options: source.constant.iter().map(|(name, value)| format!("-D{name}={value}")).collect(),
            ..Default::default()
        };
        let ptx = compile_ptx_with_opts(source.code, options)
            .map_err(|error| Fault(format!("NVRTC: {error:?}")))?;
        let text = CString::new(ptx.to_src()).map_err(|error| Fault(error.to_string()))?;
        // SAFETY: the text is what NVRTC made.
        let module = unsafe { result::module::load_data(text.as_ptr().cast())? };
        self.modules.insert(source.key(), module);
        Ok(module)
    }

    /// The `int`s that a kernel of one thread writes.
    pub fn numbers<const N: usize>(&mut self, source: Source, name: &'static str) -> Result<[i32; N], Fault> {
        if !self.constants.contains_key(&(source.key(), name)) {
            let mut values = vec![0i32; N];
            let (function, arguments) =
                (self.function(source, name)?, Arguments::default().address(self.workspace));
            self.launch_now(name, function, Launch::new(1, 1), &arguments)?;
            // SAFETY: the workspace is larger, and nothing else uses it until the stream is idle.
            unsafe {
                result::stream::synchronize(self.stream)?;
                sys::cuMemcpyDtoH_v2(values.as_mut_ptr().cast(), self.workspace, 4 * N).result()?;
            }
            self.constants.insert((source.key(), name), values);
        }
        let values =
            self.constants.get(&(source.key(), name)).and_then(|values| values.as_slice().try_into().ok());
        values.ok_or_else(|| Fault(format!("{name} does not write {N} numbers")))
    }

    fn function(&mut self, source: Source, name: &'static str) -> Result<Function, Fault> {
        if let Some(function) = self.functions.get(&(source.key(), name)) {
            return Ok(*function);
        }
        let module = self.module(source)?;
        let symbol = CString::new(name).map_err(|error| Fault(error.to_string()))?;
        // SAFETY: the module is loaded; more than the usual shared memory must be allowed before it is asked for.
        let function = unsafe {
            let function = result::module::get_function(module, symbol)?;
            let mut limit = 0;
            let mut device = 0;
            sys::cuCtxGetDevice(&mut device).result()?;
            sys::cuDeviceGetAttribute(
                &mut limit,
                sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
                device,
            )
            .result()?;
            let mut fixed = 0;
            let size = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            sys::cuFuncGetAttribute(&mut fixed, size, function).result()?;
            let dynamic = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            sys::cuFuncSetAttribute(function, dynamic, limit - fixed).result()?;
            Function(function)
        };
        self.functions.insert((source.key(), name), function);
        Ok(function)
    }

    /// Runs jobs between the two events.
    fn ordered(&mut self, jobs: Vec<(&'static str, Vec<u64>, Job)>) -> Result<(), Fault> {
        // SAFETY: events and stream are of this context, which is current on cubecl's thread.
        unsafe {
            sys::cuCtxRecordEvent(self.context, self.before).result()?;
            let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            result::stream::wait_event(self.stream, self.before, flags)?;
            let outcome =
                jobs.into_iter().try_for_each(|(label, addresses, job)| match self.profile.is_some() {
                    false => job(self, &addresses),
                    true => self.timed(label, job, &addresses),
                });
            let outcome = outcome.and_then(|()| self.hand_over());
            self.commands.clear();
            result::event::record(self.after, self.stream)?;
            sys::cuCtxWaitEvent(self.context, self.after).result()?;
            outcome
        }
    }

    /// Runs `work` and remembers when the device did.
    fn timed(&mut self, label: &'static str, work: Job, addresses: &[u64]) -> Result<(), Fault> {
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let (begin, end) = (event()?, event()?);
        let start = Instant::now();
        // SAFETY: the events were made just now, on this context.
        unsafe { result::event::record(begin, self.stream)? };
        work(self, addresses)?;
        let commands = std::mem::take(&mut self.commands);
        self.tell(&commands)?;
        // SAFETY: as above.
        unsafe { result::event::record(end, self.stream)? };
        if let Some(profile) = &mut self.profile {
            profile.push((label, begin, end, start.elapsed()));
        }
        Ok(())
    }
}

/// Where time went since the last call, if `PEFT_PROFILE` is in the environment: for each kind of work its name, how often
/// it ran, milliseconds of the device and milliseconds that enqueueing it took.
pub fn profile(client: &Client) -> Vec<(&'static str, usize, f64, f64)> {
    let device = client.service_id().device;
    let times = handle(device).submit_blocking(move |_| {
        let mut queues = QUEUES.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = queues.as_mut().and_then(|queues| queues.get_mut(&device));
        let records = queue.and_then(|queue| queue.profile.as_mut()).map(std::mem::take).unwrap_or_default();
        let mut times: BTreeMap<&'static str, (usize, f64, f64)> = BTreeMap::new();
        for (label, begin, end, host) in records {
            let sums = times.entry(label).or_default();
            // SAFETY: the events are ours, recorded, and used for the last time.
            unsafe {
                let _ = result::event::synchronize(end);
                sums.1 += result::event::elapsed(begin, end).map_or(0.0, f64::from);
                let _ = result::event::destroy(begin);
                let _ = result::event::destroy(end);
            }
            sums.0 += 1;
            sums.2 += host.as_secs_f64() * 1e3;
        }
        times.into_iter().map(|(label, (count, device, host))| (label, count, device, host)).collect()
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

type Job = Box<dyn FnOnce(&mut Queue, &[u64]) -> Result<(), Fault> + Send>;

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
            let mut queues = QUEUES.lock().unwrap_or_else(PoisonError::into_inner);
            let queues = queues.get_or_insert_default();
            let (mut resources, mut jobs) = (Vec::new(), Vec::with_capacity(tasks.len()));
            let mut most_scratch = 0;
            for Task { label, memory, job } in tasks {
                let (mut addresses, mut scratch) = (Vec::with_capacity(memory.len()), 0);
                for memory in memory {
                    addresses.push(match memory {
                        Memory::Buffer(buffer) => {
                            let resource = server.get_resource(buffer, stream);
                            let resource = resource.map_err(|error| Fault(format!("CUDA: {error:?}")))?;
                            let address = resource.resource().ptr;
                            resources.push(resource);
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
                jobs.push((label, addresses, job));
            }
            // The context is current on this thread once a buffer was asked for.
            let queue = match queues.entry(device) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::hash_map::Entry::Vacant(entry) => entry.insert(Queue::new(library)?),
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
