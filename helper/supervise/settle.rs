//! What becomes of the job once its application is saved and stopped.

use std::time::{Duration, Instant, SystemTime};

use super::signals::Signals;
use crate::policy::{self, After, Cause};
use crate::slurm::{Job, JobView, SlurmError, Step};
use crate::store::{Cell, Lock, State, Trigger};

/// How often the state of other steps is looked at, and Slurm asked again where it was silent.
/// Steps of one job may be on different nodes, where nothing but files tells of them.
const LOOK: Duration = Duration::from_millis(200);
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// Brings the job where it has to be and returns when this process may end. `cell` is the
/// computation's, `name` the one of its NAME (the same for a batch script in a container).
pub fn settle(
    job: Option<&Job>,
    trigger: Trigger,
    requeue_at_time_limit: bool,
    (name, lock): (&Cell, &Lock),
    signals: &mut Signals,
) -> Result<(), std::io::Error> {
    let Some(job) = job else { return Ok(()) };
    loop {
        let (cause, batch) = why(job, trigger);
        match policy::after_stop(cause, batch, requeue_at_time_limit) {
            After::End => {
                log::debug!("{cause:?}: nothing to ask of Slurm");
                // A requeue, a cancellation: the script must not go on with its next line because
                // this step has ended, so it goes first. A single signal is its own business.
                if cause != Cause::Signal {
                    // The script is kept until it is known that its steps are saved.
                    set_saved(lock);
                    outlive_script(job, name, signals)?;
                }
                return Ok(());
            }
            After::Cancel => {
                wait_for_others(job, name, signals)?;
                match job.cancel() {
                    Ok(()) => {
                        log::info!(
                            "job {} ends here, as was asked for; submit it again with the same name to go on",
                            job.id
                        );
                        set_saved(lock);
                        outlive_script(job, name, signals)?;
                        return Ok(());
                    }
                    Err(why) => log::warn!("cannot cancel job {}: {why}", job.id),
                }
            }
            After::AskAgain => {
                log::warn!(
                    "Slurm does not say what becomes of job {}; the saved state is safe. Asking \
                     again in {} s",
                    job.id,
                    ASK_AGAIN.as_secs()
                );
            }
            After::Requeue => {
                wait_for_others(job, name, signals)?;
                match job.requeue() {
                    Ok(()) => {
                        log::info!("job {} is requeued and goes on from there", job.id);
                        set_saved(lock);
                        outlive_script(job, name, signals)?;
                        return Ok(());
                    }
                    Err(SlurmError::Failed(what, why)) if is_final(&why) => {
                        log::error!(
                            "{what} was refused: {why}. The saved state is kept: submit the job \
                             again with the same name to go on from it"
                        );
                        return Ok(());
                    }
                    Err(why) => log::warn!("cannot requeue job {}: {why}", job.id),
                }
            }
        }
        pause(signals, ASK_AGAIN)?;
    }
}

fn set_saved(lock: &Lock) {
    if let Err(why) = lock.set_state(State::Saved) {
        log::warn!("{why}");
    }
}

/// Why the job is told to end, and whether it has a script that Slurm can start again.
fn why(job: &Job, trigger: Trigger) -> (Cause, bool) {
    match job.view() {
        Ok(view) => (of_view(&view, job, trigger), view.batch && view.requeue),
        Err(SlurmError::Unknown(_)) => (Cause::Cancelled, false),
        Err(why) => {
            log::debug!("{why}");
            (Cause::Unknown, false)
        }
    }
}

fn of_view(view: &JobView, job: &Job, trigger: Trigger) -> Cause {
    match policy::cause(view, job.run, SystemTime::now()) {
        // Nobody told us to end: we chose to, because the end is near.
        Cause::Signal if trigger == Trigger::TimeLimit => Cause::TimeLimit,
        Cause::Signal if trigger == Trigger::ExitRequest => Cause::ExitRequest,
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

/// Waits for the job's other computations that are being saved at this moment: a requeue starts
/// the clock for them (KillWait).
fn wait_for_others(job: &Job, name: &Cell, signals: &mut Signals) -> std::io::Result<()> {
    let own = std::process::id();
    loop {
        let holders = name.step_holders().unwrap_or_else(|why| {
            log::warn!("{why}");
            Vec::new()
        });
        let saving = holders
            .iter()
            .filter(|other| other.job == Some(job.id) && other.run == job.run)
            .any(|other| other.state == State::Saving && other.pid != own);
        if !saving {
            return Ok(());
        }
        pause(signals, LOOK)?;
    }
}

/// Stays until the job's batch script is gone, if the helper stands in front of one: a step that
/// ends earlier would let the script go on. Slurm kills this process in the end whatever happens.
pub fn outlive_script(job: &Job, name: &Cell, signals: &mut Signals) -> std::io::Result<()> {
    if job.step == Step::Batch {
        return Ok(());
    }
    loop {
        let script = name.holder().ok().flatten().is_some_and(|holder| {
            holder.job == Some(job.id) && holder.run == job.run && holder.step == "batch"
        });
        if !script {
            return Ok(());
        }
        pause(signals, LOOK)?;
    }
}

/// Lets `time` pass; signals that come meanwhile have been answered already, by the checkpoint.
pub fn pause(signals: &mut Signals, time: Duration) -> std::io::Result<()> {
    let end = Instant::now() + time;
    while crate::sys::readable(signals, Some(end))? {
        while signals.next()?.is_some() {}
    }
    Ok(())
}
