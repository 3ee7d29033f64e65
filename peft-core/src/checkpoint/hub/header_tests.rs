//! Planning asks for headers alone.
#![allow(clippy::unwrap_used)]

use super::test_server::{COMMIT, TestHub};
use super::tests::options;
use super::*;
use crate::checkpoint::{Dtype, LazyTensor, write_safetensors};
use std::collections::BTreeMap;

/// A safetensors file with one f32 tensor of `rows` times 1000 elements.
fn weights(name: &'static str, rows: usize) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w");
    let bytes = move || Ok(vec![7; rows * 4000].into());
    let tensor = LazyTensor::<CheckpointError>::new(name, Dtype::F32, vec![rows, 1000], bytes);
    write_safetensors(&path, vec![tensor], &BTreeMap::new()).unwrap();
    fs::read(path).unwrap()
}

fn header_bytes(file: &[u8]) -> usize {
    8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize
}

#[test]
fn a_model_is_known_from_its_headers_and_no_weights_are_sent() {
    let file = weights("w", 1000);
    let hub = TestHub::start(&[("config.json", b"{\"a\":1}"), ("model.safetensors", &file)]);
    let (_cache, options) = options(&hub.endpoint);
    let headers = resolve_headers("org/name", &options).unwrap();
    assert_eq!(headers.tensors()["w"].shape, [1000, 1000]);
    assert_eq!(headers.config()["a"], 1);
    assert_eq!(headers.missing_bytes(), file.len() as u64);
    let ranges: Vec<String> =
        hub.take_seen().into_iter().filter(|request| request.starts_with("GET cdn")).collect();
    let last = header_bytes(&file) - 1;
    let of = |range: &str| format!("GET cdn/model.safetensors?Signature=secret bytes={range}");
    assert_eq!(ranges, [of("0-7"), of(&format!("8-{last}"))]);
    assert_eq!(hub.state.lock().unwrap().sent, header_bytes(&file));
    assert!(hub.state.lock().unwrap().leaked.is_empty());

    // The model is not mistaken for one that is there.
    let offline = HubOptions { offline: true, ..options.clone() };
    let error = resolve_headers("org/name", &offline).unwrap_err().to_string();
    assert!(error.contains("missing"), "{error}");
    resolve("org/name", &options).unwrap();
    hub.state.lock().unwrap().sent = 0;
    for options in [&options, &offline] {
        let headers = resolve_headers("org/name", options).unwrap();
        assert_eq!((headers.missing_bytes(), headers.tensors().len()), (0, 1));
    }
    assert_eq!(hub.state.lock().unwrap().sent, 0);
}

#[test]
fn every_shard_is_asked_and_the_index_is_checked() {
    let (one, two) = (weights("a", 10), weights("b", 20));
    let index: &[u8] = br#"{"weight_map":{"a":"s1.safetensors","b":"s2.safetensors"}}"#;
    let wrong: &[u8] = br#"{"weight_map":{"a":"s1.safetensors","c":"s2.safetensors"}}"#;
    for (index, right) in [(index, true), (wrong, false)] {
        let hub = TestHub::start(&[
            ("config.json", b"{}"),
            (INDEX_FILE, index),
            ("s1.safetensors", &one),
            ("s2.safetensors", &two),
        ]);
        let (_cache, options) = options(&hub.endpoint);
        let headers = resolve_headers("org/name", &options);
        assert_eq!(hub.state.lock().unwrap().sent, header_bytes(&one) + header_bytes(&two));
        match headers {
            Ok(headers) => {
                assert!(right);
                assert_eq!(headers.tensors().keys().collect::<Vec<_>>(), ["a", "b"]);
                assert_eq!(headers.missing_bytes(), (one.len() + two.len()) as u64);
            }
            Err(error) => {
                assert!(!right && matches!(error, CheckpointError::TensorNotInShard { .. }), "{error}");
            }
        }
    }
}

#[test]
fn from_a_server_that_sends_whole_files_the_beginning_is_taken() {
    let file = weights("w", 1000);
    let hub = TestHub::start(&[("config.json", b"{}"), ("model.safetensors", &file)]);
    hub.state.lock().unwrap().whole = true;
    let (cache, options) = options(&hub.endpoint);
    let headers = resolve_headers("org/name", &options).unwrap();
    assert_eq!(headers.missing_bytes(), file.len() as u64);
    // One request, and nothing of it is kept.
    let requests = hub.take_seen().iter().filter(|request| request.starts_with("GET cdn")).count();
    assert_eq!(requests, 1);
    let snapshot = cache.path().join("models--org--name/snapshots").join(COMMIT);
    assert!(!snapshot.join("model.safetensors").exists());
}

#[test]
fn a_header_that_claims_too_much_is_refused_before_it_is_read() {
    for claimed in [u64::MAX, 100_000_001, 2000] {
        let mut file = claimed.to_le_bytes().to_vec();
        file.resize(1000, b' ');
        let hub = TestHub::start(&[("config.json", b"{}"), ("model.safetensors", &file)]);
        let (_cache, options) = options(&hub.endpoint);
        let error = resolve_headers("org/name", &options).unwrap_err();
        assert!(error.is_bad_input(), "{error}");
        assert_eq!(hub.state.lock().unwrap().sent, 8, "{error}");
    }
}
