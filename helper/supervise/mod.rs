//! The state machine around one application: start or restart it, stand between it and Slurm, save
//! it when it has to be saved, and bring the job where it has to be.
//!
//! Contract: [`run`] returns how this process has to end. Before the application runs every failure
//! is a [`Fatal`] and nothing is left behind. Once it runs it is never killed for trouble of ours:
//! a checkpoint that fails leaves it running, and if the engine has lost it, it is restarted from
//! the last good generation. `policy` decides; this room acts.
//!
//! ```text
//!   lock ─ sweep ─ find generation ─ start ──► watch ──► application ended ─► completed
//!                                              │   ▲ ╲
//!                              trigger: save   ▼   │  ╲ lost by the engine: start again
//!                                           checkpoint ── stop ─► settle the job ─► end
//! ```

mod adviser;
mod breaker;
mod comment;
mod inquiry;
mod interrupt;
mod output;
mod outside;
mod ranks;
mod saving;
pub mod script;
mod settle;
mod siblings;
mod signals;
mod start;
mod watch;
mod work;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus};

pub use interrupt::kill_children;
pub use signals::Signals;
pub use start::Restart;
pub use watch::cost;

use crate::config::{CompletedStages, Config, Interval, OnTimeLimit};
use crate::container::Place;
use crate::engine::{End, Engine, Ranks, Running};
use crate::requests;
use crate::runtime::Runtime;
use crate::slurm::Job;
use crate::store::fingerprint::{self, Present};
use crate::store::{
    self, Cell, Completion, Generation, Holder, ImageRecord, Lock, LockError, Manifest, State,
    Trigger, What, Witness,
};
use crate::streams::Streams;
use breaker::Breaker;
use comment::Comment;
use output::Output;
use ranks::Leader;
use start::Started;
use watch::{Outcome, Watch};

/// The name of a batch script's copy in the working directory.
const SCRIPT: &str = "script";

/// One application that is kept resumable.
pub struct Computation {
    /// NAME or NAME/step key, for messages.
    pub title: String,
    pub cell: Cell,
    /// The cell of the NAME.
    pub name: Cell,
    pub holder: Holder,
    pub job: Option<Job>,
    pub place: Place,
    pub image: Option<ImageRecord>,
    /// As seen in the place; of a script, its path on the host, and `script` is set.
    pub command: Vec<OsString>,
    /// The option or variable by which a GPU was asked for.
    pub gpu: Option<String>,
    /// A batch script on the host that runs inside the container.
    pub script: Option<PathBuf>,
    /// The engines of this node, the preferred one first.
    pub engines: Vec<Arc<dyn Engine>>,
    /// Why other engines are not there.
    pub missing: Vec<String>,
    pub ranks: Ranks,
    pub restart: Restart,
    /// A generation, of this computation or another, from which it is to begin.
    pub from: Option<Generation>,
    pub steal_lock: bool,
    /// What the user chose; the application and the configuration come after that.
    pub interval: Option<Interval>,
    /// The signal that requests a checkpoint.
    pub signal: Option<Signal>,
    pub config: Config,
    pub runtime: Runtime,
    /// Of a step or stage.
    pub streams: Option<Arc<Streams>>,
}

/// Why the application was not started.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error("{0}")]
    Refused(String),
    /// No engine can hold it; config `on_unavailable` decides whether it runs all the same.
    #[error("no engine can keep this application resumable: {0}")]
    Unavailable(String),
    #[error("the application was not started: {0}")]
    Start(String),
    /// A generation could not be restarted.
    #[error("{0}")]
    Restart(String),
    #[error("{what}: {why}")]
    System {
        what: &'static str,
        why: std::io::Error,
    },
}

fn system(what: &'static str) -> impl Fn(std::io::Error) -> Fatal {
    move |why| Fatal::System { what, why }
}

impl Computation {
    fn missing_text(&self) -> String {
        if self.missing.is_empty() {
            "it was not asked for".into()
        } else {
            self.missing.join("; ")
        }
    }

    /// What the engines have to hold, for their probe: of a script, its interpreter.
    fn probe_command(&self) -> Vec<OsString> {
        let Some(script) = &self.script else {
            return self.command.clone();
        };
        let text = std::fs::read(script).unwrap_or_default();
        let mut command = interpreter(&text);
        // Without it a shell would be one that somebody types into, who may start anything.
        command.push(script.into());
        command
    }

