//! When the job ends, kept up to date while it runs.
//!
//! Contract: [`Deadline::instant`] never blocks. Slurm is asked by a thread of its own, about once
//! a minute (with jitter, so that the jobs of a site do not ask together): a limit that an
//! administrator changes and the new end that a pre-emption sets are seen that way.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::slurm::Job;

/// What was heard last.
#[derive(Debug, Clone, Copy)]
struct Known {
    end: Option<SystemTime>,
    /// The job is being pre-empted and uses its GraceTime.
    preempted: bool,
}

/// The job's end, as last heard of.
pub struct Deadline {
    known: Arc<Mutex<Known>>,
    given_up: bool,
    /// Dropping it ends the thread.
    asking: Option<Sender<()>>,
}

impl Deadline {
    /// The end of `job`; never, without a job. Rank 0 asks for all.
    pub fn of(job: Option<&Job>) -> Deadline {
        let known = Arc::new(Mutex::new(Known {
            end: job.and_then(end_time),
            preempted: false,
        }));
        let asking = job
            .filter(|job| job.rank == 0)
            .and_then(|job| ask(job.clone(), known.clone()));
        Deadline {
            known,
            given_up: false,
            asking,
        }
    }

    /// The job's end, if it has one and it is still to be met.
    pub fn instant(&self) -> Option<Instant> {
        if self.given_up {
            return None;
        }
        Instant::now().checked_add(self.left()?)
    }

    /// The time until the job's end, if it has one.
    pub fn left(&self) -> Option<Duration> {
        let left = self.known().end?.duration_since(SystemTime::now());
        Some(left.unwrap_or(Duration::ZERO))
    }

    /// Whether the end is that of the GraceTime of a pre-emption.
    pub fn preempted(&self) -> bool {
        self.known().preempted
    }

    /// Slurm is asked now rather than within the minute: there is something new.
    pub fn look(&self) {
        if let Some(asking) = &self.asking {
            // The thread lives as long as its sender.
            let _ = asking.send(());
        }
    }

    fn known(&self) -> Known {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing more is tried before this end.
    pub fn give_up(&mut self) {
        self.given_up = true;
    }
}

fn end_time(job: &Job) -> Option<SystemTime> {
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(job.end_time?))
}

fn ask(job: Job, known: Arc<Mutex<Known>>) -> Option<Sender<()>> {
    let (sender, ended) = channel::<()>();
    let minute = move || {
        let spread = u64::from(std::process::id()) * 7919 + u64::from(job.id) * 104_729;
        Duration::from_millis(55_000 + spread % 10_000)
    };
    let mut wait = if job.end_time.is_some() {
        minute()
    } else {
        Duration::ZERO
    };
    let thread = std::thread::Builder::new()
        .name("clock".into())
        .spawn(move || {
            while let Ok(()) | Err(RecvTimeoutError::Timeout) = ended.recv_timeout(wait) {
                match job.view() {
                    Ok(view) => {
                        *known.lock().unwrap_or_else(PoisonError::into_inner) = Known {
                            end: view.end_time,
                            preempted: view.preempt_time.is_some(),
                        }
                    }
                    Err(why) => log::debug!("when the job ends is not known: {why}"),
                }
                wait = minute();
            }
        });
    match thread {
        Ok(_) => Some(sender),
        Err(why) => {
            log::warn!("changes of the time limit will not be noticed: {why}");
            None
        }
    }
}
