//! What the whole-system tests share: a cluster with plugin and helper, the engines to try, jobs
//! whose output proves that nothing was lost.

#![allow(dead_code)] // each test program uses a part of it

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use lab::{Cluster, Spec};

/// For anything that takes seconds on an idle machine.
pub const LIMIT: Duration = Duration::from_secs(180);

/// The program whose output proves a resume; see there.
pub const LINES: &str = include_str!("programs/lines.py");

/// A file that this workspace builds.
pub fn built(name: &str) -> Result<PathBuf> {
    // Cargo does not build another package's library for a test.
    static BUILD: OnceLock<std::io::Result<std::process::Output>> = OnceLock::new();
    let build = BUILD.get_or_init(|| {
        Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["build", "-q", "--locked", "--workspace"])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
            .output()
    });
    match build {
        Ok(output) if output.status.success() => {}
        Ok(output) => bail!("cargo: {}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => bail!("cargo could not be run: {error}"),
    }
    let program = std::env::current_exe()?;
    let target = program.ancestors().nth(2).context("no target directory")?;
    let path = target.join(name);
    ensure!(path.is_file(), "cargo did not build {}", path.display());
    Ok(path)
}

/// A cluster's specification with plugin and helper.
pub fn spec() -> Result<Spec> {
    Ok(Spec {
        plugin: Some(built("libcontainer_checkpoint.so")?),
        helper: Some(built("container-checkpoint")?),
        ..Spec::default()
    })
}

/// A cluster with plugin and helper, and lines.py in alice's home.
pub fn cluster() -> Result<Cluster> {
    with(&spec()?)
}

pub fn with(spec: &Spec) -> Result<Cluster> {
    let cluster = Cluster::start(spec)?;
    cluster.write("alice", "/home/alice/lines.py", LINES)?;
    Ok(cluster)
}

/// A cluster of a site without the plugin, and alice's own copy of the helper in her `~/bin`.
pub fn without_plugin(spec: &Spec) -> Result<Cluster> {
    let cluster = with(spec)?;
    cluster.run("alice", "mkdir bin")?.ok()?;
    let helper = cluster.path("/home/alice/bin/container-checkpoint");
    std::fs::copy(built("container-checkpoint")?, &helper).context("the helper")?;
    Ok(cluster)
}

/// Whether DMTCP is here. Says loudly what is skipped where it is not, and fails where it has to
/// be.
pub fn have(engine: &str) -> Result<bool> {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    Ok(engine != "dmtcp" || lab::require_dmtcp(&test)?.is_some())
}

/// A batch job's options for `engine` and the checkpoint `name`. Both streams go to `name.out`.
pub fn options(engine: &str, name: &str) -> Vec<String> {
    vec![
        format!("--container-checkpoint={name}"),
        format!("--container-checkpoint-engine={engine}"),
        format!("--output={name}.out"),
        "--open-mode=append".into(),
        format!("--job-name={name}"),
    ]
}

pub fn sbatch(cluster: &Cluster, options: &[String], script: &str) -> Result<u32> {
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    cluster.sbatch("alice", &options, script)
}

/// Submits lines.py in a container, with `more` options: as the batch script itself, or as its step.
pub fn submit_lines(
    cluster: &Cluster,
    (engine, name): (&str, &str),
    batch: bool,
    more: &[&str],
) -> Result<u32> {
    submit_program(
        cluster,
        (engine, name),
        batch,
        more,
        &format!("lines.py {name}.gate"),
    )
}

/// The same with any `program` and arguments of Python.
pub fn submit_program(
    cluster: &Cluster,
    (engine, name): (&str, &str),
    batch: bool,
    more: &[&str],
    program: &str,
) -> Result<u32> {
    let image = "--container-image=/images/python.sif";
    let mut options = options(engine, name);
    options.extend(more.iter().map(ToString::to_string));
    let script = if batch {
        options.push(image.into());
        format!("#!/bin/bash\npython3 {program}\n")
    } else {
        format!("#!/bin/bash\nsrun {image} python3 {program}\n")
    };
    sbatch(cluster, &options, &script)
}

