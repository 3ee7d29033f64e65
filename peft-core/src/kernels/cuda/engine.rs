//! Work of our own on a GPU, in order with cubecl's.
//!
//! A closure runs on cubecl's device thread with the addresses of some of its buffers and enqueues kernels and matrix
//! products on a stream of our own. Events order it: the stream waits for everything that the context has enqueued
//! before, and the context waits for the stream before it runs anything later. So buffers may be handed back and forth, and
//! cubecl may reuse one as soon as its last handle is gone.

use super::cublaslt::{CublasLt, Product, WORKSPACE};
use super::error::{self, Fault};
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::Client;
use cubecl::cuda::CudaRuntime;
use cubecl::device::DeviceId;
use cubecl::device_handle::DeviceHandle;
use cubecl::server::{Handle, ServerStorage};
use cubecl_environment::stream::StreamId;
use cubecl_runtime::runtime::Runtime;
use cudarc::driver::{result, sys};
use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, OnceLock, PoisonError};

type Server = <CudaRuntime as Runtime>::Server;

/// CUDA C and the constants that it is compiled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    /// The text.
    pub code: &'static str,
    /// A constant that it is compiled with.
    pub constant: Option<(&'static str, usize)>,
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
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
#[derive(Default)]
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

    /// A `long long`.
    pub fn long(self, value: usize) -> Self {
        self.words(&[value as u64])
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

/// Buffers that work is given, by their place among the addresses.
#[derive(Default)]
pub struct Buffers(Vec<Handle>);

impl Buffers {
    /// Adds one; returns its place.
    pub fn add(&mut self, tensor: &CubeTensor) -> usize {
        self.0.push(tensor.handle.clone());
        self.0.len() - 1
    }

    /// All of them.
    pub fn handles(&self) -> Vec<&Handle> {
        self.0.iter().collect()
    }
}

/// What the closures enqueue work on.
pub struct Queue {
    context: sys::CUcontext,
    stream: sys::CUstream,
    before: sys::CUevent,
    after: sys::CUevent,
    workspace: u64,
    cublas: CublasLt,
    functions: HashMap<(Source, &'static str), sys::CUfunction>,
    constants: HashMap<(Source, &'static str), Vec<i32>>,
    modules: HashMap<Source, sys::CUmodule>,
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
                cublas: CublasLt::new(library)?,
                functions: HashMap::new(),
                constants: HashMap::new(),
                modules: HashMap::new(),
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
        if product.m == 0 || product.n == 0 {
            return Ok(());
        }
        let (workspace, stream) = (self.workspace, self.stream.cast());
        // SAFETY: the addresses are those of buffers that the closure was given.
        unsafe { self.cublas.enqueue(product, alpha, a, b, beta, d, c, workspace, stream) }
    }

    /// Enqueues a kernel.
    pub fn launch(
        &mut self,
        source: Source,
        name: &'static str,
        launch: Launch,
        mut arguments: Arguments,
    ) -> Result<(), Fault> {
        let Launch { grid, block, shared } = launch;
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return Ok(());
        }
        let function = self.function(source, name)?;
        let Arguments { words, starts } = &mut arguments;
        let mut pointers: Vec<*mut c_void> =
            starts.iter().map(|start| (&raw mut words[*start]).cast()).collect();
        let grid = (grid.0 as u32, grid.1 as u32, grid.2 as u32);
        let block = (block.0 as u32, block.1 as u32, 1);
        // SAFETY: the arguments are what the kernel of that name takes, on buffers that the closure was given.
        unsafe {
            result::launch_kernel(function, grid, block, shared as u32, self.stream, &mut pointers)
                .map_err(|error| Fault(format!("CUDA: launch of {name}: {error}")))
        }
    }

    fn module(&mut self, source: Source) -> Result<sys::CUmodule, Fault> {
        if let Some(module) = self.modules.get(&source) {
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
        self.modules.insert(source, module);
        Ok(module)
    }

    /// The `int`s that a kernel of one thread writes.
    pub fn numbers<const N: usize>(&mut self, source: Source, name: &'static str) -> Result<[i32; N], Fault> {
        if !self.constants.contains_key(&(source, name)) {
            let mut values = vec![0i32; N];
            self.launch(source, name, Launch::new(1, 1), Arguments::default().address(self.workspace))?;
            // SAFETY: the workspace is larger, and nothing else uses it until the stream is idle.
            unsafe {
                result::stream::synchronize(self.stream)?;
                sys::cuMemcpyDtoH_v2(values.as_mut_ptr().cast(), self.workspace, 4 * N).result()?;
            }
            self.constants.insert((source, name), values);
        }
        let values = self.constants.get(&(source, name)).and_then(|values| values.as_slice().try_into().ok());
        values.ok_or_else(|| Fault(format!("{name} does not write {N} numbers")))
    }

    fn function(&mut self, source: Source, name: &'static str) -> Result<sys::CUfunction, Fault> {
        if let Some(function) = self.functions.get(&(source, name)) {
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
            function
        };
        self.functions.insert((source, name), function);
        Ok(function)
    }

    /// Runs `work` between the two events.
    fn ordered(
        &mut self,
        work: impl FnOnce(&mut Self, &[u64]) -> Result<(), Fault>,
        addresses: &[u64],
    ) -> Result<(), Fault> {
        // SAFETY: events and stream are of this context, which is current on cubecl's thread.
        unsafe {
            sys::cuCtxRecordEvent(self.context, self.before).result()?;
            let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            result::stream::wait_event(self.stream, self.before, flags)?;
            let outcome = work(self, addresses);
            result::event::record(self.after, self.stream)?;
            sys::cuCtxWaitEvent(self.context, self.after).result()?;
            outcome
        }
    }
}

/// Bytes of the device's memory that nobody uses, and all of them.
pub fn memory(client: &Client) -> Option<(u64, u64)> {
    let device = DeviceHandle::<Server>::new(client.service_id().device);
    // cubecl's thread has the device's context.
    let (free, total) = device.submit_blocking(|_| result::mem_get_info().ok()).ok().flatten()?;
    Some((free as u64, total as u64))
}

/// Enqueues `work` on the device of `client`; it is given the addresses of `buffers`, in their order. What goes wrong is
/// reported to [`error::first`].
pub fn submit(
    client: &Client,
    buffers: &[&Handle],
    work: impl FnOnce(&mut Queue, &[u64]) -> Result<(), Fault> + Send + 'static,
) {
    let Some(library) = library() else { return };
    let stream = StreamId::current();
    let device = client.service_id().device;
    let bindings: Vec<_> = buffers.iter().map(|handle| (*handle).clone().binding()).collect();
    DeviceHandle::<Server>::new(device).submit(move |server| {
        let run = || -> Result<(), Fault> {
            let mut resources = Vec::with_capacity(bindings.len());
            for binding in bindings {
                let resource = server.get_resource(binding, stream);
                resources.push(resource.map_err(|error| Fault(format!("CUDA: {error:?}")))?);
            }
            let addresses: Vec<u64> = resources.iter().map(|resource| resource.resource().ptr).collect();
            let mut queues = QUEUES.lock().unwrap_or_else(PoisonError::into_inner);
            let queues = queues.get_or_insert_default();
            let queue = match queues.entry(device) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::hash_map::Entry::Vacant(entry) => entry.insert(Queue::new(library)?),
            };
            queue.ordered(work, &addresses)
        };
        if let Err(fault) = run() {
            error::report(fault);
        }
    });
}
