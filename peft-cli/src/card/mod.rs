//! Model cards: the `README.md` that the hub shows, written beside an adapter or a checkpoint.
//!
//! A card holds nothing of the moment or the machine: the same run gives the same bytes. It names data by file name and
//! count alone.

mod merged;
mod page;
mod trained;

pub use merged::merged;
pub use trained::{Trained, trained};

use crate::error::CliError;
use peft_core::checkpoint::write_file;
use std::path::Path;

/// The card's file.
const FILE: &str = "README.md";

/// What a card of ours carries; whoever edits one and wants to keep it takes this line out.
const MARKER: &str = "<!-- written by peft -->";

/// The text of a card that the user made or took over in `artifact`, to be kept when that folder is written anew.
/// The one that came over from the base's folder is none.
pub fn users(artifact: &Path, base: &Path) -> Option<Vec<u8>> {
    let text = std::fs::read(artifact.join(FILE)).ok()?;
    let ours = text.windows(MARKER.len()).any(|part| part == MARKER.as_bytes());
    let of_base = std::fs::read(base.join(FILE)).is_ok_and(|base| base == text);
    (!ours && !of_base).then_some(text)
}

/// Writes a card into the folder.
///
/// # Errors
/// The disk refuses.
pub fn write(dir: &Path, text: &[u8]) -> Result<(), CliError> {
    Ok(write_file(&dir.join(FILE), text)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_card_is_the_users_once_its_marker_is_gone() {
        let (artifact, base) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let kept = || users(artifact.path(), base.path());
        assert_eq!(kept(), None);
        write(artifact.path(), format!("---\n---\n{MARKER}\n# x\n").as_bytes()).unwrap();
        assert_eq!(kept(), None);
        write(artifact.path(), b"# mine").unwrap();
        assert_eq!(kept().as_deref(), Some(&b"# mine"[..]));
        write(base.path(), b"# mine").unwrap();
        assert_eq!(kept(), None, "that is the base's");
    }
}
