//! Whether a checkpoint will fit, and making room for it.
//!
//! Contract: [`Lock::room_for`] returns only if the predicted bytes can be written now, as far as
//! the file system tells: by statvfs(2), and by reserving them (fallocate(2)), which a quota refuses
//! as it would refuse the checkpoint. Old unpinned generations go first; if even that cannot be
//! enough, nothing is deleted.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::sys::statvfs::statvfs;

use super::lock::Lock;
use super::retention::expendable;
use super::{At, Result, Store, disk};
use crate::fault;

/// A checkpoint that cannot fit.
#[derive(Debug, thiserror::Error)]
#[error(
    "the checkpoint needs about {} in {}, and only {} {}: delete something there \
     (`container-checkpoint list`, `prune`), or name a larger store",
    size(*needed), dir.display(), size(*free),
    if *quota { "are left of your quota" } else { "are free" }
)]
pub struct Shortage {
    pub dir: PathBuf,
    pub needed: u64,
    pub free: u64,
    /// The file system has room, but this user may not use it.
    pub quota: bool,
}

/// Bytes for people: `812 B`, `1.4 MB`, `3.0 GB` (powers of 1000).
pub fn size(bytes: u64) -> String {
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut scaled = bytes as f64;
    let mut unit = "";
    for next in ["kB", "MB", "GB", "TB", "PB", "EB"] {
        scaled /= 1000.0;
        unit = next;
        if scaled < 999.95 {
            break;
        }
    }
    format!("{scaled:.1} {unit}")
}

/// What a checkpoint of `predicted` bytes may take: predictions miss, and directories, the manifest
/// and `latest` need a little as well.
fn with_margin(predicted: u64) -> u64 {
    predicted
        .saturating_add(predicted / 16)
        .saturating_add(64 << 10)
}

impl Lock {
    /// Makes sure that `predicted` bytes can be written, deleting old generations if that helps.
    /// Says which ones went.
    ///
    /// # Errors
    /// [`Error::Shortage`](super::Error::Shortage), after which a checkpoint must not be tried.
    pub fn room_for(&self, predicted: u64) -> Result<Vec<u64>> {
        let dir = self.cell().generations_dir();
        let needed = with_margin(predicted);
        let mut gone = Vec::new();
        let Err(mut shortage) = room_in(&dir, needed)? else {
            return Ok(gone);
        };
        let candidates = expendable(&self.seen()?);
        let gain: u64 = candidates
            .iter()
            .map(|number| freed_by(&self.cell().generation_dir(*number)))
            .fold(0, u64::saturating_add);
        // With a quota, nobody says how much is missing: trying is all that is left.
        if !shortage.quota && shortage.free.saturating_add(gain) < needed {
            return Err(shortage.into());
        }
        for number in candidates {
            self.delete(number, "space")?;
            gone.push(number);
            match room_in(&dir, needed)? {
                Ok(()) => return Ok(gone),
                Err(still) => shortage = still,
            }
        }
        Err(shortage.into())
    }
}

impl Store {
    /// Whether a checkpoint of `predicted` bytes can be written now, as [`Lock::room_for`] finds
    /// out, but deleting nothing.
    pub fn room_for(&self, predicted: u64) -> Result<std::result::Result<(), Shortage>> {
        room_in(self.dir(), with_margin(predicted))
    }

    /// Writes a file and removes it.
    pub fn try_writing(&self) -> Result<()> {
        let path = self.dir().join(disk::temporary_name("check".as_ref()));
        disk::create(&path, b"").at("write", &path)?;
        disk::remove(&path)
    }
}

/// Whether `needed` bytes can be written in `dir`.
fn room_in(dir: &Path, needed: u64) -> Result<std::result::Result<(), Shortage>> {
    let shortage = |free, quota| Shortage {
        dir: dir.into(),
        needed,
        free,
        quota,
    };
    let seen = statvfs(dir).at("ask for room in", dir)?;
    let free = seen.blocks_available().saturating_mul(seen.fragment_size());
    let faulty = fault::point("room-full").is_err();
    if free < needed || faulty {
        return Ok(Err(shortage(if faulty { 0 } else { free }, false)));
    }
    // On a tmpfs a reservation is memory to be cleared, and what statvfs says is exact.
    if statfs(dir).at("ask for room in", dir)?.filesystem_type() == TMPFS_MAGIC {
        return Ok(Ok(()));
    }
    let path = dir.join(disk::temporary_name("room".as_ref()));
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path);
    let reserved = file.and_then(|file| reserve(&file, needed));
    let removed = disk::remove(&path);
    match reserved {
        Ok(()) => removed.map(Ok),
        Err(error) => match error.raw_os_error() {
            Some(libc::EDQUOT) => Ok(Err(shortage(0, true))),
            Some(libc::ENOSPC) => Ok(Err(shortage(free, false))),
            _ => Err(error).at("reserve room in", dir),
        },
    }
}

fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    let length = i64::try_from(bytes).map_err(|_| io::Error::from(Errno::EFBIG))?;
    fault::point("room-reserve")?;
    loop {
        match fallocate(file, FallocateFlags::empty(), 0, length) {
            Err(Errno::EINTR) => {}
            // The file system has no such call (NFS before 4.2): what statvfs said has to do.
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => return Ok(()),
            other => return Ok(other?),
        }
    }
}

/// How many bytes deleting a generation gives back, about: files that a clone shares give none.
fn freed_by(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let seen = entry.metadata().ok()?;
            Some(if seen.is_dir() {
                freed_by(&entry.path())
            } else if seen.nlink() == 1 {
                seen.blocks().saturating_mul(512)
            } else {
                0
            })
        })
        .fold(0, u64::saturating_add)
}
