//! A job's output files over a requeue: Slurm empties them when it starts the next run, unless it
//! was told to append (`--open-mode`, `JobFileAppend`).
//!
//! Contract: of the batch step alone, whose streams are the job's files. [`Output::keep`] copies
//! into `NAME/output/` what has come since the last time; [`Output::restore`], first thing in the
//! next run of the same job, puts it back where a file has become shorter. A job is never worse off
//! for it: what cannot be kept is told and stays as it is.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::slurm::{Job, Step};
use crate::store::Cell;

/// The most that is kept of one stream, in bytes. Longer output belongs into a file of the
/// application's own, or the job appends.
const MOST: u64 = 1 << 30;

/// What is kept.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    job: u32,
    run: u32,
    /// For each stream, 1 and 2, how many bytes of its file are kept.
    streams: Vec<(i32, u64)>,
}

/// The output files of a batch step.
pub struct Output {
    dir: PathBuf,
    job: u32,
    run: u32,
    /// Stream and file, each file once.
    files: Vec<(i32, File)>,
}

impl Output {
    /// None for anything but a batch step whose output goes to files.
    pub fn of(job: Option<&Job>, name: &Cell) -> Option<Output> {
        let job = job.filter(|job| job.step == Step::Batch)?;
        let mut files: Vec<(i32, File)> = Vec::new();
        let mut seen = Vec::new();
        for stream in [1, 2] {
            // Opened anew, to be read: Slurm opens it for writing only.
            let Ok(file) = File::open(format!("/proc/self/fd/{stream}")) else {
                continue;
            };
            let Ok(meta) = file.metadata() else { continue };
            if meta.is_file() && !seen.contains(&(meta.dev(), meta.ino())) {
                seen.push((meta.dev(), meta.ino()));
                files.push((stream, file));
            }
        }
        (!files.is_empty()).then(|| Output {
            dir: name.dir().join("output"),
            job: job.id,
            run: job.run,
            files,
        })
    }

    /// Keeps what has been written since the last time.
    pub fn keep(&self) {
        if let Err(why) = self.try_keep() {
            log::warn!("the job's output is not kept for its next run: {why}");
        }
    }

    fn try_keep(&self) -> io::Result<()> {
        if let Err(why) = fs::DirBuilder::new().mode(0o700).create(&self.dir)
            && why.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(why);
        }
        let before = self.record().filter(|record| record.job == self.job);
        let mut record = Record {
            job: self.job,
            run: self.run,
            streams: Vec::new(),
        };
        for (stream, file) in &self.files {
            let size = file.metadata()?.len();
            if size > MOST {
                log::warn!(
                    "the job's output is longer than {MOST} bytes and not kept: use \
                     --open-mode=append"
                );
                continue;
            }
            let kept = before
                .iter()
                .flat_map(|record| &record.streams)
                .find_map(|(other, kept)| (other == stream).then_some(*kept))
                .filter(|kept| *kept <= size)
                .unwrap_or(0);
            let mut copy = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(self.copy(*stream))?;
            copy.set_len(kept)?;
            copy.seek(SeekFrom::End(0))?;
            copy_range(file, kept, size, &mut copy)?;
            copy.sync_all()?;
            record.streams.push((*stream, size));
        }
        self.write(&record)
    }

    /// Puts back what an earlier run of this job wrote, if Slurm has emptied the files.
    pub fn restore(&self) {
        let Some(record) = self.record() else { return };
        if record.job != self.job || record.run >= self.run {
            return;
        }
        for (stream, kept) in &record.streams {
            let Some((_, file)) = self.files.iter().find(|(other, _)| other == stream) else {
                continue;
            };
            let restored = file.metadata().and_then(|meta| match meta.len() < *kept {
                true => put_back(&self.copy(*stream), *kept, *stream),
                false => Ok(()),
            });
            if let Err(why) = restored {
                log::warn!("what the job wrote in its earlier runs cannot be put back: {why}");
            }
        }
        // The files may begin with something else now: the next time all is kept anew.
        let anew = Record {
            run: self.run,
            job: self.job,
            streams: Vec::new(),
        };
        if let Err(why) = self.write(&anew) {
            log::warn!("{}: {why}", self.dir.display());
        }
    }

    /// Forgets what is kept: there is no next run.
    pub fn forget(&self) {
        if let Err(why) = fs::remove_dir_all(&self.dir)
            && why.kind() != io::ErrorKind::NotFound
        {
            log::warn!("cannot remove {}: {why}", self.dir.display());
        }
    }

    fn copy(&self, stream: i32) -> PathBuf {
        self.dir.join(stream.to_string())
    }

    fn record(&self) -> Option<Record> {
        let mut text = Vec::new();
        let file = File::open(self.dir.join("record.json")).ok()?;
        file.take(1 << 16).read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }

    fn write(&self, record: &Record) -> io::Result<()> {
        let path = self.dir.join("record.json");
        let new = self.dir.join("record.json.new");
        fs::write(&new, serde_json::to_vec(record)?)?;
        fs::rename(new, path)
    }
}

/// Copies `from` up to `to` of `file`, not further, even if it grows meanwhile.
fn copy_range(file: &File, from: u64, to: u64, copy: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    let mut at = from;
    while at < to {
        let most = usize::try_from(to - at)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let got = file.read_at(&mut buffer[..most], at)?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        copy.write_all(&buffer[..got])?;
        at += got as u64;
    }
    Ok(())
}

fn put_back(copy: &Path, kept: u64, stream: i32) -> io::Result<()> {
    let copy = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(copy)?;
    match stream {
        1 => copy_range(&copy, 0, kept, &mut io::stdout()).and_then(|()| io::stdout().flush()),
        _ => copy_range(&copy, 0, kept, &mut io::stderr()),
    }
}
