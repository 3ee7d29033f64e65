#![allow(clippy::unwrap_used)]

use std::net::TcpListener;

use tempfile::TempDir;

use super::test_server::TestHub;
use super::*;

const TOKEN: &str = "hf_secret";

/// Options of a user with a token.
fn options(hub: &TestHub) -> (TempDir, HubOptions) {
    hub.state.lock().unwrap().token = Some(TOKEN.to_string());
    let cache = tempfile::tempdir().unwrap();
    let options = HubOptions {
        revision: None,
        offline: false,
        token: Some(TOKEN.to_string()),
        endpoint: hub.endpoint.clone(),
        cache_dir: cache.path().to_path_buf(),
    };
    (cache, options)
}

/// A folder with small files, large files and an empty one, and what of it is sent.
fn folder() -> (TempDir, Selection) {
    let dir = tempfile::tempdir().unwrap();
    let large: Vec<u8> = (0..2500u32).flat_map(u32::to_le_bytes).collect();
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    let files: [(&str, &[u8]); 6] = [
        ("adapter_config.json", b"{\"r\": 4}\n"),
        ("README.md", "# ü\n".as_bytes()),
        ("empty.safetensors", b""),
        ("adapter_model.safetensors", &large),
        ("sub/other.safetensors", &[7; 100]),
        ("ignored.txt", b"x"),
    ];
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    let selection = select_files(dir.path()).unwrap();
    (dir, selection)
}

fn request(files: &[PushFile]) -> PushRequest<'_> {
    PushRequest { repo: "org/name", files, message: "Upload adapter", create: false, private: false }
}

fn pushed(selection: &Selection, options: &HubOptions) -> PushReport {
    push(&request(&selection.files), options, &mut |_| {}).unwrap()
}

fn refused(request: &PushRequest<'_>, options: &HubOptions) -> HubError {
    match push(request, options, &mut |_| {}).unwrap_err() {
        CheckpointError::Hub(error) => {
            let text = format!("{error} {error:?}");
            assert!(!text.contains(TOKEN) && !text.contains("ignature"), "{text}");
            error
        }
        other => panic!("{other}"),
    }
}

/// All files but the ignored one arrived as they are, and the token reached nobody but the hub.
fn assert_arrived(hub: &TestHub, dir: &TempDir) {
    let state = hub.state.lock().unwrap();
    assert!(state.leaked.is_empty(), "{:?}", state.leaked);
    assert_eq!(state.commits.len(), 1);
    assert_eq!(state.files.len(), 5);
    for (name, bytes) in &state.files {
        assert_eq!(bytes, &std::fs::read(dir.path().join(name)).unwrap(), "{name}");
    }
}

#[test]
fn small_and_large_files_arrive_as_they_are_and_come_back() {
    let hub = TestHub::start(&[]);
    let (_cache, options) = options(&hub);
    let (dir, selection) = folder();
    let mut done = Vec::new();
    let report = push(&request(&selection.files), &options, &mut |progress| {
        done.push((progress.file.to_string(), progress.done, progress.total));
    })
    .unwrap();
    assert_eq!((report.small, report.large, report.present, report.created), (3, 2, 0, false));
    assert_eq!(report.ignored, ["ignored.txt"]);
    assert_eq!(report.commit, "fedcba9876543210fedcba9876543210fedcba98");
    assert_eq!(report.url, format!("{}/org/name", hub.endpoint));
    assert!(done.contains(&("adapter_model.safetensors".to_string(), 10_000, Some(10_000))), "{done:?}");
    assert_arrived(&hub, &dir);
    assert_eq!(hub.state.lock().unwrap().commits[0]["summary"], "Upload adapter");

    // Objects that are there are not sent again.
    hub.take_seen();
    let again = pushed(&selection, &options);
    assert_eq!(again.present, 2);
    assert!(hub.take_seen().iter().all(|request| !request.starts_with("PUT")));

    let snapshot = resolve("org/name", &options).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        assert_eq!(
            std::fs::read(snapshot.join(name)).unwrap(),
            std::fs::read(dir.path().join(name)).unwrap()
        );
    }
}

