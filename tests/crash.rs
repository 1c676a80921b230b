//! Kills the helper, what the engine consists of, the application, or all of them: at every named
//! step of a checkpoint and its commit, and at random times. After every kill the next run has to go
//! on from the newest generation that was ever reported as saved, or a newer one; in the end the
//! application's own file has to be that of an uninterrupted run.
//!
//! `CONTAINER_CHECKPOINT_CRASHES` sets the number of random kills per engine (default 12), and
//! `CONTAINER_CHECKPOINT_SEED` repeats those of an earlier run.

mod support;

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use lab::Cluster;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::*;

const LEDGER: &str = include_str!("programs/ledger.py");

/// The steps at which a helper under any engine can be killed. Those of `delete` come once there are
/// more generations than are kept.
const STEPS: &[&str] = &[
    "lock-write",
    "lock-written",
    "begin-created",
    "save-engine-done",
    "commit-begin",
    "commit-files-synced",
    "commit-manifest-written",
    "commit-dirs-synced",
    "commit-lock-checked",
    "commit-renamed",
    "commit-parent-synced",
    "commit-latest-made",
    "commit-latest-swapped",
    "commit-done",
    "delete-begin",
    "delete-renamed",
    "delete-removed",
];

/// The steps of an engine's own, and by which signal the checkpoint is asked for that takes them.
const DMTCP_STEPS: &[(&str, Signal)] = &[
    ("dmtcp-requested", Signal::SIGUSR1),
    ("dmtcp-written", Signal::SIGUSR1),
    ("dmtcp-handed-over", Signal::SIGUSR1),
    ("dmtcp-held", Signal::SIGTERM),
    ("dmtcp-ended", Signal::SIGTERM),
    ("dmtcp-handed-over", Signal::SIGTERM),
    ("commit-begin", Signal::SIGTERM),
];
const CRIU_STEPS: &[(&str, Signal)] = &[
    ("criu-asked", Signal::SIGUSR1),
    ("criu-dumped", Signal::SIGUSR1),
    ("criu-moved", Signal::SIGUSR1),
    ("criu-asked", Signal::SIGTERM),
    ("criu-moved", Signal::SIGTERM),
    ("commit-begin", Signal::SIGTERM),
    // Of the agent in the container.
    ("agent-holds", Signal::SIGUSR1),
    ("agent-dumped", Signal::SIGUSR1),
    ("agent-holds", Signal::SIGTERM),
    ("agent-dumped", Signal::SIGTERM),
];

/// After so many kills a computation is brought to its end and compared.
const KILLS: usize = 10;

