//! The methods that a recipe can be begun with.

use crate::error::CliError;
use peft_core::nearest::did_you_mean;

/// A method's block in a recipe, and what suits it.
pub struct Scaffold {
    /// What `--method` calls it.
    pub name: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// Whether it trains every weight and so has none of an adapter's keys.
    pub full: bool,
    /// Keys beside the usual ones: key, value as YAML, comment.
    pub keys: &'static [(&'static str, &'static str, &'static str)],
}

const fn lora(
    name: &'static str,
    about: &'static str,
    keys: &'static [(&'static str, &'static str, &'static str)],
) -> Scaffold {
    Scaffold { name, about, full: false, keys }
}

/// All of them.
pub const METHODS: [Scaffold; 6] = [
    lora("lora", "low-rank adaptation", &[]),
    lora(
        "rslora",
        "LoRA whose scale suits high ranks",
        &[("use_rslora", "true", "scale alpha / √r in place of alpha / r")],
    ),
    lora(
        "dora",
        "LoRA that trains the rows' lengths apart",
        &[("use_dora", "true", "lengths of the rows apart from their directions")],
    ),
    lora(
        "lora+",
        "LoRA whose B learns faster",
        &[("loraplus_lr_ratio", "16", "how much faster B learns than A")],
    ),
    lora("lora-fa", "LoRA that trains B alone", &[("lora_fa", "true", "A stays as it was drawn")]),
    Scaffold { name: "full", about: "every weight", full: true, keys: &[] },
];

/// The method of that name.
///
/// # Errors
/// There is none.
pub fn method(name: &str) -> Result<&'static Scaffold, CliError> {
    METHODS.iter().find(|method| method.name == name).ok_or_else(|| {
        let names: Vec<&str> = METHODS.iter().map(|method| method.name).collect();
        let hint = did_you_mean(name, names.iter().copied());
        CliError::flag("--method", format!("`{name}` is no method{hint}; known: {}", names.join(", ")))
    })
}
