//! Operators who empty nodes: `evacuate`, drains, maintenance, the end of a reservation. The jobs go
//! on elsewhere and their output is that of an uninterrupted run; other jobs are left alone.

mod support;

use anyhow::{Context, Result, ensure};
use lab::{Cluster, Release, Spec};
use support::*;

/// A step of a script on the host.
fn step(name: &str) -> String {
    format!("#!/bin/bash\nsrun --container-image=/images/python.sif python3 lines.py {name}.gate\n")
}

/// Counts as lines.py does, on the host, under nobody's care.
const PLAIN: &str = "#!/bin/sh\n\
    i=0; while [ ! -e plain.gate ]; do echo $i; i=$((i + 1)); sleep 0.05; done\n";

/// Runs a line of shell as root, which has to succeed; what it printed.
fn root(cluster: &Cluster, line: &str) -> Result<String> {
    let output = cluster.run("root", line)?;
    output.ok().with_context(|| line.to_owned())
}

/// A job that was saved has gone on on another node and completes there.
fn goes_on(cluster: &Cluster, job: u32, name: &str, from: &str) -> Result<()> {
    let node = wait_run(cluster, job, 1)?;
    ensure!(node != from, "{name} goes on on {node}");
    wait_progress(cluster, name, 20)?;
    completes(cluster, job, name)
}

fn completes(cluster: &Cluster, job: u32, name: &str) -> Result<()> {
    open_gate(cluster, name)?;
    let end = cluster.wait_end(job, LIMIT)?;
    ensure!(end["JobState"] == "COMPLETED", "{name}: {end:?}");
    exact(&output(cluster, name)?)
}

