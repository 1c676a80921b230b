//! When the job has to be saved because of the time or because of what is planned with its nodes,
//! kept up to date while it runs.
//!
//! Contract: nothing here blocks its caller. Slurm is asked by a thread of its own, about once in
//! config `query_interval` (with jitter, so that the jobs of a site do not ask together), or when
//! somebody wants it ([`Clock::look`]). What it was told is left in `outlook.json` of the NAME: the
//! helpers of one job take what another has asked, and only ask where that is old. `policy` says what
//! it means.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};

use crate::config::{Config, OnEmptying};
use crate::evacuation::Answer;
use crate::policy::{self, Due, Leaving};
use crate::slurm::outlook::{self, Outlook};
use crate::slurm::{self, Job, SlurmError};
use crate::store::disk;

/// The name of what was heard last, in a NAME's directory.
const SHARED: &str = "outlook.json";

/// It is some hundred bytes.
const LARGEST: u64 = 4096;

/// How far the clocks of two nodes may be apart.
const SKEW: Duration = Duration::from_secs(5);

/// The job's outlook, as last heard of, and what was done about it.
pub struct Clock {
    outlook: Arc<Mutex<Outlook>>,
    on_drain: bool,
    on_maintenance: bool,
    /// Deadlines for which nothing more is tried.
    done: Vec<(Due, SystemTime)>,
    /// The drain that was answered: an evacuation's number, or nothing of any other.
    answered: Option<Option<String>>,
    news: Option<Arc<EventFd>>,
    /// Dropping it ends the thread.
    thread: Option<Sender<Order>>,
}

enum Order {
    /// What was heard before this moment is too old.
    Look(SystemTime),
    /// An answer to the evacuation of this number.
    Answer(String, Answer),
}

/// A drained node's wish that was not met yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Whether the job ends, or is only saved.
    pub leave: bool,
}

impl Clock {
    /// The outlook of `job`, whose NAME's directory is `name`; nothing ever happens without a job.
    /// Rank 0 asks for all.
    pub fn of(job: Option<&Job>, name: &Path, config: &Config) -> std::io::Result<Clock> {
        let outlook = Arc::new(Mutex::new(Outlook {
            end: job.and_then(known),
            ..Outlook::default()
        }));
        let mut clock = Clock {
            outlook: outlook.clone(),
            on_drain: config.on_drain == OnEmptying::Save,
            on_maintenance: config.on_maintenance == OnEmptying::Save,
            done: Vec::new(),
            answered: None,
            news: None,
            thread: None,
        };
        let Some(job) = job.filter(|job| job.rank == 0) else {
            return Ok(clock);
        };
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let news = Arc::new(EventFd::from_flags(flags)?);
        let asking = Asking {
            job: job.clone(),
            shared: name.join(SHARED),
            interval: config.query_interval,
            jitter: jitter(config.query_interval, job.id),
            outlook,
            news: news.clone(),
            said: None,
            ask: outlook::outlook,
        };
        let (sender, orders) = channel();
        std::thread::Builder::new()
            .name("clock".into())
            .spawn(move || asking.run(&orders))?;
        clock.news = Some(news);
        clock.thread = Some(sender);
        Ok(clock)
    }

