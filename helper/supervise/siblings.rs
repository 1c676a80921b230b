//! The other computations of a job: steps that run at the same time, under one NAME or several, and
//! the helper in front of the batch script.
//!
//! Contract: who is there is found out once, by [`Siblings::of`], from the locks in the store; what
//! they do is read anew each time, since they may be on other nodes. A process that is seen to be
//! dead is nobody.

use std::io;
use std::time::{Duration, Instant};

use super::Signals;
use super::settle::pause;
use crate::requests::{self, Answer, Placed};
use crate::slurm::BATCH;
use crate::store::{self, Cell, Holder, State, Trigger, Unwitnessed};

/// How often they are looked at.
const LOOK: Duration = Duration::from_millis(200);

pub struct Siblings {
    me: Holder,
    others: Vec<Other>,
}

struct Other {
    cell: Cell,
    asked: Option<Placed>,
}

/// The state of the steps of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Steps {
    /// None runs.
    None,
    /// At least one is not saved yet, or has to bring the job to its end.
    Unsettled,
    Settled,
}

impl Siblings {
    /// Those of the run of `me`, who holds `own`.
    pub fn of(own: &Cell, me: &Holder) -> Siblings {
        let mut siblings = Siblings {
            me: me.clone(),
            others: Vec::new(),
        };
        let cells = own.store().cells().unwrap_or_else(|why| {
            log::warn!("the job's other steps are not seen: {why}");
            Vec::new()
        });
        for cell in cells {
            if cell.dir() != own.dir() && siblings.holder(&cell).is_some() {
                siblings.others.push(Other { cell, asked: None });
            }
        }
        siblings
    }

    /// Who holds `cell`, if he is of this run and may live.
    fn holder(&self, cell: &Cell) -> Option<Holder> {
        let known = |why: &store::Error| log::warn!("{}: {why}", cell.label());
        let holder = cell.holder().inspect_err(known).ok().flatten()?;
        let ours = holder.job == self.me.job && holder.run == self.me.run;
        let over = ours && cell.holder_has_ended(&self.me, &Unwitnessed).ok() == Some(Some(true));
        (ours && !over).then_some(holder)
    }

    /// Whether the helper in front of the batch script is there.
    pub fn script(&self) -> bool {
        let mut holders = self.others.iter().filter_map(|o| self.holder(&o.cell));
        holders.any(|holder| holder.step == BATCH)
    }

    /// Tells the helpers of the batch step, which Slurm tells nothing until a GraceTime is over, to
    /// look how long the job has.
    pub fn tell_batch_step(&self) {
        let holders = self.others.iter().filter_map(|o| self.holder(&o.cell));
        for holder in holders.filter(|holder| holder.step == BATCH) {
            if let Err(why) = requests::poke(&holder) {
                log::debug!("the batch step is not told: {why:#}");
            }
        }
    }

    pub fn steps(&self) -> Steps {
        let holders = self.others.iter().filter_map(|o| self.holder(&o.cell));
        let mut steps = holders.filter(|holder| holder.step != BATCH).peekable();
        if steps.peek().is_none() {
            Steps::None
        } else if steps.all(|holder| holder.state == State::Settled) {
            Steps::Settled
        } else {
            Steps::Unsettled
        }
    }

    /// Has those that run saved and ended, and waits until all are, or could not be, at most until
    /// `end`. `trigger` is why. Says whether there was anything to wait for.
    pub fn save(
        &mut self,
        trigger: Trigger,
        end: Instant,
        signals: &mut Signals,
    ) -> io::Result<bool> {
        let mut waited = false;
        loop {
            let mut unsaved = false;
            for index in 0..self.others.len() {
                unsaved |= self.is_unsaved(index, trigger);
            }
            if !unsaved || Instant::now() >= end {
                return Ok(waited);
            }
            waited = true;
            pause(signals, LOOK)?;
        }
    }

    fn is_unsaved(&mut self, index: usize, trigger: Trigger) -> bool {
        let other = &self.others[index];
        let Some(holder) = self.holder(&other.cell) else {
            return false;
        };
        match (holder.state, &other.asked) {
            (State::Saved | State::Settled, _) => false,
            (State::Saving, _) => true,
            // A script is not saved; one in a container has no steps beside it.
            (State::Running, _) if holder.step == BATCH => false,
            (State::Running, None) => {
                let label = other.cell.label();
                match Placed::place(&other.cell, &holder, Some(trigger), None) {
                    Ok(asked) => {
                        log::debug!("{label} is asked to be saved as well");
                        self.others[index].asked = Some(asked);
                        true
                    }
                    Err(why) => {
                        log::warn!(
                            "{label} cannot be asked to be saved before its job ends: {why:#}"
                        );
                        false
                    }
                }
            }
            (State::Running, Some(asked)) => {
                !matches!(asked.answer(), Ok(Some(Answer::Failed { .. })))
            }
        }
    }
}
