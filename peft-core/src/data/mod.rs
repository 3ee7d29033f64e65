//! From data files to batches of tokens with a loss mask.
//!
//! [`load`] does it in one call: [`records`] reads a file into objects, [`prompt`] writes each object as one text and
//! marks the characters that the model should learn to write, [`tokenise`] turns text and marks into an [`Example`].
//! Examples that are too long are treated as [`OnTruncation`] says.
//! [`split`] sets validation records aside, [`epochs`] orders the rest, [`packing`] says which share a row, and
//! [`batches`] puts them together.
//!
//! Three rules hold throughout. A text is tokenised once and whole, and the mask falls by character: a token that
//! overlaps an answer belongs to it. Nothing is masked by token id, so a padding token that is also the
//! end-of-sequence token is still learnt. Nothing is cut, dropped or masked without being counted in the [`Report`].

pub mod batches;
mod columns;
mod config;
mod conversation;
pub mod epochs;
mod error;
mod fields;
pub mod packing;
pub mod prompt;
pub mod records;
pub mod split;
pub mod tokenise;
mod truncation;
mod turns;

use std::path::PathBuf;

use rayon::prelude::*;
use serde_json::{Map, Value};

pub use batches::{Batch, collate, collate_packs, epoch_order};
pub use config::{DatasetConfig, DatasetType, MessageProperties, TrainOnEos};
pub use epochs::{Epoch, Epochs, Rows};
pub use error::DataError;
pub use packing::PackingReport;
pub use split::{samples, split_validation};
pub use tokenise::{Example, examples_sha256};
pub use truncation::{OnTruncation, Report};

use crate::text::{ChatTemplate, Tokenizer};
use prompt::Prompter;
use records::Record;
use tokenise::Tokeniser;
use truncation::Collector;

/// How records become examples.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// The most tokens an example may have; at least 2.
    pub sequence_len: usize,
    /// What happens to a longer one. Without a choice, `completion` records are split and others are an error.
    pub on_truncation: Option<OnTruncation>,
    /// Whether the prompts are learnt as well.
    pub train_on_inputs: bool,
    /// The source of a chat template to use instead of the tokenizer's own.
    pub chat_template: Option<String>,
    /// Further variables of the chat template; a file's own win over them.
    pub chat_template_kwargs: Map<String, Value>,
    /// What a chat template that asks for the date is told, in seconds since 1970; without it, the present. A run that
    /// should be repeatable fixes it.
    pub now: Option<u64>,
}

/// One data file as it was read.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct DataFile {
    /// Its path as given.
    pub path: PathBuf,
    /// SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
    /// How many records of it are used.
    pub records: usize,
}

/// Examples in file order, with an account of what became of the records.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// The examples; each has at least one supervised token.
    pub examples: Vec<Example>,
    /// For each example, the number of its record, counted from 0 over all files; not decreasing.
    pub record_of: Vec<usize>,
    /// What was counted on the way.
    pub report: Report,
    /// The files.
    pub files: Vec<DataFile>,
}

impl Dataset {
    /// The number of tokens of each example.
    pub fn lengths(&self) -> Vec<usize> {
        self.examples.iter().map(|example| example.ids.len()).collect()
    }
}

/// The files as examples of whatever length, before [`Tokenised::collect`] cuts what is too long.
#[derive(Debug, Clone)]
pub struct Tokenised {
    files: Vec<TokenisedFile>,
    bos: Option<u32>,
}

#[derive(Debug, Clone)]
struct TokenisedFile {
    file: DataFile,
    on_truncation: OnTruncation,
    /// One a record.
    examples: Vec<Example>,
}

/// Reads and tokenises all files.
///
/// # Errors
/// When a file is missing, malformed or empty; a field is missing; a chat template is missing or fails; an example is
/// too long and `on_truncation` is `error`; or no supervised token is left.
pub fn load(
    configs: &[DatasetConfig],
    tokenizer: &Tokenizer,
    options: &LoadOptions,
) -> Result<Dataset, DataError> {
    tokenise_files(configs, tokenizer, options)?.collect(options.sequence_len, None)
}

/// Reads and tokenises all files and leaves every example as long as it is.
///
/// # Errors
/// As [`load`], but for those about lengths and supervised tokens.
pub fn tokenise_files(
    configs: &[DatasetConfig],
    tokenizer: &Tokenizer,
    options: &LoadOptions,
) -> Result<Tokenised, DataError> {
    if configs.is_empty() {
        return Err(DataError::Option("no dataset is given".into()));
    }
    let mut files = Vec::with_capacity(configs.len());
    for config in configs {
        let template = match config.format {
            DatasetType::Messages => Some(chat_template(config, tokenizer, options)?),
            _ => None,
        };
        let records = records::read(config)?;
        let sha256 = records::sha256(&config.path)?;
        let file = DataFile { path: config.path.clone(), sha256, records: records.len() };

        let prompter = Prompter::new(config, template.as_ref(), tokenizer, &options.chat_template_kwargs);
        let tokeniser = Tokeniser::new(tokenizer, options.train_on_inputs);
        let on_truncation = options.on_truncation.unwrap_or(match config.format {
            DatasetType::Completion => OnTruncation::Split,
            _ => OnTruncation::Error,
        });
        let tokenised: Vec<Result<Example, DataError>> = records
            .into_par_iter()
            .enumerate()
            .map(|(number, record): (usize, Record)| {
                let prompt = prompter.prompt(&record, number + 1)?;
                drop(record);
                tokeniser.example(&prompt, &config.path, number + 1)
            })
            .collect();
        let examples = tokenised.into_iter().collect::<Result<Vec<_>, _>>()?;
        files.push(TokenisedFile { file, on_truncation, examples });
    }
    Ok(Tokenised { files, bos: tokenizer.bos() })
}

