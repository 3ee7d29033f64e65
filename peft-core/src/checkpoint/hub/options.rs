//! Where the hub and its cache are, and who asks.

use std::fmt;
use std::path::PathBuf;

/// Settings for [`resolve`](super::resolve).
#[derive(Clone)]
pub struct HubOptions {
    /// Branch, tag or commit; `main` where there is none.
    pub revision: Option<String>,
    /// Use the cache alone: no socket is ever opened.
    pub offline: bool,
    /// The user's access token. It is sent to the endpoint and nowhere else, and never printed.
    pub token: Option<String>,
    /// Address of the hub, without a slash at its end.
    pub endpoint: String,
    /// The cache's folder, which holds a `models--org--name` for each repository.
    pub cache_dir: PathBuf,
}

impl HubOptions {
    /// The settings that the Python tools would use: from `HF_ENDPOINT`, `HF_TOKEN` or `HUGGING_FACE_HUB_TOKEN`,
    /// `HF_TOKEN_PATH`, `HF_HOME`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE`, with their defaults.
    pub fn from_env() -> Self {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name| lookup(name).filter(|value| !value.trim().is_empty());
        let user = get("HOME").map_or_else(|| PathBuf::from("."), PathBuf::from);
        let expand = |path: String| match path.strip_prefix("~/") {
            Some(below) => user.join(below),
            None => PathBuf::from(path),
        };
        let home = get("HF_HOME").map(expand).unwrap_or_else(|| {
            get("XDG_CACHE_HOME").map_or_else(|| user.join(".cache"), expand).join("huggingface")
        });
        let cache_dir = get("HF_HUB_CACHE").map_or_else(|| home.join("hub"), expand);
        let token = get("HF_TOKEN").or_else(|| get("HUGGING_FACE_HUB_TOKEN")).or_else(|| {
            let path = get("HF_TOKEN_PATH").map_or_else(|| home.join("token"), expand);
            std::fs::read_to_string(path).ok()
        });
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
        let offline = get("HF_HUB_OFFLINE")
            .is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str()));
        Self {
            revision: None,
            offline,
            token: token.map(|token| token.trim().to_string()).filter(|token| !token.is_empty()),
            endpoint: endpoint.trim_end_matches('/').to_string(),
            cache_dir,
        }
    }
}

/// Says whether there is a token, not which.
impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("revision", &self.revision)
            .field("offline", &self.offline)
            .field("token", &self.token.as_ref().map(|_| "hidden"))
            .field("endpoint", &self.endpoint)
            .field("cache_dir", &self.cache_dir)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn options(variables: &[(&str, &str)]) -> HubOptions {
        HubOptions::from_lookup(|name| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn defaults_are_those_of_the_python_tools() {
        let options = options(&[("HOME", "/nonexistent/u")]);
        assert_eq!(options.cache_dir, PathBuf::from("/nonexistent/u/.cache/huggingface/hub"));
        assert_eq!(options.endpoint, "https://huggingface.co");
        assert!(!options.offline && options.token.is_none() && options.revision.is_none());
    }

    #[test]
    fn variables_override_and_the_token_stays_hidden() {
        let given = options(&[
            ("HOME", "/u"),
            ("HF_HOME", "~/hf"),
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_TOKEN", " hf_secret\n"),
            ("HF_HUB_OFFLINE", "1"),
        ]);
        assert_eq!(given.cache_dir, PathBuf::from("/u/hf/hub"));
        assert_eq!(given.endpoint, "http://mirror");
        assert_eq!(given.token.as_deref(), Some("hf_secret"));
        assert!(given.offline);
        assert!(!format!("{given:?}").contains("secret"));
        let old = options(&[("HUGGING_FACE_HUB_TOKEN", "hf_old")]);
        assert_eq!(old.token.as_deref(), Some("hf_old"));
        assert_eq!(options(&[("HF_HUB_CACHE", "/c")]).cache_dir, PathBuf::from("/c"));
        assert!(!options(&[("HF_HUB_OFFLINE", "0")]).offline);
    }

    #[test]
    fn the_token_comes_from_its_file() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), "hf_file\n").unwrap();
        let home = folder.path().to_str().unwrap();
        assert_eq!(options(&[("HF_HOME", home)]).token.as_deref(), Some("hf_file"));
        let path = format!("{home}/token");
        assert_eq!(options(&[("HF_TOKEN_PATH", &path)]).token.as_deref(), Some("hf_file"));
    }
}
