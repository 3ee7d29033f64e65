//! Cross-entropy over logits: `ℓ = Σ logsumexp(z) − z[t]`, `∂(s·ℓ)/∂z = s(softmax(z) − e_t)`; and the loss of a frozen
//! head `z = x·Wᵀ` with the gradient of its input, without the logits.

use super::buffers;
use super::matmul::{
    Block, MR, Matrix, NR, Shared, Stretch, lhs_panel, pack_lhs, pack_rhs, panel_count, row_step,
};
use super::simd::{exp, max, sum_by, vectorised};
use rayon::prelude::*;

/// Logits of a row that are looked at together: they stay in a level-one cache.
const PIECE: usize = 2048;
/// Words whose logits [`head_loss`] has at a time.
const WORDS: usize = 32 * NR;

/// What a batch of predictions is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Score {
    /// Sum of the losses in nats.
    pub(crate) loss: f64,
    /// Rows whose largest logit, the first of equals, is their target's.
    pub(crate) correct: usize,
}

impl Score {
    /// The scores of rows, in their order.
    fn total(rows: impl IntoIterator<Item = Score>) -> Score {
        rows.into_iter().fold(Score::default(), |sum, row| Score {
            loss: sum.loss + row.loss,
            correct: sum.correct + row.correct,
        })
    }
}

/// The loss, and over the logits its gradient times `scale`. A row with a negative target counts for nothing.
///
/// # Shapes
/// `logits` `[rows, vocab]`, `targets` `[rows]`.
///
/// # Panics
/// When the lengths do not fit or a target is beyond the vocabulary.
pub(crate) fn cross_entropy(logits: &mut [f32], targets: &[i32], vocab: usize, scale: f32) -> Score {
    assert!(vocab > 0 && logits.len() == targets.len() * vocab, "logits of another shape");
    assert!(targets.iter().all(|target| i64::from(*target) < vocab as i64), "a target beyond the vocabulary");
    let rows: Vec<Score> = logits
        .par_chunks_exact_mut(vocab)
        .zip(targets)
        .map(|(row, target)| match usize::try_from(*target) {
            Ok(target) => row_loss(row, target, scale),
            Err(_) => {
                row.fill(0.0);
                Score::default()
            }
        })
        .collect();
    Score::total(rows)
}

/// A softmax as it comes by.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    /// Where the first of the largest stands.
    best: usize,
    /// `Σ exp(z − max)`.
    sum: f64,
    /// The logit of the target.
    target: f32,
}

impl Running {
    const START: Self = Self { max: f32::NEG_INFINITY, best: usize::MAX, sum: 0.0, target: f32::NAN };

    fn score(&self, target: usize) -> Score {
        Score {
            loss: f64::from(self.max) + self.sum.ln() - f64::from(self.target),
            correct: usize::from(self.best == target),
        }
    }
}

vectorised! {
    /// One row: its gradient in place.
    fn row_loss(row: &mut [f32], target: usize, scale: f32) -> Score {
        let mut running = Running { target: row[target], ..Running::START };
        let mut maxima = Vec::with_capacity(row.len().div_ceil(PIECE));
        for (i, piece) in row.chunks_mut(PIECE).enumerate() {
            soften(piece, i * PIECE, &mut running);
            maxima.push(running.max);
        }
        for (piece, under) in row.chunks_mut(PIECE).zip(maxima) {
            let factor = (f64::from(scale) * f64::from(under - running.max).exp() / running.sum) as f32;
            piece.iter_mut().for_each(|v| *v *= factor);
        }
        row[target] -= scale;
        running.score(target)
    }

    /// Turns logits from `at` on into `exp(z − max)` under the new running maximum; returns what earlier exponentials
    /// are to be multiplied by.
    fn soften(piece: &mut [f32], at: usize, running: &mut Running) -> f32 {
        let largest = max(piece);
        let mut rescale = 1.0;
        // Written so that a first piece of −∞ alone is looked at too.
        if largest > running.max || running.best == usize::MAX {
            running.best = at + piece.iter().position(|v| *v == largest).unwrap_or(0);
            rescale = exp(running.max - largest);
            running.sum *= f64::from(rescale);
            running.max = largest;
        }
        let max = running.max;
        piece.iter_mut().for_each(|v| *v = exp(*v - max));
        running.sum += f64::from(sum_by(piece, piece, |v, _| v));
        rescale
    }
}

