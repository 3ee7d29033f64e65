//! Which modules an adapter touches, by PEFT's rules.
//!
//! A list selects modules whose path is an item or ends with `.item`; a string is a regular expression over the whole
//! path; `all-linear` is every linear module but the output head. `exclude_modules` and `modules_to_save` win over all.
//! `layers_to_transform` narrows a list down to modules of some layers, but for items that are whole paths.

use super::config::Layers;
use super::error::AdapterError;
use crate::model::{EMBEDDING, HEAD};
use crate::nearest::did_you_mean;
use fancy_regex::{Regex, RegexBuilder};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeSet;

/// Steps back that an expression may take on one path; a path is short, and an adapter's file may hold many expressions.
const MAX_BACKTRACKING: usize = 100_000;

/// Suffixes or a regular expression.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Pattern {
    /// Paths or suffixes of paths.
    Names(Vec<String>),
    /// A regular expression over whole paths.
    Regex(String),
}

impl Pattern {
    /// Parses regular expressions once.
    fn compile(&self, key: &'static str) -> Result<Matcher<'_>, AdapterError> {
        match self {
            Pattern::Names(names) => Ok(Matcher::Names(names)),
            Pattern::Regex(pattern) => {
                Ok(Matcher::Regex(full_match(key, &format!("(?:{pattern})"), pattern)?))
            }
        }
    }
}

/// Where low-rank changes attach.
#[derive(Debug, Clone, PartialEq)]
pub enum TargetModules {
    /// Every linear module but the head.
    AllLinear,
    /// Those a pattern selects.
    Matching(Pattern),
}

impl Serialize for TargetModules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            TargetModules::AllLinear => "all-linear".serialize(serializer),
            TargetModules::Matching(pattern) => pattern.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match Pattern::deserialize(deserializer)? {
            Pattern::Regex(text) if text.eq_ignore_ascii_case("all-linear") => TargetModules::AllLinear,
            pattern => TargetModules::Matching(pattern),
        })
    }
}

enum Matcher<'a> {
    Names(&'a [String]),
    Regex(Regex),
}

impl Matcher<'_> {
    fn matches(&self, path: &str) -> bool {
        match self {
            Matcher::Names(names) => names.iter().any(|name| is_suffix(path, name)),
            // A pattern that exceeds the engine's backtracking limit matches nothing.
            Matcher::Regex(regex) => regex.is_match(path).unwrap_or(false),
        }
    }
}

/// `path` is `name` or ends with `.name`.
fn is_suffix(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Compiles an expression that must match a whole path.
fn full_match(key: &'static str, expression: &str, shown: &str) -> Result<Regex, AdapterError> {
    let regex = RegexBuilder::new(&format!("^{expression}$")).backtrack_limit(MAX_BACKTRACKING).build();
    regex.map_err(|error| AdapterError::Pattern {
        key,
        pattern: shown.to_string(),
        message: error.to_string(),
    })
}

/// Compiles a key of `rank_pattern` or `alpha_pattern`: a regular expression for the end of a path.
pub(super) fn suffix_regex(key: &'static str, pattern: &str) -> Result<Regex, AdapterError> {
    full_match(key, &format!(r"(.*\.)?({pattern})"), pattern)
}

/// What may be selected, and from what.
pub struct Selection<'a> {
    /// Where changes attach; `None` is the default of these architectures, q and v.
    pub targets: Option<&'a TargetModules>,
    /// Modules left out.
    pub exclude: Option<&'a Pattern>,
    /// Modules trained whole, left out too.
    pub saved: &'a [String],
    /// Only these layers.
    pub layers: Option<&'a Layers>,
    /// Expressions for the name of the list that layers are numbered in; none is any.
    pub layers_pattern: &'a [String],
    /// Whether every listed name must match (a recipe), or only one of them (a file).
    pub strict: bool,
}

