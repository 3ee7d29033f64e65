//! Tiny model folders for tests.

#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use tempfile::TempDir;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::Tokenizer;

/// The ChatML template without a default system message.
pub(crate) const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\
     {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A byte-level tokenizer with one token a byte and two merges (`ab`, ` w`), and special tokens `<s>` (0),
/// `</s>` (1), `<|im_start|>` (2), `<|im_end|>` (3). With `post` it puts `<s>` before a text.
pub(crate) fn tokenizer_json(post: bool) -> Value {
    let special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"];
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut tokens: Vec<String> = special.map(String::from).to_vec();
    tokens.extend(alphabet.iter().map(char::to_string));
    tokens.extend(["ab", "Ġw"].map(String::from));
    let vocabulary: serde_json::Map<String, Value> =
        tokens.into_iter().enumerate().map(|(id, token)| (token, id.into())).collect();
    let added = |(id, content): (usize, &str)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let sentence =
        json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
    let template = json!({"type": "TemplateProcessing", "single": sentence, "pair": sentence,
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}});
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": special.into_iter().enumerate().map(added).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": if post {
            json!({"type": "Sequence", "processors": [byte_level, template]})
        } else {
            byte_level.clone()
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "vocab": vocabulary, "merges": [["a", "b"], ["Ġ", "w"]]},
    })
}

/// A model folder with that tokenizer and further JSON files.
pub(crate) fn folder(post: bool, files: &[(&str, Value)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer_json(post).to_string()).unwrap();
    for (name, value) in files {
        std::fs::write(dir.path().join(name), value.to_string()).unwrap();
    }
    dir
}

/// The tokenizer with `<s>` before and `</s>` after a text.
pub(crate) fn plain() -> Tokenizer {
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}});
    Tokenizer::from_dir(folder(true, &[("tokenizer_config.json", config)]).path()).unwrap()
}

/// The tokenizer with a chat template, `<|im_end|>` for end of sequence, and nothing before a text.
pub(crate) fn chat(template: &str) -> Tokenizer {
    let config = json!({"bos_token": null, "eos_token": "<|im_end|>", "chat_template": template});
    Tokenizer::from_dir(folder(false, &[("tokenizer_config.json", config)]).path()).unwrap()
}
