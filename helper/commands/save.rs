//! `save`: asks the helpers of a running NAME or job for a checkpoint, now.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{anyhow, bail};
use clap::Args;

use super::{ABSENT, Common, FAILED, OK, around};
use crate::holder;
use crate::requests::{Answer, Placed};
use crate::slurm::{self, BATCH, Job};
use crate::store::{Cell, Holder, Name, Store, Trigger, bytes_for_people};

#[derive(Debug, Args)]
pub struct Save {
    /// A checkpoint NAME, or a job's id; of an array's element as squeue shows it, such as 42_7
    #[arg(value_name = "NAME|JOBID")]
    pub what: String,
    /// End it at the saved state, and its job with it unless that is the job from within which this
    /// is asked; the next run with the same name goes on from there
    #[arg(long)]
    pub stop: bool,
    /// Wait until it is saved, and say how that went
    #[arg(long)]
    pub wait: bool,
    /// How many seconds to wait at most
    #[arg(long, default_value_t = 900, value_name = "SECONDS")]
    pub timeout: u64,
    #[command(flatten)]
    pub common: Common,
}

/// Does it; what is returned is the program's exit code.
pub fn main(save: &Save) -> u8 {
    match run(save) {
        Ok(code) => code,
        Err(why) => {
            log::error!("{why:#}");
            FAILED
        }
    }
}

fn run(save: &Save) -> anyhow::Result<u8> {
    let (_, dir): (_, PathBuf) = around::place(&save.common)?;
    let me = holder::own(None)?;
    let found = match Store::existing(&dir)? {
        Some(store) => running(&store, &save.what, &me)?,
        None => Vec::new(),
    };
    if found.is_empty() {
        log::error!(
            "nothing that runs and can be saved is called {} in {}; `container-checkpoint list` \
             shows what there is",
            save.what,
            dir.display()
        );
        return Ok(ABSENT);
    }
    let mut placed = Vec::new();
    let within = Job::from_environment().map(|job| job.id);
    let stop = save.stop.then_some(Trigger::ExitRequest);
    for (cell, holder) in found {
        let request = Placed::place(&cell, &holder, stop, within)
            .map_err(|why| anyhow!("cannot ask for {}: {why:#}", cell.label()))?;
        if !save.wait {
            println!("{}: asked {}", cell.label(), holder.describe());
        }
        placed.push((cell, holder, request));
    }
    let mut code = OK;
    for (cell, holder, request) in placed {
        if !save.wait {
            request.leave();
            continue;
        }
        let limit = Duration::from_secs(save.timeout);
        let answer = request.wait(&me, &holder::Slurm, limit)?;
        // The next command may be the one that goes on from there.
        if save.stop
            && matches!(answer, Some(Answer::Saved { .. }))
            && !request.wait_free(&holder, limit)?
        {
            log::warn!("{} is saved and has not ended yet", cell.label());
        }
        match answer {
            Some(answer @ Answer::Saved { .. }) if save.common.json => {
                println!("{}", document(&cell, &answer)?);
            }
            Some(Answer::Saved { generation, bytes }) => {
                println!(
                    "{}: saved as generation {generation}, {}",
                    cell.label(),
                    bytes_for_people(bytes)
                );
            }
            Some(answer @ Answer::Failed { .. }) if save.common.json => {
                println!("{}", document(&cell, &answer)?);
                code = FAILED;
            }
            Some(Answer::Failed { why }) => {
                log::error!("{}: not saved: {why}", cell.label());
                code = FAILED;
            }
            None => {
                log::error!("{}: it ended before it was saved", cell.label());
                code = FAILED;
            }
        }
    }
    Ok(code)
}

/// What `--json` prints for an answer, a line each: `{"name": …, "saved": {"generation", "bytes"}}`
/// or `{"name": …, "failed": {"why"}}`.
fn document(cell: &Cell, answer: &Answer) -> anyhow::Result<String> {
    let mut document = serde_json::to_value(answer)?;
    document["name"] = cell.label().into();
    Ok(document.to_string())
}

/// The cells of a NAME, or else of a job, whose application runs now.
fn running(store: &Store, what: &str, me: &Holder) -> anyhow::Result<Vec<(Cell, Holder)>> {
    if let Ok(name) = Name::parse(what) {
        let found = held(&store.name(&name), me)?;
        if !found.is_empty() {
            return Ok(found);
        }
    }
    let number = what.parse::<u32>().ok();
    let Some(job) = number.map_or_else(|| slurm::element(what), |job| Ok(Some(job)))? else {
        return Ok(Vec::new());
    };
    let mut all = Vec::new();
    for name in store.names()? {
        all.extend(held(&store.name(&name), me)?);
    }
    all.retain(|(_, holder)| holder.job == Some(job));
    // A script on the host beside them is not saved itself; one in a container is alone.
    let in_batch = |(_, holder): &(Cell, Holder)| holder.step == BATCH;
    if !all.iter().all(in_batch) {
        all.retain(|held| !in_batch(held));
    }
    Ok(all)
}

/// The cells of one NAME that are held: its steps, or the NAME itself if it has none. A script on
/// the host holds the NAME as well, but is not saved itself.
fn held(name: &Cell, me: &Holder) -> anyhow::Result<Vec<(Cell, Holder)>> {
    let mut found = Vec::new();
    for cell in name.steps()? {
        found.extend(live(cell, me)?);
    }
    if found.is_empty() {
        found.extend(live(name.clone(), me)?);
    }
    Ok(found)
}

fn live(cell: Cell, me: &Holder) -> anyhow::Result<Option<(Cell, Holder)>> {
    let Some(holder) = cell.holder()? else {
        return Ok(None);
    };
    match cell.holder_has_ended(me, &holder::Slurm)? {
        Some(true) => Ok(None),
        Some(false) => Ok(Some((cell, holder))),
        None => bail!(
            "whether {} still runs cannot be seen from here: {}",
            cell.label(),
            holder.describe()
        ),
    }
}
