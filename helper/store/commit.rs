//! From a checkpoint's files to a committed generation.
//!
//! Contract: a generation appears under its name only when all of it is on the disk. The order:
//! hash and fsync every file, write and fsync the manifest, fsync every directory, check that the
//! lock is still ours, rename `.partial` away, fsync the parent, swap `latest`, fsync. Interrupted
//! anywhere before the rename, nothing has happened; anywhere after, the generation is there.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::generation::{Generation, NUMBER_MAX, dir_name, number_of, tree};
use super::history::What;
use super::lock::Lock;
use super::manifest::{
    self, Computed, FileRecord, ImageRecord, Manifest, OpenFile, StreamEnd, Trigger,
};
use super::{At, Durations, Error, Result, Time, digest, disk, durations, escape};
use crate::engine::{Kind, Placement};
use crate::fault;

/// What a manifest says that the store cannot know by itself. See [`Manifest`] for the meaning.
#[derive(Debug, Clone)]
pub struct Facts {
    pub trigger: Trigger,
    pub predecessor: Option<u64>,
    pub ranks: u32,
    pub engine: Kind,
    pub engine_version: String,
    pub placement: Option<Placement>,
    pub kernel: String,
    pub cpu_flags: Vec<String>,
    pub image: Option<ImageRecord>,
    pub command: Vec<std::ffi::OsString>,
    pub durations: Durations,
    pub truncate: Vec<OpenFile>,
    pub computed: Option<Computed>,
    pub needs: Vec<OpenFile>,
    pub listens: Vec<std::net::SocketAddr>,
    pub streams: Vec<StreamEnd>,
}

/// A generation that is being written. Dropped without a commit it is removed.
pub struct Draft {
    lock: Lock,
    number: u64,
    dir: PathBuf,
    begun: Instant,
    done: bool,
}

impl Lock {
    /// Makes room for `predicted` bytes (see [`Lock::room_for`]) and begins a generation.
    pub fn begin(&self, predicted: u64) -> Result<Draft> {
        self.still_ours()?;
        self.room_for(predicted)?;
        let number = self.next_number()?;
        let dir = self
            .cell()
            .generations_dir()
            .join(format!("{}.partial", dir_name(number)));
        disk::private_dir(&dir, false)?;
        fault::point("begin-created").at("create", &dir)?;
        Ok(Draft {
            lock: self.clone(),
            number,
            dir,
            begun: Instant::now(),
            done: false,
        })
    }

    /// A number that was never used, not even by a generation that was deleted or never finished.
    fn next_number(&self) -> Result<u64> {
        let cell = self.cell();
        let mut newest = cell.floor()?;
        for dir in [cell.generations_dir(), cell.dir().join("marks")] {
            for name in disk::names_in(&dir)? {
                let stem = name.to_str().and_then(|name| name.split('.').next());
                newest = newest.max(stem.and_then(number_of).unwrap_or(0));
            }
        }
        for event in cell.history()?.events {
            if let What::Checkpointed { generation, .. }
            | What::Deleted { generation, .. }
            | What::Imported { generation, .. } = event.what
            {
                newest = newest.max(generation);
            }
        }
        if newest >= NUMBER_MAX {
            return Err(Error::Refused(format!(
                "{} has used all numbers of generations; clone it to a new name",
                cell.label()
            )));
        }
        Ok(newest + 1)
    }
}

impl Draft {
    /// The directory for `rank-0/`, `rank-1/`…
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn number(&self) -> u64 {
        self.number
    }

    /// Commits it, notes that in the history, and deletes what is more than `keep` generations (see
    /// docs/on-disk-format.md).
    ///
    /// # Errors
    /// Nothing was committed, except where the error is that of syncing after the rename: then the
    /// generation is there, and it is only not known whether it would survive a power loss.
    pub fn commit(self, facts: Facts, keep: usize) -> Result<Generation> {
        let manifest = self.manifest(facts);
        let (lock, begun) = (self.lock.clone(), self.begun);
        let generation = self.seal(manifest, None, &|_| ())?;
        // The generation is safe: trouble with what comes after is no failure of this checkpoint.
        let noted = lock.note(What::Checkpointed {
            trigger: generation.manifest.trigger,
            generation: generation.number,
            bytes: generation.manifest.bytes,
            took: millis(begun),
        });
        if let Err(error) = noted {
            log::warn!(
                "{error}; the history lacks generation {}",
                generation.number
            );
        }
        if let Err(error) = lock.retain(keep) {
            log::warn!("{error}; older generations stay for now");
        }
        Ok(generation)
    }

    /// Commits what was not saved here but lay in `from`, and notes that in the history.
    pub fn take_over(self, facts: Facts, from: &Path) -> Result<Generation> {
        let manifest = self.manifest(facts);
        let lock = self.lock.clone();
        let generation = self.seal(manifest, None, &|_| ())?;
        lock.note(What::Imported {
            generation: generation.number,
            from: from.display().to_string(),
        })?;
        Ok(generation)
    }

