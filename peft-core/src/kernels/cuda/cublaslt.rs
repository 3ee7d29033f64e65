//! Matrix products through cuBLASLt, which is loaded at run time.

use super::error::Fault;
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::null_mut;

type Pointer = *mut c_void;
type Status = i32;

/// Element types by cuBLAS's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Element {
    /// `CUDA_R_32F`.
    F32 = 0,
    /// `CUDA_R_16BF`.
    Bf16 = 14,
}

/// A row-major product `C[m, n] = α·op(A)·op(B) + β·C` whose leading dimensions may be larger than the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Product {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// `A` is stored `[k, m]`, with this distance between rows.
    pub a: (bool, usize),
    /// `B` is stored `[n, k]`, with this distance between rows.
    pub b: (bool, usize),
    /// Distance between the rows of `C`.
    pub c: usize,
    /// Type of `A` and `B`.
    pub input: Element,
    /// Type of `C`.
    pub output: Element,
}

// Numbers of cublasLt.h.
const COMPUTE_32F: i32 = 68;
const DESC_TRANSA: i32 = 3;
const DESC_TRANSB: i32 = 4;
const PREFERENCE_MAX_WORKSPACE: i32 = 1;
/// Of A, B, C and D, in this order.
const PREFERENCE_MIN_ALIGNMENT: [i32; 4] = [5, 6, 7, 8];
/// Bytes of scratch that a product may use.
pub const WORKSPACE: usize = 32 << 20;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Heuristic {
    algorithm: [u64; 8],
    workspace: usize,
    state: i32,
    waves: f32,
    reserved: [i32; 4],
}

type Create = unsafe extern "C" fn(*mut Pointer) -> Status;
type DescriptorCreate = unsafe extern "C" fn(*mut Pointer, i32, i32) -> Status;
type LayoutCreate = unsafe extern "C" fn(*mut Pointer, i32, u64, u64, i64) -> Status;
type SetAttribute = unsafe extern "C" fn(Pointer, i32, *const c_void, usize) -> Status;
type FindHeuristic = unsafe extern "C" fn(
    Pointer,
    Pointer,
    Pointer,
    Pointer,
    Pointer,
    Pointer,
    Pointer,
    i32,
    *mut Heuristic,
    *mut i32,
) -> Status;
type Matmul = unsafe extern "C" fn(
    Pointer,
    Pointer,
    *const c_void,
    *const c_void,
    Pointer,
    *const c_void,
    Pointer,
    *const c_void,
    *const c_void,
    Pointer,
    *mut c_void,
    Pointer,
    *const [u64; 8],
    Pointer,
    usize,
    Pointer,
) -> Status;

/// The library with a handle on the current device, and the plans of all products seen.
pub struct CublasLt {
    handle: Pointer,
    descriptor_create: DescriptorCreate,
    descriptor_set: SetAttribute,
    layout_create: LayoutCreate,
    preference: Pointer,
    preference_set: SetAttribute,
    find_heuristic: FindHeuristic,
    matmul: Matmul,
    plans: HashMap<(Product, Alignments), Plan>,
}

/// Bytes that the addresses of the library's A, B, C and D are multiples of, 256 at most.
type Alignments = [u32; 4];

fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

#[derive(Clone, Copy)]
struct Plan {
    descriptor: Pointer,
    a: Pointer,
    b: Pointer,
    c: Pointer,
    algorithm: [u64; 8],
    workspace: usize,
}

// SAFETY: cuBLASLt's handles and descriptors may be used from any thread; the engine uses them from one at a time.
unsafe impl Send for CublasLt {}

