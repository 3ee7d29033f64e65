//! `adapter_model.safetensors`, read strictly.
//!
//! Keys are `base_model.model.` + module path + the part's name: `.lora_A.weight` and `.lora_B.weight` (for the embedding
//! `.lora_embedding_A` and `_B`), `.lora_B.bias`, `.lora_magnitude_vector`, `.token_adapter.trainable_tokens_delta`, or
//! the plain parameter name of a module saved whole. Below a change the base's own tensors are called `.base_layer.*`.

use super::config::AdapterConfig;
use super::error::AdapterError;
use super::folder::{AdapterFolder, FileFormat, Layout, PREFIX, key};
use super::placement::{Placement, SharedWeight};
use crate::model::{BaseShapes, EMBEDDING, HEAD};
use std::collections::BTreeMap;
use std::path::Path;

pub(super) const BASE_WEIGHT: &str = ".base_layer.weight";
pub(super) const BASE_BIAS: &str = ".base_layer.bias";
pub(super) const TOKEN_ROWS: &str = ".token_adapter.trainable_tokens_delta";

/// A low-rank change of an adapter file.
#[derive(Debug, Clone)]
pub struct LowRankModule {
    /// `A`, row-major `[rank, in]`; for the embedding `[rank, vocab]`.
    pub a: Vec<f32>,
    /// `B`, row-major `[out, rank]`; for the embedding `[hidden, rank]`.
    pub b: Vec<f32>,
    /// The bias beside `B`, `[out]`.
    pub bias: Option<Vec<f32>>,
    /// DoRA's magnitudes, `[out]`; for the embedding `[hidden]`.
    pub magnitude: Option<Vec<f32>>,
    /// `r`.
    pub rank: usize,
    /// Shape of the weight it changes.
    pub dims: [usize; 2],
    /// `s`.
    pub scale: f64,
}

/// Rows in place of a weight's own.
#[derive(Debug, Clone)]
pub struct RowsModule {
    /// The token of each row.
    pub indices: Vec<u32>,
    /// Row-major `[tokens, hidden]`.
    pub values: Vec<f32>,
}

/// A LoRA's folder, opened and checked for consistency in itself.
pub struct Adapter {
    /// Its configuration.
    pub config: AdapterConfig,
    pub(super) folder: AdapterFolder,
}

/// An adapter's tensors, matched with its base.
pub struct Resolved {
    /// Changes of linear modules, by path.
    pub linear: BTreeMap<String, LowRankModule>,
    /// Change of the embedding.
    pub embedding: Option<LowRankModule>,
    /// Replacements of whole tensors, by parameter name.
    pub whole: BTreeMap<String, Vec<f32>>,
    /// Replacements of rows, by module path.
    pub rows: BTreeMap<String, RowsModule>,
    /// What becomes of a weight that embedding and head share.
    pub shared: SharedWeight,
}

/// The files of a LoRA.
pub static LORA_FORMAT: FileFormat =
    FileFormat { peft_type: "LORA", open: |dir| Ok(Box::new(Adapter::open(dir)?)) };

impl Adapter {
    /// Opens a LoRA's folder.
    ///
    /// # Errors
    /// Either file missing, damaged, or a link that leads out of the folder and its hub cache; weights that are there
    /// only as pickle.
    pub fn open(dir: &Path) -> Result<Self, AdapterError> {
        let (config, warnings) = AdapterConfig::read(dir)?;
        let folder = AdapterFolder::with_config(dir, config.to_json(), warnings)?;
        Ok(Self { config, folder })
    }

    /// Reads every tensor against the base.
    ///
    /// # Errors
    /// Keys that are missing, have no place, have the wrong shape or hold a non-finite value.
    pub fn resolve(&self, base: &BaseShapes) -> Result<Resolved, AdapterError> {
        let placement = self.config.lora.place(base, false)?;
        let layout = self.layout(base, &placement)?;
        self.folder.require_keys(&layout)?;
        let mut tensors = BTreeMap::new();
        for (key, shape) in layout.required.iter().chain(&layout.optional) {
            if self.folder.file.contains(key) {
                tensors.insert(key.clone(), self.folder.read(key, shape)?);
            }
        }
        self.require_equal_ends(&placement, &tensors)?;
        self.gather(base, placement, tensors)
    }

