//! A batch script on the host: not saved itself, but its steps are, and it must not go on once
//! they are.
//!
//! Contract: [`run`] keeps the NAME's lock for as long as the script lives. When Slurm ends the job,
//! steps that are being saved are waited for, and then the script is killed at once, so that none
//! of its further lines runs; without such a step it hears Slurm's signal as it would without us.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use super::output::Output;
use super::{Fatal, Signals, note, system};
use crate::config::Config;
use crate::engine::End;
use crate::slurm::Job;
use crate::store::{Cell, Holder, State, What, Witness};

/// How often the steps' states are looked at while the job ends. They may be on other nodes.
const LOOK: Duration = Duration::from_millis(100);

/// A batch script whose steps are kept resumable.
pub struct Script {
    pub name: Cell,
    pub holder: Holder,
    pub job: Job,
    pub command: Vec<OsString>,
    pub steal_lock: bool,
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
    let output = Output::of(Some(&script.job), &script.name);
    output.iter().for_each(Output::restore);
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
        .process_group(0)
        .spawn()
        .map_err(|why| Fatal::Start(format!("cannot run {}: {why}", program.to_string_lossy())))?;
    let pid = Pid::from_raw(child.id() as i32);
    let told = watch(&script, pid, signals).map_err(system("waiting for the script"))?;
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
            lock.completed(end)?;
            output.iter().for_each(Output::forget);
            Ok(end)
        }
        Told::ToEnd => Ok(end),
        Told::Saved => {
            output.iter().for_each(Output::keep);
            Ok(End::Signal(Signal::SIGTERM as i32))
        }
    }
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
fn watch(script: &Script, pid: Pid, signals: &mut Signals) -> std::io::Result<Told> {
    let child = crate::sys::pidfd(pid)?;
    let mut told = Told::Nothing;
    let mut ending = false;
    let mut saved = false;
    loop {
        let wake = (ending && told == Told::Nothing).then(|| Instant::now() + LOOK);
        if signals.or_readable(&child, wake)? {
            return Ok(if ending && told == Told::Nothing {
                Told::ToEnd
            } else {
                told
            });
        }
        while let Some(signal) = signals.next()? {
            if signal == Signal::SIGTERM {
                ending = true;
            } else {
                // The script's process may be gone already: then the poll says so next.
                let _ = kill(pid, signal);
            }
        }
        if ending && told == Told::Nothing {
            match steps(script) {
                Steps::Unsaved => {}
                Steps::Saved => saved = true,
                Steps::None if saved => {}
                Steps::None => {
                    let _ = kill(pid, Signal::SIGTERM);
                    told = Told::ToEnd;
                    continue;
                }
            }
            if saved && steps(script) != Steps::Unsaved {
                log::debug!("all steps are saved: the script is ended");
                let _ = killpg(pid, Signal::SIGKILL);
                told = Told::Saved;
            }
        }
    }
}

/// The state of this run's steps.
#[derive(PartialEq)]
enum Steps {
    /// Nobody keeps a step of this run.
    None,
    /// At least one is not saved yet.
    Unsaved,
    Saved,
}

fn steps(script: &Script) -> Steps {
    let holders = script.name.step_holders().unwrap_or_else(|why| {
        log::warn!("{why}");
        Vec::new()
    });
    let mut of_this_run = holders
        .iter()
        .filter(|holder| holder.job == Some(script.job.id) && holder.run == script.job.run)
        .peekable();
    if of_this_run.peek().is_none() {
        Steps::None
    } else if of_this_run.all(|holder| holder.state == State::Saved) {
        Steps::Saved
    } else {
        Steps::Unsaved
    }
}