/// The paths among `modules` (the linear ones and the embedding) that the selection takes, in their order.
///
/// # Errors
/// A name, layer or expression that matches nothing, or an expression that does not parse.
pub fn select<'p>(selection: &Selection, modules: &[&'p str]) -> Result<Vec<&'p str>, AdapterError> {
    let default = TargetModules::Matching(Pattern::Names(vec!["q_proj".to_string(), "v_proj".to_string()]));
    let targets = selection.targets.unwrap_or(&default);
    let exclude = selection.exclude.map(|pattern| pattern.compile("exclude_modules")).transpose()?;
    let allowed = |path: &&str| {
        !exclude.as_ref().is_some_and(|exclude| exclude.matches(path))
            && !selection.saved.iter().any(|name| is_suffix(path, name))
    };
    let chosen: Vec<&str> = match targets {
        TargetModules::AllLinear => {
            modules.iter().copied().filter(|path| ![HEAD, EMBEDDING].contains(path)).collect()
        }
        TargetModules::Matching(pattern) => {
            let matcher = pattern.compile("target_modules")?;
            if let (Pattern::Names(names), true) = (pattern, selection.strict) {
                let unmatched = names.iter().find(|name| !modules.iter().any(|path| is_suffix(path, name)));
                if let Some(name) = unmatched {
                    return Err(no_match(format!("`{name}`"), name, modules));
                }
            }
            let layers = LayerFilter::new(selection)?;
            let whole = |path: &str| match pattern {
                Pattern::Names(names) => names.iter().any(|name| name == path),
                Pattern::Regex(_) => true,
            };
            let takes = |path: &&str| matcher.matches(path) && (whole(path) || layers.takes(path));
            modules.iter().copied().filter(takes).collect()
        }
    };
    let chosen: Vec<&str> = chosen.into_iter().filter(allowed).collect();
    if chosen.is_empty() {
        let (shown, wanted) = match targets {
            TargetModules::AllLinear => ("all-linear after exclusions".to_string(), String::new()),
            TargetModules::Matching(Pattern::Names(names)) => {
                let layers = selection.layers.map_or("", |_| " in the layers of layers_to_transform");
                (format!("{names:?}{layers}"), names.first().cloned().unwrap_or_default())
            }
            TargetModules::Matching(Pattern::Regex(regex)) => {
                (format!("the regular expression `{regex}` (over whole module paths)"), regex.clone())
            }
        };
        return Err(no_match(shown, &wanted, modules));
    }
    Ok(chosen)
}

/// Which layers a list of names reaches.
struct LayerFilter<'a> {
    layers: Option<&'a Layers>,
    numbered: Vec<Regex>,
}

impl<'a> LayerFilter<'a> {
    fn new(selection: &Selection<'a>) -> Result<Self, AdapterError> {
        let compile = |expression: String, shown: &str| {
            Regex::new(&expression).map_err(|error| AdapterError::Pattern {
                key: "layers_pattern",
                pattern: shown.to_string(),
                message: error.to_string(),
            })
        };
        let numbered = match selection.layers_pattern {
            // The first number in the path, after a name that is not the path's first.
            [] => vec![compile(r"^.*?\.[^.]*\.(\d+)\.".to_string(), "")?],
            patterns => patterns
                .iter()
                .map(|pattern| compile(format!(r"^(?:|.*?\.)(?:{pattern})\.(\d+)\."), pattern))
                .collect::<Result<_, _>>()?,
        };
        Ok(Self { layers: selection.layers.filter(|layers| !layers.is_empty()), numbered })
    }

    fn takes(&self, path: &str) -> bool {
        let Some(layers) = self.layers else { return true };
        let captured = self.numbered.iter().find_map(|regex| regex.captures(path).ok().flatten());
        let number = captured.and_then(|groups| groups.get(1)?.as_str().parse().ok());
        number.is_some_and(|layer| layers.contains(layer))
    }
}

fn no_match(pattern: String, wanted: &str, modules: &[&str]) -> AdapterError {
    let last = |path: &&str| path.rsplit('.').next().unwrap_or_default().to_string();
    let names: BTreeSet<String> = modules.iter().map(last).collect();
    AdapterError::NoMatch {
        pattern,
        suggestion: did_you_mean(wanted, names.iter().map(String::as_str)),
        available: names.into_iter().collect::<Vec<_>>().join(", "),
    }
}

