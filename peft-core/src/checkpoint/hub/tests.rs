#![allow(clippy::unwrap_used)]

use std::net::TcpListener;

use tempfile::TempDir;

use super::test_server::{COMMIT, TestHub};
use super::*;

const INDEX: &[u8] = br#"{"weight_map":{"a":"s1.safetensors","b":"s2.safetensors"}}"#;

/// A cache of its own and the options for it.
pub(super) fn options(endpoint: &str) -> (TempDir, HubOptions) {
    let cache = tempfile::tempdir().unwrap();
    let options = HubOptions {
        revision: None,
        offline: false,
        token: None,
        endpoint: endpoint.to_string(),
        cache_dir: cache.path().to_path_buf(),
    };
    (cache, options)
}

fn model() -> TestHub {
    TestHub::start(&[
        ("config.json", b"{}"),
        ("tokenizer.json", b"{\"t\":1}"),
        ("LICENSE", b"free"),
        ("README.md", b"no"),
        ("model.safetensors", &[7; 1000]),
        ("pytorch_model.bin", b"no"),
        ("original/params.json", b"no"),
        (".gitattributes", b"no"),
    ])
}

fn names(dir: &Path) -> Vec<String> {
    super::super::folder::file_names(dir).unwrap()
}

fn hub_error(result: Result<PathBuf, CheckpointError>) -> HubError {
    match result.unwrap_err() {
        CheckpointError::Hub(error) => error,
        other => panic!("{other}"),
    }
}

