//! Several ranks of one step: rank 0 decides for all, the others follow.
//!
//! Contract: rank 0's helper holds the lock, chooses engine and generation, and alone takes
//! checkpoints, which are of all ranks. It leaves word of that in `work/plan.json` of the cell; the
//! other ranks' helpers look at it, since nothing else is seen on all nodes. A rank that ends by
//! itself leaves its end in `work/ended/rank-N.json`: rank 0 stays until all have, because the
//! engine's coordinator is its, and a checkpoint keeps it in the rank's directory, so that a
//! restart hands it on instead of starting that rank.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::siblings::Siblings;
use super::{Computation, Fatal, Signals, settle, start, system};
use crate::engine::{End, Kind};
use crate::store::Holder;

/// How often rank 0's word is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// How long the other ranks wait for rank 0 beyond what it may take itself.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a rank whose application was ended from outside waits for rank 0's word about it.
const LAST_WORD: Duration = Duration::from_secs(20);

/// What the name of a rank's end is in a generation.
const ENDED: &str = "ended.json";

/// Where rank 0 is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Phase {
    /// All ranks start, or run.
    Running,
    /// All ranks are being saved, and end then.
    Stopping,
    /// They are saved and have ended.
    Stopped,
    /// The step ends without them.
    Over,
}

/// Rank 0's word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Plan {
    job: Option<u32>,
    run: u32,
    step: String,
    /// Counts the starts within this run.
    attempt: u32,
    phase: Phase,
    engine: Kind,
    /// The generation to restart from.
    from: Option<u64>,
    /// What the step's ranks end with when it was over before this run.
    end: Option<End>,
}

/// Rank 0's side. Does nothing where there is only one rank.
pub struct Leader {
    work: PathBuf,
    plan: Option<Plan>,
    ranks: u32,
}

impl Leader {
    /// To be made once the lock is held and swept.
    pub fn new(computation: &Computation) -> Leader {
        let Holder { job, run, step, .. } = computation.holder.clone();
        let several = computation.ranks.count > 1;
        Leader {
            work: computation.cell.dir().join("work"),
            plan: several.then_some(Plan {
                job,
                run,
                step,
                attempt: 0,
                phase: Phase::Running,
                engine: Kind::Dmtcp,
                from: None,
                end: None,
            }),
            ranks: computation.ranks.count,
        }
    }

    /// All ranks start now, under `engine`, from generation `from`.
    pub fn start(&mut self, engine: Kind, from: Option<u64>) -> io::Result<()> {
        self.tell(|plan| {
            plan.attempt += 1;
            plan.phase = Phase::Running;
            plan.engine = engine;
            plan.from = from;
        })
    }

    pub fn stopping(&mut self) {
        self.must_tell(Phase::Stopping);
    }

    /// The application goes on after all.
    pub fn running(&mut self) {
        self.must_tell(Phase::Running);
    }

    pub fn stopped(&mut self) {
        self.must_tell(Phase::Stopped);
    }

    /// Nothing more is started; `end` is what the step ended with in an earlier run.
    pub fn over(&mut self, end: Option<End>) {
        if let Err(why) = self.tell(|plan| {
            plan.attempt += 1;
            plan.phase = Phase::Over;
            plan.end = end;
        }) {
            log::warn!("the other ranks cannot be told: {why}");
        }
    }

    fn must_tell(&mut self, phase: Phase) {
        if let Err(why) = self.tell(|plan| plan.phase = phase) {
            log::warn!("the other ranks cannot be told: {why}");
        }
    }

    fn tell(&mut self, change: impl FnOnce(&mut Plan)) -> io::Result<()> {
        let Some(plan) = &mut self.plan else {
            return Ok(());
        };
        change(plan);
        fs::create_dir_all(self.work.join("ended"))?;
        replace(&self.work.join("plan.json"), plan)
    }

    /// Whether all other ranks have ended by themselves.
    pub fn others_ended(&self) -> bool {
        (1..self.ranks).all(|rank| ended(&self.work, rank).is_file())
    }

    /// How often [`Leader::others_ended`] is to be looked at.
    pub fn look(&self) -> Duration {
        LOOK
    }

    /// Puts the ends of ranks that have ended into the generation being made in `draft`.
    pub fn keep_ends(work: &Path, draft: &Path, ranks: u32) -> io::Result<()> {
        for rank in 1..ranks {
            let from = ended(work, rank);
            if from.is_file() {
                let dir = draft.join(format!("rank-{rank}"));
                fs::create_dir_all(&dir)?;
                fs::copy(from, dir.join(ENDED))?;
            }
        }
        Ok(())
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        // However rank 0 ends: nobody may wait for it.
        if self
            .plan
            .as_ref()
            .is_some_and(|plan| plan.phase == Phase::Running)
        {
            self.over(None);
        }
    }
}

fn ended(work: &Path, rank: u32) -> PathBuf {
    work.join("ended").join(format!("rank-{rank}.json"))
}

