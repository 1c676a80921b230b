//! `bench`: what a job pays. Prints a table: the plugin's cost for a job that did not ask, and for
//! each engine how long a checkpoint and a restart of a given amount of memory take.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::{Cluster, Spec};
use serde_json::Value;

/// Steps per measurement of the plugin's cost.
const STEPS: usize = 40;
/// Memory of the measured application, in MiB, all of it written and random.
const SIZES: [u32; 2] = [64, 1024];
const LIMIT: Duration = Duration::from_secs(300);

const PROGRAM: &str = "\
import sys, time, numpy
field = numpy.random.default_rng(1).random(int(sys.argv[1]) * 131072)
print('ready', flush=True)
while True:
    field[0] += 1
    time.sleep(0.01)
";

fn main() -> ExitCode {
    match plugin_cost().and_then(|()| engines()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn spec() -> Result<Spec> {
    Ok(Spec {
        plugin: Some(built("libcontainer_checkpoint.so")?),
        helper: Some(built("container-checkpoint")?),
        ..Spec::default()
    })
}

/// Times `srun true` on two clusters in turns, one with the plugin and one without.
fn plugin_cost() -> Result<()> {
    let with = Cluster::start(&spec()?)?;
    let without = Cluster::start(&Spec::default())?;
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..STEPS {
        for (cluster, times) in [&without, &with].into_iter().zip(&mut times) {
            let line = "start=$(date +%s%N); srun true && echo $((($(date +%s%N) - start) / 1000))";
            let microseconds = cluster.run("alice", line)?.ok()?;
            times.push(
                microseconds
                    .trim()
                    .parse::<u64>()
                    .context("no number from date")?,
            );
        }
    }
    for (name, times) in ["without the plugin", "with the plugin"]
        .iter()
        .zip(&mut times)
    {
        times.sort_unstable();
        let at = |part: usize| times[(times.len() - 1) * part / 4] as f64 / 1000.0;
        println!(
            "srun true, {name:18}  median {:6.1} ms, quartiles {:6.1} and {:6.1} ms",
            at(2),
            at(1),
            at(3)
        );
    }
    Ok(())
}

/// Saves and restarts one job for each engine and size.
fn engines() -> Result<()> {
    let cluster = Cluster::start(&spec()?)?;
    cluster.write("alice", "/home/alice/bench.py", PROGRAM)?;
    let engines: &[&str] = if cluster.dmtcp().is_some() {
        &["dmtcp", "criu"]
    } else {
        println!("dmtcp: not on this machine");
        &["criu"]
    };
    for engine in engines {
        for size in SIZES {
            let (bytes, saved, restarted) =
                one(&cluster, engine, size).with_context(|| format!("{engine} with {size} MiB"))?;
            println!(
                "{engine:5} {size:5} MiB of memory: {:5.0} MB saved in {:5.2} s, running again \
                 after {:5.2} s",
                bytes as f64 / 1e6,
                saved as f64 / 1e3,
                restarted as f64 / 1e3
            );
        }
    }
    Ok(())
}

/// Bytes of a checkpoint, milliseconds until it is committed, and until the restart runs.
fn one(cluster: &Cluster, engine: &str, size: u32) -> Result<(u64, u64, u64)> {
    let name = format!("{engine}-{size}");
    let job = cluster.sbatch(
        "alice",
        &[
            &format!("--container-checkpoint={name}"),
            "--container-image=/images/python.sif",
            &format!("--container-checkpoint-engine={engine}"),
            &format!("--output={name}.out"),
        ],
        &format!("#!/bin/bash\npython3 bench.py {size}\n"),
    )?;
    cluster.wait_file(format!("/home/alice/{name}.out"), LIMIT, |text| {
        text.contains("ready")
    })?;
    cluster
        .run("alice", &format!("scontrol requeue {job}"))?
        .ok()?;
    let history = format!("/home/alice/.container-checkpoint/{name}/history.jsonl");
    let text = cluster.wait_file(&history, LIMIT, |text| {
        event(text, "restarted", "took").is_some()
    })?;
    cluster.run("alice", &format!("scancel {job}"))?.ok()?;
    cluster.wait_end(job, LIMIT)?;
    let number = |what: &str, key: &str| {
        event(&text, what, key).with_context(|| format!("no {what} with {key} in {text}"))
    };
    Ok((
        number("checkpointed", "bytes")?,
        number("checkpointed", "took")?,
        number("restarted", "took")?,
    ))
}

/// A number of the first event of a kind in a history.
fn event(history: &str, kind: &str, key: &str) -> Option<u64> {
    let mut events = history
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    events.find(|event| event["event"] == kind)?[key].as_u64()
}

/// A program of the same build as this one.
fn built(name: &str) -> Result<PathBuf> {
    let here = std::env::current_exe().context("cannot find this program's own path")?;
    let path = here.with_file_name(name);
    if !path.exists() {
        bail!("{} is not built; run cargo build --release", path.display());
    }
    Ok(path)
}
