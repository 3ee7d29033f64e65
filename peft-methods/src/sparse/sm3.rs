//! SM3-II (Anil et al., arXiv 1901.11150) on the entries of a sparse matrix: instead of a second moment for each entry,
//! one number for each row and each column (SpIEL's moment approximation):
//!
//! ```text
//! u_j = min(row[r_j], column[c_j]) + g_j²        θ_j ← θ_j − η·g_j/√(u_j + ε)        θ ← (1 − ηλ)θ
//! row[r] ← max(row[r], max over its entries of u_j), and columns alike
//! ```
//!
//! With a momentum `μ`, `b ← μ·b + (1−μ)·g/√(u + ε)` takes the place of the quotient. The sums run on the host: there are
//! as many numbers as entries, and each update needs their largest by row and column.

use super::{host, row_tensor};
use burn::tensor::{Device, Tensor, TensorData};
use peft_core::kernels::{Clip, SparsePattern, clipped};
use peft_core::train::{MemoryChange, ParameterOptimizer, ParameterStep};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sm3Config {
    /// ε.
    pub epsilon: f64,
    /// λ.
    pub weight_decay: f64,
    /// μ, 0 for none.
    pub momentum: f64,
}

/// The positions of each sparse parameter, by its name; shared with whoever exchanges them.
#[derive(Debug, Clone, Default)]
pub struct Patterns(Arc<Mutex<BTreeMap<String, Arc<SparsePattern>>>>);

impl Patterns {
    /// The parameter `name` has these from now on.
    pub fn set(&self, name: &str, pattern: Arc<SparsePattern>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_string(), pattern);
    }

    /// All of them, by name.
    pub fn all(&self) -> BTreeMap<String, Arc<SparsePattern>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn get(&self, name: &str) -> Arc<SparsePattern> {
        let patterns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        patterns.get(name).cloned().expect("a method gives the positions of what it trains")
    }
}

/// The memory of one parameter.
#[derive(Debug, Clone, PartialEq)]
struct Memory {
    row: Vec<f32>,
    column: Vec<f32>,
    /// Of each entry; empty without momentum.
    momentum: Vec<f32>,
}

impl Memory {
    fn new([rows, columns]: [usize; 2], entries: usize, momentum: f64) -> Self {
        let momentum = if momentum > 0.0 { vec![0.0; entries] } else { Vec::new() };
        Self { row: vec![0.0; rows], column: vec![0.0; columns], momentum }
    }

    /// Its tensors that there are, by name.
    fn tensors_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Vec<f32>)> {
        [("row", &mut self.row), ("column", &mut self.column), ("momentum", &mut self.momentum)]
            .into_iter()
            .filter(|(_, values)| !values.is_empty())
    }

    /// One update of `values`.
    fn step(
        &mut self,
        config: &Sm3Config,
        rate: f64,
        pattern: &SparsePattern,
        values: &mut [f32],
        gradient: &[f32],
    ) {
        let (mut row, mut column) = (self.row.clone(), self.column.clone());
        let decay = (1.0 - rate * config.weight_decay) as f32;
        let momentum = config.momentum as f32;
        let places = pattern.rows().iter().zip(pattern.columns());
        for (entry, (r, c)) in places.enumerate() {
            let (r, c, g) = (*r as usize, *c as usize, gradient[entry]);
            let u = self.row[r].min(self.column[c]) + g * g;
            row[r] = row[r].max(u);
            column[c] = column[c].max(u);
            let mut update = g / (u + config.epsilon as f32).sqrt();
            if let Some(buffer) = self.momentum.get_mut(entry) {
                update = (1.0 - momentum) * update + momentum * *buffer;
                *buffer = update;
            }
            values[entry] = (values[entry] - rate as f32 * update) * decay;
        }
        (self.row, self.column) = (row, column);
    }
}

/// SM3-II with its memory of every sparse parameter.
pub struct Sm3 {
    config: Sm3Config,
    patterns: Patterns,
    memories: BTreeMap<String, Memory>,
}

impl Sm3 {
    /// Without memory, for parameters with those positions.
    pub fn new(config: Sm3Config, patterns: Patterns) -> Self {
        Self { config, patterns, memories: BTreeMap::new() }
    }
}

impl ParameterOptimizer for Sm3 {
    fn step(&mut self, parameters: Vec<ParameterStep>, clip: Option<&Clip>) -> Vec<Tensor<2>> {
        let Some(factor) = clip.map_or(Some(1.0), Clip::factor) else {
            return parameters.into_iter().map(|parameter| parameter.value).collect();
        };
        let updated = parameters.into_iter().map(|ParameterStep { name, learning_rate, value, gradient }| {
            let pattern = self.patterns.get(name);
            let fresh = || Memory::new(pattern.dims(), pattern.len(), self.config.momentum);
            let memory = self.memories.entry(name.to_string()).or_insert_with(fresh);
            let mut values = host(&value);
            let gradient = host(&clipped(gradient, factor));
            memory.step(&self.config, learning_rate, &pattern, &mut values, &gradient);
            row_tensor(values, &value.device())
        });
        updated.collect()
    }

    /// A step without finite gradients has changed no memory either.
    fn take_back(&mut self) {}

    fn remembers(&self, name: &str) -> bool {
        self.memories.contains_key(name)
    }

    fn forget(&mut self, name: &str) {
        self.memories.remove(name);
    }

    fn edit(&mut self, name: &str, device: &Device, change: &mut MemoryChange) {
        for (leaf, values) in self.memories.get_mut(name).into_iter().flat_map(Memory::tensors_mut) {
            *values = host(&change(leaf, row_tensor(std::mem::take(values), device)));
        }
    }