#[test]
fn killed_at_any_moment_nothing_is_lost() -> Result<()> {
    let cluster = cluster()?;
    cluster.write("alice", "/home/alice/ledger.py", LEDGER)?;
    std::thread::scope(|scope| {
        let mut tests = Vec::new();
        for (engine, node, steps) in [("dmtcp", "n1", DMTCP_STEPS), ("criu", "n2", CRIU_STEPS)] {
            if have(engine)? {
                let cluster = &cluster;
                tests.push(scope.spawn(move || {
                    every_step(cluster, engine, node, steps)?;
                    random_times(cluster, engine, node)
                }));
            }
        }
        for test in tests {
            test.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        cluster.wait_nothing_left(LIMIT)
    })
}

/// Kills at every named step.
fn every_step(cluster: &Cluster, engine: &str, node: &str, own: &[(&str, Signal)]) -> Result<()> {
    let begun = Instant::now();
    let common = STEPS.iter().map(|step| (*step, Signal::SIGUSR1));
    let steps: Vec<_> = own.iter().copied().chain(common).collect();
    for (number, steps) in steps.chunks(KILLS).enumerate() {
        let name = format!("{engine}-steps-{number}");
        let mut computation = Computation::new(cluster, engine, node, &name)?;
        // Two generations: from now on older ones are deleted.
        let mut run = computation.start(None)?;
        for _ in 0..2 {
            run.signal(Signal::SIGUSR1)?;
            computation.until_saved(&mut run)?;
        }
        run.signal(Signal::SIGKILL)?;
        computation.end(run)?;
        for (step, how) in steps {
            let what = format!("{engine}, {step} at {how}");
            let told = (|| {
                let mut run = computation.start(Some(step))?;
                // Killed on the way to the application, by a step of the lock, it has ended.
                if !run.over && run.signal(*how).is_ok() {
                    computation.until_over(&mut run)?;
                }
                let met = run.over && run.child.wait()?.signal() == Some(Signal::SIGKILL as i32);
                ensure!(
                    met || step.starts_with("agent"),
                    "the step was not met:\n{}",
                    run.said.join("\n")
                );
                computation.end(run)
            })();
            told.with_context(|| what)?;
        }
        computation.finish()?;
    }
    println!(
        "{engine}: killed at {} steps in {:.0?}, nothing lost",
        steps.len(),
        begun.elapsed()
    );
    Ok(())
}

/// Kills at random times around a checkpoint.
fn random_times(cluster: &Cluster, engine: &str, node: &str) -> Result<()> {
    let begun = Instant::now();
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let kills: u64 = number("CONTAINER_CHECKPOINT_CRASHES").unwrap_or(12);
    let seed = number("CONTAINER_CHECKPOINT_SEED").unwrap_or(u64::from(std::process::id()));
    let salt = engine.bytes().map(u64::from).sum::<u64>();
    let mut random = Random(seed ^ (salt << 32));
    let mut counts = std::collections::BTreeMap::new();
    let (mut done, mut number) = (0, 0);
    while done < kills {
        let name = format!("{engine}-random-{number}");
        number += 1;
        let mut computation = Computation::new(cluster, engine, node, &name)?;
        for _ in 0..(kills - done).min(KILLS as u64) {
            let target = random.of(&TARGETS);
            let how = random.of(&[Signal::SIGUSR1, Signal::SIGUSR1, Signal::SIGTERM]);
            let after = Duration::from_millis(random.below(900));
            done += 1;
            *counts.entry(format!("{target:?}")).or_insert(0) += 1;
            computation
                .killed_once(target, how, after)
                .with_context(|| {
                    format!(
                        "{engine}, seed {seed}, kill {done}: {target:?} {after:?} after {how}\n{}",
                        computation.told()
                    )
                })?;
        }
        computation
            .finish()
            .with_context(|| format!("{engine}, seed {seed}\n{}", computation.told()))?;
        println!(
            "{engine}: {done} kills after {:.0?}, seed {seed}",
            begun.elapsed()
        );
    }
    println!(
        "{engine}: {kills} random kills in {:.0?} (seed {seed}, {counts:?}), nothing lost",
        begun.elapsed()
    );
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Helper,
    /// DMTCP's coordinator; the agent that runs CRIU.
    Engine,
    /// CRIU itself, where it runs at that moment.
    Tool,
    Application,
    /// As when a node or slurmstepd is lost.
    All,
}

const TARGETS: [Target; 8] = [
    Target::Helper,
    Target::Helper,
    Target::Helper,
    Target::Engine,
    Target::Engine,
    Target::Tool,
    Target::Application,
    Target::All,
];

/// One application through all its runs.
struct Computation<'a> {
    cluster: &'a Cluster,
    engine: &'a str,
    node: &'a str,
    name: String,
    /// The newest generation that was reported as saved.
    saved: u64,
    runs: Vec<String>,
}

/// A run of the helper.
struct Run {
    child: Child,
    /// The helper, as this host counts.
    helper: Option<Pid>,
    lines: Receiver<String>,
    said: Vec<String>,
    over: bool,
}

impl<'a> Computation<'a> {
    fn new(cluster: &'a Cluster, engine: &'a str, node: &'a str, name: &str) -> Result<Self> {
        Ok(Computation {
            cluster,
            engine,
            node,
            name: name.to_owned(),
            saved: 0,
            runs: Vec::new(),
        })
    }

    fn told(&self) -> String {
        let from = self.runs.len().saturating_sub(3);
        self.runs[from..].join("\n--- next run\n")
    }

    fn ledger(&self) -> PathBuf {
        self.cluster
            .path(format!("/home/alice/{}.ledger", self.name))
    }

    /// Starts the helper and waits until the application makes progress, or the helper has ended.
    fn start(&mut self, fault: Option<&str>) -> Result<Run> {
        let name = &self.name;
        let (ledger, gate) = (format!("{name}.ledger"), format!("{name}.gate"));
        let fault = fault.map(|step| format!("CONTAINER_CHECKPOINT_FAULT={step}"));
        let mut argv = vec!["env"];
        argv.extend(fault.as_deref());
        argv.extend(["container-checkpoint", "run", "--signal", "USR1"]);
        argv.extend(["--name", name, "--engine", self.engine]);
        argv.extend(["/images/python.sif", "python3", "ledger.py", &ledger, &gate]);
        let mut child = self
            .cluster
            .command(Some(self.node), "alice", &argv)?
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start nsenter")?;
        let stderr = child.stderr.take().context("no standard error")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut run = Run {
            child,
            helper: None,
            lines,
            said: Vec::new(),
            over: false,
        };
        self.until_started(&mut run)?;
        Ok(run)
    }

