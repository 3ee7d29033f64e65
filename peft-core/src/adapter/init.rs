//! The ways the factors of a LoRA can start, with their settings, by PEFT's names.

use super::config::LoraConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// How the factors start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InitLoraWeights {
    /// `true`: `A` uniform in ±1/√in (Kaiming with a = √5), `B` zero.
    #[default]
    KaimingUniform,
    /// `gaussian`: `A` normal with deviation 1/r, `B` zero.
    Gaussian,
    /// `orthogonal`: random factors whose product is zero.
    Orthogonal,
    /// `eva`: `A` the main directions of the layer's inputs, `B` zero, ranks by explained variance.
    Eva,
    /// `pissa`: the largest singular values and vectors of the weight.
    Pissa,
    /// `pissa_niter_k`: those by a randomised decomposition with `k` power iterations.
    PissaNiter(usize),
    /// `olora`: the first columns and rows of the weight's QR decomposition.
    Olora,
    /// `corda`: singular vectors of the weight in the metric of the layer's inputs.
    Corda,
    /// `lora_ga`: singular vectors of the weight's gradient.
    LoraGa,
}

/// Names without a number in them.
const NAMES: [(&str, InitLoraWeights); 7] = [
    ("gaussian", InitLoraWeights::Gaussian),
    ("orthogonal", InitLoraWeights::Orthogonal),
    ("eva", InitLoraWeights::Eva),
    ("pissa", InitLoraWeights::Pissa),
    ("olora", InitLoraWeights::Olora),
    ("corda", InitLoraWeights::Corda),
    ("lora_ga", InitLoraWeights::LoraGa),
];

const PISSA_NITER: &str = "pissa_niter_";
/// More power iterations than this change nothing in any digit.
const MAX_ITERATIONS: usize = 1000;

impl InitLoraWeights {
    /// Whether the product of the first factors is taken out of the base weight.
    pub fn changes_base(self) -> bool {
        use InitLoraWeights::{Corda, LoraGa, Olora, Pissa, PissaNiter};
        matches!(self, Pissa | PissaNiter(_) | Olora | Corda | LoraGa)
    }

    /// Whether the first values depend on training data.
    pub fn needs_data(self) -> bool {
        matches!(self, InitLoraWeights::Eva | InitLoraWeights::Corda | InitLoraWeights::LoraGa)
    }

    /// Why the base that an unconverted adapter belongs to cannot be computed from the original one.
    pub(super) fn lost_base(self) -> Option<&'static str> {
        match self {
            InitLoraWeights::PissaNiter(_) => Some("the random numbers that decided how are in no file"),
            InitLoraWeights::Corda | InitLoraWeights::LoraGa => {
                Some("the training data that decided how are in no file")
            }
            _ => None,
        }
    }
}

impl Serialize for InitLoraWeights {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let InitLoraWeights::PissaNiter(iterations) = self {
            return serializer.serialize_str(&format!("{PISSA_NITER}{iterations}"));
        }
        match NAMES.iter().find(|(_, init)| init == self) {
            Some((name, _)) => serializer.serialize_str(name),
            None => serializer.serialize_bool(true),
        }
    }
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        if matches!(value, Value::Null | Value::Bool(true)) {
            return Ok(InitLoraWeights::KaimingUniform);
        }
        let name = value.as_str().unwrap_or_default();
        if let Some((_, init)) = NAMES.iter().find(|(known, _)| *known == name) {
            return Ok(*init);
        }
        let iterations = name.strip_prefix(PISSA_NITER).and_then(|number| number.parse().ok());
        match iterations.filter(|iterations| *iterations <= MAX_ITERATIONS) {
            Some(iterations) => Ok(InitLoraWeights::PissaNiter(iterations)),
            None => {
                let names: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
                let known = names.join(", ");
                let message = format!("{value} is no initialisation: true, {known} or {PISSA_NITER}4");
                Err(serde::de::Error::custom(message))
            }
        }
    }
}

/// `eva_config`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EvaConfig {
    /// A module's rank is at most round(r · rho); 1 leaves all ranks as they are.
    pub rho: f64,
    /// A direction has converged when it turns less than this cosine between two batches.
    pub tau: f64,
    /// Whether only supervised tokens count.
    pub use_label_mask: bool,
    /// What marks an unsupervised token in PEFT's data; carried.
    pub label_mask_value: i64,
    /// Divide each direction by the root of its singular value.
    pub whiten: bool,
    /// Change a module's alpha with its rank.
    pub adjust_scaling_factors: bool,
}

impl Default for EvaConfig {
    fn default() -> Self {
        Self {
            rho: 2.0,
            tau: 0.99,
            use_label_mask: true,
            label_mask_value: -100,
            whiten: false,
            adjust_scaling_factors: true,
        }
    }
}

impl EvaConfig {
    /// Checks what types alone do not.
    pub(super) fn check(&self) -> Result<(), String> {
        if !(self.rho.is_finite() && self.rho >= 1.0) {
            return Err(format!("eva_config.rho is {}, expected a number of at least 1", self.rho));
        }
        if !(0.0..=1.0).contains(&self.tau) {
            return Err(format!("eva_config.tau is {}, expected a cosine from 0 to 1", self.tau));
        }
        Ok(())
    }
}

