//! The output folder: one process at a time, what a run continues from, and what becomes of an earlier run.

use crate::error::CliError;
use peft_core::checkpoint::{remove_leftovers, write_file};
use peft_core::train::latest_checkpoint;
use serde_json::Value;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

/// What a run writes.
const RESULTS: [&str; 9] = [
    "checkpoints",
    "metrics.jsonl",
    "generations.jsonl",
    "run.json",
    "recipe.yaml",
    "report.html",
    "tensorboard",
    "adapter",
    "model",
];

/// What of it is the result itself.
const ARTIFACTS: [&str; 2] = ["adapter", "model"];

/// Where an earlier run is gathered before the folder gets its name: its being there says that it is not complete.
const GATHERING: &str = ".previous-incomplete";

/// The output folder, held by this process.
pub struct OutputFolder {
    path: PathBuf,
    /// Locked while this process lives.
    _lock: File,
}

impl OutputFolder {
    /// Makes the folder if it is not there, and clears away what killed processes left half written.
    ///
    /// # Errors
    /// Another process trains into it, or the disk refuses.
    pub fn open(path: &Path) -> Result<Self, CliError> {
        std::fs::create_dir_all(path).map_err(io(path))?;
        let lock = File::open(path).map_err(io(path))?;
        // A file system without locks: nothing tells then.
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            return Err(CliError::Busy { path: path.to_path_buf() });
        }
        remove_leftovers(path, |name| RESULTS.contains(&name))?;
        remove_leftovers(&path.join("checkpoints"), |name| name.starts_with("step-"))?;
        Ok(Self { path: path.to_path_buf(), _lock: lock })
    }

    /// Clears the way for a run that goes on from the checkpoint folder `checkpoint`: what an earlier run did after it
    /// is set aside. A checkpoint from elsewhere starts a run of its own here.
    pub fn prepare_for(&self, checkpoint: &Path) -> Result<Option<PathBuf>, CliError> {
        let own = self.path.join("checkpoints").canonicalize().ok();
        let parent = checkpoint.canonicalize().map_err(io(checkpoint))?.parent().map(Path::to_path_buf);
        if own.is_none() || own != parent {
            return self.set_aside();
        }
        let name =
            checkpoint.canonicalize().map_err(io(checkpoint))?.file_name().map(|name| name.to_os_string());
        let entries = std::fs::read_dir(self.path.join("checkpoints")).map_err(io(&self.path))?.flatten();
        // Names have a fixed number of digits, so that their order is that of the steps.
        let mut later: Vec<_> =
            entries.map(|entry| entry.file_name()).filter(|other| Some(other) > name.as_ref()).collect();
        later.retain(|name| name.as_encoded_bytes().starts_with(b"step-"));
        later.sort();
        let later: Vec<PathBuf> = later.into_iter().map(|name| Path::new("checkpoints").join(name)).collect();
        self.gather(&later)
    }

    /// Clears the way for a fresh run: nothing that took time to make is deleted. With `restart`, a run that was ended
    /// before its first checkpoint, and whose steps will all be done again, gives way instead.
    pub fn prepare_fresh(&self, restart: bool) -> Result<Option<PathBuf>, CliError> {
        let has_artifact = ARTIFACTS.iter().any(|name| self.path.join(name).exists());
        if restart && !has_artifact && !self.path.join(GATHERING).exists() {
            return Ok(None);
        }
        self.set_aside()
    }

    /// Moves an earlier run into a folder of its own.
    fn set_aside(&self) -> Result<Option<PathBuf>, CliError> {
        let found: Vec<PathBuf> =
            RESULTS.into_iter().map(PathBuf::from).filter(|name| self.holds(name)).collect();
        self.gather(&found)
    }

    fn holds(&self, name: &Path) -> bool {
        let path = self.path.join(name);
        match std::fs::read_dir(&path) {
            Ok(mut entries) => entries.next().is_some(),
            Err(_) => path.exists(),
        }
    }

    /// Moves `names` into a new folder `previous-N`, and finishes a move that was killed.
    fn gather(&self, names: &[PathBuf]) -> Result<Option<PathBuf>, CliError> {
        let gathering = self.path.join(GATHERING);
        if names.is_empty() && !gathering.exists() {
            return Ok(None);
        }
        for name in names {
            let (from, to) = (self.path.join(name), gathering.join(name));
            let parent = to.parent().unwrap_or(&gathering);
            std::fs::create_dir_all(parent).map_err(io(parent))?;
            std::fs::rename(&from, &to).map_err(io(&from))?;
        }
        let free = (1..).map(|n| self.path.join(format!("previous-{n}"))).find(|path| !path.exists());
        let Some(kept) = free else { return Ok(None) };
        std::fs::rename(&gathering, &kept).map_err(io(&gathering))?;
        Ok(Some(kept))
    }

    /// Writes a JSON file of the folder.
    pub fn write_json(&self, name: &str, value: &Value) -> Result<(), CliError> {
        Ok(write_file(&self.path.join(name), format!("{value:#}\n").as_bytes())?)
    }
}

