//! A cell: the directory of one computation, `NAME` itself or `NAME/steps/KEY`.
//!
//! Contract: what is here needs no lock: it reads, or makes marks that are made in one step.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::generation::{Entry, Fault, Generation, Marks, dir_name, number_of};
use super::history::{self, History};
use super::lock::{Holder, Lock, Witness};
use super::{At, Error, Name, Result, StepKey, Store, Time, disk};
use crate::engine::End;

/// One computation's place in the store. Need not exist.
#[derive(Debug, Clone)]
pub struct Cell {
    store: Store,
    name: Name,
    key: Option<StepKey>,
    dir: PathBuf,
}

/// That an application ended by itself. Generations up to `generation` are of a finished
/// computation; the next run starts fresh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completion {
    pub end: End,
    pub job: Option<u32>,
    pub run: u32,
    pub time: Time,
    /// The newest generation at that time; 0 if there was none. Set by the store.
    #[serde(default)]
    pub generation: u64,
}

/// That a run started fresh on purpose. Generations up to `generation` are of an earlier
/// computation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fresh {
    pub job: Option<u32>,
    pub run: u32,
    pub time: Time,
    pub generation: u64,
}

/// What the directory of a NAME is called while it is being deleted.
pub(super) const DOOMED: &str = ".deleted.";

const NOTE_CAP: u64 = 64 << 10;

