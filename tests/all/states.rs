//! A method that uses everything the training loop offers one: state in checkpoints, weights watched, parameters frozen on
//! the way, the optimizer's memory changed and dropped.

use crate::contract::train;
use crate::families::open;
use burn::tensor::{Device, Tensor, TensorData};
use peft_core::kernels::AdamW;
use peft_core::model::Decoder;
use peft_core::projection::Parameter;
use peft_core::train::{
    Method, MethodState, NamedOptimizer, ParameterOptimizer, ParameterStep, Preparation, Progress, TrainError,
};
use peft_methods::{Lora, LoraBlock};
use peft_tests::golden;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

const FROZEN: &str = "model.layers.0.self_attn.q_proj.lora_A.weight";
const HALVED: &str = "model.layers.1.self_attn.q_proj.lora_B.weight";
const WATCHED: &str = "model.layers.1.mlp.up_proj.weight";

/// LoRA that freezes one factor after three steps, halves another one's momentum after five, and scales all gradients by
/// what it has watched since its beginning.
struct Changing {
    lora: Lora,
    frozen: Option<Vec<f32>>,
    watched: f32,
    steps: Vec<i64>,
}

impl Changing {
    fn new() -> Self {
        let keys = json!({"r": 2, "target_modules": ["q_proj"]});
        let block: LoraBlock = serde_json::from_value(keys).unwrap();
        let lora = Lora::new(block, "base", None, None).unwrap();
        Self { lora, frozen: None, watched: 0.0, steps: Vec::new() }
    }

    fn freeze(model: &mut Decoder, values: Option<&Vec<f32>>) -> Vec<f32> {
        let mut parameters = model.parameters_mut().into_iter();
        let parameter: &mut Parameter = parameters.find(|p| p.name == FROZEN).unwrap();
        parameter.trainable = false;
        if let Some(values) = values {
            let data = TensorData::new(values.clone(), parameter.value.dims());
            parameter.value = Tensor::from_data(data, &parameter.value.device());
        }
        parameter.to_host()
    }
}

impl Method for Changing {
    fn name(&self) -> &'static str {
        "changing"
    }

    fn artifact(&self) -> &'static str {
        "adapter"
    }

    fn prepare(&mut self, model: &mut Decoder, preparation: &Preparation) -> peft_core::Result<()> {
        self.lora.prepare(model, preparation)
    }

    fn watched_weights(&self, progress: Progress) -> Vec<String> {
        if progress.step.is_multiple_of(2) { vec![WATCHED.to_string()] } else { Vec::new() }
    }

    fn weight_gradient(&mut self, name: &str, gradient: Tensor<2>) {
        assert_eq!((name, gradient.dims()), (WATCHED, [12, 24]));
        self.watched += gradient.square().sum().into_scalar::<f32>();
    }

    fn acts_on_gradients(&self) -> bool {
        true
    }

    fn before_update(
        &mut self,
        model: &Decoder,
        gradients: &mut BTreeMap<String, Tensor<2>>,
        progress: Progress,
    ) {
        assert!(!gradients.contains_key(WATCHED), "a watched weight is not trained");
        assert!(model.parameters().iter().all(|p| p.name != WATCHED || !p.trainable));
        assert_eq!(gradients.contains_key(FROZEN), progress.step < 3);
        for gradient in gradients.values_mut() {
            *gradient = gradient.clone().mul_scalar(1.0 + self.watched);
        }
    }

    fn after_update(
        &mut self,
        model: &mut Decoder,
        optimizer: &mut dyn ParameterOptimizer,
        progress: Progress,
    ) -> Result<(), TrainError> {
        assert_eq!(progress.total_steps, 8);
        self.steps.push(progress.step as i64);
        if progress.step == 3 {
            self.frozen = Some(Self::freeze(model, None));
            optimizer.forget(FROZEN);
            assert!(!optimizer.remembers(FROZEN) && optimizer.remembers(HALVED));
        }
        if progress.step == 5 {
            optimizer.edit(HALVED, &model.device, &mut |leaf, tensor| match leaf {
                "moment_1" => tensor.mul_scalar(0.5),
                _ => tensor,
            });
        }
        if progress.step == 6 {
            // Without memory, its next update is a first one; the checkpoint of this step has none of it.
            optimizer.forget(HALVED);
        }
        Ok(())
    }

    fn state(&self) -> MethodState {
        let steps = TensorData::new(self.steps.clone(), [self.steps.len()]);
        let watched = TensorData::new(vec![self.watched], [1]);
        let mut tensors = BTreeMap::from([("steps".to_string(), steps), ("watched".to_string(), watched)]);
        let frozen = self.frozen.as_ref().map(|values| TensorData::new(values.clone(), [values.len()]));
        tensors.extend(frozen.map(|values| ("frozen".to_string(), values)));
        MethodState { tensors, json: json!({"frozen": self.frozen.is_some()}) }
    }

    fn restore(&mut self, model: &mut Decoder, mut state: MethodState) -> Result<(), String> {
        let steps = state.tensors.remove("steps").ok_or("no steps")?;
        self.steps = steps.iter::<i64>().collect();
        self.watched = state.tensors["watched"].iter::<f32>().next().ok_or("nothing watched")?;
        if state.json["frozen"] == true {
            let values: Vec<f32> = state.tensors["frozen"].iter::<f32>().collect();
            Self::freeze(model, Some(&values));
            self.frozen = Some(values);
        }
        Ok(())
    }

    fn export(&self, model: &Decoder, dir: &Path) -> Result<(), TrainError> {
        self.lora.export(model, dir)
    }
}

