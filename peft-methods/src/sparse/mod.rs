//! Sparse fine-tuning with positions that move (SpIEL, Ansell et al., arXiv 2401.16405): a fixed number of values trains
//! in each weight, and from time to time those that have moved least give their places to others. These are found by
//! their gradient, summed over some steps, or by the moments of their row and column.
//!
//! The change adds to the frozen weight's product in f32 and costs as many numbers as it has values: three moments each
//! with accumulated gradients, none with moments by row and column. A dense gradient exists for one module at a time, in
//! the first micro-batch of a selection phase.

mod adamw;
mod block;
mod collector;
mod file;
mod growth;
mod positions;
mod range_coder;
mod schedule;
mod selection;
mod shira;
mod sm3;

pub use block::{Criterion, SparseBlock, ValuesDtype};
pub use file::{SPARSE_FORMAT, SparseAdapter, SparseConfig, SparseModule};
pub use schedule::ReselectionPolicy;
pub use shira::{ShiraReport, export_shira};

use crate::registry::{Block, Kind, RunContext, Scaffold};
use adamw::Seed;
use block::Target;
use burn::tensor::{DType, Device, Tensor, TensorData};
use collector::Collector;
use peft_core::adapter::{AdapterError, SavedAdapter, tensors_sha256};
use peft_core::checkpoint::Headers;
use peft_core::kernels::{AdamW, SparsePattern};
use peft_core::model::{Decoder, ModelConfig, ParameterShape};
use peft_core::projection::{Delta, Sparse};
use peft_core::random::Stream;
use peft_core::strict;
use peft_core::train::{
    Method, MethodPlan, MethodState, NamedOptimizer, ParameterOptimizer, ParameterRole, PlannedParameter,
    Preparation, Progress, TrainError,
};
use rayon::prelude::*;
use schedule::Schedule;
use selection::{Candidates, Exchange, by_gradients, by_moments};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sm3::{Patterns, Sm3};
use std::collections::{BTreeMap, HashSet};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Sparse fine-tuning as recipes name it.
pub static SPARSE: Kind = Kind {
    name: "sparse",
    title: "sparse fine-tuning",
    about: "values at positions that move",
    parse: |keys| Ok(Box::new(strict::parse::<SparseBlock>(keys)?)),
    file: Some(&SPARSE_FORMAT),
    in_peft: false,
    scaffolds: &[Scaffold {
        name: "sparse",
        about: "few values in each weight, at positions that move",
        keys: &[
            (
                "criterion",
                "accumulated_gradient",
                "where values go: by their gradient, or moment_approximation",
            ),
            ("density", "0.01", "trained values as a share of the model's parameters"),
            ("reselection_steps", "20", "steps between two choices of positions"),
            ("selection_accumulation_steps", "5", "steps that a choice looks at"),
        ],
        learning_rates: ("1e-4", "1e-3"),
    }],
};

impl Block for SparseBlock {
    fn check(&self, _starts_from_adapter: bool) -> Result<(), String> {
        SparseBlock::check(self)
    }

    fn check_length(&self, total_steps: u64) -> Result<(), String> {
        SparseBlock::check_length(self, total_steps)
    }

    fn plan(&self, model: &ModelConfig, _base: &Headers) -> peft_core::Result<MethodPlan> {
        let targets = self.targets(model)?;
        let with_values = targets.iter().filter(|target| target.values > 0);
        let parameters = with_values.clone().map(|target| PlannedParameter {
            shape: ParameterShape::new(format!("{}.sparse_values", target.path), [target.values]),
            module: target.path.clone(),
            role: ParameterRole::Sparse {
                candidates: match self.criterion {
                    Criterion::AccumulatedGradient => target.values,
                    Criterion::MomentApproximation => 0,
                },
            },
            trainable: true,
        });
        let parameters = parameters.collect();
        let artifact_bytes = file::expected_bytes(with_values, self.values_dtype)?;
        Ok(MethodPlan { model: model.clone(), parameters, artifact_bytes })
    }

