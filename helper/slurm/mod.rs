//! What the job is, what becomes of it, and asking Slurm for it.
//!
//! Contract: [`Job::from_environment`] reads what slurmstepd has told the task and asks nobody.
//! Everything else here runs one of Slurm's own commands with a time limit (the C API changed its
//! types in 26.05; the commands did not) and gives an error when the controller does not answer.
//! Nothing here decides anything: `policy` does.

mod command;
mod comment;
pub mod emptying;
mod notice;
pub mod outlook;
pub mod site;
pub mod srun;
mod view;

use std::time::Duration;

pub use comment::{CHECKPOINT, HELD, comment, is_ours, set_comment};
pub use notice::Notice;
pub use view::{JobView, Phase, time_text};

use crate::evacuation::{self, Answer};

/// How long one question to the controller may take.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// The names of steps without a number.
pub const BATCH: &str = "batch";
pub const STAGE: &str = "stage";

/// Which kind of step this process belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Batch,
    /// An srun step with its number, which starts at 0 again in every run.
    Number(u32),
    /// A container that the batch script starts by itself, within its own step.
    Stage,
}

impl std::fmt::Display for Step {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Step::Batch => out.write_str(BATCH),
            Step::Stage => out.write_str(STAGE),
            Step::Number(number) => write!(out, "{number}"),
        }
    }
}

/// The job this process belongs to, as its environment says.
#[derive(Debug, Clone)]
pub struct Job {
    /// The job's own id; of a het job, its leader's.
    pub id: u32,
    /// What Slurm's commands have to be told to mean this job alone: of an array's element,
    /// `ARRAY_TASK`. One of the elements has the array's own id, which means all of them.
    pub target: String,
    pub step: Step,
    /// Slurm's restart count: 0 in the first run (SLURM_RESTART_COUNT is unset then).
    pub run: u32,
    pub rank: u32,
    pub ranks: u32,
    pub nodes: u32,
    /// Set on Slurm 23.02 and newer: seconds since the epoch, as known when the step started.
    pub end_time: Option<u64>,
}

/// Why Slurm could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum SlurmError {
    #[error("cannot run {0}: {1}")]
    Start(String, std::io::Error),
    #[error("{0} did not answer within {1} s")]
    Silent(String, u64),
    #[error("{0} failed: {1}")]
    Failed(String, String),
    /// The controller does not know this job (any more).
    #[error("Slurm knows no job {0}")]
    Unknown(u32),
}

/// The number of the step that an srun has started and this environment is of. A batch script's has
/// none in 22.05 and 24.11, and SLURM_STEP_ID=-5 in 26.05: SLURM_BATCH_SCRIPT, 0xfffffffb.
pub fn step_of_srun(get: impl Fn(&str) -> Option<String>) -> Option<u32> {
    /// SLURM_MAX_NORMAL_STEP_ID of slurm.h.
    const MOST: u32 = 0xffff_fff0;
    let id = get("SLURM_STEP_ID")?.parse().ok()?;
    (id <= MOST).then_some(id)
}

