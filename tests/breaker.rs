//! What becomes of the job: held when its runs come to nothing, told of in its comment, saved or not
//! when it is cancelled, warned when Slurm's notice is too short. One cluster, jobs side by side.

mod support;

use anyhow::{Context, Result, ensure};
use lab::{Cluster, Job, Release, Spec};
use support::*;

const IMAGE: &str = "--container-image=/images/python.sif";

/// The expected duration of a checkpoint is made long by a large factor, since a short KillWait would
/// endanger all.
const CONFIG: &str = "progress_runs: 2\ncomment: on\non_cancel: discard\nsafety: 10\nmtbf: 1m\n";

const QUIET: &str = "--container-checkpoint-interval=off";

fn submit(cluster: &Cluster, name: &str, more: &[&str], script: &str) -> Result<u32> {
    let mut options = options("criu", name);
    options.extend(more.iter().map(ToString::to_string));
    sbatch(cluster, &options, script)
}

/// lines.py as the batch script.
fn lines(cluster: &Cluster, name: &str, more: &[&str]) -> Result<u32> {
    submit_lines(cluster, ("criu", name), true, more)
}

/// What alice gets from a line of shell, which has to succeed.
fn run(cluster: &Cluster, line: &str) -> Result<String> {
    let output = cluster.run("alice", line)?;
    output.ok().with_context(|| line.to_owned())
}

fn wait_said(cluster: &Cluster, name: &str, what: &str, count: usize) -> Result<String> {
    let path = format!("/home/alice/{name}.out");
    cluster.wait_file(&path, LIMIT, |text| text.matches(what).count() >= count)
}

fn comment(cluster: &Cluster, job: u32) -> Result<String> {
    let text = run(cluster, &format!("squeue --noheader -o %k -j {job}"))?;
    Ok(text.trim().to_owned())
}

/// The triggers of a name's generations, oldest first.
fn triggers(cluster: &Cluster, name: &str) -> Result<Vec<String>> {
    let text = run(cluster, &format!("container-checkpoint list {name} --json"))?;
    let answer: serde_json::Value = serde_json::from_str(&text)?;
    let list = answer["cells"][0]["list"].as_array().context(text)?;
    let triggers = list.iter().map(|generation| {
        generation["manifest"]["trigger"]
            .as_str()
            .map(str::to_owned)
    });
    triggers.collect::<Option<_>>().context("no trigger")
}

type Case = fn(&Cluster) -> Result<()>;

#[test]
fn what_becomes_of_a_job() -> Result<()> {
    // The release in which a requeued job starts again soonest.
    let cluster = &with(&Spec {
        release: Release::Sid,
        cpus: 16,
        config: Some(CONFIG.into()),
        ..spec()?
    })?;
    let cases: [(&str, Case); 5] = [
        ("held", held),
        ("comment", comments),
        ("discard", discarded),
        ("notice", notice),
        ("grace time", grace_time),
    ];
    let failed: Vec<String> = std::thread::scope(|scope| {
        let threads = cases.map(|(name, case)| (name, scope.spawn(move || case(cluster))));
        let ends = threads.map(|(name, thread)| match thread.join() {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("{name}: {error:#}")),
            Err(_) => Some(format!("{name} panicked")),
        });
        ends.into_iter().flatten().collect()
    });
    ensure!(failed.is_empty(), "{}", failed.join("\n\n"));
    cluster.wait_nothing_left(LIMIT)
}

fn is_held(job: &Job) -> bool {
    job["JobState"] == "PENDING" && job["Reason"] == "job_requeued_in_held_state"
}

/// An application that hangs is saved and requeued again and again, and never gets anywhere.
fn held(cluster: &Cluster) -> Result<()> {
    let name = "held";
    let script = format!("#!/bin/bash\nsrun {IMAGE} sleep 1000000\n");
    let more = ["--comment=mine", "--nodelist=n2", QUIET];
    let job = submit(cluster, name, &more, &script)?;
    let result = (|| {
        for run_number in 0..2 {
            wait_said(cluster, name, " under criu ", run_number + 1)?;
            run(cluster, &format!("scontrol requeue {job}"))?;
        }
        let view = cluster.wait_job(job, LIMIT, is_held)?;
        // Decided when the third run would have begun.
        ensure!(view["Restarts"] == "3", "{view:?}");
        let text = wait_said(cluster, name, "scontrol release", 1)?;
        ensure!(
            text.contains(&format!(
                "job {job} is held: 2 runs in a row came to nothing"
            )),
            "{text}"
        );
        ensure!(text.matches(" under criu ").count() == 2, "it was started");
        let comment = comment(cluster, job)?;
        ensure!(
            comment.starts_with("mine; container-checkpoint: held: 2 runs in a row"),
            "{comment}"
        );
        let history = run(cluster, &format!("container-checkpoint show {name}"))?;
        ensure!(
            history.contains("requeued: held: 2 runs in a row"),
            "{history}"
        );
        // Whoever releases it gives it a new chance.
        run(cluster, &format!("scontrol release {job}"))?;
        wait_said(cluster, name, " under criu ", 3)?;
        run(cluster, &format!("scancel {job}"))?;
        cluster.wait_end(job, LIMIT).map(drop)
    })();
    explained(cluster, name, result)
}

