//! Jobs of several computations (array, heterogeneous job, steps side by side and one after another), and
//! jobs whose controller is away when they are saved.

mod support;

use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use lab::{Cluster, Job, Release, Spec};
use support::*;

const IMAGE: &str = "--container-image=/images/python.sif";

/// Half of the shortest limit that Slurm knows is the most that a lead time takes, so a run lasts 30 s.
const SHORT_RUNS: &str = "lead_time: 50s\n";

fn script(cluster: &Cluster, name: &str, more: &[&str], script: &str) -> Result<u32> {
    let mut options = options(engine(), name);
    options.extend(more.iter().map(ToString::to_string));
    sbatch(cluster, &options, script)
}

/// DMTCP where it is, which most sites use.
fn engine() -> &'static str {
    if have("dmtcp").unwrap_or(true) {
        "dmtcp"
    } else {
        "criu"
    }
}

fn completed(cluster: &Cluster, job: u32, restarts: &str) -> Result<Job> {
    let end = cluster.wait_end(job, LIMIT)?;
    let seen = (end["JobState"].as_str(), end["Restarts"].as_str());
    ensure!(seen == ("COMPLETED", restarts), "{end:?}");
    Ok(end)
}

/// What a job's helpers and script have said holds `what` `count` times.
fn said(cluster: &Cluster, name: &str, what: &str, count: usize) -> Result<()> {
    let text = output(cluster, name)?;
    ensure!(
        text.matches(what).count() == count,
        "not {count} times {what:?}"
    );
    Ok(())
}

/// In the grace time each element asks for itself to be requeued; one of them has the array's id.
#[test]
fn elements_of_an_array_go_on_by_themselves() -> Result<()> {
    let cluster = with(&Spec {
        release: Release::OldSlurm,
        cpus: 4,
        ..spec()?
    })?;
    let mut options = options(engine(), "sweep");
    options.retain(|option| !option.starts_with("--output"));
    let more = ["--array=1-8", "--output=sweep-%a.out", "--partition=grace"];
    options.extend(more.map(String::from));
    let array = sbatch(
        &cluster,
        &options,
        &format!("#!/bin/bash\nsrun {IMAGE} python3 lines.py sweep.gate $SLURM_ARRAY_TASK_ID\n"),
    )?;
    let name = |element: u32| format!("sweep-{element}");
    let result = (|| {
        for element in 1..=8 {
            wait_progress(&cluster, &name(element), 20)?;
        }
        // The last one to start has the array's own id.
        let node = node(&cluster, array)?;
        let intruder = Intruder::on(&cluster, &node)?;
        let mut moved = 0;
        let jobs = cluster.run("root", &format!("squeue -h -r -j {array} -w {node} -o %K"))?;
        for element in jobs.ok()?.split_whitespace() {
            let path = format!("/home/alice/sweep-{element}.out");
            // Who requeues it may be gone before it says so.
            cluster.wait_file(&path, LIMIT, |text| text.contains(" saved ("))?;
            moved += 1;
        }
        ensure!(moved == 4, "{moved} elements were on {node}");
        intruder.leave(&cluster)?;
        open_gate(&cluster, "sweep")?;
        for element in 1..=8 {
            let path = format!("/home/alice/sweep-{element}.out");
            cluster.wait_file(&path, LIMIT, |text| text.contains("\nend "))?;
        }
        cluster.wait_nothing_left(LIMIT)?;
        let mut restarted = 0;
        let jobs = cluster
            .run("root", &format!("scontrol show job -o {array}"))?
            .ok()?;
        for element in 1..=8 {
            let of = format!(" ArrayTaskId={element} ");
            let job = jobs
                .lines()
                .find(|line| line.contains(&of))
                .unwrap_or_default();
            ensure!(job.contains(&format!(" ExitCode={element}:0 ")), "{job}");
            restarted += usize::from(job.contains(" Restarts=1 "));
            exact(&output(&cluster, &name(element))?)?;
        }
        ensure!(
            restarted == 4,
            "{restarted} elements were restarted:\n{jobs}"
        );
        Ok(())
    })();
    explained(&cluster, "sweep-8", result)
}