    /// Waits until the application runs and writes, or the helper has ended.
    fn until_started(&mut self, run: &mut Run) -> Result<()> {
        let started =
            |line: &str| line.contains(" starts under ") || line.contains(" goes on from ");
        let Some(line) = self.until(run, |line| started(line))? else {
            return Ok(());
        };
        let helper = children(run.child.id().cast_signed()).first().copied();
        run.helper = helper.map(Pid::from_raw);
        let before = self.numbers().last().copied();
        if let Some(from) = number_after(&line, "goes on from generation ") {
            ensure!(
                from >= self.saved,
                "generation {} was reported as saved, but it {line}",
                self.saved
            );
            self.saved = from;
        } else {
            ensure!(
                self.saved == 0,
                "generation {} was reported as saved, but it {line}",
                self.saved
            );
        }
        // It has truncated its file, or been cut back, and writes again.
        let limit = Instant::now() + LIMIT;
        while self.numbers().last().copied() == before {
            if self
                .heard(run, Instant::now() + Duration::from_millis(20))?
                .is_none()
                && run.over
            {
                return Ok(());
            }
            ensure!(Instant::now() < limit, "the application makes no progress");
        }
        Ok(())
    }

    /// One line that the helper says until `end`; notes what it means.
    fn heard(&mut self, run: &mut Run, end: Instant) -> Result<Option<String>> {
        let left = end.saturating_duration_since(Instant::now());
        let line = match run.lines.recv_timeout(left) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => {
                // An application that is left over may keep the pipe open.
                run.over |= run.child.try_wait()?.is_some();
                return Ok(None);
            }
            Err(RecvTimeoutError::Disconnected) => {
                run.child.wait()?;
                run.over = true;
                return Ok(None);
            }
        };
        if let Some(number) =
            number_after(&line, ": generation ").filter(|_| line.contains(" saved ("))
        {
            ensure!(number > self.saved, "{line}, after {}", self.saved);
            self.saved = number;
        }
        run.said.push(line.clone());
        ensure!(
            !line.contains("is bad:") && !line.contains("could not be restarted"),
            "{line}"
        );
        Ok(Some(line))
    }

    /// Waits for a line; none if the helper ended before.
    fn until(&mut self, run: &mut Run, wanted: impl Fn(&str) -> bool) -> Result<Option<String>> {
        let end = Instant::now() + LIMIT;
        loop {
            let step = end.min(Instant::now() + Duration::from_millis(100));
            match self.heard(run, step)? {
                Some(line) if wanted(&line) => return Ok(Some(line)),
                Some(_) => {}
                None if run.over => return Ok(None),
                None => ensure!(
                    Instant::now() < end,
                    "nothing in {LIMIT:?}:\n{}",
                    run.said.join("\n")
                ),
            }
        }
    }

    fn until_saved(&mut self, run: &mut Run) -> Result<()> {
        let line = self.until(run, |line| line.contains(" saved ("))?;
        line.map(drop)
            .with_context(|| format!("the helper ended:\n{}", run.said.join("\n")))
    }

    fn until_over(&mut self, run: &mut Run) -> Result<()> {
        // A helper that lost its agent may go on with another.
        self.until(run, |line| line.contains(" goes on from "))
            .map(drop)
    }

    /// Kills `target` `after` a checkpoint was asked for by `how`, then the helper.
    fn killed_once(&mut self, target: Target, how: Signal, after: Duration) -> Result<()> {
        let mut run = self.start(None)?;
        ensure!(!run.over, "the helper ended:\n{}", run.said.join("\n"));
        run.signal(how)?;
        let end = Instant::now() + after;
        while Instant::now() < end && !run.over {
            self.heard(&mut run, end)?;
        }
        let hit = run.kill(target);
        if hit && !matches!(target, Target::Helper | Target::All) {
            // It has to see that, and end or start again by itself.
            let goes_on = |line: &str| {
                line.contains(" goes on from ")
                    || line.contains(" starts under ")
                    || line.contains(" saved (")
                    || line.contains("the checkpoint failed")
            };
            if self.until(&mut run, goes_on)?.is_some() {
                run.signal(Signal::SIGKILL).ok();
            }
        } else if !run.over {
            run.signal(Signal::SIGKILL).ok();
        }
        self.end(run)
    }

    /// Takes note of all that a run which ends says, and looks at what is written by then.
    fn end(&mut self, mut run: Run) -> Result<()> {
        if let Some(helper) = run.helper.filter(|_| !run.over) {
            // Whoever is left is the next run's trouble.
            match kill(helper, Signal::SIGKILL) {
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(error) => bail!("cannot kill the helper: {error}"),
            }
        }
        while !run.over {
            self.heard(&mut run, Instant::now() + Duration::from_millis(100))?;
        }
        while let Ok(line) = run.lines.try_recv() {
            run.said.push(line);
        }
        self.runs.push(run.said.join("\n"));
        let numbers = self.numbers();
        for (index, number) in numbers.iter().enumerate() {
            ensure!(
                *number == index as u64,
                "line {index} of the application's file is {number}\n{}",
                self.told()
            );
        }
        Ok(())
    }

    /// The numbers that the application has written, in whole lines.
    fn numbers(&self) -> Vec<u64> {
        let text = std::fs::read_to_string(self.ledger()).unwrap_or_default();
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        numbers(&text[..whole])
    }

    /// Lets the application come to its end and compares.
    fn finish(&mut self) -> Result<()> {
        self.cluster
            .write("alice", format!("/home/alice/{}.gate", self.name), "")?;
        let mut run = self.start(None)?;
        while self.until(&mut run, |_| false)?.is_some() {}
        let status = run.child.wait()?;
        let said = run.said.join("\n");
        self.end(run)?;
        ensure!(status.success(), "{status}\n{said}");
        exact(&std::fs::read_to_string(self.ledger())?)
    }
}

