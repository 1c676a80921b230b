//! A committed generation: its manifest, its check, and what people and checks say of it.
//!
//! Contract: a generation is never changed. What is said of it (pinned, bad) lies beside it, in
//! marks/. [`Generation::verify`] finds every difference from what was committed: contents, sizes,
//! files that are missing and files that are too many.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::digest::{self, Progress};
use super::manifest::{FILE_NAME, FILES_MAX, Manifest};
use super::{At, Error, Result, Time, disk};

/// Largest number of a generation.
pub const NUMBER_MAX: u64 = 999_999_999_999;

/// The name of generation `number`'s directory.
pub fn dir_name(number: u64) -> String {
    format!("{number:06}")
}

/// The number whose directory has this name, without a suffix.
pub fn number_of(name: &str) -> Option<u64> {
    let digits = name.len() >= 6 && name.bytes().all(|b| b.is_ascii_digit());
    let number: u64 = if digits {
        name.parse().ok()?
    } else {
        return None;
    };
    (number > 0 && number <= NUMBER_MAX && dir_name(number) == name).then_some(number)
}

/// A committed generation whose manifest was read.
#[derive(Debug, Clone)]
pub struct Generation {
    pub(super) number: u64,
    pub(super) dir: PathBuf,
    pub(super) manifest: Manifest,
}

/// What is wrong with a generation.
#[derive(Debug)]
pub enum Fault {
    /// It is not what was committed, or an engine cannot use it.
    Damaged(String),
    /// It could not be read; another try, or another node, may succeed.
    Unreadable(String),
}

impl Fault {
    pub fn reason(&self) -> &str {
        match self {
            Fault::Damaged(why) | Fault::Unreadable(why) => why,
        }
    }

    fn of_io(path: &Path, error: &io::Error) -> Fault {
        let why = format!("could not read {}: {error}", path.display());
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::InvalidData => Fault::Damaged(why),
            _ => Fault::Unreadable(why),
        }
    }
}

impl Generation {
    /// Reads the manifest of the generation in `dir`.
    pub(super) fn load(dir: &Path, number: u64) -> Result<Generation, Fault> {
        let path = dir.join(FILE_NAME);
        let damaged = |why| Fault::Damaged(format!("{} is damaged: {why}", path.display()));
        let bytes = disk::read_capped(&path, super::manifest::CAP)
            .map_err(|error| Fault::of_io(&path, &error))?;
        let manifest = Manifest::decode(&bytes).map_err(damaged)?;
        if manifest.generation != number {
            return Err(damaged(format!(
                "it is that of generation {}",
                manifest.generation
            )));
        }
        Ok(Generation {
            number,
            dir: dir.into(),
            manifest,
        })
    }

