//! A model folder's tokenizer: vocabulary, special tokens, and which of them belong around a text.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::folder::{
    MAX_TOKENIZER_BYTES, chat_template, eos_token_ids, flag, read, read_object, special_token,
    without_tokenizer_hint,
};
use super::{ChatTemplate, DecodeStream, TextError};
use crate::contain::contained;
use crate::nearest::did_you_mean;

/// The roles of special tokens in `tokenizer_config.json` and `special_tokens_map.json`.
const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];

/// The tokens of one text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoding {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each token, the characters `start..end` of the text that it stands for; empty for a token that stands
    /// for none, such as a beginning-of-sequence token that was added.
    pub offsets: Vec<(usize, usize)>,
}

/// Text to token ids and back, as the model in a folder was trained with.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocab_size: usize,
    dir: PathBuf,
    special_tokens: BTreeMap<String, String>,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    stop_ids: Vec<u32>,
    adds_bos: bool,
    adds_eos: bool,
    template: Option<String>,
    template_names: Vec<String>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and what stands beside it in a model folder: `tokenizer_config.json`,
    /// `special_tokens_map.json`, `chat_template.jinja`, `generation_config.json` and `config.json`, each optional.
    ///
    /// # Errors
    /// When `tokenizer.json` is missing or any of the files is unreadable, malformed or of absurd size, and when the
    /// beginning- or end-of-sequence token is not in the vocabulary.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self, TextError> {
        let dir = dir.as_ref();
        let path = dir.join("tokenizer.json");
        let Some(bytes) = read(&path, MAX_TOKENIZER_BYTES)? else {
            return Err(TextError::NoTokenizer { dir: dir.into(), hint: without_tokenizer_hint(dir) });
        };
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(&bytes)).map_err(|error| {
            TextError::Invalid { path: path.clone(), problem: format!("not a usable tokenizer: {error}") }
        })?;
        drop(bytes);
        // A published file may cut or pad by itself; cutting is this toolkit's explicit business.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| TextError::Tokenizer(error.to_string()))?;

        let config_path = dir.join("tokenizer_config.json");
        let config = read_object(&config_path)?;
        let map_path = dir.join("special_tokens_map.json");
        let map = read_object(&map_path)?;
        let named = |role: &str| match special_token(&config_path, &config, role)? {
            Some(token) => Ok(Some((token, &config_path))),
            None => Ok(special_token(&map_path, &map, role)?.map(|token| (token, &map_path))),
        };
        let mut special_tokens = BTreeMap::new();
        for role in ROLES {
            special_tokens.extend(named(role)?.map(|(token, _)| (role.to_string(), token)));
        }
        let known = |role: &'static str| match named(role)? {
            None => Ok(None),
            Some((token, path)) => match inner.token_to_id(&token) {
                Some(id) => Ok(Some(id)),
                None => {
                    let vocabulary = inner.get_vocab(true);
                    let hint = did_you_mean(&token, vocabulary.keys().map(String::as_str));
                    Err(TextError::UnknownSpecialToken { path: path.clone(), role, token, hint })
                }
            },
        };
        let (bos, mut eos) = (known("bos_token")?, known("eos_token")?);
        let pad = special_tokens.get("pad_token").and_then(|token| inner.token_to_id(token));

        let mut stop_ids = BTreeSet::from_iter(eos);
        for name in ["generation_config.json", "config.json"] {
            let file = dir.join(name);
            let found = eos_token_ids(&file, &read_object(&file)?)?;
            if eos.is_none() {
                eos = found.first().copied();
            }
            stop_ids.extend(found);
        }

        let (template, template_names) = chat_template(dir, &config_path, &config)?;
        let mut tokenizer = Self {
            vocab_size: inner.get_vocab_size(true),
            inner,
            dir: dir.into(),
            special_tokens,
            bos,
            eos,
            pad,
            stop_ids: stop_ids.into_iter().collect(),
            adds_bos: false,
            adds_eos: false,
            template,
            template_names,
        };
        let probe = tokenizer.encode_raw("a", true)?;
        let added = |id: Option<u32>, at: Option<&u32>| id.is_some() && at.copied() == id;
        tokenizer.adds_bos = bos.is_some()
            && flag(&config_path, &config, "add_bos_token")?.unwrap_or(added(bos, probe.ids.first()));
        tokenizer.adds_eos = eos.is_some()
            && flag(&config_path, &config, "add_eos_token")?.unwrap_or(added(eos, probe.ids.last()));
        Ok(tokenizer)
    }

    /// The tokens of `text`. With `add_special`, the special tokens that this tokenizer puts around a text are added,
    /// and the beginning-of-sequence token stands there once even when the text, coming from a chat template, already
    /// begins with it.
    ///
    /// # Errors
    /// When the tokenizer's rules fail on this text, for example an unknown word without an unknown token.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Encoding, TextError> {
        if !add_special {
            return self.encode_raw(text, false);
        }
        let mut encoding = self.encode_raw(text, true)?;
        if let Some(bos) = self.bos {
            let begins_with = |encoding: &Encoding, at: usize| encoding.ids.get(at) == Some(&bos);
            let added = begins_with(&encoding, 0) && encoding.offsets[0].0 == encoding.offsets[0].1;
            let doubled = added && begins_with(&encoding, 1);
            if doubled || (added && !self.adds_bos) {
                encoding.ids.remove(0);
                encoding.offsets.remove(0);
            } else if self.adds_bos && !begins_with(&encoding, 0) {
                encoding.ids.insert(0, bos);
                encoding.offsets.insert(0, (0, 0));
            }
        }
        if let Some(eos) = self.eos {
            let last = encoding.ids.last() == Some(&eos);
            let added = last && encoding.offsets.last().is_some_and(|(start, end)| start == end);
            if added && !self.adds_eos {
                encoding.ids.pop();
                encoding.offsets.pop();
            } else if self.adds_eos && !last {
                encoding.ids.push(eos);
                encoding.offsets.push((0, 0));
            }
        }
        Ok(encoding)
    }

    fn encode_raw(&self, text: &str, add_special: bool) -> Result<Encoding, TextError> {
        let encoding = guarded(|| self.inner.encode_char_offsets(text, add_special))
            .map_err(|error| TextError::Tokenizer(error.to_string()))?;
        let mut offsets = encoding.get_offsets().to_vec();
        // Byte-level tokenizers trim spaces off the offsets, which leaves a token of spaces with an empty range: it
        // stands for what lies between its neighbours.
        let mut previous_end = 0;
        for (offset, added) in offsets.iter_mut().zip(encoding.get_special_tokens_mask()) {
            if *added == 1 {
                *offset = (0, 0);
                continue;
            }
            if offset.0 == offset.1 {
                offset.0 = previous_end.min(offset.1);
            }
            previous_end = offset.1;
        }
        Ok(Encoding { ids: encoding.get_ids().to_vec(), offsets })
    }

    /// The text of `ids`; with `skip_special` without the special tokens. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        guarded(|| self.inner.decode(ids, skip_special))
            .map_err(|error| TextError::Tokenizer(error.to_string()))
    }

    /// A decoder that takes one token at a time and gives out text as soon as it is complete.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// The token with this id, as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token spelled as in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// How many tokens there are, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The beginning-of-sequence token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-sequence token: the tokenizer's own, or else the first one the model's configuration names.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The token to fill short rows with: the padding token, or else the end-of-sequence token, or else 0. Padded
    /// positions are told apart by the row's length, never by this id.
    pub fn pad(&self) -> u32 {
        self.pad.or(self.eos).unwrap_or(0)
    }

    /// Ids at which generation stops, ascending: the end-of-sequence token and every `eos_token_id` of
    /// `generation_config.json` and `config.json`.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// Whether a text begins with the beginning-of-sequence token: `add_bos_token` where the configuration has it,
    /// otherwise what the tokenizer's post-processor does.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// Special tokens by role, for example `"eos_token"`.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }

    /// The folder this came from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether the folder has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// The folder's chat template: `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json` (the one
    /// named `default` when there are several).
    ///
    /// # Errors
    /// When there is none, or it does not parse.
    pub fn chat_template(&self) -> Result<ChatTemplate, TextError> {
        match &self.template {
            Some(source) => ChatTemplate::new(source.clone(), &self.special_tokens),
            None => {
                let hint = match self.template_names.as_slice() {
                    [] => String::new(),
                    names => {
                        format!("; there are templates named {}, but none named default", names.join(", "))
                    }
                };
                Err(TextError::NoTemplate { dir: self.dir.clone(), hint })
            }
        }
    }
}

