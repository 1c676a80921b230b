//! The circuit breaker: a job whose runs come to nothing is held instead of being requeued for ever.
//!
//! Contract: one per run of a computation in a job. [`Breaker::begin`] notes that the run has begun
//! and counts the runs right before it that came to nothing; [`Breaker::saved`] and
//! [`Breaker::ended`] note that this one got on. What counts is the job: progress of any of its
//! computations is progress. The notes are at the NAME (`store::runs`), `policy` says what they mean.
//! Trouble with the notes never stops a job: it is told, and nothing is held.

use std::time::{Duration, SystemTime};

use super::{Computation, note};
use crate::policy;
use crate::slurm::{self, Job, SlurmError};
use crate::store::{self, BegunRun, Cell, Lock, ProgressedRun, What};

pub struct Breaker {
    job: Job,
    name: Cell,
    /// Config `progress_runs`.
    limit: u32,
    /// Runs right before this one that came to nothing.
    before: u32,
    /// This run is known to have got on.
    noted: bool,
}

impl Breaker {
    /// None outside of a job, or where nothing is ever held.
    pub fn begin(computation: &Computation) -> Option<Breaker> {
        let limit = computation.config.progress_runs;
        let job = computation.job.clone().filter(|_| limit > 0)?;
        Some(Breaker::of(job, computation.name.clone(), limit))
    }

    fn of(job: Job, name: Cell, limit: u32) -> Breaker {
        let mut breaker = Breaker {
            job,
            name,
            limit,
            before: 0,
            noted: false,
        };
        match breaker.count() {
            Ok(before) => breaker.before = before,
            Err(why) => log::warn!("{why}; runs without progress are not counted"),
        }
        breaker
    }

    fn count(&self) -> Result<u32, store::Error> {
        let (job, run) = (self.job.id, self.job.run);
        let last = self.name.begun_run()?;
        let without_progress =
            policy::runs_without_progress(last, self.name.progressed_run()?, (job, run));
        let begun = BegunRun {
            job,
            run,
            without_progress,
            held: false,
        };
        if last != Some(begun) {
            self.name.set_begun_run(&begun)?;
        }
        Ok(without_progress)
    }

    /// A generation was committed, after the application had used `cpu` in this run (None: not known).
    pub fn saved(&mut self, cpu: Option<Duration>) {
        if policy::has_progressed(true, cpu) {
            self.progressed();
        }
    }

    /// The application has ended by itself.
    pub fn ended(&mut self) {
        self.progressed();
    }

    fn progressed(&mut self) {
        if self.noted {
            return;
        }
        let (job, run) = (self.job.id, self.job.run);
        match self.name.set_progressed_run(&ProgressedRun { job, run }) {
            Ok(()) => self.noted = true,
            Err(why) => log::warn!("{why}; this run may be taken for one without progress"),
        }
    }

    /// Whether the runs before this one are reason enough to hold the job now.
    pub fn is_stuck_already(&self) -> bool {
        policy::is_stuck(self.before, self.limit)
            && !self.has_progressed_since(self.job.run.saturating_sub(self.limit))
    }

    /// Whether the job is to be held rather than requeued at the end of this run.
    pub fn is_stuck(&self) -> bool {
        !self.noted
            && policy::is_stuck(self.before.saturating_add(1), self.limit)
            && !self.has_progressed_since((self.job.run + 1).saturating_sub(self.limit))
    }

    /// Whether a computation of the job, of whatever NAME, has got on in run `first` or later.
    fn has_progressed_since(&self, first: u32) -> bool {
        let store = self.name.store();
        let names = store.names().and_then(|names| {
            let runs = names.iter().map(|name| store.name(name).progressed_run());
            runs.collect::<Result<Vec<_>, _>>()
        });
        match names {
            Ok(runs) => runs
                .into_iter()
                .flatten()
                .any(|run| run.job == self.job.id && run.run >= first),
            Err(why) => {
                log::warn!("{why}; whether the job gets on is not known");
                true
            }
        }
    }

    /// Requeues the job and holds it, with the reason in its comment, on standard error and in the
    /// history of the computation that `lock` is on.
    pub fn hold(&self, lock: &Lock) -> Result<(), SlurmError> {
        let reason = format!(
            "held: {} runs in a row came to nothing (nothing new was saved, or no CPU time used)",
            self.limit
        );
        self.comment(&reason);
        self.job.requeue_hold()?;
        let (job, run) = (self.job.id, self.job.run);
        let begun = BegunRun {
            job,
            run,
            without_progress: 0,
            held: true,
        };
        if let Err(why) = self.name.set_begun_run(&begun) {
            log::warn!("{why}");
        }
        note(
            lock,
            What::Requeued {
                reason: reason.clone(),
            },
        );
        log::error!(
            "job {job} is {reason}. What was saved before is kept. See above what the runs said: is \
             the time limit too short to start and to save, or does the application do nothing? Then \
             `scontrol release {job}` lets it go on from its newest generation"
        );
        Ok(())
    }

    /// Before the job is held: a comment may always be set then. One of the user's stays in front.
    fn comment(&self, reason: &str) {
        let reason = format!(
            "{}{reason}{}",
            slurm::HELD,
            slurm::time_text(SystemTime::now()).map_or(String::new(), |time| format!(", {time}"))
        );
        let written = slurm::comment(&self.job.target).and_then(|comment| {
            let text = if slurm::is_ours(&comment) {
                reason
            } else {
                let users = comment.split(&format!("; {}", slurm::HELD)).next();
                format!("{}; {reason}", users.unwrap_or_default())
            };
            slurm::set_comment(&self.job.target, &text)
        });
        if let Err(why) = written {
            log::warn!("the job's comment cannot be set: {why}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slurm::Step;
    use crate::store::{Name, Store};

    fn job(run: u32) -> Job {
        Job {
            id: 7,
            target: "7".into(),
            step: Step::Number(0),
            run,
            rank: 0,
            ranks: 1,
            nodes: 1,
            end_time: None,
        }
    }

    #[test]
    fn a_job_is_stuck_when_none_of_its_computations_gets_on() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let name = |text: &str| {
            let cell = store.name(&Name::parse(text).unwrap());
            std::fs::create_dir_all(cell.dir()).unwrap();
            cell
        };
        let begin = |run, text: &str| Breaker::of(job(run), name(text), 2);
        let enough = Some(Duration::from_secs(1));

        let mut first = begin(0, "heat");
        assert!(!first.is_stuck_already() && !first.is_stuck());
        first.saved(Some(Duration::ZERO));
        let second = begin(1, "heat");
        assert!(!second.is_stuck_already() && second.is_stuck());
        assert!(begin(2, "heat").is_stuck_already());

        // A step of another name has saved something in one of those runs.
        begin(1, "other").saved(enough);
        assert!(!second.is_stuck() && !begin(2, "heat").is_stuck_already());
        assert!(!begin(2, "heat").is_stuck());
        // But in none of the last ones.
        assert!(begin(3, "heat").is_stuck() && begin(4, "heat").is_stuck_already());
        begin(4, "heat").ended();
        assert!(!begin(4, "heat").is_stuck() && !begin(5, "heat").is_stuck_already());
    }
}
