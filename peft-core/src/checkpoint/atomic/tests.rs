#![allow(clippy::unwrap_used)]

use super::*;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_file_replaces_the_old_one_with_ordinary_permissions() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.json");
    let plain = folder.path().join("plain");
    fs::write(&plain, "").unwrap();
    write_file(&path, b"one").unwrap();
    write_file(&path, b"two").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"two");
    assert_eq!(path.metadata().unwrap().mode(), plain.metadata().unwrap().mode());
    assert_eq!(names(folder.path()), ["a.json", "plain"]);
}

#[test]
fn a_failing_write_leaves_the_old_file_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.json");
    write_file(&path, b"old").unwrap();
    let error = write_with(&path, |out| {
        out.write_all(b"half").map_err(CheckpointError::write(&path))?;
        Err(CheckpointError::write(&path)(io::Error::from_raw_os_error(libc::ENOSPC)))
    })
    .unwrap_err();
    assert!(matches!(error, CheckpointError::WriteFailed { .. }) && !error.is_bad_input());
    assert!(error.to_string().contains("No space left"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names(folder.path()), ["a.json"]);
}

#[test]
fn a_missing_folder_is_a_failed_write() {
    let folder = tempfile::tempdir().unwrap();
    let error = write_file(&folder.path().join("none/a"), b"").unwrap_err();
    assert!(matches!(error, CheckpointError::WriteFailed { .. }));
}

#[test]
fn a_staged_folder_appears_on_commit_only() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("deep/out");
    let staged = StagedDir::new(&target).unwrap();
    fs::create_dir(staged.path().join("sub")).unwrap();
    fs::write(staged.path().join("sub/x"), "x").unwrap();
    assert!(!target.exists());
    assert!(names(&folder.path().join("deep"))[0].starts_with(".out.partial-"));
    staged.commit().unwrap();
    assert_eq!(fs::read(target.join("sub/x")).unwrap(), b"x");
    assert_eq!(names(&folder.path().join("deep")), ["out"]);
}

#[test]
fn a_dropped_stage_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let staged = StagedDir::new(&folder.path().join("out")).unwrap();
    fs::write(staged.path().join("x"), "x").unwrap();
    drop(staged);
    assert!(names(folder.path()).is_empty());
}

#[test]
fn an_empty_folder_is_replaced_and_a_full_one_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    fs::create_dir(&target).unwrap();
    let staged = StagedDir::new(&target).unwrap();
    fs::write(staged.path().join("new"), "").unwrap();
    staged.commit().unwrap();
    assert_eq!(names(&target), ["new"]);
    let error = StagedDir::new(&target).unwrap_err();
    assert!(matches!(error, CheckpointError::OutputNotEmpty { .. }) && error.is_bad_input());
    assert_eq!(names(folder.path()), ["out"]);
}

#[test]
fn what_comes_to_stand_there_meanwhile_survives() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    let staged = StagedDir::new(&target).unwrap();
    fs::create_dir(&target).unwrap();
    fs::write(target.join("other"), "").unwrap();
    assert!(matches!(staged.commit(), Err(CheckpointError::OutputNotEmpty { .. })));
    assert_eq!(names(&target), ["other"]);
    assert_eq!(names(folder.path()), ["out"]);
}

#[test]
fn replacing_swaps_the_old_folder_out() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("old"), "").unwrap();
    let staged = StagedDir::replacing(&target).unwrap();
    fs::write(staged.path().join("new"), "").unwrap();
    assert_eq!(names(&target), ["old"]);
    staged.commit().unwrap();
    assert_eq!(names(&target), ["new"]);
    assert_eq!(names(folder.path()), ["out"]);
}

#[test]
fn the_exchange_in_steps_does_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let (new, old) = (folder.path().join("new"), folder.path().join("old"));
    fs::create_dir(&new).unwrap();
    fs::create_dir(&old).unwrap();
    fs::write(new.join("n"), "").unwrap();
    fs::write(old.join("o"), "").unwrap();
    exchange_in_steps(&new, &old).unwrap();
    assert_eq!((names(&new), names(&old)), (vec!["o".to_string()], vec!["n".to_string()]));
}

#[test]
fn stale_stages_go_and_living_ones_stay() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    let living = StagedDir::new(&target).unwrap();
    let stale = folder.path().join(".out.partial-deadbeef");
    let foreign = folder.path().join(".other.partial-deadbeef");
    fs::create_dir(&stale).unwrap();
    fs::create_dir(&foreign).unwrap();
    let next = StagedDir::new(&target).unwrap();
    assert!(!stale.exists() && foreign.exists());
    assert!(living.path().exists() && next.path().exists());
}

#[test]
fn files_and_nameless_paths_are_no_output_folder() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    for path in [file.as_path(), Path::new("/")] {
        assert!(matches!(StagedDir::new(path), Err(CheckpointError::InvalidOutput { .. })));
    }
    assert!(matches!(StagedDir::new(Path::new("/proc")), Err(CheckpointError::OutputNotEmpty { .. })));
}

#[test]
fn leftovers_of_a_kill_go_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let living = StagedDir::new(&path("step-2")).unwrap();
    for dir in [".step-1.partial-deadbeef", ".step-3.partial-removed", ".other.partial-deadbeef", "step-4"] {
        fs::create_dir(path(dir)).unwrap();
        fs::write(path(dir).join("x"), "").unwrap();
    }
    fs::write(path(".step-log.partial-deadbeef"), "").unwrap();
    remove_leftovers(folder.path(), |name| name.starts_with("step-")).unwrap();
    assert!(living.path().exists());
    drop(living);
    assert_eq!(names(folder.path()), [".other.partial-deadbeef", "step-4"]);
    // One that an earlier kill left does not stand in the way of the next removal.
    fs::create_dir(path(".step-4.partial-removed")).unwrap();
    remove_dir(&path("step-4")).unwrap();
    assert_eq!(names(folder.path()), [".other.partial-deadbeef"]);
    remove_leftovers(&path("nothing"), |_| true).unwrap();
}
