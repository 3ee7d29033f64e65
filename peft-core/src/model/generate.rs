//! Autoregressive generation with a key/value cache, of one prompt or of many at a time.

use super::decoder::Decoder;
use crate::kernels::{READ_BACK, largest, read_later};
use crate::random::Stream;
use burn::tensor::{Device, Tensor};
use rayon::prelude::*;

/// How the next token is chosen.
#[derive(Debug, Clone)]
pub struct Sampling {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f64,
    /// Only the k most likely tokens, if given.
    pub top_k: Option<usize>,
    /// Only the smallest set of tokens with at least this probability together, if given.
    pub top_p: Option<f64>,
    /// Seed of the draws.
    pub seed: u64,
}

impl Sampling {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: None, seed: 0 }
    }
}

/// A prompt among others.
#[derive(Debug, Clone, Copy)]
pub struct Prompt<'a> {
    /// What is continued; at least one token.
    pub ids: &'a [u32],
    /// The most tokens to continue it by.
    pub max_new_tokens: usize,
    /// Which of the seed's sequences of draws it takes, so that what it is batched with does not matter.
    pub draws: u64,
}

/// Continues `prompt` (not empty) by up to `max_new_tokens` tokens, ending before a token of `stop`. Every new token is
/// passed to `on_token`, which ends the generation by returning false.
pub fn generate(
    model: &Decoder,
    prompt: &[u32],
    max_new_tokens: usize,
    stop: &[u32],
    sampling: &Sampling,
    mut on_token: impl FnMut(u32) -> bool,
) -> Vec<u32> {
    let prompt = Prompt { ids: prompt, max_new_tokens, draws: 0 };
    let mut output = Vec::new();
    continue_batch(model, &[prompt], stop, sampling, &mut |_, token| {
        output.push(token);
        on_token(token)
    });
    output
}

/// Continues each of `prompts` as [`generate`] would continue it alone, `batch_size` of similar length at a time, the
/// longest first so that too large a batch fails at once. Every new token is passed to `on_token` with the index of its
/// prompt; returning false ends all generations. Returns what was generated, in the prompts' order.
pub fn generate_batches(
    model: &Decoder,
    prompts: &[Prompt],
    batch_size: usize,
    stop: &[u32],
    sampling: &Sampling,
    mut on_token: impl FnMut(usize, u32) -> bool,
) -> Vec<Vec<u32>> {
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by_key(|index| std::cmp::Reverse(prompts[*index].ids.len()));
    let mut outputs = vec![Vec::new(); prompts.len()];
    for indices in order.chunks(batch_size.max(1)) {
        let batch: Vec<Prompt> = indices.iter().map(|index| prompts[*index]).collect();
        let go_on = continue_batch(model, &batch, stop, sampling, &mut |row, token| {
            outputs[indices[row]].push(token);
            on_token(indices[row], token)
        });
        if !go_on {
            break;
        }
    }
    outputs
}

/// A prompt that is being continued.
struct Row {
    /// Its place in the batch.
    index: usize,
    draws: Stream,
    /// How many more tokens it may get; 0 once it has ended.
    left: usize,
}

/// Continues a batch of prompts together; false if `on_token` ended it.
fn continue_batch(
    model: &Decoder,
    prompts: &[Prompt],
    stop: &[u32],
    sampling: &Sampling,
    on_token: &mut impl FnMut(usize, u32) -> bool,
) -> bool {
    let row = |(index, prompt): (usize, &Prompt)| {
        let draws = Stream::new(sampling.seed, "sampling", "", &[prompt.draws]);
        Row { index, draws, left: prompt.max_new_tokens }
    };
    let mut rows: Vec<Row> = prompts.iter().enumerate().map(row).filter(|row| row.left > 0).collect();
    let ids = |row: &Row| prompts[row.index].ids;
    let Some(longest) = rows.iter().map(|row| ids(row).len()).max() else { return true };
    let padding: Vec<usize> = rows.iter().map(|row| longest - ids(row).len()).collect();
    let padded = |row: &Row| {
        let tokens = ids(row).iter().map(|id| i64::from(*id));
        std::iter::repeat_n(0, longest - ids(row).len()).chain(tokens)
    };
    let input: Vec<i64> = rows.iter().flat_map(padded).collect();
    let mut cache = model.cache(padding);
    let mut logits = model.extend(&input, &mut cache);
    loop {
        let (mut tokens, ahead) = if sampling.temperature > 0.0 {
            (drawn_tokens(logits, sampling, &mut rows), None)
        } else {
            let chosen = largest(logits);
            let arriving = read_later(chosen.clone());
            // A GPU begins with the next tokens before the host knows these.
            let goes_on = model.device != Device::flex() && rows.iter().any(|row| row.left > 1);
            let ahead = goes_on.then(|| model.extend_by(chosen, &mut cache));
            (arriving(), ahead)
        };
        for (row, token) in rows.iter_mut().zip(&tokens) {
            if row.left == 0 {
                continue;
            }
            row.left -= 1;
            if stop.contains(token) {
                row.left = 0;
            } else if !on_token(row.index, *token) {
                return false;
            }
        }
        let going: Vec<usize> = (0..rows.len()).filter(|row| rows[*row].left > 0).collect();
        if going.is_empty() {
            return true;
        }
        // Rows that have ended go along unheeded until dropping them halves the batch: it copies the cache.
        let drops = 2 * going.len() <= rows.len();
        if drops {
            cache.keep(&going);
            tokens = going.iter().map(|row| tokens[*row]).collect();
            rows.retain(|row| row.left > 0);
        }
        logits = match ahead {
            Some(logits) if drops => {
                let kept: Vec<i64> = going.iter().map(|row| *row as i64).collect();
                logits.select(0, model.ids(&kept))
            }
            Some(logits) => logits,
            None => {
                let input: Vec<i64> = tokens.iter().map(|token| i64::from(*token)).collect();
                model.extend(&input, &mut cache)
            }
        };
    }
}

