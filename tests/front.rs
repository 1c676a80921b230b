//! `proctrack/linuxproc`, where Slurm signals every process below its own: the application survives
//! the signal that ends the job, is saved, and goes on; and nothing is left when it has to end.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::{Cluster, Proctrack, Spec};

/// Longer than any wait takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(180);

/// Prints a line with each step, and would die of SIGTERM.
const COUNT: &str = "import time\nfor step in range(60):\n    print('step', step, flush=True)\n    time.sleep(0.2)\n";
const STEPS: usize = 60;

/// The same job twice: the script itself in the container, and an inner step.
const BATCH: &str = "#!/bin/sh\nexec python3 /home/alice/count.py\n";
const STEP: &str =
    "#!/bin/sh\nsrun --container-image=/images/python.sif python3 /home/alice/count.py\n";

fn cluster() -> Result<Cluster> {
    let cluster = Cluster::start(&Spec {
        proctrack: Proctrack::Linuxproc,
        plugin: Some(built("libcontainer_checkpoint.so")?),
        helper: Some(built("container-checkpoint")?),
        ..Spec::default()
    })?;
    cluster.write("alice", "/home/alice/count.py", COUNT)?;
    Ok(cluster)
}

fn submit(cluster: &Cluster, name: &str, batch: bool) -> Result<u32> {
    let (option, output) = (
        format!("--container-checkpoint={name}"),
        format!("{name}.out"),
    );
    let errors = format!("{name}.err");
    let mut arguments = vec!["--open-mode=append", "-o", &output, "-e", &errors, &option];
    if batch {
        arguments.push("--container-image=/images/python.sif");
    }
    cluster.sbatch("alice", &arguments, if batch { BATCH } else { STEP })
}

fn wait_step(cluster: &Cluster, name: &str, step: usize) -> Result<()> {
    let word = format!("step {step}\n");
    until(|| {
        let errors = text(cluster, &format!("{name}.err"));
        ensure!(!errors.contains("error: "), "{errors}");
        Ok(text(cluster, &format!("{name}.out")).contains(&word))
    })
    .with_context(|| word)
}

fn text(cluster: &Cluster, file: &str) -> String {
    std::fs::read_to_string(cluster.path(format!("/home/alice/{file}"))).unwrap_or_default()
}

fn pre_empted(batch: bool) -> Result<()> {
    let cluster = cluster()?;
    let name = if batch { "batch" } else { "step" };
    let job = submit(&cluster, name, batch)?;
    wait_step(&cluster, name, 5)?;
    let node = cluster.job(job)?["NodeList"].clone();
    let urgent = ["-p", "urgent", "-w", &node, "--exclusive"];
    cluster.sbatch("bob", &urgent, "#!/bin/sh\ntrue\n")?;
    cluster.wait_job(job, LIMIT, |job| job["Restarts"] == "1")?;
    let end = cluster.wait_end(job, LIMIT)?;
    let (output, errors) = (
        text(&cluster, &format!("{name}.out")),
        text(&cluster, &format!("{name}.err")),
    );
    ensure!(end["JobState"] == "COMPLETED", "{end:?}\n{errors}");
    let expected: String = (0..STEPS).map(|step| format!("step {step}\n")).collect();
    ensure!(output == expected, "{output}\n{errors}");
    ensure!(errors.contains("goes on from generation 1"), "{errors}");
    cluster.wait_nothing_left(LIMIT)
}

#[test]
fn a_script_in_a_container_is_saved_and_goes_on() -> Result<()> {
    pre_empted(true)
}

#[test]
fn a_step_is_saved_and_goes_on() -> Result<()> {
    pre_empted(false)
}

#[test]
fn cancelled_and_suspended_jobs() -> Result<()> {
    let cluster = cluster()?;
    for batch in [true, false] {
        let name = if batch { "batch" } else { "step" };
        let job = submit(&cluster, name, batch)?;
        wait_step(&cluster, name, 2)?;
        let application = || {
            let found = cluster.processes();
            let mut found = found
                .iter()
                .filter(|process| process.args.ends_with("/count.py"));
            found
                .find(|process| process.args.starts_with("python3"))
                .map(|process| state(&cluster, process.pid))
        };
        cluster
            .run("root", &format!("scontrol suspend {job}"))?
            .ok()?;
        until(|| Ok(application() == Some('T'))).context("it was never stopped")?;
        cluster
            .run("root", &format!("scontrol resume {job}"))?
            .ok()?;
        until(|| Ok(application().is_some_and(|state| state != 'T')))
            .context("it stayed stopped")?;
        wait_step(&cluster, name, 8)?;
        cluster.run("alice", &format!("scancel {job}"))?.ok()?;
        let end = cluster.wait_end(job, LIMIT)?;
        ensure!(end["JobState"] == "CANCELLED", "{end:?}");
        cluster.wait_nothing_left(LIMIT)?;
    }
    Ok(())
}

/// The state of a process, as proc_pid_stat(5) has it.
fn state(cluster: &Cluster, pid: i32) -> char {
    let path = cluster.path(format!("/proc/{pid}/stat"));
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let after = text.rsplit_once(") ").map_or("", |(_, after)| after);
    after.chars().next().unwrap_or('?')
}

fn until(happened: impl Fn() -> Result<bool>) -> Result<()> {
    let begun = std::time::Instant::now();
    while !happened()? {
        ensure!(begun.elapsed() < LIMIT, "not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// A file that this workspace builds.
fn built(name: &str) -> Result<PathBuf> {
    // Cargo does not build another package's library for a test.
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "-q", "--locked", "--workspace"])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .output()?;
    if !output.status.success() {
        bail!("cargo: {}", String::from_utf8_lossy(&output.stderr));
    }
    let program = std::env::current_exe()?;
    let target = program.ancestors().nth(2).context("no target directory")?;
    Ok(target.join(name))
}
