//! The nearest right name for a misspelt one, for error messages.

/// The candidate that `wanted` most probably misspells, or `None` where nothing is close.
///
/// Closeness is the edit distance with transpositions (optimal string alignment), letter case counting
/// little. A candidate is close when at most a third of the longer name differs, or when one of the two is
/// the tail of the other after a dot or slash (`lm_head.weight` for `model.lm_head.weight`). Ties go to the
/// candidate that comes first.
pub fn nearest<'a>(wanted: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let folded = wanted.to_lowercase();
    let length = folded.chars().count();
    let mut best: Option<(usize, &str)> = None;
    for candidate in candidates {
        let bound = best.map_or(usize::MAX, |(distance, _)| distance);
        let longer = length.max(candidate.chars().count());
        let difference = length.abs_diff(candidate.chars().count());
        let distance = if is_tail(wanted, candidate) || is_tail(candidate, wanted) {
            1
        } else if difference >= bound || difference * 3 > longer {
            // The distance is at least the difference in length: no need to compute it.
            continue;
        } else {
            strsim::osa_distance(&folded, &candidate.to_lowercase())
        };
        let close = distance * 3 <= longer;
        if close && distance < bound {
            best = Some((distance, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}

/// ` (did you mean `x`?)` with the nearest candidate, or nothing; made to stand at the end of a message.
pub fn did_you_mean<'a>(wanted: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    match nearest(wanted, candidates) {
        Some(name) => format!(" (did you mean `{name}`?)"),
        None => String::new(),
    }
}

/// Whether `long` ends in `short` right after a dot or slash.
fn is_tail(long: &str, short: &str) -> bool {
    !short.is_empty() && long.strip_suffix(short).is_some_and(|head| head.ends_with(['.', '/']))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [&str; 4] = ["lora_alpha", "lora_r", "learning_rate", "lr_scheduler"];

    #[test]
    fn a_slip_of_the_pen_finds_its_name() {
        assert_eq!(nearest("lora_aplha", KEYS), Some("lora_alpha"));
        assert_eq!(nearest("LORA_R", KEYS), Some("lora_r"));
        assert_eq!(nearest("learningrate", KEYS), Some("learning_rate"));
    }

    #[test]
    fn a_missing_or_extra_prefix_finds_its_name() {
        let names = ["model.norm.weight", "lm_head.weight"];
        assert_eq!(nearest("model.lm_head.weight", names), Some("lm_head.weight"));
        assert_eq!(nearest("norm.weight", names), Some("model.norm.weight"));
    }

    #[test]
    fn nothing_close_means_nothing() {
        assert_eq!(nearest("dataset", KEYS), None);
        assert_eq!(nearest("", KEYS), None);
        assert_eq!(nearest("x", []), None);
    }

    #[test]
    fn the_closest_wins_and_the_first_on_ties() {
        assert_eq!(nearest("abcdef", ["abcdxx", "abcdex"]), Some("abcdex"));
        assert_eq!(nearest("abc", ["abx", "aby"]), Some("abx"));
    }

    #[test]
    fn the_hint_is_a_suffix_or_empty() {
        assert_eq!(did_you_mean("lora_s", ["lora_r"]), " (did you mean `lora_r`?)");
        assert_eq!(did_you_mean("zzz", ["lora_r"]), "");
    }
}
