//! The lock on a cell: who runs it now.
//!
//! Contract: at most one process holds a cell, and all holders below one NAME are of one job. A lock
//! is a file with its [`Holder`] in it; it is changed only under the NAME's guard, a second file
//! that is held for moments. The guard is made by link(2), which is exclusive on NFS as well;
//! flock(2) is not used. What a dead process left is broken when it is proved dead and never
//! before: on the same boot and PID namespace by /proc, elsewhere by a [`Witness`].
//!
//! Breaking a guard is the delicate part: between the proof and the removal another process may have
//! broken it and taken a new one. So a breaker first leaves a file of its own and goes on only if
//! there is no other breaker's; of two at the same time both step back.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::cell::{Cell, Completion, Fresh};
use super::generation::{Fault, Found, Generation};
use super::history::{self, Event, What};
use super::manifest::Manifest;
use super::{At, Error, Result, Time, disk};
use crate::engine::End;
use crate::fault;

/// What a holder is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Running,
    /// It takes a checkpoint: a newer run of the same job waits for it.
    Saving,
    /// Its application is saved and has ended; only the job has to be brought to its end.
    Saved,
    /// And the job is: the batch script may go.
    Settled,
}

/// Who holds a lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Slurm's job; none outside of Slurm.
    pub job: Option<u32>,
    pub step: String,
    /// Slurm's restart count.
    pub run: u32,
    pub host: String,
    /// Identifies the machine (/etc/machine-id), empty where it has none.
    #[serde(default)]
    pub machine: String,
    /// Identifies the boot (/proc/sys/kernel/random/boot_id).
    pub boot_id: String,
    /// Inode of /proc/self/ns/pid: in which namespace `pid` counts.
    pub pid_namespace: u64,
    pub pid: u32,
    /// When the process started, in clock ticks since boot (field 22 of /proc/PID/stat).
    pub pid_started: u64,
    pub started: Time,
    pub state: State,
}

impl Holder {
    /// This process.
    pub fn this_process(job: Option<u32>, step: &str, run: u32) -> Result<Holder> {
        let stat = Path::new("/proc/self/stat");
        let text = fs::read_to_string(stat).at("read", stat)?;
        let Some((_, pid_started)) = parse_stat(&text) else {
            return Err(Error::Damaged {
                path: stat.into(),
                why: "it has no start time".into(),
            });
        };
        let boot = Path::new("/proc/sys/kernel/random/boot_id");
        let namespace = Path::new("/proc/self/ns/pid");
        let host = nix::unistd::gethostname().at("ask for", Path::new("the host's name"))?;
        Ok(Holder {
            job,
            step: step.into(),
            run,
            host: host.to_string_lossy().into_owned(),
            machine: fs::read_to_string("/etc/machine-id")
                .unwrap_or_default()
                .trim()
                .into(),
            boot_id: fs::read_to_string(boot).at("read", boot)?.trim().into(),
            pid_namespace: fs::metadata(namespace).at("look at", namespace)?.ino(),
            pid: std::process::id(),
            pid_started,
            started: Time::now(),
            state: State::Running,
        })
    }

    /// "job 42 (step batch, run 1) on n1, process 1234, since 2026-…"
    pub fn describe(&self) -> String {
        let who = match self.job {
            Some(job) => format!("job {job} (step {}, run {})", self.step, self.run),
            None => "a process outside of Slurm".into(),
        };
        format!(
            "{who} on {}, process {}, since {}",
            self.host, self.pid, self.started
        )
    }

    pub fn same_process(&self, other: &Holder) -> bool {
        let id = |h: &Holder| (h.boot_id.clone(), h.pid_namespace, h.pid, h.pid_started);
        id(self) == id(other)
    }

    /// Whether its process id means the same process to `me`.
    pub fn is_here(&self, me: &Holder) -> bool {
        !me.boot_id.is_empty()
            && (&self.boot_id, self.pid_namespace) == (&me.boot_id, me.pid_namespace)
    }