    /// Readable when there is something new ([`Clock::heard`]).
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.news.as_ref().map(|news| news.as_fd())
    }

    /// To be called when [`Clock::fd`] is readable.
    pub fn heard(&self) {
        // Only the waking counts; there may be nothing.
        let _ = self.news.as_ref().map(|news| news.read());
    }

    /// Has Slurm asked now: somebody says that there is something new.
    pub fn look(&self) {
        self.order(Order::Look(SystemTime::now()));
    }

    /// The next time by which the job has to be saved, and why.
    pub fn deadline(&self) -> Option<(Due, Instant)> {
        let (due, time) = self.next()?;
        Some((due, Instant::now().checked_add(until(time))?))
    }

    /// The time that is left, if it is limited.
    pub fn left(&self) -> Option<Duration> {
        policy::deadline(&self.outlook(), self.on_maintenance, &[]).map(|(_, time)| until(time))
    }

    /// Whether the next deadline is the end of the GraceTime of a pre-emption.
    pub fn preempted(&self) -> bool {
        self.outlook().preempted
    }

    /// Whether the job ends once it is saved for this reason, or runs on.
    pub fn stops_at(&self, due: Due) -> bool {
        policy::stops_at(due, &self.outlook())
    }

    /// Nothing more is tried before the next deadline.
    pub fn give_up(&mut self) {
        self.done.extend(self.next());
    }

    fn next(&self) -> Option<(Due, SystemTime)> {
        policy::deadline(&self.outlook(), self.on_maintenance, &self.done)
    }

    /// What a drained node asks for, once for each evacuation and each drain.
    pub fn drained(&mut self) -> Option<Drained> {
        let outlook = self.outlook();
        let leaving = policy::leaving(&outlook, self.on_drain);
        if leaving == Leaving::Stay {
            self.answered = None;
            return None;
        }
        if self.answered.as_ref() == Some(&outlook.evacuation) {
            return None;
        }
        self.answered = Some(outlook.evacuation);
        Some(Drained {
            leave: leaving == Leaving::Leave,
        })
    }

    /// Tells whoever empties the node that the job runs on, and why.
    pub fn stays(&self, why: &str) {
        if let Some(Some(number)) = &self.answered {
            self.order(Order::Answer(
                number.clone(),
                Answer::Failed(why.to_owned()),
            ));
        }
    }

    /// The evacuation that the job is leaving for.
    pub fn evacuation(&self) -> Option<&str> {
        self.answered.as_ref()?.as_deref()
    }

    fn order(&self, order: Order) {
        // Without a thread there is no job to ask for; one that has ended has said why.
        let _ = self.thread.as_ref().map(|thread| thread.send(order));
    }

    fn outlook(&self) -> Outlook {
        let outlook = self.outlook.lock();
        outlook.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn until(time: SystemTime) -> Duration {
    time.duration_since(SystemTime::now()).unwrap_or_default()
}

fn known(job: &Job) -> Option<SystemTime> {
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(job.end_time?))
}

/// Up to a tenth of `interval`, different for every process.
fn jitter(interval: Duration, job: u32) -> Duration {
    let spread = u64::from(std::process::id()) * 7919 + u64::from(job) * 104_729;
    interval.mul_f64((spread % 1000) as f64 / 10_000.0)
}

/// What one helper of a job was told by Slurm, for the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Shared {
    job: u32,
    run: u32,
    /// When Slurm was asked.
    asked: SystemTime,
    outlook: Outlook,
}

/// The thread that asks.
struct Asking {
    job: Job,
    shared: PathBuf,
    interval: Duration,
    jitter: Duration,
    outlook: Arc<Mutex<Outlook>>,
    news: Arc<EventFd>,
    /// The evacuation that was answered.
    said: Option<String>,
    /// What Slurm says of a job.
    ask: fn(u32) -> Result<Outlook, SlurmError>,
}

