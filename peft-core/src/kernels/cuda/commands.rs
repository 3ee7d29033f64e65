//! What the device is told, as data. A list of commands that comes again can be a CUDA graph.
//!
//! Enqueueing a kernel costs the host some microseconds and a matrix product twice that; a graph costs about as much as one
//! kernel, however many it holds, but the device takes some microseconds more to begin it. So it pays while the device
//! waits for the host, or soon will. A training step enqueues what the one before it did, on the same addresses, for results lie in blocks
//! that are kept by size. Commands hold all that the device is told, so lists that are equal do the same.

use super::cublaslt::Product;
use super::error::Fault;
use cudarc::driver::sys;

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
    /// What tells it apart.
    pub fn key(&self) -> SourceKey {
        (self.name, self.constant)
    }
}

/// What tells sources apart; their texts are too long to be compared at every launch.
pub type SourceKey = (&'static str, Option<(&'static str, usize)>);

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
    /// All of them.
    pub words: Vec<u64>,
    /// Where each begins.
    pub starts: Vec<usize>,
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

    /// A `long long`.
    pub fn long(self, value: usize) -> Self {
        self.words(&[value as u64])
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

/// One thing for the device to do.
#[derive(Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// A kernel.
    Kernel { name: &'static str, function: Function, launch: Launch, arguments: Arguments },
    /// `C = α·op(A)·op(B) + β·D`, by the numbers' bits and the matrices' addresses.
    Product { product: Product, alpha: u32, a: u64, b: u64, beta: u32, d: u64, c: u64 },
    /// A copy of so many bytes.
    Copy { from: u64, to: u64, bytes: usize },
}

/// A kernel that is loaded, and stays so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Function(pub sys::CUfunction);

// SAFETY: CUDA's handles may be used from any thread.
unsafe impl Send for Function {}

/// Commands that are enqueued as one.
pub struct Graph(sys::CUgraphExec);

// SAFETY: CUDA's handles may be used from any thread.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: it was made by `record` and goes once; the driver keeps it until launches under way are through.
        unsafe {
            sys::cuGraphExecDestroy(self.0);
        }
    }
}

impl Graph {
    /// What `enqueue` enqueues on `stream`, which is not run.
    ///
    /// # Errors
    /// What `enqueue` or the driver says. The stream is as before then.
    pub fn record(stream: sys::CUstream, enqueue: impl FnOnce() -> Result<(), Fault>) -> Result<Self, Fault> {
        let (mut graph, mut executable) = (std::ptr::null_mut(), std::ptr::null_mut());
        // What the process does on other streams is nobody's business here.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream and what is made of it are alive where they are used, and results are written to variables.
        unsafe {
            sys::cuStreamBeginCapture_v2(stream, mode).result()?;
            let enqueued = enqueue();
            sys::cuStreamEndCapture(stream, &mut graph).result()?;
            let made = enqueued
                .and_then(|()| Ok(sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0).result()?));
            sys::cuGraphDestroy(graph);
            made.map(|()| Self(executable))
        }
    }

    /// Enqueues it.
    pub fn launch(&self, stream: sys::CUstream) -> Result<(), Fault> {
        // SAFETY: both are alive; the buffers are those that the closures were given, on the same addresses as at first.
        unsafe { Ok(sys::cuGraphLaunch(self.0, stream).result()?) }
    }
}