impl Tokenised {
    /// The number of tokens of each record.
    pub fn lengths(&self) -> Vec<usize> {
        self.files.iter().flat_map(|file| &file.examples).map(|example| example.ids.len()).collect()
    }

    /// What happens to records that are too long, by file.
    pub fn on_truncation(&self) -> Vec<OnTruncation> {
        self.files.iter().map(|file| file.on_truncation).collect()
    }

    /// Cuts, drops or splits what is longer than `sequence_len`, as `instead` says or else as was asked for.
    ///
    /// # Errors
    /// When `sequence_len` is below 2, an example is too long and should not be, or no supervised token is left.
    pub fn collect(self, sequence_len: usize, instead: Option<OnTruncation>) -> Result<Dataset, DataError> {
        let mut collector = Collector::new(sequence_len, self.bos)?;
        let mut files = Vec::with_capacity(self.files.len());
        for TokenisedFile { file, on_truncation, examples } in self.files {
            let on_truncation = instead.unwrap_or(on_truncation);
            for (number, example) in examples.into_iter().enumerate() {
                collector.add(example, on_truncation, &file.path, number + 1);
            }
            files.push(file);
        }
        let (examples, record_of, report) = collector.finish()?;
        Ok(Dataset { examples, record_of, report, files })
    }
}

fn chat_template(
    config: &DatasetConfig,
    tokenizer: &Tokenizer,
    options: &LoadOptions,
) -> Result<ChatTemplate, DataError> {
    let template = match &options.chat_template {
        Some(source) => ChatTemplate::new(source.clone(), tokenizer.special_tokens()),
        None => tokenizer.chat_template(),
    };
    let mut template = template
        .map_err(|source| DataError::Template { path: config.path.clone(), source: Box::new(source) })?;
    if let Some(now) = options.now {
        template.set_time(now);
    }
    Ok(template)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::text::fixtures::{CHATML, chat, plain};

    fn options() -> LoadOptions {
        LoadOptions {
            sequence_len: 16,
            on_truncation: None,
            train_on_inputs: false,
            chat_template: None,
            chat_template_kwargs: Map::new(),
            now: None,
        }
    }

    fn file(dir: &tempfile::TempDir, name: &str, text: &str, format: DatasetType) -> DatasetConfig {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        DatasetConfig::new(path, format)
    }

    #[test]
    fn files_follow_each_other_and_are_accounted_for() {
        let dir = tempfile::tempdir().unwrap();
        let pairs = "{\"prompt\": \"x:\", \"completion\": \"y\"}\n".repeat(300);
        let configs = [
            file(&dir, "a.jsonl", &pairs, DatasetType::PromptCompletion),
            file(&dir, "b.txt", &format!("{}\nz\n", "y".repeat(40)), DatasetType::Completion),
        ];
        let data = load(&configs, &plain(), &options()).unwrap();
        // 40 characters, one first token for each piece and the last one: 15 + 15 + 11.
        assert_eq!(data.lengths()[300..], [16, 16, 12, 3]);
        assert_eq!(data.record_of[298..], [298, 299, 300, 300, 300, 301]);
        let expected = Report {
            records: 302,
            examples: 304,
            tokens: 300 * 5 + 47,
            supervised_tokens: 300 * 2 + 41 + 2,
            split: 1,
            longest: 42,
            ..Report::default()
        };
        assert_eq!(data.report, expected);
        assert_eq!(data.files.iter().map(|file| file.records).collect::<Vec<_>>(), [300, 2]);
    }

    #[test]
    fn conversations_use_the_tokenizers_template_or_the_given_one() {
        let dir = tempfile::tempdir().unwrap();
        let talk =
            r#"[{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}]"#;
        let config = [file(&dir, "m.json", talk, DatasetType::Messages)];
        let mut options = LoadOptions { sequence_len: 64, ..options() };
        let tokenizer = chat(CHATML);
        let data = load(&config, &tokenizer, &options).unwrap();
        let text = tokenizer.decode(&data.examples[0].ids, false).unwrap();
        assert_eq!(text, "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n");
        assert_eq!(data.report.supervised_tokens, 2);

        // With a tokenizer of its own first token, which the template writes too: one remains.
        options.chat_template =
            Some("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}".into());
        let tokenizer = plain();
        let data = load(&config, &tokenizer, &options).unwrap();
        assert_eq!(tokenizer.decode(&data.examples[0].ids, false).unwrap(), "<s>ua</s>");
        assert_eq!(data.examples[0].supervised, [false, false, true, true]);

        options.chat_template = None;
        let error = load(&config, &plain(), &options).unwrap_err();
        assert!(error.to_string().contains("need a chat template"), "{error}");
        assert!(error.is_bad_input());
    }

    #[test]
    fn the_first_wrong_record_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let lines = "{\"text\": \"a\"}\n".repeat(50) + &"{\"txt\": \"a\"}\n".repeat(50);
        let config = [file(&dir, "d.jsonl", &lines, DatasetType::Completion)];
        let error = load(&config, &plain(), &options()).unwrap_err();
        assert!(matches!(error, DataError::MissingField { record: 51, .. }), "{error}");
        assert!(load(&[], &plain(), &options()).is_err());
    }
}
