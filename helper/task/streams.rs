//! Whose streams a task has, and so what becomes of them over a restart; see [`crate::streams`].

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use anyhow::Context;

use super::{Settings, in_batch_job};
use crate::config::OutputMode;
use crate::logging;
use crate::slurm::{Job, Step};
use crate::stage;
use crate::store::{self, Cell, Holder};
use crate::streams::{By, DIRECTORY, Srun, Streams};

/// Takes over the streams that a script has set up for a stage of its.
pub fn of_stage(
    cell: &Cell,
    job: u32,
    settings: &Settings,
    script: &Holder,
) -> anyhow::Result<Arc<Streams>> {
    let own = stage::output_of(script);
    take(cell, job, settings, &By::Script { own: &own })
}

/// Takes over the streams that an srun has set up for this task. None where there is nobody who would
/// set them up in the same way again.
pub fn of_step(
    cell: &Cell,
    job: &Job,
    settings: &Settings,
) -> anyhow::Result<Option<Arc<Streams>>> {
    if job.rank > 0 || !matches!(job.step, Step::Number(_)) {
        return Ok(None);
    }
    let srun = Srun::of_this_step();
    if srun.is_none() && !in_batch_job() {
        return Ok(None);
    }
    store::disk::private_dir(cell.dir(), true)?;
    // What this process says is not the application's.
    logging::redirect(io::stderr().as_fd().try_clone_to_owned()?.into());
    let alone = job.ranks == 1;
    take(cell, job.id, settings, &By::Srun { srun, alone }).map(Some)
}

/// Takes over the input of a shell that somebody starts by hand. With that of anything else the same
/// command may well be given another one the next time; commands that were done are not done again.
pub fn input_of_shell(
    cell: &Cell,
    job: Option<&Job>,
    settings: &Settings,
) -> anyhow::Result<Option<Arc<Streams>>> {
    store::disk::private_dir(cell.dir(), true)?;
    let by = By::Srun {
        srun: None,
        alone: true,
    };
    take(cell, job.map_or(0, |job| job.id), settings, &by).map(Some)
}

fn take(cell: &Cell, job: u32, settings: &Settings, by: &By) -> anyhow::Result<Arc<Streams>> {
    let exact = settings.config.output == OutputMode::Exact;
    let streams = Streams::take(cell.dir().join(DIRECTORY), job, exact, by);
    Ok(Arc::new(streams.context("cannot take over the streams")?))
}