    fn manifest(&self, facts: Facts) -> Manifest {
        let holder = self.lock.holder();
        let cell = self.lock.cell();
        Manifest {
            name: cell.name().to_string(),
            step_key: cell.key().map(ToString::to_string),
            generation: self.number,
            predecessor: facts.predecessor,
            created: Time::now(),
            trigger: facts.trigger,
            job: holder.job,
            step: holder.step,
            run: holder.run,
            host: holder.host,
            ranks: facts.ranks,
            engine: facts.engine,
            engine_version: facts.engine_version,
            placement: facts.placement,
            kernel: facts.kernel,
            cpu_flags: facts.cpu_flags,
            image: facts.image,
            command: facts
                .command
                .iter()
                .map(|word| escape::escape(word))
                .collect(),
            durations: facts.durations,
            truncate: facts.truncate,
            computed: facts.computed,
            needs: facts.needs,
            listens: facts.listens,
            streams: facts.streams,
            version: env!("CARGO_PKG_VERSION").into(),
            bytes: 0,
            files: Vec::new(),
        }
    }

    /// Commits with a manifest whose files are filled in here. If `expected` is given, they have to
    /// be those.
    pub(super) fn seal(
        mut self,
        mut manifest: Manifest,
        expected: Option<&[FileRecord]>,
        progress: digest::Progress<'_>,
    ) -> Result<Generation> {
        let lock = self.lock.clone();
        let cell = lock.cell();
        fault::point("commit-begin").at("commit", &self.dir)?;

        let begun = Instant::now();
        let found = self.files()?;
        let paths: Vec<PathBuf> = found.iter().map(|(_, path)| self.dir.join(path)).collect();
        let mut syncing = Duration::ZERO;
        let hashes = digest::hash_files(&paths, Some(&mut syncing), progress)
            .map_err(|(index, error)| Error::from_io("read and sync", &paths[index], error))?;
        manifest.files = found
            .into_iter()
            .zip(hashes)
            .map(|((path, _), (size, hash))| FileRecord {
                path,
                size,
                blake3: hash.to_hex().to_string(),
            })
            .collect();
        manifest.bytes = manifest
            .files
            .iter()
            .fold(0, |sum: u64, file| sum.saturating_add(file.size));
        if expected.is_some_and(|expected| expected != manifest.files) {
            return Err(Error::Damaged {
                path: self.dir.clone(),
                why: "its files are not those of its manifest".into(),
            });
        }
        // What is copied keeps the durations of the checkpoint that made it.
        if expected.is_none() {
            let hashing = begun.elapsed().saturating_sub(syncing);
            manifest.durations.note(durations::HASH, hashing);
            manifest.durations.note(durations::SYNC, syncing);
        }
        fault::point("commit-files-synced").at("commit", &self.dir)?;

        let path = self.dir.join(manifest::FILE_NAME);
        let bytes = manifest.encode().map_err(|why| Error::Damaged {
            path: self.dir.clone(),
            why,
        })?;
        disk::create(&path, &bytes).at("write", &path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).at("protect", &path)?;
        fault::point("commit-manifest-written").at("commit", &self.dir)?;

        for dir in self.dirs()? {
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).at("protect", &dir)?;
            disk::sync_dir(&dir)?;
        }
        fault::point("commit-dirs-synced").at("commit", &self.dir)?;

        let committed = cell.generation_dir(self.number);
        lock.guarded(|_| {
            fault::point("commit-lock-checked").at("rename", &committed)?;
            if committed.exists() {
                return Err(Error::Refused(format!(
                    "{} exists already",
                    committed.display()
                )));
            }
            fs::rename(&self.dir, &committed).at("rename", &committed)
        })?;
        self.done = true;
        fault::point("commit-renamed").at("sync", &committed)?;
        disk::sync_dir(&cell.generations_dir())?;
        fault::point("commit-parent-synced").at("sync", &committed)?;
        // `latest` is a convenience: the next start sets it right.
        if let Err(error) = lock.point_latest() {
            log::warn!("{error}; `latest` is set right at the next start");
        }
        fault::point("commit-done").at("commit", &committed)?;
        Ok(Generation {
            number: self.number,
            dir: committed,
            manifest,
        })
    }

    /// The files, sorted by their escaped paths, made read-only: nothing writes to them again.
    fn files(&self) -> Result<Vec<(String, PathBuf)>> {
        let mut found = BTreeSet::new();
        tree(&self.dir, &self.dir, &mut found).map_err(|fault| Error::Damaged {
            path: self.dir.clone(),
            why: fault.reason().into(),
        })?;
        for file in &found {
            let path = self.dir.join(file);
            fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).at("protect", &path)?;
        }
        let mut files: Vec<_> = found
            .into_iter()
            .map(|path| (escape::escape(path.as_os_str()), path))
            .collect();
        files.sort();
        Ok(files)
    }

    /// Every directory of the draft, deepest first.
    fn dirs(&self) -> Result<Vec<PathBuf>> {
        fn walk(dir: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
            for entry in fs::read_dir(dir)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    walk(&entry.path(), found)?;
                }
            }
            found.push(dir.into());
            Ok(())
        }
        let mut found = Vec::new();
        walk(&self.dir, &mut found).at("list", &self.dir)?;
        Ok(found)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = disk::remove(&self.dir)
        {
            log::warn!("{error}; it is swept at the next start");
        }
    }
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