    /// Whether the process has ended; `None` where it cannot be seen from `me`'s place.
    fn has_ended(&self, me: &Holder) -> Option<bool> {
        if self.boot_id.is_empty() || me.boot_id.is_empty() {
            return None;
        }
        if self.boot_id != me.boot_id {
            // The same machine has booted again since. Neither host name nor machine id alone is
            // enough: nodes without disks share machine ids, clusters share host names.
            let same = !me.machine.is_empty() && self.machine == me.machine && self.host == me.host;
            return same.then_some(true);
        }
        if self.pid_namespace != me.pid_namespace {
            return None;
        }
        match fs::read_to_string(format!("/proc/{}/stat", self.pid)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some(true),
            // ESRCH: it ended while it was read.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Some(true),
            Err(_) => None,
            Ok(text) => {
                let (state, started) = parse_stat(&text)?;
                Some(started != self.pid_started || matches!(state, 'Z' | 'X'))
            }
        }
    }
}

/// State and start time from /proc/PID/stat. The program's name may hold anything, so that fields
/// count from its last parenthesis.
fn parse_stat(text: &str) -> Option<(char, u64)> {
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// Says whether the run of a holder on another host has ended: asks Slurm about job, run and step.
pub trait Witness {
    /// `None`: it is not known.
    fn run_has_ended(&self, holder: &Holder) -> Option<bool>;
}

/// Knows nothing.
pub struct Unwitnessed;

impl Witness for Unwitnessed {
    fn run_has_ended(&self, _: &Holder) -> Option<bool> {
        None
    }
}

/// Why a lock is not given where the holder's process can be seen.
const RUNS: &str = "it is still running";

/// The way out where nobody here can see whether it has ended.
const KNOWN_TO_HAVE_ENDED: &str =
    "; if you know that it has, --steal-lock of `container-checkpoint run` takes the name";

/// Why a lock was not given.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error(
        "checkpoint {name} is in use by {}: {why}. Use another name, or wait until that run has \
         ended{}",
        holder.describe(),
        if why == RUNS { "" } else { KNOWN_TO_HAVE_ENDED }
    )]
    Held {
        name: String,
        holder: Box<Holder>,
        why: String,
    },
    #[error(transparent)]
    Store(#[from] Error),
}

impl From<LockError> for Error {
    fn from(error: LockError) -> Error {
        match error {
            LockError::Store(error) => error,
            held => Error::Locked(Box::new(held)),
        }
    }
}

/// The contents of a lock file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    format: u32,
    /// Tells this taking of the lock from every other.
    id: String,
    #[serde(flatten)]
    holder: Holder,
}

const RECORD_CAP: u64 = 64 << 10;

impl Record {
    fn new(holder: &Holder) -> Record {
        Record {
            format: 1,
            id: disk::nonce(),
            holder: holder.clone(),
        }
    }

    fn encode(&self, path: &Path) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self)
            .map_err(io::Error::from)
            .at("write", path)
    }

    fn read(path: &Path) -> Result<Option<Record>> {
        let Some(bytes) = disk::read_if_there(path, RECORD_CAP)? else {
            return Ok(None);
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Error::Damaged {
                path: path.into(),
                why: format!("{error}; if nothing runs under this name, take it with --steal-lock"),
            })
    }
}

/// How long a guard may be held by a living process before others give up, and how often they look.
const GUARD_PATIENCE: Duration = Duration::from_secs(30);
const GUARD_LOOK: Duration = Duration::from_millis(5);

/// Holds a NAME's guard.
struct Guard {
    path: PathBuf,
    id: String,
}

impl Guard {
    fn take(dir: &Path, name: &str, judge: &mut Judge<'_>) -> Result<Guard, LockError> {
        let path = dir.join("guard");
        let record = Record::new(judge.me);
        let own = dir.join(format!("{GUARD_TEMPORARY}{}", record.id));
        disk::create(&own, &record.encode(&own)?).at("write", &own)?;
        let taken = Guard::link(&own, &path, &record, name, judge);
        // Left behind it would only be swept later.
        let removed = disk::remove(&own);
        taken?;
        removed?;
        Ok(Guard {
            path,
            id: record.id,
        })
    }

