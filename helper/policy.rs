//! When to save, and what to do afterwards: decisions only, no I/O, no clock of its own.
//!
//! Contract: everything here is a pure function of what `supervise` has found out. `supervise` acts.

use std::time::{Duration, SystemTime};

use crate::slurm::{JobView, Phase};

/// Why the job was told to end, as far as Slurm says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// It is being pre-empted and has some time left (GraceTime): it runs on until somebody
    /// requeues it or the time is over.
    Grace,
    /// It is ending, and Slurm starts it again by itself.
    Requeue,
    TimeLimit,
    Cancelled,
    /// The job runs on: only this process was told to end.
    Signal,
    /// The user asked for the job to be saved and ended (`save --stop`).
    ExitRequest,
    /// Slurm did not answer.
    Unknown,
}

/// How close to its end a running job that gets SIGTERM is taken to be at its time limit. Slurm
/// looks for expired jobs every 30 s and signals `--signal` jobs up to 60 s early (facts of
/// slurmctld's job_time_limit()).
const NEAR_THE_END: Duration = Duration::from_secs(90);

/// Why a job was told to end. `run` is the restart count of the run that asks.
pub fn cause(view: &JobView, run: u32, now: SystemTime) -> Cause {
    // Slurm counts a restart when it decides on it, while the old run is still completing.
    if view.restarts > run {
        return Cause::Requeue;
    }
    match view.phase {
        Phase::Requeuing | Phase::Pending => Cause::Requeue,
        Phase::Cancelled => Cause::Cancelled,
        Phase::TimedOut => Cause::TimeLimit,
        Phase::Running | Phase::Suspended => {
            if view.preempt_time.is_some() {
                Cause::Grace
            } else if view.end_time.is_some_and(|end| end < now + NEAR_THE_END) {
                Cause::TimeLimit
            } else {
                Cause::Signal
            }
        }
        // COMPLETING hides the reason. A job that Slurm requeues has been counted above.
        Phase::Ended => Cause::Cancelled,
    }
}

/// What becomes of the job once its application is saved and stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Ask Slurm to requeue the job, then wait to be killed.
    Requeue,
    /// End, by the signal that asked for it.
    End,
    /// Ask Slurm to cancel the job, so that its script does not go on.
    Cancel,
    /// Slurm did not say why: ask again, as long as this process lives.
    AskAgain,
}

/// What to do after the application was saved and stopped. `batch` says whether the job has a
/// script that Slurm could start again.
pub fn after_stop(cause: Cause, batch: bool, requeue_at_time_limit: bool) -> After {
    match cause {
        Cause::Grace if batch => After::Requeue,
        Cause::TimeLimit if batch && requeue_at_time_limit => After::Requeue,
        Cause::Unknown => After::AskAgain,
        Cause::ExitRequest => After::Cancel,
        Cause::Grace | Cause::TimeLimit | Cause::Requeue | Cause::Cancelled | Cause::Signal => {
            After::End
        }
    }
}

/// What the checkpoints of a computation cost so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Bytes of one checkpoint.
    pub bytes: u64,
    /// How long it took, from the request to the commit.
    pub took: Duration,
}

/// Bytes per second taken for a file system nothing is known of. DMTCP wrote 300 MB/s to ext4 on a
/// small machine; shared file systems are slower.
const CAUTIOUS_THROUGHPUT: f64 = 50e6;

/// What every checkpoint costs whatever its size: barriers, renames, fsync.
const FIXED: Duration = Duration::from_secs(5);

/// How long a checkpoint of `memory` resident bytes will take, from what the `last` one cost.
pub fn predicted_duration(memory: u64, last: Option<Cost>) -> Duration {
    let throughput = match last {
        // A tiny checkpoint says nothing of throughput.
        Some(cost) if cost.bytes > 32 << 20 => {
            cost.bytes as f64 / cost.took.as_secs_f64().max(0.001)
        }
        _ => CAUTIOUS_THROUGHPUT,
    };
    FIXED + Duration::from_secs_f64(memory as f64 / throughput.max(1e5))
}

/// How many bytes of memory can be saved within `notice` on a file system nothing is known of.
pub fn fits(notice: Duration, safety: f64) -> u64 {
    let time = notice.div_f64(safety.max(1.0)).saturating_sub(FIXED);
    (time.as_secs_f64() * CAUTIOUS_THROUGHPUT) as u64
}

/// How long before a deadline a checkpoint has to start.
pub fn lead_time(memory: u64, last: Option<Cost>, safety: f64) -> Duration {
    predicted_duration(memory, last).mul_f64(safety.max(1.0))
}

