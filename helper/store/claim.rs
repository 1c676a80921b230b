//! Which of a job's steps is which computation.
//!
//! Contract: a step is known by what it runs (a *stem*) and by how many steps of this run with the
//! same stem came before it, never by its number, so that a script that took another way in an
//! earlier run still finds its states. The first is `STEM`, the second `STEM.2`… Claims of one run
//! are files `NAME/claims/JOB.RUN/KEY` that hold the step; they are made by link(2), so that two
//! steps that start together do not get the same key. Rank 0 says for all ranks what a step runs:
//! those of another component of a heterogeneous step may run something else, under one step number.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{At, Cell, Error, Result, StepKey, disk};

/// Most steps with the same command in one run.
const MOST: u32 = 100_000;
/// How long a rank waits for rank 0's claim, and how often it looks: ranks may be on other nodes.
const PATIENCE: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(50);

impl Cell {
    /// The key of step `step` of run `run` of `job`, which runs `stem`. For its rank 0; the other
    /// ranks have [`Cell::claimed_step`].
    pub fn claim_step(&self, stem: &str, (job, run): (u32, u32), step: &str) -> Result<StepKey> {
        let (parent, dir) = self.claims(job, run);
        for dir in [&self.name_dir(), &parent, &dir] {
            disk::private_dir(dir, false)?;
        }
        for number in 1..=MOST {
            let key = match number {
                1 => stem.to_owned(),
                _ => format!("{stem}.{number}"),
            };
            let path = dir.join(&key);
            let own = dir.join(disk::temporary_name(key.as_ref()));
            disk::create(&own, contents(step).as_bytes()).at("write", &own)?;
            let linked = fs::hard_link(&own, &path);
            disk::remove(&own)?;
            match linked {
                Ok(()) => return StepKey::parse(&key),
                // Somebody was quicker, if it is not ours already.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::from_io("create", &path, error)),
            }
            if is_claim_of(&path, step)? {
                return StepKey::parse(&key);
            }
        }
        Err(Error::Refused(format!(
            "step {step} of job {job} has no place in {}: {MOST} steps of this run have the same \
             command",
            self.name()
        )))
    }

    /// The key that rank 0 of step `step` has claimed, once it has.
    pub fn claimed_step(&self, (job, run): (u32, u32), step: &str) -> Result<StepKey> {
        let (_, dir) = self.claims(job, run);
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            for name in disk::names_in(&dir)? {
                // Temporary ones are none.
                let Ok(key) = StepKey::parse(&name.to_string_lossy()) else {
                    continue;
                };
                if is_claim_of(&dir.join(&name), step)? {
                    return Ok(key);
                }
            }
            std::thread::sleep(LOOK);
        }
        Err(Error::Refused(format!(
            "step {step} of job {job} has no place in {}: rank 0 did not claim one in {} s. All \
             components of a heterogeneous step need the same --container-checkpoint",
            self.name(),
            PATIENCE.as_secs()
        )))
    }

    /// The directories of all claims, and of those of a run.
    fn claims(&self, job: u32, run: u32) -> (PathBuf, PathBuf) {
        let parent = self.name_dir().join("claims");
        let dir = parent.join(format!("{job}.{run}"));
        (parent, dir)
    }

    /// Forgets the claims of other runs than `run` of `job`. Called by whoever holds the NAME for
    /// this run.
    pub fn forget_claims(&self, (job, run): (u32, u32)) -> Result<()> {
        let parent = self.name_dir().join("claims");
        let own = format!("{job}.{run}");
        for name in disk::names_in(&parent)? {
            if name.to_string_lossy() != own.as_str() {
                disk::remove(&parent.join(name))?;
            }
        }
        Ok(())
    }
}

/// What the claim of a step holds. That of a stage holds a process id.
fn contents(step: &str) -> String {
    format!("step {step}")
}

fn is_claim_of(path: &Path, step: &str) -> Result<bool> {
    let found = disk::read_if_there(path, 64)?;
    Ok(found.is_some_and(|found| found == contents(step).as_bytes()))
}

#[cfg(test)]
mod tests {
    use crate::store::{Name, Store};

    #[test]
    fn the_same_command_has_a_key_for_each_time_it_is_run() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let name = store.name(&Name::parse("run").unwrap());
        let claim = |stem: &str, run, step: &str| {
            let key = name.claim_step(stem, (7, run), step).unwrap();
            key.to_string()
        };
        let other_rank = |run, step: &str| name.claimed_step((7, run), step).unwrap().to_string();
        assert_eq!(claim("app-1", 0, "0"), "app-1");
        assert_eq!(other_rank(0, "0"), "app-1", "whatever it runs");
        assert_eq!(claim("app-1", 0, "1"), "app-1.2");
        assert_eq!(claim("app-2", 0, "2"), "app-2");
        assert_eq!(other_rank(0, "2"), "app-2");
        assert_eq!(other_rank(0, "1"), "app-1.2");
        assert_eq!(claim("app-1", 1, "5"), "app-1", "the next run begins again");
        assert_eq!(other_rank(1, "5"), "app-1");
        name.forget_claims((7, 1)).unwrap();
        assert_eq!(claim("app-1", 1, "5"), "app-1");
        assert_eq!(claim("app-1", 0, "9"), "app-1", "forgotten");
    }
}
