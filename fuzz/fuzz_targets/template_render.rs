//! Any text as a chat template: it must end, within its limits.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peft_core::text::ChatTemplate;
use serde_json::{Map, Value, json};
use std::sync::OnceLock;

fuzz_target!(|source: &str| {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    let tokens = tokens.map(|(role, text)| (role.to_string(), text.to_string())).into();
    let mut template = match ChatTemplate::new(source.to_string(), &tokens) {
        Ok(template) => template,
        Err(error) => return assert!(error.is_bad_input(), "{error}"),
    };
    template.set_time(1_721_952_000);
    for (at, messages) in conversations().iter().enumerate() {
        match template.render(messages, at.is_multiple_of(2), &Map::new()) {
            Ok(text) => assert!(text.len() <= 64 << 20),
            Err(error) => assert!(error.is_bad_input(), "{error}"),
        }
    }
});

fn conversations() -> &'static [Vec<Value>] {
    static CONVERSATIONS: OnceLock<Vec<Vec<Value>>> = OnceLock::new();
    CONVERSATIONS.get_or_init(|| {
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        vec![
            vec![message("user", "Grüße, 世界")],
            vec![
                message("system", ""),
                message("user", "{{ 1 }} %}"),
                message("assistant", "<think>\na</think> b "),
                message("user", "c\n"),
            ],
            vec![],
        ]
    })
}
