//! `demo`: a job, a pre-emption, the same job going on on another node, told as it happens; and the
//! check that its output is that of an uninterrupted run.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab::{Cluster, Job, Spec};

const USAGE: &str = "usage: demo [auto|dmtcp|criu]";
const PROGRAM: &str = include_str!("../../../programs/heat.py");
const IMAGE: &str = "/images/python.sif";

/// About half a minute of work: long enough to be interrupted in the middle.
const STEPS: u32 = 16_000;
const EVERY: u32 = 500;
/// The step from which on the urgent job may come.
const PREEMPT_AT: u32 = 5_000;

/// Longer than all of it takes on a slow machine.
const LIMIT: Duration = Duration::from_secs(400);
const POLL: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let engine = match arguments.as_slice() {
        [] | ["auto"] => {
            if lab::dmtcp().is_some() {
                "dmtcp"
            } else {
                "criu"
            }
        }
        ["dmtcp"] => "dmtcp",
        ["criu"] => "criu",
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match demo(engine) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What is told, with the time since the job was submitted.
struct Timeline(Instant);

impl Timeline {
    fn tell(&self, text: impl std::fmt::Display) {
        println!("{:6.1} s  {text}", self.0.elapsed().as_secs_f64());
        // So that it is seen at once where it goes to a file, too.
        if let Err(error) = std::io::stdout().flush() {
            eprintln!("demo: cannot write to standard output: {error}");
        }
    }
}

/// Whether the output was exact.
fn demo(engine: &str) -> Result<bool> {
    if engine == "dmtcp" && lab::dmtcp().is_none() {
        bail!(
            "there is no dmtcp_launch in PATH. Install DMTCP as its own instructions say, or take \
             CRIU: make demo ENGINE=criu"
        );
    }
    println!("engine: {engine}; starting a cluster of two nodes, n1 and n2");
    let cluster = Cluster::start(&Spec {
        plugin: Some(built("libcontainer_checkpoint.so")?),
        helper: Some(built("container-checkpoint")?),
        // As sites with requeued jobs have it: without, Slurm empties the output at each requeue.
        slurm_conf: "JobFileAppend=1\n".into(),
        ..Spec::default()
    })?;
    cluster.write("alice", "/home/alice/heat.py", PROGRAM)?;
    let script = format!("#!/bin/bash\npython3 heat.py {STEPS} {EVERY}\n");
    cluster.write("alice", "/home/alice/job.sh", &script)?;

    let job = std::thread::scope(|scope| -> Result<_> {
        // At the same time, to save time: the other processor is idle.
        let reference = scope.spawn(|| {
            let line = format!(
                "apptainer exec {IMAGE} python3 heat.py {STEPS} {EVERY} > uninterrupted.out"
            );
            cluster.run_for("alice", &line, LIMIT)?.ok()
        });
        let job = interrupted(&cluster, engine)?;
        println!("          (waiting for the uninterrupted run to compare with)");
        reference
            .join()
            .map_err(|_| anyhow::anyhow!("the thread of the uninterrupted run panicked"))?
            .context("the uninterrupted run failed")?;
        Ok(job)
    })?;
    let field = |name: &str| job.get(name).map_or("?", String::as_str);
    if field("ExitCode") != "0:0" || field("Restarts") == "0" {
        println!(
            "NOT AS EXPECTED: exit code {}, {} restarts",
            field("ExitCode"),
            field("Restarts")
        );
        print!("{}", text(&cluster, "/home/alice/heat.err"));
        return Ok(false);
    }
    let shown = cluster
        .run("alice", "container-checkpoint show heat")?
        .ok()?;
    println!("\n$ container-checkpoint show heat\n{shown}");
    compare(&cluster)
}

/// Submits the job, lets another one take its node, and follows it to its end.
fn interrupted(cluster: &Cluster, engine: &str) -> Result<Job> {
    let option = format!("--container-checkpoint-engine={engine}");
    let image = format!("--container-image={IMAGE}");
    let arguments = [
        "--container-checkpoint=heat",
        &image,
        &option,
        "-o",
        "heat.out",
        "-e",
        "heat.err",
        "job.sh",
    ];
    let timeline = Timeline(Instant::now());
    println!("\nalice$ sbatch {}", arguments.join(" "));
    let id = cluster.sbatch("alice", &arguments, "")?;
    timeline.tell(format!(
        "job {id} submitted: the heat equation, {STEPS} steps in NumPy"
    ));

    let mut seen = (String::new(), String::new());
    let mut told = 0;
    let mut urgent = false;
    let mut resumed_after = None;
    while timeline.0.elapsed() < LIMIT {
        let job = cluster.job(id)?;
        let field = |name: &str| job.get(name).cloned().unwrap_or_default();
        let step = last_step(&text(cluster, "/home/alice/heat.out"));
        // The helper's own lines tell most of the story.
        let errors = text(cluster, "/home/alice/heat.err");
        for line in whole_lines(&errors, &mut told) {
            timeline.tell(format!("  {line}"));
        }
        let now = (field("JobState"), field("NodeList"));
        if now != seen {
            let (state, node) = (now.0.as_str(), now.1.as_str());
            match state {
                "RUNNING" => timeline.tell(format!("job {id} runs on {node}")),
                "COMPLETED" => timeline.tell(format!("job {id} has completed on {node}")),
                _ => timeline.tell(format!("job {id} is {state}")),
            }
            if state == "RUNNING" && urgent {
                resumed_after = Some(step);
            }
            seen = now;
        }
        if let Some(before) = resumed_after
            && step > before
        {
            timeline.tell(format!(
                "the application has gone on: step {before}, then step {step}"
            ));
            resumed_after = None;
        }
        if !urgent && step >= PREEMPT_AT {
            let node = field("NodeList");
            cluster.sbatch(
                "bob",
                &[
                    "-p",
                    "urgent",
                    "-w",
                    &node,
                    "--exclusive",
                    "-o",
                    "/dev/null",
                ],
                "#!/bin/sh\nexec sleep 1000\n",
            )?;
            timeline.tell(format!(
                "at step {step}: bob's urgent job wants {node}, pre-emption"
            ));
            urgent = true;
        }
        if ended(&seen.0) {
            return Ok(job);
        }
        std::thread::sleep(POLL);
    }
    bail!(
        "job {id} did not end in {LIMIT:?}; its standard error:\n{}\n{}",
        text(cluster, "/home/alice/heat.err"),
        cluster.logs()
    )
}

fn ended(state: &str) -> bool {
    [
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "TIMEOUT",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
    ]
    .contains(&state)
}

/// Compares the outputs, which end with the hash of the final field.
fn compare(cluster: &Cluster) -> Result<bool> {
    let interrupted = text(cluster, "/home/alice/heat.out");
    let uninterrupted = text(cluster, "/home/alice/uninterrupted.out");
    let hash = |text: &str| text.lines().last().unwrap_or_default().to_owned();
    println!(
        "\nuninterrupted: {} lines, {}",
        uninterrupted.lines().count(),
        hash(&uninterrupted)
    );
    println!(
        "interrupted:   {} lines, {}",
        interrupted.lines().count(),
        hash(&interrupted)
    );
    if !uninterrupted.contains("sha256") {
        bail!("the uninterrupted run printed no hash:\n{uninterrupted}");
    }
    let exact = interrupted == uninterrupted;
    println!(
        "{}",
        if exact {
            "the same, byte for byte"
        } else {
            "THEY DIFFER"
        }
    );
    if !exact {
        println!("--- the interrupted job's output\n{interrupted}");
    }
    Ok(exact)
}

/// A file of the cluster, empty while it is missing.
fn text(cluster: &Cluster, path: &str) -> String {
    std::fs::read(cluster.path(path)).map_or(String::new(), |bytes| {
        String::from_utf8_lossy(&bytes).into()
    })
}

/// The complete lines behind the first `told` bytes, which then count as told.
fn whole_lines<'a>(text: &'a str, told: &mut usize) -> Vec<&'a str> {
    let new = text.get(*told..).unwrap_or_default();
    let Some(end) = new.rfind('\n') else {
        return Vec::new();
    };
    *told += end + 1;
    new[..end].lines().collect()
}

/// The number of the last step that the program has printed.
fn last_step(output: &str) -> u32 {
    let steps = output.lines().filter_map(|line| line.strip_prefix("step "));
    steps
        .filter_map(|rest| rest.split_once(':')?.0.parse().ok())
        .next_back()
        .unwrap_or(0)
}

/// A program of the same build as this one.
fn built(name: &str) -> Result<PathBuf> {
    let here = std::env::current_exe().context("cannot find this program's own path")?;
    let path = here.with_file_name(name);
    if !path.exists() {
        bail!("{} is not built; run cargo build", path.display());
    }
    Ok(path)
}
