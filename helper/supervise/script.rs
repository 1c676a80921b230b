//! A batch script on the host: not saved itself, but its steps and stages are, and it must not go on
//! once they are.
//!
//! Contract: [`run`] keeps the NAME's lock for as long as the script lives. When Slurm ends the job,
//! stages are told, steps and stages that are being saved are waited for, and then the script is
//! killed at once, so that none of its further lines runs; without any it hears Slurm's signal as it
//! would without us. Requests for a checkpoint, by signal or by file, are handed on to the stages.
//! Steps and stages meet the job's time limit, drains and maintenance themselves; where a time
//! comes between two of them, the job is requeued from here. A run in which none got further is
//! not: the next one would be the same.

use std::collections::HashSet;
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use super::output::Output;
use super::settle::{self, Requeue};
use super::siblings::{Siblings, Steps};
use super::{Fatal, Signals, note, system};
use crate::clock::Clock;
use crate::config::{Config, OnTimeLimit, OutputMode};
use crate::engine::End;
use crate::policy::{self, After, Cause, Due};
use crate::requests::{self, Answer};
use crate::slurm::Job;
use crate::stage;
use crate::store::{Cell, Holder, Trigger, What, Witness};
use crate::streams::{self, Part};

/// How often the steps' states are looked at while the job ends. They may be on other nodes.
const LOOK: Duration = Duration::from_millis(100);

/// How often the time left is looked at, and whether steps run when little is left.
const TICK: Duration = Duration::from_secs(20);
const NEAR: Duration = Duration::from_secs(60);
const NEAR_TICK: Duration = Duration::from_secs(1);

/// A batch script whose steps are kept resumable.
pub struct Script {
    pub name: Cell,
    pub holder: Holder,
    pub job: Job,
    pub command: Vec<OsString>,
    pub steal_lock: bool,
    /// The signal that requests a checkpoint.
    pub signal: Option<Signal>,
    pub config: Config,
}

/// Runs the script to its end or to the end of this run.
pub fn run(script: Script, signals: &mut Signals, witness: &dyn Witness) -> Result<End, Fatal> {
    let lock = script.name.lock(
        &script.holder,
        witness,
        script.steal_lock,
        script.config.lock_wait,
    )?;
    lock.sweep()?;
    requests::forget(&script.name);
    let output = Output::of(Some(&script.job), &script.name, 1, script.config.output);
    output.iter().for_each(Output::restore);
    if let Some(end) = completed_before(&script)? {
        return Ok(end);
    }
    if script.job.run > 0 {
        let parts = parts(&script);
        streams::keep(script.job.id, &parts);
        if script.config.output == OutputMode::Exact {
            mend_output(&script, &parts);
        }
    }
    script.name.forget_claims((script.job.id, script.job.run))?;
    note(
        &lock,
        What::Note {
            text: "a batch script on the host".into(),
        },
    );
    let mut words = script.command.iter();
    let program = words
        .next()
        .ok_or_else(|| Fatal::Refused("there is no command".into()))?;
    let child = Command::new(program)
        .args(words)
        .envs(stage::variables(&script.name).map_err(system("catching containers"))?)
        .process_group(0)
        .spawn()
        .map_err(|why| Fatal::Start(format!("cannot run {}: {why}", program.to_string_lossy())))?;
    let pid = Pid::from_raw(child.id() as i32);
    let told =
        watch(&script, pid, output.as_ref(), signals).map_err(system("waiting for the script"))?;
    let end = match waitpid(pid, None) {
        Ok(WaitStatus::Signaled(_, signal, _)) => End::Signal(signal as i32),
        Ok(WaitStatus::Exited(_, code)) => End::Exit(code),
        Ok(other) => return Err(Fatal::Refused(format!("the script: {other:?}"))),
        Err(why) => return Err(system("waiting for the script")(why.into())),
    };
    match told {
        // As every process of a job when Slurm ends it; the next run runs the script again.
        Told::Nothing if end == End::Signal(Signal::SIGKILL as i32) => Ok(end),
        Told::Nothing => {
            super::note_completion(&lock, "the script", end)?;
            let job = Some(&script.job);
            output.iter().for_each(|output| output.finished(job));
            Ok(end)
        }
        Told::ToEnd => {
            // Steps that have ended are not run again: what they wrote has to be there.
            if progress(&script, false) {
                output.iter().for_each(Output::keep);
            }
            Ok(end)
        }
        Told::Saved => {
            output.iter().for_each(Output::keep);
            Ok(End::Signal(Signal::SIGTERM as i32))
        }
    }
}

