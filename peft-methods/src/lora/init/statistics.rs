//! What the data-driven ways need to know about a model on samples: inputs of projections, gradients of weights.

use super::error::InitError;
use burn::tensor::Tensor;
use peft_core::data::{Example, collate};
use peft_core::linalg::{LinalgError, Matrix};
use peft_core::model::Decoder;
use peft_core::projection::DropoutKey;
use peft_core::train::{StepSettings, backward};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

/// Which of the wanted modules stand for the others: those after them that see the same input.
///
/// The projections of one layer that share an input follow each other (q, k, v; gate, up).
pub(super) fn representatives(paths: &[String]) -> BTreeMap<String, String> {
    let input = |path: &str| {
        let (module, name) = path.rsplit_once('.').unwrap_or(("", path));
        let input = match name {
            "q_proj" | "k_proj" | "v_proj" => "qkv",
            "gate_proj" | "up_proj" => "gate and up",
            other => other,
        };
        format!("{module}.{input}")
    };
    let mut first: BTreeMap<String, String> = BTreeMap::new();
    for path in paths {
        first.entry(input(path)).or_insert_with(|| path.clone());
    }
    paths.iter().map(|path| (path.clone(), first[&input(path)].clone())).collect()
}

/// Rows of a projection's input on the host.
pub(super) fn host_rows(x: &Tensor<2>, rows: &[i64], model: &Decoder) -> Result<Matrix, LinalgError> {
    let chosen = x.clone().select(0, model.ids(rows));
    let dims = chosen.dims();
    let values: Vec<f32> = chosen.into_data().iter::<f32>().collect();
    Matrix::from_rows(&values, dims)
}

/// Covariances of inputs, one for all modules that share an input.
#[derive(Debug)]
pub struct Covariances {
    matrices: BTreeMap<String, Matrix>,
    representative: BTreeMap<String, String>,
}

impl Covariances {
    /// The covariance `[in, in]` of the inputs of the module at `path`.
    pub fn of(&self, path: &str) -> Option<&Matrix> {
        self.matrices.get(self.representative.get(path)?)
    }
}

/// The covariances `[in, in]` of the inputs of the modules `paths` by path, as PEFT's CorDA takes them: the inputs of
/// one sample are divided by their largest entry, `XᵀX` is summed over its tokens and averaged over the samples.
///
/// All covariances are held on the host at once.
///
/// # Errors
/// [`InitError::Decomposition`] for an input that is not finite.
pub fn input_covariances(
    model: &Decoder,
    paths: &[String],
    samples: &[&Example],
) -> Result<Covariances, InitError> {
    let representative = representatives(paths);
    let observed: BTreeSet<&String> = representative.values().collect();
    let sums: RefCell<BTreeMap<String, Matrix>> = RefCell::default();
    let failure = RefCell::new(None);
    for sample in samples {
        let batch = collate(&[sample], 0);
        let rows: Vec<i64> = (0..batch.ids.len() as i64).collect();
        model.observe_inputs(&batch, &|path, x| {
            if !observed.contains(&path.to_string()) || failure.borrow().is_some() {
                return;
            }
            let added = host_rows(x, &rows, model).and_then(|x| {
                let [tokens, features] = x.dims();
                let entries = (0..tokens).flat_map(|i| (0..features).map(move |j| (i, j)));
                let largest = entries.fold(f64::MIN, |max, (i, j)| max.max(x.get(i, j)));
                // A sample of zeros adds nothing.
                let factor =
                    if largest == 0.0 { 0.0 } else { 1.0 / largest.abs() / (samples.len() as f64).sqrt() };
                let x = x.scale_columns(&vec![factor; features]);
                x.transpose_times(&x)
            });
            let mut sums = sums.borrow_mut();
            let sum = added.and_then(|added| match sums.remove(path) {
                Some(sum) => sum.minus(-1.0, &added),
                None => Ok(added),
            });
            match sum {
                Ok(sum) => drop(sums.insert(path.to_string(), sum)),
                Err(source) => {
                    *failure.borrow_mut() = Some(InitError::decomposition(path, "corda")(source));
                }
            }
        });
    }
    match failure.into_inner() {
        Some(failure) => Err(failure),
        None => Ok(Covariances { matrices: sums.into_inner(), representative }),
    }
}

/// The gradients `[out, in]`, row-major, of the weights of the modules `paths` by path: of the mean loss over a batch's
/// supervised tokens, averaged over batches of `batch_size` samples.
///
/// Weights keep their type, and the sums are on the host. With `gradient_checkpointing`, gradients of one layer are on the
/// device at a time.
pub fn weight_gradients(
    model: &mut Decoder,
    paths: &[String],
    samples: &[&Example],
    batch_size: usize,
    step: StepSettings,
) -> BTreeMap<String, Vec<f32>> {
    let names: BTreeSet<String> = paths.iter().map(|path| format!("{path}.weight")).collect();
    let wanted = |name: &str| names.contains(name);
    model.parameters_mut().into_iter().filter(|p| wanted(&p.name)).for_each(|p| p.trainable = true);
    let batches: Vec<_> = samples.chunks(batch_size.max(1)).map(|chunk| collate(chunk, 0)).collect();
    let mut sums: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for batch in batches.iter().filter(|batch| !batch.targets.is_empty()) {
        let scale = 1.0 / (batch.targets.len() * batches.len()) as f64;
        // Nothing has dropout yet; the key is not used.
        let key = DropoutKey { seed: 0, step: 0, micro_batch: 0 };
        backward(model, batch, scale, key, step, &mut |gradients| {
            for (name, gradient) in gradients {
                let path = name.trim_end_matches(".weight").to_string();
                let values = gradient.into_data();
                match sums.get_mut(&path) {
                    Some(sum) => sum.iter_mut().zip(values.iter::<f32>()).for_each(|(sum, g)| *sum += g),
                    None => drop(sums.insert(path, values.iter::<f32>().collect())),
                }
            }
        });
    }
    model.parameters_mut().into_iter().filter(|p| wanted(&p.name)).for_each(|p| p.trainable = false);
    sums
}
