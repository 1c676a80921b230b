//! A job longer than its time limit goes on by itself, run after run, and ends as if there had been
//! no limit. The user writes neither `--signal` nor a trap, and nobody does anything in between. All
//! jobs of a cluster run side by side: they do nothing but wait.

mod support;

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{Cluster, Spec};
use support::*;

/// The shortest limit that Slurm knows.
const MINUTE: &str = "--time=1";

/// Lines of lines.py, of at least 10 ms each: work of four minutes, and of one and a half.
const LONG: usize = 24_000;
const SHORT: usize = 9_000;

/// A run gets some 40 s further, and a requeued job waits a while before it starts again.
const ENDED: Duration = Duration::from_secs(900);

/// A job and its work.
struct Limited {
    name: String,
    job: u32,
    lines: usize,
}

#[test]
fn a_job_of_four_minutes_ends_with_a_limit_of_one() -> Result<()> {
    let cluster = &with(&Spec {
        nodes: 1,
        cpus: 16,
        ..spec()?
    })?;
    let mut all = Vec::new();
    for engine in ["dmtcp", "criu"] {
        if !have(engine)? {
            continue;
        }
        for (batch, kind) in [(true, "batch"), (false, "step")] {
            let name = format!("{engine}-{kind}");
            let program = format!("lines.py {LONG}");
            let job = submit_program(cluster, (engine, &name), batch, &[MINUTE], &program)?;
            all.push(Limited {
                name,
                job,
                lines: LONG,
            });
        }
    }
    // Four minutes take at least four runs of one.
    finish(cluster, &all, 3)
}

#[test]
fn without_the_plugin_a_job_outlives_its_limit() -> Result<()> {
    let cluster = &without_plugin(&Spec {
        nodes: 1,
        cpus: 16,
        ..Spec::default()
    })?;
    let mut all = Vec::new();
    for engine in ["dmtcp", "criu"] {
        if !have(engine)? {
            continue;
        }
        for how in ["srun", "exec"] {
            let name = format!("{engine}-{how}");
            let script = format!(
                "#!/bin/bash\nPATH=$HOME/bin:$PATH\n{how} container-checkpoint run --name {name} \
                 --engine {engine} /images/python.sif python3 lines.py {SHORT}\n"
            );
            let options = [
                format!("--output={name}.out"),
                "--open-mode=append".into(),
                format!("--job-name={name}"),
                MINUTE.into(),
            ];
            let job = sbatch(cluster, &options, &script)?;
            all.push(Limited {
                name,
                job,
                lines: SHORT,
            });
        }
    }
    finish(cluster, &all, 1)
}

/// Waits until all have ended, touching nothing: each after at least `requeues`, its output exact.
fn finish(cluster: &Cluster, all: &[Limited], requeues: usize) -> Result<()> {
    for limited in all {
        explained(cluster, &limited.name, ended(cluster, limited, requeues))?;
    }
    cluster.wait_nothing_left(LIMIT)
}

fn ended(cluster: &Cluster, limited: &Limited, requeues: usize) -> Result<()> {
    let end = cluster.wait_end(limited.job, ENDED)?;
    ensure!(end["JobState"] == "COMPLETED", "{end:?}");
    let restarts: usize = end["Restarts"].parse()?;
    ensure!(restarts >= requeues, "{end:?}");
    let text = output(cluster, &limited.name)?;
    exact(&text)?;
    ensure!(numbers(&text).len() == limited.lines, "lines are missing");
    for said in ["the job's time limit is near", " goes on from generation "] {
        let times = text.matches(said).count();
        ensure!(
            times == restarts,
            "{times} times, not {restarts}: {said}\n{text}"
        );
    }
    Ok(())
}
