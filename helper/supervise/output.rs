//! The files that an application's standard output and error go to, over the end of a run.
//!
//! Two things would spoil them. Slurm empties a job's files when it starts the next run, unless it was
//! told to append (`--open-mode`, `JobFileAppend`). And what was written between a checkpoint and a
//! loss that nobody announced is written again by the restarted application.
//!
//! Contract: only regular files count; what a step writes through srun cannot be followed. In a job
//! [`Output::keep`] copies into `output/` of the computation's place what has come since the last
//! time, and [`Output::restore`], first thing in the next run of the same job, makes a file that was
//! emptied what it was. [`Output::ends`] says how far the files are, which is part of a generation;
//! before a restart [`Output::cut_back`] takes away what came after that, except for lines of Slurm
//! and of this program. It never cuts a file to which another process writes, nor one that does not
//! hold at that place what it held; what it cuts is kept in `output/`. A job is never worse off for
//! it: what cannot be done is told, and the file stays as it is.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::OutputMode;
use crate::slurm::Job;
use crate::store::{Cell, StreamEnd, escape};
use crate::streams::is_not_its;
use crate::writers::others;

/// The most that is kept of one stream, in bytes. Longer output belongs into a file of the
/// application's own, or the job appends.
const MOST: u64 = 1 << 30;

/// How much at the end of what is known of a file has to be there still for it to be the same, in
/// bytes.
const TAIL: u64 = 4096;

/// How much of a new run's own beginning is put behind what is restored before it; a longer one is
/// left where it is, in bytes.
const HEAD: u64 = 1 << 20;

/// What is kept.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    /// None outside of Slurm.
    job: Option<u32>,
    run: u32,
    /// For each stream, 1 and 2, how many bytes of its file are kept.
    streams: Vec<(i32, u64)>,
    /// Where the files were when an application was last started, from which generation (0: from
    /// none), or was stopped: they are as far then as that generation knows, and hold more lines
    /// that are not the application's.
    #[serde(default)]
    begun: Option<Begun>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Begun {
    generation: u64,
    ends: Vec<StreamEnd>,
}

/// A file, open to be read: Slurm opens it for writing only.
struct Stream {
    number: i32,
    file: File,
    path: PathBuf,
}

impl Stream {
    fn of(number: i32) -> Option<Stream> {
        let link = format!("/proc/self/fd/{number}");
        let file = File::open(&link).ok()?;
        let path = fs::read_link(&link).ok()?;
        file.metadata()
            .ok()?
            .is_file()
            .then_some(Stream { number, file, path })
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// What the last bytes before `end` are.
    fn tail(&self, end: u64) -> io::Result<String> {
        let mut tail = Vec::new();
        copy_range(&self.file, end.saturating_sub(TAIL), end, &mut tail)?;
        Ok(blake3::hash(&tail).to_hex().to_string())
    }

    fn end(&self) -> io::Result<StreamEnd> {
        let size = self.len()?;
        Ok(StreamEnd {
            stream: self.number,
            path: escape(self.path.as_os_str()),
            size,
            tail: self.tail(size)?,
        })
    }

    /// Replaces what is behind `from`. Everybody else appends.
    fn replace(
        &self,
        from: u64,
        by: &mut dyn Iterator<Item = io::Result<Vec<u8>>>,
    ) -> io::Result<()> {
        let fd = self.descriptor();
        nix::unistd::ftruncate(fd, i64::try_from(from).map_err(io::Error::other)?)?;
        nix::unistd::lseek(fd, 0, nix::unistd::Whence::SeekEnd)?;
        for bytes in by {
            write_all(fd, &bytes?)?;
        }
        Ok(())
    }

    fn descriptor(&self) -> BorrowedFd<'static> {
        // The process's own streams, which are never closed.
        static STREAMS: std::sync::LazyLock<(io::Stdout, io::Stderr)> =
            std::sync::LazyLock::new(|| (io::stdout(), io::stderr()));
        match self.number {
            1 => STREAMS.0.as_fd(),
            _ => STREAMS.1.as_fd(),
        }
    }
}

/// The output files of a computation.
pub struct Output {
    dir: PathBuf,
    /// Job and run; outside of Slurm nothing is restored: whoever empties a file there means it.
    run: Option<(u32, u32)>,
    exact: bool,
    /// Each file once.
    streams: Vec<Stream>,
    /// How much of each stream's file this run wrote before it was restored.
    heads: std::sync::Mutex<Vec<(i32, u64)>>,
}

