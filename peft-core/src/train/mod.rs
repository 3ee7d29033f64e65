//! Training: the step, the loop, schedules, optimizers by name, metrics and the state of a run.

mod course;
mod error;
mod evaluate;
mod layer_gradients;
mod loss;
mod memory;
mod method;
mod metrics;
mod optimizer;
pub mod plan;
mod run;
mod schedule;
mod selection;
mod state;
mod step;
mod trainer;

pub use error::TrainError;
pub use evaluate::{Evaluation, Generation, evaluate, exact_match};
pub use layer_gradients::layer_gradients;
pub use memory::{DeviceMemory, device_memory, peak_memory_bytes, ready_memory, resident_bytes};
pub use method::{
    Method, MethodPlan, MethodState, ParameterRole, PlannedParameter, Preparation, Progress, RunLength,
};
pub use metrics::{EvalMetrics, StepMetrics};
pub use optimizer::{
    ManyOptimizer, MemoryChange, NamedOptimizer, OptimizerStep, ParameterOptimizer, ParameterStep,
    update_parameters,
};
pub use schedule::{Schedule, Warmup};
pub use selection::{BestMetric, EarlyStopping, Every, Selection};
pub use state::{Fingerprint, Identity, saved_identity, state_bytes};
pub use step::{
    GradientCheckpointing, GradientSink, MicroBatch, MicroBatchLoss, StepGradients, StepSettings, accumulate,
    backward,
};
pub use trainer::{
    Observer, Outcome, RunSummary, Stopped, TrainConfig, Trainer, latest_checkpoint, require_vocabulary,
};
