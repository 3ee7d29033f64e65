//! Autoregressive generation with a key/value cache.

use super::decoder::Decoder;
use crate::projection::Tape;
use crate::random::Stream;

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
    let mut caches = model.caches();
    let mut draws = Stream::new(sampling.seed, "sampling", "", &[]);
    let mut input: Vec<i64> = prompt.iter().map(|id| i64::from(*id)).collect();
    let mut output = Vec::new();
    for _ in 0..max_new_tokens {
        let hidden = model.hidden(&input, 1, Some(&mut caches));
        let last = hidden.dims()[0] - 1;
        let logits = model.head(&Tape::inference(), hidden.narrow(0, last, 1));
        let logits = logits.try_into_vec_as::<f32>().expect("logits can be read back from their device");
        let token = choose(&logits, sampling, &mut draws);
        if stop.contains(&token) {
            break;
        }
        output.push(token);
        if !on_token(token) {
            break;
        }
        input = vec![i64::from(token)];
    }
    output
}

/// The next token by `sampling`.
fn choose(logits: &[f32], sampling: &Sampling, draws: &mut Stream) -> u32 {
    if sampling.temperature <= 0.0 {
        // The first of equal maxima, as argmax has it elsewhere.
        let best = (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best });
        return best.unwrap_or(0) as u32;
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    order.truncate(sampling.top_k.unwrap_or(order.len()).max(1));
    let top = f64::from(logits[order[0]]);
    let weights: Vec<f64> =
        order.iter().map(|i| ((f64::from(logits[*i]) - top) / sampling.temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut kept = weights.len();
    if let Some(top_p) = sampling.top_p {
        let mut mass = 0.0;
        kept = weights
            .iter()
            .position(|w| {
                mass += w / total;
                mass >= top_p
            })
            .map_or(weights.len(), |last| last + 1);
    }
    let mut draw = draws.uniform() * weights[..kept].iter().sum::<f64>();
    for (token, weight) in order.iter().zip(&weights[..kept]) {
        draw -= weight;
        if draw < 0.0 {
            return *token as u32;
        }
    }
    order[kept - 1] as u32
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
    fn greedy_takes_the_first_maximum() {
        let mut draws = Stream::new(0, "sampling", "", &[]);
        assert_eq!(choose(&[1.0, 3.0, 3.0], &Sampling::greedy(), &mut draws), 1);
    }
}