#[test]
fn a_model_comes_into_the_shared_layout_and_is_not_fetched_again() {
    let hub = model();
    let (cache, options) = options(&hub.endpoint);
    let snapshot = resolve("org/name", &options).unwrap();
    let root = cache.path().join("models--org--name");
    assert_eq!(snapshot, root.join("snapshots").join(COMMIT));
    assert_eq!(names(&snapshot), ["LICENSE", "config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), [7; 1000]);
    assert_eq!(fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    let digest = hex(&Sha256::digest([7; 1000]));
    let link = fs::read_link(snapshot.join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(digest));
    assert_eq!(names(&root.join("blobs")).len(), 4);

    hub.take_seen();
    assert_eq!(resolve("org/name", &options).unwrap(), snapshot);
    assert_eq!(hub.take_seen(), ["GET /api/models/org/name/revision/main"]);

    // What another tool left as a blob is linked, not fetched.
    fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    resolve("org/name", &options).unwrap();
    assert_eq!(hub.take_seen()[1..], [format!("HEAD /org/name/resolve/{COMMIT}/model.safetensors")]);

    // And offline the same snapshot is found without the hub, by branch or commit.
    for revision in [None, Some(COMMIT.to_string())] {
        let offline = HubOptions { offline: true, revision, ..options.clone() };
        assert_eq!(resolve("org/name", &offline).unwrap(), snapshot);
    }
    assert!(hub.take_seen().is_empty());
}

#[test]
fn shards_follow_from_the_index_and_other_revisions_have_their_refs() {
    let hub = TestHub::start(&[
        ("config.json", b"{}"),
        ("model.safetensors.index.json", INDEX),
        ("s1.safetensors", b"one"),
        ("s2.safetensors", b"two"),
        ("consolidated.safetensors", b"no"),
    ]);
    let (cache, options) = options(&hub.endpoint);
    let options = HubOptions { revision: Some("refs/pr/1".to_string()), ..options };
    let snapshot = resolve("org/name", &options).unwrap();
    assert_eq!(
        names(&snapshot),
        ["config.json", "model.safetensors.index.json", "s1.safetensors", "s2.safetensors"]
    );
    let reference = cache.path().join("models--org--name/refs/refs/pr/1");
    assert_eq!(fs::read_to_string(reference).unwrap(), COMMIT);
}

#[test]
fn an_adapter_needs_no_config_of_a_model() {
    let hub = TestHub::start(&[("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"x")]);
    let (_cache, options) = options(&hub.endpoint);
    let snapshot = resolve("org/name", &options).unwrap();
    assert_eq!(names(&snapshot), ["adapter_config.json", "adapter_model.safetensors"]);
    let offline = HubOptions { offline: true, ..options };
    assert_eq!(resolve("org/name", &offline).unwrap(), snapshot);
}

#[test]
fn the_token_opens_the_hub_and_never_reaches_the_cdn() {
    let hub = model();
    hub.state.lock().unwrap().token = Some("hf_secret".to_string());
    let (_cache, options) = options(&hub.endpoint);
    let error = hub_error(resolve("org/name", &options));
    assert!(matches!(error, HubError::TokenNeeded { status: 401, .. }) && error.is_bad_input());
    assert!(error.to_string().contains("set HF_TOKEN"));

    let wrong = HubOptions { token: Some("hf_wrong".to_string()), ..options.clone() };
    let message = hub_error(resolve("org/name", &wrong)).to_string();
    assert!(message.contains("accept its licence") && !message.contains("hf_wrong"), "{message}");

    let right = HubOptions { token: Some("hf_secret".to_string()), ..options };
    resolve("org/name", &right).unwrap();
    let state = hub.state.lock().unwrap();
    assert!(state.seen.iter().any(|request| request.starts_with("GET cdn/")));
    assert!(state.leaked.is_empty(), "{:?}", state.leaked);
}

#[test]
fn a_redirect_on_the_hub_itself_keeps_the_token() {
    let hub = model();
    hub.state.lock().unwrap().token = Some("hf_secret".to_string());
    let (_cache, options) = options(&hub.endpoint);
    let options = HubOptions { token: Some("hf_secret".to_string()), ..options };
    // A renamed repository.
    resolve("org/old", &options).unwrap();
}

#[test]
fn a_broken_download_goes_on_where_it_ended() {
    let hub = model();
    hub.state.lock().unwrap().breaks = 2;
    let (_cache, options) = options(&hub.endpoint);
    let mut most = 0;
    let snapshot = resolve_with_progress("org/name", &options, &mut |progress| {
        if progress.file == "model.safetensors" {
            assert_eq!(progress.total, Some(1000));
            most = progress.done;
        }
    })
    .unwrap();
    assert_eq!(most, 1000);
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), [7; 1000]);
    let ranges: Vec<_> = hub
        .take_seen()
        .iter()
        .filter_map(|request| {
            Some(request.strip_prefix("GET cdn/model.safetensors?Signature=secret ")?.to_string())
        })
        .collect();
    assert_eq!(ranges, ["", "bytes=500-", "bytes=750-"]);
}

#[test]
fn a_forged_file_is_refused_and_not_kept() {
    let hub = model();
    let (cache, options) = options(&hub.endpoint);
    for (forged, expected) in [(vec![8; 1000], "SHA-256"), (vec![7; 2000], "1000 bytes")] {
        hub.state.lock().unwrap().forged = Some(forged);
        let error = hub_error(resolve("org/name", &options));
        assert!(matches!(error, HubError::Corrupt { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
        let blobs = names(&cache.path().join("models--org--name/blobs"));
        assert!(blobs.iter().all(|name| name.len() == 40), "{blobs:?}");
    }
}

#[test]
fn unknown_repositories_and_revisions_are_named() {
    let hub = model();
    let (cache, options) = options(&hub.endpoint);
    fs::create_dir(cache.path().join("models--org--nam3")).unwrap();
    let error = hub_error(resolve("org/nam", &options));
    assert!(matches!(error, HubError::RepoNotFound { .. }) && error.is_bad_input());
    assert!(error.to_string().contains("did you mean `org/nam3`?"), "{error}");
    let other = HubOptions { revision: Some("v2".to_string()), ..options };
    let error = hub_error(resolve("org/name", &other));
    assert!(matches!(error, HubError::RevisionNotFound { revision, .. } if revision == "v2"));
}

#[test]
fn repositories_without_safetensors_are_refused_before_any_download() {
    let hub = TestHub::start(&[("config.json", b"{}"), ("pytorch_model.bin", b"x")]);
    let (cache, options) = options(&hub.endpoint);
    assert!(matches!(hub_error(resolve("org/name", &options)), HubError::PickleOnly { .. }));
    hub.state.lock().unwrap().files.remove("pytorch_model.bin");
    assert!(matches!(hub_error(resolve("org/name", &options)), HubError::NoWeights { .. }));
    assert!(names(cache.path()).is_empty());
}

#[test]
fn an_index_cannot_name_files_outside() {
    let index = br#"{"weight_map":{"a":"../../../evil.safetensors"}}"#;
    let hub = TestHub::start(&[("config.json", b"{}"), ("model.safetensors.index.json", index)]);
    let (_cache, options) = options(&hub.endpoint);
    let error = resolve("org/name", &options).unwrap_err();
    assert!(matches!(error, CheckpointError::UnsafeShardName { .. }), "{error}");
}

#[test]
fn offline_opens_no_connection_and_says_what_is_missing() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let (cache, options) = options(&format!("http://{}", listener.local_addr().unwrap()));
    let options = HubOptions { offline: true, ..options };
    let error = hub_error(resolve("org/name", &options));
    assert!(matches!(error, HubError::NotCached { .. }) && error.is_bad_input());
    assert!(error.to_string().contains("the whole snapshot"), "{error}");

    let root = cache.path().join("models--org--name");
    let snapshot = root.join("snapshots").join(COMMIT);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(root.join("refs")).unwrap();
    fs::write(root.join("refs/main"), format!("{COMMIT}\n")).unwrap();
    fs::write(snapshot.join("config.json"), "{}").unwrap();
    let message = hub_error(resolve("org/name", &options)).to_string();
    assert!(message.contains("missing model.safetensors"), "{message}");
    fs::write(snapshot.join(INDEX_FILE), INDEX).unwrap();
    fs::write(snapshot.join("s1.safetensors"), "").unwrap();
    std::os::unix::fs::symlink("../../blobs/gone", snapshot.join("s2.safetensors")).unwrap();
    let message = hub_error(resolve("org/name", &options)).to_string();
    assert!(message.contains("missing s2.safetensors;"), "{message}");

    // A reference that is no commit leads nowhere.
    fs::write(root.join("refs/main"), "../../../etc").unwrap();
    assert!(matches!(hub_error(resolve("org/name", &options)), HubError::NotCached { .. }));
    assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn no_network_is_not_bad_input() {
    // A port that was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for scheme in ["http", "https"] {
        let (_cache, options) = options(&format!("{scheme}://{address}"));
        let error = hub_error(resolve("org/name", &options));
        assert!(matches!(error, HubError::Unreachable { .. }) && !error.is_bad_input());
        assert!(error.to_string().contains("--offline"), "{error}");
    }
}

#[test]
fn a_server_without_the_right_certificate_gets_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let mut first = [0; 1];
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut first).unwrap();
        first[0]
    });
    let (_cache, options) = options(&format!("https://{address}"));
    let error = hub_error(resolve("org/name", &options));
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
    // The record type of a TLS handshake: nothing went out in the clear.
    assert_eq!(server.join().unwrap(), 22);
}

#[test]
fn folders_are_themselves_and_paths_are_not_looked_up() {
    let (cache, options) = options("http://127.0.0.1:9");
    let folder = cache.path().join("llama");
    fs::create_dir(&folder).unwrap();
    assert_eq!(resolve(folder.to_str().unwrap(), &options).unwrap(), folder);
    let message = resolve(&format!("{}/lama", cache.path().display()), &options).unwrap_err().to_string();
    assert!(message.contains("no such folder (did you mean `llama`?)"), "{message}");
    for path in ["./none", "~/none", "a/b/c", "../none"] {
        let error = resolve(path, &options).unwrap_err();
        assert!(matches!(error, CheckpointError::NoFolder { .. }) && error.is_bad_input());
    }
}

#[test]
fn names_revisions_endpoints_and_tokens_are_checked_first() {
    let (_cache, options) = options("http://127.0.0.1:9");
    for name in ["", "org/", "a b", "org/na--me", "-x", "x.git", "o?/x", "org\\x"] {
        assert!(matches!(hub_error(resolve(name, &options)), HubError::InvalidName { .. }), "{name}");
    }
    for revision in ["", "../x", "a//b", "a b", "a/../b"] {
        let options = HubOptions { revision: Some(revision.to_string()), ..options.clone() };
        assert!(matches!(hub_error(resolve("org/x", &options)), HubError::InvalidRevision { .. }));
    }
    for endpoint in ["huggingface.co", "file:///etc", "https://user:secret@hub"] {
        let options = HubOptions { endpoint: endpoint.to_string(), ..options.clone() };
        let error = hub_error(resolve("org/x", &options));
        assert!(matches!(error, HubError::InvalidEndpoint { .. }));
        assert!(!error.to_string().contains("secret"));
    }
    let options = HubOptions { token: Some("a\r\nX: y".to_string()), ..options };
    assert!(matches!(hub_error(resolve("org/x", &options)), HubError::InvalidToken));
}
