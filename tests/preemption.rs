//! Pre-emption, requeue and resume, for both engines: a batch script in a container, and a step of
//! a script on the host; the output has to be that of an uninterrupted run.

mod support;

use anyhow::{Result, ensure};
use lab::{Cluster, Release, Spec};
use support::*;

#[test]
fn a_batch_container_is_preempted_twice_dmtcp() -> Result<()> {
    batch("dmtcp")
}

#[test]
fn a_batch_container_is_preempted_twice_criu() -> Result<()> {
    batch("criu")
}

#[test]
fn a_step_is_preempted_dmtcp() -> Result<()> {
    step("dmtcp")
}

#[test]
fn a_step_is_preempted_criu() -> Result<()> {
    step("criu")
}

/// Slurm empties a job's output file when it requeues the job, unless it was told to append.
#[test]
fn output_is_there_without_append() -> Result<()> {
    let cluster = cluster()?;
    for (name, batch) in [("script", true), ("steps", false)] {
        let mut options = options("criu", name);
        options.retain(|option| !option.starts_with("--open-mode"));
        let script = if batch {
            options.push("--container-image=/images/python.sif".into());
            format!("#!/bin/bash\npython3 lines.py {name}.gate\n")
        } else {
            format!(
                "#!/bin/bash\nsrun --container-image=/images/python.sif python3 lines.py {name}.gate\n"
            )
        };
        let job = sbatch(&cluster, &options, &script)?;
        explained(
            &cluster,
            name,
            (|| {
                let first = node(&cluster, job)?;
                wait_progress(&cluster, name, 20)?;
                let intruder = Intruder::on(&cluster, &first)?;
                wait_run(&cluster, job, 1)?;
                open_gate(&cluster, name)?;
                let end = cluster.wait_end(job, LIMIT)?;
                ensure!(end["JobState"] == "COMPLETED", "{end:?}");
                exact(&output(&cluster, name)?)?;
                intruder.leave(&cluster)
            })(),
        )?;
    }
    cluster.wait_nothing_left(LIMIT)
}

/// Slurm 24.05 and 24.11 start a job once more that was pre-empted in its grace time and has completed
/// since, and empty its output file for that.
#[test]
fn output_is_there_after_a_start_in_vain() -> Result<()> {
    let cluster = &with(&Spec {
        grace_time_s: 2,
        ..spec()?
    })?;
    let mut jobs = Vec::new();
    for (name, batch) in [("script", true), ("steps", false)] {
        let mut options = options("criu", name);
        options.retain(|option| !option.starts_with("--open-mode"));
        options.extend(["--partition=grace", "--exclude=n2"].map(ToOwned::to_owned));
        let run = format!("python3 lines.py {name}.gate; echo \"after $?\"");
        let script = if batch {
            options.push("--container-image=/images/python.sif".into());
            format!("#!/bin/bash\necho begin >> {name}.begun\n{run}\n")
        } else {
            format!("#!/bin/bash\nsrun --container-image=/images/python.sif {run}\n")
        };
        jobs.push((name, sbatch(cluster, &options, &script)?));
    }
    for (name, job) in &jobs {
        node(cluster, *job)?;
        explained(cluster, name, wait_progress(cluster, name, 20))?;
    }
    let intruder = Intruder::on(cluster, "n1")?;
    for (name, job) in &jobs {
        explained(
            cluster,
            name,
            (|| {
                cluster.wait_job(*job, LIMIT, |job| job["Restarts"] == "1")?;
                let anywhere = format!("scontrol update JobId={job} ExcNodeList=");
                cluster.run("root", &anywhere)?.ok()?;
                open_gate(cluster, name)
            })(),
        )?;
    }
    for (name, job) in &jobs {
        explained(
            cluster,
            name,
            (|| {
                cluster.wait_job(*job, LIMIT, |job| job["BatchFlag"] == "2")?;
                let end = cluster.wait_end(*job, LIMIT)?;
                ensure!(
                    end["JobState"] == "COMPLETED" && end["Restarts"] == "2",
                    "{end:?}"
                );
                let text = output(cluster, name)?;
                exact(&text)?;
                for once in ["end ", "after 0"] {
                    let count = text.lines().filter(|line| line.starts_with(once)).count();
                    ensure!(count == 1, "{count} lines with {once:?}:\n{text}");
                }
                Ok(())
            })(),
        )?;
    }
    let begun = std::fs::read_to_string(cluster.path("/home/alice/script.begun"))?;
    ensure!(
        begun == "begin\n",
        "the script ran more than once: {begun:?}"
    );
    intruder.leave(cluster)?;
    cluster.wait_nothing_left(LIMIT)
}

