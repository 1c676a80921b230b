//! `proctrack/linuxproc`, where Slurm signals every process below its own: the application survives
//! the signal that ends the job, is saved, and goes on; and nothing is left when it has to end.

mod support;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{Cluster, Proctrack, Spec};
use support::*;

const SCRIPT: &str = "#!/bin/bash\npython3 lines.py NAME.gate\n";
const STEP: &str =
    "#!/bin/bash\nsrun --container-image=/images/python.sif python3 lines.py NAME.gate\n";

/// The script itself in the container, or an inner step of a script on the host.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Batch,
    Step,
}

fn linuxproc() -> Result<Cluster> {
    with(&Spec {
        proctrack: Proctrack::Linuxproc,
        ..spec()?
    })
}

fn submit(cluster: &Cluster, engine: &str, name: &str, kind: Kind) -> Result<u32> {
    let mut options = options(engine, name);
    if kind == Kind::Batch {
        options.push("--container-image=/images/python.sif".into());
    }
    let script = if kind == Kind::Batch { SCRIPT } else { STEP };
    sbatch(cluster, &options, &script.replace("NAME", name))
}

fn pre_empted(engine: &str, kind: Kind) -> Result<()> {
    if !have(engine)? {
        return Ok(());
    }
    let cluster = linuxproc()?;
    let job = submit(&cluster, engine, "lines", kind)?;
    let checked = || {
        let first = node(&cluster, job)?;
        wait_progress(&cluster, "lines", 20)?;
        let intruder = Intruder::on(&cluster, &first)?;
        let second = wait_run(&cluster, job, 1)?;
        ensure!(first != second, "it went on on {second}");
        wait_progress(&cluster, "lines", 20)?;
        intruder.leave(&cluster)?;
        open_gate(&cluster, "lines")?;
        let end = cluster.wait_end(job, LIMIT)?;
        ensure!(end["JobState"] == "COMPLETED", "{end:?}");
        exact(&output(&cluster, "lines")?)?;
        cluster.wait_nothing_left(LIMIT)
    };
    explained(&cluster, "lines", checked())
}

#[test]
fn a_batch_container_survives_to_be_saved_dmtcp() -> Result<()> {
    pre_empted("dmtcp", Kind::Batch)
}

#[test]
fn a_batch_container_survives_to_be_saved_criu() -> Result<()> {
    pre_empted("criu", Kind::Batch)
}

#[test]
fn a_step_survives_to_be_saved_dmtcp() -> Result<()> {
    pre_empted("dmtcp", Kind::Step)
}

#[test]
fn a_step_survives_to_be_saved_criu() -> Result<()> {
    pre_empted("criu", Kind::Step)
}

#[test]
fn suspended_it_stands_still_and_cancelled_it_leaves_nothing() -> Result<()> {
    let cluster = linuxproc()?;
    for (name, kind) in [("batch", Kind::Batch), ("step", Kind::Step)] {
        let job = submit(&cluster, "criu", name, kind)?;
        explained(&cluster, name, suspend_and_cancel(&cluster, name, job))?;
    }
    Ok(())
}

fn suspend_and_cancel(cluster: &Cluster, name: &str, job: u32) -> Result<()> {
    let as_root = |command: &str| cluster.run("root", command)?.ok();
    wait_progress(cluster, name, 20)?;
    as_root(&format!("scontrol suspend {job}"))?;
    until(|| states(cluster).iter().all(|state| *state == 'T')).context("it was not stopped")?;
    as_root(&format!("scontrol resume {job}"))?;
    wait_progress(cluster, name, 20).context("it stayed stopped")?;
    as_root(&format!("scontrol suspend {job}"))?;
    cluster.run("alice", &format!("scancel {job}"))?.ok()?;
    let end = cluster.wait_end(job, LIMIT)?;
    ensure!(end["JobState"] == "CANCELLED", "{end:?}");
    cluster.wait_nothing_left(LIMIT)
}

/// The states, as proc_pid_stat(5) has them, of the application's processes.
fn states(cluster: &Cluster) -> Vec<char> {
    let of = |pid: i32| {
        let path = cluster.path(format!("/proc/{pid}/stat"));
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let after = text.rsplit_once(") ").map_or("", |(_, after)| after);
        after.chars().next().unwrap_or('?')
    };
    let processes = cluster.processes();
    let mut application = processes.iter().filter(|process| process.comm == "python3");
    let states: Vec<char> = application
        .by_ref()
        .map(|process| of(process.pid))
        .collect();
    if states.is_empty() { vec!['?'] } else { states }
}

fn until(happened: impl Fn() -> bool) -> Result<()> {
    let begun = Instant::now();
    while !happened() {
        ensure!(begun.elapsed() < LIMIT, "not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