/// The loss of a head `x·Wᵀ`, and the gradient of `scale` times it with respect to `x` where asked for.
///
/// Words come by in tiles: their logits are made, softened under the running maximum, and multiplied back onto the
/// words while both are in the caches, so `W` is read once and logits are never stored; the sum divides at the end.
///
/// # Shapes
/// `dx` and `x` `[rows, hidden]`, `weight` `[vocab, hidden]`, `targets` `[rows]`; a negative target counts for nothing.
///
/// # Panics
/// When the lengths do not fit or a target is beyond the vocabulary.
pub(crate) fn head_loss(
    dx: Option<&mut [f32]>,
    x: &[f32],
    weight: &[f32],
    targets: &[i32],
    hidden: usize,
    scale: f32,
) -> Score {
    let rows = targets.len();
    assert!(hidden > 0 && x.len() == rows * hidden && weight.len().is_multiple_of(hidden));
    let vocab = weight.len() / hidden;
    assert!(targets.iter().all(|target| i64::from(*target) < vocab as i64), "a target beyond the vocabulary");
    assert!(dx.as_ref().is_none_or(|dx| dx.len() == x.len()));
    if rows == 0 {
        return Score::default();
    }
    let with_gradient = dx.is_some();
    let x = Matrix::new(x, rows, hidden);
    let words = Matrix::new(weight, vocab, hidden);

    let panel = lhs_panel(hidden);
    let step = row_step(rows);
    let mut packed_x = buffers::take(panel_count(rows, MR) * panel);
    packed_x.par_chunks_mut(step / MR * panel).enumerate().for_each(|(task, packed)| {
        pack_lhs(packed, panel, 0, x, task * step..rows.min((task + 1) * step), 0..hidden);
    });
    let mut none = Vec::new();
    let dx = dx.unwrap_or(&mut none);
    dx.fill(0.0);
    let mut running = vec![Running::START; rows];
    let (dx_out, packed_x) = (Shared(dx.as_mut_ptr()), &packed_x[..]);

    let pack = |from: usize| {
        let part = from..vocab.min(from + WORDS);
        let down = if part.is_empty() { 0..0 } else { 0..hidden };
        let transposed = pack_rhs(words.t(), down, part.clone());
        let plain = with_gradient.then(|| pack_rhs(words, part.clone(), 0..hidden));
        (transposed, plain, part)
    };
    let mut tile = pack(0);
    while !tile.2.is_empty() {
        let (transposed, plain, part) = &tile;
        // The next tile is packed meanwhile.
        let (next, ()) = rayon::join(
            || pack(part.end),
            || {
                running.par_chunks_mut(step).enumerate().for_each(|(task, running)| {
                    let (from, rows, words) = (task * step, running.len(), part.len());
                    let x = &packed_x[from / MR * panel..];
                    let mut z = buffers::take(rows * WORDS);
                    // SAFETY: operands are packed to their sizes, `z` is ours.
                    unsafe {
                        Block {
                            rows,
                            cols: words,
                            first: Stretch::packed(hidden, x, panel, transposed),
                            c: z.as_mut_ptr(),
                            c_stride: WORDS,
                            ..Block::EMPTY
                        }
                        .run()
                    }
                    for (r, running) in running.iter_mut().enumerate() {
                        let z = &mut z[r * WORDS..][..words];
                        let target = usize::try_from(targets[from + r]).unwrap_or(usize::MAX);
                        if part.contains(&target) {
                            running.target = z[target - part.start];
                        }
                        let rescale = soften(z, part.start, running);
                        if with_gradient && rescale != 1.0 {
                            // SAFETY: these rows are this task's.
                            let dx = unsafe { dx_out.slice((from + r) * hidden, hidden) };
                            dx.iter_mut().for_each(|v| *v *= rescale);
                        }
                    }
                    if let Some(plain) = plain {
                        let z_panel = lhs_panel(words);
                        let mut p = buffers::take(panel_count(rows, MR) * z_panel);
                        pack_lhs(
                            &mut p,
                            z_panel,
                            0,
                            Matrix::strided(&z, rows, words, WORDS),
                            0..rows,
                            0..words,
                        );
                        // SAFETY: as above, and these rows of `dx` are this task's.
                        unsafe {
                            let c = dx_out.get().add(from * hidden);
                            Block {
                                rows,
                                cols: hidden,
                                first: Stretch::packed(words, &p, z_panel, plain),
                                c,
                                c_stride: hidden,
                                source: c,
                                source_stride: hidden,
                                ..Block::EMPTY
                            }
                            .run()
                        }
                    }
                });
            },
        );
        tile = next;
    }
    dx.par_chunks_exact_mut(hidden).zip(targets).zip(&running).for_each(|((dx, target), running)| {
        match usize::try_from(*target) {
            Ok(target) => {
                let factor = (f64::from(scale) / running.sum) as f32;
                let word = &weight[target * hidden..][..hidden];
                dx.iter_mut().zip(word).for_each(|(dx, w)| *dx = factor * *dx - scale * w);
            }
            Err(_) => dx.fill(0.0),
        }
    });
    let scores = targets.iter().zip(&running);
    Score::total(scores.filter_map(|(target, running)| Some(running.score(usize::try_from(*target).ok()?))))
}

#[cfg(test)]
mod tests {
    use super::super::matmul::tests::{numbers, on_pools};
    use super::*;

