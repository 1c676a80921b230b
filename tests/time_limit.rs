//! A job longer than its time limit goes on by itself, run after run, and ends as if there had been
//! no limit. The user writes neither `--signal` nor a trap.

mod support;

use anyhow::{Result, ensure};
use support::*;

#[test]
fn a_batch_container_outlives_its_limit_dmtcp() -> Result<()> {
    limited("dmtcp", true)
}

#[test]
fn a_batch_container_outlives_its_limit_criu() -> Result<()> {
    limited("criu", true)
}

#[test]
fn a_step_outlives_its_limit_dmtcp() -> Result<()> {
    limited("dmtcp", false)
}

#[test]
fn a_step_outlives_its_limit_criu() -> Result<()> {
    limited("criu", false)
}

fn limited(engine: &str, batch: bool) -> Result<()> {
    if !have(engine)? {
        return Ok(());
    }
    let cluster = cluster()?;
    let name = "limited";
    // The shortest limit that Slurm knows.
    let job = submit_lines(&cluster, (engine, name), batch, &["--time=1"])?;
    explained(
        &cluster,
        name,
        (|| {
            node(&cluster, job)?;
            wait_progress(&cluster, name, 20)?;
            for run in 1..=2 {
                wait_run(&cluster, job, run)?;
                wait_progress(&cluster, name, 20)?;
            }
            open_gate(&cluster, name)?;
            let end = cluster.wait_end(job, LIMIT)?;
            ensure!(end["JobState"] == "COMPLETED", "{end:?}");
            let text = output(&cluster, name)?;
            exact(&text)?;
            ensure!(
                text.matches("the job's time limit is near").count() == 2,
                "{text}"
            );
            cluster.wait_nothing_left(LIMIT)
        })(),
    )
}
