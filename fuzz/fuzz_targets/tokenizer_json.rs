//! `tokenizer.json` and `tokenizer_config.json`, then a few texts through what was read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peft_core::text::Tokenizer;

fuzz_target!(|input: &[u8]| {
    let [tokenizer, config] = peft_fuzz::parts(input);
    peft_fuzz::file("tokenizer.json", tokenizer);
    peft_fuzz::file("tokenizer_config.json", if config.is_empty() { b"{}" } else { config });
    let tokenizer = match Tokenizer::from_dir(peft_fuzz::scratch()) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return assert!(error.is_bad_input(), "{error}"),
    };
    for text in ["", "a", "Hello  wörld\n\t世界 <s></s> 123", "\u{0}\u{feff}\u{1f600}e\u{301}"] {
        for special in [false, true] {
            let Ok(encoding) = tokenizer.encode(text, special) else { continue };
            assert_eq!(encoding.ids.len(), encoding.offsets.len());
            let _ = tokenizer.decode(&encoding.ids, special);
            let mut stream = tokenizer.decode_stream(special);
            for id in encoding.ids {
                let _ = stream.push(id);
            }
        }
    }
    let _ = tokenizer.chat_template();
});
