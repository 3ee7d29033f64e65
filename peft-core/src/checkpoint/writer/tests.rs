#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::sync::atomic::{AtomicUsize, Ordering};

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use thiserror::Error;

use super::*;
use crate::checkpoint::SafetensorsFile;

type Sample = (&'static str, Dtype, Vec<usize>, Vec<u8>);

/// Tensors of several element sizes, out of order, one of them empty and one a scalar.
fn samples() -> Vec<Sample> {
    let bytes = |n: usize| (0..n).map(|i| (i * 7) as u8).collect::<Vec<_>>();
    vec![
        ("b.half", Dtype::F16, vec![3], bytes(6)),
        ("a.byte", Dtype::U8, vec![5], bytes(5)),
        ("z.float", Dtype::F32, vec![2, 2], bytes(16)),
        ("a.bfloat", Dtype::BF16, vec![3, 1], bytes(6)),
        ("a.\"quoted\" é", Dtype::F32, vec![], bytes(4)),
        ("long", Dtype::I64, vec![1], bytes(8)),
        ("empty", Dtype::F32, vec![0, 4], vec![]),
    ]
}

fn lazy(samples: &[Sample]) -> Vec<LazyTensor<'_>> {
    samples
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            LazyTensor::new(*name, *dtype, shape.clone(), move || Ok(Cow::Borrowed(bytes)))
        })
        .collect()
}

fn metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_string(), "pt".to_string())])
}

#[test]
fn the_bytes_are_those_of_the_safetensors_library() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let samples = samples();
    for (ours, theirs) in [
        (metadata(), Some(HashMap::from([("format".to_string(), "pt".to_string())]))),
        (BTreeMap::new(), None),
    ] {
        write_safetensors(&path, lazy(&samples), &ours).unwrap();
        let written = fs::read(&path).unwrap();
        let views = samples.iter().map(|(name, dtype, shape, bytes)| {
            (*name, TensorView::new(dtype.to_safetensors(), shape.clone(), bytes).unwrap())
        });
        assert_eq!(written, safetensors::serialize(views, theirs).unwrap());
        let parsed = SafeTensors::deserialize(&written).unwrap();
        assert_eq!(parsed.len(), samples.len());
    }
    let file = SafetensorsFile::open(&path).unwrap();
    for (name, dtype, shape, bytes) in &samples {
        let tensor = file.tensor(name).unwrap();
        assert_eq!((tensor.dtype, tensor.shape, tensor.bytes), (*dtype, &shape[..], &bytes[..]));
    }
}

#[test]
fn an_empty_file_is_sound() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    write_safetensors::<CheckpointError>(&path, vec![], &BTreeMap::new()).unwrap();
    assert_eq!(fs::read(&path).unwrap(), *b"\x08\0\0\0\0\0\0\0{}      ");
    assert_eq!(SafetensorsFile::open(&path).unwrap().names().count(), 0);
}

#[test]
fn shards_are_laid_out_as_transformers_does() {
    let folder = tempfile::tempdir().unwrap();
    let sizes = [("d", 3), ("a", 4), ("b", 5), ("c", 20), ("e", 7)];
    let tensors = || {
        sizes
            .iter()
            .map(|&(name, size)| {
                LazyTensor::<CheckpointError>::new(name, Dtype::U8, vec![size], move || {
                    Ok(vec![1; size].into())
                })
            })
            .collect()
    };
    // a + b fill 9 of 10, c is too large for any, d + e fill 10.
    let files = write_sharded(folder.path(), tensors(), 10, &metadata()).unwrap();
    assert_eq!(
        files,
        [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json",
        ]
    );
    let index = fs::read_to_string(folder.path().join(&files[3])).unwrap();
    let expected = r#"{
  "metadata": {
    "total_size": 39
  },
  "weight_map": {
    "a": "model-00001-of-00003.safetensors",
    "b": "model-00001-of-00003.safetensors",
    "c": "model-00002-of-00003.safetensors",
    "d": "model-00003-of-00003.safetensors",
    "e": "model-00003-of-00003.safetensors"
  }
}
"#;
    assert_eq!(index, expected);
    let shard = SafetensorsFile::open(folder.path().join(&files[2])).unwrap();
    assert_eq!(shard.names().collect::<Vec<_>>(), ["d", "e"]);
    assert_eq!(shard.metadata()["format"], "pt");

    let files = write_sharded(folder.path(), tensors(), 39, &metadata()).unwrap();
    assert_eq!(files, ["model.safetensors"]);
}

