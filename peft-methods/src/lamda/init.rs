//! First values of a module's factors.

use super::config::{LamdaBlock, LamdaInit};
use super::ranks::{Module, captured_energy};
use peft_core::adapter::AdapterError;
use peft_core::linalg::{LinalgError, Matrix, Svd, top_svd};
use peft_core::model::Decoder;
use peft_core::random::Stream;
use rayon::prelude::*;
use std::collections::BTreeMap;

/// `A` `[r, in]`, `B` `[out, r]`, `S` `[r, r]`, row-major.
pub(super) struct FirstValues {
    pub rank: usize,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub core: Vec<f32>,
}

/// The first values of the modules, by path, at the ranks given or, with a `rank_allocation`, at those that their spectra
/// ask for; modules without any rank are left out.
///
/// # Errors
/// A weight that is zero or cannot be decomposed.
pub(super) fn first_values(
    block: &LamdaBlock,
    seed: u64,
    modules: &BTreeMap<String, ([usize; 2], usize)>,
    model: &Decoder,
) -> Result<BTreeMap<String, FirstValues>, AdapterError> {
    if block.init == LamdaInit::ReleasedLora {
        let values =
            modules.iter().map(|(path, (dims, rank))| (path.clone(), released(seed, path, *dims, *rank)));
        return Ok(values.collect());
    }
    // With an allocation no module gets more than half as much again.
    let most = |rank: usize, [rows, columns]: [usize; 2]| match block.rank_allocation {
        Some(_) => (rank + rank / 2 + 2).min(rows).min(columns),
        None => rank,
    };
    let decomposed: Vec<(&String, [usize; 2], usize, Svd, f64)> = model
        .projections()
        .filter_map(|projection| modules.get_key_value(&projection.path).map(|found| (projection, found)))
        .map(|(projection, found)| (projection.weight.to_host(), found))
        .collect::<Vec<_>>()
        .into_par_iter()
        .map(|(weight, (path, (dims, rank)))| {
            let failed = |source: LinalgError| AdapterError::Decomposition { module: path.clone(), source };
            let matrix = Matrix::from_rows(&weight, *dims).map_err(failed)?;
            let total = weight.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
            if total == 0.0 {
                let reason = "has a weight of zeros, which has no singular directions".to_string();
                return Err(AdapterError::Target { module: path.clone(), reason });
            }
            let svd = top_svd(&matrix, most(*rank, *dims)).map_err(failed)?;
            Ok((path, *dims, *rank, svd, total))
        })
        .collect::<Result<_, AdapterError>>()?;

    let ranks: Vec<usize> = match &block.rank_allocation {
        None => decomposed.iter().map(|(_, _, rank, ..)| *rank).collect(),
        Some(allocation) => {
            let module = |(_, dims, rank, svd, total): &(&String, [usize; 2], usize, Svd, f64)| Module {
                dims: *dims,
                score: captured_energy(&svd.s, *rank, *total),
            };
            allocation.ranks(&decomposed.iter().map(module).collect::<Vec<_>>(), block.r)
        }
    };
    let scale = block.scale();
    let values =
        decomposed.iter().zip(ranks).filter(|(_, rank)| *rank > 0).map(|((path, _, _, svd, _), rank)| {
            let diagonal = |i: usize, j: usize| match block.init {
                LamdaInit::SvdPrincipal if i == j => svd.s[i] / scale,
                _ => 0.0,
            };
            let values = FirstValues {
                rank,
                a: svd.v.columns(0..rank).transpose().to_rows(),
                b: svd.u.columns(0..rank).to_rows(),
                core: Matrix::from_fn([rank, rank], diagonal).to_rows(),
            };
            (path.to_string(), values)
        });
    Ok(values.collect())
}

/// Kaiming-uniform `A` and `S` (with a = √5, within ±1/√fan_in), the latter in bf16, and a zero `B`.
fn released(seed: u64, path: &str, [rows, columns]: [usize; 2], rank: usize) -> FirstValues {
    let draw = |purpose: &str, count: usize, fan_in: usize| -> Vec<f32> {
        let mut stream = Stream::new(seed, purpose, path, &[]);
        let bound = 1.0 / (fan_in as f64).sqrt();
        (0..count).map(|_| ((2.0 * stream.uniform() - 1.0) * bound) as f32).collect()
    };
    let core = draw("lamda core", rank * rank, rank);
    FirstValues {
        rank,
        a: draw("lora init", rank * columns, columns),
        b: vec![0.0; rows * rank],
        core: core.into_iter().map(|value| half::bf16::from_f32(value).to_f32()).collect(),
    }
}