#[test]
fn a_step_uses_its_grace_time_2205() -> Result<()> {
    grace(Release::OldSlurm, "criu", false)
}

#[test]
fn a_step_uses_its_grace_time_2605() -> Result<()> {
    grace(Release::Sid, "dmtcp", false)
}

#[test]
fn a_batch_container_is_saved_at_the_end_of_its_grace_time_2205() -> Result<()> {
    grace(Release::OldSlurm, "dmtcp", true)
}

/// Pre-empts `job` once it has come somewhere, and sees it complete on the other node.
fn preempted(cluster: &Cluster, job: u32, name: &str) -> Result<()> {
    let first = node(cluster, job)?;
    wait_progress(cluster, name, 20)?;
    let intruder = Intruder::on(cluster, &first)?;
    let second = wait_run(cluster, job, 1)?;
    ensure!(first != second, "it went on on {second}");
    wait_progress(cluster, name, 20)?;
    intruder.leave(cluster)?;
    open_gate(cluster, name)?;
    let end = cluster.wait_end(job, LIMIT)?;
    ensure!(end["JobState"] == "COMPLETED", "{end:?}");
    Ok(())
}

/// Steps hear of a pre-emption at once and have a grace time; the batch step hears nothing until it
/// is over. Up to 23.11 a job that ends in its grace time is lost, unless it asks to be requeued.
fn grace(release: Release, engine: &str, batch: bool) -> Result<()> {
    if !have(engine)? {
        return Ok(());
    }
    let cluster = with(&Spec { release, ..spec()? })?;
    let name = "grace";
    let job = submit_lines(&cluster, (engine, name), batch, &["--partition=grace"])?;
    explained(
        &cluster,
        name,
        (|| {
            preempted(&cluster, job, name)?;
            exact(&output(&cluster, name)?)?;
            cluster.wait_nothing_left(LIMIT)
        })(),
    )
}

fn batch(engine: &str) -> Result<()> {
    if !have(engine)? {
        return Ok(());
    }
    let cluster = cluster()?;
    let name = "batch";
    let mut options = options(engine, name);
    options.push("--container-image=/images/python.sif".into());
    let job = sbatch(
        &cluster,
        &options,
        "#!/bin/bash\necho begin\npython3 lines.py batch.gate\n",
    )?;
    explained(
        &cluster,
        name,
        (|| {
            let mut nodes = vec![node(&cluster, job)?];
            for run in 1..=2 {
                wait_progress(&cluster, name, 20)?;
                let intruder = Intruder::on(&cluster, &nodes[run - 1])?;
                nodes.push(wait_run(&cluster, job, run as u32)?);
                wait_progress(&cluster, name, 20)?;
                intruder.leave(&cluster)?;
            }
            ensure!(
                nodes[0] != nodes[1],
                "it went on on the node from which it was driven: {nodes:?}"
            );
            open_gate(&cluster, name)?;
            let end = cluster.wait_end(job, LIMIT)?;
            ensure!(end["JobState"] == "COMPLETED", "{end:?}");
            let text = output(&cluster, name)?;
            exact(&text)?;
            ensure!(
                text.matches("begin\n").count() == 1,
                "the script began anew:\n{text}"
            );
            cluster.wait_nothing_left(LIMIT)
        })(),
    )
}

fn step(engine: &str) -> Result<()> {
    if !have(engine)? {
        return Ok(());
    }
    let cluster = cluster()?;
    let name = "step";
    let script = "#!/bin/bash\n\
        srun --container-image=/images/python.sif python3 lines.py step.gate 7\n\
        echo \"after: $?\"\n";
    let mut options = options(engine, name);
    // Meant for the first run; a requeued job has it still.
    options.push("--container-checkpoint-restart=fresh".into());
    let job = sbatch(&cluster, &options, script)?;
    explained(
        &cluster,
        name,
        (|| {
            preempted(&cluster, job, name)?;
            let text = output(&cluster, name)?;
            exact(&text)?;
            let after: Vec<&str> = text
                .lines()
                .filter(|line| line.starts_with("after"))
                .collect();
            ensure!(
                after == ["after: 7"],
                "the script went on before its time: {after:?}"
            );
            cluster.wait_nothing_left(LIMIT)
        })(),
    )
}
