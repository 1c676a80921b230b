//! What was asked to be saved, and what became of it, over restarts.
//!
//! A ticket stands for one checkpoint that is still to begin. Who waits for it may be saved by just
//! that checkpoint and go on in another run, under another helper that has issued no ticket yet. So
//! the numbers tell by themselves: those of a run that was restarted from generation G follow
//! G × 10⁹. A ticket below that was issued before generation G was saved, which makes generation G
//! the answer to it; nobody has to write tickets down.
//!
//! Contract: pure.

use std::collections::VecDeque;

use super::protocol::Outcome;

/// Tickets of one run: more than one for every millisecond of a week.
const OF_A_RUN: u64 = 1_000_000_000;

/// How many results are remembered.
const REMEMBERED: usize = 256;

/// The tickets of one run.
#[derive(Debug)]
pub struct Tickets {
    restarted: Option<u64>,
    first: u64,
    /// The ticket of the next checkpoint to begin.
    next: u64,
    /// Whether somebody has that ticket.
    wanted: bool,
    results: VecDeque<(u64, Outcome)>,
}

impl Tickets {
    /// Tickets of a run that was `restarted` from this generation.
    pub fn new(restarted: Option<u64>) -> Tickets {
        let first = restarted
            .unwrap_or(0)
            .saturating_mul(OF_A_RUN)
            .saturating_add(1);
        Tickets {
            restarted,
            first,
            next: first,
            wanted: false,
            results: VecDeque::new(),
        }
    }

    /// Asks for a checkpoint. All that ask before it begins get the same ticket.
    pub fn ask(&mut self) -> u64 {
        self.wanted = true;
        self.next
    }

    /// Whether a checkpoint was asked for that has not begun.
    pub fn wanted(&self) -> bool {
        self.wanted
    }

    /// A checkpoint begins, whoever wanted it.
    pub fn begin(&mut self) {
        if self.results.len() == REMEMBERED {
            self.results.pop_front();
        }
        self.results.push_back((self.next, Outcome::Waiting));
        self.next = self.next.saturating_add(1);
        self.wanted = false;
    }

    /// The checkpoint that began last is over.
    pub fn finish(&mut self, outcome: Outcome) {
        if let Some((_, last)) = self.results.back_mut() {
            *last = outcome;
        }
    }

    /// What became of a ticket; None if there is no such ticket, or it is too old.
    pub fn result(&self, ticket: u64) -> Option<Outcome> {
        if ticket == self.next && self.wanted {
            return Some(Outcome::Waiting);
        }
        // Also a larger number is of another run: a copy of a computation counts its generations
        // from one again.
        if ticket < self.first || ticket >= self.next {
            return self.restarted.map(Outcome::Restarted);
        }
        self.results
            .iter()
            .find(|(of, _)| *of == ticket)
            .map(|(_, outcome)| outcome.clone())
    }

    /// What became of the last checkpoint of this run.
    pub fn last(&self) -> Option<&Outcome> {
        self.results.back().map(|(_, outcome)| outcome)
    }

    /// The generation that this run was restarted from.
    pub fn restarted(&self) -> Option<u64> {
        self.restarted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_checkpoint_answers_all_that_asked_before_it_began() {
        let mut tickets = Tickets::new(None);
        let first = tickets.ask();
        assert_eq!(tickets.ask(), first);
        assert_eq!(tickets.result(first), Some(Outcome::Waiting));
        assert_eq!(tickets.result(first + 1), None);
        tickets.begin();
        assert!(!tickets.wanted());
        assert_eq!(tickets.result(first), Some(Outcome::Waiting));
        let second = tickets.ask();
        assert_ne!(first, second, "asked after the state was taken");
        tickets.finish(Outcome::Saved(1));
        assert_eq!(tickets.result(first), Some(Outcome::Saved(1)));
        assert_eq!(tickets.result(second), Some(Outcome::Waiting));
        tickets.begin();
        tickets.finish(Outcome::Failed("full".into()));
        assert_eq!(tickets.result(second), Some(Outcome::Failed("full".into())));
        assert_eq!(tickets.last(), Some(&Outcome::Failed("full".into())));
    }

    #[test]
    fn a_ticket_is_answered_in_the_run_after_it() {
        let mut before = Tickets::new(Some(3));
        let mine = before.ask();
        before.begin();
        // Saved as generation 4 and ended there; the next run, and the one after that, know it.
        for generation in [4, 9] {
            let mut after = Tickets::new(Some(generation));
            assert_eq!(after.result(mine), Some(Outcome::Restarted(generation)));
            assert_eq!(after.restarted(), Some(generation));
            let new = after.ask();
            assert_eq!(after.result(new), Some(Outcome::Waiting));
            assert!(new > mine);
        }
        // Nobody who was saved goes on in a run that began anew.
        assert_eq!(Tickets::new(None).result(mine), None);
        // A copy of the computation, whose generations have other numbers.
        assert_eq!(
            Tickets::new(Some(1)).result(mine),
            Some(Outcome::Restarted(1))
        );
    }

    #[test]
    fn only_the_last_results_are_kept() {
        let mut tickets = Tickets::new(None);
        for number in 0..1000 {
            tickets.begin();
            tickets.finish(Outcome::Saved(number));
        }
        assert_eq!(tickets.result(1), None);
        assert_eq!(tickets.result(1000), Some(Outcome::Saved(999)));
        assert_eq!(tickets.results.len(), REMEMBERED);
    }
}
