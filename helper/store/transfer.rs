//! Generations that come from elsewhere: another name, or an archive; and archives to take away.
//!
//! Contract: what comes in is checked against its manifest, byte by byte, before it is committed; it
//! gets a number of its own. An archive is a zstd-compressed tar file: first `manifest.json`, then
//! the files in the manifest's order. Names and attributes in the archive mean nothing when it is
//! read: only the manifest's do, and nothing else is ever created.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use super::commit::Draft;
use super::digest::Progress;
use super::generation::Generation;
use super::history::What;
use super::lock::Lock;
use super::manifest::{self, Manifest};
use super::{At, Error, Result, disk};
use crate::sys;

/// How the files of a clone came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shared {
    /// Own blocks only where one of them is written to.
    Reflink,
    /// The same files. Nobody writes to files of a generation.
    HardLink,
    Copy,
}

impl std::fmt::Display for Shared {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Shared::Reflink => "reflink",
            Shared::HardLink => "hard link",
            Shared::Copy => "copy",
        })
    }
}

const BUFFER: usize = 1 << 20;

/// Largest extension header (long name) that is skipped, in bytes.
const EXTENSION_MAX: u64 = 64 << 10;
/// zstd's level: more is slower than disks and networks, and memory compresses well at once.
const LEVEL: i32 = 3;

impl Lock {
    /// Commits a copy of `from` here, sharing its blocks if the file system can. Every byte is read
    /// and checked.
    pub fn clone_from(
        &self,
        from: &Generation,
        progress: Progress<'_>,
    ) -> Result<(Generation, Shared)> {
        let draft = self.begin(0)?;
        let mut way = Shared::Reflink;
        for record in from.manifest().files.iter() {
            let path = record.relative().map_err(|why| damaged(from.dir(), why))?;
            let (source, target) = (from.dir().join(&path), draft.dir().join(&path));
            make_parents(draft.dir(), &path)?;
            loop {
                match share(&source, &target, way) {
                    Ok(()) => break,
                    Err(error) => {
                        way = match way {
                            Shared::Reflink => Shared::HardLink,
                            Shared::HardLink => {
                                self.room_for(from.manifest().bytes)?;
                                Shared::Copy
                            }
                            Shared::Copy => return Err(error).at("copy", &source),
                        };
                    }
                }
            }
        }
        let generation = self.adopt(draft, from.manifest().clone(), progress)?;
        let from = from.dir().display().to_string();
        self.note(What::Imported {
            generation: generation.number(),
            from,
        })?;
        Ok((generation, way))
    }

    /// Commits a draft with the manifest of another generation, whose files it has to hold.
    fn adopt(
        &self,
        draft: Draft,
        mut manifest: Manifest,
        progress: Progress<'_>,
    ) -> Result<Generation> {
        let files = std::mem::take(&mut manifest.files);
        let name = self.cell().name().to_string();
        let key = self.cell().key().map(ToString::to_string);
        if (&manifest.name, &manifest.step_key) != (&name, &key) {
            // Another computation's output is not this one's to cut.
            manifest.streams.clear();
        }
        (manifest.name, manifest.step_key) = (name, key);
        manifest.generation = draft.number();
        manifest.predecessor = None;
        draft.seal(manifest, Some(&files), progress)
    }
}

/// Commits what an archive holds. `from` names it in messages and in the history. `choose` is told
/// the manifest and takes the cell to import to; `verify` is the engine's look at a rank's files.
///
/// # Errors
/// [`Error::Damaged`] if the archive is not whole or not what its manifest says; nothing of it is
/// left then.
pub fn import(
    archive: impl Read,
    from: &Path,
    choose: &dyn Fn(&Manifest) -> Result<Lock>,
    verify: &dyn Fn(&Manifest, &Path) -> Result<(), String>,
    progress: Progress<'_>,
) -> Result<Generation> {
    let reader = zstd::Decoder::new(archive).at("read", from)?;
    let mut archive = tar::Archive::new(reader);
    let cut = || damaged(from, "it ends too early".into());
    let entries = archive
        .entries()
        .map_err(|error| damaged(from, error.to_string()))?;
    // Raw: long names are members of their own, which are skipped and never kept in memory.
    let mut members = entries
        .raw(true)
        .filter_map(|entry| regular(entry, from).transpose());

    let manifest = read_manifest(members.next().ok_or_else(cut)??, from)?;
    let lock = choose(&manifest)?;
    let draft = lock.begin(manifest.bytes)?;
    let mut buffer = vec![0; BUFFER];
    for record in &manifest.files {
        let path = record.relative().map_err(|why| damaged(from, why))?;
        let mut member = members.next().ok_or_else(cut)??;
        if member.size() != record.size {
            let why = format!(
                "{} has {} bytes, not {}",
                record.path,
                member.size(),
                record.size
            );
            return Err(damaged(from, why));
        }
        make_parents(draft.dir(), &path)?;
        let target = draft.dir().join(&path);
        let mut file = create_new(&target).at("create", &target)?;
        let mut left = record.size;
        while left > 0 {
            let count = match member.read(&mut buffer) {
                Ok(0) => return Err(cut()),
                Ok(count) => count,
                Err(error) => return Err(damaged(from, error.to_string())),
            };
            file.write_all(&buffer[..count]).at("write", &target)?;
            left = left.saturating_sub(count as u64);
            progress(count as u64);
        }
    }
    if let Some(more) = members.next() {
        more?;
        return Err(damaged(
            from,
            "it holds more files than its manifest".into(),
        ));
    }
    for rank in 0..manifest.ranks {
        verify(&manifest, &draft.dir().join(format!("rank-{rank}"))).map_err(|why| {
            damaged(
                from,
                format!("{} cannot use rank {rank}: {why}", manifest.engine),
            )
        })?;
    }
    let generation = lock
        .adopt(draft, manifest, &|_| ())
        .map_err(|error| match error {
            Error::Damaged { why, .. } => damaged(from, why),
            other => other,
        })?;
    let from = from.display().to_string();
    lock.note(What::Imported {
        generation: generation.number(),
        from,
    })?;
    Ok(generation)
}