#[test]
fn large_files_go_in_parts_where_the_hub_wants_it() {
    let hub = TestHub::start(&[]);
    hub.state.lock().unwrap().chunk_size = 4096;
    let (_cache, options) = options(&hub);
    let (dir, selection) = folder();
    pushed(&selection, &options);
    let parts = hub.take_seen().iter().filter(|request| request.starts_with("PUT cdn/part/")).count();
    assert_eq!(parts, 4, "10 000 bytes in three parts, 100 in one");
    assert_arrived(&hub, &dir);
}

#[test]
fn what_breaks_for_a_moment_is_tried_again() {
    for chunk_size in [0, 4096] {
        let hub = TestHub::start(&[]);
        let (_cache, options) = options(&hub);
        let (dir, selection) = folder();
        {
            let mut state = hub.state.lock().unwrap();
            state.chunk_size = chunk_size;
            state.cuts = 1;
            let storage = if chunk_size == 0 { "/store/" } else { "/part/" };
            state.faults = vec![
                ("/preupload/", "503 Slow Down", Some("0")),
                ("/objects/batch", "500 Internal Server Error", None),
                (storage, "500 Internal Server Error", None),
                ("/commit/", "502 Bad Gateway", None),
                ("/commit/", "429 Too Many Requests", Some("0")),
            ];
        }
        pushed(&selection, &options);
        assert!(hub.state.lock().unwrap().faults.is_empty());
        assert!(hub.take_seen().iter().any(|request| request.starts_with("cut ")));
        assert_arrived(&hub, &dir);
    }
}

#[test]
fn a_server_says_how_long_to_wait() {
    let hub = TestHub::start(&[]);
    let (_cache, options) = options(&hub);
    let (_dir, selection) = folder();
    hub.state.lock().unwrap().faults = vec![("/commit/", "503 Slow Down", Some("1"))];
    let begun = std::time::Instant::now();
    pushed(&selection, &options);
    assert!(begun.elapsed() >= Duration::from_secs(1));
}

#[test]
fn refusals_are_told_apart_and_not_repeated() {
    let (_dir, selection) = folder();
    let files = &selection.files;
    for (part, status, expected, bad_input) in [
        ("/preupload/", "401 Unauthorized", "the hub refuses the token", true),
        ("/commit/", "403 Forbidden", "may not write to org/name", true),
        ("/objects/batch", "404 Not Found", "--create", true),
        ("/commit/", "409 Conflict", "HTTP 409", false),
        ("/commit/", "412 Precondition Failed", "moved meanwhile", false),
        ("/commit/", "429 Too Many Requests", "HTTP 429", false),
        ("/store/", "403 Forbidden", "HTTP 403", false),
    ] {
        let hub = TestHub::start(&[]);
        let (_cache, options) = options(&hub);
        hub.state.lock().unwrap().faults = vec![(part, status, None)];
        let error = refused(&request(files), &options);
        assert!(error.to_string().contains(expected), "{part} {status}: {error}");
        assert_eq!(error.is_bad_input(), bad_input, "{error}");
        let state = hub.state.lock().unwrap();
        assert!(state.files.is_empty() && state.faults.is_empty());
        assert_eq!(state.seen.iter().filter(|request| request.contains(part)).count(), 1, "{:?}", state.seen);
    }
    // The hub's own words, without the token in them.
    let hub = TestHub::start(&[]);
    let (_cache, options) = options(&hub);
    hub.state.lock().unwrap().faults = vec![("/commit/", "403 Forbidden", None)];
    assert!(refused(&request(files), &options).to_string().contains("(as the hub says; token …)"));
}