    fn link(
        own: &Path,
        path: &Path,
        record: &Record,
        name: &str,
        judge: &mut Judge<'_>,
    ) -> Result<(), LockError> {
        let start = Instant::now();
        loop {
            match fs::hard_link(own, path) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                // Another step swept it as a torn one, before it was written.
                Err(error) if error.kind() == io::ErrorKind::NotFound && !own.exists() => {
                    disk::create(own, &record.encode(own)?).at("write", own)?;
                    continue;
                }
                // File systems without links (some FUSE ones) still create exclusively.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOTSUP)) => {
                    match disk::create(path, &record.encode(path)?) {
                        Ok(()) => return Ok(()),
                        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                        Err(error) => return Err(Error::from_io("create", path, error).into()),
                    }
                }
                Err(error) => return Err(Error::from_io("create", path, error).into()),
            }
            // NFS may lose the answer to a link that it made: the file's own link count tells.
            if fs::symlink_metadata(own).is_ok_and(|own| own.nlink() > 1) {
                return Ok(());
            }
            match Record::read(path) {
                Ok(None) => continue,
                Ok(Some(other)) if other.id == record.id => return Ok(()),
                Ok(Some(other)) => {
                    let waited = start.elapsed();
                    if judge.dead(&other) || (judge.steal && waited > Duration::from_secs(2)) {
                        break_guard(path, &other.id, record)?;
                    } else if waited > GUARD_PATIENCE {
                        return Err(LockError::Held {
                            name: name.into(),
                            holder: Box::new(other.holder),
                            why: "it does not let go of the name's guard".into(),
                        });
                    }
                }
                // Without links, a guard is empty for a moment.
                Err(error @ Error::Damaged { .. }) if start.elapsed() < GUARD_PATIENCE => {
                    if judge.steal && start.elapsed() > Duration::from_secs(2) {
                        log::warn!("{error}; removing it, as --steal-lock was given");
                        disk::remove(path)?;
                    }
                }
                Err(error) => return Err(error.into()),
            }
            // No event tells of a change on a network file system, so that this has to look again.
            std::thread::sleep(GUARD_LOOK);
        }
    }
}

const GUARD_TEMPORARY: &str = ".guard.";
const BREAKER: &str = ".breaker.";

/// Removes the guard with this id, which is proved dead, unless another process is just doing so.
fn break_guard(path: &Path, id: &str, me: &Record) -> Result<()> {
    let Some(dir) = path.parent() else {
        return Ok(());
    };
    let own = dir.join(format!("{BREAKER}{}", me.id));
    disk::create(&own, &me.encode(&own)?).at("write", &own)?;
    let broken = (|| {
        for name in disk::names_in(dir)? {
            let other = dir.join(&name);
            if !name.to_string_lossy().starts_with(BREAKER) || other == own {
                continue;
            }
            match Record::read(&other) {
                Ok(Some(record)) if record.holder.has_ended(&me.holder) == Some(true) => {
                    disk::remove(&other)?;
                }
                Ok(None) => {}
                _ => return Ok(()), // the other one does it, or both try again
            }
        }
        match Record::read(path) {
            Ok(Some(record)) if record.id == id => disk::remove(path),
            _ => Ok(()),
        }
    })();
    disk::remove(&own).and(broken)
}

impl Drop for Guard {
    fn drop(&mut self) {
        let ours = matches!(Record::read(&self.path), Ok(Some(record)) if record.id == self.id);
        if ours && let Err(error) = disk::remove(&self.path) {
            log::warn!("{error}; the next one to use this name will have to break this guard");
        }
    }
}

/// Decides who is dead, and remembers it.
struct Judge<'a> {
    me: &'a Holder,
    witness: &'a dyn Witness,
    steal: bool,
    dead: HashSet<String>,
    asked: HashSet<String>,
}

