//! Other users' stores, for root.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::{Gid, Uid, geteuid, setegid, seteuid, setgid, setgroups, setuid};

use super::Failure;
use crate::config::Config;

/// A user's store that exists.
pub struct UserStore {
    pub user: String,
    pub dir: PathBuf,
}

/// Where root works on a store of somebody else, root becomes that user for good.
pub fn become_owner(store: &Path) -> Result<(), Failure> {
    let Some((uid, gid)) = foreign_owner(store)? else {
        return Ok(());
    };
    setgroups(&[gid])
        .and_then(|()| setgid(gid))
        .and_then(|()| setuid(uid))
        .map_err(|error| cannot_become(store, uid, error))
}

/// Does `work` as the owner of a store, then goes back to being root.
pub fn as_owner<T>(store: &Path, work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    let Some((uid, gid)) = foreign_owner(store)? else {
        return work();
    };
    let (was_uid, was_gid) = (geteuid(), nix::unistd::getegid());
    setegid(gid)
        .and_then(|()| seteuid(uid))
        .map_err(|error| cannot_become(store, uid, error))?;
    let result = work();
    seteuid(was_uid)
        .and_then(|()| setegid(was_gid))
        .map_err(|error| cannot_become(store, was_uid, error))?;
    result
}

fn cannot_become(store: &Path, uid: Uid, error: nix::Error) -> Failure {
    Failure::Other(format!(
        "could not become user {uid}, who owns {}: {error}",
        store.display()
    ))
}

/// Who owns a store, if this is root and the owner is not.
fn foreign_owner(store: &Path) -> Result<Option<(Uid, Gid)>, Failure> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    match fs::symlink_metadata(store) {
        Ok(seen) if seen.uid() != 0 => {
            Ok(Some((Uid::from_raw(seen.uid()), Gid::from_raw(seen.gid()))))
        }
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::Other(format!(
            "could not look at {}: {error}",
            store.display()
        ))),
    }
}

/// The stores of all users that the name service lists, and those that the pattern of stores
/// leads to in the file system.
pub fn stores(config: &Config) -> Result<Vec<UserStore>, Failure> {
    if !geteuid().is_root() {
        return Err(Failure::Usage(
            "--all-users looks into everybody's directories: only root can do that".into(),
        ));
    }
    let listed = Command::new("getent")
        .arg("passwd")
        .output()
        .map_err(|error| Failure::Other(format!("could not run `getent passwd`: {error}")))?;
    let mut found: Vec<UserStore> = Vec::new();
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        if let Some((user, home)) = passwd_entry(line) {
            found.push(UserStore {
                user: user.into(),
                dir: config.store(Path::new(home), user),
            });
        }
    }
    // A directory service may not list its users (sssd's `enumerate = false`), but their
    // directories are there.
    for user in users_in_paths(&config.dir) {
        if !found.iter().any(|known| known.user == user) {
            let dir = config.store(Path::new("/nonexistent"), &user);
            found.push(UserStore { user, dir });
        }
    }
    found.retain(|store| store.dir.is_dir());
    found.sort_by(|a, b| (&a.dir, &a.user).cmp(&(&b.dir, &b.user)));
    // Users who share a home directory share a store.
    found.dedup_by(|b, a| a.dir == b.dir);
    found.sort_by(|a, b| a.user.cmp(&b.user));
    Ok(found)
}

/// Name and home directory of a line of passwd(5).
fn passwd_entry(line: &str) -> Option<(&str, &str)> {
    let fields: Vec<&str> = line.split(':').collect();
    match fields[..] {
        [user, _, _, _, _, home, _] if !user.is_empty() && home.starts_with('/') => {
            Some((user, home))
        }
        _ => None,
    }
}

/// The names that stand for `%u` in existing paths of a pattern like `/scratch/%u/checkpoints`.
fn users_in_paths(pattern: &str) -> Vec<String> {
    let Some((parent, rest)) = pattern.split_once("/%u") else {
        return Vec::new();
    };
    if parent.contains('%') || !(rest.is_empty() || rest.starts_with('/')) {
        return Vec::new();
    }
    let parent = if parent.is_empty() { "/" } else { parent };
    let Ok(entries) = fs::read_dir(parent) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_passwd() {
        assert_eq!(
            passwd_entry("alice:x:1:1:A, B:/home/alice:/bin/sh"),
            Some(("alice", "/home/alice"))
        );
        assert_eq!(passwd_entry("broken"), None);
        assert_eq!(passwd_entry("nohome:x:1:1:::/bin/sh"), None);
    }

    #[test]
    fn users_by_their_directories() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("alice")).unwrap();
        let pattern = |rest: &str| format!("{}{rest}", dir.path().display());
        assert_eq!(users_in_paths(&pattern("/%u")), ["alice"]);
        assert_eq!(users_in_paths(&pattern("/%u/checkpoints")), ["alice"]);
        assert_eq!(users_in_paths(&pattern("/%u-x")), [""; 0]);
        assert_eq!(users_in_paths("%h/.container-checkpoint"), [""; 0]);
    }
}
