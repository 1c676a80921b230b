//! The helper's hidden command that stands directly before DMTCP in a container, where alone can be
//! known which variables the image sets and which process-id namespace that is.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpid, getppid};

use crate::sys;

/// `container-checkpoint within [--raise-limits] [--append VAR=DIRS]… [--prepend VAR=DIRS]…
/// [--default VAR=VALUE]… [--set VAR=VALUE]… -- COMMAND…`
pub const WITHIN: &str = "within";

/// The option with which [`raise_limits`] is done before the command.
pub const RAISE_LIMITS: &str = "--raise-limits";

/// Becomes the command in `arguments`, those after [`WITHIN`]. `--append` puts directories behind
/// those that a variable has already, `--prepend` before them; `--default` sets a variable that is
/// not set, `--set` any. Returns only if the command cannot be started.
pub fn become_command(arguments: &[OsString]) -> io::Error {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
    let mut words = arguments.iter();
    let mut variables = Vec::new();
    loop {
        let option = match words.next().map(|word| word.as_bytes()) {
            Some(b"--") => break,
            Some(option) if option == RAISE_LIMITS.as_bytes() => {
                if let Err(error) = raise_limits() {
                    return error;
                }
                continue;
            }
            Some(option) => option,
            None => return wrong("-- expected"),
        };
        let Some((name, value)) = words.next().and_then(|word| split(word)) else {
            return wrong("VAR=VALUE expected");
        };
        let now = std::env::var_os(name).filter(|now| option == b"--default" || !now.is_empty());
        match (option, now) {
            (b"--append", Some(now)) => variables.push((name, joined(&now, value))),
            (b"--prepend", Some(now)) => variables.push((name, joined(value, &now))),
            (b"--default", Some(_)) => {}
            (b"--append" | b"--prepend" | b"--default", None) | (b"--set", _) => {
                variables.push((name, value.to_owned()));
            }
            _ => return wrong("--append, --prepend, --default, --set or -- expected"),
        }
    }
    let Some(program) = words.next() else {
        return wrong("a command expected");
    };
    let mut command = Command::new(program);
    command.args(words).envs(variables);
    match leave_first() {
        Ok(()) => command.exec(),
        Err(error) => error,
    }
}

/// Sets to the hard limits those soft limits of this process that an application may have had
/// unlimited, as the stack of a script with `ulimit -s unlimited`: those alone DMTCP does not restore
/// (rlimitfloatenv.cpp), they stay as `dmtcp_restart` has them. Async-signal-safe.
pub fn raise_limits() -> io::Result<()> {
    for resource in [
        Resource::RLIMIT_AS,
        Resource::RLIMIT_CPU,
        Resource::RLIMIT_DATA,
        Resource::RLIMIT_FSIZE,
        Resource::RLIMIT_NPROC,
        Resource::RLIMIT_STACK,
    ] {
        let (_, hard) = getrlimit(resource)?;
        setrlimit(resource, hard, hard)?;
    }
    Ok(())
}

/// Returns in a process that is neither the first of its process-id namespace nor a child of that.
///
/// In a namespace of the container's (`--pid`, `--containall`) this is the child of its first process,
/// or is that itself (`--no-init`). DMTCP takes a process whose parent is the first for an orphan: at
/// a restart it makes one again and ends (dmtcprestartinternal.cpp, createOrphanedProcess), and the
/// container with it.
fn leave_first() -> io::Result<()> {
    let first = Pid::from_raw(1);
    while getpid() == first || getppid() == first {
        let all = SigSet::all();
        let before = all.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let signals = SignalFd::with_flags(&all, SfdFlags::SFD_CLOEXEC)?;
        if let Some(child) = sys::fork()? {
            std::process::exit(attend(child, &signals)?);
        }
        sys::die_with_parent(libc::SIGKILL)?;
        before.thread_set_mask()?;
    }
    Ok(())
}

/// Passes on to `child` what signals come; how it ended as a code, as a shell tells it and the
/// container's first process does.
fn attend(child: Pid, signals: &SignalFd) -> io::Result<i32> {
    loop {
        let Some(told) = signals.read_signal()? else {
            continue;
        };
        match Signal::try_from(told.ssi_signo.cast_signed()) {
            Ok(Signal::SIGCHLD) => loop {
                // As the first process this gets the orphans of all others.
                match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                    Ok(WaitStatus::Exited(pid, code)) if pid == child => return Ok(code),
                    Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                        return Ok(128 + signal as i32);
                    }
                    Ok(WaitStatus::StillAlive) => break,
                    Err(Errno::EINTR) | Ok(_) => {}
                    Err(error) => return Err(error.into()),
                }
            },
            Ok(signal) => match kill(child, signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => log::warn!("cannot pass {signal} on to the application: {error}"),
            },
            // Real-time signals have no name here; nobody sends them to a job.
            Err(_) => {}
        }
    }
}

/// Two lists of directories in one.
fn joined(first: &OsStr, second: &OsStr) -> OsString {
    let mut both = first.as_bytes().to_vec();
    both.push(b':');
    both.extend_from_slice(second.as_bytes());
    OsString::from_vec(both)
}

fn split(word: &OsStr) -> Option<(&OsStr, &OsStr)> {
    let bytes = word.as_bytes();
    let at = bytes.iter().position(|byte| *byte == b'=')?;
    Some((
        OsStr::from_bytes(&bytes[..at]),
        OsStr::from_bytes(&bytes[at + 1..]),
    ))
}
