//! What becomes of the job once its application is saved and stopped.

use std::time::{Duration, Instant, SystemTime};

use super::breaker::Breaker;
use super::siblings::Siblings;
use super::signals::Signals;
use crate::policy::{self, After, Cause};
use crate::slurm::{Job, JobView, SlurmError, Step};
use crate::store::{Lock, State, Trigger};

/// How often the batch script is looked at, and Slurm asked again where it was silent. The steps of
/// one job may be on different nodes, where nothing but files tells of them.
const LOOK: Duration = Duration::from_millis(200);
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// How long before the job's end it is requeued although other steps are not saved yet, which then
/// have KillWait; and how long they are waited for where the end is not known.
const MARGIN: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(600);

/// Brings the job where it has to be and returns when this process may end. `lock` is on the saved
/// and stopped computation.
pub fn settle(
    job: Option<&Job>,
    trigger: Trigger,
    requeue_at_time_limit: bool,
    lock: &Lock,
    breaker: Option<&Breaker>,
    signals: &mut Signals,
) -> Result<(), std::io::Error> {
    let Some(job) = job else { return Ok(()) };
    // Told first: other steps that are saved as well wait for this one as it does for them.
    tell(lock, State::Saved);
    let mut siblings = Siblings::of(lock.cell(), &lock.holder());
    loop {
        let why = why(job, trigger);
        // Asked each time: another step may have got on meanwhile.
        let stuck = breaker.filter(|breaker| breaker.is_stuck());
        let after =
            policy::after_stop(why.cause, why.batch, requeue_at_time_limit, stuck.is_some());
        if matches!(after, After::Requeue | After::Hold | After::Cancel)
            && siblings.save(trigger, why.limit(), signals)?
        {
            // Meanwhile one of them may have brought the job where it has to be.
            continue;
        }
        let settled = match after {
            After::End => {
                log::debug!("{:?}: nothing to ask of Slurm", why.cause);
                true
            }
            After::Cancel => match job.cancel() {
                Ok(()) => {
                    log::info!(
                        "job {} ends here, as was asked for; submit it again with the same name to \
                         go on",
                        job.id
                    );
                    true
                }
                Err(why) => {
                    log::warn!("cannot cancel job {}: {why}", job.id);
                    false
                }
            },
            After::AskAgain => {
                log::warn!(
                    "Slurm does not say what becomes of job {}; the saved state is safe. Asking \
                     again in {} s",
                    job.id,
                    ASK_AGAIN.as_secs()
                );
                false
            }
            After::Requeue | After::Hold => match requeue(job, stuck.map(|stuck| (stuck, lock))) {
                Requeue::Done => true,
                Requeue::Refused => return Ok(()),
                Requeue::Failed => false,
            },
        };
        if settled {
            // The script must not go on with its next line because this step has ended, so it goes
            // first. A single signal is the step's own business.
            if why.cause == Cause::Signal {
                return Ok(());
            }
            tell(lock, State::Settled);
            return outlive_script(job, &siblings, signals);
        }
        pause(signals, ASK_AGAIN)?;
    }
}

fn tell(lock: &Lock, state: State) {
    if let Err(why) = lock.set_state(state) {
        log::warn!("{why}");
    }
}

/// What asking for a requeue has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requeue {
    Done,
    /// For good.
    Refused,
    /// It may be asked for again.
    Failed,
}

/// Asks Slurm to requeue the job, whose state is saved, and says what came of it. A job that comes to
/// nothing is held.
pub fn requeue(job: &Job, stuck: Option<(&Breaker, &Lock)>) -> Requeue {
    match stuck.map_or_else(|| job.requeue(), |(stuck, lock)| stuck.hold(lock)) {
        Ok(()) if stuck.is_some() => Requeue::Done,
        Ok(()) => {
            log::info!("job {} is requeued and goes on from there", job.id);
            Requeue::Done
        }
        // Another step was quicker.
        Err(SlurmError::Failed(_, why)) if why.contains("pending") => Requeue::Done,
        Err(SlurmError::Failed(what, why)) if is_final(&why) => {
            log::error!(
                "{what} was refused: {why}. The saved state is kept: submit the job again with the \
                 same name to go on from it"
            );
            Requeue::Refused
        }
        Err(why) => {
            log::warn!("cannot requeue job {}: {why}", job.id);
            Requeue::Failed
        }
    }
}

/// Why the job is told to end.
pub struct Why {
    pub cause: Cause,
    /// Whether it has a script that Slurm can start again.
    pub batch: bool,
    end: Option<SystemTime>,
}

impl Why {
    /// Until when the job's other steps are waited for.
    fn limit(&self) -> Instant {
        let left = self.end.map_or(PATIENCE, |end| {
            let left = end.duration_since(SystemTime::now()).unwrap_or_default();
            left.saturating_sub(MARGIN).min(PATIENCE)
        });
        Instant::now() + left
    }
}

pub fn why(job: &Job, trigger: Trigger) -> Why {
    match job.view() {
        Ok(view) => Why {
            cause: of_view(&view, job, trigger),
            batch: view.batch && view.requeue,
            end: view.end_time,
        },
        Err(why) => {
            log::debug!("{why}");
            Why {
                cause: match why {
                    SlurmError::Unknown(_) => Cause::Cancelled,
                    _ => Cause::Unknown,
                },
                batch: false,
                end: None,
            }
        }
    }
}

fn of_view(view: &JobView, job: &Job, trigger: Trigger) -> Cause {
    match policy::cause(view, job.run, SystemTime::now()) {
        // Nobody told us to end: we chose to, because the end is near.
        Cause::Signal if trigger == Trigger::TimeLimit => Cause::TimeLimit,
        Cause::Signal if trigger == Trigger::ExitRequest => Cause::ExitRequest,
        Cause::Signal if matches!(trigger, Trigger::Drain | Trigger::Maintenance) => {
            Cause::Emptying
        }
        cause => cause,
    }
}

/// Whether asking again is of no use: the words of slurm_strerror() for what a user may not do.
fn is_final(why: &str) -> bool {
    [
        "disabled",
        "Requested operation is presently disabled",
        "Access/permission denied",
    ]
    .iter()
    .any(|word| why.contains(word))
        || why.contains("Invalid job id")
}

/// Slurm ends the job, as it was asked to, before anything of this computation was started.
pub fn leave(job: &Job, lock: &Lock, signals: &mut Signals) -> std::io::Result<()> {
    tell(lock, State::Settled);
    outlive_script(job, &Siblings::of(lock.cell(), &lock.holder()), signals)
}

/// Stays until the job's batch script is gone, if the helper stands in front of one: a step that
/// ends earlier would let the script go on. Slurm kills this process in the end whatever happens.
pub fn outlive_script(
    job: &Job,
    siblings: &Siblings,
    signals: &mut Signals,
) -> std::io::Result<()> {
    while job.step != Step::Batch && siblings.script() {
        pause(signals, LOOK)?;
    }
    Ok(())
}

/// Lets `time` pass; signals that come meanwhile have been answered already, by the checkpoint.
pub fn pause(signals: &mut Signals, time: Duration) -> std::io::Result<()> {
    let end = Instant::now() + time;
    while crate::sys::readable(signals, Some(end))? {
        while signals.next()?.is_some() {}
    }
    Ok(())
}
