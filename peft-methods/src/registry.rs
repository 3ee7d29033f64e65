//! The methods there are, by name: how a recipe's block becomes a method, and how its files are read again.

use crate::full::FULL;
use crate::ia3::IA3;
use crate::lamda::LAMDA;
use crate::lora::LORA;
use crate::lora_sb::{CoreAdapter, LORA_SB, LORA_XS};
use crate::nola::NOLA;
use crate::selected::{BITFIT, NORM_ONLY, TRAIN_ONLY};
use crate::sparse::SPARSE;
use crate::vera::VERA;
use peft_core::adapter::{AdapterError, FileFormat, SavedAdapter};
use peft_core::checkpoint::{Checkpoint, Headers};
use peft_core::model::{ModelConfig, ties_embeddings};
use peft_core::nearest::did_you_mean;
use peft_core::train::{Method, MethodPlan};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use std::fmt::Debug;
use std::path::Path;

/// Every method, as they are listed.
pub static METHODS: &[&Kind] = &[
    &LORA,
    &LORA_XS,
    &LORA_SB,
    &VERA,
    &NOLA,
    &LAMDA,
    &SPARSE,
    &IA3,
    &NORM_ONLY,
    &BITFIT,
    &TRAIN_ONLY,
    &FULL,
];

/// A method as the program knows it before a recipe names it.
#[derive(Debug)]
pub struct Kind {
    /// What recipes call it.
    pub name: &'static str,
    /// What people call it.
    pub title: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// Reads the keys beside `type`.
    pub parse: fn(&Value) -> Result<Box<dyn Block>, String>,
    /// The files of its result; `None` where that is a whole checkpoint.
    pub file: Option<&'static FileFormat>,
    /// Whether Hugging Face PEFT reads the result.
    pub in_peft: bool,
    /// Beginnings of recipes.
    pub scaffolds: &'static [Scaffold],
}

/// A method's block in a recipe to begin with.
#[derive(Debug)]
pub struct Scaffold {
    /// What `peft init --method` calls it.
    pub name: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// Keys: name, value as YAML, comment.
    pub keys: &'static [ScaffoldKey],
    /// The peak learning rate that suits it, and the one for a tiny base.
    pub learning_rates: (&'static str, &'static str),
}

/// A key of a recipe to begin with: name, value as YAML, comment.
pub type ScaffoldKey = (&'static str, &'static str, &'static str);

/// The key that says where changes attach.
pub(crate) const TARGETS: ScaffoldKey =
    ("target_modules", "all-linear", "every projection of the layers, or a list like [q_proj, v_proj]");

impl Kind {
    /// The method of that name.
    ///
    /// # Errors
    /// A message with the nearest name.
    pub fn named(name: &str) -> Result<&'static Kind, String> {
        METHODS.iter().copied().find(|kind| kind.name == name).ok_or_else(|| {
            let known: Vec<&str> = METHODS.iter().map(|kind| kind.name).collect();
            let hint = did_you_mean(name, known.iter().copied());
            format!("unknown method type \"{name}\"{hint}; known: {}", known.join(", "))
        })
    }
}

/// What a method works with beside its own keys.
pub struct RunContext<'a> {
    /// The base.
    pub base: &'a Checkpoint,
    /// The base as the recipe names it.
    pub base_name: &'a str,
    /// Its revision.
    pub revision: Option<&'a str>,
    /// The adapter's folder that first values come from, where the recipe names one.
    pub start: Option<&'a Path>,
}

impl RunContext<'_> {
    /// The base's shape.
    ///
    /// # Errors
    /// An unsupported configuration.
    pub fn model(&self) -> peft_core::Result<ModelConfig> {
        let mut model = ModelConfig::from_json(self.base.dir(), self.base.config())?;
        model.tie_word_embeddings = ties_embeddings(self.base)?;
        Ok(model)
    }
}

/// What every block has by being plain data.
pub trait BlockData {
    /// Every key with its value, defaults resolved.
    fn keys(&self) -> Map<String, Value>;

