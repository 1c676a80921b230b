//! The store: generations, manifests, the lock.
//!
//! ```text
//! STORE/                            one user's, 0700
//!   .runtime/                       programs that are bound into containers (see `runtime`)
//!   .images.json                    digests of container images, remembered
//!   NAME/                           one checkpoint NAME: a cell
//!     guard                         held for moments, while locks are looked at and changed
//!     lock                          who runs it now (JSON, `Holder`)
//!     history.jsonl                 one line per event, append only
//!     completed.json  fresh.json    up to which generation an earlier computation went
//!     run.json  progress.json       the last run of a job that began, and that got on (NAME only)
//!     latest -> generations/000007  for people; the highest number is what counts
//!     generations/000007/           complete, or absent
//!       manifest.json               what it is, with size and BLAKE3 of every file
//!       rank-0/ …                   the engine's files
//!     generations/000008.partial/   being written; swept at the next start
//!     generations/000005.deleted/   being deleted; swept as well
//!     marks/000007.pinned  .bad     what people and checks say of a generation
//!     work/…                        the engines' working directories
//!     steps/KEY/                    an inner step's cell: the same again, without guard
//! ```
//!
//! Contract: a generation, once its name has no suffix, is whole, durable and never written to
//! again. One [`Lock`] per cell allows to change it, and all locks below one NAME belong to one job.
//! Whatever is read back is checked and bounded: damage gives an error, never a panic, a huge
//! allocation or a path outside. The store knows nothing of engines, Slurm or policy: what it has to
//! ask others comes in as a function or a [`Witness`].

pub mod fingerprint;

mod cell;
mod claim;
mod commit;
mod digest;
pub mod disk;
pub mod durations;
mod escape;
mod generation;
mod history;
mod lock;
mod manifest;
mod retention;
mod room;
mod runs;
mod time;
mod transfer;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

pub use cell::{Cell, Completion};
pub use commit::{Draft, Facts};
pub use durations::Durations;
pub use escape::{escape, unescape};
pub use generation::{Bad, Entry, Fault, Found, Generation};
pub use history::{Event, History, What};
pub use lock::{Holder, Lock, LockError, State, Unwitnessed, Witness};
pub use manifest::{Computed, ImageRecord, Manifest, OpenFile, StreamEnd, Trigger};
pub use room::{Shortage, size as bytes_for_people};
pub use runs::{BegunRun, ProgressedRun};
pub use time::Time;
pub use transfer::import;

use crate::words;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something with the store did not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not {doing} {}: {error}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        error: io::Error,
    },
    #[error("{} cannot be used as a store: {why}", path.display())]
    Place { path: PathBuf, why: String },
    #[error("{} is damaged: {why}", path.display())]
    Damaged { path: PathBuf, why: String },
    #[error(transparent)]
    Shortage(#[from] Shortage),
    #[error(
        "the lock {} was taken over by another run: nothing more is saved by this one",
        path.display()
    )]
    LockLost { path: PathBuf },
    #[error(transparent)]
    Locked(#[from] Box<LockError>),
    #[error("`{0}` is not a checkpoint name: {rule}", rule = words::NAME_RULE)]
    Name(String),
    #[error("there is no {0}")]
    Absent(String),
    #[error("{0}")]
    Refused(String),
}

impl Error {
    fn from_io(doing: &'static str, path: &Path, error: io::Error) -> Error {
        Error::Io {
            doing,
            path: path.into(),
            error,
        }
    }
}

/// Says of a failed call what it was for.
trait At<T> {
    fn at(self, doing: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> At<T> for std::result::Result<T, E> {
    fn at(self, doing: &'static str, path: &Path) -> Result<T> {
        self.map_err(|error| Error::Io {
            doing,
            path: path.into(),
            error: error.into(),
        })
    }
}

/// A checkpoint NAME, patterns expanded.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    pub fn parse(text: &str) -> Result<Name> {
        if words::is_name(text.as_bytes(), false) {
            Ok(Name(text.into()))
        } else {
            Err(Error::Name(text.into()))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// What tells one inner step of a job from another, the same in every run. Formed like a NAME.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepKey(String);

impl StepKey {
    pub fn parse(text: &str) -> Result<StepKey> {
        Name::parse(text).map(|name| StepKey(name.0))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for StepKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// A user's store.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
    /// Who has to own what is in it.
    owner: u32,
}

impl Store {
    /// Opens this user's store; creates it (mode 0700, parents too) if it is missing.
    ///
    /// # Errors
    /// [`Error::Place`] if it is a link, another user's, or others can write to it.
    pub fn open(dir: &Path) -> Result<Store> {
        let dir = std::path::absolute(dir).at("resolve", dir)?;
        disk::private_dir(&dir, true)?;
        Ok(Store {
            dir,
            owner: nix::unistd::geteuid().as_raw(),
        })
    }

    /// Opens a store to read it, creating nothing. `None` if there is none. Root may read
    /// everybody's.
    pub fn existing(dir: &Path) -> Result<Option<Store>> {
        use std::os::unix::fs::MetadataExt;
        let dir = std::path::absolute(dir).at("resolve", dir)?;
        let me = nix::unistd::geteuid().as_raw();
        let owner = match std::fs::symlink_metadata(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            seen => {
                let seen = seen.at("look at", &dir)?;
                if me == 0 { seen.uid() } else { me }
            }
        };
        disk::check_private(&dir, owner)?;
        Ok(Some(Store { dir, owner }))
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where digests of container images are remembered.
    pub fn image_memory(&self) -> PathBuf {
        self.dir.join(".images.json")
    }

    /// Where the options of apptainer programs are remembered.
    pub fn options_memory(&self) -> PathBuf {
        self.dir.join(".options.json")
    }

    /// Removes names whose deletion was interrupted.
    pub fn sweep(&self) -> Result<()> {
        for name in disk::names_in(&self.dir)? {
            if name.to_string_lossy().starts_with(cell::DOOMED) {
                disk::remove(&self.dir.join(name))?;
            }
        }
        Ok(())
    }

    /// The names in the store, sorted.
    pub fn names(&self) -> Result<Vec<Name>> {
        Ok(disk::names_in(&self.dir)?
            .iter()
            .filter_map(|name| Name::parse(name.to_str()?).ok())
            .filter(|name| self.dir.join(name.as_str()).is_dir())
            .collect())
    }

    /// The cells of all names and of their inner steps.
    pub fn cells(&self) -> Result<Vec<Cell>> {
        let mut cells = Vec::new();
        for name in self.names()? {
            let name = self.name(&name);
            cells.extend(name.steps()?);
            cells.push(name);
        }
        Ok(cells)
    }

    /// The cell of a name, which need not exist.
    pub fn name(&self, name: &Name) -> Cell {
        Cell::new(self.clone(), name.clone(), None)
    }
}

#[cfg(test)]
pub mod tests;