impl Job {
    /// The job of this process, or None outside of Slurm.
    pub fn from_environment() -> Option<Job> {
        Job::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(get: impl Fn(&str) -> Option<String>) -> Option<Job> {
        let number = |name: &str| get(name).and_then(|value| value.parse::<u32>().ok());
        let id = number("SLURM_HET_JOB_ID").or_else(|| number("SLURM_JOB_ID"))?;
        let batch = get(crate::words::variable::STEP).as_deref() == Some(BATCH);
        let step = match step_of_srun(&get) {
            Some(step) if !batch => Step::Number(step),
            _ => Step::Batch,
        };
        let of_step = |name: &str, otherwise: u32| match step {
            Step::Batch | Step::Stage => otherwise,
            Step::Number(_) => number(name).unwrap_or(otherwise),
        };
        let element = (number("SLURM_ARRAY_JOB_ID"), number("SLURM_ARRAY_TASK_ID"));
        Some(Job {
            id,
            target: target(id, element),
            step,
            run: number("SLURM_RESTART_COUNT").unwrap_or(0),
            rank: of_step("SLURM_PROCID", 0),
            ranks: of_step("SLURM_STEP_NUM_TASKS", 1).max(1),
            nodes: of_step("SLURM_STEP_NUM_NODES", 1).max(1),
            end_time: get("SLURM_JOB_END_TIME").and_then(|value| value.parse().ok()),
        })
    }

    /// What the controller says of the job now.
    pub fn view(&self) -> Result<JobView, SlurmError> {
        view(self.id)
    }

    /// Asks for the job to be requeued. The job gets SIGTERM at once and SIGKILL after KillWait.
    pub fn requeue(&self) -> Result<(), SlurmError> {
        command::run("scontrol", &["requeue", &self.target]).map(drop)
    }

    /// Asks for the job to be requeued and held: it starts again when somebody releases it.
    pub fn requeue_hold(&self) -> Result<(), SlurmError> {
        command::run("scontrol", &["requeuehold", &self.target]).map(drop)
    }

    /// Ends the job for good.
    pub fn cancel(&self) -> Result<(), SlurmError> {
        command::run("scancel", &[&self.target]).map(drop)
    }
}

/// How Slurm's commands are told of job `id` alone, whose array and number in it are `element`.
fn target(id: u32, element: (Option<u32>, Option<u32>)) -> String {
    match element {
        (Some(array), Some(task)) => format!("{array}_{task}"),
        _ => id.to_string(),
    }
}

/// Puts an answer to an evacuation (its number, and what is said) into the comment of the job that
/// `target` means ([`Job::target`]), or takes any away. That it leaves is not said any more where
/// something else was.
pub fn answer(target: &str, answer: Option<(&str, &Answer)>) -> Result<(), SlurmError> {
    let comment = comment(target)?;
    let new = match answer {
        None => evacuation::without_answer(&comment),
        Some((number, Answer::Leaving)) if evacuation::answer_in(&comment, number).is_some() => {
            return Ok(());
        }
        Some((number, answer)) => evacuation::with_answer(&comment, number, answer),
    };
    if new == comment {
        return Ok(());
    }
    set_comment(target, &new)
}

/// Sends SIGURG to the tasks of a job's step (`batch`, `stage` or its number): ignored by whoever
/// does not know it.
pub fn poke(job: u32, step: &str) -> Result<(), SlurmError> {
    let target = view(job)?.target;
    let arguments = match step {
        // The helper before the script hands it on to the stages.
        BATCH | STAGE => vec!["--signal=URG".to_owned(), "--batch".to_owned(), target],
        step => vec!["--signal=URG".to_owned(), format!("{target}.{step}")],
    };
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    command::run("scancel", &arguments).map(drop)
}

/// The id of an array's element that squeue shows as `job` (ARRAY_ELEMENT). None: it is not one that
/// Slurm knows, or `job` is no such text.
pub fn element(job: &str) -> Result<Option<u32>, SlurmError> {
    let is_number = |text: &str| text.parse::<u32>().is_ok();
    if !job
        .split_once('_')
        .is_some_and(|(array, element)| is_number(array) && is_number(element))
    {
        return Ok(None);
    }
    match command::run("squeue", &["--noheader", "--format=%A", "--jobs", job]) {
        Ok(text) => Ok(text.trim().parse().ok()),
        Err(SlurmError::Failed(_, why)) if why.contains("Invalid job id") => Ok(None),
        Err(other) => Err(other),
    }
}

/// What the controller says of job `id` now.
pub fn view(id: u32) -> Result<JobView, SlurmError> {
    let mut view = view_in(&show(id)?, id)?;
    // Asked for only here: it costs more, and fails where Slurm was built without JSON.
    if view.phase == Phase::Ending {
        let json = ["show", "job", "--json", &id.to_string()];
        match command::run("scontrol", &json) {
            Ok(text) => view.phase = view::why_ending(&text, id).unwrap_or(Phase::Ending),
            Err(why) => log::debug!("why job {id} ends is not known: {why}"),
        }
    }
    Ok(view)
}

fn view_in(text: &str, id: u32) -> Result<JobView, SlurmError> {
    JobView::parse(text, id).ok_or_else(|| {
        SlurmError::Failed(
            "scontrol show job".into(),
            format!("job {id} is not in its answer: {text}"),
        )
    })
}

/// The controller's own words about job `id`.
fn show(id: u32) -> Result<String, SlurmError> {
    match command::run("scontrol", &["show", "job", "-o", &id.to_string()]) {
        // Said by every version for a job that has been purged or never was.
        Err(SlurmError::Failed(_, why)) if why.contains("Invalid job id") => {
            Err(SlurmError::Unknown(id))
        }
        other => other,
    }
}

/// Replaces `%j %A %a %x %u` in a checkpoint name as Slurm does in file names. `%a` is `4294967294`
/// outside of an array, as there. Each element of an array is a computation of its own: where the
/// name tells none from another, `-` and the element's number are added.
pub fn expand(pattern: &str) -> String {
    expand_with(pattern, |name| std::env::var(name).ok())
}

fn expand_with(pattern: &str, get: impl Fn(&str) -> Option<String>) -> String {
    let get = |names: &[&str], otherwise: &str| {
        names
            .iter()
            .find_map(|name| get(name))
            .unwrap_or_else(|| otherwise.to_owned())
    };
    let mut name = String::with_capacity(pattern.len());
    let mut tells_apart = false;
    let mut rest = pattern.chars();
    while let Some(letter) = rest.next() {
        if letter != '%' {
            name.push(letter);
            continue;
        }
        let letter = rest.next();
        tells_apart |= matches!(letter, Some('j' | 'a'));
        match letter {
            Some('j') => name += &get(&["SLURM_HET_JOB_ID", "SLURM_JOB_ID"], "0"),
            Some('A') => name += &get(&["SLURM_ARRAY_JOB_ID", "SLURM_JOB_ID"], "0"),
            Some('a') => name += &get(&["SLURM_ARRAY_TASK_ID"], "4294967294"),
            Some('x') => name += &get(&["SLURM_JOB_NAME"], "job"),
            Some('u') => name += &get(&["SLURM_JOB_USER", "USER", "LOGNAME"], "user"),
            Some(other) => name.extend(['%', other]),
            None => name.push('%'),
        }
    }
    let element = get(&["SLURM_ARRAY_TASK_ID"], "");
    if !tells_apart && !element.is_empty() {
        name.extend(["-", &element]);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(variables: &[(&str, &str)]) -> impl Fn(&str) -> Option<String> {
        let variables: Vec<(String, String)> = variables
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect();
        move |name| {
            variables
                .iter()
                .find(|(k, _)| k == name)
                .map(|(_, v)| v.clone())
        }
    }

    #[test]
    fn outside_of_slurm_there_is_no_job() {
        assert!(Job::from_variables(from(&[])).is_none());
    }

    #[test]
    fn a_batch_step_is_one_rank_whatever_the_job_asked_for() {
        let job = Job::from_variables(from(&[
            ("SLURM_JOB_ID", "7"),
            ("SLURM_NTASKS", "4"),
            ("SLURM_PROCID", "0"),
            ("SLURM_RESTART_COUNT", "2"),
        ]))
        .unwrap();
        assert_eq!(
            (job.id, job.step, job.run, job.ranks),
            (7, Step::Batch, 2, 1)
        );
    }

    #[test]
    fn a_batch_script_is_no_step_of_an_srun() {
        for (id, step) in [
            ("0", Some(0)),
            ("7", Some(7)),
            ("-5", None),
            ("4294967291", None),
        ] {
            assert_eq!(step_of_srun(from(&[("SLURM_STEP_ID", id)])), step, "{id}");
        }
        assert_eq!(step_of_srun(from(&[])), None);
    }

    #[test]
    fn a_step_knows_its_ranks() {
        let job = Job::from_variables(from(&[
            ("SLURM_JOB_ID", "7"),
            ("SLURM_STEP_ID", "3"),
            ("SLURM_STEP_NUM_TASKS", "4"),
            ("SLURM_STEP_NUM_NODES", "2"),
            ("SLURM_PROCID", "1"),
        ]))
        .unwrap();
        assert_eq!(
            (job.step, job.rank, job.ranks, job.nodes),
            (Step::Number(3), 1, 4, 2)
        );
        assert_eq!(job.run, 0);
    }

    #[test]
    fn names_expand_as_file_names_do() {
        let of_array = from(&[
            ("SLURM_JOB_ID", "12"),
            ("SLURM_ARRAY_JOB_ID", "10"),
            ("SLURM_ARRAY_TASK_ID", "2"),
            ("SLURM_JOB_NAME", "md"),
            ("SLURM_JOB_USER", "alice"),
        ]);
        assert_eq!(expand_with("%u-%x-%A_%a-%j", &of_array), "alice-md-10_2-12");
        assert_eq!(expand_with("sweep", &of_array), "sweep-2");
        assert_eq!(expand_with("%x-%A", &of_array), "md-10-2");
        let job = Job::from_variables(&of_array).unwrap();
        assert_eq!((job.id, job.target.as_str()), (12, "10_2"));
        assert_eq!(expand_with("a%qb%", from(&[])), "a%qb%");
    }
}