/// The script's steps and stages, and what they go on from.
fn parts(script: &Script) -> Vec<Part> {
    let part = |cell: &Cell| {
        let dir = cell.dir().join(streams::DIRECTORY);
        // Before anything is read of it: a store may have many.
        dir.is_dir().then(|| Part {
            dir,
            generation: cell.entries().ok().and_then(|entries| {
                let floor = cell.floor().unwrap_or(0);
                let good = entries.iter().filter(|entry| entry.bad.is_none());
                good.map(|entry| entry.number)
                    .filter(|number| *number > floor)
                    .max()
            }),
            completed: cell.completion().is_ok_and(|done| done.is_some()),
        })
    };
    let cells = script.name.store().cells().unwrap_or_default();
    cells.iter().filter_map(part).collect()
}

/// Makes the job's output what its steps and stages go on from; what cannot be done is told.
fn mend_output(script: &Script, parts: &[Part]) {
    for stream in [1, 2] {
        if let Err(why) = streams::mend(script.job.id, stream, parts) {
            log::warn!("the job's output may lack lines or have some twice: {why}");
        }
    }
}

/// How the script ended in an earlier run, if Slurm has started it again without anybody's wish.
fn completed_before(script: &Script) -> Result<Option<End>, Fatal> {
    let Script { name, job, .. } = script;
    let Some(done) = name.completion()? else {
        return Ok(None);
    };
    let earlier = done.job == Some(job.id) && done.run < job.run;
    if !earlier || !job.view().is_ok_and(|view| view.retried) {
        return Ok(None);
    }
    log::info!("the script was completed in an earlier run of this job; it is not run again");
    Ok(Some(done.end))
}

/// What the script was told before it ended.
#[derive(Clone, Copy, PartialEq)]
enum Told {
    Nothing,
    /// Slurm's own SIGTERM.
    ToEnd,
    /// It was killed because its steps are saved.
    Saved,
}

/// Returns once the script's process has ended (unreaped).
fn watch(
    script: &Script,
    pid: Pid,
    output: Option<&Output>,
    signals: &mut Signals,
) -> std::io::Result<Told> {
    let child = crate::sys::pidfd(pid)?;
    let mut clock = Clock::of(Some(&script.job), script.name.dir(), &script.config)?;
    let events = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for fd in [Some(child.as_fd()), clock.fd()].into_iter().flatten() {
        events.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    }
    let begun = Instant::now();
    let mut kept = begun;
    let mut gets_on = false;
    let mut told = Told::Nothing;
    let mut ending: Option<Siblings> = None;
    let mut next_requeue = Some(begun);
    // Stages that were told to end.
    let mut ended = HashSet::new();
    loop {
        let now = Instant::now();
        let wake = match (&ending, next_requeue, lead(script, &clock, begun)) {
            (Some(_), ..) => (told == Told::Nothing).then(|| now + LOOK),
            (None, Some(next), Some((_, lead))) => Some(lead.max(next).min(now + TICK)),
            // The end may still become known.
            (None, Some(_), None) => Some(now + TICK),
            (None, None, _) => Some(now + TICK),
        };
        if signals.or_readable(&events.0, wake)?
            && crate::sys::readable(&child, Some(Instant::now()))?
        {
            return Ok(if ending.is_some() && told == Told::Nothing {
                Told::ToEnd
            } else {
                told
            });
        }
        clock.heard();
        while let Some(signal) = signals.next()? {
            if signal == Signal::SIGURG {
                clock.look();
                answer(script);
            }
            if signal == Signal::SIGTERM {
                ending.get_or_insert_with(|| siblings(script));
                continue;
            }
            let request = Some(signal) == script.signal;
            if request || signal == Signal::SIGURG {
                tell_stages(script, signal, |_| true);
            }
            if !request {
                // The script's process may be gone already: then the poll says so next.
                let _ = kill(pid, signal);
            }
        }
        let now = Instant::now();
        let Some(steps) = &ending else {
            if kept.elapsed() >= TICK {
                // Slurm empties the file should the job be lost, and steps that are saved meanwhile
                // go on later than at its beginning.
                gets_on = gets_on || progress(script, false);
                if gets_on {
                    output.into_iter().for_each(Output::keep);
                }
                kept = now;
            }
            // Steps that run see a drain themselves.
            if clock.drained().is_some() && siblings(script).steps() == Steps::None {
                clock.stays("its script runs no step now; it leaves once one runs");
            }
            if next_requeue.is_some_and(|next| next <= now)
                && let Some((due, _)) = lead(script, &clock, begun).filter(|(_, at)| *at <= now)
            {
                next_requeue = match siblings(script).steps() {
                    Steps::None => requeue(script, due).map(|wait| Instant::now() + wait),
                    // It is theirs to save themselves and to requeue the job.
                    _ if clock.left().is_some_and(|left| left < NEAR) => Some(now + NEAR_TICK),
                    _ => Some(now + TICK),
                };
            }
            continue;
        };
        if told != Told::Nothing {
            continue;
        }
        // Also those that have only just begun.
        tell_stages(script, Signal::SIGTERM, |stage| ended.insert(stage.pid));
        match steps.steps() {
            Steps::Unsettled => {}
            Steps::Settled => {
                log::debug!("all steps are saved: the script is ended");
                let _ = killpg(pid, Signal::SIGKILL);
                told = Told::Saved;
            }
            Steps::None => {
                let _ = kill(pid, Signal::SIGTERM);
                told = Told::ToEnd;
                // Where its limit was shortened nobody could foresee it.
                if next_requeue.is_some() {
                    requeue(script, Due::TimeLimit);
                }
            }
        }
    }
}