impl Output {
    /// None where no output goes to a file, or that of several `ranks` does: then each writes its own
    /// or all write the same, and they are not held at one place in it.
    pub fn of(job: Option<&Job>, cell: &Cell, ranks: u32, mode: OutputMode) -> Option<Output> {
        let mut streams: Vec<Stream> = Vec::new();
        let mut seen = Vec::new();
        for stream in [1, 2].into_iter().filter_map(Stream::of) {
            let Ok(meta) = stream.file.metadata() else {
                continue;
            };
            if !seen.contains(&(meta.dev(), meta.ino())) {
                seen.push((meta.dev(), meta.ino()));
                streams.push(stream);
            }
        }
        (ranks == 1 && !streams.is_empty()).then(|| Output {
            dir: cell.dir().join("output"),
            run: job.map(|job| (job.id, job.run)),
            exact: mode == OutputMode::Exact,
            streams,
            heads: std::sync::Mutex::default(),
        })
    }

    /// How far the files are now.
    pub fn ends(&self) -> Vec<StreamEnd> {
        let ends = self.streams.iter().map(Stream::end);
        ends.filter_map(|end| {
            end.inspect_err(|why| log::debug!("where the output is cannot be seen: {why}"))
                .ok()
        })
        .collect()
    }

    /// Keeps what has been written since the last time.
    pub fn keep(&self) {
        if self.run.is_some()
            && let Err(why) = self.try_keep()
        {
            log::warn!("the job's output is not kept for its next run: {why}");
        }
    }

    /// The application was stopped at `generation`, and nothing of it comes any more.
    pub fn stopped(&self, generation: u64) {
        self.note_begun(generation);
    }

    fn note_begun(&self, generation: u64) {
        let record = Record {
            begun: Some(Begun {
                generation,
                ends: self.ends(),
            }),
            ..self.own_record()
        };
        if let Err(why) = self.private_dir().and_then(|()| self.write(&record)) {
            log::warn!("{}: {why}", self.dir.display());
        }
    }

    fn private_dir(&self) -> io::Result<()> {
        match fs::DirBuilder::new().mode(0o700).create(&self.dir) {
            Err(why) if why.kind() != io::ErrorKind::AlreadyExists => Err(why),
            _ => Ok(()),
        }
    }

    fn try_keep(&self) -> io::Result<()> {
        self.private_dir()?;
        let before = self.own_record();
        let mut streams = Vec::new();
        for Stream { number, file, .. } in &self.streams {
            let size = file.metadata()?.len();
            if size > MOST {
                log::warn!(
                    "the job's output is longer than {MOST} bytes and not kept: use \
                     --open-mode=append"
                );
                continue;
            }
            let kept = kept(&before, *number).filter(|kept| *kept <= size);
            let kept = kept.unwrap_or(0);
            let mut copy = create(&self.copy(*number))?;
            copy.set_len(kept)?;
            copy.seek(SeekFrom::End(0))?;
            copy_range(file, kept, size, &mut copy)?;
            copy.sync_all()?;
            streams.push((*number, size));
        }
        self.write(&Record { streams, ..before })
    }

    /// What is recorded of this job, as of this run.
    fn own_record(&self) -> Record {
        let (job, run) = self.run.unzip();
        let record = self.record().filter(|record| record.job == job);
        Record {
            job,
            run: run.unwrap_or(0),
            ..record.unwrap_or_default()
        }
    }

    /// Puts back what an earlier run of this job wrote, if Slurm has emptied the files.
    pub fn restore(&self) {
        let Some((job, run)) = self.run else { return };
        let Some(mut record) = self.record() else {
            return;
        };
        if record.job != Some(job) || record.run >= run {
            return;
        }
        record.streams.retain(|(number, kept)| {
            let Some(stream) = self.stream(*number) else {
                return false;
            };
            // Whether what is kept is at the file's beginning now: else all is kept anew.
            self.put_back(stream, *kept).unwrap_or_else(|why| {
                log::warn!("what the job wrote in its earlier runs cannot be put back: {why}");
                false
            })
        });
        let record = Record { run, ..record };
        if let Err(why) = self.write(&record) {
            log::warn!("{}: {why}", self.dir.display());
        }
    }

    fn put_back(&self, stream: &Stream, kept: u64) -> io::Result<bool> {
        let copy = open(&self.copy(stream.number))?;
        let size = stream.len()?;
        if size >= kept && same_tail(&copy, &stream.file, kept)? {
            return Ok(true);
        }
        let old = (0..kept.div_ceil(CHUNK)).map(|number| {
            let from = number * CHUNK;
            let mut bytes = Vec::new();
            copy_range(&copy, from, kept.min(from + CHUNK), &mut bytes)?;
            Ok(bytes)
        });
        // What this run has said so far comes behind it, where nobody writes at this moment.
        if size > HEAD || !others(&stream.file, &[]).is_empty() {
            stream.replace(size, &mut old.into_iter())?;
            return Ok(false);
        }
        let mut head = Vec::new();
        copy_range(&stream.file, 0, size, &mut head)?;
        stream.replace(0, &mut old.chain([Ok(head)]))?;
        let mut heads = self.heads.lock().unwrap_or_else(|bad| bad.into_inner());
        heads.push((stream.number, size));
        Ok(true)
    }

