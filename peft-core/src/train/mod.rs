//! Training: the step, the loop, schedules, optimizers by name, metrics and the state of a run.

mod error;
mod evaluate;
mod loss;
mod memory;
mod method;
mod metrics;
mod optimizer;
mod schedule;
mod state;
mod step;
mod trainer;

pub use error::TrainError;
pub use evaluate::{Evaluation, Generation, evaluate, exact_match};
pub use memory::peak_memory_bytes;
pub use method::{Method, Preparation};
pub use metrics::{EvalMetrics, StepMetrics};
pub use optimizer::{NamedOptimizer, ParameterOptimizer};
pub use schedule::{Schedule, Warmup};
pub use state::Fingerprint;
pub use step::{MicroBatch, StepGradients, StepSettings, accumulate, global_norm};
pub use trainer::{Observer, RunSummary, TrainConfig, Trainer, latest_checkpoint, require_vocabulary};