fn siblings(script: &Script) -> Siblings {
    Siblings::of(&script.name, &script.holder)
}

/// Sends `signal` to the helpers of the living stages that are `meant`.
fn tell_stages(script: &Script, signal: Signal, mut meant: impl FnMut(&Holder) -> bool) {
    let stages = stage::living(&script.name, &script.holder).unwrap_or_else(|why| {
        log::warn!("{why}");
        Vec::new()
    });
    for (cell, stage) in stages {
        let Ok(pid) = i32::try_from(stage.pid) else {
            continue;
        };
        if meant(&stage)
            && let Err(why) = kill(Pid::from_raw(pid), signal)
        {
            // It has ended by itself meanwhile.
            log::debug!("{}: {signal}: {why}", cell.label());
        }
    }
}

/// Answers whoever asks for a checkpoint of the script itself, which is done where none of its steps
/// runs.
fn answer(script: &Script) {
    let why = "the job's script runs nothing that can be saved now: ask again once a step runs";
    for request in requests::take(&script.name) {
        let failed = Answer::Failed { why: why.into() };
        requests::answer(&script.name, &request, &failed);
    }
}

/// When the job is to be requeued if no step runs then. There is nothing to be saved.
fn lead(script: &Script, clock: &Clock, begun: Instant) -> Option<(Due, Instant)> {
    let (due, end) = clock.deadline()?;
    let config = &script.config;
    let lead = config
        .lead_time
        .unwrap_or_else(|| policy::lead_time(0, None, config.safety));
    let lead = policy::lead_time_within(lead, end.saturating_duration_since(begun));
    Some((due, end.checked_sub(lead).unwrap_or_else(Instant::now)))
}

/// Requeues the job if this is due. When to try again, if that is of any use.
fn requeue(script: &Script, due: Due) -> Option<Duration> {
    let Script { job, config, .. } = script;
    let (trigger, what) = match due {
        Due::TimeLimit => (Trigger::TimeLimit, "the job's time limit is near"),
        Due::Maintenance => (
            Trigger::Maintenance,
            "maintenance is about to begin on a node of the job",
        ),
    };
    let why = settle::why(job, trigger);
    let at_limit = config.on_time_limit == OnTimeLimit::Requeue;
    match (
        why.cause,
        policy::after_stop(why.cause, why.batch, at_limit, false),
    ) {
        (Cause::TimeLimit | Cause::Emptying, After::Requeue) if !progress(script, true) => {
            log::warn!(
                "{what} and no step was completed or saved in this run: the \
                 job is not requeued, since the next run would be the same"
            );
            None
        }
        (Cause::TimeLimit | Cause::Emptying, After::Requeue) => {
            log::info!("{what}, between two steps");
            (settle::requeue(job, None) == Requeue::Failed).then_some(NEAR_TICK)
        }
        (Cause::Unknown, _) => Some(NEAR_TICK),
        _ => None,
    }
}

/// Whether a step of this job was completed or saved, in this run or in any.
fn progress(script: &Script, in_this_run: bool) -> bool {
    let ours = |job: Option<u32>, run: u32| {
        job == Some(script.job.id) && (!in_this_run || run == script.job.run)
    };
    let cells = script.name.store().cells().unwrap_or_default();
    cells
        .iter()
        .filter(|cell| cell.dir() != script.name.dir())
        .any(|cell| {
            let completed = cell.completion().ok().flatten();
            let newest = || cell.generation(*cell.numbers().ok()?.last()?).ok();
            completed.is_some_and(|done| ours(done.job, done.run))
                || newest().is_some_and(|newest| {
                    let manifest = newest.manifest();
                    ours(manifest.job, manifest.run)
                })
        })
}
