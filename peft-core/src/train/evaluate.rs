//! Loss, accuracy and exact match on examples, streaming: no more than one batch's activations and one chunk of logits
//! are held.

use super::loss::head_loss;
use crate::data::{Example, collate};
use crate::model::{Decoder, Prompt, Sampling, generate_batches};
use crate::projection::Tape;
use crate::text::Tokenizer;
use serde::Serialize;
use std::collections::BTreeMap;

/// What a model makes of examples.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Evaluation {
    /// Loss summed over the examples and divided by their supervised tokens, in nats.
    pub loss: f64,
    /// exp(loss).
    pub perplexity: f64,
    /// Share of supervised tokens that are the most likely one.
    pub token_accuracy: f64,
    /// Supervised tokens.
    pub supervised_tokens: u64,
}

/// Evaluates `examples` in batches of `batch_size`, longest first so that too large a batch fails at once. Ends early,
/// with what it has seen, when `keep_going` returns false.
pub fn evaluate(
    model: &Decoder,
    examples: &[Example],
    batch_size: usize,
    chunk_rows: Option<usize>,
    keep_going: impl Fn() -> bool,
) -> Evaluation {
    let mut order: Vec<&Example> = examples.iter().collect();
    order.sort_by_key(|example| std::cmp::Reverse(example.ids.len()));
    let (mut loss, mut correct, mut count) = (0.0, 0u64, 0u64);
    for chunk in order.chunks(batch_size.max(1)) {
        if !keep_going() {
            break;
        }
        let batch = collate(chunk, 0);
        let tape = Tape::inference();
        let context = model.context(batch.batch_size, batch.seq_len);
        let embedded = model.embed(&tape, model.ids(&batch.ids));
        let hidden = model.layers().iter().fold(embedded, |x, layer| layer.forward(&tape, x, &context, None));
        let rows = model.final_norm(&tape, hidden.select(0, model.ids(&batch.positions)));
        let out = head_loss(model, rows, model.ids(&batch.targets), chunk_rows, None, &mut BTreeMap::new());
        loss += f64::from(out.loss_sum.into_scalar::<f32>());
        correct += out.correct.into_scalar::<i64>() as u64;
        count += batch.targets.len() as u64;
    }
    let loss = loss / count.max(1) as f64;
    Evaluation {
        loss,
        perplexity: loss.exp(),
        token_accuracy: correct as f64 / count.max(1) as f64,
        supervised_tokens: count,
    }
}

/// A generation beside what it should have been.
#[derive(Debug, Clone, Serialize)]
pub struct Generation {
    /// The text before the answer.
    pub prompt: String,
    /// The answer of the data.
    pub reference: String,
    /// The model's answer.
    pub generated: String,
    /// Whether the two are the same, outer whitespace aside.
    pub matched: bool,
}

/// Answers each example's last supervised stretch greedily from what stands before it, `batch_size` of them at a time.
/// Examples without one are left out.
///
/// Generation stops at a stop token, or once it is longer than the reference by a few tokens and so cannot match. Ends
/// early, with answers that are not complete, when `keep_going` returns false.
///
/// # Errors
/// Tokens that the tokenizer cannot decode.
pub fn exact_match(
    model: &Decoder,
    tokenizer: &Tokenizer,
    examples: &[Example],
    batch_size: usize,
    keep_going: impl Fn() -> bool,
) -> crate::Result<Vec<Generation>> {
    const SLACK: usize = 8;
    let stretches: Vec<(&[u32], &[u32])> = examples.iter().filter_map(last_supervised).collect();
    let prompts: Vec<Prompt> = stretches
        .iter()
        .map(|(ids, reference)| Prompt { ids, max_new_tokens: reference.len() + SLACK, draws: 0 })
        .collect();
    let stop = tokenizer.stop_ids();
    let answers =
        generate_batches(model, &prompts, batch_size, stop, &Sampling::greedy(), |_, _| keep_going());
    let text = |ids: &[u32]| tokenizer.decode(ids, true);
    let generation = |((prompt, reference), answer): (&(&[u32], &[u32]), &Vec<u32>)| {
        let (reference, generated) = (text(reference)?, text(answer)?);
        let matched = reference.trim() == generated.trim();
        Ok(Generation { prompt: text(prompt)?, reference, generated, matched })
    };
    stretches.iter().zip(&answers).map(generation).collect()
}

/// What stands before an example's last supervised stretch, at least one token so that there is something to go on from,
/// and the stretch itself.
fn last_supervised(example: &Example) -> Option<(&[u32], &[u32])> {
    let end = example.supervised.iter().rposition(|supervised| *supervised)? + 1;
    let start = example.supervised[..end].iter().rposition(|s| !s).map_or(0, |before| before + 1).max(1);
    Some((&example.ids[..start], &example.ids[start..end]))
}
