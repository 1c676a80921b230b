//! BLAKE3 of many files at once.
//!
//! Contract: [`hash_files`] reads every file once, in parallel over files and over the pieces of
//! large ones. Called right after the files were written it reads them from the page cache.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

use super::disk;

/// Told how many more bytes are done, from any thread.
pub type Progress<'a> = &'a (dyn Fn(u64) + Sync);

/// Bytes hashed as one piece: a power of two of BLAKE3's chunks, so that pieces are subtrees.
const PIECE: u64 = 8 << 20;
const BUFFER: usize = 256 << 10;
/// More threads than this do not make a file system faster.
const THREADS_MAX: usize = 16;

/// A file to hash, and what came out.
struct Job {
    file: File,
    size: u64,
    pieces: usize,
}

/// Size and hash of each of `paths` (regular files), in their order. With `sync`, every file is
/// also made durable (fsync), and the time that this took is added to it.
///
/// # Errors
/// The index of the path that could not be read, and why; also if a file changed its size
/// meanwhile.
pub fn hash_files(
    paths: &[PathBuf],
    mut sync: Option<&mut Duration>,
    progress: Progress<'_>,
) -> Result<Vec<(u64, blake3::Hash)>, (usize, io::Error)> {
    let mut hashes = Vec::with_capacity(paths.len());
    // In groups: a generation may have more files than a process may have descriptors.
    for (start, group) in paths.chunks(64).enumerate().map(|(n, g)| (n * 64, g)) {
        let group = hash_group(group, sync.as_deref_mut(), progress);
        hashes.extend(group.map_err(|(i, e)| (start + i, e))?);
    }
    Ok(hashes)
}

fn hash_group(
    paths: &[PathBuf],
    mut sync: Option<&mut Duration>,
    progress: Progress<'_>,
) -> Result<Vec<(u64, blake3::Hash)>, (usize, io::Error)> {
    let mut jobs = Vec::with_capacity(paths.len());
    for (index, path) in paths.iter().enumerate() {
        let job = disk::open_regular(path).and_then(|file| {
            let size = file.metadata()?.len();
            let pieces = usize::try_from(size.div_ceil(PIECE).max(1)).map_err(io::Error::other)?;
            Ok(Job { file, size, pieces })
        });
        jobs.push(job.map_err(|error| (index, error))?);
    }
    let work: Vec<(usize, usize)> = jobs
        .iter()
        .enumerate()
        .flat_map(|(index, job)| (0..job.pieces).map(move |piece| (index, piece)))
        .collect();
    let values: Vec<Mutex<Option<Value>>> = work.iter().map(|_| Mutex::new(None)).collect();
    let failed: Mutex<Option<(usize, io::Error)>> = Mutex::new(None);
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));

    let threads = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(THREADS_MAX);
    let run = || {
        let mut buffer = vec![0; BUFFER];
        while !stop.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(&(index, piece)) = work.get(at) else {
                break;
            };
            match hash_piece(&jobs[index], piece, &mut buffer, progress) {
                Ok(value) => *lock(&values[at]) = Some(value),
                Err(error) => {
                    lock(&failed).get_or_insert((index, error));
                    stop.store(true, Ordering::Relaxed);
                }
            }
        }
    };
    if work.len() == 1 || threads == 1 {
        run();
    } else {
        thread::scope(|scope| {
            for _ in 0..threads.min(work.len()) {
                scope.spawn(run);
            }
        });
    }
    if let Some(error) = failed
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
    {
        return Err(error);
    }

    let mut hashes = Vec::with_capacity(jobs.len());
    let mut values = values.into_iter().map(|v| {
        v.into_inner()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    });
    for (index, job) in jobs.iter().enumerate() {
        let pieces: Option<Vec<Value>> = values.by_ref().take(job.pieces).collect();
        let hash = pieces.and_then(|pieces| join(&pieces)).ok_or_else(|| {
            (
                index,
                io::Error::other("a thread that hashes ended before its work"),
            )
        })?;
        if let Some(took) = &mut sync {
            let begun = Instant::now();
            job.file.sync_all().map_err(|error| (index, error))?;
            **took += begun.elapsed();
        }
        let size = job.file.metadata().map_err(|error| (index, error))?.len();
        if size != job.size {
            return Err((index, io::Error::other("it changed while it was read")));
        }
        hashes.push((size, hash));
    }
    Ok(hashes)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What one piece comes to: the hash, if it is the whole file, or its place in the tree.