    /// What this node is, as far as a restart of `saved` under `engine` depends on it.
    fn present(&self, engine: &dyn Engine, saved: &Manifest) -> Present {
        let image = self.image.as_ref().map(|image| image.digest.clone());
        present(engine, saved, image)
    }

    /// Whether an earlier run of this very job made the newest generation.
    fn has_saved(&self) -> Result<bool, Fatal> {
        let Some(job) = self.job.as_ref().filter(|job| job.run > 0) else {
            return Ok(false);
        };
        Ok(match self.cell.numbers()?.last() {
            Some(newest) => self
                .cell
                .generation(*newest)
                .is_ok_and(|newest| newest.manifest().job == Some(job.id)),
            None => false,
        })
    }

    fn requeue_at_time_limit(&self) -> bool {
        self.config.on_time_limit == OnTimeLimit::Requeue
    }
}

/// The interpreter that the text of a batch script names, with its arguments.
pub fn interpreter(text: &[u8]) -> Vec<OsString> {
    let line = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let words: Vec<OsString> = line
        .trim_start_matches("#!")
        .split_whitespace()
        .map(OsString::from)
        .collect();
    if words.is_empty() {
        vec!["/bin/sh".into()]
    } else {
        words
    }
}

/// How long whoever reads the application's output is waited for at the end of a run. What he has not
/// read by then comes in the next one.
const READER: Duration = Duration::from_secs(5);

/// Runs the application to its end or to the end of this run.
pub fn run(
    computation: Computation,
    signals: &mut Signals,
    witness: &dyn Witness,
) -> Result<End, Fatal> {
    let streams = computation.streams.clone();
    let end = run_locked(computation, signals, witness);
    streams.iter().for_each(|streams| streams.flush(READER));
    end
}

fn run_locked(
    computation: Computation,
    signals: &mut Signals,
    witness: &dyn Witness,
) -> Result<End, Fatal> {
    if computation.ranks.rank > 0 {
        return ranks::follow(&computation, signals);
    }
    let lock = computation.cell.lock(
        &computation.holder,
        witness,
        computation.steal_lock,
        computation.config.lock_wait,
    )?;
    lock.sweep()?;
    requests::forget(&computation.cell);
    let (job, ranks) = (computation.job.as_ref(), computation.ranks.count);
    let output = match &computation.streams {
        Some(streams) if streams.are_all() => None,
        _ => Output::of(job, &computation.cell, ranks, computation.config.output).map(Arc::new),
    };
    output.iter().for_each(|output| output.restore());
    if let Some(from) = &computation.from {
        begin_from(&computation, &lock, from)?;
    }
    let mut leader = Leader::new(&computation);
    let mut restart = match computation.restart {
        // A requeued job has its options still; what it saved itself is not what was meant.
        Restart::Fresh if computation.has_saved()? => Restart::Auto,
        restart => restart,
    };
    if let Some(done) = computation.cell.completion()? {
        if let Some(end) = completed_before(&computation, &done, restart)?
            && replayed(&computation, &lock)?
        {
            leader.over(Some(end));
            return Ok(end);
        }
        restart = Restart::Fresh;
    }
    let mut breaker = Breaker::begin(&computation);
    if let (Some(breaker), Some(job)) = (&breaker, &computation.job)
        && breaker.is_stuck_already()
    {
        match breaker.hold(&lock) {
            Ok(()) => {
                leader.over(None);
                settle::leave(job, &lock, signals).map_err(system("waiting for the job's end"))?;
                return Ok(End::Signal(libc::SIGTERM));
            }
            Err(why) => log::warn!("job {} cannot be held and goes on: {why}", job.id),
        }
    }
    let mut comment = Comment::of(computation.job.as_ref(), computation.config.comment);
    let mut lost = 0;
    loop {
        let begun = Instant::now();
        let (started, told) = interrupt::attended(signals, interrupt::kill_children, |told| {
            start::start(
                &computation,
                &lock,
                &mut leader,
                restart,
                told,
                output.as_deref(),
            )
        })
        .map_err(system("starting"))?;
        if told {
            log::info!("{} was told to end while it was started", computation.title);
            if let Ok(started) = started {
                started.running.kill();
                let status = reap(started.running.as_ref())
                    .map_err(system("waiting for the application"))?;
                started.running.ended(status);
            }
            let end = End::Signal(libc::SIGTERM);
            note(&lock, What::Ended { end });
            settle_job(
                &computation,
                &lock,
                Trigger::Preemption,
                output.as_deref(),
                breaker.as_ref(),
                signals,
            )?;
            leader.over(None);
            return Ok(end);
        }
        let started = started?;
        tell_start(&computation, &lock, &started, begun.elapsed());
        let mut watch = Watch::new(
            &computation,
            &lock,
            &mut leader,
            output.as_ref(),
            (breaker.as_mut(), &comment),
            started,
        )?;
        match watch
            .watch(signals)
            .map_err(system("waiting for the application"))?
        {
            // Not its own doing: Slurm ends every process of a job so, in any order, and the kernel
            // one that has no memory left; SIGINT is the user's control-C.
            Outcome::Ended(end @ End::Signal(signal @ (libc::SIGKILL | libc::SIGINT))) => {
                log::warn!(
                    "{} was {} and is not completed: the next run goes on from the last generation, \
                     or begins anew if there is none",
                    computation.title,
                    match signal {
                        libc::SIGINT => "interrupted",
                        _ => "killed",
                    }
                );
                note(&lock, What::Ended { end });
                return Ok(end);
            }
            Outcome::Ended(end) => {
                if let Some(streams) = &computation.streams {
                    streams.finish().map_err(system("the standard streams"))?;
                }
                note_completion(&lock, &computation.title, end)?;
                if let Some(streams) = &computation.streams {
                    // Else the next run does it.
                    let told = streams.completed();
                    told.unwrap_or_else(|why| log::debug!("{}: {why}", computation.title));
                }
                breaker.iter_mut().for_each(Breaker::ended);
                let job = computation.job.as_ref();
                output.iter().for_each(|output| output.finished(job));
                return Ok(end);
            }
            Outcome::ToldToEnd(end) => {
                note(&lock, What::Ended { end });
                return Ok(end);
            }
            Outcome::Stopped {
                signal,
                alone: true,
                ..
            } => {
                output.iter().for_each(|output| output.keep());
                return Ok(End::Signal(signal as i32));
            }
            Outcome::Stopped {
                trigger, signal, ..
            } => {
                if breaker.as_ref().is_some_and(Breaker::is_stuck) {
                    // The reason must not be replaced by what was saved last.
                    comment.finish();
                }
                settle_job(
                    &computation,
                    &lock,
                    trigger,
                    output.as_deref(),
                    breaker.as_ref(),
                    signals,
                )?;
                return Ok(End::Signal(signal as i32));
            }
            Outcome::Lost { why } => {
                lost += 1;
                if lost > computation.config.restarts_within_run {
                    return Err(Fatal::Refused(format!(
                        "{}: the engine has lost the application {lost} times in this run ({why})",
                        computation.title
                    )));
                }
                log::warn!(
                    "{}: {why}; going on from the last good generation",
                    computation.title
                );
                restart = match restart {
                    Restart::Force => Restart::Force,
                    _ => Restart::Auto,
                };
            }
        }
    }
}