    fn method(&self, run: &RunContext) -> peft_core::Result<Box<dyn Method>> {
        SparseBlock::check(self).map_err(TrainError::Preparation)?;
        let targets = self.targets(&run.model()?)?;
        let weights = targets.iter().filter(|target| target.values > 0);
        let weights: Vec<String> = weights.map(|target| format!("{}.weight", target.path)).collect();
        Ok(Box::new(SparseFineTuning {
            block: self.clone(),
            base: run.base_name.to_string(),
            revision: run.revision.map(str::to_string),
            base_tensors_sha256: tensors_sha256(run.base, &weights)?,
            optimizer: AdamW { beta_1: 0.9, beta_2: 0.999, epsilon: 1e-8, weight_decay: 0.0 },
            start: run.start.map(Path::to_path_buf),
            patterns: Patterns::default(),
            phase: None,
            warnings: Vec::new(),
        }))
    }
}

/// Sparse fine-tuning on a model.
pub struct SparseFineTuning {
    block: SparseBlock,
    base: String,
    revision: Option<String>,
    base_tensors_sha256: String,
    /// The recipe's decays.
    optimizer: AdamW,
    /// The adapter's folder that first positions and values come from.
    start: Option<PathBuf>,
    /// For SM3.
    patterns: Patterns,
    /// The selection phase that is open, with accumulated gradients.
    phase: Option<Phase>,
    /// What the user should know.
    warnings: Vec<String>,
}

/// A selection phase.
#[derive(Debug, Default)]
struct Phase {
    /// Steps whose gradients it has seen whole.
    steps: u64,
    /// By module.
    collectors: BTreeMap<String, Arc<Collector>>,
}

impl SparseFineTuning {
    fn is_by_gradient(&self) -> bool {
        self.block.criterion == Criterion::AccumulatedGradient
    }

    fn schedule(&self) -> Schedule {
        self.block.schedule(self.start.is_none())
    }

    /// Begins to collect the gradient of every module.
    fn open(&mut self, model: &mut Decoder) {
        let mut phase = Phase::default();
        for (path, form) in forms_mut(model) {
            let collector = Arc::new(Collector::new(form.pattern.len()));
            form.observer = Some(collector.clone());
            phase.collectors.insert(path, collector);
        }
        self.phase = Some(phase);
    }

    /// Chooses positions again after the step that `progress` counts.
    fn reselect(
        &mut self,
        model: &mut Decoder,
        optimizer: &mut dyn ParameterOptimizer,
        progress: Progress,
    ) -> Result<(), TrainError> {
        let phase = self.phase.take();
        let schedule = self.schedule();
        let mut forms: Vec<(String, &mut Sparse)> = forms_mut(model).collect();
        // As many at a time as are worked on at once: the host holds their values, not those of all modules.
        for forms in forms.chunks_mut(rayon::current_num_threads()) {
            let mut seen = Vec::with_capacity(forms.len());
            for (path, form) in forms.iter_mut() {
                form.observer = None;
                let found = match &phase {
                    Some(phase) => {
                        let candidates = phase.collectors[path.as_str()].candidates();
                        Seen::Gradients(candidates.map_err(|error| refused(path, error))?, phase.steps)
                    }
                    None => {
                        let (row, column) = moments(optimizer, form);
                        Seen::Moments(row, column)
                    }
                };
                let leaving = schedule.leaving(form.pattern.len(), progress.step, progress.total_steps);
                seen.push((path.as_str(), form.pattern.clone(), form.values.to_host(), leaving, found));
            }
            let exchanged = seen.into_par_iter().map(|(path, pattern, values, leaving, seen)| {
                let entries = self.exchanged(path, &pattern, &values, leaving, seen)?;
                Ok(entries.map(|entries| (entries, values)))
            });
            let exchanged: Vec<Option<(Entries, Vec<f32>)>> = exchanged.collect::<Result<_, TrainError>>()?;
            for ((_, form), exchanged) in forms.iter_mut().zip(exchanged) {
                if let Some((entries, values)) = exchanged {
                    entries.take_up(form, optimizer, &values);
                    self.patterns.set(&form.values.name, form.pattern.clone());
                }
            }
        }
        Ok(())
    }

