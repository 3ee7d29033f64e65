//! What the targets share: files for readers that want paths, parts of one input, and a limit on single allocations.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Stands between the parts of an input that describes several files.
pub const PART: &[u8] = b"\n=====\n";

/// The largest piece of memory that may be asked for at once. No input is longer than a few megabytes, so whoever asks
/// for more trusted a number in a file.
const MAX_ALLOCATION: usize = 1 << 30;

/// The system's allocator, which ends the process when a reader asks for an absurd amount.
struct Watched;

#[global_allocator]
static ALLOCATOR: Watched = Watched;

fn watch(bytes: usize) {
    if bytes > MAX_ALLOCATION {
        eprintln!("one allocation of {bytes} bytes");
        std::process::abort();
    }
}

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        watch(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        watch(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        watch(size);
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        unsafe { System.dealloc(memory, layout) }
    }
}

/// This process's folder for files, under `TMPDIR`.
pub fn scratch() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("peft-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for files");
        folder
    })
}

/// Writes a file into [`scratch`] and returns its path.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = scratch().join(name);
    std::fs::write(&path, bytes).expect("room for a file");
    path
}

/// The `N` parts of an input; those it lacks are empty, and the last one is all that is left.
pub fn parts<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut rest = Some(input);
    std::array::from_fn(|at| {
        let Some(bytes) = rest else { return &[][..] };
        match bytes.windows(PART.len()).position(|window| window == PART) {
            Some(end) if at + 1 < N => {
                rest = Some(&bytes[end + PART.len()..]);
                &bytes[..end]
            }
            _ => {
                rest = None;
                bytes
            }
        }
    })
}

/// Checks an open safetensors file against the format's reference implementation: what is accepted here is accepted
/// there, with the same tensors.
pub fn agrees_with_reference(file: &peft_core::checkpoint::SafetensorsFile, bytes: &[u8]) {
    let reference = safetensors::SafeTensors::deserialize(bytes).expect("the reference accepts it");
    let names: Vec<&str> = file.names().collect();
    assert_eq!(names.len(), reference.len());
    for name in names {
        let tensor = file.tensor(name).expect("a listed tensor");
        let other = reference.tensor(name).expect("the same tensor");
        assert_eq!(tensor.shape, other.shape());
        assert_eq!(tensor.dtype.to_safetensors(), other.dtype());
        assert_eq!(tensor.bytes, other.data());
        assert_eq!(tensor.bytes.len(), tensor.numel() * tensor.dtype.size());
        if let Ok(values) = tensor.to_f32() {
            assert_eq!(values.len(), tensor.numel());
        }
    }
}