/// Makes a copy of `from` the newest generation, unless the computation has come further than that:
/// the options of a requeued job are still those of its first run.
fn begin_from(computation: &Computation, lock: &Lock, from: &Generation) -> Result<(), Fatal> {
    let own = from.dir().starts_with(computation.cell.dir());
    if computation.has_saved()? || !own && !computation.cell.numbers()?.is_empty() {
        log::info!(
            "{} has a saved state of its own and goes on from that",
            computation.title
        );
        return Ok(());
    }
    let (copy, _) = lock.clone_from(from, &|_| ())?;
    let (name, number) = (&from.manifest().name, from.number());
    log::info!(
        "{}: generation {} is {name}@{number}",
        computation.title,
        copy.number()
    );
    Ok(())
}

/// The application has been stopped: its output is kept, and the job brought where it has to be.
fn settle_job(
    computation: &Computation,
    lock: &Lock,
    trigger: Trigger,
    output: Option<&Output>,
    breaker: Option<&Breaker>,
    signals: &mut Signals,
) -> Result<(), Fatal> {
    output.into_iter().for_each(Output::keep);
    settle::settle(
        computation.job.as_ref(),
        trigger,
        computation.requeue_at_time_limit(),
        lock,
        breaker,
        signals,
    )
    .map_err(system("settling the job"))
}