#[derive(Debug, Error)]
enum CallerError {
    #[error("not finite")]
    NotFinite,
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

#[test]
fn the_callers_error_comes_back_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let tensors = vec![
        LazyTensor::new("a", Dtype::U8, vec![1], || Ok(vec![1].into())),
        LazyTensor::new("b", Dtype::U8, vec![1], || Err(CallerError::NotFinite)),
    ];
    let error = write_safetensors(&path, tensors, &BTreeMap::new()).unwrap_err();
    assert!(matches!(error, CallerError::NotFinite));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);

    let tensors = vec![LazyTensor::<CallerError>::new("a", Dtype::F32, vec![2], || Ok(vec![0; 7].into()))];
    let error = write_safetensors(&path, tensors, &BTreeMap::new()).unwrap_err();
    assert!(matches!(
        error,
        CallerError::Checkpoint(CheckpointError::WrongLength { expected: 8, found: 7, .. })
    ));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_full_disk_is_a_failed_write() {
    let samples = samples();
    let mut full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let error = stream(Path::new("x.safetensors"), &mut full, &lazy(&samples), &metadata()).unwrap_err();
    assert!(matches!(error, CheckpointError::WriteFailed { .. }) && !error.is_bad_input());
    assert!(error.to_string().starts_with("x.safetensors: cannot write: No space left"), "{error}");
}

#[test]
fn repeated_reserved_and_overflowing_tensors_are_refused() {
    let path = Path::new("x.safetensors");
    let one = |name: &str, shape: Vec<usize>| {
        LazyTensor::<CheckpointError>::new(name, Dtype::F32, shape, || Ok(Cow::Borrowed(&[][..])))
    };
    assert!(matches!(
        write_safetensors(path, vec![one("a", vec![0]), one("a", vec![0])], &BTreeMap::new()),
        Err(CheckpointError::DuplicateTensor { tensor, .. }) if tensor == "a"
    ));
    assert!(matches!(
        write_safetensors(path, vec![one(METADATA_KEY, vec![0])], &BTreeMap::new()),
        Err(CheckpointError::ReservedName { .. })
    ));
    assert!(matches!(
        write_sharded(Path::new("."), vec![one("a", vec![usize::MAX, 2])], 1, &BTreeMap::new()),
        Err(CheckpointError::SizeOverflow { .. })
    ));
}

#[test]
fn few_tensors_are_computed_ahead() {
    // Counts the bytes written; what is computed but not yet written is at most two windows.
    struct Counting<'a>(&'a AtomicUsize);
    impl Write for Counting<'_> {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.fetch_add(bytes.len(), Ordering::SeqCst);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    const SIZE: usize = 1 << 16;
    let written = AtomicUsize::new(0);
    let computed = AtomicUsize::new(0);
    let most_ahead = AtomicUsize::new(0);
    let tensors: Vec<_> = (0..200)
        .map(|i| {
            LazyTensor::<CheckpointError>::new(format!("t{i:03}"), Dtype::U8, vec![SIZE], || {
                let done = computed.fetch_add(1, Ordering::SeqCst) + 1;
                most_ahead.fetch_max(done - written.load(Ordering::SeqCst) / SIZE, Ordering::SeqCst);
                Ok(vec![0; SIZE].into())
            })
        })
        .collect();
    let path = Path::new("x.safetensors");
    stream(path, &mut Counting(&written), &tensors, &BTreeMap::new()).unwrap();
    assert_eq!(computed.load(Ordering::SeqCst), 200);
    assert!(most_ahead.load(Ordering::SeqCst) <= 2 * rayon::current_num_threads());
}
