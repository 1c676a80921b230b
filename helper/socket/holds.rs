//! Critical sections: for how long an application has asked that no checkpoint begins.
//!
//! Contract: pure; the caller brings the time. A hold ends by itself, so that a program that forgets
//! or loses it does not keep its job from being saved.

use std::time::{Duration, Instant};

/// Most holds at one time.
const MOST: usize = 64;

/// The holds of one application.
#[derive(Debug)]
pub struct Holds {
    limit: Duration,
    next: u32,
    /// Number and end of each.
    held: Vec<(u32, Instant)>,
}

/// A hold that was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// For [`Holds::release`].
    pub number: u32,
    pub length: Duration,
}

/// Why a hold was not given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("this site allows no holds (hold_limit is 0 in the configuration)")]
    Never,
    #[error("a hold of 0 seconds is none")]
    Zero,
    #[error("{MOST} holds are in force already")]
    TooMany,
}

impl Holds {
    /// No holds; none will last longer than `limit`.
    pub fn new(limit: Duration) -> Holds {
        Holds {
            limit,
            next: 1,
            held: Vec::new(),
        }
    }

    /// Holds checkpoints off for `asked`, or for the limit where that is less or nothing is asked.
    pub fn hold(&mut self, now: Instant, asked: Option<Duration>) -> Result<Held, Refused> {
        self.forget_ended(now);
        let length = asked.unwrap_or(self.limit).min(self.limit);
        if self.limit.is_zero() {
            return Err(Refused::Never);
        }
        if length.is_zero() {
            return Err(Refused::Zero);
        }
        if self.held.len() == MOST {
            return Err(Refused::TooMany);
        }
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.held.push((number, now + length));
        Ok(Held { number, length })
    }

    /// Ends the hold with this number, or the one that would end first: of several sections that
    /// overlap, none loses its protection before its own time by another's end. False if it has
    /// ended already: a checkpoint may have been taken since.
    pub fn release(&mut self, now: Instant, which: Option<u32>) -> bool {
        self.forget_ended(now);
        let found = match which {
            Some(which) => self.held.iter().position(|(number, _)| *number == which),
            None => (0..self.held.len()).min_by_key(|at| self.held[*at].1),
        };
        match found {
            Some(at) => {
                self.held.swap_remove(at);
                true
            }
            None => false,
        }
    }

    /// When the last hold ends; None if there is none now.
    pub fn until(&self, now: Instant) -> Option<Instant> {
        self.held
            .iter()
            .map(|(_, end)| *end)
            .filter(|end| *end > now)
            .max()
    }

    /// How many there are now.
    pub fn count(&self, now: Instant) -> usize {
        self.held.iter().filter(|(_, end)| *end > now).count()
    }

    fn forget_ended(&mut self, now: Instant) {
        self.held.retain(|(_, end)| *end > now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_hold_ends_by_release_or_by_itself() {
        let now = Instant::now();
        let mut holds = Holds::new(60 * SECOND);
        assert_eq!(holds.until(now), None);
        let held = holds.hold(now, Some(10 * SECOND)).unwrap();
        assert_eq!(
            held,
            Held {
                number: 1,
                length: 10 * SECOND
            }
        );
        assert_eq!(holds.until(now), Some(now + 10 * SECOND));
        assert!(holds.release(now + 9 * SECOND, None));
        assert_eq!(holds.until(now + 9 * SECOND), None);
        assert!(!holds.release(now, None), "it is over");

        holds.hold(now, Some(10 * SECOND)).unwrap();
        assert_eq!(holds.until(now + 10 * SECOND), None);
        assert!(
            !holds.release(now + 10 * SECOND, None),
            "the section was not protected to its end"
        );
    }

    #[test]
    fn no_hold_is_longer_than_the_limit() {
        let now = Instant::now();
        let mut holds = Holds::new(60 * SECOND);
        assert_eq!(holds.hold(now, None).unwrap().length, 60 * SECOND);
        let long = holds
            .hold(now, Some(Duration::from_secs(u64::MAX)))
            .unwrap();
        assert_eq!(long.length, 60 * SECOND);
        assert_eq!(holds.hold(now, Some(Duration::ZERO)), Err(Refused::Zero));
        assert_eq!(
            Holds::new(Duration::ZERO).hold(now, None),
            Err(Refused::Never)
        );
    }

    #[test]
    fn overlapping_sections_keep_their_protection() {
        let now = Instant::now();
        let mut holds = Holds::new(60 * SECOND);
        let long = holds.hold(now, Some(50 * SECOND)).unwrap().number;
        let short = holds.hold(now, Some(5 * SECOND)).unwrap().number;
        assert_eq!(holds.count(now), 2);
        assert!(holds.release(now, None));
        assert_eq!(holds.until(now), Some(now + 50 * SECOND));
        assert!(!holds.release(now, Some(short)), "the shorter one went");
        assert!(holds.release(now, Some(long)));
        assert_eq!(holds.count(now), 0);
    }

    #[test]
    fn they_are_bounded() {
        let now = Instant::now();
        let mut holds = Holds::new(60 * SECOND);
        for _ in 0..MOST {
            holds.hold(now, None).unwrap();
        }
        assert_eq!(holds.hold(now, None), Err(Refused::TooMany));
        assert!(
            holds.hold(now + 60 * SECOND, None).is_ok(),
            "those have ended"
        );
    }
}
