//! Why the job was told to end, found out while the checkpoint already runs.
//!
//! Contract: [`Inquiry::begin`] returns at once; a thread asks Slurm, and rings the bell once it knows.
//! Whoever hears first tells the job's batch step, which Slurm tells nothing of a pre-emption until
//! the GraceTime is over.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use nix::sys::eventfd::EventFd;

use super::siblings::Siblings;
use crate::policy::{self, Cause};
use crate::slurm::{Job, SlurmError, Step};
use crate::store::Lock;

/// Between two questions where Slurm does not answer, and how many there are: longer than any job
/// lives after it was told to end.
const ASK_AGAIN: Duration = Duration::from_secs(1);
const MOST: u32 = 600;

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Idle,
    Asked,
    Known(Cause),
    /// Slurm does not know, or does not answer.
    Unknown,
}

/// Shared with the thread that takes the checkpoint.
#[derive(Clone)]
pub struct Inquiry {
    state: Arc<(Mutex<State>, Condvar)>,
    bell: Arc<EventFd>,
}

impl Inquiry {
    /// Nothing is asked yet. The bell is rung when something is known.
    pub fn new(bell: Arc<EventFd>) -> Inquiry {
        Inquiry {
            state: Arc::new((Mutex::new(State::Idle), Condvar::new())),
            bell,
        }
    }

    /// Asks why `job`, which was told to end, has to. `lock` is this computation's.
    pub fn begin(&self, job: &Job, lock: &Lock) {
        if *self.lock() != State::Idle {
            return;
        }
        self.put(State::Asked);
        let (own, job, lock) = (self.clone(), job.clone(), lock.clone());
        let thread = std::thread::Builder::new()
            .name("cause".into())
            .spawn(move || {
                let state = ask(&job).map_or(State::Unknown, State::Known);
                log::debug!("told to end: {state:?}");
                own.put(state);
                if state == State::Known(Cause::Grace) && job.step != Step::Batch {
                    Siblings::of(lock.cell(), &lock.holder()).tell_batch_step();
                }
            });
        if let Err(why) = thread {
            log::warn!("why the job ends is not asked: {why}");
            self.put(State::Unknown);
        }
    }

    /// What has been found out in another way.
    pub fn found(&self, cause: Cause) {
        self.put(State::Known(cause));
    }

    pub fn known(&self) -> Option<Cause> {
        known(*self.lock())
    }

    /// Waits for the answer for at most `limit`, if there is one to come.
    pub fn wait(&self, limit: Duration) -> Option<Cause> {
        let (_, changed) = &*self.state;
        let waited = changed.wait_timeout_while(self.lock(), limit, |now| *now == State::Asked);
        known(*waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, state: State) {
        *self.lock() = state;
        self.state.1.notify_all();
        // A counter that is full has rung.
        let _ = self.bell.write(1);
    }
}

fn known(state: State) -> Option<Cause> {
    match state {
        State::Known(cause) => Some(cause),
        State::Idle | State::Asked | State::Unknown => None,
    }
}

fn ask(job: &Job) -> Option<Cause> {
    for _ in 0..MOST {
        match job.view() {
            Ok(view) => return Some(policy::cause(&view, job.run, SystemTime::now())),
            Err(SlurmError::Unknown(_)) => return None,
            Err(why) => log::debug!("why job {} ends is not known: {why}", job.id),
        }
        std::thread::sleep(ASK_AGAIN);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_is_not_asked_for_is_not_waited_for() {
        let inquiry = Inquiry::new(Arc::new(EventFd::new().unwrap()));
        let long = Duration::from_secs(3600);
        assert_eq!(inquiry.wait(long), None);
        inquiry.put(State::Asked);
        assert_eq!(inquiry.wait(Duration::from_millis(1)), None);
        let other = inquiry.clone();
        let thread = std::thread::spawn(move || other.wait(long));
        inquiry.found(Cause::Cancelled);
        assert_eq!(thread.join().unwrap(), Some(Cause::Cancelled));
        assert_eq!(inquiry.known(), Some(Cause::Cancelled));
        inquiry.put(State::Unknown);
        assert_eq!(inquiry.wait(long), None);
    }
}
