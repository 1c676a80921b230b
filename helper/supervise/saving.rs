//! One checkpoint, taken in a thread of its own so that signals are heard meanwhile.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::outside::Outside;
use crate::engine::{CheckpointError, Running, Then};
use crate::fault;
use crate::store::{Computed, Draft, Durations, Generation, Lock, Trigger, durations};

/// What is asked of a checkpoint.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    pub trigger: Trigger,
    pub then: Then,
    /// How long the engine may take.
    pub limit: Duration,
    /// Bytes it will presumably need.
    pub predicted: u64,
    /// What the application has computed.
    pub computed: Computed,
}

/// A committed checkpoint.
#[derive(Debug, Clone, Copy)]
pub struct Saved {
    pub generation: u64,
    pub bytes: u64,
    /// Why it was taken, as far as it was known at the commit.
    pub trigger: Trigger,
    /// From the request to the end of the commit.
    pub took: Duration,
}

/// Why there is no new generation, and what became of the application.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// It goes on as if nothing had been asked.
    #[error("{0}")]
    Alive(String),
    /// It ended with code 0 before anything was done to it.
    #[error("{0}")]
    Ended(String),
    /// It is gone, or has to be ended.
    #[error("{0}")]
    Lost(String),
}

/// A checkpoint under way.
pub struct Saving {
    pub order: Order,
    wake: Arc<EventFd>,
    events: Receiver<Progress>,
}

/// How far a checkpoint has come.
pub enum Progress {
    /// The application is saved and goes on, while its state is being committed.
    GoesOn,
    Over(Result<Saved, Failure>),
}

/// Turns the files of a checkpoint into a generation: fills the manifest and commits.
pub type Commit =
    dyn Fn(Draft, Order, Durations, Outside) -> Result<Generation, String> + Send + Sync;

/// Looks at what the application needs, while it is held.
pub type Look = dyn Fn() -> Outside + Send + Sync;

impl Saving {
    pub fn start(
        order: Order,
        running: Arc<dyn Running>,
        lock: Lock,
        commit: Arc<Commit>,
        look: Arc<Look>,
    ) -> std::io::Result<Saving> {
        let wake = Arc::new(EventFd::from_flags(
            EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
        )?);
        let (sender, events) = channel();
        let bell = wake.clone();
        std::thread::Builder::new()
            .name("checkpoint".into())
            .spawn(move || {
                let tell = |progress| {
                    // The receiver is gone only if the process is ending.
                    let _ = sender.send(progress);
                    let _ = bell.write(1);
                };
                let goes_on = || tell(Progress::GoesOn);
                let (commit, look) = (commit.as_ref(), look.as_ref());
                let result = save(order, running.as_ref(), &lock, commit, look, &goes_on);
                tell(Progress::Over(result));
            })?;
        Ok(Saving {
            order,
            wake,
            events,
        })
    }

    /// What has happened since the last call, one thing at a time.
    pub fn progress(&self) -> Option<Progress> {
        // Only the waking counts: the events themselves come by the channel.
        let _ = self.wake.read();
        match self.events.try_recv() {
            Ok(progress) => Some(progress),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Progress::Over(Err(Failure::Lost(
                "the checkpoint's thread ended without a result".into(),
            )))),
        }
    }
}

impl AsFd for Saving {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

fn save(
    order: Order,
    running: &dyn Running,
    lock: &Lock,
    commit: &Commit,
    look: &Look,
    goes_on: &dyn Fn(),
) -> Result<Saved, Failure> {
    let begun = Instant::now();
    let draft = lock
        .begin(order.predicted)
        .map_err(|why| Failure::Alive(why.to_string()))?;
    let mut durations = Durations::default();
    durations.note(durations::ROOM, begun.elapsed());
    let engine_begun = Instant::now();
    let outside = Cell::new(Outside::default());
    let at_rest = || outside.set(look());
    match running.checkpoint(draft.dir(), order.then, order.limit, &at_rest) {
        Ok(()) => {}
        Err(CheckpointError::Alive(why)) => return Err(Failure::Alive(why)),
        Err(CheckpointError::Ended(why)) => return Err(Failure::Ended(why)),
        Err(CheckpointError::Lost(why)) => return Err(Failure::Lost(why)),
    }
    durations.note(durations::ENGINE, engine_begun.elapsed());
    if order.then == Then::Continue {
        goes_on();
    }
    let saved = fault::point("save-engine-done")
        .map_err(|why| why.to_string())
        .and_then(|()| commit(draft, order, durations, outside.take()));
    match saved {
        Ok(generation) => Ok(Saved {
            generation: generation.number(),
            bytes: generation.manifest().bytes,
            trigger: generation.manifest().trigger,
            took: begun.elapsed(),
        }),
        Err(why) => Err(match order.then {
            Then::Continue => Failure::Alive(why),
            Then::Stop => Failure::Lost(why),
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Mutex;

    use nix::sys::signal::Signal;
    use nix::sys::wait::WaitStatus;
    use nix::unistd::Pid;

    use super::*;
    use crate::engine::End;
    use crate::engine::processes::Process;
    use crate::store::{Name, Store, tests};

    /// An application that is saved at once.
    struct Instantly;

    impl Running for Instantly {
        fn child(&self) -> Pid {
            Pid::this()
        }
        fn signal(&self, _: Signal) {}
        fn checkpoint(
            &self,
            into: &Path,
            _: Then,
            _: Duration,
            at_rest: &dyn Fn(),
        ) -> Result<(), CheckpointError> {
            at_rest();
            std::fs::create_dir(into.join("rank-0"))
                .and_then(|()| std::fs::write(into.join("rank-0/file"), "state"))
                .map_err(|why| CheckpointError::Alive(why.to_string()))
        }
        fn processes(&self) -> Vec<Process> {
            Vec::new()
        }
        fn ended(&self, _: WaitStatus) -> End {
            End::Exit(0)
        }
        fn kill(&self) {}
    }

    #[test]
    fn a_manifest_has_the_time_of_every_phase() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let cell = store.name(&Name::parse("heat").unwrap());
        let lock = tests::lock(&cell, &tests::me(1, 0));
        let order = Order {
            trigger: Trigger::Interval,
            then: Then::Continue,
            limit: Duration::from_secs(1),
            predicted: 0,
            computed: Computed::default(),
        };
        let manifest = Arc::new(Mutex::new(None));
        let kept = manifest.clone();
        let commit: Box<Commit> = Box::new(move |draft, _, mut durations, _| {
            durations.note(durations::OPEN_FILES, Duration::from_millis(7));
            let mut facts = tests::facts(1);
            facts.durations = durations;
            let generation = draft.commit(facts, 2).map_err(|why| why.to_string())?;
            *kept.lock().unwrap() = Some(generation.manifest().clone());
            Ok(generation)
        });
        save(
            order,
            &Instantly,
            &lock,
            commit.as_ref(),
            &Outside::default,
            &|| (),
        )
        .unwrap();
        let manifest = manifest.lock().unwrap().take().unwrap();
        let names: Vec<_> = manifest
            .durations
            .phases()
            .iter()
            .map(|(name, _)| *name)
            .collect();
        assert_eq!(names, ["room", "engine", "open-files", "hash", "sync"]);
    }
}