impl<'a> Judge<'a> {
    fn new(me: &'a Holder, witness: &'a dyn Witness, steal: bool) -> Judge<'a> {
        Judge {
            me,
            witness,
            steal,
            dead: HashSet::new(),
            asked: HashSet::new(),
        }
    }

    /// Whether the process of this record is proved to have ended. The witness is asked once for
    /// each record.
    fn dead(&mut self, record: &Record) -> bool {
        if self.dead.contains(&record.id) {
            return true;
        }
        let dead = match record.holder.has_ended(self.me) {
            Some(ended) => ended,
            None => {
                self.asked.insert(record.id.clone())
                    && self.witness.run_has_ended(&record.holder) == Some(true)
            }
        };
        if dead {
            self.dead.insert(record.id.clone());
        }
        dead
    }
}

/// What another record means for taking a cell.
enum Obstacle {
    /// None: it may be removed if it is of the same cell.
    None,
    /// An older run of the same job takes a checkpoint.
    Saving,
    Held(&'static str),
}

fn obstacle(me: &Holder, other: &Holder, same_cell: bool) -> Obstacle {
    let same_job = match me.job {
        Some(_) => me.job == other.job,
        // Outside of Slurm a process stands for a job: one command may hold several cells.
        None => other.job.is_none() && me.same_process(other),
    };
    match (same_job, same_cell) {
        (false, _) => Obstacle::Held(match other.job {
            Some(_) => "that is another job, and Slurm does not say that it has ended",
            None => "that process is not known to have ended",
        }),
        (true, false) => Obstacle::None,
        (true, true) if other.run > me.run => Obstacle::Held("that is a newer run of this job"),
        (true, true) if other.run == me.run => {
            Obstacle::Held("that is another step of this job with the same command")
        }
        (true, true) => match other.state {
            State::Running | State::Saved | State::Settled => Obstacle::None,
            State::Saving => Obstacle::Saving,
        },
    }
}

impl Cell {
    /// Takes the cell for `me`; creates it if it is missing.
    ///
    /// The lock of an older run of the same job is taken over; if that run is [`State::Saving`],
    /// this waits for it, at most `wait`. The lock of anybody else is broken if its process is
    /// proved dead, or with `steal`.
    ///
    /// # Errors
    /// [`LockError::Held`] with the holder.
    pub fn lock(
        &self,
        me: &Holder,
        witness: &dyn Witness,
        steal: bool,
        wait: Duration,
    ) -> Result<Lock, LockError> {
        self.create()?;
        let end = Instant::now() + wait;
        let mut judge = Judge::new(me, witness, steal);
        let mut waited_for: HashSet<String> = HashSet::new();
        loop {
            let guard = Guard::take(&self.name_dir(), self.name().as_str(), &mut judge)?;
            let mut gone = Vec::new();
            let mut blocked = None;
            for cell in self.relatives()? {
                let path = cell.lock_path();
                let record = match Record::read(&path) {
                    Ok(None) => continue,
                    Ok(Some(record)) => record,
                    Err(error @ Error::Damaged { .. }) if steal => {
                        log::warn!("{error}");
                        gone.push((path, None));
                        continue;
                    }
                    Err(error) => return Err(error.into()),
                };
                let same_cell = cell.dir() == self.dir();
                let obstacle = obstacle(me, &record.holder, same_cell);
                if matches!(obstacle, Obstacle::None) && !same_cell {
                    continue;
                }
                let passed = matches!(obstacle, Obstacle::None)
                    || judge.dead.contains(&record.id)
                    || waited_for.contains(&record.id);
                if passed {
                    gone.push((path, None));
                } else if steal {
                    gone.push((path, Some(record)));
                } else {
                    blocked = Some((record, obstacle));
                    break;
                }
            }
            let Some((record, obstacle)) = blocked else {
                let lock = self.take(me, &gone)?;
                drop(guard);
                for (_, stolen) in gone {
                    if let Some(record) = stolen {
                        lock.note(What::LockStolen {
                            from: record.holder.describe(),
                        })?;
                    }
                }
                return Ok(lock);
            };
            // Asking Slurm may take a while: not with the guard in hand.
            drop(guard);
            if judge.dead(&record) {
                continue;
            }
            match obstacle {
                Obstacle::Saving if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(50).min(wait));
                }
                // Slurm has started this run, so that the older one has lost: it can no longer
                // commit once the lock is ours.
                Obstacle::Saving => drop(waited_for.insert(record.id)),
                Obstacle::Held(why) => {
                    let why = match record.holder.has_ended(me) {
                        Some(false) => RUNS,
                        _ => why,
                    };
                    return Err(LockError::Held {
                        name: self.label(),
                        holder: Box::new(record.holder),
                        why: why.into(),
                    });
                }
                Obstacle::None => {}
            }
        }
    }

    /// Who holds this cell, as its lock file says; whether that process lives is not looked at.
    pub fn holder(&self) -> Result<Option<Holder>> {
        Ok(Record::read(&self.lock_path())?.map(|record| record.holder))
    }

    /// Whether the holder of this cell has ended, as far as it can be seen from here.
    pub fn holder_has_ended(&self, me: &Holder, witness: &dyn Witness) -> Result<Option<bool>> {
        let Some(holder) = self.holder()? else {
            return Ok(None);
        };
        Ok(holder
            .has_ended(me)
            .or_else(|| witness.run_has_ended(&holder)))
    }

    fn lock_path(&self) -> PathBuf {
        self.dir().join("lock")
    }

    /// All cells of this NAME.
    fn relatives(&self) -> Result<Vec<Cell>> {
        let mut cells = vec![Cell::new(self.store().clone(), self.name().clone(), None)];
        cells.extend(self.steps()?);
        Ok(cells)
    }

    /// Under the guard: removes dead and stolen locks and writes ours.
    fn take(&self, me: &Holder, gone: &[(PathBuf, Option<Record>)]) -> Result<Lock> {
        let path = self.lock_path();
        for (other, _) in gone {
            if *other != path {
                disk::remove(other)?;
            }
        }
        let record = Record::new(me);
        fault::point("lock-write").at("write", &path)?;
        disk::replace(&path, &record.encode(&path)?)?;
        fault::point("lock-written").at("write", &path)?;
        Ok(Lock(Arc::new(Inner {
            cell: self.clone(),
            record: Mutex::new(record),
            released: AtomicBool::new(false),
        })))
    }
}