/// What a completed computation means for this run: an end to hand on, or None to begin anew.
fn completed_before(
    computation: &Computation,
    done: &Completion,
    restart: Restart,
) -> Result<Option<End>, Fatal> {
    let same_job = done.job.is_some() && done.job == computation.job.as_ref().map(|job| job.id);
    let earlier = computation
        .job
        .as_ref()
        .is_some_and(|job| done.run < job.run);
    let stage = computation.cell.key().is_some();
    let skipped = !stage
        || (computation.config.completed_stages == CompletedStages::Skip
            && !script_has_completed(computation, done)?);
    match restart {
        // The job was requeued after this part of it had ended: it is not done twice.
        _ if same_job && earlier && skipped => {
            log::info!(
                "{} was completed in an earlier run of this job",
                computation.title
            );
            Ok(Some(done.end))
        }
        Restart::Fresh => Ok(None),
        Restart::Require | Restart::Force if !(same_job && earlier) => {
            Err(Fatal::Refused(format!(
                "{} was completed; there is nothing to go on from",
                computation.title
            )))
        }
        _ => {
            log::info!("{} was completed; starting anew", computation.title);
            Ok(None)
        }
    }
}

/// Whether the script ended by itself after this part of it had: who requeues such a job wants it to
/// be done again.
fn script_has_completed(computation: &Computation, done: &Completion) -> Result<bool, Fatal> {
    let script = computation.name.completion()?;
    Ok(script.is_some_and(|script| script.job == done.job && script.run >= done.run))
}

/// Whether the streams of a completed stage could be given what it gave them. True for whatever has
/// no streams of its own.
fn replayed(computation: &Computation, lock: &Lock) -> Result<bool, Fatal> {
    let Some(streams) = &computation.streams else {
        return Ok(true);
    };
    // There is nothing to be saved meanwhile, however long its reader takes.
    lock.set_state(State::Saved)?;
    match streams.replay().map_err(system("the standard streams"))? {
        Ok(()) => Ok(true),
        Err(why) => {
            log::warn!("{} is run again all the same: {why}", computation.title);
            lock.set_state(State::Running)?;
            Ok(false)
        }
    }
}

fn tell_start(computation: &Computation, lock: &Lock, started: &Started, took: Duration) {
    let engine = started.engine.kind();
    let what = match &started.from {
        Some(from) => {
            let computed = from.manifest().computed.unwrap_or_default();
            let kept = match Duration::from_millis(computed.elapsed) {
                elapsed if elapsed.as_secs() > 0 => {
                    format!("; {} of its work were not lost", short(elapsed))
                }
                _ => String::new(),
            };
            log::info!(
                "{} goes on from generation {} ({} old) under {} {}{kept}",
                computation.title,
                from.number(),
                short(from.age()),
                started.engine.kind(),
                started.engine.version()
            );
            What::Restarted {
                engine,
                generation: from.number(),
                took: took.as_millis() as u64,
            }
        }
        None => {
            log::info!(
                "{} starts under {} {}",
                computation.title,
                started.engine.kind(),
                started.engine.version()
            );
            What::Started { engine }
        }
    };
    note(lock, what);
}

/// Writes into the history. It is for people: a line that cannot be written changes nothing.
fn note(lock: &Lock, what: What) {
    if let Err(why) = lock.note(what) {
        log::warn!("{why}");
    }
}

/// Notes that `what` ended by itself. How it ended counts also where that cannot be written, as in a
/// store that is full.
fn note_completion(lock: &Lock, what: &str, end: End) -> Result<(), store::Error> {
    match lock.completed(end) {
        Err(why @ store::Error::Io { .. }) => {
            log::error!(
                "{what} ended by itself, which cannot be noted: {why}; should this job be requeued, it \
                 goes on from its last generation once more"
            );
            Ok(())
        }
        other => other,
    }
}

fn short(age: Duration) -> String {
    match age.as_secs() {
        seconds @ 0..=119 => format!("{seconds} s"),
        seconds @ 120..=7199 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3600),
    }
}

fn reap(running: &dyn Running) -> std::io::Result<WaitStatus> {
    loop {
        match nix::sys::wait::waitpid(running.child(), Some(WaitPidFlag::empty())) {
            Err(nix::errno::Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

/// What this node is for a restart of `saved` under `engine`, with a container image of this digest.
pub fn present(engine: &dyn Engine, saved: &Manifest, image: Option<String>) -> Present {
    let (kernel, cpu_flags) = node();
    Present {
        engine: engine.kind(),
        // One that comes from the container image is the same if the image is.
        engine_version: match engine.version() {
            "" => saved.engine_version.clone(),
            version => version.to_owned(),
        },
        kernel,
        cpu_flags,
        image,
    }
}

/// The kernel's release and what the processor can do, of this node.
pub fn node() -> (String, Vec<String>) {
    let kernel = nix::sys::utsname::uname()
        .map(|uname| uname.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    (kernel, fingerprint::cpu_flags(&cpu))
}
