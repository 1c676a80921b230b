//! What an operator does with a node: draining it, finding its jobs, waking their helpers.
//!
//! Contract: each function is one question or order to the controller.

use super::{SlurmError, command};

/// A job, as squeue lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its own id; of a het job's component, the leader's.
    pub id: u32,
    /// What Slurm's commands have to be told to mean this job alone: of an array's element `10_2`.
    pub target: String,
    pub user: String,
    /// `RUNNING`, `COMPLETING`…
    pub state: String,
}

/// No text of a user's is in it.
const LISTED: &str = "--format=%A|%i|%u|%T";

/// Lets a node take no more jobs. Only operators may.
pub fn drain(node: &str, reason: &str) -> Result<(), SlurmError> {
    let (node, reason) = (format!("NodeName={node}"), format!("Reason={reason}"));
    command::run("scontrol", &["update", &node, "State=DRAIN", &reason]).map(drop)
}

/// The jobs that are on nodes now, those that are completing included.
pub fn jobs_on(nodes: &str) -> Result<Vec<Listed>, SlurmError> {
    let text = command::run("squeue", &["--noheader", LISTED, "--nodelist", nodes])?;
    let mut jobs = parse(&text);
    jobs.retain(|job| job.state != "PENDING");
    Ok(jobs)
}

/// What has become of these jobs. Those that Slurm has forgotten are missing.
pub fn jobs(ids: &[u32]) -> Result<Vec<Listed>, SlurmError> {
    let ids = list(ids);
    match command::run(
        "squeue",
        &["--noheader", LISTED, "--states=all", "--jobs", &ids],
    ) {
        Ok(text) => Ok(parse(&text)),
        // Said where it knows none of them.
        Err(SlurmError::Failed(_, why)) if why.contains("Invalid job id") => Ok(Vec::new()),
        Err(other) => Err(other),
    }
}

/// The comments of these jobs, which are their users' own words.
pub fn comments(ids: &[u32]) -> Result<Vec<(u32, String)>, SlurmError> {
    let ids = list(ids);
    let arguments = [
        "--noheader",
        "--format=%A|%k",
        "--states=all",
        "--jobs",
        &ids,
    ];
    let text = match command::run("squeue", &arguments) {
        Err(SlurmError::Failed(_, why)) if why.contains("Invalid job id") => String::new(),
        other => other?,
    };
    let parse = |line: &str| {
        let (id, comment) = line.split_once('|')?;
        Some((id.parse().ok()?, comment.to_owned()))
    };
    Ok(text.lines().filter_map(parse).collect())
}

/// Sends SIGURG to every task of these jobs, by their targets: ignored by whoever does not know it.
pub fn wake(targets: &[&str]) -> Result<(), SlurmError> {
    for whom in [None, Some("--batch")] {
        let mut arguments = vec!["--signal=URG"];
        arguments.extend(whom);
        arguments.extend(targets);
        command::run("scancel", &arguments)?;
    }
    Ok(())
}

fn list(ids: &[u32]) -> String {
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    ids.join(",")
}

fn parse(text: &str) -> Vec<Listed> {
    let parse = |line: &str| {
        let [id, target, user, state] = line.split('|').collect::<Vec<_>>()[..] else {
            return None;
        };
        // `12+1`: a component of a het job, which is one with its leader.
        let (id, target) = match target.split_once('+') {
            Some((leader, _)) => (leader, leader),
            None => (id, target),
        };
        Some(Listed {
            id: id.parse().ok()?,
            target: target.to_owned(),
            user: user.to_owned(),
            state: state.to_owned(),
        })
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_listed_by_what_means_them_alone() {
        let listed = parse("12|10_2|alice|RUNNING\n14|13+1|bob|COMPLETING\nnonsense\n");
        let seen: Vec<_> = listed
            .iter()
            .map(|job| (job.id, job.target.as_str(), job.user.as_str()))
            .collect();
        assert_eq!(seen, [(12, "10_2", "alice"), (13, "13", "bob")]);
    }
}
