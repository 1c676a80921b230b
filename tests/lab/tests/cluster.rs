//! The lab tried for itself: what the whole-system tests rely on.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Cluster, Proctrack, Release, Spec};

const LIMIT: Duration = Duration::from_secs(60);

/// Everything a cluster of a release has to be able to do.
fn works(release: Release, slurm: &str, proctrack: Proctrack) -> Result<()> {
    let cluster = Cluster::start(&Spec {
        release,
        proctrack,
        ..Spec::default()
    })?;
    let version = cluster.run("alice", "sinfo --version")?.ok()?;
    ensure!(
        version.starts_with(&format!("slurm-wlm {slurm}.")),
        "{version}"
    );

    for node in ["n1", "n2"] {
        let host = cluster
            .run("alice", &format!("srun -w {node} hostname"))?
            .ok()?;
        ensure!(host.trim() == node, "{host}");
    }
    let numpy = "srun apptainer exec /images/python.sif python3 -c 'import numpy; print(6 * 7)'";
    let output = cluster.run("alice", numpy)?;
    ensure!(
        output.stderr.is_empty(),
        "Apptainer is not quiet: {}",
        output.stderr
    );
    ensure!(output.ok()? == "42\n");
    let counted = cluster
        .run(
            "carol",
            "srun apptainer exec /images/static.sif counter 2 1",
        )?
        .ok()?;
    ensure!(counted.starts_with("count 1\ncount 2\nhash "), "{counted}");
    let iterated = "srun apptainer exec /images/openmp.sif iterate 20 10 16";
    let first = cluster.run("bob", iterated)?.ok()?;
    ensure!(first.lines().count() == 3, "{first}");
    ensure!(
        first
            == cluster
                .run("bob", &format!("OMP_NUM_THREADS=1 {iterated}"))?
                .ok()?
    );

    cluster.wait_nothing_left(LIMIT)
}

#[test]
fn old_slurm_works() -> Result<()> {
    works(Release::OldSlurm, "22.05", Proctrack::Linuxproc)
}

#[test]
fn trixie_works() -> Result<()> {
    works(Release::Trixie, "24.11", Proctrack::Cgroup)
}

#[test]
fn sid_works() -> Result<()> {
    works(Release::Sid, "26.05", Proctrack::Cgroup)
}

#[test]
fn batch_jobs_are_followed_and_pre_empted() -> Result<()> {
    let cluster = Cluster::start(&Spec {
        kill_wait_s: 5,
        ..Spec::default()
    })?;
    let script = "#!/bin/sh\necho run ${SLURM_RESTART_COUNT:-0} on $(hostname)\nsleep 1000\n";
    let low = cluster.sbatch("alice", &["-w", "n1", "-n2", "-o", "low.txt"], script)?;
    cluster.wait_file("/home/alice/low.txt", LIMIT, |text| {
        text.contains("run 0 on n1")
    })?;
    let high = cluster.sbatch(
        "bob",
        &["-p", "urgent", "-w", "n1", "-n2"],
        "#!/bin/sh\ntrue\n",
    )?;
    cluster.wait_job(low, LIMIT, |job| job["Restarts"] == "1")?;
    ensure!(cluster.wait_end(high, LIMIT)?["JobState"] == "COMPLETED");
    // The restart comes as soon as Slurm lets a requeued job run: that is what cred_expire is for.
    cluster.wait_file("/home/alice/low.txt", LIMIT, |text| {
        text.contains("run 1 on n1")
    })?;
    cluster.run("alice", &format!("scancel {low}"))?.ok()?;
    ensure!(cluster.wait_end(low, LIMIT)?["JobState"] == "CANCELLED");
    cluster.wait_nothing_left(LIMIT)
}

#[test]
fn a_lost_node_takes_its_processes_along_and_comes_back() -> Result<()> {
    let cluster = Cluster::start(&Spec::default())?;
    let job = cluster.sbatch("alice", &["-w", "n1"], "#!/bin/sh\nsetsid sleep 4321\n")?;
    cluster.wait_job(job, LIMIT, |job| job["JobState"] == "RUNNING")?;
    cluster.stop_node("n1")?;
    ensure!(
        !cluster
            .processes()
            .iter()
            .any(|process| process.args == "sleep 4321")
    );
    ensure!(cluster.run("alice", "srun -w n2 hostname")?.ok()? == "n2\n");
    cluster.start_node("n1")?;
    cluster.run("alice", &format!("scancel {job}"))?.ok()?;
    cluster.wait_end(job, LIMIT)?;
    ensure!(cluster.run("alice", "srun -w n1 hostname")?.ok()? == "n1\n");
    cluster.wait_nothing_left(LIMIT)
}

/// Processes and mounts of this host that show `directory`.
fn traces(directory: &Path) -> Result<Vec<String>> {
    let directory = directory.to_str().context("not UTF-8")?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        for file in ["mountinfo", "environ"] {
            let text = std::fs::read(entry.path().join(file)).unwrap_or_default();
            if String::from_utf8_lossy(&text).contains(directory) {
                found.push(format!("{} {file}", entry.path().display()));
            }
        }
    }
    Ok(found)
}

#[test]
fn nothing_is_left_of_a_cluster() -> Result<()> {
    let cluster = Cluster::start(&Spec {
        images: false,
        ..Spec::default()
    })?;
    let script = "#!/bin/sh\ntrap '' TERM HUP\nsetsid sleep 1000 &\nsleep 1000\n";
    let job = cluster.sbatch("alice", &[], script)?;
    cluster.wait_job(job, LIMIT, |job| job["JobState"] == "RUNNING")?;
    cluster
        .run("alice", "setsid sleep 1000 >/dev/null 2>&1 &")?
        .ok()?;
    let directory = cluster.directory().to_owned();
    // Seen here only where the host has this hierarchy mounted.
    let name = directory.file_name().context("no name")?;
    let group = Path::new("/sys/fs/cgroup/freezer").join(name);
    ensure!(
        !traces(&directory)?.is_empty(),
        "the test looks in the wrong place"
    );
    drop(cluster);
    ensure!(!directory.exists(), "{} is left", directory.display());
    ensure!(!group.exists(), "{} is left", group.display());
    let left = traces(&directory)?;
    ensure!(left.is_empty(), "there are left {left:?}");
    Ok(())
}

#[test]
fn a_cluster_that_cannot_start_says_why() -> Result<()> {
    let slurm_conf = "NoSuchKey=1\n".to_owned();
    let start = Cluster::start(&Spec {
        slurm_conf,
        images: false,
        ..Spec::default()
    });
    let error = start.err().context("the cluster started")?.to_string();
    ensure!(error.contains("NoSuchKey"), "{error}");
    Ok(())
}