impl Run {
    fn signal(&self, signal: Signal) -> Result<()> {
        let helper = self.helper.context("there is no helper")?;
        kill(helper, signal).with_context(|| format!("cannot send {signal} to the helper"))
    }

    /// Kills; false if there is no such process.
    fn kill(&self, target: Target) -> bool {
        let Some(helper) = self.helper else {
            return false;
        };
        let mut victims = match target {
            Target::Helper => vec![helper.as_raw()],
            _ => descendants(helper.as_raw()),
        };
        let is = |pid: i32, words: &[&str]| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            words.iter().any(|word| line.contains(word))
        };
        match target {
            Target::Helper => {}
            Target::Engine => {
                victims.retain(|pid| is(*pid, &["dmtcp_coordinator", " agent serve "]));
            }
            Target::Tool => victims.retain(|pid| is(*pid, &["criu swrk", "criu restore"])),
            Target::Application => victims.retain(|pid| is(*pid, &["python3 ledger.py"])),
            Target::All => victims.insert(0, helper.as_raw()),
        }
        if target == Target::Application {
            // The application, not those around it whose command lines hold its own.
            victims.retain(|pid| {
                let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
                name.is_ok_and(|name| name.starts_with("python3") || name.starts_with("DMTCP"))
            });
        }
        let killed = victims
            .iter()
            .filter(|pid| kill(Pid::from_raw(**pid), Signal::SIGKILL).is_ok());
        killed.count() > 0
    }
}

/// The children of a process, as this host counts.
fn children(pid: i32) -> Vec<i32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let lists = tasks.flatten().filter_map(|task| {
        let path: PathBuf = Path::new(&task.path()).join("children");
        std::fs::read_to_string(path).ok()
    });
    lists
        .flat_map(|list| {
            let pids = list.split_whitespace().filter_map(|pid| pid.parse().ok());
            pids.collect::<Vec<i32>>()
        })
        .collect()
}

/// All processes below one.
fn descendants(pid: i32) -> Vec<i32> {
    let mut found = children(pid);
    let mut next = 0;
    while next < found.len() {
        found.extend(children(found[next]));
        next += 1;
    }
    found
}

fn number_after(line: &str, words: &str) -> Option<u64> {
    let rest = line.split_once(words)?.1;
    let end = rest
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(rest.len());
    rest[..end].parse().ok()
}

/// Numbers that look random and can be had again (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}