/// The output of a job, by its checkpoint name.
pub fn output(cluster: &Cluster, name: &str) -> Result<String> {
    let path = cluster.path(format!("/home/alice/{name}.out"));
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// Waits until lines.py has written at least `count` lines more than it has by now.
pub fn wait_progress(cluster: &Cluster, name: &str, count: usize) -> Result<usize> {
    let path = format!("/home/alice/{name}.out");
    let now = numbers(&std::fs::read_to_string(cluster.path(&path)).unwrap_or_default()).len();
    let text = cluster.wait_file(&path, LIMIT, |text| numbers(text).len() >= now + count)?;
    Ok(numbers(&text).len())
}

/// The numbered lines of lines.py in an output.
pub fn numbers(text: &str) -> Vec<u64> {
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// Opens the gate of lines.py.
pub fn open_gate(cluster: &Cluster, name: &str) -> Result<()> {
    cluster.write("alice", format!("/home/alice/{name}.gate"), "")
}

/// Checks that an output of lines.py is that of one uninterrupted run: every line once, in order,
/// and the end that memory has to lead to.
pub fn exact(text: &str) -> Result<()> {
    let numbers = numbers(text);
    let mut state: u64 = 1;
    for (index, number) in numbers.iter().enumerate() {
        ensure!(
            *number == index as u64,
            "line {index} of the output is {number}:\n{}",
            around(text, &number.to_string())
        );
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(*number);
    }
    let last = text.lines().find(|line| line.starts_with("end "));
    let expected = format!("end {} {state}", numbers.len());
    ensure!(last == Some(&expected), "{last:?} instead of {expected:?}");
    Ok(())
}

fn around(text: &str, line: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let at = lines.iter().rposition(|other| *other == line).unwrap_or(0);
    lines[at.saturating_sub(5)..lines.len().min(at + 5)].join("\n")
}

/// A job of higher priority that takes a whole node until it is cancelled.
pub struct Intruder(u32);

impl Intruder {
    pub fn on(cluster: &Cluster, node: &str) -> Result<Intruder> {
        let options = [
            "--partition=urgent",
            "--exclusive",
            "--nodelist",
            node,
            "--output=/dev/null",
        ];
        let id = cluster.sbatch("bob", &options, "#!/bin/sh\nsleep 3600\n")?;
        Ok(Intruder(id))
    }

    pub fn leave(self, cluster: &Cluster) -> Result<()> {
        cluster
            .run("bob", &format!("scancel {}", self.0))?
            .ok()
            .map(drop)
    }
}

/// The node on which a running job is.
pub fn node(cluster: &Cluster, job: u32) -> Result<String> {
    let view = cluster.wait_job(job, LIMIT, |job| job["JobState"] == "RUNNING")?;
    Ok(view["NodeList"].clone())
}

/// Waits until a job has been requeued into run `run` and runs there.
pub fn wait_run(cluster: &Cluster, job: u32, run: u32) -> Result<String> {
    let view = cluster.wait_job(job, LIMIT, |job| {
        job["JobState"] == "RUNNING" && job["Restarts"] == run.to_string()
    })?;
    Ok(view["NodeList"].clone())
}

/// Puts what a job wrote to an error, so that a failed test says why.
pub fn explained<T>(cluster: &Cluster, name: &str, result: Result<T>) -> Result<T> {
    result.map_err(|error| {
        let text = output(cluster, name).unwrap_or_default();
        let said: Vec<&str> = text
            .lines()
            .filter(|line| line.parse::<u64>().is_err())
            .collect();
        anyhow!(
            "{error:#}\nwhat the job said:\n{}\n{}",
            said.join("\n"),
            cluster.logs()
        )
    })
}