#[test]
fn a_server_that_stays_broken_is_given_up() {
    let hub = TestHub::start(&[]);
    let (_cache, options) = options(&hub);
    let (_dir, selection) = folder();
    hub.state.lock().unwrap().faults = vec![("/preupload/", "500 Internal Server Error", Some("0")); 6];
    let error = refused(&request(&selection.files), &options);
    assert!(matches!(error, HubError::Rejected { status: 500, .. }) && !error.is_bad_input(), "{error}");
    drop(hub);

    // Nobody there.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let options = HubOptions { endpoint: format!("http://{address}"), ..options };
    let error = refused(&request(&selection.files), &options);
    assert!(matches!(error, HubError::SendFailed { .. }) && !error.is_bad_input(), "{error}");
}

#[test]
fn repositories_and_branches_are_made_on_demand_alone() {
    let hub = TestHub::start(&[]);
    let (_cache, options) = options(&hub);
    let (dir, selection) = folder();
    hub.state.lock().unwrap().missing = true;
    let error = refused(&request(&selection.files), &options);
    assert!(matches!(error, HubError::RepoMissing { .. }) && error.to_string().contains("--create"));

    let create = PushRequest { create: true, private: true, ..request(&selection.files) };
    assert!(push(&create, &options, &mut |_| {}).unwrap().created);
    let body = hub.state.lock().unwrap().creations[0].clone();
    assert_eq!(
        body,
        serde_json::json!({"type": "model", "name": "name", "organization": "org", "private": true})
    );
    assert_arrived(&hub, &dir);
    // There already: nothing is made.
    assert!(!push(&create, &options, &mut |_| {}).unwrap().created);
    assert_eq!(hub.state.lock().unwrap().creations.len(), 1);

    // What was to be private does not go where all can read it.
    hub.state.lock().unwrap().private = false;
    assert!(matches!(refused(&create, &options), HubError::PublicRepo { .. }));

    let branch = HubOptions { revision: Some("v2".to_string()), ..options };
    let error = refused(&request(&selection.files), &branch);
    assert!(matches!(&error, HubError::BranchMissing { revision, .. } if revision == "v2"), "{error}");
    let create = PushRequest { private: false, ..create };
    push(&create, &branch, &mut |_| {}).unwrap();
    assert_eq!(hub.state.lock().unwrap().branches, ["v2"]);
}

#[test]
fn a_renamed_repository_is_followed_with_the_token() {
    let hub = TestHub::start(&[]);
    let (_cache, options) = options(&hub);
    let (_dir, selection) = folder();
    let small: Vec<PushFile> =
        selection.files.into_iter().filter(|file| !file.path.ends_with(".safetensors")).collect();
    let request = PushRequest { repo: "org/old", ..request(&small) };
    push(&request, &options, &mut |_| {}).unwrap();
    assert_eq!(hub.state.lock().unwrap().files.len(), 2);
}

#[test]
fn nothing_is_sent_offline_without_token_or_to_no_repository() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let (_dir, selection) = folder();
    let online = HubOptions {
        revision: None,
        offline: false,
        token: Some(TOKEN.to_string()),
        endpoint: format!("http://{}", listener.local_addr().unwrap()),
        cache_dir: PathBuf::from("/nonexistent"),
    };
    let offline = HubOptions { offline: true, ..online.clone() };
    let error = refused(&request(&selection.files), &offline);
    assert!(matches!(error, HubError::Offline { .. }) && error.is_bad_input());
    let anonymous = HubOptions { token: None, ..online.clone() };
    let error = refused(&request(&selection.files), &anonymous);
    assert!(matches!(error, HubError::PushNeedsToken { .. }) && error.to_string().contains("HF_TOKEN"));
    for repo in ["name", "org/", "a/b/c", "org/na me"] {
        let error = refused(&PushRequest { repo, ..request(&selection.files) }, &online);
        assert!(matches!(error, HubError::InvalidTarget { .. }), "{repo}");
    }
    let branch = HubOptions { revision: Some("a b".to_string()), ..online };
    assert!(matches!(refused(&request(&selection.files), &branch), HubError::InvalidRevision { .. }));
    assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
}
