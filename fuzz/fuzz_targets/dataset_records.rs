//! Data files of every format to tokenised examples. The first byte chooses format and type of the records.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peft_core::data::{DatasetConfig, DatasetType, LoadOptions, OnTruncation, load};
use peft_core::text::Tokenizer;
use std::sync::OnceLock;

const FORMATS: [&str; 6] = ["json", "jsonl", "csv", "tsv", "parquet", "txt"];
const TYPES: [DatasetType; 4] =
    [DatasetType::Alpaca, DatasetType::PromptCompletion, DatasetType::Messages, DatasetType::Completion];

fuzz_target!(|input: &[u8]| {
    let Some((&choice, bytes)) = input.split_first() else { return };
    let choice = usize::from(choice);
    let format = FORMATS[choice % 6];
    let kind = TYPES[choice / 6 % 4];
    let path = peft_fuzz::file(&format!("data.{format}"), bytes);
    let mut config = DatasetConfig::new(path, kind);
    if format == "txt" && choice >= 128 {
        config.separator = Some("<|end|>".to_string());
    }
    let options = LoadOptions {
        sequence_len: 64,
        on_truncation: [None, Some(OnTruncation::Left), Some(OnTruncation::Split), Some(OnTruncation::Drop)]
            [choice / 24 % 4],
        train_on_inputs: choice >= 192,
        chat_template: None,
        chat_template_kwargs: serde_json::Map::new(),
        now: Some(0),
    };
    match load(&[config], tokenizer(), &options) {
        Ok(data) => {
            assert_eq!(data.examples.len(), data.record_of.len());
            for example in &data.examples {
                assert!(example.ids.len() <= 64 && example.ids.len() == example.supervised.len());
                assert!(example.supervised.contains(&true));
            }
        }
        Err(error) => assert!(error.is_bad_input(), "{error}"),
    }
});

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let chatml = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}\
                      {% if add_generation_prompt %}<s>assistant\n{% endif %}";
        peft_fuzz::file("tokenizer.json", include_bytes!("../../recipes/quickstart/base/tokenizer.json"));
        peft_fuzz::file(
            "tokenizer_config.json",
            include_bytes!("../../recipes/quickstart/base/tokenizer_config.json"),
        );
        peft_fuzz::file("chat_template.jinja", chatml.as_bytes());
        Tokenizer::from_dir(peft_fuzz::scratch()).expect("the quickstart's tokenizer")
    })
}