/// The next token of each row, drawn by its logits `[rows, vocab]`.
fn drawn_tokens(logits: Tensor<2>, sampling: &Sampling, rows: &mut [Row]) -> Vec<u32> {
    let vocab = logits.dims()[1];
    let logits = logits.try_into_vec_as::<f32>().expect(READ_BACK);
    let draw = |(row, logits): (&mut Row, &[f32])| match row.left {
        0 => 0,
        _ => choose(logits, sampling, &mut row.draws),
    };
    rows.par_iter_mut().zip(logits.par_chunks_exact(vocab)).map(draw).collect()
}

/// Draws the next token, at a temperature above 0.
fn choose(logits: &[f32], sampling: &Sampling, draws: &mut Stream) -> u32 {
    let mut ranking = Ranking::new(logits);
    let top = f64::from(logits[ranking.token(0)]);
    let weight = |token: usize| ((f64::from(logits[token]) - top) / sampling.temperature).exp();
    // The tokens of `top_k`, then those of them that `top_p` keeps, and how much all of these weigh.
    let mut kept = sampling.top_k.unwrap_or(logits.len()).clamp(1, logits.len());
    let mut mass: f64 = match kept == logits.len() {
        true => (0..kept).map(weight).sum(),
        false => (0..kept).map(|rank| weight(ranking.token(rank))).sum(),
    };
    if let Some(top_p) = sampling.top_p {
        let least = top_p * mass;
        let mut below = 0.0;
        let reaches = |rank: &usize| {
            below += weight(ranking.token(*rank));
            below >= least
        };
        if let Some(last) = (0..kept).find(reaches) {
            (kept, mass) = (last + 1, below);
        }
    }
    let mut draw = draws.uniform() * mass;
    for rank in 0..kept {
        let token = ranking.token(rank);
        draw -= weight(token);
        if draw < 0.0 {
            return token as u32;
        }
    }
    ranking.token(kept - 1) as u32
}

/// Tokens from the most likely down, the earlier of equals first, sorted only as far as they are asked for.
struct Ranking<'a> {
    logits: &'a [f32],
    order: Vec<usize>,
    sorted: usize,
}

impl<'a> Ranking<'a> {
    fn new(logits: &'a [f32]) -> Self {
        Self { logits, order: (0..logits.len()).collect(), sorted: 0 }
    }

    fn token(&mut self, rank: usize) -> usize {
        if rank >= self.sorted {
            let rest = &mut self.order[self.sorted..];
            let by_logit = |a: &usize, b: &usize| self.logits[*b].total_cmp(&self.logits[*a]).then(a.cmp(b));
            let more = (4 * self.sorted).max(rank + 1 - self.sorted).max(64).min(rest.len());
            if more < rest.len() {
                rest.select_nth_unstable_by(more, by_logit);
            }
            rest[..more].sort_unstable_by(by_logit);
            self.sorted += more;
        }
        self.order[rank]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(sampling: &Sampling, logits: &[f32]) -> Vec<f64> {
        let mut draws = Stream::new(sampling.seed, "sampling", "", &[]);
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..20_000 {
            counts[choose(logits, sampling, &mut draws) as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    #[test]
    fn draws_follow_the_tempered_softmax() {
        // Probabilities 1/8, 2/8, 5/8; at temperature 1/2 they go as their squares, 1 : 4 : 25.
        let logits = [0.0, 2f32.ln(), 5f32.ln()];
        let sampling = Sampling { temperature: 0.5, top_k: None, top_p: None, seed: 1 };
        for (seen, expected) in frequencies(&sampling, &logits).iter().zip([1. / 30., 4. / 30., 25. / 30.]) {
            assert!((seen - expected).abs() < 0.01, "{seen} {expected}");
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [0.0, 2f32.ln(), 5f32.ln()];
        let top_k = Sampling { temperature: 1.0, top_k: Some(2), top_p: None, seed: 1 };
        let seen = frequencies(&top_k, &logits);
        assert!(seen[0] == 0.0 && (seen[1] - 2. / 7.).abs() < 0.01, "{seen:?}");
        let top_p = Sampling { temperature: 1.0, top_k: None, top_p: Some(0.6), seed: 1 };
        assert!((frequencies(&top_p, &logits)[2] - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_ranking_sorted_in_parts_is_the_sorted_order() {
        let mut draws = Stream::new(3, "ranking", "", &[]);
        // Few distinct values, so that ties matter.
        let logits: Vec<f32> = (0..1000).map(|_| draws.below(40) as f32).collect();
        let mut expected: Vec<usize> = (0..1000).collect();
        expected.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        let mut ranking = Ranking::new(&logits);
        assert_eq!((0..1000).map(|rank| ranking.token(rank)).collect::<Vec<_>>(), expected);
        assert_eq!(Ranking::new(&logits).token(700), expected[700]);
    }
}