#[test]
fn steps_of_one_job_are_saved_together() -> Result<()> {
    let cluster = &with(&Spec {
        cpus: 8,
        config: Some(SHORT_RUNS.into()),
        ..spec()?
    })?;
    std::thread::scope(|scope| {
        let cases = [
            scope.spawn(|| side_by_side(cluster)),
            scope.spawn(|| one_ends_the_job(cluster)),
            scope.spawn(|| between_steps(cluster)),
            scope.spawn(|| no_step_at_all(cluster)),
        ];
        for case in cases {
            case.join()
                .unwrap_or_else(|_| anyhow::bail!("a case panicked"))?;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    cluster.wait_nothing_left(LIMIT)
}

/// Two steps under the script's own NAME and one under another, all at their time limit at once.
fn side_by_side(cluster: &Cluster) -> Result<()> {
    let name = "side";
    let text = format!(
        "#!/bin/bash\n\
         step() {{ srun --exact -n1 --output=side-$1.out --open-mode=append \"${{@:2}}\" {IMAGE} python3 lines.py side.gate $1 & }}\n\
         step 1; step 2; step 3 --container-checkpoint=other\n\
         wait\necho after\n"
    );
    let job = script(cluster, name, &["--time=1", "--ntasks=3"], &text)?;
    let result = (|| {
        for step in 1..=3 {
            wait_progress(cluster, &format!("side-{step}"), 20)?;
        }
        wait_run(cluster, job, 1)?;
        for step in 1..=3 {
            wait_progress(cluster, &format!("side-{step}"), 20)?;
        }
        open_gate(cluster, name)?;
        completed(cluster, job, "1")?;
        for step in 1..=3 {
            let text = output(cluster, &format!("side-{step}"))?;
            ensure!(text.matches("saved (").count() == 1, "{text}");
            exact(&text)?;
        }
        said(cluster, name, "after\n", 1)
    })();
    explained(cluster, "side-1", explained(cluster, name, result))
}

/// A person ends the job by one of its steps: the other one is saved first, for the same reason.
fn one_ends_the_job(cluster: &Cluster) -> Result<()> {
    let name = "ends";
    let text = format!(
        "#!/bin/bash\n\
         step() {{ srun --exact -n1 --output=ends-$1.out --open-mode=append --container-checkpoint=ends-$1 {IMAGE} python3 lines.py ends.gate & }}\n\
         step 1; step 2\n\
         wait\necho after\n"
    );
    let submit = || script(cluster, name, &["--ntasks=2"], &text);
    let first = submit()?;
    let result = (|| {
        for step in 1..=2 {
            wait_progress(cluster, &format!("ends-{step}"), 20)?;
        }
        cluster
            .run("alice", "container-checkpoint save ends-1 --stop")?
            .ok()?;
        let end = cluster.wait_end(first, LIMIT)?;
        ensure!(end["JobState"] == "CANCELLED", "{end:?}");
        said(cluster, name, "after\n", 0)?;
        for step in 1..=2 {
            said(cluster, &format!("ends-{step}"), "exit-request)\n", 1)?;
        }
        open_gate(cluster, name)?;
        completed(cluster, submit()?, "0")?;
        for step in 1..=2 {
            exact(&output(cluster, &format!("ends-{step}"))?)?;
        }
        Ok(())
    })();
    explained(cluster, "ends-2", explained(cluster, name, result))
}

/// The time limit comes while the script itself does something: it is requeued, and its completed
/// step gives its exit code and is not done again.
fn between_steps(cluster: &Cluster) -> Result<()> {
    let name = "between";
    let text = format!(
        "#!/bin/bash\n\
         step() {{ srun {IMAGE} python3 lines.py between.gate $1; echo \"step $1: $?\"; }}\n\
         step 1\n\
         echo waiting; while [ ! -e between.go ]; do sleep 0.2; done\n\
         step 2\n"
    );
    open_gate(cluster, name)?;
    // No --open-mode: Slurm empties the file, and the first step's lines have to be there.
    let mut options = options(engine(), name);
    options.retain(|option| !option.starts_with("--open-mode"));
    options.push("--time=1".into());
    let job = sbatch(cluster, &options, &text)?;
    let result = (|| {
        wait_run(cluster, job, 1)?;
        cluster.wait_file("/home/alice/between.out", LIMIT, |text| {
            text.matches("waiting\n").count() == 2
        })?;
        cluster.write("alice", "/home/alice/between.go", "")?;
        completed(cluster, job, "1")?;
        said(cluster, name, "near, between two steps", 1)?;
        said(cluster, name, "step 1: 1\n", 2)?;
        said(cluster, name, "step 2: 2\n", 1)?;
        let text = output(cluster, name)?;
        let steps: Vec<&str> = text.split("\nend ").collect();
        ensure!(steps.len() == 3, "{} ends", steps.len() - 1);
        ensure!(
            numbers(steps[0]).iter().copied().eq(0..50),
            "the first step"
        );
        ensure!(
            numbers(steps[1]).iter().copied().eq(0..50),
            "the second step"
        );
        Ok(())
    })();
    explained(cluster, name, result)
}

/// Nothing would be won by running it again.
fn no_step_at_all(cluster: &Cluster) -> Result<()> {
    let name = "none";
    let text = "#!/bin/bash\nwhile true; do sleep 0.2; done\n";
    let job = script(cluster, name, &["--time=1"], text)?;
    let result = (|| {
        let end = cluster.wait_end(job, LIMIT)?;
        ensure!(
            end["JobState"] == "TIMEOUT" && end["Restarts"] == "0",
            "{end:?}"
        );
        said(
            cluster,
            name,
            "no step was completed or saved in this run",
            1,
        )
    })();
    explained(cluster, name, result)
}

/// A step over both components, whose commands differ, and one in each; the pre-emption is of the
/// second component's node.
#[test]
fn a_heterogeneous_job_goes_on_as_one() -> Result<()> {
    if !have("dmtcp")? {
        return Ok(());
    }
    std::thread::scope(|scope| {
        let cases = [Release::OldSlurm, Release::Sid]
            .map(|release| scope.spawn(move || heterogeneous(release)));
        for case in cases {
            case.join()
                .unwrap_or_else(|_| anyhow::bail!("a case panicked"))?;
        }
        Ok(())
    })
}

fn heterogeneous(release: Release) -> Result<()> {
    let cluster = &with(&Spec {
        release,
        cpus: 4,
        ..spec()?
    })?;
    let component = |number: u32, command: &str| {
        let group = number % 2;
        format!(
            "--het-group={group} --exact -n1 --output=het-{number}.out --open-mode=append {IMAGE} \
             python3 {command} het.gate"
        )
    };
    let (first, second) = (component(0, "lines.py"), component(1, "./lines.py"));
    let text = format!(
        "#!/bin/bash\nsrun {first} : {second} &\nsrun {} &\nsrun {} &\nwait\necho after\n",
        component(2, "lines.py"),
        component(3, "./lines.py")
    );
    let of_second = ["--nodelist=n1", "-n2", ":", "--nodelist=n2", "-n2"];
    let job = script(cluster, "het", &of_second, &text)?;
    let result = (|| {
        for number in 0..4 {
            wait_progress(cluster, &format!("het-{number}"), 20)?;
        }
        let intruder = Intruder::on(cluster, "n2")?;
        let begin = cluster.wait_job(job, LIMIT, |job| {
            job["JobState"] == "PENDING" && job["Restarts"] == "1"
        })?;
        intruder.leave(cluster)?;
        // Only the backfill scheduler starts such jobs, and it looks only after something has
        // happened: that the time has come at which this one may start is nothing to it.
        cluster.wait_job(job, LIMIT, |job| {
            job["JobState"] == "RUNNING" || job["LastSchedEval"] > begin["EligibleTime"]
        })?;
        cluster.sbatch("bob", &["--output=/dev/null"], "#!/bin/sh\n")?;
        wait_run(cluster, job, 1)?;
        for number in 0..4 {
            wait_progress(cluster, &format!("het-{number}"), 20)?;
        }
        open_gate(cluster, "het")?;
        completed(cluster, job, "1")?;
        for number in 0..4 {
            exact(&output(cluster, &format!("het-{number}"))?)?;
        }
        // Rank 0 speaks for a step.
        for number in [0, 2, 3] {
            said(
                cluster,
                &format!("het-{number}"),
                "goes on from generation",
                1,
            )?;
        }
        said(cluster, "het", "after\n", 1)?;
        cluster.wait_nothing_left(LIMIT)
    })();
    let result = explained(cluster, "het-0", explained(cluster, "het-1", result));
    explained(cluster, "het", result).with_context(|| format!("{release:?}"))
}

/// slurmctld is killed, the jobs reach their time limit and an interval, and it comes back.
#[test]
fn a_job_is_saved_while_the_controller_is_away() -> Result<()> {
    let cluster = with(&Spec {
        cpus: 4,
        config: Some(SHORT_RUNS.into()),
        ..spec()?
    })?;
    let limited: Vec<(&str, u32)> = [("step", false), ("batch", true)]
        .into_iter()
        .map(|(name, batch)| {
            let job = submit_lines(&cluster, (engine(), name), batch, &["--time=1"])?;
            Ok((name, job))
        })
        .collect::<Result<_>>()?;
    let more = ["--time=10", "--container-checkpoint-interval=5s"];
    let interval = submit_lines(&cluster, (engine(), "interval"), true, &more)?;
    let result = (|| {
        for name in ["step", "batch", "interval"] {
            wait_progress(&cluster, name, 20)?;
        }
        // What it has not saved yet it would not know any more.
        let state = cluster.path("/var/spool/slurmctld/job_state");
        let told = SystemTime::now();
        let change = format!("scontrol update JobId={interval} Comment=running");
        cluster.run("root", &change)?.ok()?;
        cluster.wait_job(interval, LIMIT, |_| {
            let saved = state.metadata().and_then(|about| about.modified());
            saved.is_ok_and(|saved| saved > told)
        })?;
        cluster.stop_controller()?;
        for (name, _) in &limited {
            cluster.wait_file(format!("/home/alice/{name}.out"), LIMIT, |text| {
                text.contains("time-limit)\n") && text.contains("Asking again in")
            })?;
        }
        cluster.wait_file("/home/alice/interval.out", LIMIT, |text| {
            text.matches("interval)\n").count() >= 2
        })?;
        cluster.start_controller()?;
        for (name, job) in &limited {
            wait_run(&cluster, *job, 1)?;
            wait_progress(&cluster, name, 20)?;
            open_gate(&cluster, name)?;
            completed(&cluster, *job, "1")?;
            exact(&output(&cluster, name)?)?;
        }
        open_gate(&cluster, "interval")?;
        completed(&cluster, interval, "0")?;
        exact(&output(&cluster, "interval")?)?;
        cluster.wait_nothing_left(LIMIT)
    })();
    explained(&cluster, "step", explained(&cluster, "batch", result))
}