    /// Makes the files what they were at `generation` (its number, and where it says that they
    /// were; 0 and nothing: at the first start), from which the application begins now.
    pub fn cut_back(&self, generation: u64, ends: &[StreamEnd]) {
        let begun = self.record().and_then(|record| {
            let same_job = record.job == self.run.map(|(job, _)| job);
            // What was begun from nothing outside of a job may be anybody's.
            let known = generation > 0 || self.run.is_some();
            let begun = record.begun.filter(|_| same_job && known)?;
            (begun.generation == generation).then_some(begun.ends)
        });
        let mut heads =
            std::mem::take(&mut *self.heads.lock().unwrap_or_else(|bad| bad.into_inner()));
        for end in begun.as_deref().unwrap_or(ends) {
            let Some(stream) = self.stream(end.stream).filter(|_| self.exact) else {
                continue;
            };
            let head = heads.iter().position(|(number, _)| *number == end.stream);
            let head = head.map_or(0, |at| heads.swap_remove(at).1);
            if let Err(why) = self.cut(stream, end, generation, head) {
                log::warn!("{}: {why}", stream.path.display());
            }
        }
        self.note_begun(generation);
    }

    fn cut(&self, stream: &Stream, end: &StreamEnd, generation: u64, head: u64) -> io::Result<()> {
        let size = stream.len()?;
        let shown = stream.path.display();
        if end.path != escape(stream.path.as_os_str())
            || size <= end.size
            || stream.tail(end.size)? != end.tail
        {
            return Ok(());
        }
        let of_application = size - head.min(size - end.size);
        if size - end.size > MOST {
            log::warn!(
                "more than {MOST} bytes were written to {shown} since generation {generation}: they \
                 stay, and are written again"
            );
            return Ok(());
        }
        let mut tail = Vec::new();
        copy_range(&stream.file, end.size, of_application, &mut tail)?;
        let not_its: Vec<u8> = tail
            .split_inclusive(|byte| *byte == b'\n')
            .filter(|line| is_not_its(line))
            .flatten()
            .copied()
            .collect();
        if not_its.len() == tail.len() {
            return Ok(());
        }
        let others = others(&stream.file, &[]);
        if !others.is_empty() {
            log::warn!(
                "what was written to {shown} since the saved state is not cut off, and is there \
                 twice: {} writes to it as well",
                others.join(", ")
            );
            return Ok(());
        }
        let mut new = Vec::new();
        copy_range(&stream.file, of_application, size, &mut new)?;
        self.private_dir()?;
        let kept = self.dir.join(format!("cut-{}", stream.number));
        let mut copy = create(&kept)?;
        copy.set_len(0)?;
        copy.write_all(&tail)?;
        copy.sync_all()?;
        let bytes = tail.len() - not_its.len();
        stream.replace(end.size, &mut [Ok(not_its), Ok(new)].into_iter())?;
        log::info!(
            "{bytes} bytes that were written to {shown} after the saved state are cut off, since they \
             are written again; they are in {}",
            kept.display()
        );
        Ok(())
    }

    /// The application, or the script, has ended for good, and there is no next run. But Slurm 24.05
    /// and 24.11 start a job once more that was pre-empted with a GraceTime, in this run or an earlier
    /// one, although it has ended by itself since (GRACE_PREEMPT of slurmctld, which outlives a requeue
    /// and is not shown; see [`crate::slurm::JobView::retried`]): what it wrote is needed then.
    pub fn finished(&self, job: Option<&Job>) {
        let again = job.is_some_and(|job| {
            job.run > 0
                || job
                    .view()
                    .map_or(true, |view| view.retried || view.preempt_time.is_some())
        });
        if again {
            self.keep();
        } else {
            self.forget();
        }
    }

    /// Forgets what is kept.
    fn forget(&self) {
        if let Err(why) = fs::remove_dir_all(&self.dir)
            && why.kind() != io::ErrorKind::NotFound
        {
            log::warn!("cannot remove {}: {why}", self.dir.display());
        }
    }

    fn stream(&self, number: i32) -> Option<&Stream> {
        self.streams.iter().find(|stream| stream.number == number)
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

const CHUNK: u64 = 1 << 20;

fn kept(record: &Record, stream: i32) -> Option<u64> {
    let mut all = record.streams.iter();
    all.find_map(|(number, kept)| (*number == stream).then_some(*kept))
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

/// Whether the last bytes before `end` are the same in both files.
fn same_tail(one: &File, other: &File, end: u64) -> io::Result<bool> {
    let tail = |file| {
        let mut tail = Vec::new();
        copy_range(file, end.saturating_sub(TAIL), end, &mut tail).map(|()| tail)
    };
    Ok(tail(one)? == tail(other)?)
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

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match nix::unistd::write(fd, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(nix::errno::Errno::EINTR) => {}
            Err(why) => return Err(why.into()),
        }
    }
    Ok(())
}