impl Asking {
    fn run(mut self, orders: &std::sync::mpsc::Receiver<Order>) {
        // Where the end is known, there is time; and many jobs may begin together.
        let mut next = match (self.job.end_time, self.read()) {
            (Some(_), None) => Instant::now() + 10 * self.jitter,
            _ => Instant::now(),
        };
        loop {
            let wait = next.saturating_duration_since(Instant::now());
            match orders.recv_timeout(wait) {
                Err(RecvTimeoutError::Timeout) => {
                    next = self.look(SystemTime::now() - self.interval);
                }
                Ok(Order::Look(not_before)) => next = self.look(not_before),
                Ok(Order::Answer(number, answer)) => self.say(&number, &answer),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Hears what is new, from Slurm or from another helper that has asked since `not_before`. Says
    /// when it will be old.
    fn look(&mut self, not_before: SystemTime) -> Instant {
        let shared = self.read().filter(|shared| {
            shared.asked >= not_before && shared.asked <= SystemTime::now() + SKEW
        });
        let heard = match shared {
            Some(shared) => Some(shared),
            None => self.ask(),
        };
        let Some(heard) = heard else {
            return Instant::now() + self.interval + self.jitter;
        };
        if let Some(number) = &heard.outlook.evacuation
            && self.said.as_ref() != Some(number)
        {
            self.said = Some(number.clone());
            self.say(number, &Answer::Leaving);
        }
        let fresh = until(heard.asked + self.interval);
        *self.outlook.lock().unwrap_or_else(PoisonError::into_inner) = heard.outlook;
        // A full counter wakes as well.
        let _ = self.news.write(1);
        Instant::now() + fresh + self.jitter
    }

    fn ask(&self) -> Option<Shared> {
        let asked = SystemTime::now();
        let shared = match (self.ask)(self.job.id) {
            Ok(outlook) => Shared {
                job: self.job.id,
                run: self.job.run,
                asked,
                outlook,
            },
            Err(why) => {
                log::debug!("what becomes of the job is not known: {why}");
                return None;
            }
        };
        let written = serde_json::to_vec(&shared)
            .map_err(|why| why.to_string())
            .and_then(|text| disk::replace(&self.shared, &text).map_err(|why| why.to_string()));
        if let Err(why) = written {
            log::debug!("other helpers have to ask for themselves: {why}");
        }
        Some(shared)
    }

    fn read(&self) -> Option<Shared> {
        let text = disk::read_if_there(&self.shared, LARGEST).ok()??;
        serde_json::from_slice::<Shared>(&text)
            .ok()
            .filter(|shared| (shared.job, shared.run) == (self.job.id, self.job.run))
    }

    fn say(&self, number: &str, answer: &Answer) {
        if let Err(why) = slurm::answer(&self.job.target, Some((number, answer))) {
            log::warn!("whoever empties the node cannot be told of this job: {why}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::slurm::Step;

    /// How often Slurm was asked about job 7, and what it said: of each question another end.
    static ASKED: AtomicU32 = AtomicU32::new(0);

    fn slurm(_: u32) -> Result<Outlook, SlurmError> {
        let count = ASKED.fetch_add(1, Ordering::SeqCst) + 1;
        Ok(Outlook {
            end: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(count.into())),
            ..Outlook::default()
        })
    }

    fn asking(dir: &Path, run: u32) -> Asking {
        Asking {
            job: Job {
                id: 7,
                target: "7".into(),
                step: Step::Batch,
                run,
                rank: 0,
                ranks: 1,
                nodes: 1,
                end_time: None,
            },
            shared: dir.join(SHARED),
            interval: Duration::from_secs(60),
            jitter: Duration::ZERO,
            outlook: Arc::default(),
            news: Arc::new(EventFd::new().unwrap()),
            said: None,
            ask: slurm,
        }
    }

    fn end(asking: &Asking) -> u64 {
        let end = asking.outlook.lock().unwrap().end.unwrap();
        end.duration_since(SystemTime::UNIX_EPOCH)
            .unwrap()
            .as_secs()
    }

    #[test]
    fn helpers_of_one_job_ask_once() {
        let dir = tempfile::tempdir().unwrap();
        let (mut one, mut other) = (asking(dir.path(), 0), asking(dir.path(), 0));
        one.look(SystemTime::now() - one.interval);
        let old = other.look(SystemTime::now() - other.interval);
        assert_eq!(
            (end(&one), end(&other)),
            (1, 1),
            "the other's answer is taken"
        );
        // It is old when the one that was taken is.
        assert!(old <= Instant::now() + other.interval);
        // Somebody says that there is something new since.
        other.look(SystemTime::now());
        assert_eq!(end(&other), 2);
        one.look(SystemTime::now() - one.interval);
        assert_eq!(end(&one), 2);
        let mut later = asking(dir.path(), 1);
        later.look(SystemTime::now() - later.interval);
        assert_eq!(end(&later), 3, "of another run");
        // Of a clock that is wrong.
        let mut shared = later.read().unwrap();
        shared.asked = SystemTime::now() + Duration::from_secs(3600);
        std::fs::write(&later.shared, serde_json::to_vec(&shared).unwrap()).unwrap();
        later.look(SystemTime::now() - later.interval);
        assert_eq!(end(&later), 4);
        std::fs::write(&later.shared, "{").unwrap();
        later.look(SystemTime::now() - later.interval);
        assert_eq!(end(&later), 5);
        assert_eq!(ASKED.load(Ordering::SeqCst), 5);
    }
}
