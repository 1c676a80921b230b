//! The few operations on files that the store is built of, each durable or refused.
//!
//! Contract: nothing here follows a symbolic link in the last component, reads more than its cap or
//! blocks on a fifo. After [`replace`] and [`sync_dir`] return, what they did survives a power loss
//! as far as the file system keeps its promises (fsync(2)).

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;

use super::{At, Error, Result};

/// Sixteen hexadecimal digits that no other process of any node is likely to make.
pub fn nonce() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut hasher = blake3::Hasher::new();
    let mut random = [0u8; 32];
    // Host, process and time make it unique even where /dev is empty.
    if let Ok(mut source) = File::open("/dev/urandom") {
        let _unused_if_short = source.read(&mut random);
    }
    hasher.update(&random);
    hasher.update(nix::unistd::gethostname().unwrap_or_default().as_bytes());
    hasher.update(&std::process::id().to_le_bytes());
    hasher.update(&super::Time::now().millis().to_le_bytes());
    hasher.update(&COUNT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    hasher.finalize().to_hex()[..16].to_string()
}

/// Opens a regular file for reading; anything else is an error.
pub fn open_regular(path: &Path) -> io::Result<File> {
    // O_NONBLOCK: opening a fifo must not wait for a writer. It changes nothing for a regular file.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "not a regular file",
        ));
    }
    Ok(file)
}

/// Reads a whole regular file of at most `cap` bytes.
pub fn read_capped(path: &Path, cap: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(cap + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > cap {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("larger than the {cap} bytes that such a file may have"),
        ));
    }
    Ok(bytes)
}

/// Reads a whole regular file as [`read_capped`] does; `None` if there is none.
pub fn read_if_there(path: &Path, cap: u64) -> Result<Option<Vec<u8>>> {
    match read_capped(path, cap) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(Error::Damaged {
            path: path.into(),
            why: error.to_string(),
        }),
        Err(error) => Err(error).at("read", path),
    }
}

/// Writes a new file of mode 0600 and syncs it. It must not exist.
pub fn create(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// What temporary files of [`replace`] start with; a sweep removes them.
pub const TEMPORARY: &str = ".tmp.";

/// Replaces the file at `path` by one with these bytes: afterwards the old or the new one is there,
/// whole, whatever happens.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::EINVAL).at("write", path);
    };
    let temporary = dir.join(temporary_name(name));
    let written = create(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        // The first error is the one that counts; a leftover is swept.
        let _ = fs::remove_file(&temporary);
        return Err(error).at("write", path);
    }
    sync_dir(dir)
}

pub fn temporary_name(name: &OsStr) -> std::ffi::OsString {
    let mut temporary = std::ffi::OsString::from(TEMPORARY);
    temporary.push(nonce());
    temporary.push(".");
    temporary.push(name);
    temporary
}

/// Makes the entries of a directory durable.
pub fn sync_dir(dir: &Path) -> Result<()> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    match synced {
        // File systems without a notion of syncing a directory say so (some FUSE ones).
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTSUP)) => Ok(()),
        other => other.at("sync", dir),
    }
}

/// Makes sure that `dir` is a directory of this user that nobody else can write to; creates it with
/// mode 0700 if it is missing (its parents too, if `parents`).
pub fn private_dir(dir: &Path, parents: bool) -> Result<()> {
    match DirBuilder::new().mode(0o700).recursive(false).create(dir) {
        Ok(()) => {
            if let Some(parent) = dir.parent().filter(|p| !p.as_os_str().is_empty()) {
                // Where the parent cannot be opened (mode 0711), its own user has to care.
                match sync_dir(parent) {
                    Err(Error::Io { error, .. })
                        if error.kind() == io::ErrorKind::PermissionDenied => {}
                    other => other?,
                }
            }
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) if parents && error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = dir.parent() {
                fs::DirBuilder::new()
                    .mode(0o700)
                    .recursive(true)
                    .create(parent)
                    .at("create", parent)?;
            }
            return private_dir(dir, false);
        }
        Err(error) => return Err(error).at("create", dir),
    }
    check_private(dir, nix::unistd::geteuid().as_raw())
}

/// Refuses a directory that is not one, belongs to another user than `owner`, or that others can
/// write to.
pub fn check_private(dir: &Path, owner: u32) -> Result<()> {
    let seen = fs::symlink_metadata(dir).at("look at", dir)?;
    let why = if seen.is_symlink() {
        "it is a symbolic link; name the directory itself".to_string()
    } else if !seen.is_dir() {
        "it is not a directory".to_string()
    } else if seen.uid() != owner {
        format!("it belongs to user {}, not to user {owner}", seen.uid())
    } else if seen.mode() & 0o022 != 0 {
        format!(
            "its mode {:04o} lets others write to it; `chmod go-w` it, if you trust what is in it",
            seen.mode() & 0o7777
        )
    } else {
        return Ok(());
    };
    Err(Error::Place {
        path: dir.into(),
        why,
    })
}

/// The names in a directory, sorted; none if it does not exist.
pub fn names_in(dir: &Path) -> Result<Vec<std::ffi::OsString>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.at("list", dir)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.at("list", dir)?.file_name());
    }
    names.sort();
    Ok(names)
}

/// Removes a file, link or directory tree; nothing there is fine.
pub fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Err(error) => Err(error),
        Ok(seen) if seen.is_dir() => remove_tree(path),
        Ok(_) => fs::remove_file(path),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.at("remove", path),
    }
}

/// An engine or an application may have left directories that their owner cannot enter.
fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            open_up(path)?;
            fs::remove_dir_all(path)
        }
        other => other,
    }
}

fn open_up(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            open_up(&entry.path())?;
        }
    }
    Ok(())
}
