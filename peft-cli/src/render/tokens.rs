//! An example's tokens with their loss mask: supervised ones in green and the rest dimmed, or between ⟦ ⟧ where colour
//! is not wanted.

use peft_core::data::Example;
use peft_core::text::{TextError, Tokenizer};
use std::io::IsTerminal;

/// The example as text for stdout.
pub fn tokens(example: &Example, tokenizer: &Tokenizer) -> Result<String, TextError> {
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let mut out = String::new();
    let mut start = 0;
    while start < example.ids.len() {
        let supervised = example.supervised[start];
        let run = example.supervised[start..].iter().take_while(|s| **s == supervised).count();
        let text = tokenizer.decode(&example.ids[start..start + run], false)?;
        out.push_str(&match (supervised, colour) {
            (true, true) => format!("\x1b[32m{text}\x1b[0m"),
            (false, true) => format!("\x1b[2m{text}\x1b[0m"),
            (true, false) => format!("⟦{text}⟧"),
            (false, false) => text,
        });
        start += run;
    }
    Ok(out)
}
