//! Which generations go, and how.
//!
//! Contract: never a pinned one, never the only good one. [`surplus`] and [`expendable`] are pure;
//! deletion renames to `.deleted` first, so that there is never half a generation under a good name.

use std::fs;
use std::io;

use super::generation::dir_name;
use super::history::What;
use super::lock::Lock;
use super::{At, Error, Result, disk};
use crate::fault;

/// What retention has to know of a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub number: u64,
    pub pinned: bool,
    /// Its manifest can be read, and nobody marked it bad.
    pub good: bool,
    /// It is of an earlier computation: completed, or given up for a fresh start.
    pub earlier: bool,
}

/// What goes after a commit, oldest first: all but the newest `keep` (at least one) good ones of
/// this computation, and all of earlier ones, once this one has a good generation. Bad ones of this
/// computation stay, so that somebody can look at them.
pub fn surplus(seen: &[Seen], keep: usize) -> Vec<u64> {
    let mut good: Vec<u64> = seen
        .iter()
        .filter(|s| s.good && !s.earlier)
        .map(|s| s.number)
        .collect();
    good.sort_unstable();
    if good.is_empty() {
        return Vec::new();
    }
    let oldest_kept = good[good.len().saturating_sub(keep.max(1))];
    let mut surplus: Vec<u64> = seen
        .iter()
        .filter(|s| !s.pinned && (s.earlier || (s.good && s.number < oldest_kept)))
        .map(|s| s.number)
        .collect();
    surplus.sort_unstable();
    surplus
}

/// What may go to make room, in the order in which it goes: earlier computations, bad ones, then
/// the oldest of this one. The newest good one of this computation stays, or of the earlier ones
/// while this one has none.
pub fn expendable(seen: &[Seen]) -> Vec<u64> {
    let last_good = seen
        .iter()
        .filter(|s| s.good)
        .max_by_key(|s| (!s.earlier, s.number))
        .map(|s| s.number);
    let mut free: Vec<&Seen> = seen
        .iter()
        .filter(|s| !s.pinned && Some(s.number) != last_good)
        .collect();
    free.sort_by_key(|s| (!s.earlier, s.good, s.number));
    free.into_iter().map(|s| s.number).collect()
}

impl Lock {
    pub(super) fn seen(&self) -> Result<Vec<Seen>> {
        let floor = self.cell().floor()?;
        let entries = self.cell().entries()?;
        Ok(entries
            .iter()
            .map(|entry| Seen {
                number: entry.number,
                pinned: entry.pinned,
                good: entry.bad.is_none() && entry.generation.is_ok(),
                earlier: entry.number <= floor,
            })
            .collect())
    }

    /// Deletes what is more than `keep` generations; says which.
    pub fn retain(&self, keep: usize) -> Result<Vec<u64>> {
        let surplus = surplus(&self.seen()?, keep);
        for number in &surplus {
            self.delete(*number, "retention")?;
        }
        Ok(surplus)
    }

    /// Deletes a generation for `reason`. Pinned ones are refused.
    ///
    /// # Errors
    /// [`Error::Refused`] if it is pinned; [`Error::Absent`].
    pub fn delete(&self, number: u64, reason: &str) -> Result<()> {
        let cell = self.cell();
        let (dir, name) = (cell.generation_dir(number), dir_name(number));
        let doomed = cell.generations_dir().join(format!("{name}.deleted"));
        let pinned = || {
            Error::Refused(format!(
                "generation {number} of {label} is pinned: `container-checkpoint unpin \
                 {label}@{number}` first",
                label = cell.label()
            ))
        };
        if cell.marks().pinned(number)? {
            return Err(pinned());
        }
        fault::point("delete-begin").at("delete", &dir)?;
        self.guarded(|_| match fs::rename(&dir, &doomed) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::Absent(format!(
                "generation {number} of {}",
                cell.label()
            ))),
            other => other.at("rename", &dir),
        })?;
        // It may have been pinned in between; a pin looks for its generation once more afterwards.
        if cell.marks().pinned(number)? {
            fs::rename(&doomed, &dir).at("rename", &dir)?;
            return Err(pinned());
        }
        fault::point("delete-renamed").at("delete", &dir)?;
        disk::sync_dir(&cell.generations_dir())?;
        self.point_latest()?;
        disk::remove(&doomed)?;
        fault::point("delete-removed").at("delete", &dir)?;
        self.note(What::Deleted {
            generation: number,
            reason: reason.into(),
        })?;
        cell.marks().forget(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cell() -> impl Strategy<Value = Vec<Seen>> {
        (
            prop::collection::vec(any::<(bool, bool)>(), 0..12),
            0u64..12,
        )
            .prop_map(|(all, floor)| {
                all.into_iter()
                    .zip(1..)
                    .map(|((pinned, good), number)| Seen {
                        number,
                        pinned,
                        good,
                        earlier: number <= floor,
                    })
                    .collect()
            })
    }

    #[test]
    fn keeps_the_newest() {
        let seen = |number, good, earlier| Seen {
            number,
            pinned: false,
            good,
            earlier,
        };
        let all = [
            seen(1, true, true),
            seen(2, true, false),
            seen(3, false, false),
            seen(4, true, false),
            seen(5, true, false),
        ];
        assert_eq!(surplus(&all, 2), [1, 2]);
        assert_eq!(surplus(&all, 0), [1, 2, 4]);
        assert_eq!(surplus(&all[..1], 1), [0; 0]);
        assert_eq!(expendable(&all), [1, 3, 2, 4]);
        assert_eq!(expendable(&all[..1]), [0; 0]);
    }

    proptest! {
        #[test]
        fn never_the_last_good_nor_a_pinned_one(seen in cell(), keep in 0usize..5) {
            let newest = |current: bool| {
                seen.iter().filter(|s| s.good && (!s.earlier || !current)).map(|s| s.number).max()
            };
            let has_current = newest(true).is_some();
            for gone in [surplus(&seen, keep), expendable(&seen)] {
                let mut unique = gone.clone();
                unique.sort_unstable();
                unique.dedup();
                prop_assert_eq!(unique.len(), gone.len());
                for s in &seen {
                    prop_assert!(!(s.pinned && gone.contains(&s.number)));
                }
                let kept = newest(has_current);
                prop_assert!(kept.is_none_or(|number| !gone.contains(&number)));
            }
            let left = seen.iter().filter(|s| s.good && !s.earlier).count();
            let gone = surplus(&seen, keep);
            let kept = seen
                .iter()
                .filter(|s| s.good && !s.earlier && !gone.contains(&s.number))
                .count();
            prop_assert!(kept >= left.min(keep.max(1)));
        }
    }
}