fn comments(cluster: &Cluster) -> Result<()> {
    let often = ["--nodelist=n2", "--container-checkpoint-interval=1s"];
    let ours = lines(cluster, "comment", &often)?;
    let theirs = [&often[..], &["--comment=of the user"]].concat();
    let theirs = lines(cluster, "comment-user", &theirs)?;
    let result = (|| {
        let path = "/home/alice/comment.out";
        cluster.wait_file(path, LIMIT, |text| text.contains("generation 3 saved"))?;
        wait_said(cluster, "comment-user", "generation 2 saved", 1)?;
        let first = comment(cluster, ours)?;
        let (what, how) = first.split_once(", ").context(first.clone())?;
        // One a minute: it is still that of the first.
        let (what, time) = what.split_once(" at ").context(first.clone())?;
        ensure!(what == "checkpoint generation 1 of comment", "{first}");
        ensure!(time.len() == "2026-11-26T10:49:16".len(), "{first}");
        ensure!(how.contains(" MB in ") && how.ends_with(" s"), "{first}");
        ensure!(comment(cluster, theirs)? == "of the user", "replaced");
        // The last of a run is told in any case, with nothing to wait for.
        run(cluster, &format!("scontrol requeue {ours}"))?;
        let view = cluster.wait_job(ours, LIMIT, |job| job["Restarts"] == "1")?;
        wait_said(cluster, "comment", "goes on from generation", 1)?;
        let text = output(cluster, "comment")?;
        let newest = text
            .lines()
            .rfind(|line| line.contains("(") && line.contains(" saved ("))
            .context("nothing saved")?;
        ensure!(newest.contains("preemption"), "{newest} {view:?}");
        let last = comment(cluster, ours)?;
        ensure!(!last.starts_with("checkpoint generation 1 "), "{last}");
        ensure!(text.contains(" of its work were not lost"), "{text}");
        run(cluster, &format!("scancel {ours} {theirs}"))?;
        cluster.wait_end(ours, LIMIT)?;
        cluster.wait_end(theirs, LIMIT).map(drop)
    })();
    explained(cluster, "comment", result)
}

fn discarded(cluster: &Cluster) -> Result<()> {
    let name = "discard";
    let job = lines(cluster, name, &["--nodelist=n2", QUIET])?;
    let result = (|| {
        wait_progress(cluster, name, 20)?;
        run(cluster, &format!("container-checkpoint save {name} --wait"))?;
        wait_progress(cluster, name, 20)?;
        run(cluster, &format!("scancel {job}"))?;
        let end = cluster.wait_end(job, LIMIT)?;
        ensure!(end["JobState"] == "CANCELLED", "{end:?}");
        let text = wait_said(
            cluster,
            name,
            "the job was cancelled: nothing more is saved",
            1,
        )?;
        ensure!(!text.contains("the checkpoint failed"), "{text}");
        ensure!(
            triggers(cluster, name)? == ["request"],
            "a generation too many"
        );
        let left = run(
            cluster,
            &format!("ls .container-checkpoint/{name}/generations"),
        )?;
        ensure!(left == "000001\n", "{left}");
        // Pre-empted, requeued: nothing is discarded.
        let second = lines(cluster, name, &["--nodelist=n2", QUIET])?;
        wait_said(cluster, name, "goes on from generation 1 ", 1)?;
        run(cluster, &format!("scontrol requeue {second}"))?;
        wait_said(cluster, name, "goes on from generation 2 ", 1)?;
        run(cluster, &format!("scancel {second}"))?;
        cluster.wait_end(second, LIMIT).map(drop)
    })();
    explained(cluster, name, result)
}

