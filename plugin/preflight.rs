//! The check at submission: where the administrator wants it (`preflight=` in plugstack.conf), the
//! helper looks at what the job will need before it is submitted, and says what it found on the
//! user's terminal.
//!
//! Contract: only in `sbatch` and `salloc`, and in an `srun` that is no job's step: those are the
//! user's own processes, who waits for them anyway; never in slurmstepd or a daemon. It takes
//! [`LIMIT`] at most, whatever the file systems do, and a check that cannot be done keeps nobody
//! from submitting.

use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::options::{NAME, OPTIONS};
use crate::spank::{self, Context};
use crate::state::State;
use crate::words::variable;

/// How long a check may take.
const LIMIT: Duration = Duration::from_secs(10);

/// What the helper ends with where something is wrong with the job and `fail` was asked for.
const REFUSED: i32 = 7;

/// Has a submission checked; the error is for the user, who has been told the reasons.
pub fn check(state: &State, context: Context) -> Result<(), String> {
    let settings = &state.settings;
    let Some(word) = settings.preflight else {
        return Ok(());
    };
    let step = context == Context::Srun && std::env::var_os("SLURM_JOB_ID").is_some();
    if state.values[NAME].is_none() || step {
        return Ok(());
    }
    let mut command = Command::new(OsStr::from_bytes(&settings.helper));
    command.args(["check", "--submission", word]);
    for name in variable::OF_TASKS {
        command.env_remove(name);
    }
    for (option, value) in OPTIONS.iter().zip(&state.values) {
        if let Some(value) = value {
            command.env(option.variable, OsStr::from_bytes(value.to_bytes()));
        }
    }
    if let Some(config) = &settings.config {
        command.env(variable::CONFIG, OsStr::from_bytes(config));
    }
    // Nothing comes by standard output; its end tells of the helper's. A group of its own, so that
    // all of it can be ended.
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0);
    let unchecked = |why: &str| spank::info(&format!("this job was not checked beforehand: {why}"));
    match command.spawn() {
        Ok(mut child) => match wait(&mut child) {
            Some(status) if status.success() => {}
            Some(status) if status.code() == Some(REFUSED) => {
                return Err("it is not submitted, as this site wants such jobs refused \
                            (preflight=fail in plugstack.conf)"
                    .to_owned());
            }
            Some(status) => unchecked(&format!("the check ended with {status}")),
            None => {
                end(&child);
                unchecked(&format!("the check took more than {} s", LIMIT.as_secs()));
            }
        },
        // A login node may do without it.
        Err(why) if why.kind() == std::io::ErrorKind::NotFound => {
            spank::verbose("this job was not checked beforehand: the helper is not here");
        }
        Err(why) => {
            let helper = String::from_utf8_lossy(&settings.helper);
            unchecked(&format!("{helper} cannot be run: {why}"));
        }
    }
    Ok(())
}

/// How the child ended; None if it has not within [`LIMIT`].
fn wait(child: &mut Child) -> Option<ExitStatus> {
    let deadline = Instant::now() + LIMIT;
    if let Some(mut out) = child.stdout.take() {
        while readable(&out, deadline) {
            match out.read(&mut [0; 512]) {
                Ok(0) => break,
                Ok(_) => {}
                Err(why) if why.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
    }
    // It is about to end, unless it has closed its output.
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Ok(None) | Err(_) => return None,
        }
    }
}

/// Waits until there is something to read, or the end; false at the deadline.
fn readable(out: &ChildStdout, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let millis = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
        let mut fd = libc::pollfd {
            fd: out.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, which lives through the call.
        match unsafe { libc::poll(&raw mut fd, 1, millis) } {
            0 => return false,
            -1 if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => {}
            _ => return true,
        }
    }
}

/// Ends the child and what it has started, without waiting: what hangs in a file system ends later.
fn end(child: &Child) {
    if let Ok(group) = libc::pid_t::try_from(child.id()) {
        // SAFETY: the child has not been waited for, so its group is still its own.
        unsafe { libc::kill(-group, libc::SIGKILL) };
    }
}