impl Cell {
    pub(super) fn new(store: Store, name: Name, key: Option<StepKey>) -> Cell {
        let mut dir = store.dir.join(name.as_str());
        if let Some(key) = &key {
            dir = dir.join("steps").join(key.as_str());
        }
        Cell {
            store,
            name,
            key,
            dir,
        }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn name(&self) -> &Name {
        &self.name
    }

    pub fn key(&self) -> Option<&StepKey> {
        self.key.as_ref()
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The cell of an inner step.
    pub fn step(&self, key: &StepKey) -> Cell {
        Cell::new(self.store.clone(), self.name.clone(), Some(key.clone()))
    }

    /// The cells of this NAME's inner steps, sorted by key.
    pub fn steps(&self) -> Result<Vec<Cell>> {
        Ok(disk::names_in(&self.name_dir().join("steps"))?
            .iter()
            .filter_map(|name| StepKey::parse(name.to_str()?).ok())
            .map(|key| self.step(&key))
            .filter(|cell| cell.dir.is_dir())
            .collect())
    }

    /// `NAME` or `NAME/KEY`, as people write it.
    pub fn label(&self) -> String {
        match &self.key {
            Some(key) => format!("{}/{key}", self.name),
            None => self.name.to_string(),
        }
    }

    pub fn exists(&self) -> bool {
        self.dir.is_dir()
    }

    pub(super) fn name_dir(&self) -> PathBuf {
        self.store.dir.join(self.name.as_str())
    }

    pub(super) fn generations_dir(&self) -> PathBuf {
        self.dir.join("generations")
    }

    pub(super) fn work_dir(&self) -> PathBuf {
        self.dir.join("work")
    }

    pub(super) fn marks(&self) -> Marks {
        Marks(self.dir.join("marks"))
    }

    pub(super) fn generation_dir(&self, number: u64) -> PathBuf {
        self.generations_dir().join(dir_name(number))
    }

    /// Creates what is missing of the cell's directories, and refuses any that others could write.
    pub(super) fn create(&self) -> Result<()> {
        disk::private_dir(&self.name_dir(), false)?;
        if self.key.is_some() {
            disk::private_dir(&self.name_dir().join("steps"), false)?;
            disk::private_dir(&self.dir, false)?;
        }
        for dir in [
            self.generations_dir(),
            self.work_dir(),
            self.dir.join("marks"),
        ] {
            disk::private_dir(&dir, false)?;
        }
        Ok(())
    }

    /// Refuses the cell if it is a link, another user's, or others can write to it.
    pub fn check(&self) -> Result<()> {
        for dir in [self.name_dir(), self.dir.clone(), self.generations_dir()] {
            if fs::symlink_metadata(&dir).is_ok() {
                disk::check_private(&dir, self.store.owner)?;
            }
        }
        Ok(())
    }

    /// The numbers of the committed generations, ascending.
    pub fn numbers(&self) -> Result<Vec<u64>> {
        let names = disk::names_in(&self.generations_dir())?;
        let mut numbers: Vec<u64> = names
            .iter()
            .filter_map(|name| number_of(name.to_str()?))
            .collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// A committed generation.
    ///
    /// # Errors
    /// [`Error::Absent`], or [`Error::Damaged`] if its manifest is.
    pub fn generation(&self, number: u64) -> Result<Generation> {
        let dir = self.generation_dir(number);
        if !dir.is_dir() {
            return Err(Error::Absent(format!(
                "generation {number} of {}",
                self.label()
            )));
        }
        Generation::load(&dir, number).map_err(|fault| match fault {
            Fault::Damaged(why) => Error::Damaged { path: dir, why },
            Fault::Unreadable(why) => Error::Io {
                doing: "read",
                path: dir,
                error: io::Error::other(why),
            },
        })
    }

    /// What is known of every committed generation, oldest first. Nothing is verified.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let marks = self.marks();
        let mut entries = Vec::new();
        for number in self.numbers()? {
            let generation = Generation::load(&self.generation_dir(number), number);
            if generation.is_err() && !self.generation_dir(number).exists() {
                continue; // deleted meanwhile
            }
            let (pinned, bad) = (marks.pinned(number)?, marks.bad(number)?);
            entries.push(Entry {
                number,
                pinned,
                bad,
                generation,
            });
        }
        Ok(entries)
    }

    /// How the last computation of this cell ended, unless a newer one has committed since.
    pub fn completion(&self) -> Result<Option<Completion>> {
        let Some(completion) = self.read_note::<Completion>("completed.json")? else {
            return Ok(None);
        };
        let newest = self.numbers()?.last().copied().unwrap_or(0);
        Ok((newest <= completion.generation).then_some(completion))
    }

    /// Up to which generation all belong to earlier computations; 0 if none does.
    pub fn floor(&self) -> Result<u64> {
        let completed = self
            .read_note::<Completion>("completed.json")?
            .map(|c| c.generation);
        let fresh = self.read_note::<Fresh>("fresh.json")?.map(|f| f.generation);
        Ok(completed.max(fresh).unwrap_or(0))
    }

    pub(super) fn read_note<T: serde::de::DeserializeOwned>(
        &self,
        file: &str,
    ) -> Result<Option<T>> {
        let path = self.dir.join(file);
        let Some(bytes) = disk::read_if_there(&path, NOTE_CAP)? else {
            return Ok(None);
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Error::Damaged {
                path,
                why: error.to_string(),
            })
    }

    pub(super) fn write_note<T: Serialize>(&self, file: &str, note: &T) -> Result<()> {
        let path = self.dir.join(file);
        let bytes = serde_json::to_vec_pretty(note)
            .map_err(io::Error::from)
            .at("write", &path)?;
        disk::replace(&path, &bytes)
    }

    /// What happened, oldest first.
    pub fn history(&self) -> Result<History> {
        history::read(&self.dir.join(history::FILE_NAME))
    }

    /// Keeps a generation from every deletion but an explicit one.
    pub fn pin(&self, number: u64) -> Result<()> {
        self.generation_exists(number)?;
        self.marks().pin(number)?;
        // Retention may have renamed it away just before it could see the mark.
        self.generation_exists(number)
    }

    /// Marks a generation as one that cannot be used. It is not deleted.
    pub fn mark_bad(&self, number: u64, reason: &str) -> Result<()> {
        self.generation_exists(number)?;
        self.marks().set_bad(number, reason)
    }

    /// Takes a pin away; false if there was none.
    pub fn unpin(&self, number: u64) -> Result<bool> {
        self.generation_exists(number)?;
        self.marks().unpin(number)
    }

    /// Deletes the whole NAME with all its inner steps. Takes every lock first.
    ///
    /// # Errors
    /// [`Error::Refused`] if a generation is pinned, unless `pinned_too`; that of a lock.
    pub fn delete_name(
        &self,
        me: &Holder,
        witness: &dyn Witness,
        steal: bool,
        pinned_too: bool,
    ) -> Result<()> {
        let whole = Cell::new(self.store.clone(), self.name.clone(), None);
        if !whole.exists() {
            return Err(Error::Absent(format!("checkpoint {}", self.name)));
        }
        let mut locks = vec![whole.lock(me, witness, steal, Duration::ZERO)?];
        for step in whole.steps()? {
            locks.push(step.lock(me, witness, steal, Duration::ZERO)?);
        }
        if !pinned_too {
            for cell in locks.iter().map(Lock::cell) {
                for number in cell.numbers()? {
                    if cell.marks().pinned(number)? {
                        return Err(Error::Refused(format!(
                            "generation {number} of {label} is pinned: `container-checkpoint \
                             unpin {label}@{number}` first, or delete with --force",
                            label = cell.label()
                        )));
                    }
                }
            }
        }
        let doomed = self.store.dir.join(format!("{DOOMED}{}", disk::nonce()));
        fs::rename(&whole.dir, &doomed).at("rename", &whole.dir)?;
        locks.iter().for_each(Lock::abandon);
        disk::sync_dir(&self.store.dir)?;
        disk::remove(&doomed)
    }

    fn generation_exists(&self, number: u64) -> Result<()> {
        if self.generation_dir(number).is_dir() {
            Ok(())
        } else {
            Err(Error::Absent(format!(
                "generation {number} of {}",
                self.label()
            )))
        }
    }
}