/// Which part of a weight CorDA trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CordaMethod {
    /// Instruction-previewed: what the samples use most.
    #[default]
    Ipm,
    /// Knowledge-preserved: what the samples use least.
    Kpm,
}

/// `corda_config`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct CordaConfig {
    /// `ipm` or `kpm`.
    pub corda_method: CordaMethod,
}

/// Which singular vectors of the gradient LoRA-GA puts into which factor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum GradientDirection {
    /// Every second to each, beginning with `B`.
    ArBr,
    /// The first `r` to `B`, the next `r` to `A`.
    A2rBr,
    /// The first `r` to `A`, the next `r` to `B`.
    #[default]
    ArB2r,
    /// `r` random ones of the first `2·r` to both.
    #[serde(rename = "random")]
    Random,
}

/// How large LoRA-GA makes the factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GradientScale {
    /// `B` times out^¼ / √gamma.
    #[default]
    Stable,
    /// The first singular value of `B` becomes the weight's largest.
    WeightSvd,
    /// Both divided by `s`.
    GdScale,
    /// As they are.
    Unit,
}

/// `lora_ga_config`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraGaConfig {
    /// Which singular vectors go where.
    pub direction: GradientDirection,
    /// How large the factors are.
    pub scale: GradientScale,
    /// `gamma` of the scale `stable`.
    pub stable_gamma: f64,
}

impl Default for LoraGaConfig {
    fn default() -> Self {
        Self { direction: GradientDirection::ArB2r, scale: GradientScale::Stable, stable_gamma: 16.0 }
    }
}

impl LoraGaConfig {
    /// Checks what types alone do not.
    pub(super) fn check(&self) -> Result<(), String> {
        match self.stable_gamma.is_finite() && self.stable_gamma > 0.0 {
            true => Ok(()),
            false => Err(format!(
                "lora_ga_config.stable_gamma is {}, expected a number above 0",
                self.stable_gamma
            )),
        }
    }
}

impl LoraConfig {
    /// Checks that the first values go with the rest.
    pub(super) fn check_init(&self) -> Result<(), String> {
        let init = self.init_lora_weights;
        if self.lora_bias && init != InitLoraWeights::KaimingUniform {
            return Err("lora_bias needs init_lora_weights: true".to_string());
        }
        if self.use_dora && init.changes_base() {
            let name = json!(init);
            return Err(format!(
                "use_dora and init_lora_weights: {name} exclude each other: the magnitudes of a changed base are not \
                 those of the base"
            ));
        }
        if let Some(config) = &self.eva_config {
            config.check()?;
        }
        if let Some(config) = &self.lora_ga_config {
            config.check()?;
        }
        Ok(())
    }

    /// The configuration of the same change with factors of twice the rank, `[A; A₀]` and `[B, −B₀]` on the base as it
    /// is in its file: ranks and alphas are those that keep every scale.
    pub fn converted(&self) -> Self {
        let alpha = |alpha: f64| if self.use_rslora { alpha * 2f64.sqrt() } else { alpha * 2.0 };
        Self {
            r: 2 * self.r,
            lora_alpha: alpha(self.lora_alpha),
            rank_pattern: self.rank_pattern.iter().map(|(key, rank)| (key.clone(), 2 * rank)).collect(),
            alpha_pattern: self
                .alpha_pattern
                .iter()
                .map(|(key, value)| (key.clone(), alpha(*value)))
                .collect(),
            init_lora_weights: InitLoraWeights::KaimingUniform,
            eva_config: None,
            corda_config: None,
            lora_ga_config: None,
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_are_pefts() {
        for value in
            [json!(true), json!("gaussian"), json!("pissa"), json!("pissa_niter_16"), json!("lora_ga")]
        {
            let init: InitLoraWeights = serde_json::from_value(value.clone()).unwrap();
            assert_eq!(json!(init), value);
        }
        for value in [json!(false), json!("loftq"), json!("pissa_niter_"), json!("pissa_niter_x"), json!(3)] {
            assert!(serde_json::from_value::<InitLoraWeights>(value).is_err());
        }
    }

    #[test]
    fn a_conversion_keeps_every_scale() {
        for use_rslora in [false, true] {
            let ranks = json!({"layers\\.1\\..*proj": 2, "q_proj": 4});
            let keys = json!({"r": 8, "lora_alpha": 16, "use_rslora": use_rslora, "rank_pattern": ranks});
            let config = LoraConfig {
                alpha_pattern: vec![("up_proj".to_string(), 3.0)],
                ..serde_json::from_value(keys).unwrap()
            };
            let converted = config.converted();
            let (before, after) = (config.patterns().unwrap(), converted.patterns().unwrap());
            for path in
                ["layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj"]
            {
                assert_eq!(after.rank(path), 2 * before.rank(path));
                assert!((after.scale(path) / before.scale(path) - 1.0).abs() < 1e-15);
            }
        }
    }
}