    /// The keys that configuration and base imply, with their shapes.
    fn layout(&self, base: &BaseShapes, placement: &Placement) -> Result<Layout, AdapterError> {
        let config = &self.config.lora;
        let patterns = config.patterns()?;
        let mut layout = Layout::default();
        for path in &placement.linear {
            let (rank, [rows, columns]) = (patterns.rank(path), dims(&base.weights[path]));
            layout.require(path, ".lora_A.weight", &[rank, columns]);
            layout.require(path, ".lora_B.weight", &[rows, rank]);
            if config.lora_bias {
                layout.require(path, ".lora_B.bias", &[rows]);
            }
            if config.use_dora {
                layout.require(path, ".lora_magnitude_vector", &[rows]);
            }
            // The frozen weight that PEFT adds for a head.
            if path == HEAD {
                layout.allow(path, BASE_WEIGHT, &[rows, columns]);
            }
        }
        if placement.embedding {
            let (rank, [vocab, hidden]) = (patterns.rank(EMBEDDING), dims(&base.weights[EMBEDDING]));
            layout.require(EMBEDDING, ".lora_embedding_A", &[rank, vocab]);
            layout.require(EMBEDDING, ".lora_embedding_B", &[hidden, rank]);
            layout.allow(EMBEDDING, BASE_WEIGHT, &[vocab, hidden]);
            if config.use_dora {
                layout.require(EMBEDDING, ".lora_magnitude_vector", &[hidden]);
            }
            if placement.shared == SharedWeight::Kept {
                layout.allow(HEAD, BASE_WEIGHT, &[vocab, hidden]);
                layout.allow(HEAD, ".lora_A.weight", &[rank, hidden]);
                layout.allow(HEAD, ".lora_B.weight", &[vocab, rank]);
            }
        }
        for path in &placement.saved {
            layout.require(path, ".weight", &base.weights[path]);
            if base.biases.contains(path) {
                layout.allow(path, ".bias", &base.weights[path][..1]);
            }
            if path == EMBEDDING && placement.shared == SharedWeight::Kept {
                layout.allow(HEAD, ".weight", &base.weights[path]);
            }
        }
        for (path, indices) in &placement.rows {
            layout.require(path, TOKEN_ROWS, &[indices.len(), base.weights[path][1]]);
        }
        for path in &placement.biases {
            let part = if placement.linear.contains(path) { BASE_BIAS } else { ".bias" };
            layout.require(path, part, &base.weights[path][..1]);
        }
        Ok(layout)
    }

    /// Sorts the tensors read by what they do.
    fn gather(
        &self,
        base: &BaseShapes,
        placement: Placement,
        mut tensors: BTreeMap<String, Vec<f32>>,
    ) -> Result<Resolved, AdapterError> {
        let patterns = self.config.lora.patterns()?;
        let mut take = |path: &str, part: &str| tensors.remove(&key(path, part));
        let mut module = |path: &str, parts: [&str; 2]| LowRankModule {
            a: take(path, parts[0]).unwrap_or_default(),
            b: take(path, parts[1]).unwrap_or_default(),
            bias: take(path, ".lora_B.bias"),
            magnitude: take(path, ".lora_magnitude_vector"),
            rank: patterns.rank(path),
            dims: dims(&base.weights[path]),
            scale: patterns.scale(path),
        };
        let linear: BTreeMap<String, LowRankModule> = placement
            .linear
            .iter()
            .map(|path| (path.clone(), module(path, [".lora_A.weight", ".lora_B.weight"])))
            .collect();
        let embedding =
            placement.embedding.then(|| module(EMBEDDING, [".lora_embedding_A", ".lora_embedding_B"]));
        let mut rows = BTreeMap::new();
        for (path, indices) in placement.rows {
            let values = take(&path, TOKEN_ROWS).unwrap_or_default();
            rows.insert(path, RowsModule { indices, values });
        }
        // Copies of the embedding's part for a head that shares its weight.
        if placement.shared == SharedWeight::Kept {
            for part in [".lora_A.weight", ".lora_B.weight", BASE_WEIGHT, ".weight"] {
                take(HEAD, part);
            }
        }
        let name = |key: &str| key.trim_start_matches(PREFIX).replace(".base_layer.", ".");
        let whole = tensors.into_iter().map(|(key, values)| (name(&key), values)).collect();
        Ok(Resolved { linear, embedding, whole, rows, shared: placement.shared })
    }

    /// A shared weight that is to stay shared must have been saved with equal changes at both ends.
    fn require_equal_ends(
        &self,
        placement: &Placement,
        tensors: &BTreeMap<String, Vec<f32>>,
    ) -> Result<(), AdapterError> {
        if placement.shared != SharedWeight::Kept {
            return Ok(());
        }
        let differs = |head: &str, embedding: &str, transposed: Option<usize>| {
            let (head, embedding) =
                (tensors.get(&key(HEAD, head))?, tensors.get(&key(EMBEDDING, embedding))?);
            let same = match transposed {
                None => head == embedding,
                Some(columns) => {
                    let rows = embedding.len() / columns;
                    (0..embedding.len()).all(|i| embedding[i] == head[i % columns * rows + i / columns])
                }
            };
            (!same).then_some(())
        };
        let factor = |part: &str| tensors.get(&key(EMBEDDING, part)).map_or(1, Vec::len);
        let rank = self.config.lora.patterns()?.rank(EMBEDDING);
        let pairs = [
            (".weight", ".weight", None),
            (".lora_B.weight", ".lora_embedding_A", Some((factor(".lora_embedding_A") / rank).max(1))),
            (".lora_A.weight", ".lora_embedding_B", Some(rank)),
        ];
        match pairs
            .into_iter()
            .find(|(head, embedding, columns)| differs(head, embedding, *columns).is_some())
        {
            None => Ok(()),
            Some((part, ..)) => Err(AdapterError::Config {
                path: self.folder.weights_path(),
                message: format!(
                    "`{}` differs from the embedding's, but ensure_weight_tying says that the two are one",
                    key(HEAD, part)
                ),
            }),
        }
    }
}

fn dims(shape: &[usize]) -> [usize; 2] {
    [shape[0], shape[1]]
}