/// How much of a run's `time` a lead time may take: half. A run that were all lead time would be
/// saved as soon as it has begun, and the job requeued for ever without getting on.
pub fn lead_time_within(lead: Duration, time: Duration) -> Duration {
    lead.min(time / 2)
}

/// The interval between checkpoints that loses least, by J. T. Daly, "A higher order estimate of
/// the optimum checkpoint interval for restart dumps" (2006), equation 37: `cost` of one
/// checkpoint, mean time between losses `mtbf`.
pub fn daly_interval(cost: Duration, mtbf: Duration) -> Duration {
    let (cost, mtbf) = (cost.as_secs_f64(), mtbf.as_secs_f64());
    if cost >= 2.0 * mtbf {
        return Duration::from_secs_f64(mtbf);
    }
    let ratio = cost / (2.0 * mtbf);
    let factor = 1.0 + ratio.sqrt() / 3.0 + ratio / 9.0;
    Duration::from_secs_f64(((2.0 * cost * mtbf).sqrt() * factor - cost).max(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(phase: Phase) -> JobView {
        JobView {
            target: "7".into(),
            phase,
            state: String::new(),
            end_time: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(10_000)),
            preempt_time: None,
            requeue: true,
            restarts: 1,
            batch: true,
        }
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn every_cause_is_told_apart() {
        let running = view(Phase::Running);
        assert_eq!(cause(&running, 1, at(5_000)), Cause::Signal);
        assert_eq!(cause(&running, 1, at(9_950)), Cause::TimeLimit);
        assert_eq!(
            cause(&running, 0, at(5_000)),
            Cause::Requeue,
            "counted already"
        );
        let grace = JobView {
            preempt_time: Some(at(5_000)),
            ..view(Phase::Running)
        };
        // The grace time has moved the end: a pre-emption all the same.
        assert_eq!(cause(&grace, 1, at(9_999)), Cause::Grace);
        for (phase, expected) in [
            (Phase::Pending, Cause::Requeue),
            (Phase::Requeuing, Cause::Requeue),
            (Phase::Cancelled, Cause::Cancelled),
            (Phase::Ended, Cause::Cancelled),
            (Phase::TimedOut, Cause::TimeLimit),
        ] {
            assert_eq!(cause(&view(phase), 1, at(5_000)), expected, "{phase:?}");
        }
    }

    #[test]
    fn only_what_slurm_would_lose_is_requeued() {
        for cause in [
            Cause::Grace,
            Cause::Requeue,
            Cause::TimeLimit,
            Cause::Cancelled,
            Cause::Signal,
            Cause::ExitRequest,
            Cause::Unknown,
        ] {
            for batch in [true, false] {
                for at_limit in [true, false] {
                    let expected = match cause {
                        Cause::Unknown => After::AskAgain,
                        Cause::ExitRequest => After::Cancel,
                        Cause::Grace if batch => After::Requeue,
                        Cause::TimeLimit if batch && at_limit => After::Requeue,
                        _ => After::End,
                    };
                    assert_eq!(after_stop(cause, batch, at_limit), expected, "{cause:?}");
                }
            }
        }
    }

    #[test]
    fn intervals_are_dalys() {
        let minutes = |minutes: f64| Duration::from_secs_f64(minutes * 60.0);
        for (mtbf, expected) in [(24.0 * 60.0, 116.7), (6.0 * 60.0, 56.7), (15.0, 9.1)] {
            let interval = daly_interval(minutes(5.0), minutes(mtbf)).as_secs_f64() / 60.0;
            assert!((interval - expected).abs() < 0.06, "{mtbf}: {interval}");
        }
        assert_eq!(daly_interval(minutes(30.0), minutes(10.0)), minutes(10.0));
    }

    #[test]
    fn what_fits_is_what_takes_so_long() {
        let bytes = fits(Duration::from_secs(30), 1.5);
        assert_eq!(lead_time(bytes, None, 1.5).as_secs(), 30);
        assert_eq!(fits(Duration::from_secs(5), 1.5), 0);
    }

    #[test]
    fn lead_time_grows_with_memory_and_learns() {
        let small = lead_time(1 << 20, None, 1.5);
        let large = lead_time(10 << 30, None, 1.5);
        assert!(small < Duration::from_secs(10) && large > Duration::from_secs(200));
        let minute = Duration::from_secs(60);
        assert_eq!(lead_time_within(large, minute), Duration::from_secs(30));
        assert_eq!(lead_time_within(small, minute), small);
        let fast = Cost {
            bytes: 1 << 30,
            took: Duration::from_secs(1),
        };
        assert!(lead_time(10 << 30, Some(fast), 1.5) < Duration::from_secs(30));
    }
}