#[test]
fn a_node_is_evacuated() -> Result<()> {
    if !have("dmtcp")? {
        return Ok(());
    }
    let cluster = &with(&Spec { cpus: 8, ..spec()? })?;
    cluster.write("bob", "/home/bob/lines.py", LINES)?;
    let with = |name: &str, more: &str| [options("criu", name), vec![more.to_owned()]].concat();
    root(
        cluster,
        "scontrol update nodename=n2 state=drain reason=later",
    )?;
    let batch = submit_lines(cluster, ("dmtcp", "batch"), true, &[])?;
    let theirs = with("step", "--comment=mine | not yours");
    let theirs: Vec<&str> = theirs.iter().map(String::as_str).collect();
    let theirs = cluster.sbatch("bob", &theirs, &step("step"))?;
    let stays = sbatch(cluster, &with("stays", "--no-requeue"), &step("stays"))?;
    let plain = cluster.sbatch("alice", &["--output=plain.out"], PLAIN)?;
    // As seen from alice's home.
    let bobs = "../bob/step";
    let evacuated = || {
        for name in ["batch", bobs, "stays", "plain"] {
            wait_progress(cluster, name, 20)?;
        }
        root(cluster, "scontrol update nodename=n2 state=resume")?;
        let refused = cluster.run("alice", "container-checkpoint evacuate n1")?;
        ensure!(
            refused.status.code() == Some(1) && refused.stderr.contains("cannot drain n1"),
            "{refused:?}"
        );
        let absent = cluster.run("root", "container-checkpoint evacuate n7")?;
        ensure!(absent.status.code() == Some(3), "{absent:?}");

        // A drain alone moves nobody.
        root(
            cluster,
            "scontrol update nodename=n1 state=drain reason='fan is loud'",
        )?;
        root(cluster, &format!("scancel --signal=URG --batch {batch}"))?;
        cluster.wait_file(
            "/home/alice/.container-checkpoint/batch/outlook.json",
            LIMIT,
            |text| text.contains(r#""drain":true"#),
        )?;
        wait_progress(cluster, "batch", 20)?;

        let line = "container-checkpoint evacuate n1 --answer-within 15";
        let said = cluster.run("root", line)?;
        let mut lines: Vec<String> = said
            .stdout
            .lines()
            // Said only where it takes longer than a look.
            .filter(|line| !line.ends_with(": is being saved"))
            .map(|line| {
                line.trim_end_matches(" s")
                    .trim_end_matches(char::is_numeric)
                    .to_owned()
            })
            .collect();
        lines[1..].sort();
        let mut expected = vec![
            "n1: drained".to_owned(),
            format!("job {batch} (alice): saved and requeued after "),
            format!("job {theirs} (bob): saved and requeued after "),
            format!(
                "job {stays} (alice): not saved, runs on: it is saved as generation 1, but Slurm \
                 cannot requeue it"
            ),
            format!("job {plain} (alice): not under container-checkpoint, runs on"),
            "n1: 2 saved and requeued, 1 failed, 1 not under container-checkpoint, 0 left by themselves".into(),
        ];
        expected[1..].sort();
        ensure!(
            lines == expected && said.status.code() == Some(1),
            "{said:#?}"
        );

        goes_on(cluster, batch, "batch", "n1")?;
        goes_on(cluster, theirs, bobs, "n1")?;
        let comment = root(cluster, &format!("squeue -h -t all -o %k -j {theirs}"))?;
        ensure!(comment == "mine | not yours\n", "{comment}");
        let reason = root(cluster, "sinfo -h -n n1 -o %E | head -1")?;
        ensure!(
            reason.starts_with("fan is loud; container-checkpoint evacuate #"),
            "{reason}"
        );

        for (name, job) in [("stays", stays), ("plain", plain)] {
            wait_progress(cluster, name, 20)?;
            let view = cluster.job(job)?;
            ensure!(
                view["JobState"] == "RUNNING" && view["Restarts"] == "0",
                "{view:?}"
            );
        }
        completes(cluster, stays, "stays")?;
        let document = "container-checkpoint evacuate n1 --answer-within 1 --json";
        let said = cluster.run("root", document)?;
        let document: serde_json::Value = serde_json::from_str(&said.stdout)?;
        ensure!(
            said.status.code() == Some(5)
                && document["empty"] == false
                && document["jobs"][0]["job"] == plain
                && document["jobs"][0]["outcome"] == "unmanaged",
            "{said:?}"
        );
        open_gate(cluster, "plain")?;
        cluster.wait_end(plain, LIMIT)?;
        let lines = numbers(&output(cluster, "plain")?);
        ensure!(
            lines == (0..lines.len() as u64).collect::<Vec<_>>(),
            "{lines:?}"
        );
        let empty = root(cluster, "container-checkpoint evacuate n1")?;
        ensure!(
            empty.ends_with("0 left by themselves; it is empty\n"),
            "{empty}"
        );
        cluster.wait_nothing_left(LIMIT)
    };
    explained(cluster, "batch", explained(cluster, bobs, evacuated()))
}

/// A drain, maintenance and the end of a reservation, each on a node of its own.
#[test]
fn jobs_leave_before_what_is_planned() -> Result<()> {
    let cluster = &with(&Spec {
        nodes: 5,
        config: Some("query_interval: 5s\non_drain: save\n".into()),
        ..spec()?
    })?;
    root(
        cluster,
        "scontrol create reservation reservationname=own starttime=now duration=60 nodes=n3 \
         users=alice flags=ignore_jobs",
    )?;
    let cases: [fn(&Cluster) -> Result<()>; 3] = [drained, maintained, reserved];
    std::thread::scope(|scope| {
        let running = cases.map(|case| scope.spawn(move || case(cluster)));
        let ended = running.map(|case| case.join().expect("a case panicked"));
        ended.into_iter().collect::<Result<()>>()
    })?;
    cluster.wait_nothing_left(LIMIT)
}

/// Nobody wakes the helper: it sees the drain itself.
fn drained(cluster: &Cluster) -> Result<()> {
    let name = "drained";
    let job = submit_lines(cluster, ("criu", name), true, &[])?;
    let checked = || {
        let node = node(cluster, job)?;
        wait_progress(cluster, name, 20)?;
        root(
            cluster,
            &format!("scontrol update nodename={node} state=drain reason=fan"),
        )?;
        goes_on(cluster, job, name, &node)?;
        said(cluster, name, "a node of the job is drained")
    };
    explained(cluster, name, checked())
}

/// The job has no time limit; maintenance begins 40 s after it.
fn maintained(cluster: &Cluster) -> Result<()> {
    let name = "maintained";
    let job = submit_lines(cluster, ("criu", name), false, &["--exclusive"])?;
    let checked = || {
        let node = node(cluster, job)?;
        wait_progress(cluster, name, 20)?;
        let reservation = "scontrol create reservation reservationname=repair user=root \
                           flags=maint,ignore_jobs starttime=now+30 duration=60";
        root(cluster, &format!("{reservation} nodes={node}"))?;
        goes_on(cluster, job, name, &node)?;
        said(
            cluster,
            name,
            "maintenance is about to begin on a node of the job",
        )
    };
    explained(cluster, name, checked())
}

/// Slurm would end the job with its reservation. Once it is gone for good, the job is held.
fn reserved(cluster: &Cluster) -> Result<()> {
    let name = "reserved";
    let job = submit_lines(cluster, ("criu", name), true, &["--reservation=own"])?;
    let checked = || {
        let node = node(cluster, job)?;
        ensure!(node == "n3", "{node}");
        wait_progress(cluster, name, 20)?;
        root(cluster, "scontrol update reservation=own endtime=now+30")?;
        cluster.wait_job(job, LIMIT, |job| {
            job["JobState"] == "PENDING" && job["Restarts"] == "1"
        })?;
        said(cluster, name, "the job's time limit is near")?;
        let own = format!("scontrol update jobid={job} reservationname=; scontrol release {job}");
        cluster.run("alice", &own)?.ok()?;
        wait_run(cluster, job, 1)?;
        wait_progress(cluster, name, 20)?;
        completes(cluster, job, name)
    };
    explained(cluster, name, checked())
}

fn said(cluster: &Cluster, name: &str, what: &str) -> Result<()> {
    let text = output(cluster, name)?;
    ensure!(text.contains(what), "{name} did not say {what:?}");
    Ok(())
}

#[test]
fn a_node_is_evacuated_2205() -> Result<()> {
    one_step(Release::OldSlurm)
}

#[test]
fn a_node_is_evacuated_2605() -> Result<()> {
    one_step(Release::Sid)
}

/// The words of Slurm that all rests on, in other releases.
fn one_step(release: Release) -> Result<()> {
    let cluster = &with(&Spec { release, ..spec()? })?;
    let name = "step";
    let job = submit_lines(cluster, ("criu", name), false, &["--comment=mine"])?;
    let checked = || {
        let node = node(cluster, job)?;
        wait_progress(cluster, name, 20)?;
        let said = root(
            cluster,
            &format!("container-checkpoint evacuate {node} --json"),
        )?;
        let document: serde_json::Value = serde_json::from_str(&said)?;
        let of_job = &document["jobs"][0];
        ensure!(
            document["empty"] == true
                && of_job["job"] == job
                && of_job["outcome"] == "requeued"
                && document["jobs"]
                    .as_array()
                    .is_some_and(|jobs| jobs.len() == 1),
            "{said}"
        );
        goes_on(cluster, job, name, &node)?;
        let comment = root(cluster, &format!("squeue -h -t all -o %k -j {job}"))?;
        ensure!(comment == "mine\n", "{comment}");
        cluster.wait_nothing_left(LIMIT)
    };
    explained(cluster, name, checked())
}
