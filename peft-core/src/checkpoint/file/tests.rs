#![allow(clippy::unwrap_used)]

use std::fs;

use super::*;

/// A file of that header, padded as given, and `data` bytes.
fn open(header: &str, data: usize) -> Result<SafetensorsFile, CheckpointError> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..data).map(|i| i as u8));
    open_bytes(&bytes)
}

fn open_bytes(bytes: &[u8]) -> Result<SafetensorsFile, CheckpointError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, bytes).unwrap();
    let result = SafetensorsFile::open(&path);
    if let Err(error) = &result {
        let message = error.to_string();
        assert!(message.contains("model.safetensors"), "{message}");
        assert!(error.is_bad_input());
    }
    result
}

/// `name` as four u8 at those offsets.
fn four(name: &str, begin: usize, end: usize) -> String {
    format!(r#""{name}":{{"dtype":"U8","shape":[4],"data_offsets":[{begin},{end}]}}"#)
}

#[test]
fn a_sound_file_opens() {
    let header = format!(
        r#"{{{},"__metadata__":{{"format":"pt"}},"s":{{"dtype":"BF16","shape":[],"data_offsets":[4,6]}},"e":{{"dtype":"F32","shape":[0,7],"data_offsets":[4,4]}}}}   "#,
        four("w", 0, 4)
    );
    let file = open(&header, 6).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["e", "s", "w"]);
    assert_eq!(file.metadata()["format"], "pt");
    let w = file.tensor("w").unwrap();
    assert_eq!((w.dtype, w.shape, w.bytes, w.numel()), (Dtype::U8, &[4][..], &[0, 1, 2, 3][..], 4));
    assert!(matches!(w.to_f32(), Err(CheckpointError::TensorDtype { .. })));
    let s = file.tensor("s").unwrap();
    // Bytes 4 and 5: 0x0504 as bf16 is 0x05040000 as f32.
    assert_eq!(s.to_f32().unwrap(), [f32::from_bits(0x0504_0000)]);
    assert_eq!(file.tensor("e").unwrap().numel(), 0);
    assert!(file.contains("e") && !file.contains("x"));
}

#[test]
fn a_missing_tensor_names_the_nearest() {
    let file = open(&format!("{{{}}}", four("lm_head.weight", 0, 4)), 4).unwrap();
    let message = file.tensor("lm_head.wieght").unwrap_err().to_string();
    assert!(message.contains("did you mean `lm_head.weight`?"), "{message}");
}

#[test]
fn short_and_cut_files_are_refused() {
    assert!(matches!(open_bytes(b""), Err(CheckpointError::TooShort { bytes: 0, .. })));
    assert!(matches!(open_bytes(&[1; 7]), Err(CheckpointError::TooShort { bytes: 7, .. })));
    assert!(matches!(
        open_bytes(&[9, 0, 0, 0, 0, 0, 0, 0, b'{', b'}']),
        Err(CheckpointError::HeaderPastEnd { claimed: 9, available: 2, .. })
    ));
    assert!(matches!(
        open(&format!("{{{}}}", four("w", 0, 4)), 3),
        Err(CheckpointError::TensorPastEnd { end: 4, available: 3, .. })
    ));
}

#[test]
fn a_huge_header_is_refused_by_its_length_alone() {
    let mut bytes = 100_000_001u64.to_le_bytes().to_vec();
    bytes.extend(b"{}");
    assert!(matches!(open_bytes(&bytes), Err(CheckpointError::HeaderTooLong { claimed: 100_000_001, .. })));
    assert!(matches!(open_bytes(&[0xff; 32]), Err(CheckpointError::HeaderTooLong { .. })));
}

#[test]
fn headers_that_are_no_object_of_tensors_are_refused() {
    let cases: [&[u8]; 6] = [
        b"[1]",
        b" {}",
        b"{\"w\":3}",
        b"{\"w\":{\"dtype\":\"U8\",\"shape\":[-1],\"data_offsets\":[0,1]}}",
        b"{\"\xff\":1}",
        b"{",
    ];
    for header in cases {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        assert!(matches!(open_bytes(&bytes), Err(CheckpointError::InvalidHeader { .. })));
    }
}

