//! Whether a checkpoint fits into the time that Slurm leaves a job, and what to say if it does not.
//!
//! Contract: Slurm's configuration is asked for by a thread of its own, once for a run of a job:
//! the helpers of one run share the answer by a note at the NAME. [`Adviser::look`] never blocks and
//! finds the notice too short once at most.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use serde::{Deserialize, Serialize};

use crate::policy::{self, Cost};
use crate::slurm::{Job, Notice, Step};
use crate::store::{Cell, disk};

/// Between two looks at an application's memory.
const LOOK: Duration = Duration::from_secs(20);

/// The note at the NAME, some hundred bytes.
const NOTE: &str = "notice.json";
const LARGEST: u64 = 4096;

/// The notice of a job's run.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Note {
    job: u32,
    run: u32,
    notice: Notice,
}

pub struct Adviser {
    found: Arc<OnceLock<Notice>>,
    batch_step: bool,
    next: Option<Instant>,
}

/// That the notice is too short.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TooShort {
    /// What a checkpoint is expected to take.
    pub needed: Duration,
    pub notice: Duration,
    pub of: Notice,
}

impl Adviser {
    /// Never finds anything outside of a job. The bell is rung once the notice is known.
    pub fn of(job: Option<&Job>, name: &Cell, bell: &Arc<EventFd>) -> Adviser {
        let found = Arc::new(OnceLock::new());
        let partition = std::env::var("SLURM_JOB_PARTITION").ok();
        let mut next = None;
        if let (Some(job), Some(partition)) = (job, partition) {
            let (job, name) = (job.clone(), name.clone());
            let (found, bell) = (found.clone(), bell.clone());
            let thread = std::thread::Builder::new()
                .name("notice".into())
                .spawn(move || {
                    if let Some(notice) = find(&job, &name, &partition) {
                        let _ = found.set(notice);
                        let _ = bell.write(1);
                    }
                });
            match thread {
                Ok(_) => next = Some(Instant::now()),
                Err(why) => log::debug!("the notice is not looked up: {why}"),
            }
        }
        Adviser {
            found,
            batch_step: job.is_some_and(|job| matches!(job.step, Step::Batch | Step::Stage)),
            next,
        }
    }

    /// The cost of a checkpoint is known better now: the next look counts.
    pub fn measured(&mut self) {
        self.next = self.next.and(Some(Instant::now()));
    }

    /// Says so, once, if a checkpoint of `memory` bytes does not fit.
    pub fn look(
        &mut self,
        memory: impl FnOnce() -> u64,
        last: Option<Cost>,
        safety: f64,
    ) -> Option<TooShort> {
        let of = *self.found.get()?;
        if Instant::now() < self.next? {
            return None;
        }
        self.next = Some(Instant::now() + LOOK);
        let short = TooShort {
            needed: policy::time_to_save(memory(), last, safety),
            notice: policy::notice(&of, self.batch_step),
            of,
        };
        if short.needed <= short.notice {
            return None;
        }
        self.next = None;
        Some(short)
    }
}

impl std::fmt::Display for TooShort {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            out,
            "to save it may take {} s, but Slurm leaves it {} s when it is {} (KillWait {} s",
            self.needed.as_secs_f64().ceil(),
            self.notice.as_secs(),
            if self.of.preemptible {
                "pre-empted"
            } else {
                "requeued or cancelled"
            },
            self.of.kill_wait.as_secs(),
        )?;
        if self.of.preemptible {
            write!(out, ", GraceTime {} s", self.of.grace_time.as_secs())?;
        }
        out.write_str(")")
    }
}

fn find(job: &Job, name: &Cell, partition: &str) -> Option<Notice> {
    let path = name.dir().join(NOTE);
    let note = disk::read_if_there(&path, LARGEST)
        .ok()
        .flatten()
        .and_then(|text| serde_json::from_slice::<Note>(&text).ok())
        .filter(|note| (note.job, note.run) == (job.id, job.run));
    if let Some(note) = note {
        return Some(note.notice);
    }
    let notice = match Notice::of(partition) {
        Ok(notice) => notice,
        Err(why) => {
            log::debug!("how much time Slurm leaves is not known: {why}");
            return None;
        }
    };
    let note = Note {
        job: job.id,
        run: job.run,
        notice,
    };
    let written = serde_json::to_vec(&note)
        .map_err(|why| why.to_string())
        .and_then(|text| disk::replace(&path, &text).map_err(|why| why.to_string()));
    if let Err(why) = written {
        log::debug!("{why}");
    }
    Some(notice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adviser(kill_wait: u64, preemptible: bool) -> Adviser {
        let found = Arc::new(OnceLock::new());
        found
            .set(Notice {
                kill_wait: Duration::from_secs(kill_wait),
                grace_time: Duration::ZERO,
                preemptible,
            })
            .unwrap();
        Adviser {
            found,
            batch_step: true,
            next: Some(Instant::now()),
        }
    }

    #[test]
    fn it_is_said_once_and_with_the_numbers() {
        let mut adviser = adviser(30, true);
        assert_eq!(adviser.look(|| 1 << 20, None, 1.0), None);
        // Not looked at again at once, whatever has come since.
        assert_eq!(adviser.look(|| unreachable!(), None, 1.0), None);
        adviser.measured();
        let slow = Some(Cost {
            bytes: 1 << 20,
            took: Duration::from_secs(40),
        });
        let short = adviser.look(|| 1 << 20, slow, 1.0).unwrap();
        assert_eq!(
            short.to_string(),
            "to save it may take 40 s, but Slurm leaves it 30 s when it is pre-empted (KillWait \
             30 s, GraceTime 0 s)"
        );
        adviser.measured();
        assert_eq!(adviser.look(|| 1 << 20, slow, 1.0), None);
    }

    #[test]
    fn what_cannot_be_preempted_can_be_cancelled() {
        let short = adviser(30, false).look(|| 5 << 30, None, 1.0).unwrap();
        let text = short.to_string();
        assert!(
            text.contains("when it is requeued or cancelled (KillWait 30 s)"),
            "{text}"
        );
    }

    #[test]
    fn nothing_is_known_outside_of_a_job() {
        let dir = tempfile::tempdir().unwrap();
        let store = crate::store::Store::open(&dir.path().join("store")).unwrap();
        let name = store.name(&crate::store::Name::parse("heat").unwrap());
        let bell = Arc::new(EventFd::new().unwrap());
        let mut adviser = Adviser::of(None, &name, &bell);
        adviser.measured();
        assert_eq!(adviser.look(|| unreachable!(), None, 1.0), None);
    }
}