fn replace(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let own = path.with_extension(format!("{}.new", std::process::id()));
    fs::write(&own, serde_json::to_vec(value)?)?;
    fs::rename(own, path)
}

/// The life of a rank other than 0.
pub fn follow(computation: &Computation, signals: &mut Signals) -> Result<End, Fatal> {
    let rank = computation.ranks.rank;
    let work = computation.cell.dir().join("work");
    let config = &computation.config;
    let patience = config.lock_wait + config.restart_timeout + PATIENCE;
    let mut attempt = 0;
    loop {
        let plan = wait(computation, &work, signals, patience, |plan| {
            plan.attempt > attempt
        })?
        .ok_or_else(|| {
            Fatal::Refused(format!(
                "{}: rank 0 did not say within {} s what rank {rank} has to do; see what it \
                     said itself",
                computation.title,
                patience.as_secs()
            ))
        })?;
        attempt = plan.attempt;
        if plan.phase == Phase::Over {
            return match plan.end {
                Some(end) => Ok(end),
                None => Err(Fatal::Refused(format!(
                    "{}: rank {rank} ends because rank 0 has",
                    computation.title
                ))),
            };
        }
        let from = plan
            .from
            .map(|number| computation.cell.generation(number))
            .transpose()?;
        if let Some(from) = &from
            && let Ok(text) = fs::read(from.rank_dir(rank).join(ENDED))
        {
            let end: End = serde_json::from_slice(&text).map_err(|why| {
                Fatal::Refused(format!("the end of rank {rank} cannot be read: {why}"))
            })?;
            leave(&work, rank, end)?;
            return Ok(end);
        }
        let running = match start::follow(computation, plan.engine, &work, from.as_ref()) {
            Ok(running) => running,
            Err(why) if plan.from.is_some() => {
                log::warn!(
                    "{}: rank {rank} was not restarted: {why}",
                    computation.title
                );
                continue;
            }
            Err(why) => return Err(Fatal::Start(why.to_string())),
        };
        let child = crate::sys::pidfd(running.child()).map_err(system("pidfd_open"))?;
        until_readable(&child, signals, |signal| running.signal(signal))
            .map_err(system("waiting for the application"))?;
        let status =
            super::reap(running.as_ref()).map_err(system("waiting for the application"))?;
        let end = running.ended(status);
        let settled = wait(computation, &work, signals, patience, |plan| {
            plan.phase != Phase::Stopping
        })?;
        let from_outside = matches!(end, End::Exit(99) | End::Signal(9 | 15));
        let word = match settled {
            Some(plan) if plan.attempt == attempt && plan.phase == Phase::Running => {
                if !from_outside {
                    leave(&work, rank, end)?;
                    return Ok(end);
                }
                wait(computation, &work, signals, LAST_WORD, |plan| {
                    plan.attempt != attempt || plan.phase == Phase::Stopped
                })?
            }
            other => other,
        };
        match word {
            Some(plan) if plan.phase == Phase::Stopped => {
                if let Some(job) = &computation.job {
                    let siblings = Siblings::of(&computation.cell, &computation.holder);
                    settle::outlive_script(job, &siblings, signals)
                        .map_err(system("settling the job"))?;
                }
                return Ok(End::Signal(Signal::SIGTERM as i32));
            }
            Some(plan) if plan.attempt != attempt && plan.phase != Phase::Over => {}
            _ => {
                leave(&work, rank, end)?;
                return Ok(end);
            }
        }
    }
}

fn leave(work: &Path, rank: u32, end: End) -> Result<(), Fatal> {
    replace(&ended(work, rank), &end).map_err(system("leaving word of this rank's end"))
}

/// Waits until rank 0's word for this run is as `wanted`, at most `limit`. Signals that come
/// meanwhile are rank 0's business.
fn wait(
    computation: &Computation,
    work: &Path,
    signals: &mut Signals,
    limit: Duration,
    wanted: impl Fn(&Plan) -> bool,
) -> Result<Option<Plan>, Fatal> {
    let me = &computation.holder;
    let end = Instant::now() + limit;
    loop {
        let plan = fs::read(work.join("plan.json"))
            .ok()
            .and_then(|text| serde_json::from_slice::<Plan>(&text).ok())
            .filter(|plan| (plan.job, plan.run, &plan.step) == (me.job, me.run, &me.step));
        if let Some(plan) = plan.filter(&wanted) {
            return Ok(Some(plan));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
        settle::pause(signals, LOOK).map_err(system("waiting for rank 0"))?;
    }
}

/// Waits until `child` has ended. SIGTERM is what rank 0 saves the application at; other signals
/// are passed on.
fn until_readable(
    child: &impl AsFd,
    signals: &mut Signals,
    pass: impl Fn(Signal),
) -> io::Result<()> {
    loop {
        if signals.or_readable(child, None)? {
            return Ok(());
        }
        while let Some(signal) = signals.next()? {
            if !matches!(signal, Signal::SIGTERM | Signal::SIGUSR2) {
                pass(signal);
            }
        }
    }
}