    /// The entries of the module at `path` after `leaving` of them made room for what was seen; `None` where none does.
    fn exchanged(
        &self,
        path: &str,
        pattern: &SparsePattern,
        values: &[f32],
        leaving: usize,
        seen: Seen,
    ) -> Result<Option<Entries>, TrainError> {
        let positions = pattern.positions();
        let (exchange, arrivals) = match seen {
            Seen::Gradients(candidates, steps) => {
                let exchange = by_gradients(values, positions, &candidates, leaving)
                    .map_err(|error| refused(path, format!("of the sums of its gradient, {error}")))?;
                let seeds = self.seeds(&exchange, &candidates, steps);
                (exchange, seeds)
            }
            Seen::Moments(row, column) => {
                let exchange = by_moments(values, positions, &row, &column, leaving)
                    .map_err(|error| refused(path, format!("of its moments, {error}")))?;
                let arrivals = exchange.coming.iter().map(|position| (*position as u32, Seed::default()));
                let arrivals = arrivals.collect();
                (exchange, arrivals)
            }
        };
        let some = !exchange.leaving.is_empty();
        Ok(some.then(|| Entries::exchanged(pattern, &exchange.leaving, &arrivals)))
    }

    /// Where the arrivals of an exchange go, and what their optimizer starts from.
    fn seeds(&self, exchange: &Exchange, candidates: &Candidates, steps: u64) -> Vec<(u32, Seed)> {
        let adamw = self.block.adamw(&self.optimizer);
        let Candidates { positions, sums, squares, samples } = candidates;
        let compat_age = self.block.compat_age;
        let seed = |place: &usize| {
            let seed = adamw.seed(sums[*place], squares[*place], *samples, steps, compat_age);
            (positions[*place], seed)
        };
        exchange.coming.iter().map(seed).collect()
    }
}

/// The sparse changes of a decoder, by path.
fn forms_mut(model: &mut Decoder) -> impl Iterator<Item = (String, &mut Sparse)> {
    model.projections_mut().filter_map(|projection| match &mut projection.delta {
        Some(Delta::Sparse(form)) => Some((projection.path.clone(), form)),
        _ => None,
    })
}

/// What SM3 remembers of a module's rows and columns; nothing before its first update.
fn moments(optimizer: &mut dyn ParameterOptimizer, form: &Sparse) -> (Vec<f32>, Vec<f32>) {
    let [rows, columns] = form.pattern.dims();
    let (mut row, mut column) = (vec![0.0; rows], vec![0.0; columns]);
    optimizer.edit(&form.values.name, &form.values.value.device(), &mut |leaf, tensor| {
        match leaf {
            "row" => row = host(&tensor),
            "column" => column = host(&tensor),
            _ => {}
        }
        tensor
    });
    (row, column)
}

/// What a choice of positions goes by.
enum Seen {
    /// What was collected of the gradient, and over how many steps.
    Gradients(Candidates, u64),
    /// SM3's moments of rows and columns.
    Moments(Vec<f32>, Vec<f32>),
}

/// Why positions of the module at `path` cannot be chosen again.
fn refused(path: &str, reason: impl Display) -> TrainError {
    TrainError::Method(format!("`{path}`: positions cannot be chosen again: {reason}"))
}

/// Where an entry comes from.
enum Origin {
    /// It was there, in this place.
    Kept(usize),
    /// It has come, with this start.
    Come(Seed),
}

/// The entries of a module after an exchange.
struct Entries {
    origins: Vec<Origin>,
    pattern: SparsePattern,
}

