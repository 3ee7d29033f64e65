//! Files of prompts, and those on which two models are compared.

use crate::error::CliError;
use crate::render;
use peft_core::checkpoint::Checkpoint;
use peft_core::data::{DatasetConfig, DatasetType, records::read};
use peft_core::model::ModelConfig;
use peft_core::random::Stream;
use peft_core::text::Tokenizer;
use std::path::Path;

/// Positions in all: their logits are kept in memory.
const MAX_POSITIONS: usize = 512;
/// Prompts at most; each is also continued.
const MAX_PROMPTS: usize = 16;

/// Prose, a question, code, data and another language.
const BUILT_IN: [&str; 5] = [
    "The old lighthouse keeper climbed the stairs slowly, counting each step, because tonight",
    "Question: A train leaves at 9:40 and arrives at 11:05. How many minutes does it travel?\nAnswer:",
    "def median(values):\n    values = sorted(values)\n    middle = len(values) // 2\n    return",
    "{\"name\": \"Ada Lovelace\", \"born\": 1815, \"fields\": [\"mathematics\",",
    "Le petit marché ouvre chaque samedi matin, et les voisins y achètent",
];

/// The token ids of the prompts in `file`, or of built-in ones. A checkpoint without tokenizer gets random tokens in place
/// of the latter.
pub fn token_ids(base: &Checkpoint, file: Option<&Path>) -> Result<Vec<Vec<u32>>, CliError> {
    let vocab = ModelConfig::from_json(base.dir(), base.config())?.vocab_size;
    let has_tokenizer =
        ["tokenizer.json", "tokenizer.model"].iter().any(|name| base.dir().join(name).is_file());
    if file.is_none() && !has_tokenizer {
        let mut draws = Stream::new(0, "verification", "", &[]);
        let prompt = |_| (0..24).map(|_| draws.below(vocab as u64) as u32).collect();
        return Ok((0..4).map(prompt).collect());
    }
    let tokenizer = Tokenizer::from_dir(base.dir())?;
    let texts = match file {
        Some(path) => from_file(path)?,
        None => BUILT_IN.map(str::to_string).to_vec(),
    };
    let mut room = MAX_POSITIONS;
    let mut prompts = Vec::new();
    for text in &texts {
        let mut ids = tokenizer.encode(text, true)?.ids;
        ids.retain(|id| (*id as usize) < vocab);
        ids.truncate(room);
        room -= ids.len();
        prompts.extend((!ids.is_empty()).then_some(ids));
        if room == 0 || prompts.len() == MAX_PROMPTS {
            break;
        }
    }
    if prompts.is_empty() {
        return Err(CliError::flag("--prompts", "no prompt has a token"));
    }
    if file.is_some() && (room == 0 || prompts.len() < texts.len()) {
        let used: usize = prompts.iter().map(Vec::len).sum();
        render::warning(&format!(
            "--prompts: only the first {} of {} prompts are used, {used} tokens ({MAX_POSITIONS} tokens and \
             {MAX_PROMPTS} prompts at most)",
            prompts.len(),
            texts.len()
        ));
    }
    Ok(prompts)
}

/// The texts in `path`: the lines of a .txt file, or what records have as `text` or `prompt`.
pub fn from_file(path: &Path) -> Result<Vec<String>, CliError> {
    let records = read(&DatasetConfig::new(path, DatasetType::Completion))?;
    let text = |(index, record): (usize, &serde_json::Map<String, serde_json::Value>)| {
        let found = ["text", "prompt"].iter().find_map(|key| record.get(*key)?.as_str());
        found.map(str::to_string).ok_or_else(|| {
            let message = format!("{}, record {}: no `text` and no `prompt`", path.display(), index + 1);
            CliError::flag("--prompts", message)
        })
    };
    records.iter().enumerate().map(text).collect()
}