fn notice(cluster: &Cluster) -> Result<()> {
    let names = ["notice", "notice-off"];
    let off = ["--nodelist=n2", QUIET];
    let jobs = [
        lines(cluster, names[0], &off[..1])?,
        lines(cluster, names[1], &off)?,
    ];
    let result = (|| {
        let numbers =
            "s, but Slurm leaves it 30 s when it is pre-empted (KillWait 30 s, GraceTime 0 s)";
        let text = wait_said(cluster, names[0], numbers, 1)?;
        ensure!(
            text.contains("So it is saved while it runs, every 2"),
            "{text}"
        );
        let text = wait_said(cluster, names[1], numbers, 1)?;
        ensure!(
            text.contains("Checkpoints while it runs are switched off"),
            "{text}"
        );
        let text = wait_said(cluster, names[0], "generation 1 saved", 1)?;
        ensure!(text.contains("s, interval)"), "{text}");
        ensure!(
            text.matches("Slurm leaves").count() == 1,
            "said twice: {text}"
        );
        let text = output(cluster, names[1])?;
        ensure!(!text.contains("saved ("), "{text}");
        run(cluster, &format!("scancel {} {}", jobs[0], jobs[1]))?;
        for job in jobs {
            cluster.wait_end(job, LIMIT)?;
        }
        Ok(())
    })();
    explained(cluster, names[0], result)
}

/// Three jobs that are pre-empted at once, with a grace time.
fn grace_time(cluster: &Cluster) -> Result<()> {
    let more = ["--partition=grace", "--nodelist=n1", QUIET];
    let (hangs, told, unsaved) = ("hangs", "told", "unsaved");
    let script = format!("#!/bin/bash\nsrun {IMAGE} sleep 1000000\n");
    let hanging = submit(cluster, hangs, &more, &script)?;
    let batch = lines(cluster, told, &more)?;
    let script = format!("#!/bin/bash\nsrun {IMAGE} python3 lines.py {unsaved}.gate\n");
    let step = submit(cluster, unsaved, &more, &script)?;

    wait_said(cluster, hangs, " under criu ", 1)?;
    run(cluster, &format!("scontrol requeue {hanging}"))?;
    wait_said(cluster, hangs, " under criu ", 2)?;
    wait_progress(cluster, told, 20)?;
    wait_progress(cluster, unsaved, 20)?;
    let generations = format!(".container-checkpoint/{unsaved}/steps/*/generations");
    run(cluster, &format!("chmod 500 {generations}"))?;
    let intruder = Intruder::on(cluster, "n1")?;

    // The batch step hears nothing of its grace time, unless somebody tells it to look.
    let result = (|| {
        cluster.wait_job(batch, LIMIT, |job| job["PreemptTime"] != "None")?;
        run(cluster, &format!("scancel --batch --signal=URG {batch}"))?;
        let text = wait_said(cluster, told, "s, preemption)", 1)?;
        let said = "container-checkpoint: told: the job is being pre-empted\n";
        ensure!(text.contains(said), "{text}");
        Ok(())
    })();
    explained(cluster, told, result)?;

    // What cannot be saved hears of its end as without us; that this counts for Slurm is said before.
    let result = wait_said(
        cluster,
        unsaved,
        "hold it at the MaxBatchRequeue-th time",
        1,
    );
    let text = explained(cluster, unsaved, result)?;
    ensure!(
        text.contains("the checkpoint failed, the application runs on"),
        "{text}"
    );

    // Where the helper itself asks for the requeue, it asks for the hold instead.
    let result = (|| {
        let view = cluster.wait_job(hanging, LIMIT, is_held)?;
        ensure!(view["Restarts"] == "2", "{view:?}");
        let comment = comment(cluster, hanging)?;
        ensure!(
            comment.starts_with("container-checkpoint: held: 2 runs"),
            "{comment}"
        );
        Ok(())
    })();
    explained(cluster, hangs, result)?;

    cluster.wait_job(step, LIMIT, |job| job["Restarts"] == "1")?;
    intruder.leave(cluster)?;
    wait_run(cluster, batch, 1)?;
    open_gate(cluster, told)?;
    let end = explained(cluster, told, cluster.wait_end(batch, LIMIT))?;
    ensure!(end["JobState"] == "COMPLETED", "{end:?}");
    exact(&output(cluster, told)?)?;
    run(
        cluster,
        &format!("chmod 700 {generations} && scancel {hanging} {step}"),
    )?;
    cluster.wait_end(hanging, LIMIT)?;
    cluster.wait_end(step, LIMIT).map(drop)
}
