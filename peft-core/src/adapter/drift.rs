//! The evidence that a folded checkpoint is the adapter it was made of: both run on a few prompts, and their outputs are
//! compared. The two sides share the forward alone: one attaches the factors, the other loads the files as written.

use super::error::AdapterError;
use super::saved::SavedAdapter;
use crate::checkpoint::{Checkpoint, Dtype, from_f32};
use crate::model::{ComputeType, Decoder, ModelConfig, Sampling, generate, load};
use burn::tensor::Device;
use rayon::prelude::*;
use serde::Serialize;
use std::path::Path;

/// Tokens of a greedy continuation.
pub const CONTINUED: usize = 16;

/// Largest share of the adapter's own effect that a fold may lose.
const MAX_LOSS: f64 = 0.5;

/// How far one model's outputs are from another's. Logits are compared relative to the reference's spread.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Drift {
    /// Positions compared.
    pub positions: usize,
    /// Largest absolute difference of two logits.
    pub max_difference: f64,
    /// Mean absolute difference of the logits.
    pub mean_difference: f64,
    /// The reference's spread: the root mean square, over positions, of the logits' standard deviation.
    pub spread: f64,
    /// Share of positions at which the most likely token is the same.
    pub token_agreement: f64,
    /// Tokens of the reference's greedy continuations.
    pub continued: usize,
    /// Share of them that the other model's continuations reach before they first differ.
    pub continuation_agreement: f64,
}

impl Drift {
    /// Largest difference relative to the spread.
    pub fn max_relative(&self) -> f64 {
        relative(self.max_difference, self.spread)
    }

    /// Mean difference relative to the spread.
    pub fn mean_relative(&self) -> f64 {
        relative(self.mean_difference, self.spread)
    }
}

fn relative(difference: f64, spread: f64) -> f64 {
    if difference == 0.0 { 0.0 } else { difference / spread }
}

/// What was found out about a fold.
#[derive(Debug, Clone, Serialize)]
pub struct FoldCheck {
    /// From the base with the adapter attached to the folded checkpoint: what folding changed, which should be nothing.
    pub drift: Drift,
    /// From the base to the base with the adapter attached: what the adapter does, the measure of the drift.
    pub effect: Drift,
}

impl FoldCheck {
    /// Accepts a mean difference of at most `max_drift`, relative to the spread, and of at most half of what the adapter
    /// itself makes. The largest difference is no measure of right or wrong: rounding alone, at a single position that
    /// amplifies it, reaches the spread.
    ///
    /// # Errors
    /// [`AdapterError::Drift`] otherwise, also where outputs are not finite.
    pub fn require(&self, max_drift: f64) -> Result<(), AdapterError> {
        let drift = self.drift.mean_relative();
        // Rounding in f32 is no loss, however small the adapter's effect.
        let kept = drift <= default_max_drift(Dtype::F32) || drift <= MAX_LOSS * self.effect.mean_relative();
        let reason = match (drift <= max_drift, kept) {
            (true, true) => return Ok(()),
            (true, false) => "more than half of what the adapter does is lost".to_string(),
            (false, _) => format!("the limit is {max_drift}"),
        };
        Err(AdapterError::Drift { mean: drift, effect: self.effect.mean_relative(), reason })
    }
}

/// The drift that rounding explains where weights are stored in `dtype`, as mean difference over spread. f32 weights of
/// small models give 1e-6 to 1e-5. Rounding to bf16 moves a weight by up to 2⁻⁹ of itself, which the layers add up and
/// amplify: 0.005 in a model of 4 layers, 0.05 in one of 30. f16 keeps three bits more.
pub fn default_max_drift(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::BF16 => 0.15,
        Dtype::F16 => 0.02,
        _ => 1e-4,
    }
}