    /// A copy of it.
    fn boxed(&self) -> Box<dyn Block>;
}

impl<T: Block + Clone + Serialize + 'static> BlockData for T {
    fn keys(&self) -> Map<String, Value> {
        keys_of(self)
    }

    fn boxed(&self) -> Box<dyn Block> {
        Box::new(self.clone())
    }
}

/// A method's keys in a recipe.
pub trait Block: BlockData + Debug + Send + Sync {
    /// Checks that values are in range and go together. `starts_from_adapter` says whether the recipe names an adapter to
    /// begin with.
    ///
    /// # Errors
    /// A message about the first that does not.
    fn check(&self, starts_from_adapter: bool) -> Result<(), String>;

    /// Checks that a run of that many steps in all is long enough.
    ///
    /// # Errors
    /// A message about what it would end before.
    fn check_length(&self, _total_steps: u64) -> Result<(), String> {
        Ok(())
    }

    /// What the method would add and make trainable on a base of that shape.
    ///
    /// # Errors
    /// Those of [`Method::prepare`] that shapes show.
    fn plan(&self, model: &ModelConfig, base: &Headers) -> peft_core::Result<MethodPlan>;

    /// The method, ready to prepare a model.
    ///
    /// # Errors
    /// What [`check`](Self::check) refuses, or a base that cannot be read.
    fn method(&self, run: &RunContext) -> peft_core::Result<Box<dyn Method>>;
}

/// The method block of a recipe: its `type` chooses the keys beside it.
#[derive(Debug)]
pub struct MethodBlock {
    /// The method.
    pub kind: &'static Kind,
    /// Its keys.
    pub block: Box<dyn Block>,
}

impl Clone for MethodBlock {
    fn clone(&self) -> Self {
        Self { kind: self.kind, block: self.block.boxed() }
    }
}

impl MethodBlock {
    /// The block of the keys in `map`, its `type` among them; LoRA where there is none.
    ///
    /// # Errors
    /// An unknown type or key, or a value that does not fit.
    pub fn parse(mut map: Map<String, Value>) -> Result<Self, String> {
        let kind = match map.remove("type") {
            None => &LORA,
            Some(Value::String(name)) => Kind::named(&name)?,
            Some(other) => return Err(format!("type is {other}, expected the name of a method")),
        };
        Ok(Self { kind, block: (kind.parse)(&Value::Object(map))? })
    }
}

impl Default for MethodBlock {
    fn default() -> Self {
        Self { kind: &LORA, block: Box::<crate::LoraBlock>::default() }
    }
}

impl Serialize for MethodBlock {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut keys = self.block.keys();
        keys.insert("type".to_string(), self.kind.name.into());
        keys.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for MethodBlock {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(Map::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// The keys of what is serialised as an object; none of anything else.
pub(crate) fn keys_of(value: &impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(value) {
        Ok(Value::Object(keys)) => keys,
        _ => Map::new(),
    }
}

/// The formats of adapter files that are known, each once.
pub fn file_formats() -> impl Iterator<Item = &'static FileFormat> {
    let formats = METHODS.iter().filter_map(|kind| kind.file).enumerate();
    let first = |(index, format): &(usize, &FileFormat)| {
        let mut before = METHODS.iter().filter_map(|kind| kind.file).take(*index);
        before.all(|other| other.peft_type != format.peft_type)
    };
    formats.filter(first).map(|(_, format)| format)
}

/// Opens an adapter's folder, of whichever method.
///
/// # Errors
/// A `peft_type` that no method has, or a folder that is damaged.
pub fn open_adapter(dir: &Path) -> Result<Box<dyn SavedAdapter>, AdapterError> {
    // Its configuration is a plain LoRA's; only its tensors tell.
    if CoreAdapter::is_released(dir) {
        return Ok(Box::new(CoreAdapter::open_released(dir)?));
    }
    peft_core::adapter::open_adapter(dir, file_formats())
}
