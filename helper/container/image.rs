//! What a container image is, so that a restart can tell whether it is still the same.
//!
//! Contract: [`digest`] of a SIF file holds its header's id, its size and the BLAKE3 of all of its
//! bytes; of another file (squashfs, ext3) the same without an id. Hashing gigabytes once is enough:
//! the result is remembered in a file of the caller's, and counts as long as device, inode, size and
//! both times of the image stay. A sandbox directory is not hashed: its digest is its path and the
//! time of the last change to its top directory, which tells another sandbox, but not a changed file
//! deep inside.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Most images that are remembered; the oldest goes first.
const REMEMBERED: usize = 64;
/// Largest memory that is read, in bytes.
const MEMORY_CAP: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("could not read the container image {}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("the container image {} is neither a file nor a directory", path.display())]
    Kind { path: PathBuf },
}

/// The identity of a container image. Compared as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Digest {
    /// A SIF file: the id in its header (a UUID), its size in bytes and BLAKE3.
    Sif {
        id: String,
        size: u64,
        blake3: String,
    },
    /// Any other file.
    File { size: u64, blake3: String },
    /// A directory: its path and the time of its last change, in ns since 1970.
    Sandbox { path: String, changed: i128 },
}

impl std::fmt::Display for Digest {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Digest::Sif { id, size, blake3 } => write!(out, "sif:{id}:{size}:{blake3}"),
            Digest::File { size, blake3 } => write!(out, "file:{size}:{blake3}"),
            Digest::Sandbox { path, changed } => write!(out, "sandbox:{changed}:{path}"),
        }
    }
}

/// An image whose digest is remembered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    dev: u64,
    ino: u64,
    size: u64,
    /// Times of the last change of contents and of the inode, in ns since 1970. The latter cannot
    /// be set back by the owner.
    mtime: i128,
    ctime: i128,
    id: Option<String>,
    blake3: String,
}

/// The digest of the image at `path`; `memory` is the file in which digests are remembered. A
/// memory that cannot be read or written costs time only.
pub fn digest(path: &Path, memory: &Path) -> Result<Digest, ImageError> {
    let at = |error| ImageError::Io {
        path: path.into(),
        error,
    };
    let seen = fs::metadata(path).map_err(at)?;
    if seen.is_dir() {
        let real = fs::canonicalize(path).map_err(at)?;
        return Ok(Digest::Sandbox {
            path: real.to_string_lossy().into_owned(),
            changed: nanos(seen.mtime(), seen.mtime_nsec()),
        });
    }
    if !seen.is_file() {
        return Err(ImageError::Kind { path: path.into() });
    }
    let mut remembered = recall(memory);
    let this = |r: &Remembered| {
        let (mtime, ctime) = times(&seen);
        (r.dev, r.ino, r.size, r.mtime, r.ctime)
            == (seen.dev(), seen.ino(), seen.len(), mtime, ctime)
    };
    if let Some(known) = remembered.iter().find(|r| this(r)) {
        return Ok(known.digest());
    }
    let id = sif_id(path).map_err(at)?;
    let (size, blake3) = hash(path).map_err(at)?;
    let after = fs::metadata(path).map_err(at)?;
    let (mtime, ctime) = times(&after);
    let new = Remembered {
        dev: after.dev(),
        ino: after.ino(),
        size,
        mtime,
        ctime,
        id,
        blake3: blake3.to_hex().to_string(),
    };
    let digest = new.digest();
    // An image that changes while it is read is not worth remembering.
    if this(&new) {
        remembered.retain(|r| (r.dev, r.ino) != (new.dev, new.ino));
        remembered.push(new);
        let surplus = remembered.len().saturating_sub(REMEMBERED);
        remembered.drain(..surplus);
        if let Err(error) = remember(memory, &remembered) {
            log::warn!(
                "could not write {}: {error}; the image will be hashed again next time",
                memory.display()
            );
        }
    }
    Ok(digest)
}

impl Remembered {
    fn digest(&self) -> Digest {
        let (size, blake3) = (self.size, self.blake3.clone());
        match self.id.clone() {
            Some(id) => Digest::Sif { id, size, blake3 },
            None => Digest::File { size, blake3 },
        }
    }
}

fn times(seen: &fs::Metadata) -> (i128, i128) {
    (
        nanos(seen.mtime(), seen.mtime_nsec()),
        nanos(seen.ctime(), seen.ctime_nsec()),
    )
}

fn nanos(seconds: i64, nanos: i64) -> i128 {
    i128::from(seconds) * 1_000_000_000 + i128::from(nanos)
}