/// Compares `adapter` on `base` with the checkpoint in `folded`, on the CPU in f32. One model is in memory at a time,
/// and two sets of logits.
///
/// # Errors
/// A checkpoint that does not load, or an adapter that does not fit.
pub fn check_fold(
    base: &Checkpoint,
    adapter: &dyn SavedAdapter,
    folded: &Path,
    prompts: &[Vec<u32>],
) -> Result<FoldCheck, AdapterError> {
    let open = |checkpoint: &Checkpoint| load(checkpoint, &Device::flex(), ComputeType::F32);
    let mut model = open(base)?;
    let plain = Trace::of(&model, prompts);
    adapter.attach(&mut model)?;
    let adapted = Trace::of(&model, prompts);
    let effect = adapted.compare(&plain);
    drop((model, plain));
    let model = open(&Checkpoint::open(folded)?)?;
    Ok(FoldCheck { drift: adapted.compare(&Trace::of(&model, prompts)), effect })
}

/// Bytes that [`check_fold`] takes at its peak: the model in f32, a tensor twice while it loads, and the logits.
///
/// # Errors
/// An unsupported configuration.
pub fn check_bytes(base: &Checkpoint, prompts: &[Vec<u32>]) -> Result<u64, AdapterError> {
    let config = ModelConfig::from_json(base.dir(), base.config())?;
    let sizes = base.names().map(|name| Ok(base.tensor(name)?.numel() as u64));
    let sizes = sizes.collect::<Result<Vec<u64>, AdapterError>>()?;
    let positions: u64 = prompts.iter().map(|prompt| prompt.len() as u64).sum();
    let values = sizes.iter().sum::<u64>()
        + 2 * sizes.iter().max().copied().unwrap_or(0)
        + 3 * positions * config.vocab_size as u64;
    Ok(4 * values)
}

/// Memory that the system can give to this process, in bytes; `None` where it does not say.
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib * 1024)
}

/// A model's outputs on the prompts.
struct Trace {
    /// By prompt, `[positions, vocab]`.
    logits: Vec<Vec<f32>>,
    continuations: Vec<Vec<u32>>,
    vocab: usize,
}

impl Trace {
    /// Runs the model. Prompts hold at least one token, all within its vocabulary.
    fn of(model: &Decoder, prompts: &[Vec<u32>]) -> Self {
        let logits = |prompt: &Vec<u32>| {
            let ids: Vec<i64> = prompt.iter().map(|id| i64::from(*id)).collect();
            let logits = model.logits(&ids, 1).try_into_vec_as::<f32>();
            logits.expect("logits can be read back from their device")
        };
        let continuation =
            |prompt: &Vec<u32>| generate(model, prompt, CONTINUED, &[], &Sampling::greedy(), |_| true);
        Self {
            logits: prompts.iter().map(logits).collect(),
            continuations: prompts.iter().map(continuation).collect(),
            vocab: model.config.vocab_size,
        }
    }

    /// How far `other` is from this reference, on the same prompts.
    fn compare<'a>(&'a self, other: &'a Trace) -> Drift {
        let rows = |trace: &'a Trace| trace.logits.iter().flat_map(|logits| logits.chunks(trace.vocab));
        let (mut positions, mut max, mut total, mut variance, mut agreed) = (0, 0.0f64, 0.0, 0.0, 0);
        for (reference, found) in rows(self).zip(rows(other)) {
            positions += 1;
            let mean = reference.iter().map(|v| f64::from(*v)).sum::<f64>() / self.vocab as f64;
            for (r, f) in reference.iter().zip(found) {
                let difference = (f64::from(*r) - f64::from(*f)).abs();
                // Unlike `max`, keeps what is not a number.
                max = if difference <= max { max } else { difference };
                total += difference;
                variance += (f64::from(*r) - mean).powi(2);
            }
            agreed += usize::from(argmax(reference) == argmax(found));
        }
        let values = (positions * self.vocab) as f64;
        let same = |(a, b): (&Vec<u32>, &Vec<u32>)| a.iter().zip(b).take_while(|(a, b)| a == b).count();
        let continued: usize = self.continuations.iter().map(Vec::len).sum();
        let reached: usize = self.continuations.iter().zip(&other.continuations).map(same).sum();
        Drift {
            positions,
            max_difference: max,
            mean_difference: total / values,
            spread: (variance / values).sqrt(),
            token_agreement: agreed as f64 / positions as f64,
            continued,
            continuation_agreement: reached as f64 / continued as f64,
        }
    }
}