impl Entries {
    /// Those of `pattern` without the ones in the places `leaving`, and `arrivals` at their positions.
    fn exchanged(pattern: &SparsePattern, leaving: &[usize], arrivals: &[(u32, Seed)]) -> Self {
        let mut leaves = leaving.iter().peekable();
        let kept = pattern.positions().iter().copied().enumerate();
        let kept = kept.filter(|(entry, _)| leaves.next_if_eq(&entry).is_none());
        let mut entries: Vec<(u32, Origin)> =
            kept.map(|(entry, position)| (position, Origin::Kept(entry))).collect();
        entries.extend(arrivals.iter().map(|(position, seed)| (*position, Origin::Come(*seed))));
        entries.sort_unstable_by_key(|(position, _)| *position);
        let (positions, origins): (Vec<u32>, Vec<Origin>) = entries.into_iter().unzip();
        let pattern = SparsePattern::new(pattern.dims(), positions);
        Self { origins, pattern: pattern.expect("arrivals come to free places") }
    }

    /// Each entry's number: its old one, or what it comes with.
    fn moved(&self, old: &[f32], come: impl Fn(&Seed) -> f32) -> Vec<f32> {
        let value = |origin: &Origin| match origin {
            Origin::Kept(entry) => old[*entry],
            Origin::Come(seed) => come(seed),
        };
        self.origins.iter().map(value).collect()
    }

    /// Makes them the entries of `form`, whose values were `values`, and of the optimizer's memory; what comes has value 0.
    fn take_up(self, form: &mut Sparse, optimizer: &mut dyn ParameterOptimizer, values: &[f32]) {
        let device = form.values.value.device();
        optimizer.edit(&form.values.name, &device, &mut |leaf, tensor| {
            let come: fn(&Seed) -> f32 = match leaf {
                "moment_1" => |seed| seed.moment_1,
                "moment_2" => |seed| seed.moment_2,
                "age" => |seed| seed.age,
                "momentum" => |_| 0.0,
                _ => return tensor,
            };
            row_tensor(self.moved(&host(&tensor), come), &device)
        });
        form.values.value = row_tensor(self.moved(values, |_| 0.0), &device);
        form.pattern = Arc::new(self.pattern);
    }
}

