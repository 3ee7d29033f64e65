//! What work is enqueued on: a stream of our own, with the library of products and the kernels that are loaded.

use super::commands::{Arguments, Command, Function, Graph, Launch, Source, SourceKey};
use super::cublaslt::{CublasLt, Product, WORKSPACE};
use super::error::Fault;
use crate::kernels::repeats::{Coming, Repeats};
use cudarc::driver::{result, sys};
use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_void};
use std::time::{Duration, Instant};

/// What a closure does with the queue and the addresses of its buffers.
pub type Job = Box<dyn FnOnce(&mut Queue, &[u64]) -> Result<(), Fault> + Send>;

/// Fewer commands cost the host no more than a graph costs the device.
const FEWEST_OF_GRAPH: usize = 4;

/// The device waits for us, or soon will, while at most so many works are left of those it was handed: where it waits for
/// each, it is often not through with the last one when the next is ready.
const LAG: usize = 4;

/// Counters that kernels share; they run one after another.
pub const COUNTERS: usize = 4096;

/// What the closures enqueue work on.
pub struct Queue {
    context: sys::CUcontext,
    stream: sys::CUstream,
    before: sys::CUevent,
    /// What the device passes after each of the last works.
    after: [sys::CUevent; LAG],
    /// Works handed over.
    handed: usize,
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

impl Queue {
    /// On the current context.
    pub fn new(library: &'static libloading::Library) -> Result<Self, Fault> {
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
                after: {
                    let mut events = [std::ptr::null_mut(); LAG];
                    for slot in &mut events {
                        *slot = event()?;
                    }
                    events
                },
                handed: 0,
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

    /// Hands what was enqueued to the device: as a graph if it is near and was told the same before, else command by
    /// command, which the device runs more closely one after another.
    fn hand_over(&mut self) -> Result<(), Fault> {
        let commands = std::mem::take(&mut self.commands);
        if !self.records || commands.len() < FEWEST_OF_GRAPH || !self.is_near() {
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

    /// Whether the device is at most [`LAG`] works behind.
    fn is_near(&self) -> bool {
        // SAFETY: the event is of this context.
        unsafe { sys::cuEventQuery(self.after[self.handed % LAG]) == sys::CUresult::CUDA_SUCCESS }
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
    pub fn scratch(&mut self, bytes: usize) -> Result<u64, Fault> {
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
    pub fn ordered(&mut self, jobs: Vec<(&'static str, Vec<u64>, Job)>) -> Result<(), Fault> {
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
            let after = self.after[self.handed % LAG];
            self.handed += 1;
            result::event::record(after, self.stream)?;
            sys::cuCtxWaitEvent(self.context, after).result()?;
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

    /// Where time went since the last call, as [`profile`](super::engine::profile) tells it.
    pub fn times(&mut self) -> Vec<(&'static str, usize, f64, f64)> {
        let records = self.profile.as_mut().map(std::mem::take).unwrap_or_default();
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
    }
}