impl CublasLt {
    /// Whether the library can be loaded here.
    pub fn library() -> Result<&'static libloading::Library, Fault> {
        const NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];
        let mut reasons = Vec::new();
        for name in NAMES {
            // SAFETY: cuBLASLt's initialisers have no requirements of their own.
            match unsafe { libloading::Library::new(name) } {
                // It stays loaded as long as the program runs, as its handle does.
                Ok(library) => return Ok(Box::leak(Box::new(library))),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        Err(Fault(format!("cuBLASLt cannot be loaded: {}", reasons.join("; "))))
    }

    /// A handle on the current device.
    pub fn new(library: &'static libloading::Library) -> Result<Self, Fault> {
        fn symbol<T: Copy>(library: &'static libloading::Library, name: &str) -> Result<T, Fault> {
            // SAFETY: the types above are those of cublasLt.h, which has kept them since version 11.
            let symbol = unsafe { library.get::<T>(name.as_bytes()) };
            symbol.map(|symbol| *symbol).map_err(|error| Fault(format!("cuBLASLt lacks {name}: {error}")))
        }
        let create: Create = symbol(library, "cublasLtCreate")?;
        let preference_create: Create = symbol(library, "cublasLtMatmulPreferenceCreate")?;
        let preference_set: SetAttribute = symbol(library, "cublasLtMatmulPreferenceSetAttribute")?;
        let (mut handle, mut preference) = (null_mut(), null_mut());
        let workspace = WORKSPACE as u64;
        // SAFETY: each call gets pointers to values of the types it writes or reads.
        unsafe {
            check(create(&mut handle), "cublasLtCreate")?;
            check(preference_create(&mut preference), "cublasLtMatmulPreferenceCreate")?;
            let value = (&raw const workspace).cast();
            check(
                preference_set(preference, PREFERENCE_MAX_WORKSPACE, value, 8),
                "cublasLtMatmulPreferenceSetAttribute",
            )?;
        }
        Ok(Self {
            handle,
            preference,
            preference_set,
            descriptor_create: symbol(library, "cublasLtMatmulDescCreate")?,
            descriptor_set: symbol(library, "cublasLtMatmulDescSetAttribute")?,
            layout_create: symbol(library, "cublasLtMatrixLayoutCreate")?,
            find_heuristic: symbol(library, "cublasLtMatmulAlgoGetHeuristic")?,
            matmul: symbol(library, "cublasLtMatmul")?,
            plans: HashMap::new(),
        })
    }

    /// The plan for a product: its descriptors and the library's first choice of an algorithm.
    fn plan(&self, product: &Product, alignments: Alignments) -> Result<Plan, Fault> {
        let Product { m, n, k, a, b, c, input, output } = *product;
        let (mut descriptor, mut found) = (null_mut(), 0);
        let mut heuristic = Heuristic::default();
        let layout = |element: Element, rows: usize, columns: usize, leading: usize| {
            let mut layout = null_mut();
            // SAFETY: writes one pointer.
            let status = unsafe {
                (self.layout_create)(&mut layout, element as i32, rows as u64, columns as u64, leading as i64)
            };
            check(status, "cublasLtMatrixLayoutCreate").map(|()| layout)
        };
        // The library counts by columns: what is row-major here is transposed there, so it computes Cᵀ = op(B)ᵀ·op(A)ᵀ.
        let first = if b.0 { layout(input, k, n, b.1)? } else { layout(input, n, k, b.1)? };
        let second = if a.0 { layout(input, m, k, a.1)? } else { layout(input, k, m, a.1)? };
        let result = layout(output, n, m, c)?;
        let (transposes_first, transposes_second) = (i32::from(b.0), i32::from(a.0));
        // SAFETY: each call gets pointers to values of the types it writes or reads.
        unsafe {
            let create = (self.descriptor_create)(&mut descriptor, COMPUTE_32F, Element::F32 as i32);
            check(create, "cublasLtMatmulDescCreate")?;
            for (attribute, value) in [(DESC_TRANSA, transposes_first), (DESC_TRANSB, transposes_second)] {
                let set = (self.descriptor_set)(descriptor, attribute, (&raw const value).cast(), 4);
                check(set, "cublasLtMatmulDescSetAttribute")?;
            }
            for (attribute, value) in PREFERENCE_MIN_ALIGNMENT.into_iter().zip(alignments) {
                let set = (self.preference_set)(self.preference, attribute, (&raw const value).cast(), 4);
                check(set, "cublasLtMatmulPreferenceSetAttribute")?;
            }
            let find = (self.find_heuristic)(
                self.handle,
                descriptor,
                first,
                second,
                result,
                result,
                self.preference,
                1,
                &mut heuristic,
                &mut found,
            );
            check(find, "cublasLtMatmulAlgoGetHeuristic")?;
        }
        if found == 0 {
            return Err(Fault(format!("cuBLASLt has no algorithm for {product:?}")));
        }
        let Heuristic { algorithm, workspace, .. } = heuristic;
        Ok(Plan { descriptor, a: first, b: second, c: result, algorithm, workspace })
    }

    /// Enqueues `C = α·op(A)·op(B) + β·D` with `D` laid out as `C`, which may be the same.
    ///
    /// # Safety
    /// The addresses must be on the current device and hold matrices as `product` says, and `workspace` [`WORKSPACE`]
    /// bytes, until the stream has passed.
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn enqueue(
        &mut self,
        product: &Product,
        alpha: f32,
        a: u64,
        b: u64,
        beta: f32,
        d: u64,
        c: u64,
        workspace: u64,
        stream: Pointer,
    ) -> Result<(), Fault> {
        let key = (*product, [b, a, d, c].map(alignment));
        let plan = match self.plans.get(&key) {
            Some(plan) => *plan,
            None => {
                let plan = self.plan(product, key.1)?;
                self.plans.insert(key, plan);
                plan
            }
        };
        // SAFETY: the caller's promise; the plan was made for this product.
        let status = unsafe {
            (self.matmul)(
                self.handle,
                plan.descriptor,
                (&raw const alpha).cast(),
                b as *const c_void,
                plan.a,
                a as *const c_void,
                plan.b,
                (&raw const beta).cast(),
                d as *const c_void,
                plan.c,
                c as *mut c_void,
                plan.c,
                &plan.algorithm,
                workspace as Pointer,
                plan.workspace,
                stream,
            )
        };
        check(status, "cublasLtMatmul")
    }
}

fn check(status: Status, call: &str) -> Result<(), Fault> {
    match status {
        0 => Ok(()),
        status => Err(Fault(format!("{call} returned status {status}"))),
    }
}
