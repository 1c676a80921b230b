//! Things that are slow to make and the same every time: root file systems, container images.
//!
//! Contract: an entry is a directory named after its kind and a hash of its recipe. It is complete
//! or absent (made beside and renamed), made once however many processes ask for it, and stays as
//! long as somebody holds it. Entries of the same kind with another recipe go when nobody does.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};

/// How long an entry that nobody uses is kept. Its lock file's time tells of the last use.
const KEPT: Duration = Duration::from_secs(24 * 3600);

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
    lock.set_modified(SystemTime::now())
        .with_context(|| format!("cannot set the time of the lock of {}", path.display()))?;
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

/// Removes entries of `kind` other than `keep` that nobody holds or has used lately. What cannot be
/// removed stays: it costs disk space and nothing else, so it is only told.
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
        if let Err(error) = remove_unused(&other.path()) {
            eprintln!("lab: {error:#}");
        }
    }
}

fn remove_unused(path: &Path) -> Result<()> {
    // The lock file itself stays: removing it would let two processes lock two files.
    let lock = open_lock(path)?;
    let used = lock
        .metadata()
        .and_then(|data| data.modified())
        .with_context(|| format!("cannot read the time of the lock of {}", path.display()))?;
    // An age that cannot be told (a clock set back) counts as young.
    let old = used.elapsed().is_ok_and(|age| age > KEPT);
    if old && lock.try_lock().is_ok() {
        remove(path)?;
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_entries_of_the_kind_go_that_are_old_and_unused() {
        let cache = tempfile::tempdir().unwrap();
        let old = SystemTime::now() - 2 * KEPT;
        let make = |name: &str, used: SystemTime| {
            let path = cache.path().join(name);
            fs::create_dir(&path).unwrap();
            let lock = open_lock(&path).unwrap();
            lock.set_modified(used).unwrap();
            lock
        };
        make("root-a.1", old);
        make("root-a.2", SystemTime::now());
        make("root-a.3", old);
        make("root-ab.1", old);
        let held = make("root-a.4", old);
        held.lock_shared().unwrap();
        remove_others(cache.path(), "root-a", "root-a.3");
        let there = |name: &str| cache.path().join(name).exists();
        assert!(!there("root-a.1"));
        for name in ["root-a.2", "root-a.3", "root-a.4", "root-ab.1"] {
            assert!(there(name), "{name}");
        }
    }
}