impl Generation {
    /// Writes an archive of this generation, checking every file against the manifest on the way.
    ///
    /// # Errors
    /// [`Error::Damaged`] as soon as a file is not what was saved: the archive is then useless.
    pub fn export(&self, to: impl Write, progress: Progress<'_>) -> Result<()> {
        let archive = Path::new("the archive");
        let mut encoder = zstd::Encoder::new(to, LEVEL).at("write", archive)?;
        encoder.include_checksum(true).at("write", archive)?;
        let mut tar = tar::Builder::new(encoder);

        let path = self.dir().join(manifest::FILE_NAME);
        let bytes = disk::read_capped(&path, manifest::CAP).at("read", &path)?;
        if Manifest::decode(&bytes).as_ref() != Ok(self.manifest()) {
            return Err(damaged(&path, "it changed meanwhile".into()));
        }
        let mut header = self.header(bytes.len() as u64);
        tar.append_data(&mut header, manifest::FILE_NAME, bytes.as_slice())
            .at("write", archive)?;
        for record in &self.manifest().files {
            let relative = record.relative().map_err(|why| damaged(self.dir(), why))?;
            let path = self.dir().join(&relative);
            let file = disk::open_regular(&path).at("read", &path)?;
            if file.metadata().at("look at", &path)?.len() != record.size {
                return Err(damaged(&path, "its size is not what was saved".into()));
            }
            let mut reader = Hashing {
                file: file.take(record.size),
                hasher: blake3::Hasher::new(),
                progress,
            };
            let mut header = self.header(record.size);
            tar.append_data(&mut header, &relative, &mut reader)
                .at("archive", &path)?;
            if reader.hasher.finalize().to_hex().as_str() != record.blake3 {
                return Err(damaged(&path, "it is not what was saved".into()));
            }
        }
        tar.into_inner()
            .and_then(zstd::Encoder::finish)
            .and_then(|mut to| to.flush())
            .at("write", archive)
    }

    fn header(&self, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_size(size);
        header.set_mode(0o400);
        header.set_mtime(self.manifest().created.millis() / 1000);
        header
    }
}

fn damaged(path: &Path, why: String) -> Error {
    Error::Damaged {
        path: path.into(),
        why,
    }
}

/// Hashes what is read through it.
struct Hashing<'a> {
    file: io::Take<File>,
    hasher: blake3::Hasher,
    progress: Progress<'a>,
}

impl Read for Hashing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        (self.progress)(count as u64);
        Ok(count)
    }
}

/// A member that is a file; `None` for the extension headers before one.
fn regular<'a, R: Read>(
    entry: io::Result<tar::Entry<'a, R>>,
    from: &Path,
) -> Result<Option<tar::Entry<'a, R>>> {
    let entry = entry.map_err(|error| damaged(from, error.to_string()))?;
    let kind = entry.header().entry_type();
    if kind.is_file() {
        return Ok(Some(entry));
    }
    let extension =
        kind.is_gnu_longname() || kind.is_pax_local_extensions() || kind.is_pax_global_extensions();
    if extension && entry.size() <= EXTENSION_MAX {
        return Ok(None);
    }
    Err(damaged(from, "it holds something other than files".into()))
}

fn read_manifest(entry: impl Read, from: &Path) -> Result<Manifest> {
    let mut bytes = Vec::new();
    entry
        .take(manifest::CAP + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| damaged(from, error.to_string()))?;
    Manifest::decode(&bytes).map_err(|why| damaged(from, format!("its manifest: {why}")))
}

fn make_parents(root: &Path, relative: &Path) -> Result<()> {
    let parent = relative
        .parent()
        .map_or(root.to_path_buf(), |parent| root.join(parent));
    DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(&parent)
        .at("create", &parent)
}

fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)
}

fn share(source: &Path, target: &Path, way: Shared) -> io::Result<()> {
    let result = match way {
        Shared::Reflink => {
            let from = disk::open_regular(source)?;
            create_new(target).and_then(|to| sys::reflink(&from, &to))
        }
        Shared::HardLink => fs::hard_link(source, target),
        Shared::Copy => {
            let mut from = disk::open_regular(source)?;
            create_new(target).and_then(|mut to| io::copy(&mut from, &mut to).map(drop))
        }
    };
    if result.is_err() && way != Shared::HardLink {
        // What was begun in one way must not be in the way of the next.
        let _ = fs::remove_file(target);
    }
    result
}