impl Method for SparseFineTuning {
    fn name(&self) -> &'static str {
        SPARSE.name
    }

    fn artifact(&self) -> &'static str {
        "adapter"
    }

    fn optimizer(&mut self, recipe: &AdamW) -> Box<dyn ParameterOptimizer> {
        self.optimizer = recipe.clone();
        match self.block.criterion {
            Criterion::AccumulatedGradient => Box::new(NamedOptimizer::new(self.block.adamw(recipe))),
            Criterion::MomentApproximation => {
                Box::new(Sm3::new(self.block.sm3(recipe), self.patterns.clone()))
            }
        }
    }

    /// Values are 0 at positions drawn from the stream (seed, "sparse positions", path), or come from an adapter with as
    /// many of them.
    fn prepare(&mut self, model: &mut Decoder, preparation: &Preparation) -> peft_core::Result<()> {
        self.block.check_length(preparation.length.total_steps).map_err(TrainError::Preparation)?;
        let targets = self.block.targets(&model.config)?;
        let device = model.device.clone();
        let mut given = match &self.start {
            Some(dir) => Some(given_modules(dir, &targets)?),
            None => None,
        };
        let empty: Vec<&str> =
            targets.iter().filter(|target| target.values == 0).map(|target| target.path.as_str()).collect();
        if let Some(first) = empty.first() {
            self.warnings.push(format!(
                "{} modules get no value, for their share is less than one (`{first}` the first of them)",
                empty.len()
            ));
        }
        for target in targets.into_iter().filter(|target| target.values > 0) {
            let projection = model.projections_mut().find(|projection| projection.path == target.path);
            let Some(projection) = projection else {
                let reason = "is no linear module with a weight of its own".to_string();
                return Err(AdapterError::Target { module: target.path, reason }.into());
            };
            let module = given.as_mut().and_then(|modules| modules.remove(&target.path));
            let SparseModule { pattern, values } = module.unwrap_or_else(|| {
                let mut stream = Stream::new(preparation.seed, "sparse positions", &target.path, &[]);
                let positions = drawn(target.values, target.dims[0] * target.dims[1], &mut stream);
                let pattern = SparsePattern::new(target.dims, positions).expect("drawn in order");
                SparseModule { pattern: Arc::new(pattern), values: vec![0.0; target.values] }
            });
            let mut form = Sparse::new(&target.path, pattern, row_tensor(values, &device));
            form.values.set_trainable();
            self.patterns.set(&form.values.name, form.pattern.clone());
            projection.delta = Some(Delta::Sparse(form));
        }
        if self.is_by_gradient() {
            self.open(model);
        }
        Ok(())
    }

    fn after_update(
        &mut self,
        model: &mut Decoder,
        optimizer: &mut dyn ParameterOptimizer,
        progress: Progress,
    ) -> Result<(), TrainError> {
        let Progress { step, total_steps } = progress;
        let schedule = self.schedule();
        if let Some(phase) = &mut self.phase {
            phase.steps += 1;
        }
        if schedule.closes(step) && (self.phase.is_some() || !self.is_by_gradient()) {
            self.reselect(model, optimizer, progress)?;
        }
        if self.is_by_gradient() && schedule.opens(step, total_steps) {
            self.open(model);
        }
        Ok(())
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn state(&self) -> MethodState {
        let integers = |values: &[u32]| {
            let values: Vec<i64> = values.iter().map(|value| i64::from(*value)).collect();
            let shape = [values.len()];
            TensorData::new(values, shape)
        };
        let mut tensors = BTreeMap::new();
        for (name, pattern) in self.patterns.all() {
            tensors.insert(format!("{name}.{POSITIONS}"), integers(pattern.positions()));
        }
        let phase = self.phase.as_ref().map(|phase| {
            let mut samples = BTreeMap::new();
            for (path, collector) in &phase.collectors {
                // What was opened just now has seen nothing, and begins anew.
                let Ok(candidates) = collector.candidates() else { continue };
                let count = candidates.positions.len();
                tensors.insert(format!("{path}.{CANDIDATES}"), integers(&candidates.positions));
                tensors.insert(format!("{path}.{SUMS}"), TensorData::new(candidates.sums, [count]));
                tensors.insert(format!("{path}.{SQUARES}"), TensorData::new(candidates.squares, [count]));
                samples.insert(path.clone(), candidates.samples);
            }
            SavedPhase { steps: phase.steps, samples }
        });
        MethodState { tensors, json: json!(SavedState { phase }) }
    }

    fn restore(&mut self, model: &mut Decoder, state: MethodState) -> Result<(), String> {
        let MethodState { mut tensors, json } = state;
        let SavedState { phase } = serde_json::from_value(json)
            .map_err(|error| format!("the state of the sparse method is damaged: {error}"))?;
        let device = model.device.clone();
        self.phase = phase.as_ref().map(|phase| Phase { steps: phase.steps, ..Phase::default() });
        for (path, form) in forms_mut(model) {
            let dims = form.pattern.dims();
            let positions = take_positions(&mut tensors, &format!("{}.{POSITIONS}", form.values.name))?;
            if positions.len() != form.pattern.len() {
                let (found, expected) = (positions.len(), form.pattern.len());
                return Err(format!("`{path}` has {found} positions there, the recipe gives it {expected}"));
            }
            let pattern =
                SparsePattern::new(dims, positions).map_err(|error| format!("`{path}`: {error}"))?;
            form.pattern = Arc::new(pattern);
            form.observer = None;
            self.patterns.set(&form.values.name, form.pattern.clone());
            let (Some(phase), Some(saved)) = (&mut self.phase, &phase) else { continue };
            let collector = match saved.samples.get(&path) {
                None => Collector::new(form.pattern.len()),
                Some(samples) => {
                    let candidates = Candidates {
                        positions: take_positions(&mut tensors, &format!("{path}.{CANDIDATES}"))?,
                        sums: take_values(&mut tensors, &format!("{path}.{SUMS}"))?,
                        squares: take_values(&mut tensors, &format!("{path}.{SQUARES}"))?,
                        samples: *samples,
                    };
                    Collector::resumed(dims, candidates, &device)
                        .map_err(|error| format!("`{path}`: {error}"))?
                }
            };
            let collector = Arc::new(collector);
            form.observer = Some(collector.clone());
            phase.collectors.insert(path, collector);
        }
        Ok(())
    }

    fn export(&self, model: &Decoder, dir: &Path) -> Result<(), TrainError> {
        let (base, revision) = (Some(self.base.as_str()), self.revision.as_deref());
        Ok(file::save(model, base, revision, self.block.values_dtype, &self.base_tensors_sha256, dir)?)
    }
}