#[derive(Clone, Copy)]
enum Value {
    Whole(blake3::Hash),
    Subtree(ChainingValue),
}

fn hash_piece(
    job: &Job,
    piece: usize,
    buffer: &mut [u8],
    progress: Progress<'_>,
) -> io::Result<Value> {
    let start = piece as u64 * PIECE;
    let end = job.size.min(start + PIECE);
    let mut hasher = blake3::Hasher::new();
    if job.pieces > 1 {
        hasher.set_input_offset(start);
    }
    let mut at = start;
    while at < end {
        let want = usize::try_from(end - at).map_or(buffer.len(), |left| left.min(buffer.len()));
        match job.file.read_at(&mut buffer[..want], at) {
            Ok(0) => return Err(io::Error::other("it became shorter while it was read")),
            Ok(count) => {
                hasher.update(&buffer[..count]);
                at += count as u64;
                progress(count as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(if job.pieces > 1 {
        Value::Subtree(hasher.finalize_non_root())
    } else {
        Value::Whole(hasher.finalize())
    })
}

/// The root of the tree over the pieces of a file. BLAKE3's left subtree holds the largest power of
/// two of chunks that leaves something for the right one; pieces are such powers themselves.
fn join(pieces: &[Value]) -> Option<blake3::Hash> {
    match pieces {
        [Value::Whole(hash)] => Some(*hash),
        _ => {
            let (left, right) = halves(pieces)?;
            Some(merge_subtrees_root(
                &subtree(left)?,
                &subtree(right)?,
                Mode::Hash,
            ))
        }
    }
}

fn subtree(pieces: &[Value]) -> Option<ChainingValue> {
    match pieces {
        [Value::Subtree(value)] => Some(*value),
        _ => {
            let (left, right) = halves(pieces)?;
            Some(merge_subtrees_non_root(
                &subtree(left)?,
                &subtree(right)?,
                Mode::Hash,
            ))
        }
    }
}

fn halves(pieces: &[Value]) -> Option<(&[Value], &[Value])> {
    if pieces.len() < 2 {
        return None;
    }
    Some(pieces.split_at(pieces.len().next_power_of_two() / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_as_in_one_piece() {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..PIECE * 5 + 77).map(|n| (n * 31 % 251) as u8).collect();
        let piece = PIECE as usize;
        let mut paths = Vec::new();
        let sizes = [
            0,
            1,
            1024,
            1025,
            piece - 1,
            piece,
            piece + 1,
            2 * piece,
            3 * piece,
            5 * piece + 77,
        ];
        for size in sizes {
            let path = dir.path().join(size.to_string());
            std::fs::write(&path, &content[..size]).unwrap();
            paths.push(path);
        }
        let done = std::sync::atomic::AtomicU64::new(0);
        let hashes = hash_files(&paths, Some(&mut Duration::default()), &|n| {
            done.fetch_add(n, Ordering::Relaxed);
        })
        .unwrap();
        for (size, found) in sizes.iter().zip(&hashes) {
            assert_eq!(
                *found,
                (*size as u64, blake3::hash(&content[..*size])),
                "{size}"
            );
        }
        assert_eq!(done.into_inner(), sizes.iter().sum::<usize>() as u64);
    }

    #[test]
    fn more_files_than_a_group_and_one_missing() {
        let dir = tempfile::tempdir().unwrap();
        let mut paths: Vec<_> = (0..150).map(|n| dir.path().join(n.to_string())).collect();
        for path in &paths {
            std::fs::write(path, path.as_os_str().as_encoded_bytes()).unwrap();
        }
        let hashes = hash_files(&paths, None, &|_| ()).unwrap();
        for (path, (_, hash)) in paths.iter().zip(hashes) {
            assert_eq!(hash, blake3::hash(path.as_os_str().as_encoded_bytes()));
        }
        paths[99] = dir.path().join("none");
        assert_eq!(hash_files(&paths, None, &|_| ()).unwrap_err().0, 99);
    }
}