#[test]
fn a_name_that_appears_twice_is_refused() {
    let header = format!("{{{},{}}}", four("w", 0, 4), four("w", 4, 8));
    assert!(matches!(open(&header, 8), Err(CheckpointError::DuplicateKey { key, .. }) if key == "w"));
    let header = r#"{"__metadata__":{"a":"1"},"__metadata__":{"a":"2"}}"#;
    assert!(matches!(open(header, 0), Err(CheckpointError::DuplicateKey { key, .. }) if key == METADATA_KEY));
    let header = r#"{"__metadata__":{"a":"1","a":"2"}}"#;
    assert!(matches!(open(header, 0), Err(CheckpointError::DuplicateKey { key, .. }) if key == "a"));
}

#[test]
fn overlaps_holes_and_rests_are_refused() {
    let two = |begin: usize| format!("{{{},{}}}", four("a", 0, 4), four("b", begin, begin + 4));
    assert!(open(&two(4), 8).is_ok());
    assert!(matches!(
        open(&two(3), 7),
        Err(CheckpointError::Overlap { tensor, begin: 3, expected: 4, .. }) if tensor == "b"
    ));
    assert!(matches!(
        open(&two(5), 9),
        Err(CheckpointError::Hole { tensor, begin: 5, expected: 4, .. }) if tensor == "b"
    ));
    assert!(matches!(open(&two(4), 10), Err(CheckpointError::TrailingBytes { bytes: 2, .. })));
}

#[test]
fn sizes_that_disagree_or_overflow_are_refused() {
    assert!(matches!(
        open(&format!("{{{}}}", four("w", 0, 5)), 5),
        Err(CheckpointError::WrongSpan { expected: 4, begin: 0, end: 5, .. })
    ));
    // Backwards offsets.
    assert!(matches!(open(&format!("{{{}}}", four("w", 4, 0)), 4), Err(CheckpointError::WrongSpan { .. })));
    let huge = r#"{"w":{"dtype":"F32","shape":[9223372036854775807,4],"data_offsets":[0,4]}}"#;
    assert!(matches!(open(huge, 4), Err(CheckpointError::SizeOverflow { .. })));
    let deep =
        format!(r#"{{"w":{{"dtype":"U8","shape":{:?},"data_offsets":[0,1]}}}}"#, [1; MAX_DIMENSIONS + 1]);
    assert!(matches!(open(&deep, 1), Err(CheckpointError::TooManyDimensions { found: 17, .. })));
}

#[test]
fn unknown_dtypes_are_named() {
    let header = r#"{"w":{"dtype":"F7","shape":[1],"data_offsets":[0,1]}}"#;
    assert!(matches!(open(header, 1), Err(CheckpointError::UnknownDtype { found, .. }) if found == "F7"));
}

#[test]
fn other_files_in_place_of_weights_are_recognised() {
    let cases: [(&[u8], &str); 8] = [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"<HTML lang=en>", "web page"),
        (b"PK\x03\x04\x00\x00\x08\x08\x00", "pickle"),
        (b"PK\x03\x04\x00\x00\x00\x00\x00", "pickle"),
        (b"\x80\x02}q\x00.", "pickle"),
        // The length of a frame puts zeros where a header's length has them.
        (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.", "pickle"),
        (b"GGUF\x03\x00\x00\x01\x00", "GGUF"),
    ];
    for (bytes, expected) in cases {
        let message = open_bytes(bytes).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
    // A header of 0x280 bytes begins like a pickle and is none.
    let mut sound = 0x280u64.to_le_bytes().to_vec();
    sound.extend(format!("{{{:0x$}}}", "", x = 0x27e).replace('0', " ").bytes());
    assert!(open_bytes(&sound).is_ok());
}

#[test]
fn folders_and_missing_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(SafetensorsFile::open(folder.path()), Err(CheckpointError::NotAFile { .. })));
    let error = SafetensorsFile::open(folder.path().join("none")).unwrap_err();
    assert!(matches!(error, CheckpointError::ReadFailed { .. }) && error.is_bad_input());
}
