//! When the job ends, kept up to date while it runs.
//!
//! Contract: [`Deadline::instant`] never blocks. Slurm is asked by a thread of its own, about once
//! a minute (with jitter, so that the jobs of a site do not ask together): a limit that an
//! administrator changes and the new end that a pre-emption sets are seen that way.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::slurm::Job;

/// The job's end, as last heard of.
pub struct Deadline {
    end: Arc<Mutex<Option<SystemTime>>>,
    given_up: bool,
    /// Dropping it ends the thread.
    _asking: Option<Sender<()>>,
}

impl Deadline {
    /// The end of `job`; never, without a job. Rank 0 asks for all.
    pub fn of(job: Option<&Job>) -> Deadline {
        let end = Arc::new(Mutex::new(job.and_then(known)));
        let asking = job
            .filter(|job| job.rank == 0)
            .and_then(|job| ask(job.clone(), end.clone()));
        Deadline {
            end,
            given_up: false,
            _asking: asking,
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
        let end = (*self.end.lock().unwrap_or_else(PoisonError::into_inner))?;
        let left = end.duration_since(SystemTime::now());
        Some(left.unwrap_or(Duration::ZERO))
    }

    /// Nothing more is tried before this end.
    pub fn give_up(&mut self) {
        self.given_up = true;
    }
}

fn known(job: &Job) -> Option<SystemTime> {
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(job.end_time?))
}

fn ask(job: Job, end: Arc<Mutex<Option<SystemTime>>>) -> Option<Sender<()>> {
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
            while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(wait) {
                match job.view() {
                    Ok(view) => *end.lock().unwrap_or_else(PoisonError::into_inner) = view.end_time,
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
