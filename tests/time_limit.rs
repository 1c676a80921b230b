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
    let mut options = options(engine, name);
    // The shortest limit that Slurm knows.
    options.push("--time=1".into());
    let script = if batch {
        options.push("--container-image=/images/python.sif".into());
        "#!/bin/bash\npython3 lines.py limited.gate\n"
    } else {
        "#!/bin/bash\nsrun --container-image=/images/python.sif python3 lines.py limited.gate\n"
    };
    let job = sbatch(&cluster, &options, script)?;
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