/// The first of the largest values.
fn argmax(values: &[f32]) -> usize {
    (0..values.len()).reduce(|best, i| if values[i] > values[best] { i } else { best }).unwrap_or(0)
}

/// How many of the changed weights came out as they were in the base: in a coarse type, a small change is rounded away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Rounding {
    /// Elements of the changed tensors.
    pub elements: u64,
    /// Those whose stored value is the base's.
    pub unchanged: u64,
}

impl Rounding {
    /// Compares the tensors `changed` of `folded` with those of `base`, the latter rounded to the type that they have in
    /// `folded`.
    ///
    /// # Errors
    /// Tensors that one of the two lacks, or that are no floats.
    pub fn measure(base: &Checkpoint, folded: &Checkpoint, changed: &[String]) -> Result<Self, AdapterError> {
        let mut rounding = Self { elements: 0, unchanged: 0 };
        for name in changed {
            // A head that folding parted from the embedding.
            if !base.contains(name) {
                continue;
            }
            let (before, after) = (base.tensor(name)?, folded.tensor(name)?);
            let rounded =
                from_f32(&before.to_f32()?, after.dtype).map_err(crate::checkpoint::CheckpointError::from)?;
            let size = after.dtype.size();
            let same = rounded.par_chunks(size).zip(after.bytes.par_chunks(size)).filter(|(a, b)| a == b);
            rounding.unchanged += same.count() as u64;
            rounding.elements += after.numel() as u64;
        }
        Ok(rounding)
    }

    /// The share of unchanged elements, 0 where nothing changed.
    pub fn share(&self) -> f64 {
        self.unchanged as f64 / self.elements.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn trace(logits: &[f32], continuation: &[u32]) -> Trace {
        Trace { logits: vec![logits.to_vec()], continuations: vec![continuation.to_vec()], vocab: 2 }
    }

    #[test]
    fn differences_spread_and_agreement_by_hand() {
        let reference = trace(&[1.0, 3.0, 2.0, -2.0], &[5, 6, 7, 8]);
        let drift = reference.compare(&trace(&[1.5, 3.0, -2.0, -1.0], &[5, 6, 9, 8]));
        assert_eq!(drift.positions, 2);
        assert_eq!((drift.max_difference, drift.mean_difference), (4.0, 5.5 / 4.0));
        // Deviations of the rows are 1 and 2: √((1 + 4) / 2).
        assert!((drift.spread - 2.5f64.sqrt()).abs() < 1e-12);
        assert_eq!((drift.token_agreement, drift.continued, drift.continuation_agreement), (0.5, 4, 0.5));
        let same = reference.compare(&reference);
        assert_eq!((same.max_relative(), same.token_agreement, same.continuation_agreement), (0.0, 1.0, 1.0));
    }

    #[test]
    fn a_fold_is_refused_for_its_drift_for_doing_nothing_and_for_what_is_no_number() {
        let drift = |difference: f32| {
            trace(&[1.0, 3.0], &[1]).compare(&trace(&[1.0 + difference, 3.0 + difference], &[1]))
        };
        let check = |found: f32, effect: f32| FoldCheck { drift: drift(found), effect: drift(effect) };
        check(0.25, 1.0).require(0.3).unwrap();
        assert!(check(0.25, 1.0).require(0.2).unwrap_err().to_string().contains("the limit is 0.2"));
        let nothing = check(0.25, 0.25).require(0.3).unwrap_err();
        assert!(nothing.to_string().contains("half of what the adapter does") && !nothing.is_bad_input());
        assert!(check(f32::NAN, 1.0).require(1e9).is_err());
        // An adapter without effect, folded right.
        check(0.0, 0.0).require(1e-4).unwrap();
    }
}
