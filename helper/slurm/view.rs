//! The controller's view of a job: `scontrol show job -o`, read.

use std::time::{Duration, SystemTime};

/// What a job is doing, as far as it decides something for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Pending,
    Running,
    Suspended,
    /// It is ending, and Slurm starts it again by itself afterwards.
    Requeuing,
    /// It is ending or has ended because somebody cancelled it.
    Cancelled,
    /// It is ending or has ended at its time limit.
    TimedOut,
    /// It is ending or has ended in any other way.
    Ended,
}

/// What `scontrol show job` says of a job.
#[derive(Debug, Clone)]
pub struct JobView {
    /// As [`super::Job::target`].
    pub target: String,
    pub phase: Phase,
    /// JobState as printed.
    pub state: String,
    /// When it ends at the latest. A pre-emption with GraceTime moves it.
    pub end_time: Option<SystemTime>,
    /// Set by a pre-emption with GraceTime.
    pub preempt_time: Option<SystemTime>,
    /// Whether Slurm may requeue it.
    pub requeue: bool,
    pub restarts: u32,
    /// Whether it has a batch script: without one Slurm cannot start it again.
    pub batch: bool,
}

impl JobView {
    /// Reads job `id`'s line of an answer: a het job has a line per component, an array one per
    /// element. Values with blanks (Comment, Command) are cut at the first blank; nothing is
    /// decided by those.
    pub fn parse(text: &str, id: u32) -> Option<JobView> {
        let own = format!("JobId={id} ");
        let line = text.lines().find(|line| line.starts_with(&own))?;
        let value = |key: &str| {
            line.split(' ')
                .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
                .unwrap_or("")
        };
        let number = |key: &str| value(key).parse().ok();
        let state = value("JobState").to_owned();
        let restarts = value("Restarts").parse().unwrap_or(0);
        let preempt_time = time(value("PreemptTime"));
        Some(JobView {
            target: super::target(id, (number("ArrayJobId"), number("ArrayTaskId"))),
            phase: phase(&state, value("Reason")),
            end_time: time(value("EndTime")),
            preempt_time,
            requeue: value("Requeue") == "1",
            restarts,
            batch: value("BatchFlag") != "0",
            state,
        })
    }
}

/// What JobState means. While a job completes the base state says why it does: a requeued job is
/// shown as COMPLETING with its base state PENDING or, for pre-emption, PREEMPTED; some versions
/// print flags beside it, comma or plus separated. A job that is completing since its time, or its
/// reservation's, was over is told by its reason alone (FAIL_TIMEOUT, set by job_time_limit() of
/// slurmctld).
fn phase(state: &str, reason: &str) -> Phase {
    let has = |word: &str| state.split([',', '+']).any(|part| part == word);
    if has("CANCELLED") || has("REVOKED") {
        Phase::Cancelled
    } else if has("TIMEOUT") || has("DEADLINE") || has("COMPLETING") && reason == "TimeLimit" {
        Phase::TimedOut
    } else if has("REQUEUED") || has("REQUEUE_FED") || has("REQUEUE_HOLD") || has("PREEMPTED") {
        Phase::Requeuing
    } else if has("SUSPENDED") || has("STOPPED") {
        Phase::Suspended
    } else if has("RUNNING") || has("CONFIGURING") || has("RESIZING") || has("SIGNALING") {
        Phase::Running
    } else if has("PENDING") {
        Phase::Pending
    } else {
        // COMPLETING alone says nothing of the reason: base states are hidden behind it.
        Phase::Ended
    }
}

/// A time as Slurm prints it in the local zone (`2024-11-26T07:08:44`), or None for `Unknown`,
/// `None`, `N/A`.
fn time(text: &str) -> Option<SystemTime> {
    let digits: Vec<i32> = text
        .split(['-', 'T', ':'])
        .map(str::parse)
        .collect::<Result<_, _>>()
        .ok()
        .filter(|digits: &Vec<i32>| digits.len() == 6)?;
    let seconds = crate::sys::local_to_epoch([
        digits[0], digits[1], digits[2], digits[3], digits[4], digits[5],
    ])?;
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_job_is_read() {
        let view = JobView::parse(
            "JobId=3 JobName=a b UserId=alice(1001) JobState=RUNNING Reason=None Requeue=1 \
             Restarts=2 BatchFlag=1 EndTime=2024-01-02T03:04:05 PreemptTime=None NodeList=n1 \
             Comment=checkpoint generation 7 ",
            3,
        )
        .unwrap();
        assert_eq!(view.phase, Phase::Running);
        assert_eq!((view.requeue, view.restarts, view.batch), (true, 2, true));
        assert!(view.end_time.is_some() && view.preempt_time.is_none());
    }

    #[test]
    fn states_mean_what_they_say() {
        for (state, expected) in [
            ("RUNNING", Phase::Running),
            ("COMPLETING", Phase::Ended),
            ("PREEMPTED", Phase::Requeuing),
            ("CANCELLED", Phase::Cancelled),
            ("TIMEOUT", Phase::TimedOut),
            ("PENDING", Phase::Pending),
            ("COMPLETED", Phase::Ended),
            ("SUSPENDED", Phase::Suspended),
        ] {
            assert_eq!(phase(state, "None"), expected, "{state}");
        }
        assert_eq!(phase("COMPLETING", "TimeLimit"), Phase::TimedOut);
    }

    #[test]
    fn one_job_of_an_array_is_read() {
        let text = "JobId=12 ArrayJobId=10 ArrayTaskId=1 JobState=PENDING Restarts=3\n\
                    JobId=10 ArrayJobId=10 ArrayTaskId=2 JobState=RUNNING Restarts=0\n";
        let view = JobView::parse(text, 10).unwrap();
        assert_eq!((view.phase, view.restarts), (Phase::Running, 0));
        assert_eq!(view.target, "10_2");
        let waiting = "JobId=10 ArrayJobId=10 ArrayTaskId=3-8 JobState=PENDING\n";
        assert_eq!(JobView::parse(waiting, 10).unwrap().target, "10");
    }

    #[test]
    fn what_is_no_job_is_none() {
        assert!(JobView::parse("slurm_load_jobs error", 3).is_none());
        assert!(time("Unknown").is_none());
        assert!(time("2024-13").is_none());
    }
}