    fn save(&self) -> (Vec<(String, TensorData)>, BTreeMap<String, i64>) {
        let mut tensors = Vec::new();
        for (name, memory) in &self.memories {
            for (leaf, values) in memory.clone().tensors_mut() {
                let shape = [1, values.len()];
                tensors.push((format!("{name}.{leaf}"), TensorData::new(std::mem::take(values), shape)));
            }
        }
        (tensors, BTreeMap::new())
    }

    fn load(
        &mut self,
        names: &[String],
        mut tensors: BTreeMap<String, TensorData>,
        _: BTreeMap<String, i64>,
        _: &Device,
    ) -> Result<(), String> {
        for name in names {
            let pattern = self.patterns.get(name);
            let mut memory = Memory::new(pattern.dims(), pattern.len(), self.config.momentum);
            for (leaf, values) in memory.tensors_mut() {
                let saved: Vec<f32> = match tensors.remove(&format!("{name}.{leaf}")) {
                    Some(data) => data.iter::<f32>().collect(),
                    None => return Err(name.clone()),
                };
                if saved.len() != values.len() {
                    return Err(name.clone());
                }
                *values = saved;
            }
            self.memories.insert(name.clone(), memory);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::growth::largest_products;
    use super::*;

    const NAME: &str = "m.values";

    /// A 2×2 matrix with the entries (0, 0), (0, 1) and (1, 0).
    fn sm3(momentum: f64, weight_decay: f64) -> Sm3 {
        let patterns = Patterns::default();
        patterns.set(NAME, Arc::new(SparsePattern::new([2, 2], vec![0, 1, 2]).unwrap()));
        Sm3::new(Sm3Config { epsilon: 0.0, weight_decay, momentum }, patterns)
    }

    fn step(optimizer: &mut Sm3, values: [f32; 3], gradient: [f32; 3], learning_rate: f64) -> Vec<f32> {
        let device = Device::flex();
        let tensor = |values: [f32; 3]| row_tensor(values.to_vec(), &device);
        let (value, gradient) = (tensor(values), tensor(gradient));
        host(&optimizer.step(vec![ParameterStep { name: NAME, learning_rate, value, gradient }], None)[0])
    }

    #[test]
    fn two_steps_by_hand() {
        let mut optimizer = sm3(0.0, 0.0);
        // u = 9, 1, 4: every entry moves by the rate.
        let values = step(&mut optimizer, [0.0, 1.0, 0.0], [3.0, 1.0, -2.0], 0.5);
        assert_eq!(values, [-0.5, 0.5, 0.5]);
        let memory = optimizer.memories[NAME].clone();
        assert_eq!((&memory.row[..], &memory.column[..]), (&[9.0, 4.0][..], &[9.0, 1.0][..]));
        // The place (1, 1), which has no entry, scores 4·1.
        let order: Vec<u32> = largest_products(&memory.row, &memory.column).collect();
        assert_eq!((order, memory.row[1] * memory.column[1]), (vec![0, 2, 1, 3], 4.0));

        // u = 18, 2, 8.
        let values = step(&mut optimizer, [0.0; 3], [3.0, 1.0, -2.0], 1.0);
        for (found, expected) in
            values.iter().zip([-3.0 / 18f32.sqrt(), -1.0 / 2f32.sqrt(), 2.0 / 8f32.sqrt()])
        {
            assert!((found - expected).abs() < 1e-6);
        }
        let memory = &optimizer.memories[NAME];
        assert_eq!((&memory.row[..], &memory.column[..]), (&[18.0, 8.0][..], &[18.0, 2.0][..]));
        assert_eq!(memory.row[1] * memory.column[1], 16.0);
    }

    #[test]
    fn momentum_and_decay_by_hand() {
        let mut optimizer = sm3(0.75, 0.5);
        // The quotients are 1, 1, −1, of which the first step takes a quarter; then half of what is left goes.
        let values = step(&mut optimizer, [1.0, 0.0, 0.0], [3.0, 1.0, -2.0], 1.0);
        assert_eq!(values, [0.375, -0.125, 0.125]);
        // b = 0.75·0.25 + 0.25·0 without a gradient.
        let values = step(&mut optimizer, [0.0; 3], [0.0; 3], 1.0);
        assert_eq!(values, [-0.093_75, -0.093_75, 0.093_75]);
    }

    #[test]
    fn a_saved_memory_comes_back() {
        let mut optimizer = sm3(0.5, 0.0);
        step(&mut optimizer, [0.0; 3], [3.0, 1.0, -2.0], 1.0);
        let (tensors, scalars) = optimizer.save();
        let tensors: BTreeMap<String, TensorData> = tensors.into_iter().collect();
        let mut other = sm3(0.5, 0.0);
        let names = [NAME.to_string()];
        other.load(&names, tensors.clone(), scalars.clone(), &Device::flex()).unwrap();
        assert_eq!(other.memories, optimizer.memories);
        let mut short = tensors.clone();
        short.insert(format!("{NAME}.row"), TensorData::new(vec![1f32], [1, 1]));
        assert_eq!(other.load(&names, short, scalars.clone(), &Device::flex()), Err(NAME.to_string()));
        let missing = sm3(0.5, 0.0).load(&names, BTreeMap::new(), scalars, &Device::flex());
        assert_eq!(missing, Err(NAME.to_string()));
        // Edits see every tensor of it.
        let mut seen = Vec::new();
        other.edit(NAME, &Device::flex(), &mut |leaf, tensor| {
            seen.push(leaf.to_string());
            tensor.mul_scalar(2.0)
        });
        assert_eq!(seen, ["row", "column", "momentum"]);
        assert_eq!(other.memories[NAME].row, [18.0, 8.0]);
        other.forget(NAME);
        assert!(!other.remembers(NAME));
    }
}