/// A cell that is ours. Clones are the same lock; it is released when the last one is dropped, or
/// by [`Lock::release`].
#[derive(Clone)]
pub struct Lock(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) cell: Cell,
    record: Mutex<Record>,
    released: AtomicBool,
}

impl Inner {
    fn record(&self) -> Record {
        self.record
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Runs `act` with the guard in hand, if the lock is still ours.
    fn guarded<T>(&self, act: impl FnOnce(&Record) -> Result<T>) -> Result<T> {
        let record = self.record();
        let mut judge = Judge::new(&record.holder, &Unwitnessed, false);
        let guard = Guard::take(&self.cell.name_dir(), self.cell.name().as_str(), &mut judge)?;
        self.still_ours()?;
        let result = act(&record);
        drop(guard);
        result
    }

    fn still_ours(&self) -> Result<()> {
        let path = self.cell.lock_path();
        match Record::read(&path)? {
            Some(record) if record.id == self.record().id => Ok(()),
            _ => Err(Error::LockLost { path }),
        }
    }

    fn release(&self) -> Result<()> {
        if self.released.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let path = self.cell.lock_path();
        match self.guarded(|_| disk::remove(&path)) {
            Err(Error::LockLost { .. }) => Ok(()),
            other => other,
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            log::warn!("{error}; the lock stays until it is proved stale");
        }
    }
}

impl Lock {
    pub fn cell(&self) -> &Cell {
        &self.0.cell
    }

    pub fn holder(&self) -> Holder {
        self.0.record().holder
    }

    /// Gives the lock back now, as dropping it does, and says what went wrong.
    #[cfg(test)]
    pub fn release(&self) -> Result<()> {
        self.0.release()
    }

    /// Forgets the lock without giving it back: its directory is gone.
    pub(super) fn abandon(&self) {
        self.0.released.store(true, Ordering::SeqCst);
    }

