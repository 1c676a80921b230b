//! `evacuate`: saves and requeues every job under container-checkpoint on a node.
//!
//! Contract: the node is drained with a wish in its reason (see `evacuation`), its jobs' helpers are
//! woken, and what becomes of the jobs is watched until each has left, has said why it stays, or has
//! not answered in time. Every other job is left alone, and named. Nothing of a user's is opened.
//! Exit codes: 0 the nodes are empty; 1 a job could not leave, or something failed; 3 no such node; 5
//! all that could leave has left, and other jobs still run there.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::output::{self, clean};
use super::{ABSENT, FAILED, HELD, OK};
use crate::evacuation::{self, Answer};
use crate::slurm::emptying::{self, Listed};
use crate::slurm::{self, SlurmError, outlook};
use crate::store::disk;

/// How often the jobs are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// How often those that have not answered are woken: a helper that was just starting did not hear.
const AGAIN: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
#[command(after_help = "\
The node is drained; `scontrol update nodename=NODE state=resume` gives it back, and takes back the \
wish where jobs have not met it yet.

Exit codes: 0 the node is empty; 1 a job could not be saved and runs on, or something failed; 2 wrong \
usage; 3 no such node; 5 every job under container-checkpoint has left, and others still run there")]
pub struct Evacuate {
    /// A node, or nodes as Slurm writes them: n1,n[3-5]
    #[arg(value_name = "NODE")]
    pub nodes: String,
    /// Why, for the node's reason [default: what it says already]
    #[arg(long)]
    pub reason: Option<String>,
    /// How many seconds to wait until jobs that are being saved have left
    #[arg(long, default_value_t = 900, value_name = "SECONDS")]
    pub timeout: u64,
    /// After how many seconds a job that has not answered counts as not under container-checkpoint
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    pub answer_within: u64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Does it; what is returned is the program's exit code.
pub fn main(evacuate: &Evacuate) -> u8 {
    match run(evacuate) {
        Ok(code) => code,
        Err(why) => {
            log::error!("{why:#}");
            FAILED
        }
    }
}

/// Where a job is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
enum Outcome {
    /// It has not answered yet.
    Asked,
    /// It said that it is being saved.
    Leaving,
    /// It said that it is saved.
    Saved,
    Requeued,
    /// The engine has lost the application: it goes on elsewhere from the last state there is.
    RequeuedUnsaved,
    /// It runs on although it should have left.
    Failed {
        reason: String,
    },
    /// It ended instead, in this state.
    Ended {
        state: String,
    },
    /// Nobody answers for it: it runs on.
    Unmanaged,
}

impl Outcome {
    fn is_settled(&self) -> bool {
        !matches!(self, Outcome::Asked | Outcome::Leaving | Outcome::Saved)
    }
}

/// A job of the nodes.
#[derive(Debug, Serialize)]
struct Job {
    job: u32,
    user: String,
    #[serde(skip)]
    target: String,
    #[serde(flatten)]
    outcome: Outcome,
    /// From the beginning to its outcome.
    seconds: u64,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    nodes: &'a [String],
    /// Whether no job is left.
    empty: bool,
    jobs: Vec<&'a Job>,
}

fn run(evacuate: &Evacuate) -> anyhow::Result<u8> {
    let nodes = match outlook::nodes(&evacuate.nodes) {
        Ok(nodes) if !nodes.is_empty() => nodes,
        Err(why) if !is_unknown(&why) => return Err(why.into()),
        _ => {
            log::error!(
                "Slurm knows no node {}; `sinfo -N` lists them",
                evacuate.nodes
            );
            return Ok(ABSENT);
        }
    };
    let number = evacuation::number(&disk::nonce());
    let mut names = Vec::new();
    for node in nodes {
        let reason = evacuate.reason.as_ref().unwrap_or(&node.reason);
        emptying::drain(&node.name, &evacuation::with_wish(reason, &number)).with_context(
            || {
                format!(
                    "cannot drain {}, which only root, SlurmUser and Slurm's operators may",
                    node.name
                )
            },
        )?;
        names.push(node.name);
    }
    let mut work = Work {
        evacuate,
        list: names.join(","),
        begun: Instant::now(),
        woken: None,
        number,
        jobs: BTreeMap::new(),
    };
    work.tell(&format!("{}: drained", evacuate.nodes))?;
    // Once it is drained, no more come.
    work.list(emptying::jobs_on(&work.list)?);
    work.watch()?;
    work.report(&names)
}

fn is_unknown(why: &SlurmError) -> bool {
    matches!(why, SlurmError::Failed(_, why) if why.contains("not found") || why.contains("Invalid node"))
}

struct Work<'a> {
    evacuate: &'a Evacuate,
    list: String,
    begun: Instant,
    woken: Option<Instant>,
    number: String,
    jobs: BTreeMap<u32, Job>,
}