#[test]
fn a_method_with_state_goes_on_from_any_checkpoint_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let base = golden("families/llama");
    let run = |name: String, resume: Option<&Path>| {
        let mut method = Changing::new();
        let files = train(&mut method, open(&base), &dir.path().join(name), resume);
        assert_eq!(method.steps, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert!(method.watched > 0.0);
        files
    };
    let expected = run("whole".to_string(), None);
    for step in [2, 4, 6] {
        let checkpoint = dir.path().join(format!("whole/checkpoints/step-{step:08}"));
        assert!(run(format!("from {step}"), Some(&checkpoint)) == expected, "from step {step}");
    }
    // The factor that was frozen after three steps is, in the end, what it was then.
    let mut early = Changing::new();
    let whole = dir.path().join("whole/checkpoints/step-00000004/state.safetensors");
    let file = peft_core::checkpoint::SafetensorsFile::open(whole).unwrap();
    assert!(!file.contains(&format!("parameter/{FROZEN}")));
    let frozen = file.tensor("method/frozen").unwrap().to_f32().unwrap();
    let adapter = dir.path().join("whole/adapter/adapter_model.safetensors");
    let adapter = peft_core::checkpoint::SafetensorsFile::open(adapter).unwrap();
    let last = adapter.tensor(&format!("base_model.model.{FROZEN}")).unwrap().to_f32().unwrap();
    assert_eq!(frozen, last);
    let error = early.restore(&mut open(&base), MethodState::default()).unwrap_err();
    assert_eq!(error, "no steps");
}

/// One parameter, two updates with the gradient 1: Adam's first moment is 0.1 and then 0.19. Halving it in between gives
/// 0.05·0.9 + 0.1 = 0.145; forgetting gives the first update again.
#[test]
fn an_optimizers_memory_is_changed_and_dropped() {
    let device = Device::flex();
    let one = || Tensor::<2>::ones([1, 1], &device);
    let adamw = || {
        let adamw = AdamW { beta_1: 0.9, beta_2: 0.999, epsilon: 0.0, weight_decay: 0.0 };
        NamedOptimizer::new(adamw)
    };
    let step = |optimizer: &mut NamedOptimizer<AdamW>| -> f32 {
        let step = ParameterStep { name: "p", learning_rate: 1.0, value: one(), gradient: one() };
        1.0 - optimizer.step(vec![step], None).remove(0).into_scalar::<f32>()
    };
    let mut optimizer = adamw();
    assert!(!optimizer.remembers("p"));
    assert!((step(&mut optimizer) - 1.0).abs() < 1e-5);
    let mut leaves = Vec::new();
    optimizer.edit("p", &device, &mut |leaf, tensor| {
        leaves.push(leaf.to_string());
        if leaf == "moment_1" { tensor.mul_scalar(0.5) } else { tensor }
    });
    assert_eq!(leaves, ["moment_1", "moment_2"]);
    // m̂ = 0.145 / 0.19, and v̂ = 1.
    assert!((step(&mut optimizer) - 0.145 / 0.19).abs() < 1e-5);
    optimizer.forget("p");
    assert!(!optimizer.remembers("p"));
    assert!((step(&mut optimizer) - 1.0).abs() < 1e-5);
    // What is not remembered is not shown.
    optimizer.edit("q", &device, &mut |_, _| panic!("nothing is remembered of q"));
}
