//! Which of a job's steps is which computation.
//!
//! Contract: a step is known by what it runs (a *stem*) and by how many steps of this run with the
//! same stem came before it, never by its number, so that a script that took another way in an
//! earlier run still finds its states. The first is `STEM`, the second `STEM.2`… Claims of one run
//! are files `NAME/claims/JOB.RUN/KEY` that hold the step; they are made by link(2), so that two
//! steps that start together do not get the same key.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use super::{At, Cell, Error, Result, StepKey, disk};

/// Most steps with the same command in one run.
const MOST: u32 = 100_000;
/// How long a rank waits for rank 0's claim, and how often it looks: ranks may be on other nodes.
const PATIENCE: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(50);

impl Cell {
    /// The key of step `step` of run `run` of `job`. Rank 0 (`claims`) makes the claim, the other
    /// ranks of the step wait for it.
    pub fn claim_step(
        &self,
        stem: &str,
        (job, run): (u32, u32),
        step: &str,
        claims: bool,
    ) -> Result<StepKey> {
        let parent = self.name_dir().join("claims");
        let dir = parent.join(format!("{job}.{run}"));
        if claims {
            for dir in [&self.name_dir(), &parent, &dir] {
                disk::private_dir(dir, false)?;
            }
        }
        let begun = Instant::now();
        let mut number = 1;
        while number <= MOST {
            let key = match number {
                1 => stem.to_owned(),
                _ => format!("{stem}.{number}"),
            };
            let path = dir.join(&key);
            match disk::read_if_there(&path, 64)? {
                Some(bytes) if bytes == step.as_bytes() => return StepKey::parse(&key),
                Some(_) => number += 1,
                None if claims => {
                    let own = dir.join(disk::temporary_name(key.as_ref()));
                    disk::create(&own, step.as_bytes()).at("write", &own)?;
                    let linked = fs::hard_link(&own, &path);
                    disk::remove(&own)?;
                    match linked {
                        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                            return Err(Error::from_io("create", &path, error));
                        }
                        // Looked at again: ours, or somebody was quicker.
                        _ => {}
                    }
                }
                None if begun.elapsed() > PATIENCE => break,
                None => {
                    std::thread::sleep(LOOK);
                    number = 1;
                }
            }
        }
        Err(Error::Refused(format!(
            "step {step} of job {job} has no place in {}: rank 0 did not claim one in {} s",
            self.name(),
            PATIENCE.as_secs()
        )))
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

#[cfg(test)]
mod tests {
    use crate::store::{Name, Store};

    #[test]
    fn the_same_command_has_a_key_for_each_time_it_is_run() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let name = store.name(&Name::parse("run").unwrap());
        let claim = |stem: &str, run, step: &str, rank0| {
            name.claim_step(stem, (7, run), step, rank0)
                .unwrap()
                .to_string()
        };
        assert_eq!(claim("app-1", 0, "0", true), "app-1");
        assert_eq!(
            claim("app-1", 0, "0", false),
            "app-1",
            "another rank of that step"
        );
        assert_eq!(claim("app-1", 0, "1", true), "app-1.2");
        assert_eq!(claim("app-2", 0, "2", true), "app-2");
        assert_eq!(
            claim("app-1", 1, "5", true),
            "app-1",
            "the next run begins again"
        );
        name.forget_claims((7, 1)).unwrap();
        assert_eq!(claim("app-1", 1, "5", true), "app-1");
        assert_eq!(claim("app-1", 0, "9", true), "app-1", "forgotten");
    }
}