/// The library's answer, with its panics on an odd `tokenizer.json` among its errors.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    contained(work).unwrap_or_else(|panic| Err(panic.into()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::fixtures::{folder, plain};
    use super::*;
    use serde_json::{Map, Value, json};

    fn open(post: bool, config: Value) -> Tokenizer {
        Tokenizer::from_dir(folder(post, &[("tokenizer_config.json", config)]).path()).unwrap()
    }

    fn failure(dir: &Path) -> String {
        let error = Tokenizer::from_dir(dir).unwrap_err();
        assert!(error.is_bad_input());
        error.to_string()
    }

    #[test]
    fn a_tokenizer_that_makes_the_library_panic_is_refused() {
        let dir = folder(false, &[]);
        let path = dir.path().join("tokenizer.json");
        let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        json["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0});
        std::fs::write(&path, json.to_string()).unwrap();
        assert!(failure(dir.path()).starts_with("the tokenizer failed: "));
    }

    #[test]
    fn the_first_token_stands_there_once() {
        let flag = |add: Option<bool>| json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": add});
        for (post, add, expected) in [
            (true, None, true),
            (false, None, false),
            (false, Some(true), true),
            (true, Some(true), true),
            (true, Some(false), false),
        ] {
            let tokenizer = open(post, flag(add));
            assert_eq!(tokenizer.adds_bos(), expected, "{post} {add:?}");
            let count = |text| {
                let ids = tokenizer.encode(text, true).unwrap().ids;
                ids.iter().filter(|&&id| id == 0).count()
            };
            assert_eq!(count("x"), usize::from(expected), "{post} {add:?}");
            assert_eq!(count("<s>x"), 1, "{post} {add:?}");
            assert_eq!(tokenizer.encode("x", false).unwrap().ids, [tokenizer.id("x").unwrap()]);
        }
    }

    #[test]
    fn a_last_token_is_added_where_the_configuration_says_so() {
        let tokenizer = open(true, json!({"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": true}));
        let x = tokenizer.id("x").unwrap();
        assert_eq!(tokenizer.encode("x", true).unwrap().ids, [0, x, 1]);
        assert_eq!(tokenizer.encode("x</s>", true).unwrap().ids, [0, x, 1]);
    }

    #[test]
    fn offsets_count_characters_and_cover_spaces() {
        let tokenizer = plain();
        let encoding = tokenizer.encode("é  ab w", true).unwrap();
        let tokens: Vec<String> = encoding.ids.iter().map(|&id| tokenizer.token(id).unwrap()).collect();
        assert_eq!(tokens, ["<s>", "Ã", "©", "Ġ", "Ġ", "ab", "Ġw"]);
        // The second space belongs to the word after it for the splitter; byte pairs keep it a token of its own.
        assert_eq!(encoding.offsets, [(0, 0), (0, 1), (0, 1), (1, 2), (2, 3), (3, 5), (6, 7)]);
    }

    #[test]
    fn a_limit_in_the_file_cuts_nothing() {
        assert_eq!(plain().encode("cccccccccccccccccccc", true).unwrap().ids.len(), 21);
    }

    #[test]
    fn special_tokens_come_from_the_files_in_turn() {
        let dir = folder(
            false,
            &[
                ("tokenizer_config.json", json!({"bos_token": {"content": "<s>"}, "pad_token": "absent"})),
                ("special_tokens_map.json", json!({"eos_token": {"content": "</s>"}, "bos_token": "</s>"})),
                ("generation_config.json", json!({"eos_token_id": [3, 1]})),
                ("config.json", json!({"eos_token_id": 2})),
            ],
        );
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (Some(0), Some(1), 1));
        assert_eq!(tokenizer.stop_ids(), [1, 2, 3]);
        assert_eq!(tokenizer.special_tokens()["bos_token"], "<s>");
        assert_eq!(tokenizer.vocab_size(), 4 + 256 + 2);

        let dir = folder(false, &[("config.json", json!({"eos_token_id": 3, "bos_token_id": 0}))]);
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (None, Some(3)));
    }

    #[test]
    fn errors_say_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        assert!(failure(dir.path()).ends_with("no tokenizer.json in this folder"));
        std::fs::write(dir.path().join("tokenizer.model"), "x").unwrap();
        assert!(failure(dir.path()).contains("there is tokenizer.model, which needs converting"));
        std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
        assert!(failure(dir.path()).contains("not a usable tokenizer"));
        assert!(failure(&dir.path().join("none")).contains("not a folder"));

        let wrong = |config| failure(folder(true, &[("tokenizer_config.json", config)]).path());
        let message = wrong(json!({"eos_token": "<|im_endd|>"}));
        assert!(message.contains("eos_token is `<|im_endd|>`"), "{message}");
        assert!(message.contains("did you mean `<|im_end|>`"), "{message}");
        assert!(wrong(json!({"bos_token": 3})).contains("`bos_token` should be a string"));
        assert!(wrong(json!({"bos_token": "<s>", "add_bos_token": "yes"})).contains("true or false"));
        assert!(wrong(json!([])).contains("not a JSON object"));
        let dir = folder(true, &[("config.json", json!({"eos_token_id": [1, -1]}))]);
        assert!(failure(dir.path()).contains("`eos_token_id`"));
    }

    #[test]
    fn the_template_is_chosen_as_documented() {
        let render = |dir: &tempfile::TempDir| {
            let template = Tokenizer::from_dir(dir.path()).unwrap().chat_template();
            template.and_then(|template| template.render(&[], false, &Map::new()))
        };
        let named = |names: &[&str]| {
            let entry = |name| json!({"name": name, "template": format!("T {name}")});
            json!({"chat_template": names.iter().map(entry).collect::<Vec<_>>()})
        };
        let with = |config| folder(true, &[("tokenizer_config.json", config)]);
        assert_eq!(render(&with(json!({"chat_template": "one"}))).unwrap(), "one");
        assert_eq!(render(&with(named(&["rag", "default"]))).unwrap(), "T default");
        assert_eq!(render(&with(named(&["rag"]))).unwrap(), "T rag");
        let message = render(&with(named(&["rag", "tools"]))).unwrap_err().to_string();
        assert!(message.contains("named rag, tools"), "{message}");
        assert!(render(&with(json!({}))).unwrap_err().to_string().contains("no chat template"));
        let dir = with(json!({"chat_template": "one"}));
        std::fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
        assert_eq!(render(&dir).unwrap(), "file");
    }
}