/// The modules of the adapter in `dir`, which must be the targets, with as many values.
fn given_modules(dir: &Path, targets: &[Target]) -> Result<BTreeMap<String, SparseModule>, AdapterError> {
    let start = SparseAdapter::open(dir)?;
    let (counts, shapes) = (&start.config().num_deltas, &start.config().shapes);
    let differs = |what: String| start.folder().wrong(format!("adapter_name_or_path: {what}"));
    for Target { path, dims, values } in targets {
        let given = counts.get(path).copied().unwrap_or(0);
        if given != *values {
            let message =
                format!("that adapter has {given} values in `{path}`, the recipe gives it {values}");
            return Err(differs(message));
        }
        if let Some(given) = shapes.get(path).filter(|given| *given != dims) {
            return Err(differs(format!("`{path}` has shape {given:?} there, {dims:?} in the base")));
        }
    }
    match counts.keys().find(|path| !targets.iter().any(|target| target.path == **path)) {
        Some(path) => {
            Err(differs(format!("`{path}`, which that adapter changes, is no target of this recipe")))
        }
        None => start.modules(),
    }
}

/// Names of a module's tensors in the state.
const POSITIONS: &str = "positions";
const CANDIDATES: &str = "candidates";
const SUMS: &str = "gradient_sums";
const SQUARES: &str = "gradient_squares";

/// What the state says beside its tensors.
#[derive(Serialize, Deserialize)]
struct SavedState {
    phase: Option<SavedPhase>,
}

/// A phase that was open.
#[derive(Serialize, Deserialize)]
struct SavedPhase {
    steps: u64,
    /// Micro-batches seen, by module; without those that have seen none.
    samples: BTreeMap<String, u64>,
}

fn take(tensors: &mut BTreeMap<String, TensorData>, name: &str) -> Result<TensorData, String> {
    tensors.remove(name).ok_or_else(|| format!("`{name}` is missing from the state of the sparse method"))
}

fn take_values(tensors: &mut BTreeMap<String, TensorData>, name: &str) -> Result<Vec<f32>, String> {
    Ok(take(tensors, name)?.iter::<f32>().collect())
}

fn take_positions(tensors: &mut BTreeMap<String, TensorData>, name: &str) -> Result<Vec<u32>, String> {
    let positions = take(tensors, name)?;
    let position = |value: i64| {
        u32::try_from(value).map_err(|_| format!("`{name}` holds {value}, which is no position of a weight"))
    };
    positions.iter::<i64>().map(position).collect()
}

/// `count` of `places` places, each set as likely as any other, ascending (Floyd's algorithm).
fn drawn(count: usize, places: usize, stream: &mut Stream) -> Vec<u32> {
    let mut chosen = HashSet::with_capacity(count);
    for last in places - count..places {
        let place = stream.below(last as u64 + 1) as u32;
        if !chosen.insert(place) {
            chosen.insert(last as u32);
        }
    }
    let mut positions: Vec<u32> = chosen.into_iter().collect();
    positions.sort_unstable();
    positions
}

fn host(tensor: &Tensor<2>) -> Vec<f32> {
    tensor.to_data().iter::<f32>().collect()
}

fn row_tensor(values: Vec<f32>, device: &Device) -> Tensor<2> {
    let shape = [1, values.len()];
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

#[cfg(test)]
mod tests;