/// The names among `names` that the pattern, which stands under `key`, selects.
///
/// # Errors
/// An expression that does not parse.
pub fn matching(
    pattern: &Pattern,
    key: &'static str,
    names: &[&str],
) -> Result<BTreeSet<String>, AdapterError> {
    let matcher = pattern.compile(key)?;
    Ok(names.iter().filter(|name| matcher.matches(name)).map(|name| name.to_string()).collect())
}

/// The modules among `paths` that `modules_to_save` names.
///
/// # Errors
/// A name that matches nothing.
pub fn select_saved(names: &[String], paths: &[&str]) -> Result<Vec<String>, AdapterError> {
    let mut chosen = Vec::new();
    for name in names {
        let matched: Vec<String> =
            paths.iter().filter(|path| is_suffix(path, name)).map(|path| path.to_string()).collect();
        if matched.is_empty() {
            let last: BTreeSet<&str> = paths.iter().filter_map(|path| path.rsplit('.').next()).collect();
            return Err(AdapterError::ModulesToSave {
                name: name.clone(),
                reason: format!("matches no module of the model{}", did_you_mean(name, last)),
            });
        }
        chosen.extend(matched);
    }
    chosen.sort();
    chosen.dedup();
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const PATHS: [&str; 4] = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.foo_proj",
        "model.layers.1.self_attn.q_proj",
        "lm_head",
    ];

    fn choose(targets: TargetModules, exclude: Option<Pattern>) -> Result<Vec<&'static str>, AdapterError> {
        let selection = Selection {
            targets: Some(&targets),
            exclude: exclude.as_ref(),
            saved: &[],
            layers: None,
            layers_pattern: &[],
            strict: true,
        };
        select(&selection, &PATHS)
    }

    fn names(names: &[&str]) -> Pattern {
        Pattern::Names(names.iter().map(|name| name.to_string()).collect())
    }

    #[test]
    fn suffixes_end_at_a_dot() {
        assert_eq!(choose(TargetModules::Matching(names(&["q_proj"])), None).unwrap(), [PATHS[0], PATHS[2]]);
        assert!(choose(TargetModules::Matching(names(&["o_proj"])), None).is_err());
    }

    #[test]
    fn expressions_match_whole_paths_and_may_look_ahead() {
        let regex = Pattern::Regex(r"(?!.*\.1\.).*q_proj".to_string());
        assert_eq!(choose(TargetModules::Matching(regex), None).unwrap(), [PATHS[0]]);
        let part = Pattern::Regex("q_proj".to_string());
        assert!(choose(TargetModules::Matching(part), None).is_err());
    }

    #[test]
    fn all_linear_leaves_the_head_and_exclusions_out() {
        let exclude = Some(names(&["foo_proj"]));
        assert_eq!(choose(TargetModules::AllLinear, exclude).unwrap(), [PATHS[0], PATHS[2]]);
    }

    #[test]
    fn layers_narrow_a_list_down_but_for_whole_paths() {
        let chosen = |names: &[&str], layers: Layers, pattern: &[&str]| {
            let targets = TargetModules::Matching(self::names(names));
            let layers_pattern: Vec<String> = pattern.iter().map(|name| name.to_string()).collect();
            let selection = Selection {
                targets: Some(&targets),
                exclude: None,
                saved: &[],
                layers: Some(&layers),
                layers_pattern: &layers_pattern,
                strict: true,
            };
            select(&selection, &PATHS)
        };
        assert_eq!(chosen(&["q_proj"], Layers::One(1), &[]).unwrap(), [PATHS[2]]);
        assert_eq!(chosen(&["q_proj", "foo_proj"], Layers::Many(vec![0]), &["layers"]).unwrap(), PATHS[..2]);
        assert_eq!(chosen(&[PATHS[0], "foo_proj"], Layers::One(1), &[]).unwrap(), [PATHS[0]]);
        assert!(chosen(&["q_proj"], Layers::One(1), &["h"]).is_err());
        assert!(
            chosen(&["q_proj"], Layers::One(7), &[]).unwrap_err().to_string().contains("layers_to_transform")
        );
    }

    #[test]
    fn a_misspelt_target_names_its_neighbour() {
        let error = choose(TargetModules::Matching(names(&["q_porj"])), None).unwrap_err().to_string();
        assert!(error.contains("`q_porj`") && error.contains("q_proj`"), "{error}");
    }
}
