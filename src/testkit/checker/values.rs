//! From a value to the place where its send is kept.
//!
//! Values that were counted up, as a recorder's, are their own place in a table; any others are hashed.

use std::collections::HashMap;

use super::index::wide;

/// Stands for "not sent".
const NONE: u32 = u32::MAX;
/// A table may have so many places for each value.
const SPARSE: u64 = 4;

#[derive(Debug)]
pub(super) enum Values {
    Table(Vec<u32>),
    Hashed(HashMap<u64, u32>),
}

impl Values {
    /// Of all values in the order of their sends; also the first few that were sent twice.
    pub(super) fn new(values: impl Iterator<Item = u64> + Clone) -> (Self, Vec<u64>) {
        let (number, highest) = values.clone().fold((0_u64, 0), |(number, highest), value| {
            (number + 1, value.max(highest))
        });
        let mut twice = Vec::new();
        let mut again = |value: u64| {
            if twice.len() < 5 {
                twice.push(value);
            }
        };
        let is_dense = highest < number.saturating_mul(SPARSE);
        let places = usize::try_from(highest).ok().filter(|_| is_dense);
        let values = (0_u32..).zip(values);
        let found = if let Some(highest) = places {
            let mut table = vec![NONE; highest + 1];
            for (place, value) in values {
                let slot = usize::try_from(value).unwrap_or(usize::MAX);
                if let Some(slot) = table.get_mut(slot) {
                    if *slot != NONE {
                        again(value);
                    }
                    *slot = place;
                }
            }
            Self::Table(table)
        } else {
            let mut hashed = HashMap::new();
            for (place, value) in values {
                if hashed.insert(value, place).is_some() {
                    again(value);
                }
            }
            Self::Hashed(hashed)
        };
        (found, twice)
    }

    /// The place of the value's send.
    pub(super) fn place(&self, value: u64) -> Option<usize> {
        let place = match self {
            Self::Table(table) => *table.get(usize::try_from(value).ok()?)?,
            Self::Hashed(hashed) => *hashed.get(&value)?,
        };
        (place != NONE).then(|| wide(place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: both ways find every value and nothing else, and tell of those sent twice. Method: values counted up with holes, and wild
    /// ones, one of each twice.
    #[test]
    fn values_are_found_either_way() {
        for (factor, is_table) in [(1, true), (3, true), (1 << 40, false)] {
            let sent: Vec<u64> = (0..50).map(|number| number * factor).collect();
            let (values, twice) = Values::new(sent.iter().copied());
            assert_eq!(matches!(values, Values::Table(_)), is_table, "{factor}");
            assert!(twice.is_empty());
            for (place, value) in sent.iter().enumerate() {
                assert_eq!(values.place(*value), Some(place));
            }
            let unsent = [50 * factor, factor / 2 + 7_001, u64::MAX];
            assert!(unsent.iter().all(|value| values.place(*value).is_none()));
            let again = sent.iter().chain([&factor]).copied();
            assert_eq!(Values::new(again).1, [factor]);
        }
        let (none, _) = Values::new(std::iter::empty());
        assert_eq!(none.place(0), None);
    }
}
