//! What Slurm can do to a job, on every release, with both kinds of tracking processes, to a script in
//! a container and to a step of a script on the host: the job's state and restarts afterwards, and
//! the output, which has to be that of an uninterrupted run.
//!
//! A cluster for each release (22.05, 24.11, 26.05) and proctrack (cgroup, linuxproc), all at the same
//! time, and on each several jobs at once. By default a row of the table runs once for each release,
//! and so that both proctracks, both kinds of jobs and both engines have their turn in each row;
//! `CONTAINER_CHECKPOINT_MATRIX=full` runs all twelve, two clusters at a time, and a row's name as
//! its value that row alone.
//!
//! | event | job afterwards | here | in detail |
//! |---|---|---|---|
//! | pre-emption without grace | requeued | `preempted` | preemption.rs, outcome.rs, front.rs |
//! | with GraceTime | requeued | `grace` | preemption.rs |
//! | with GraceTime, `send_user_signal` and `--signal` | requeued | `user-signal` | |
//! | `--signal=[B:]S@t`, then the time limit | runs on, then requeued | `limit` | time_limit.rs |
//! | time limit that nobody could foresee; the batch step exits within KillWait | requeued | `cut` | |
//! | the job's reservation ends | requeued | `reservation` | |
//! | `scontrol requeue` by owner, by operator | requeued | `owner`, `operator` | |
//! | `scontrol requeuehold`, release | held, then goes on | `hold` | |
//! | loss of a node | requeued | `node` | |
//! | scancel | cancelled; goes on when submitted again | `cancel` | outcome.rs, save.rs |
//! | `scancel -s`, `-b`, `-f` (a script in a container) | runs on | `signals` | outcome.rs |
//! | suspend, resume | runs on | `suspend` | front.rs |

mod support;

use std::time::Instant;

use anyhow::{Result, ensure};
use lab::{Cluster, Proctrack, Release, Spec};
use support::*;

const RELEASES: [Release; 3] = [Release::OldSlurm, Release::Trixie, Release::Sid];
const PROCTRACKS: [Proctrack; 2] = [Proctrack::Cgroup, Proctrack::Linuxproc];

/// One event.
struct Row {
    name: &'static str,
    /// Jobs on one node share what happens to it: `n2`'s its pre-emption. Where a row has two jobs, the
    /// second one of `n3` and `n4` is on `n5` or `n6`.
    node: &'static str,
    options: &'static [&'static str],
    /// From the running job to the completed one.
    event: fn(&Run) -> Result<()>,
}

const fn row(
    name: &'static str,
    node: &'static str,
    options: &'static [&'static str],
    event: fn(&Run) -> Result<()>,
) -> Row {
    Row {
        name,
        node,
        options,
        event,
    }
}

const IMAGE: &str = "--container-image=/images/python.sif";
const BY_USR1: &str = "--container-checkpoint-signal=USR1";

const ROWS: [Row; 13] = [
    row("preempted", "n2", &[], goes_on),
    row("grace", "n2", &["--partition=grace"], goes_on),
    row(
        "user-signal",
        "n2",
        &[
            "--partition=grace",
            "--time=30",
            "--signal=SIGNAL@1",
            BY_USR1,
        ],
        user_signal,
    ),
    row(
        "limit",
        "n1",
        &["--time=1", "--signal=SIGNAL@40", BY_USR1],
        limit,
    ),
    row("cut", "n1", &["--time=30"], cut),
    row(
        "reservation",
        "n4",
        &["--time=30", "--reservation=of-NODE"],
        reservation,
    ),
    row("owner", "n1", &[], |run| {
        run.as_user("alice", &format!("scontrol requeue {}", run.job))?;
        goes_on(run)
    }),
    row("operator", "n1", &[], |run| {
        run.as_user("root", &format!("scontrol requeue {}", run.job))?;
        goes_on(run)
    }),
    row("hold", "n1", &[], hold),
    row("node", "n3", &[], node_is_lost),
    row("cancel", "n1", &[], cancel),
    row("signals", "n1", &[BY_USR1], signals),
    row("suspend", "n1", &[], suspend),
];

/// A row's job on a cluster.
struct Run<'a> {
    cluster: &'a Cluster,
    row: &'static Row,
    engine: &'static str,
    batch: bool,
    /// The checkpoint name.
    name: String,
    job: u32,
}

