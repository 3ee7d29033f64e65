//! Optimizers over named parameters.

use crate::kernels::{AdamW, AdamWState, Clip, Update};
use crate::model::Decoder;
use crate::projection::Parameter;
use burn::optim::{Optimizer, RecordState, StateSink, StateSource};
use burn::tensor::{Device, Tensor, TensorData};
use std::collections::BTreeMap;

/// One parameter of a step.
pub struct ParameterStep<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its rate in this step.
    pub learning_rate: f64,
    /// Its value.
    pub value: Tensor<2>,
    /// The gradient of the loss.
    pub gradient: Tensor<2>,
}

/// Gives the new value of a tensor of an optimizer's memory from its name there and its old one.
pub type MemoryChange<'a> = dyn FnMut(&str, Tensor<2>) -> Tensor<2> + 'a;

/// An optimizer with its memory of every parameter, by name.
pub trait ParameterOptimizer: Send {
    /// One update of each of the parameters with clipped gradients; returns their new values, in order. Gradients whose
    /// norm is not finite change no value.
    fn step(&mut self, parameters: Vec<ParameterStep>, clip: Option<&Clip>) -> Vec<Tensor<2>>;

    /// Takes back the last step, which changed no value as its gradients were not finite.
    fn take_back(&mut self);

    /// Whether it has a memory of the parameter `name`.
    fn remembers(&self, name: &str) -> bool;

    /// Drops the memory of the parameter `name`: its next update is like its first.
    fn forget(&mut self, name: &str);

    /// Changes the tensors of its memory of the parameter `name`, each shown with the name it has there (`moment_1`), on
    /// the device given. Counts of steps stay.
    fn edit(&mut self, name: &str, device: &Device, change: &mut MemoryChange);

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

/// Updates the parameters that have gradients, clipped, each at the rate for its name.
pub fn update_parameters(
    model: &mut Decoder,
    optimizer: &mut dyn ParameterOptimizer,
    mut gradients: BTreeMap<String, Tensor<2>>,
    clip: Option<&Clip>,
    rate: impl Fn(&str) -> f64,
) {
    let placeholder = Tensor::empty([1, 1], &model.device);
    let mut parameters: Vec<&mut Parameter> = model.parameters_mut();
    parameters.retain(|parameter| gradients.contains_key(&parameter.name));
    let steps = parameters.iter_mut().filter_map(|parameter| {
        let gradient = gradients.remove(&parameter.name)?;
        let learning_rate = rate(&parameter.name);
        // The value is taken out, so that the optimizer may change it where it lies.
        let value = std::mem::replace(&mut parameter.value, placeholder.clone());
        Some(ParameterStep { name: &parameter.name, learning_rate, value, gradient })
    });
    let values = optimizer.step(steps.collect(), clip);
    for (parameter, value) in parameters.into_iter().zip(values) {
        parameter.value = value;
    }
    model.refresh();
}

/// A step's value, gradient, rate and memory of one parameter.
pub type OptimizerStep<O> = (Tensor<2>, Tensor<2>, f64, Option<<O as Optimizer>::State<2>>);

/// A burn optimizer that updates many parameters at a time.
pub trait ManyOptimizer: Optimizer {
    /// One update of each with clipped gradients; returns values and memories, in order. Gradients whose norm is not
    /// finite change no value.
    fn step_many(
        &self,
        steps: Vec<OptimizerStep<Self>>,
        clip: Option<&Clip>,
    ) -> Vec<(Tensor<2>, Option<Self::State<2>>)>;

    /// The memory with its tensors changed, each shown with its name.
    fn edited(state: Self::State<2>, change: &mut MemoryChange) -> Self::State<2>;

    /// The memory as it was before an update that changed no value.
    fn before(state: Self::State<2>) -> Self::State<2> {
        state
    }
}

impl ManyOptimizer for AdamW {
    fn step_many(
        &self,
        steps: Vec<OptimizerStep<Self>>,
        clip: Option<&Clip>,
    ) -> Vec<(Tensor<2>, Option<AdamWState<2>>)> {
        let updates: Vec<Update<Tensor<2>>> = steps
            .into_iter()
            .map(|(parameter, gradient, rate, state)| {
                let AdamWState { moment_1, moment_2, time } =
                    state.unwrap_or_else(|| AdamWState::new(&gradient));
                Update { parameter, gradient, moment_1, moment_2, rate, time: time + 1 }
            })
            .collect();
        let times: Vec<i64> = updates.iter().map(|update| update.time).collect();
        let updated = self.update_all(updates, clip).into_iter().zip(times);
        let remember = |([value, moment_1, moment_2], time): ([Tensor<2>; 3], i64)| {
            (value, Some(AdamWState { moment_1, moment_2, time }))
        };
        updated.map(remember).collect()
    }

    fn edited(state: AdamWState<2>, change: &mut MemoryChange) -> AdamWState<2> {
        let AdamWState { moment_1, moment_2, time } = state;
        AdamWState { moment_1: change("moment_1", moment_1), moment_2: change("moment_2", moment_2), time }
    }

    fn before(state: AdamWState<2>) -> AdamWState<2> {
        AdamWState { time: state.time - 1, ..state }
    }
}

/// An optimizer by parameter name.
pub struct NamedOptimizer<O: ManyOptimizer> {
    optimizer: O,
    states: BTreeMap<String, O::State<2>>,
    /// What the last step updated.
    updated: Vec<String>,
}

impl<O: ManyOptimizer> NamedOptimizer<O> {
    /// Without memory.
    pub fn new(optimizer: O) -> Self {
        Self { optimizer, states: BTreeMap::new(), updated: Vec::new() }
    }
}

impl<O: ManyOptimizer> ParameterOptimizer for NamedOptimizer<O> {
    fn step(&mut self, parameters: Vec<ParameterStep>, clip: Option<&Clip>) -> Vec<Tensor<2>> {
        self.updated.clear();
        let steps = parameters.into_iter().map(|ParameterStep { name, learning_rate, value, gradient }| {
            self.updated.push(name.to_string());
            (value, gradient, learning_rate, self.states.remove(name))
        });
        let steps = steps.collect();
        let updated = self.optimizer.step_many(steps, clip).into_iter().zip(&self.updated);
        let mut values = Vec::with_capacity(updated.len());
        for ((value, state), name) in updated {
            if let Some(state) = state {
                self.states.insert(name.clone(), state);
            }
            values.push(value);
        }
        values
    }

    fn remembers(&self, name: &str) -> bool {
        self.states.contains_key(name)
    }

    fn forget(&mut self, name: &str) {
        self.states.remove(name);
    }

    fn edit(&mut self, name: &str, _: &Device, change: &mut MemoryChange) {
        if let Some(state) = self.states.remove(name) {
            self.states.insert(name.to_string(), O::edited(state, change));
        }
    }

    fn take_back(&mut self) {
        for name in std::mem::take(&mut self.updated) {
            if let Some(state) = self.states.remove(&name) {
                self.states.insert(name, O::before(state));
            }
        }
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
