//! Lists that come again.

use std::collections::HashMap;
use std::hash::Hash;

/// Lists that are remembered at most. When there are more, those go that half as many others were asked for after.
const MOST_LISTS: usize = 8192;

struct Entry<V> {
    /// What was made for the list.
    made: Option<V>,
    /// When it was last asked for.
    asked: usize,
}

/// What is made for lists of `K` once it is clear that they repeat.
pub(super) struct Repeats<K, V> {
    entries: HashMap<Vec<K>, Entry<V>>,
    /// How often was asked.
    asked: usize,
}

/// How often a list came.
#[derive(Debug, PartialEq)]
pub(super) enum Coming<'a, V> {
    First,
    /// Before, and nothing was made for it yet.
    Again,
    /// Before, and this was made for it.
    Made(&'a V),
}

impl<K, V> Default for Repeats<K, V> {
    fn default() -> Self {
        Self { entries: HashMap::new(), asked: 0 }
    }
}

impl<K: Hash + Eq, V> Repeats<K, V> {
    /// Whether `list` came before.
    pub fn coming(&mut self, list: &[K]) -> Coming<'_, V> {
        self.asked += 1;
        match self.entries.get_mut(list) {
            None => Coming::First,
            Some(entry) => {
                entry.asked = self.asked;
                entry.made.as_ref().map_or(Coming::Again, Coming::Made)
            }
        }
    }

    /// Remembers a list that came, with what was made for it.
    pub fn remember(&mut self, list: Vec<K>, made: Option<V>) {
        if self.entries.len() >= MOST_LISTS {
            let oldest = self.asked.saturating_sub(MOST_LISTS / 2);
            self.entries.retain(|_, entry| entry.asked > oldest);
        }
        self.entries.insert(list, Entry { made, asked: self.asked });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_known_from_the_second_time_on() {
        let mut repeats = Repeats::default();
        assert_eq!(repeats.coming(&[1, 2]), Coming::First);
        repeats.remember(vec![1, 2], None);
        assert_eq!(repeats.coming(&[1, 2]), Coming::Again);
        repeats.remember(vec![1, 2], Some("made"));
        assert_eq!(repeats.coming(&[1, 2]), Coming::Made(&"made"));
        assert_eq!(repeats.coming(&[2, 1]), Coming::First);
        assert_eq!(repeats.coming(&[1]), Coming::First);
    }

    #[test]
    fn what_is_asked_for_stays_and_the_rest_does_not_pile_up() {
        let mut repeats = Repeats::default();
        repeats.remember(vec![0], Some(0));
        for item in 1..5 * MOST_LISTS {
            assert_eq!(repeats.coming(&[item]), Coming::First, "{item}");
            repeats.remember(vec![item], None);
            assert!(repeats.entries.len() <= MOST_LISTS);
            if item.is_multiple_of(MOST_LISTS / 8) {
                assert_eq!(repeats.coming(&[0]), Coming::Made(&0), "{item}");
            }
        }
        let last = 5 * MOST_LISTS - 1;
        assert_eq!(repeats.coming(&[last - MOST_LISTS / 4]), Coming::Again);
        assert_eq!(repeats.coming(&[1]), Coming::First, "long gone");
    }
}