    /// Loss, correct and gradient of the logits in f64.
    fn reference(logits: &[f64], targets: &[i32], vocab: usize, scale: f64) -> (f64, usize, Vec<f64>) {
        let (mut loss, mut correct, mut gradient) = (0.0, 0, Vec::new());
        for (z, target) in logits.chunks_exact(vocab).zip(targets) {
            let Ok(target) = usize::try_from(*target) else {
                gradient.extend(vec![0.0; vocab]);
                continue;
            };
            let sum: f64 = z.iter().map(|z| z.exp()).sum();
            loss += sum.ln() - z[target];
            let best = (0..vocab).fold(0, |best, i| if z[i] > z[best] { i } else { best });
            correct += usize::from(best == target);
            gradient
                .extend((0..vocab).map(|i| scale * (z[i].exp() / sum - f64::from(u8::from(i == target)))));
        }
        (loss, correct, gradient)
    }

    #[test]
    fn rows_by_hand() {
        // Probabilities (1/8, 2/8, 5/8), target 1; equal logits, the first is the prediction; no target.
        let mut logits = [0.0, 2f32.ln(), 5f32.ln(), 7.0, 7.0, 7.0, 1.0, 2.0, 3.0];
        let score = cross_entropy(&mut logits, &[1, 0, -100], 3, 0.5);
        assert!((score.loss - (4f64.ln() + 3f64.ln())).abs() < 1e-6);
        assert_eq!(score.correct, 1);
        let expected = [1. / 16., 1. / 8. - 0.5, 5. / 16., 1. / 6. - 0.5, 1. / 6., 1. / 6., 0.0, 0.0, 0.0];
        for (got, expected) in logits.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-6, "{logits:?}");
        }
    }

    #[test]
    fn long_rows_against_the_definition() {
        for (rows, vocab) in [(3, 1), (5, 2048), (4, 5000), (9, 33)] {
            // Growing logits move the maximum from piece to piece.
            let z: Vec<f32> = numbers(rows * vocab, 1)
                .iter()
                .enumerate()
                .map(|(i, v)| 8.0 * v + (i % vocab) as f32 * 10.0 / vocab as f32)
                .collect();
            let targets: Vec<i32> =
                (0..rows).map(|r| if r % 4 == 3 { -1 } else { (r * 977 % vocab) as i32 }).collect();
            let (score, gradient) = on_pools(|| {
                let mut z = z.clone();
                let score = cross_entropy(&mut z, &targets, vocab, 0.25);
                (score, z)
            });
            let exact: Vec<f64> = z.iter().map(|v| f64::from(*v)).collect();
            let (loss, correct, expected) = reference(&exact, &targets, vocab, 0.25);
            assert!((score.loss - loss).abs() < 1e-5 * (1.0 + loss) && score.correct == correct);
            for (got, expected) in gradient.iter().zip(expected) {
                assert!((f64::from(*got) - expected).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn head_against_the_definition() {
        for (rows, hidden, vocab) in [(1, 5, 1), (7, 24, 700), (130, 16, 1024), (75, 40, 1100)] {
            let x: Vec<f32> = numbers(rows * hidden, 1).iter().map(|v| 3.0 * v).collect();
            let weight = numbers(vocab * hidden, 2);
            let logits: Vec<f64> = (0..rows * vocab)
                .map(|e| {
                    let (r, v) = (e / vocab, e % vocab);
                    (0..hidden)
                        .map(|k| f64::from(x[r * hidden + k]) * f64::from(weight[v * hidden + k]))
                        .sum()
                })
                .collect();
            // Every third row has its best word as its target, so that some are correct.
            let targets: Vec<i32> = (0..rows)
                .map(|r| match r % 3 {
                    0 => {
                        let z = &logits[r * vocab..][..vocab];
                        (0..vocab).fold(0, |best, i| if z[i] > z[best] { i } else { best }) as i32
                    }
                    1 => (r * 977 % vocab) as i32,
                    _ => -100,
                })
                .collect();
            let (score, dx) = on_pools(|| {
                let mut dx = vec![f32::NAN; rows * hidden];
                let score = head_loss(Some(&mut dx), &x, &weight, &targets, hidden, 0.5);
                assert_eq!(score, head_loss(None, &x, &weight, &targets, hidden, 0.5));
                (score, dx)
            });
            let (loss, correct, gradient) = reference(&logits, &targets, vocab, 0.5);
            assert!((score.loss - loss).abs() < 1e-5 * (1.0 + loss), "{} {loss}", score.loss);
            assert_eq!(score.correct, correct);
            for (e, got) in dx.iter().enumerate() {
                let (r, k) = (e / hidden, e % hidden);
                let expected: f64 =
                    (0..vocab).map(|v| gradient[r * vocab + v] * f64::from(weight[v * hidden + k])).sum();
                assert!(
                    (f64::from(*got) - expected).abs() < 5e-6,
                    "{rows}x{hidden}x{vocab}: {got} {expected}"
                );
            }
        }
    }
}