/// The checkpoint folder that `--resume` means. An earlier run whose move was killed is not continued: a fresh one had
/// been asked for.
pub fn resume_from(resume: Option<&str>, output_dir: &Path) -> Result<Option<PathBuf>, CliError> {
    match resume {
        None => Ok(None),
        Some("auto") if output_dir.join(GATHERING).exists() => Ok(None),
        Some("auto") => Ok(latest_checkpoint(output_dir)),
        Some(path) if Path::new(path).is_dir() => Ok(Some(PathBuf::from(path))),
        Some(path) => {
            Err(CliError::flag("--resume", format!("`{path}` is neither auto nor a checkpoint folder")))
        }
    }
}

/// When the run in this folder was first started, by its `run.json`.
pub fn started_at(output_dir: &Path) -> Option<u64> {
    if output_dir.join(GATHERING).exists() {
        return None;
    }
    let bytes = std::fs::read(output_dir.join("run.json")).ok()?;
    serde_json::from_slice::<Value>(&bytes).ok()?.get("started_at")?.as_u64()
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> CliError {
    move |source| CliError::Io { path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn run_in(dir: &Path) {
        for step in ["step-00000002", "step-00000004"] {
            let step = dir.join("checkpoints").join(step);
            std::fs::create_dir_all(&step).unwrap();
            std::fs::write(step.join("state.json"), "").unwrap();
            std::fs::write(step.join("state.safetensors"), "").unwrap();
        }
        std::fs::create_dir(dir.join("adapter")).unwrap();
        std::fs::write(dir.join("adapter/x"), "").unwrap();
        std::fs::write(dir.join("metrics.jsonl"), "{}").unwrap();
        std::fs::write(dir.join("run.json"), r#"{"started_at": 7}"#).unwrap();
    }

    #[test]
    fn an_earlier_run_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        run_in(dir.path());
        let folder = OutputFolder::open(dir.path()).unwrap();
        let kept = folder.prepare_fresh(false).unwrap().unwrap();
        assert!(kept.join("checkpoints/step-00000004").is_dir() && kept.join("metrics.jsonl").is_file());
        assert!(folder.prepare_fresh(false).unwrap().is_none());
    }

    #[test]
    fn a_move_that_was_killed_is_finished_and_the_moved_run_not_continued() {
        let dir = tempfile::tempdir().unwrap();
        run_in(dir.path());
        std::fs::create_dir(dir.path().join(GATHERING)).unwrap();
        std::fs::rename(dir.path().join("metrics.jsonl"), dir.path().join(GATHERING).join("metrics.jsonl"))
            .unwrap();
        assert_eq!(resume_from(Some("auto"), dir.path()).unwrap(), None);
        assert_eq!(started_at(dir.path()), None);
        let kept = OutputFolder::open(dir.path()).unwrap().prepare_fresh(true).unwrap().unwrap();
        for name in ["checkpoints/step-00000004", "adapter", "metrics.jsonl", "run.json"] {
            assert!(kept.join(name).exists(), "{name}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_run_without_a_checkpoint_starts_again_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("metrics.jsonl"), "{}").unwrap();
        std::fs::write(dir.path().join("run.json"), r#"{"started_at": 7}"#).unwrap();
        std::fs::create_dir_all(dir.path().join("checkpoints/.step-00000002.partial-deadbeef")).unwrap();
        let folder = OutputFolder::open(dir.path()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path().join("checkpoints")).unwrap().count(), 0);
        assert_eq!(folder.prepare_fresh(true).unwrap(), None);
        assert_eq!(started_at(dir.path()), Some(7));
        assert!(folder.prepare_fresh(false).unwrap().is_some());
    }

    #[test]
    fn going_back_sets_later_checkpoints_aside() {
        let dir = tempfile::tempdir().unwrap();
        run_in(dir.path());
        let folder = OutputFolder::open(dir.path()).unwrap();
        let newest = resume_from(Some("auto"), dir.path()).unwrap().unwrap();
        assert!(newest.ends_with("step-00000004"));
        assert_eq!(folder.prepare_for(&newest).unwrap(), None);
        let kept = folder.prepare_for(&dir.path().join("checkpoints/step-00000002")).unwrap().unwrap();
        assert!(kept.join("checkpoints/step-00000004/state.json").is_file());
        assert!(resume_from(Some("auto"), dir.path()).unwrap().unwrap().ends_with("step-00000002"));
        // From elsewhere: the run that is here makes room.
        let other = tempfile::tempdir().unwrap();
        run_in(other.path());
        let from = other.path().join("checkpoints/step-00000004");
        let kept = folder.prepare_for(&from).unwrap().unwrap();
        assert!(kept.join("checkpoints/step-00000002").is_dir());
    }

    #[test]
    fn one_process_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = OutputFolder::open(dir.path()).unwrap();
        let error = OutputFolder::open(dir.path()).err().unwrap();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains("another process"), "{error}");
        drop(first);
        OutputFolder::open(dir.path()).unwrap();
    }
}