    /// # Errors
    /// [`Error::LockLost`] if somebody has taken it: nothing may be committed then.
    pub fn still_ours(&self) -> Result<()> {
        self.0.still_ours()
    }

    /// Tells others what this run is doing.
    pub fn set_state(&self, state: State) -> Result<()> {
        let path = self.0.cell.lock_path();
        self.guarded(|record| {
            let mut record = record.clone();
            record.holder.state = state;
            disk::replace(&path, &record.encode(&path)?)?;
            *self.0.record.lock().unwrap_or_else(PoisonError::into_inner) = record;
            Ok(())
        })
    }

    pub(super) fn guarded<T>(&self, act: impl FnOnce(&Record) -> Result<T>) -> Result<T> {
        self.0.guarded(act)
    }

    /// Writes an event into the cell's history.
    pub fn note(&self, what: What) -> Result<()> {
        let holder = self.holder();
        let event = Event {
            time: Time::now(),
            job: holder.job,
            run: holder.run,
            host: holder.host,
            what,
        };
        history::append(&self.cell().dir().join(history::FILE_NAME), &event)
    }

    /// A fresh empty directory (0700) for the engine of `rank`, on the store's file system: the same
    /// path in every run, since DMTCP remembers it. Removed by the next [`Lock::sweep`].
    pub fn work_dir(&self, rank: u32) -> Result<PathBuf> {
        let parent = self.cell().work_dir();
        disk::private_dir(&parent, false)?;
        // Short: sockets may be made in it, and their paths have at most 107 bytes.
        let dir = parent.join(format!("rank-{rank}"));
        disk::remove(&dir)?;
        disk::private_dir(&dir, false)?;
        Ok(dir)
    }

    /// Removes what earlier runs left behind: partial generations, half deleted ones, working
    /// directories, temporary files. Never a committed generation. To be called before
    /// [`Lock::work_dir`] and [`Lock::begin`].
    pub fn sweep(&self) -> Result<()> {
        self.still_ours()?;
        let cell = self.cell();
        let generations = cell.generations_dir();
        for name in disk::names_in(&generations)? {
            let text = name.to_string_lossy();
            if text.ends_with(".partial")
                || text.ends_with(".deleted")
                || text.starts_with(disk::TEMPORARY)
            {
                disk::remove(&generations.join(&name))?;
            }
        }
        for name in disk::names_in(&cell.work_dir())? {
            disk::remove(&cell.work_dir().join(name))?;
        }
        for dir in [cell.dir().to_path_buf(), cell.dir().join("marks")] {
            for name in disk::names_in(&dir)? {
                if name.to_string_lossy().starts_with(disk::TEMPORARY) {
                    disk::remove(&dir.join(name))?;
                }
            }
        }
        let me = self.holder();
        for name in disk::names_in(&cell.name_dir())? {
            let text = name.to_string_lossy();
            if !text.starts_with(GUARD_TEMPORARY) && !text.starts_with(BREAKER) {
                continue;
            }
            let path = cell.name_dir().join(&name);
            let dead = match Record::read(&path) {
                Ok(Some(record)) => record.holder.has_ended(&me) == Some(true),
                Ok(None) => false,
                Err(_) => true, // torn: its writer died before it was whole
            };
            if dead {
                disk::remove(&path)?;
            }
        }
        self.forget_lost_marks()?;
        self.point_latest()
    }

    /// Marks of generations whose deletion was interrupted.
    fn forget_lost_marks(&self) -> Result<()> {
        let cell = self.cell();
        let there: HashSet<u64> = cell.numbers()?.into_iter().collect();
        for name in disk::names_in(&cell.dir().join("marks"))? {
            let number = name
                .to_str()
                .and_then(|name| name.split_once('.'))
                .and_then(|(number, _)| super::generation::number_of(number));
            if let Some(number) = number.filter(|number| !there.contains(number)) {
                cell.marks().forget(number)?;
            }
        }
        Ok(())
    }

