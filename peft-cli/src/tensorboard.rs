//! Event files that TensorBoard reads: records framed as in TFRecord files, each a protocol buffer `Event` with one or more
//! scalars (tensorflow/core/util/event.proto and summary.proto).

use crate::error::CliError;
use serde_json::Value;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Numbers of a step and of an evaluation that are shown, by their names in `metrics.jsonl`.
const STEP: [&str; 5] = ["loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes"];
const EVALUATION: [&str; 4] = ["eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_exact_match"];

/// An event file that is being written.
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// A fresh file in the folder `tensorboard` of the run's folder, in place of those of the same run before a resume.
    ///
    /// # Errors
    /// A failure to write.
    pub fn create(output_dir: &Path, seconds: f64) -> Result<Self, CliError> {
        let dir = output_dir.join("tensorboard");
        let io = |path: &Path| {
            let path = path.to_path_buf();
            move |source| CliError::Io { path, source }
        };
        if dir.exists() {
            std::fs::remove_dir_all(&dir).map_err(io(&dir))?;
        }
        std::fs::create_dir_all(&dir).map_err(io(&dir))?;
        let path = dir.join(format!("events.out.tfevents.{:010}.peft", seconds as u64));
        let file = File::create(&path).map_err(io(&path))?;
        let mut events = Self { path, file };
        events.write(&version(seconds))?;
        Ok(events)
    }

    /// Writes the numbers of a line of `metrics.jsonl`.
    ///
    /// # Errors
    /// A failure to write.
    pub fn metrics(&mut self, seconds: f64, line: &Value) -> Result<(), CliError> {
        let Some(step) = line.get("step").and_then(Value::as_i64) else { return Ok(()) };
        let number = |key: &str| line.get(key).and_then(Value::as_f64);
        let train = STEP.iter().filter_map(|key| Some((format!("train/{key}"), number(key)?)));
        let evaluation = EVALUATION.iter();
        let evaluation = evaluation.filter_map(|key| Some((key.replacen("eval_", "eval/", 1), number(key)?)));
        let scalars: Vec<(String, f64)> = train.chain(evaluation).collect();
        self.write(&event(seconds, step, &scalars))
    }

    fn write(&mut self, event: &[u8]) -> Result<(), CliError> {
        let io = |source| CliError::Io { path: self.path.clone(), source };
        self.file.write_all(&record(event)).map_err(io)
    }
}

/// The first event of a file.
fn version(seconds: f64) -> Vec<u8> {
    let mut event = vec![0x09];
    event.extend(seconds.to_le_bytes());
    field(&mut event, 3, b"brain.Event:2");
    event
}

/// An event with scalars.
fn event(seconds: f64, step: i64, scalars: &[(String, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in scalars {
        let mut scalar = Vec::new();
        field(&mut scalar, 1, tag.as_bytes());
        scalar.push(0x15);
        scalar.extend((*value as f32).to_le_bytes());
        field(&mut summary, 1, &scalar);
    }
    let mut event = vec![0x09];
    event.extend(seconds.to_le_bytes());
    // Zero is a number's default, which is left out.
    if step != 0 {
        event.push(0x10);
        varint(&mut event, step as u64);
    }
    field(&mut event, 5, &summary);
    event
}

/// A field of bytes.
fn field(out: &mut Vec<u8>, number: u8, bytes: &[u8]) {
    out.push(number << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Length, its checksum, the bytes, their checksum.
fn record(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    let mut out = length.to_vec();
    out.extend(masked_crc32c(&length).to_le_bytes());
    out.extend(bytes);
    out.extend(masked_crc32c(bytes).to_le_bytes());
    out
}

/// CRC-32C, turned and shifted so that a checksum of data with a checksum in it stays useful.
fn masked_crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    (!crc).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_of_the_standard() {
        // CRC-32C of "123456789" is e3069283.
        let expected = 0xe306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(masked_crc32c(b"123456789"), expected);
    }

    /// Bytes that TensorBoard's own writer made (tests/golden/make_tensorboard.py).
    #[test]
    fn bytes_are_tensorboards() {
        let golden = include_bytes!("../../tests/golden/tensorboard/events.bin");
        let mut ours = record(&version(1234.5));
        let scalars = |list: &[(&str, f64)]| -> Vec<(String, f64)> {
            list.iter().map(|(tag, value)| (tag.to_string(), *value)).collect()
        };
        ours.extend(record(&event(
            1235.25,
            1,
            &scalars(&[("train/loss", 2.5), ("train/learning_rate", 2e-4)]),
        )));
        ours.extend(record(&event(1240.0, 300, &scalars(&[("eval/loss", 1.75)]))));
        ours.extend(record(&event(1240.0, 0, &scalars(&[("eval/loss", 9.0)]))));
        assert_eq!(ours, golden);
    }
}
