//! Things that are slow to make and the same every time: root file systems, container images.
//!
//! Contract: an entry is a directory named after its kind and a hash of its recipe. It is complete
//! or absent (made beside and renamed), made once however many processes ask for it, and stays as
//! long as somebody holds it. Entries of the same kind with another recipe go when nobody does.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// A directory of the cache, held against removal while this value lives.
#[derive(Debug)]
pub struct Entry {
    pub path: PathBuf,
    _lock: File,
}

/// Where everything is kept: `CONTAINER_CHECKPOINT_LAB_CACHE`, or a directory below `/var/cache`.
/// It has to be on a file system that can be the upper layer of an overlay.
pub fn directory() -> PathBuf {
    std::env::var_os("CONTAINER_CHECKPOINT_LAB_CACHE").map_or_else(
        || PathBuf::from("/var/cache/container-checkpoint-lab"),
        PathBuf::from,
    )
}

/// The entry of `kind` for `recipe`; `make` fills the empty directory it is given when there is
/// none yet. `kind` has no `.` and no `/`.
pub fn entry(kind: &str, recipe: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<Entry> {
    let cache = directory();
    fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let hash = blake3::hash(recipe.as_bytes()).to_hex();
    let name = format!("{kind}.{}", &hash[..16]);
    let path = cache.join(&name);

    let lock = open_lock(&path)?;
    lock.lock_shared()
        .with_context(|| format!("cannot lock {}", path.display()))?;
    if path.exists() {
        return Ok(Entry { path, _lock: lock });
    }
    // A shared lock cannot be upgraded without letting others in between: give it up and look
    // again with the exclusive one.
    lock.unlock()
        .with_context(|| format!("cannot unlock {}", path.display()))?;
    if lock.try_lock().is_err() {
        eprintln!("lab: waiting for another process that makes {name}");
        lock.lock()
            .with_context(|| format!("cannot lock {}", path.display()))?;
    }
    if !path.exists() {
        build(kind, &path, make)?;
        remove_others(&cache, kind, &name);
    }
    lock.unlock()
        .with_context(|| format!("cannot unlock {}", path.display()))?;
    lock.lock_shared()
        .with_context(|| format!("cannot lock {}", path.display()))?;
    if !path.exists() {
        bail!(
            "{} was removed by another version of the lab just after it was made",
            path.display()
        );
    }
    Ok(Entry { path, _lock: lock })
}

fn build(kind: &str, path: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let beside = with_suffix(path, ".partial");
    remove(&beside)?;
    fs::create_dir(&beside).with_context(|| format!("cannot create {}", beside.display()))?;
    eprintln!("lab: making {kind} (once; kept in {})", path.display());
    let start = Instant::now();
    let made = make(&beside).with_context(|| format!("cannot make {kind}"));
    if let Err(error) = made {
        if let Err(left) = remove(&beside) {
            eprintln!("lab: {left:#}");
        }
        return Err(error);
    }
    fs::rename(&beside, path).with_context(|| format!("cannot rename {}", beside.display()))?;
    eprintln!("lab: made {kind} in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Removes entries of `kind` other than `keep` that nobody holds. What cannot be removed stays: it
/// costs disk space and nothing else, so it is only told.
fn remove_others(cache: &Path, kind: &str, keep: &str) {
    let Ok(entries) = fs::read_dir(cache) else {
        return;
    };
    for other in entries.flatten() {
        let name = other.file_name().to_string_lossy().into_owned();
        let hash = name
            .strip_prefix(kind)
            .and_then(|rest| rest.strip_prefix('.'));
        if name == keep || hash.is_none_or(|hash| hash.contains('.')) {
            continue;
        }
        // The lock file itself stays: removing it would let two processes lock two files.
        let path = other.path();
        let unused = open_lock(&path).is_ok_and(|lock| {
            lock.try_lock().is_ok() && {
                if let Err(error) = remove(&path) {
                    eprintln!("lab: {error:#}");
                }
                true
            }
        });
        if !unused {
            eprintln!("lab: {} is old, but in use", path.display());
        }
    }
}

fn open_lock(path: &Path) -> Result<File> {
    let path = with_suffix(path, ".lock");
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}; the lab has to run as root", path.display()))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Removes a directory tree, if it is there.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