    pub fn number(&self) -> u64 {
        self.number
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory of a rank's files.
    pub fn rank_dir(&self, rank: u32) -> PathBuf {
        self.dir.join(format!("rank-{rank}"))
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// How long ago it was saved.
    pub fn age(&self) -> std::time::Duration {
        self.manifest.created.age()
    }

    /// Compares every byte with what was committed.
    pub(super) fn check(&self, progress: Progress<'_>) -> Result<(), Fault> {
        let files = &self.manifest.files;
        let mut paths = Vec::with_capacity(files.len());
        for file in files {
            let path = self.dir.join(file.relative().map_err(Fault::Damaged)?);
            let seen = fs::symlink_metadata(&path).map_err(|error| Fault::of_io(&path, &error))?;
            if !seen.is_file() || seen.len() != file.size {
                return Err(Fault::Damaged(format!(
                    "{} is not a file of {} bytes, as was saved, but has {}",
                    path.display(),
                    file.size,
                    seen.len()
                )));
            }
            paths.push(path);
        }
        let mut there = BTreeSet::new();
        tree(&self.dir, &self.dir, &mut there)?;
        there.remove(Path::new(FILE_NAME));
        if there.len() != paths.len() {
            let known: BTreeSet<PathBuf> = files
                .iter()
                .filter_map(|file| file.relative().ok())
                .collect();
            let strange = there.difference(&known).next().cloned().unwrap_or_default();
            return Err(Fault::Damaged(format!(
                "{} was not saved with it",
                self.dir.join(strange).display()
            )));
        }
        let hashes = digest::hash_files(&paths, None, progress)
            .map_err(|(index, error)| Fault::of_io(&paths[index], &error))?;
        for ((file, path), (size, hash)) in files.iter().zip(&paths).zip(hashes) {
            if size != file.size || hash.to_hex().as_str() != file.blake3 {
                return Err(Fault::Damaged(format!(
                    "{} is not what was saved: its BLAKE3 is {}, it was {}",
                    path.display(),
                    hash.to_hex(),
                    file.blake3
                )));
            }
        }
        Ok(())
    }

    /// Compares every byte with what was committed, then lets the engine look at each rank's files.
    pub fn verify(
        &self,
        engine: &dyn Fn(&Path) -> Result<(), String>,
        progress: Progress<'_>,
    ) -> Result<(), Fault> {
        self.check(progress)?;
        for rank in 0..self.manifest.ranks {
            engine(&self.rank_dir(rank)).map_err(|why| {
                Fault::Damaged(format!(
                    "{} cannot use rank {rank}: {why}",
                    self.manifest.engine
                ))
            })?;
        }
        Ok(())
    }
}

/// The files below `dir`, relative to `root`; anything but files and directories is a fault.
pub(super) fn tree(root: &Path, dir: &Path, found: &mut BTreeSet<PathBuf>) -> Result<(), Fault> {
    let entries = fs::read_dir(dir).map_err(|error| Fault::of_io(dir, &error))?;
    for entry in entries {
        let entry = entry.map_err(|error| Fault::of_io(dir, &error))?;
        let path = entry.path();
        let kind = entry
            .file_type()
            .map_err(|error| Fault::of_io(&path, &error))?;
        if kind.is_dir() {
            // A generation's paths have a bounded depth, and so has this recursion.
            let depth = path
                .strip_prefix(root)
                .map_or(0, |p| p.components().count());
            if depth > 16 {
                return Err(Fault::Damaged(format!("{} lies too deep", path.display())));
            }
            tree(root, &path, found)?;
        } else if kind.is_file() {
            found.insert(path.strip_prefix(root).unwrap_or(&path).to_path_buf());
            if found.len() > FILES_MAX + 1 {
                return Err(Fault::Damaged(format!(
                    "{} has too many files",
                    root.display()
                )));
            }
        } else {
            return Err(Fault::Damaged(format!(
                "{} is neither a file nor a directory",
                path.display()
            )));
        }
    }
    Ok(())
}

/// A mark that a generation cannot be used, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bad {
    pub reason: String,
    pub time: Time,
}

/// What a cell knows of one of its generations.
#[derive(Debug)]
pub struct Entry {
    pub number: u64,
    pub pinned: bool,
    pub bad: Option<Bad>,
    /// The generation, or what is wrong with its manifest.
    pub generation: Result<Generation, Fault>,
}

/// What a search for a generation came to.
#[derive(Debug)]
pub struct Found {
    pub generation: Option<Generation>,
    /// Newer ones that cannot be used, newest first, and why.
    pub rejected: Vec<(u64, String)>,
}

/// The marks of a cell's generations: `marks/NUMBER.pinned` and `marks/NUMBER.bad`.
#[derive(Debug, Clone)]
pub(super) struct Marks(pub PathBuf);

const MARK_CAP: u64 = 64 << 10;

impl Marks {
    fn path(&self, number: u64, word: &str) -> PathBuf {
        self.0.join(format!("{}.{word}", dir_name(number)))
    }

    pub fn pinned(&self, number: u64) -> Result<bool> {
        let path = self.path(number, "pinned");
        match fs::symlink_metadata(&path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).at("look at", &path),
        }
    }

    pub fn bad(&self, number: u64) -> Result<Option<Bad>> {
        let path = self.path(number, "bad");
        match disk::read_if_there(&path, MARK_CAP) {
            Ok(None) => Ok(None),
            // That the mark is there is what counts; its text is for people.
            Ok(Some(bytes)) => Ok(Some(serde_json::from_slice(&bytes).unwrap_or_else(|_| {
                Bad {
                    reason: "marked bad; the mark itself is damaged".into(),
                    time: Time::from_millis(0),
                }
            }))),
            Err(Error::Damaged { why, .. }) => Ok(Some(Bad {
                reason: why,
                time: Time::from_millis(0),
            })),
            Err(error) => Err(error),
        }
    }

    pub fn set_bad(&self, number: u64, reason: &str) -> Result<()> {
        let path = self.path(number, "bad");
        let mut reason = reason.to_string();
        reason.truncate(reason.floor_char_boundary(4096));
        let bad = Bad {
            reason,
            time: Time::now(),
        };
        let bytes = serde_json::to_vec(&bad)
            .map_err(io::Error::from)
            .at("write", &path)?;
        disk::private_dir(&self.0, false)?;
        disk::replace(&path, &bytes)
    }

    pub fn pin(&self, number: u64) -> Result<()> {
        disk::private_dir(&self.0, false)?;
        disk::replace(&self.path(number, "pinned"), b"")
    }

    pub fn unpin(&self, number: u64) -> Result<bool> {
        let was = self.pinned(number)?;
        disk::remove(&self.path(number, "pinned"))?;
        if was {
            disk::sync_dir(&self.0)?;
        }
        Ok(was)
    }

    /// Removes what is said of a generation that is gone.
    pub fn forget(&self, number: u64) -> Result<()> {
        disk::remove(&self.path(number, "bad"))?;
        disk::remove(&self.path(number, "pinned"))
    }
}
