//! Which runs of a job got on: two small notes beside the lock of a NAME.
//!
//! Contract: the computations of one job write here from several nodes without a lock, so each note
//! is replaced whole and says the same whoever of one run writes it. What the notes mean is decided
//! in `policy`.

use serde::{Deserialize, Serialize};

use super::{Cell, Result};

const BEGUN: &str = "run.json";
const PROGRESSED: &str = "progress.json";

/// The last run in which an application was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BegunRun {
    pub job: u32,
    /// Slurm's restart count.
    pub run: u32,
    /// Runs of the job right before this one that came to nothing.
    pub without_progress: u32,
    /// The job was held in this run.
    #[serde(default)]
    pub held: bool,
}

/// The last run that saved something new.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressedRun {
    pub job: u32,
    pub run: u32,
}

/// On the cell of a NAME, whose directory has to be there.
impl Cell {
    pub fn begun_run(&self) -> Result<Option<BegunRun>> {
        self.read_note(BEGUN)
    }

    pub fn set_begun_run(&self, run: &BegunRun) -> Result<()> {
        self.write_note(BEGUN, run)
    }

    pub fn progressed_run(&self) -> Result<Option<ProgressedRun>> {
        self.read_note(PROGRESSED)
    }

    pub fn set_progressed_run(&self, run: &ProgressedRun) -> Result<()> {
        self.write_note(PROGRESSED, run)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Name, Store};
    use super::*;

    #[test]
    fn notes_are_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let cell = store.name(&Name::parse("heat").unwrap());
        std::fs::create_dir(cell.dir()).unwrap();
        assert_eq!(cell.begun_run().unwrap(), None);
        let begun = BegunRun {
            job: 7,
            run: 3,
            without_progress: 2,
            held: true,
        };
        cell.set_begun_run(&begun).unwrap();
        assert_eq!(cell.begun_run().unwrap(), Some(begun));
        let progressed = ProgressedRun { job: 7, run: 2 };
        cell.set_progressed_run(&progressed).unwrap();
        assert_eq!(cell.progressed_run().unwrap(), Some(progressed));
        std::fs::write(cell.dir().join(BEGUN), "{").unwrap();
        assert!(cell.begun_run().is_err());
    }
}
