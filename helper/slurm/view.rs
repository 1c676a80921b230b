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
    /// It is ending, and the answer hides why.
    Ending,
    /// It has ended in any other way.
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
    /// Whether Slurm itself has started the script once more after it had ended (_job_complete() of
    /// slurmctld counts BatchFlag on). 24.05 and 24.11 do so with a job that was requeued in its
    /// GraceTime and has completed since.
    pub retried: bool,
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
            retried: number("BatchFlag").is_some_and(|times| times > 1),
            state,
        })
    }
}

/// What JobState means. While a job completes, `scontrol show job` and `squeue` print COMPLETING and
/// nothing else (job_state_string() of 22.05 to 26.05; seen on 22.05, 24.11 and 26.05). Of the causes
/// only the end of its time, or of its reservation's, is in `Reason` then (FAIL_TIMEOUT, set by
/// job_time_limit() of slurmctld). Some versions print flags beside the state, comma or plus separated.
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
    } else if !has("COMPLETING") {
        Phase::Ended
    } else if reason == "TimeLimit" {
        Phase::TimedOut
    } else {
        Phase::Ending
    }
}

/// Why job `id` is [`Phase::Ending`], from an answer of `scontrol show job --json`: there `job_state` has
/// the base state beside the flag COMPLETING (a list from 23.02 on, the base state alone as text in
/// 22.05). A job that was pre-empted (PreemptMode=CANCEL) is not told from others that end.
pub fn why_ending(json: &str, id: u32) -> Option<Phase> {
    let answer: serde_json::Value = serde_json::from_str(json).ok()?;
    let mut jobs = answer.get("jobs")?.as_array()?.iter();
    let job =
        jobs.find(|job| job.get("job_id").and_then(|number| number.as_u64()) == Some(id.into()))?;
    let state = job.get("job_state")?;
    let words: Vec<&str> = match state {
        serde_json::Value::String(word) => vec![word],
        serde_json::Value::Array(words) => words.iter().filter_map(|word| word.as_str()).collect(),
        _ => return None,
    };
    match words.iter().find(|word| **word != "COMPLETING")? {
        &"CANCELLED" => Some(Phase::Cancelled),
        &"TIMEOUT" | &"DEADLINE" => Some(Phase::TimedOut),
        // A requeue that is not counted yet.
        &"PENDING" | &"REQUEUED" => Some(Phase::Requeuing),
        &"COMPLETED" | &"FAILED" | &"NODE_FAIL" | &"BOOT_FAIL" | &"OUT_OF_MEMORY" => {
            Some(Phase::Ended)
        }
        _ => None,
    }
}

/// A time as Slurm prints it in the local zone (`2024-11-26T07:08:44`), or None for `Unknown`,
/// `None`, `N/A`.
pub fn time(text: &str) -> Option<SystemTime> {
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

/// A time as Slurm prints it, in the local zone.
pub fn time_text(time: SystemTime) -> Option<String> {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs();
    let [year, month, day, hour, minute, second] =
        crate::sys::local_time(i64::try_from(seconds).ok()?)?;
    Some(format!(
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_read_as_it_is_printed() {
        let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let text = time_text(then).unwrap();
        assert_eq!(text.len(), "2024-11-26T07:08:44".len());
        assert_eq!(time(&text), Some(then));
    }

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
            ("COMPLETING", Phase::Ending),
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
        assert_eq!(phase("RUNNING", "TimeLimit"), Phase::Running);
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
    fn json_says_why_a_job_ends() {
        let answer = |state: &str| {
            format!(r#"{{"jobs": [{{"job_id": 2}}, {{"job_id": 1, "job_state": {state}}}]}}"#)
        };
        for (state, expected) in [
            (r#"["CANCELLED", "COMPLETING"]"#, Some(Phase::Cancelled)),
            (r#""CANCELLED""#, Some(Phase::Cancelled)),
            (r#"["TIMEOUT", "COMPLETING"]"#, Some(Phase::TimedOut)),
            (r#"["PENDING", "COMPLETING"]"#, Some(Phase::Requeuing)),
            (r#"["COMPLETED", "COMPLETING"]"#, Some(Phase::Ended)),
            (r#"["PREEMPTED", "COMPLETING"]"#, None),
            (r#"["COMPLETING"]"#, None),
            (r#"[]"#, None),
            ("7", None),
        ] {
            assert_eq!(why_ending(&answer(state), 1), expected, "{state}");
        }
        assert_eq!(why_ending("{}", 1), None);
        assert_eq!(why_ending("scontrol: error", 1), None);
    }

    #[test]
    fn what_is_no_job_is_none() {
        assert!(JobView::parse("slurm_load_jobs error", 3).is_none());
        assert!(time("Unknown").is_none());
        assert!(time("2024-13").is_none());
    }
}
