//! Fault points: named places where a test can end or fail this program.
//!
//! Contract: [`point`] does nothing in what is installed, which is built with `--release`. In other
//! builds (so that the whole-system tests need no program of their own) the variable
//! `CONTAINER_CHECKPOINT_FAULT` arms points: a comma-separated list of `NAME[:ACTION[:COUNT]]`.
//! ACTION is `kill` (SIGKILL to this process, the default) or the name of an errno that the point
//! then reports: `eio`, `enospc`, `edquot`, `erofs`, `eacces`. COUNT is the pass at which it
//! happens, from 1 (the default).

/// Passes the fault point `name`; an error only if a test armed it with one.
#[cfg(not(any(test, debug_assertions)))]
#[inline(always)]
pub fn point(_name: &str) -> std::io::Result<()> {
    Ok(())
}

#[cfg(any(test, debug_assertions))]
pub use armed::point;

#[cfg(any(test, debug_assertions))]
mod armed {
    use std::collections::HashMap;
    use std::io;
    use std::sync::{Mutex, PoisonError};

    use nix::errno::Errno;
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::getpid;

    static PASSES: Mutex<Option<HashMap<String, u32>>> = Mutex::new(None);

    pub fn point(name: &str) -> io::Result<()> {
        let Ok(spec) = std::env::var("CONTAINER_CHECKPOINT_FAULT") else {
            return Ok(());
        };
        for armed in spec.split(',') {
            let mut words = armed.split(':');
            if words.next() != Some(name) {
                continue;
            }
            let action = words.next().unwrap_or("kill");
            let at: u32 = words.next().and_then(|n| n.parse().ok()).unwrap_or(1);
            let mut passes = PASSES.lock().unwrap_or_else(PoisonError::into_inner);
            let pass = passes
                .get_or_insert_default()
                .entry(name.to_string())
                .or_default();
            *pass += 1;
            if *pass != at {
                continue;
            }
            let errno = match action {
                "eio" => Errno::EIO,
                "enospc" => Errno::ENOSPC,
                "edquot" => Errno::EDQUOT,
                "erofs" => Errno::EROFS,
                "eacces" => Errno::EACCES,
                _ => {
                    kill(getpid(), Signal::SIGKILL).map_err(io::Error::from)?;
                    // The first process of a process-id namespace is safe from itself.
                    std::process::exit(128 + Signal::SIGKILL as i32);
                }
            };
            return Err(errno.into());
        }
        Ok(())
    }
}