fn recall(memory: &Path) -> Vec<Remembered> {
    let mut bytes = Vec::new();
    let parsed = fs::File::open(memory)
        .and_then(|file| file.take(MEMORY_CAP).read_to_end(&mut bytes))
        .and_then(|_| serde_json::from_slice(&bytes).map_err(io::Error::from));
    match parsed {
        Ok(remembered) => remembered,
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                log::warn!(
                    "could not read {}: {error}; hashing again",
                    memory.display()
                );
            }
            Vec::new()
        }
    }
}

/// Replaces the memory in one step, so that others never read half of one. A power loss may take
/// it: it is only a memory.
fn remember(memory: &Path, remembered: &[Remembered]) -> io::Result<()> {
    let dir = memory.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    serde_json::to_writer_pretty(&mut file, remembered)?;
    file.flush()?;
    file.persist(memory).map_err(|error| error.error)?;
    Ok(())
}

/// Size and BLAKE3 of a file.
fn hash(path: &Path) -> io::Result<(u64, blake3::Hash)> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(fs::File::open(path)?)?;
    Ok((hasher.count(), hasher.finalize()))
}

/// The id in a SIF header: launch script (32 bytes), "SIF_MAGIC\0", version (3), architecture (3),
/// then 16 bytes of UUID (sif/v2, `type header`). `None` if it is no SIF file.
pub(super) fn sif_id(path: &Path) -> io::Result<Option<String>> {
    let mut header = Vec::new();
    fs::File::open(path)?.take(64).read_to_end(&mut header)?;
    if header.get(32..42) != Some(b"SIF_MAGIC\0") {
        return Ok(None);
    }
    let Some(uuid) = header.get(48..64) else {
        return Ok(None);
    };
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Some(format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sif(path: &Path, content: &[u8]) {
        let mut bytes = b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\x0001\x0002\0".to_vec();
        assert_eq!(bytes.len(), 48);
        bytes.extend(0xa0..0xb0);
        bytes.extend(content);
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn why_it_cannot_be_read_is_said_once() {
        let dir = tempfile::tempdir().unwrap();
        let why = digest(&dir.path().join("none.sif"), &dir.path().join("memory")).unwrap_err();
        let said = format!("{:#}", anyhow::Error::from(why));
        assert_eq!(said.matches("No such file").count(), 1, "{said}");
    }

    #[test]
    fn a_sif_file_is_hashed_once() {
        let dir = tempfile::tempdir().unwrap();
        let (image, memory) = (dir.path().join("app.sif"), dir.path().join("memory"));
        sif(&image, b"one");
        let first = digest(&image, &memory).unwrap();
        let text = first.to_string();
        assert!(
            text.starts_with("sif:a0a1a2a3-a4a5-a6a7-a8a9-aaabacadaeaf:67:"),
            "{text}"
        );

        // A memory that lies shows that it is used.
        let known = fs::read_to_string(&memory).unwrap();
        let Digest::Sif { blake3, .. } = &first else {
            panic!("{first}")
        };
        fs::write(&memory, known.replace(blake3, &"0".repeat(64))).unwrap();
        assert!(
            digest(&image, &memory)
                .unwrap()
                .to_string()
                .ends_with("00000000")
        );

        sif(&image, b"two");
        let second = digest(&image, &memory).unwrap();
        assert_ne!(second, first);
        fs::write(&memory, "{ no memory").unwrap();
        assert_eq!(digest(&image, &memory).unwrap(), second);
        let link = dir.path().join("link.sif");
        std::os::unix::fs::symlink(&image, &link).unwrap();
        assert_eq!(digest(&link, Path::new("/nowhere/memory")).unwrap(), second);
    }

    #[test]
    fn other_images() {
        let dir = tempfile::tempdir().unwrap();
        let memory = dir.path().join("memory");
        let file = dir.path().join("app.img");
        fs::write(&file, b"").unwrap();
        assert!(matches!(
            digest(&file, &memory).unwrap(),
            Digest::File { size: 0, .. }
        ));
        let sandbox = dir.path().join("sandbox");
        fs::create_dir(&sandbox).unwrap();
        let before = digest(&sandbox, &memory).unwrap();
        assert_eq!(digest(&sandbox, &memory).unwrap(), before);
        fs::File::open(&sandbox)
            .unwrap()
            .set_modified(std::time::UNIX_EPOCH)
            .unwrap();
        assert_ne!(digest(&sandbox, &memory).unwrap(), before);
        assert!(matches!(
            digest(Path::new("/dev/null"), &memory),
            Err(ImageError::Kind { .. })
        ));
        let none = digest(Path::new("/nowhere/app.sif"), &memory)
            .unwrap_err()
            .to_string();
        assert!(none.contains("/nowhere/app.sif"), "{none}");
    }
}