#[test]
fn jobs_go_on_whatever_slurm_does() -> Result<()> {
    let choice = std::env::var("CONTAINER_CHECKPOINT_MATRIX").unwrap_or_default();
    let (choice, full) = (choice.as_str(), choice == "full");
    let dmtcp = have("dmtcp")?;
    let sites: Vec<_> = (0..RELEASES.len())
        .flat_map(|release| (0..PROCTRACKS.len()).map(move |proctrack| (release, proctrack)))
        .collect();
    let mut failed = Vec::new();
    for some in sites.chunks(if full { 2 } else { sites.len() }) {
        let results = std::thread::scope(|scope| {
            let threads: Vec<_> = some
                .iter()
                .map(|&(release, proctrack)| {
                    scope.spawn(move || site(release, proctrack, choice, dmtcp))
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join())
                .collect::<Vec<_>>()
        });
        for result in results {
            failed.extend(result.unwrap_or_else(|_| vec!["a cluster's thread panicked".into()]));
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n\n"));
    Ok(())
}

/// Which kinds of jobs of a row run on a cluster, and under which engine: of three releases two have
/// the one proctrack and two, others, the one kind.
fn kinds(row: usize, release: usize, proctrack: usize, full: bool) -> Vec<(bool, &'static str)> {
    let batch = (row / 2 + release.div_ceil(2)).is_multiple_of(2);
    let engine = |batch: bool| ["criu", "dmtcp"][(row + release + usize::from(batch)) % 2];
    if full {
        vec![(true, engine(true)), (false, engine(false))]
    } else if (row + release) % 2 == proctrack {
        vec![(batch, engine(batch))]
    } else {
        Vec::new()
    }
}

/// Runs a cluster's rows; what failed.
fn site(release: usize, proctrack: usize, choice: &str, dmtcp: bool) -> Vec<String> {
    let full = choice == "full";
    let title = format!("{:?} {:?}", RELEASES[release], PROCTRACKS[proctrack]);
    let spec = spec().map(|spec| Spec {
        release: RELEASES[release],
        proctrack: PROCTRACKS[proctrack],
        nodes: if full { 6 } else { 4 },
        cpus: 16,
        slurm_conf: match RELEASES[release] {
            Release::OldSlurm => "SlurmctldParameters=preempt_send_user_signal\n".into(),
            Release::Trixie | Release::Sid => "PreemptParameters=send_user_signal\n".into(),
        },
        ..spec
    });
    let cluster = match spec.and_then(|spec| with(&spec)) {
        Ok(cluster) => cluster,
        Err(error) => return vec![format!("{title}: {error:#}")],
    };
    let cluster = &cluster;
    for node in if full { &["n4", "n6"][..] } else { &["n4"] } {
        let reserve = format!(
            "scontrol create reservation ReservationName=of-{node} StartTime=now Duration=120 \
             Users=alice Nodes={node}"
        );
        if let Err(error) = cluster.run("root", &reserve).and_then(|made| made.ok()) {
            return vec![format!("{title}: {error:#}")];
        }
    }
    let mut runs = Vec::new();
    for (index, row) in ROWS.iter().enumerate() {
        if !["", "full", row.name].contains(&choice) {
            continue;
        }
        for (batch, engine) in kinds(index, release, proctrack, full) {
            let run = Run {
                cluster,
                row,
                engine: if dmtcp { engine } else { "criu" },
                batch,
                name: format!("{}-{}", row.name, if batch { "batch" } else { "step" }),
                job: 0,
            };
            runs.push(run);
        }
    }
    let (together, alone): (Vec<Run>, Vec<Run>) =
        runs.into_iter().partition(|run| run.row.node == "n2");
    let mut failed: Vec<String> = std::thread::scope(|scope| {
        let mut threads = vec![scope.spawn(|| preempted(together))];
        threads.extend(
            alone
                .into_iter()
                .map(|run| scope.spawn(|| vec![run.whole(Run::event)])),
        );
        let results = threads.into_iter().map(|thread| thread.join());
        results
            .flat_map(|failed| failed.unwrap_or_else(|_| vec![Some("a row panicked".into())]))
            .flatten()
            .map(|why| format!("{title}: {why}"))
            .collect()
    });
    if let Err(error) = cluster.wait_nothing_left(LIMIT) {
        failed.push(format!("{title}: {error:#}"));
    }
    failed
}

/// All pre-emptions of a cluster are one.
fn preempted(runs: Vec<Run>) -> Vec<Option<String>> {
    let Some(first) = runs.first() else {
        return Vec::new();
    };
    let cluster = first.cluster;
    let mut started = Vec::new();
    let mut failed = Vec::new();
    for mut run in runs {
        match run.start() {
            Ok(()) => started.push(run),
            Err(error) => failed.push(Some(run.told(&error))),
        }
    }
    for run in &started {
        if let Err(error) = wait_progress(cluster, &run.name, 20) {
            failed.push(Some(run.told(&error)));
        }
    }
    let intruder = Intruder::on(cluster, "n2");
    // They are to go on on the other node.
    std::thread::scope(|scope| {
        let ends: Vec<_> = started
            .iter()
            .map(|run| scope.spawn(|| run.whole_from(Instant::now(), (run.row.event)(run))))
            .collect();
        failed.extend(ends.into_iter().flat_map(|end| end.join()));
    });
    if let Err(error) = intruder.and_then(|intruder| intruder.leave(cluster)) {
        failed.push(Some(format!("{error:#}")));
    }
    failed
}

impl Run<'_> {
    /// What happens to a node may happen to one job before the other one is ready for it.
    fn node(&self) -> &'static str {
        let second = self.batch && self.cluster.spec().nodes > 4;
        match self.row.node {
            "n3" if second => "n5",
            "n4" if second => "n6",
            node => node,
        }
    }

    /// How a job is told to go on on any node but those that are to be lost.
    fn elsewhere(&self) -> String {
        let mut lost = self.cluster.spec().node_names();
        lost.retain(|node| ["n3", "n5"].contains(&node.as_str()));
        format!("ExcNodeList={}", lost.join(","))
    }

    /// Submits the job, to the row's node.
    fn start(&mut self) -> Result<()> {
        let signal = if self.batch { "B:USR1" } else { "USR1" };
        let node = self.node();
        let mut options: Vec<String> = vec![format!("--nodelist={node}")];
        if node == "n2" {
            // Where it is when it has started: afterwards it may be anywhere.
            let mut others = self.cluster.spec().node_names();
            others.retain(|other| other != node);
            options = vec![format!("--exclude={}", others.join(","))];
        }
        let more = self.row.options.iter();
        options.extend(more.map(|option| option.replace("SIGNAL", signal).replace("NODE", node)));
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        if self.row.node != "n3" {
            let what = (self.engine, self.name.as_str());
            self.job = submit_lines(self.cluster, what, self.batch, &options)?;
            return Ok(());
        }
        // Its own file, which goes back to what it was when the application was saved.
        let lines = format!("python3 lines.py {0}.gate >{0}.out", self.name);
        let mut all = support::options(self.engine, &self.name);
        all.extend(options.iter().map(ToString::to_string));
        all.push(format!("--output={}.log", self.name));
        let script = if self.batch {
            all.push(IMAGE.into());
            format!("#!/bin/bash\n{lines}\n")
        } else {
            format!("#!/bin/bash\nsrun {IMAGE} sh -c 'exec {lines}'\n")
        };
        self.job = sbatch(self.cluster, &all, &script)?;
        Ok(())
    }

    fn event(&mut self) -> Result<()> {
        self.start()?;
        wait_progress(self.cluster, &self.name, 20)?;
        (self.row.event)(self)
    }

    /// Does it all; what failed.
    fn whole(mut self, act: fn(&mut Self) -> Result<()>) -> Option<String> {
        let begun = Instant::now();
        let result = act(&mut self);
        self.whole_from(begun, result)
    }

    fn whole_from(&self, begun: Instant, result: Result<()>) -> Option<String> {
        let Spec {
            release, proctrack, ..
        } = self.cluster.spec();
        println!(
            "{release:?} {proctrack:?} {} {}: {} {:.0} s",
            self.name,
            self.engine,
            if result.is_ok() { "good" } else { "failed" },
            begun.elapsed().as_secs_f32()
        );
        result.err().map(|error| self.told(&error))
    }

    fn told(&self, error: &anyhow::Error) -> String {
        let error = anyhow::anyhow!("{error:#}");
        let told = explained::<()>(self.cluster, &self.name, Err(error));
        let told = told.map_or_else(|error| error.to_string(), |()| String::new());
        format!("{} under {}: {told}", self.name, self.engine)
    }

    fn as_user(&self, user: &str, command: &str) -> Result<()> {
        self.cluster.run(user, command)?.ok().map(drop)
    }

    /// Waits until the job has said `what` `count` times.
    fn said(&self, what: &str, count: usize) -> Result<()> {
        let log = if self.row.node == "n3" { "log" } else { "out" };
        let path = format!("/home/alice/{}.{log}", self.name);
        self.cluster
            .wait_file(path, LIMIT, |text| text.matches(what).count() >= count)?;
        Ok(())
    }

    fn pending(&self) -> Result<()> {
        self.cluster
            .wait_job(self.job, LIMIT, |job| job["JobState"] == "PENDING")?;
        Ok(())
    }

    /// Lets the application end, and checks how the job has and what is written.
    ///
    /// Slurm 24.11 starts a job again that was pre-empted in a grace time and has completed since;
    /// then it ends at once.
    fn completes(&self, restarts: u32) -> Result<()> {
        wait_progress(self.cluster, &self.name, 20)?;
        open_gate(self.cluster, &self.name)?;
        let end = self.cluster.wait_end(self.job, LIMIT)?;
        let in_vain = self.cluster.spec().release == Release::Trixie
            && self.row.options.contains(&"--partition=grace");
        let restarts = restarts..=restarts + u32::from(in_vain);
        ensure!(
            end["JobState"] == "COMPLETED" && restarts.contains(&end["Restarts"].parse()?),
            "{end:?}"
        );
        exact(&output(self.cluster, &self.name)?)
    }
}

/// The job is requeued once and goes on.
fn goes_on(run: &Run) -> Result<()> {
    if run.row.node == "n2" {
        run.cluster
            .wait_job(run.job, LIMIT, |job| job["Restarts"] == "1")?;
        run.pending()?;
        run.as_user(
            "root",
            &format!("scontrol update JobId={} {}", run.job, run.elsewhere()),
        )?;
    }
    run.said("goes on from generation", 1)?;
    run.completes(1)
}

/// The user's signal comes instead of SIGTERM, and asks for a checkpoint.
fn user_signal(run: &Run) -> Result<()> {
    if !run.batch {
        run.said("signal)\n", 1)?;
    }
    goes_on(run)
}

fn limit(run: &Run) -> Result<()> {
    run.said("signal)\n", 1)?;
    run.said("the job's time limit is near", 1)?;
    goes_on(run)
}

/// The end is moved to now: nobody could have saved it before.
fn cut(run: &Run) -> Result<()> {
    let job = format!("scontrol update JobId={}", run.job);
    // Not now: a moment that has passed when it arrives is refused.
    run.as_user("root", &format!("{job} EndTime=now+3seconds"))?;
    run.said("is requeued and goes on from there", 1)?;
    let longer = format!("{job} TimeLimit=30");
    // Refused until the first run is over.
    run.cluster
        .wait_job(run.job, LIMIT, |_| run.as_user("root", &longer).is_ok())?;
    goes_on(run)
}

/// The job needs another reservation then, or none; Slurm has perhaps taken it away and let the job
/// start, or hold.
fn reservation(run: &Run) -> Result<()> {
    let ends = format!(
        "scontrol update ReservationName=of-{} EndTime=now+3seconds",
        run.node()
    );
    run.as_user("root", &ends)?;
    run.said("is requeued and goes on from there", 1)?;
    let without = format!(
        "scontrol update JobId={0} ReservationName= ; scontrol release {0}",
        run.job
    );
    run.cluster.wait_job(run.job, LIMIT, |job| {
        // What is refused meanwhile is of no interest.
        let _ = run.cluster.run("root", &without);
        job["Restarts"] == "1" && ["RUNNING", "COMPLETED"].contains(&job["JobState"].as_str())
    })?;
    goes_on(run)
}

fn hold(run: &Run) -> Result<()> {
    run.as_user("alice", &format!("scontrol requeuehold {}", run.job))?;
    run.cluster.wait_job(run.job, LIMIT, |job| {
        job["JobState"] == "PENDING" && job["Priority"] == "0"
    })?;
    run.as_user("alice", &format!("scontrol release {}", run.job))?;
    goes_on(run)
}

/// Saved at an operator's word before the node goes: what the application has written since is written
/// again.
fn node_is_lost(run: &Run) -> Result<()> {
    let save = format!("container-checkpoint save {} --wait", run.name);
    run.as_user("alice", &save)?;
    wait_progress(run.cluster, &run.name, 20)?;
    run.cluster.stop_node(run.node())?;
    let down = format!(
        "scontrol update NodeName={} State=DOWN Reason=lost",
        run.node()
    );
    run.as_user("root", &down)?;
    run.pending()?;
    let elsewhere = format!(
        "scontrol update JobId={} ReqNodeList= {}",
        run.job,
        run.elsewhere()
    );
    run.as_user("root", &elsewhere)?;
    goes_on(run)
}

fn cancel(run: &Run) -> Result<()> {
    run.as_user("alice", &format!("scancel {}", run.job))?;
    let end = run.cluster.wait_end(run.job, LIMIT)?;
    ensure!(end["JobState"] == "CANCELLED", "{end:?}");
    let mut again = Run {
        name: run.name.clone(),
        ..*run
    };
    again.start()?;
    again.said("goes on from generation 1", 1)?;
    again.completes(0)
}

/// `--full` is for the script: a shell that does not trap it dies of it, as without us.
fn signals(run: &Run) -> Result<()> {
    let ways = if run.batch {
        ["--batch", "--full"]
    } else {
        ["", "--quiet"]
    };
    for (count, to) in ways.iter().enumerate() {
        let scancel = format!("scancel --signal=USR1 {to} {}", run.job);
        run.as_user("alice", &scancel)?;
        run.said("signal)\n", count + 1)?;
    }
    run.completes(0)
}

fn suspend(run: &Run) -> Result<()> {
    run.as_user("root", &format!("scontrol suspend {}", run.job))?;
    run.cluster
        .wait_job(run.job, LIMIT, |job| job["JobState"] == "SUSPENDED")?;
    run.as_user("root", &format!("scontrol resume {}", run.job))?;
    run.completes(0)
}
