//! Being told to end while an application is being started or restarted, which may take long or hang.
//!
//! Contract: nothing is lost then by ending at once, so [`attended`] sees to it that the start fails
//! as soon as SIGTERM comes. Other signals wait for whoever asks for them next. The start itself
//! stays in the calling thread: what it spawns may be tied to the life of the thread that did.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::Signals;
use crate::engine::processes;

/// A start may be just about to spawn something when SIGTERM comes: what it has spawned is ended
/// again after this time, until it has failed.
const AGAIN: Duration = Duration::from_millis(50);

/// Runs `start`. When SIGTERM comes meanwhile, the flag that `start` got is set, and `end` is called
/// until `start` returns. Says whether that was so.
pub fn attended<T>(
    signals: &mut Signals,
    end: impl Fn() + Send,
    start: impl FnOnce(&AtomicBool) -> T,
) -> io::Result<(T, bool)> {
    let told = AtomicBool::new(false);
    // Readable for the watcher once our end of it is closed.
    let (running, over) = UnixStream::pair()?;
    let result = std::thread::scope(|scope| {
        let watcher = std::thread::Builder::new()
            .name("start".into())
            .spawn_scoped(scope, || watch(signals, &over, &told, end))?;
        let result = start(&told);
        drop(running);
        match watcher.join() {
            Ok(Ok(())) => {}
            Ok(Err(why)) => log::warn!("signals were not heard during the start: {why}"),
            Err(_) => log::warn!("signals were not heard during the start"),
        }
        Ok::<_, io::Error>(result)
    })?;
    Ok((result, told.into_inner()))
}

fn watch(
    signals: &mut Signals,
    over: &UnixStream,
    told: &AtomicBool,
    end: impl Fn(),
) -> io::Result<()> {
    let mut others = Vec::new();
    loop {
        let wake = told.load(Ordering::SeqCst).then(|| Instant::now() + AGAIN);
        if signals.or_readable(over, wake)? {
            signals.put_back(others);
            return Ok(());
        }
        while let Some(signal) = signals.next()? {
            match signal {
                Signal::SIGTERM => told.store(true, Ordering::SeqCst),
                other => others.push(other),
            }
        }
        if told.load(Ordering::SeqCst) {
            end();
        }
    }
}

/// Kills whatever this process has started.
pub fn kill_children() {
    let mut all = processes::tree(Pid::this());
    all.retain(|process| process.pid != Pid::this().as_raw());
    processes::kill_all(&all);
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use nix::sys::signal::kill;

    use super::*;

    /// One test for all: signals are the whole process's.
    #[test]
    fn a_start_that_hangs_ends_at_sigterm_and_other_signals_are_kept() {
        let mut signals = Signals::take().unwrap();
        let ((), told) = attended(&mut signals, || unreachable!(), |_| ()).unwrap();
        assert!(!told);

        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_raw(child.id() as i32);
        let end = || {
            let _ = kill(pid, Signal::SIGKILL);
        };
        let hang = |told: &AtomicBool| {
            kill(Pid::this(), Signal::SIGUSR1).unwrap();
            kill(Pid::this(), Signal::SIGTERM).unwrap();
            child.wait().unwrap();
            told.load(Ordering::SeqCst)
        };
        assert_eq!(attended(&mut signals, end, hang).unwrap(), (true, true));
        assert_eq!(signals.next().unwrap(), Some(Signal::SIGUSR1));
        assert_eq!(signals.next().unwrap(), None);
    }
}