impl Work<'_> {
    fn list(&mut self, listed: Vec<Listed>) {
        for Listed {
            id, target, user, ..
        } in listed
        {
            self.jobs.entry(id).or_insert(Job {
                job: id,
                user,
                target,
                outcome: Outcome::Asked,
                seconds: 0,
            });
        }
    }

    /// Until every job has its outcome.
    fn watch(&mut self) -> anyhow::Result<()> {
        let mut silent = false;
        while self.jobs.values().any(|job| !job.outcome.is_settled()) {
            match self.look() {
                Ok(()) => silent = false,
                Err(why) if !silent => {
                    log::warn!("{why:#}; asking again");
                    silent = true;
                }
                Err(why) => log::debug!("{why:#}"),
            }
            self.give_up()?;
            if self.jobs.values().all(|job| job.outcome.is_settled()) {
                break;
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn ids(&self, which: impl Fn(&Job) -> bool) -> Vec<u32> {
        let jobs = self.jobs.values().filter(|job| which(job));
        jobs.map(|job| job.job).collect()
    }

    fn look(&mut self) -> anyhow::Result<()> {
        if self.woken.is_none_or(|woken| woken.elapsed() >= AGAIN) {
            let asked = self
                .jobs
                .values()
                .filter(|job| job.outcome == Outcome::Asked);
            let targets: Vec<&str> = asked.map(|job| job.target.as_str()).collect();
            if !targets.is_empty()
                && let Err(why) = emptying::wake(&targets)
            {
                // One that has just ended, for example. The others have heard.
                log::debug!("{why}");
            }
            self.woken = Some(Instant::now());
        }
        let here: Vec<u32> = emptying::jobs_on(&self.list)?
            .iter()
            .map(|job| job.id)
            .collect();
        // Asked after where they are: an answer is given before a job leaves.
        let open = self.ids(|job| !job.outcome.is_settled());
        if !open.is_empty() {
            for (id, comment) in emptying::comments(&open)? {
                match evacuation::answer_in(&comment, &self.number) {
                    Some(Answer::Leaving) => self.set(id, Outcome::Leaving)?,
                    Some(Answer::Saved) => self.set(id, Outcome::Saved)?,
                    Some(Answer::Failed(reason)) => self.set(id, Outcome::Failed { reason })?,
                    None => {}
                }
            }
        }
        let gone = self.ids(|job| !job.outcome.is_settled() && !here.contains(&job.job));
        if !gone.is_empty() {
            let now = emptying::jobs(&gone)?;
            for id in gone {
                let state = now.iter().find(|job| job.id == id);
                let state = state.map_or("unknown", |job| job.state.as_str());
                let said = self
                    .jobs
                    .get(&id)
                    .map_or(&Outcome::Asked, |job| &job.outcome);
                self.set(id, after(said, state))?;
            }
        }
        Ok(())
    }

    /// Those whose time is over.
    fn give_up(&mut self) -> anyhow::Result<()> {
        let elapsed = self.begun.elapsed().as_secs();
        if elapsed >= self.evacuate.answer_within {
            for id in self.ids(|job| job.outcome == Outcome::Asked) {
                self.set(id, Outcome::Unmanaged)?;
            }
        }
        if elapsed >= self.evacuate.timeout {
            let reason = format!("not within {elapsed} s; it may still be saved");
            for id in self.ids(|job| !job.outcome.is_settled()) {
                let reason = reason.clone();
                self.set(id, Outcome::Failed { reason })?;
            }
        }
        Ok(())
    }

    fn set(&mut self, id: u32, outcome: Outcome) -> anyhow::Result<()> {
        let seconds = self.begun.elapsed().as_secs();
        let Some(job) = self.jobs.get_mut(&id).filter(|job| job.outcome != outcome) else {
            return Ok(());
        };
        job.outcome = outcome;
        job.seconds = seconds;
        let said = match &job.outcome {
            Outcome::Asked | Outcome::Saved => return Ok(()),
            Outcome::Leaving => "is being saved".into(),
            Outcome::Requeued => format!("saved and requeued after {seconds} s"),
            Outcome::RequeuedUnsaved => {
                "requeued, but not saved: it goes on from its last checkpoint".into()
            }
            Outcome::Failed { reason } => format!("not saved, runs on: {}", clean(reason)),
            Outcome::Ended { state } => format!("left by itself: {state}"),
            Outcome::Unmanaged => "not under container-checkpoint, runs on".into(),
        };
        let line = format!("job {} ({}): {said}", job.target, job.user);
        if job.outcome.is_settled()
            && job.outcome != Outcome::Unmanaged
            && let Err(why) = slurm::answer(&job.target, None)
        {
            log::debug!(
                "the answer stays in the comment of job {}: {why}",
                job.target
            );
        }
        self.tell(&line)
    }

    /// Progress, a line each; beside a document it goes to standard error.
    fn tell(&self, line: &str) -> anyhow::Result<()> {
        if self.evacuate.json {
            log::info!("{line}");
            return Ok(());
        }
        Ok(output::print(&format!("{line}\n"))?)
    }

    fn report(&self, nodes: &[String]) -> anyhow::Result<u8> {
        let count = |which: fn(&Outcome) -> bool| {
            let outcomes = self.jobs.values().map(|job| &job.outcome);
            outcomes.filter(|outcome| which(outcome)).count()
        };
        let requeued = count(|outcome| *outcome == Outcome::Requeued);
        let failed =
            count(|outcome| matches!(outcome, Outcome::Failed { .. } | Outcome::RequeuedUnsaved));
        let ended = count(|outcome| matches!(outcome, Outcome::Ended { .. }));
        let unmanaged = count(|outcome| *outcome == Outcome::Unmanaged);
        let stays = count(|outcome| matches!(outcome, Outcome::Failed { .. }));
        let empty = stays + unmanaged == 0;
        self.tell(&format!(
            "{}: {requeued} saved and requeued, {failed} failed, {unmanaged} not under \
             container-checkpoint, {ended} left by themselves{}",
            self.evacuate.nodes,
            if empty { "; it is empty" } else { "" }
        ))?;
        if self.evacuate.json {
            let report = Report {
                nodes,
                empty,
                jobs: self.jobs.values().collect(),
            };
            output::print_json(&report)?;
        }
        Ok(match (failed, unmanaged) {
            (0, 0) => OK,
            (0, _) => HELD,
            _ => FAILED,
        })
    }
}

/// What it means that a job that was on the node, and has said this, is in this state elsewhere.
fn after(said: &Outcome, state: &str) -> Outcome {
    let alive = matches!(
        state,
        "PENDING" | "RUNNING" | "CONFIGURING" | "REQUEUED" | "SUSPENDED"
    );
    match said {
        Outcome::Saved if alive => Outcome::Requeued,
        Outcome::Leaving if alive => Outcome::RequeuedUnsaved,
        _ => Outcome::Ended {
            state: state.into(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_says_what_became_of_each_job() {
        let job = Job {
            job: 12,
            user: "alice".into(),
            target: "10_2".into(),
            outcome: Outcome::Failed {
                reason: "no room".into(),
            },
            seconds: 3,
        };
        assert_eq!(
            serde_json::to_value(job).unwrap(),
            serde_json::json!({
                "job": 12, "user": "alice", "outcome": "failed", "reason": "no room", "seconds": 3
            })
        );
    }

    #[test]
    fn only_what_was_saved_and_lives_elsewhere_counts() {
        for state in ["PENDING", "RUNNING", "CONFIGURING"] {
            assert_eq!(after(&Outcome::Saved, state), Outcome::Requeued, "{state}");
            let lost = after(&Outcome::Leaving, state);
            assert_eq!(lost, Outcome::RequeuedUnsaved, "{state}");
            // Pre-empted at that moment, for example.
            let state = state.to_owned();
            assert_eq!(after(&Outcome::Asked, &state), Outcome::Ended { state });
        }
        for said in [Outcome::Asked, Outcome::Leaving, Outcome::Saved] {
            for state in ["COMPLETED", "CANCELLED", "TIMEOUT", "FAILED", "unknown"] {
                let state = state.to_owned();
                assert_eq!(after(&said, &state), Outcome::Ended { state });
            }
        }
    }
}