    /// Makes `latest` point to the newest generation.
    pub(super) fn point_latest(&self) -> Result<()> {
        let cell = self.cell();
        let latest = cell.dir().join("latest");
        let Some(newest) = cell.numbers()?.last().copied() else {
            return disk::remove(&latest);
        };
        let target = Path::new("generations").join(super::generation::dir_name(newest));
        if fs::read_link(&latest).is_ok_and(|now| now == target) {
            return Ok(());
        }
        let temporary = cell.dir().join(disk::temporary_name("latest".as_ref()));
        std::os::unix::fs::symlink(&target, &temporary).at("create", &temporary)?;
        fault::point("commit-latest-made").at("rename", &latest)?;
        fs::rename(&temporary, &latest).at("rename", &latest)?;
        fault::point("commit-latest-swapped").at("sync", cell.dir())?;
        disk::sync_dir(cell.dir())
    }

    /// The newest generation of this computation that can be restarted from: every byte as it was
    /// committed, and `verify` (manifest and rank directory: the engine's look) content with it.
    /// What fails is marked bad with the reason, and the next older one is tried. With `skip_bad`,
    /// those already marked are not tried again.
    ///
    /// Generations of an earlier computation (see [`Lock::completed`], [`Lock::start_fresh`]) do not
    /// count.
    pub fn newest_good(
        &self,
        skip_bad: bool,
        verify: &dyn Fn(&Manifest, &Path) -> Result<(), String>,
    ) -> Result<Found> {
        let cell = self.cell();
        let floor = cell.floor()?;
        let mut rejected = Vec::new();
        for number in cell
            .numbers()?
            .into_iter()
            .rev()
            .filter(|number| *number > floor)
        {
            if skip_bad && let Some(bad) = cell.marks().bad(number)? {
                rejected.push((number, format!("it is marked bad: {}", bad.reason)));
                continue;
            }
            let dir = cell.generation_dir(number);
            let checked = Generation::load(&dir, number).and_then(|generation| {
                let engine = |dir: &Path| verify(&generation.manifest, dir);
                generation.verify(&engine, &|_| ())?;
                Ok(generation)
            });
            match checked {
                Ok(generation) => {
                    return Ok(Found {
                        generation: Some(generation),
                        rejected,
                    });
                }
                Err(fault) => {
                    if let Fault::Damaged(why) = &fault {
                        self.mark_bad_number(number, why)?;
                    }
                    rejected.push((number, fault.reason().into()));
                }
            }
        }
        Ok(Found {
            generation: None,
            rejected,
        })
    }

    /// Marks a generation as one that cannot be used. It is not deleted.
    pub fn mark_bad(&self, generation: &Generation, reason: &str) -> Result<()> {
        self.mark_bad_number(generation.number, reason)
    }

    fn mark_bad_number(&self, number: u64, reason: &str) -> Result<()> {
        self.still_ours()?;
        self.cell().marks().set_bad(number, reason)?;
        self.note(What::MarkedBad {
            generation: number,
            reason: reason.into(),
        })
    }

    /// Notes that the application ended by itself: the next run starts fresh. What was saved stays
    /// until that run's first commit.
    pub fn completed(&self, end: End) -> Result<()> {
        self.still_ours()?;
        let holder = self.holder();
        let completion = Completion {
            end,
            job: holder.job,
            run: holder.run,
            time: Time::now(),
            generation: self.newest_number()?,
        };
        self.cell().write_note("completed.json", &completion)?;
        self.note(What::Completed { end })
    }

    /// Notes that this run starts fresh although there are generations: they no longer count, and
    /// go with the first commit. Nothing if there are none.
    pub fn start_fresh(&self) -> Result<()> {
        self.still_ours()?;
        let generation = self.newest_number()?;
        if generation == 0 {
            return Ok(());
        }
        let holder = self.holder();
        let fresh = Fresh {
            job: holder.job,
            run: holder.run,
            time: Time::now(),
            generation,
        };
        self.cell().write_note("fresh.json", &fresh)
    }

    fn newest_number(&self) -> Result<u64> {
        Ok(self.cell().numbers()?.last().copied().unwrap_or(0))
    }
}
