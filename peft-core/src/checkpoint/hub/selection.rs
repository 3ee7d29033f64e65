//! Which of a folder's files are for others.

use std::path::{Path, PathBuf};

use super::push::{PushFile, PushSource};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::folder::{Fence, ORIGINAL_FILE, extension};

/// Deeper folders are no model's.
const MAX_DEPTH: usize = 6;
/// More files are no model's.
const MAX_FILES: usize = 10_000;

/// The files of a folder, sorted by path.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Those to upload.
    pub files: Vec<PushFile>,
    /// Those left out, with the reason.
    pub left_out: Vec<(String, &'static str)>,
}

/// Chooses what of the folder `dir` is fit to be uploaded. Hidden files, what a training run keeps for itself, pickles and
/// what looks like a secret are left out.
///
/// # Errors
/// A link that leads out of the folder (and its hub cache), a folder that cannot be read, or too many files.
pub fn select_files(dir: &Path) -> Result<Selection, CheckpointError> {
    let mut selection = Selection::default();
    let fence = Fence::around(dir)?;
    walk(dir, "", 0, &fence, &mut selection)?;
    selection.files.sort_by(|a, b| a.path.cmp(&b.path));
    selection.left_out.sort();
    Ok(selection)
}

fn walk(
    dir: &Path,
    prefix: &str,
    depth: usize,
    fence: &Fence,
    selection: &mut Selection,
) -> Result<(), CheckpointError> {
    for entry in std::fs::read_dir(dir).map_err(CheckpointError::read(dir))? {
        let entry = entry.map_err(CheckpointError::read(dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let (path, place) = (format!("{prefix}{name}"), entry.path());
        let kind = entry.file_type().map_err(CheckpointError::read(&place))?;
        let folder = kind.is_dir();
        if let Some(reason) = unfit(&name, folder) {
            selection.left_out.push((if folder { path + "/" } else { path }, reason));
            continue;
        }
        if kind.is_symlink() {
            fence.check(&place)?;
        }
        let metadata = place.metadata().map_err(CheckpointError::read(&place))?;
        if folder && depth < MAX_DEPTH {
            walk(&place, &format!("{path}/"), depth + 1, fence, selection)?;
        } else if metadata.is_file() {
            let size = metadata.len();
            selection.files.push(PushFile { path, source: PushSource::File(place), size });
        } else {
            selection.left_out.push((path, "neither a file nor a folder of its own"));
        }
        if selection.files.len() > MAX_FILES {
            return Err(CheckpointError::TooManyFiles { path: PathBuf::from(dir), limit: MAX_FILES });
        }
    }
    Ok(())
}

/// Why something of that name does not go, if it does not.
fn unfit(name: &str, folder: bool) -> Option<&'static str> {
    const RUN_FILES: [&str; 8] = [
        "trainer_state.json",
        "training_args.bin",
        "state.json",
        "state.safetensors",
        "metrics.jsonl",
        "run.json",
        "optimizer.safetensors",
        "scheduler.json",
    ];
    let stem = name.split('.').next().unwrap_or_default();
    if name.starts_with('.') {
        return Some("hidden");
    }
    if name.contains(['\\', char::REPLACEMENT_CHARACTER]) || name.chars().any(char::is_control) {
        return Some("a name that the hub cannot hold");
    }
    if folder {
        let private = ["checkpoints", "__pycache__"].contains(&name)
            || name.starts_with("checkpoint-")
            || name.starts_with("previous-");
        return private.then_some("of a training run");
    }
    if RUN_FILES.contains(&name) || ["optimizer", "scheduler", "scaler", "rng_state"].contains(&stem) {
        return Some("state of a training run");
    }
    if name == ORIGINAL_FILE {
        return Some("only for peft merge --unmerge");
    }
    let lower = name.to_lowercase();
    if ["pem", "key", "env"].contains(&extension(name).as_str())
        || ["token", "secret", "secrets", "credentials", "id_rsa", "id_ed25519"]
            .contains(&lower.split('.').next().unwrap_or_default())
    {
        return Some("may hold a secret");
    }
    if ["bin", "pt", "pth", "ckpt", "pkl", "pickle"].contains(&extension(name).as_str()) {
        return Some("pickle, which runs code when it is loaded");
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_private_stays_and_links_may_not_lead_out() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("x"), "x").unwrap();
        let fit = [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "runs/curve.png",
            "tokenizer.json",
        ];
        let unfit = [
            ".env",
            ".gitattributes",
            "checkpoints/step-1/a",
            "credentials.json",
            "optimizer.pt",
            "server.pem",
        ];
        for path in fit.iter().chain(&unfit) {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "12345").unwrap();
        }
        std::os::unix::fs::symlink("README.md", dir.path().join("LICENSE")).unwrap();
        let selection = select_files(dir.path()).unwrap();
        let paths: Vec<&str> = selection.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(paths, [&["LICENSE"], &fit[..]].concat());
        assert!(selection.files.iter().all(|file| file.size == 5));
        let left: Vec<&str> = selection.left_out.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(
            left,
            [".env", ".gitattributes", "checkpoints/", "credentials.json", "optimizer.pt", "server.pem"]
        );

        std::os::unix::fs::symlink(outside.path().join("x"), dir.path().join("notes.txt")).unwrap();
        let error = select_files(dir.path()).unwrap_err();
        assert!(matches!(error, CheckpointError::LeadsOut { .. }) && error.is_bad_input(), "{error}");
    }
}
