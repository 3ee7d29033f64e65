//! The methods that a recipe can be begun with.

use crate::error::CliError;
use peft_core::nearest::did_you_mean;
use peft_methods::{Kind, METHODS, Scaffold};

/// All of them, with what they are variants of.
pub fn scaffolds() -> impl Iterator<Item = (&'static Kind, &'static Scaffold)> {
    METHODS.iter().flat_map(|kind| kind.scaffolds.iter().map(move |scaffold| (*kind, scaffold)))
}

/// The method of that name.
///
/// # Errors
/// There is none.
pub fn method(name: &str) -> Result<(&'static Kind, &'static Scaffold), CliError> {
    scaffolds().find(|(_, scaffold)| scaffold.name == name).ok_or_else(|| {
        let names: Vec<&str> = scaffolds().map(|(_, scaffold)| scaffold.name).collect();
        let hint = did_you_mean(name, names.iter().copied());
        CliError::flag("--method", format!("`{name}` is no method{hint}; known: {}", names.join(", ")))
    })
}
