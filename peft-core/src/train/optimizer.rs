//! Optimizers over named parameters.

use burn::optim::{Optimizer, RecordState, StateSink, StateSource};
use burn::tensor::{Device, Tensor, TensorData};
use std::collections::BTreeMap;

/// An optimizer with its memory of every parameter, by name.
pub trait ParameterOptimizer: Send {
    /// One update of one parameter; returns its new value.
    fn step(&mut self, name: &str, learning_rate: f64, value: Tensor<2>, gradient: Tensor<2>) -> Tensor<2>;

    /// The memory as named tensors and whole numbers.
    fn save(&self) -> (Vec<(String, TensorData)>, BTreeMap<String, i64>);

    /// Takes up a saved memory of the parameters in `names`. Returns the name of a parameter without a complete one.
    fn load(
        &mut self,
        names: &[String],
        tensors: BTreeMap<String, TensorData>,
        scalars: BTreeMap<String, i64>,
        device: &Device,
    ) -> Result<(), String>;
}

/// Any burn optimizer, by parameter name.
pub struct NamedOptimizer<O: Optimizer> {
    optimizer: O,
    states: BTreeMap<String, O::State<2>>,
}

impl<O: Optimizer> NamedOptimizer<O> {
    /// Without memory.
    pub fn new(optimizer: O) -> Self {
        Self { optimizer, states: BTreeMap::new() }
    }
}

impl<O: Optimizer> ParameterOptimizer for NamedOptimizer<O> {
    fn step(&mut self, name: &str, learning_rate: f64, value: Tensor<2>, gradient: Tensor<2>) -> Tensor<2> {
        let state = self.states.remove(name);
        let (value, state) = self.optimizer.step(learning_rate, value, gradient, state);
        if let Some(state) = state {
            self.states.insert(name.to_string(), state);
        }
        value
    }

    fn save(&self) -> (Vec<(String, TensorData)>, BTreeMap<String, i64>) {
        let mut sink = StateSink::default();
        for (name, state) in &self.states {
            state.state_flatten(name, &mut sink);
        }
        let scalars =
            sink.scalars.into_iter().filter_map(|(name, value)| Some((name, i64::try_from(value).ok()?)));
        (sink.tensors, scalars.collect())
    }

    fn load(
        &mut self,
        names: &[String],
        tensors: BTreeMap<String, TensorData>,
        scalars: BTreeMap<String, i64>,
        device: &Device,
    ) -> Result<(), String> {
        let mut source =
            StateSource::new(scalars.into_iter().map(|(name, value)| (name, value.into())).collect());
        for (name, data) in tensors {
            source.insert_tensor(name, data);
        }
        for name in names {
            let state =
                O::State::<2>::state_unflatten(name, &mut source, device).ok_or_else(|| name.clone())?;
            self.states.insert(name.clone(), state);
        }
        Ok(())
    }
}
