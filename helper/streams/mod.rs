//! The standard streams of a step or stage, over a requeue of its script.
//!
//! A requeued job runs its script from the first line: pipes are new, files are emptied by `>`, by srun
//! and by Slurm, whoever reads a pipe begins anew. So what an application has read and written belongs
//! to its saved state. Terminals, devices and what is not seen from here are left alone; the others:
//!
//! | stream | what is done |
//! |---|---|
//! | a pipe that is read | [`Input`]: a later run skips what was read |
//! | a file that is read | a later run goes on at the same place in it |
//! | a pipe or file that is written | [`Output`]: recorded; a later run writes what is missing first |
//!
//! Contract: the application gets exactly the rest of its input, and its readers all of its output
//! once. What belongs to generation N is in `streams/N.json` of the cell, what belongs to the end in
//! `streams/completed.json`, and `streams/files.json` says where the output is in files that are only
//! appended to. Where a state of the streams cannot be had (too much to record, other input than
//! before) a stage begins anew and says why; it never goes on with something wrong. A step does so for
//! its input alone: what it writes is for people, as a rule, and not worth its work.

mod aside;
mod far;
mod held;
mod input;
mod mend;
mod output;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IsTerminal, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::stat::{FileStat, SFlag, fstat};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use self::aside::keep;
pub use self::far::Srun;
pub use self::held::is_not_its;
pub use self::mend::{Part, mend};

use self::aside::Aside;
use self::far::Far;
use self::held::Segment;
use self::input::{Input, Read};
use self::output::{Output, Written};
use crate::store::disk;

/// Where in a cell the records are.
pub const DIRECTORY: &str = "streams";

const COMPLETED: &str = "completed.json";
const FILES: &str = "files.json";

/// Largest note that is read back, in bytes.
const CAP: u64 = 1 << 16;

/// Who has set up the streams of this process.
pub enum By<'a> {
    /// A script, for a stage of its. Of the job's `own` files device and inode.
    Script { own: &'a [(u64, u64)] },
    /// An srun, for a step; None where it does not run on this node.
    Srun {
        srun: Option<Srun>,
        /// Whether only this task writes and reads.
        alone: bool,
    },
}

/// How far the streams were.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// Whether this is where they were at the saved state, and not only at about that time.
    exact: bool,
    read: Option<Read>,
    /// How far a file was read, from where it was at first, in bytes.
    advanced: Option<i64>,
    written: Vec<Written>,
    /// Of one that has ended, where its output is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    files: Option<Files>,
}

/// Where the output of a run is in files that are only appended to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Files {
    job: u32,
    /// By the first of the streams that an output is of.
    segments: BTreeMap<i32, Segment>,
}

enum In {
    /// Nothing of ours.
    Plain,
    Pipe(Input),
    /// A file, and where in it the stage began.
    File(File, u64),
}

/// The streams of this process.
pub struct Streams {
    dir: PathBuf,
    job: u32,
    exact: bool,
    input: In,
    outputs: Vec<Output>,
    aside: Aside,
    /// Whether nobody here knows where the output ends.
    unseen: bool,
    /// Whether what was written has to be known exactly.
    strict: bool,
    /// Where they were when the application was held for the checkpoint that is under way.
    at_rest: Mutex<Option<Note>>,
}

/// Why an earlier state of the streams cannot be used.
pub type Why = String;

impl Streams {
    /// Takes this process's streams over, as far as anything has to be done about them; records go into
    /// `dir`, which is this computation's alone. Unless `exact`, files that are appended to are left as
    /// they are. To be called in `job` before anything is started.
    pub fn take(dir: PathBuf, job: u32, exact: bool, by: &By) -> io::Result<Streams> {
        disk::private_dir(&dir, false).map_err(io::Error::other)?;
        let typed = matches!(by, By::Srun { srun: Some(srun), .. } if srun.has_terminal());
        let input = match kind(&fstat(io::stdin())?) {
            SFlag::S_IFREG => {
                let mut file = File::from(io::stdin().as_fd().try_clone_to_owned()?);
                let at = file.stream_position()?;
                In::File(file, at)
            }
            SFlag::S_IFIFO | SFlag::S_IFSOCK if !typed => {
                let from = io::stdin().as_fd().try_clone_to_owned()?;
                let (input, read) = Input::new(from)?;
                nix::unistd::dup2_stdin(&read)?;
                In::Pipe(input)
            }
            _ => In::Plain,
        };
        let (one, two) = (by.far(1)?, by.far(2)?);
        let same = matches!((&one, &two), (Some(one), Some(two)) if one.id() == two.id());
        let mut outputs = Vec::new();
        let mut add = |streams: Vec<i32>, to: OwnedFd, far: Far| -> io::Result<OwnedFd> {
            let record = dir.join(format!("{}.record", streams[0]));
            let strict = by.is_strict(&far);
            let (output, write) = Output::new((streams, strict), to, far, &record)?;
            outputs.push(output);
            Ok(write)
        };
        if let Some(far) = one {
            let streams = if same { vec![1, 2] } else { vec![1] };
            let write = add(streams, io::stdout().as_fd().try_clone_to_owned()?, far)?;
            nix::unistd::dup2_stdout(&write)?;
            if same {
                nix::unistd::dup2_stderr(&write)?;
            }
        }
        if let Some(far) = two.filter(|_| !same) {
            let write = add(vec![2], io::stderr().as_fd().try_clone_to_owned()?, far)?;
            nix::unistd::dup2_stderr(&write)?;
        }
        Ok(Streams {
            dir,
            job,
            exact,
            input,
            outputs,
            aside: by.aside()?,
            unseen: job > 0 && matches!(by, By::Srun { srun: None, .. }) && is_pipe(1)?,
            strict: matches!(by, By::Script { .. }),
            at_rest: Mutex::default(),
        })
    }

    /// Whether they look after everything that is written; else files that are written directly are
    /// somebody else's.
    pub fn are_all(&self) -> bool {
        self.strict
    }

    /// Whether the streams can go on from generation `generation`, or why not. Reads what the
    /// application has read by then; `told` ends the wait for it.
    pub fn can_go_on(&self, generation: u64, told: &AtomicBool) -> io::Result<Result<(), Why>> {
        let Some(note) = self.read::<Note>(&name(generation))? else {
            return Ok(Err("nothing is known of its pipes".into()));
        };
        if self.strict
            && let Err(why) = self.has_written(&note)?
        {
            return Ok(Err(why));
        }
        match &note.read {
            // Nothing that comes now matters to it.
            Some(read) if read.ended && matches!(self.input, In::Pipe(_)) => Ok(Ok(())),
            _ => self.reads_the_same(&note, told),
        }
    }

    /// Whether anything was noted of generation `generation`.
    pub fn knows(&self, generation: u64) -> bool {
        self.dir.join(name(generation)).exists()
    }

    fn reads_the_same(&self, note: &Note, told: &AtomicBool) -> io::Result<Result<(), Why>> {
        match (&self.input, &note.read, note.advanced) {
            (In::Plain, None, None) | (In::File(..), None, Some(_)) => Ok(Ok(())),
            (In::Pipe(input), Some(read), None) => Ok(match input.read_ahead(read, told)? {
                true => Ok(()),
                false => Err("what it reads is not what it read before".into()),
            }),
            _ => Ok(Err("its standard input is another one".into())),
        }
    }

    /// Whether all that was written by then is recorded.
    fn has_written(&self, note: &Note) -> io::Result<Result<(), Why>> {
        if !note.exact {
            return Ok(Err(
                "nobody knows how much of what it wrote belongs to the saved state".into(),
            ));
        }
        for output in self.outputs.iter().filter(|output| output.is_strict()) {
            let written = note.written.iter();
            let mut written = written.filter(|written| written.streams == output.streams());
            let Some(written) = written.next() else {
                return Ok(Err("it writes to other streams now".into()));
            };
            if !written.recorded {
                return Ok(Err(format!(
                    "it wrote more than {} GiB into a pipe or file, which is not recorded",
                    output::MOST >> 30
                )));
            }
            if !output.has(written)? {
                return Ok(Err("it writes to other streams now".into()));
            }
        }
        Ok(Ok(()))
    }

    /// Brings the streams where they were at generation `generation`, or to their beginning, and
    /// begins to carry.
    pub fn start(&self, generation: Option<u64>) -> io::Result<()> {
        let note = match generation {
            None => {
                for file in disk::names_in(&self.dir).map_err(io::Error::other)? {
                    let note = Path::new(&file)
                        .extension()
                        .is_some_and(|end| end == "json");
                    if note && file != FILES {
                        disk::remove(&self.dir.join(file)).map_err(io::Error::other)?;
                    }
                }
                None
            }
            Some(generation) => {
                let note = self.read::<Note>(&name(generation))?;
                let unknown = || io::Error::other("nothing is known of its pipes");
                let known = note.filter(|note| note.exact || !self.strict);
                Some(known.ok_or_else(unknown)?)
            }
        };
        self.start_input(note.as_ref())?;
        let files = self.read(FILES)?.unwrap_or_default();
        self.start_outputs(note.as_ref(), files)
    }

    fn start_input(&self, note: Option<&Note>) -> io::Result<()> {
        match &self.input {
            In::Plain => {}
            In::Pipe(input) => input.start_at(note.and_then(|note| note.read.as_ref()))?,
            In::File(file, began) => {
                let advanced = note.and_then(|note| note.advanced).unwrap_or(0);
                let at = began.saturating_add_signed(advanced);
                (&*file).seek(SeekFrom::Start(at))?;
            }
        }
        Ok(())
    }

    /// Has everything go first that was written by then, as far as it is not in one of `files`.
    fn start_outputs(&self, note: Option<&Note>, files: Files) -> io::Result<()> {
        self.aside.go_first(&self.dir, self.job, note.is_none())?;
        let here = self.exact && files.job == self.job;
        let mut now = Files {
            job: self.job,
            segments: BTreeMap::new(),
        };
        for output in &self.outputs {
            let written = note.map_or([].as_slice(), |note| &note.written);
            let written = written.iter().find(|one| one.streams == output.streams());
            let known = match written {
                Some(written) if output.has(written)? => Some(written),
                Some(written) => {
                    log::warn!(
                        "what it had written before is not recorded: its {} begins with what it \
                         writes now",
                        written.shown()
                    );
                    None
                }
                None => None,
            };
            let stream = output.streams()[0];
            // Of what is not recorded nobody can tell where in a file it ends: nothing is cut off.
            let unknown = written.is_some() && known.is_none();
            let segment = files.segments.get(&stream);
            let segment = segment.filter(|_| self.exact && !unknown);
            // What an earlier job wrote is in the files of that job, as a rule.
            if let Some(segment) = output.start_after(known, segment, here && !unknown)? {
                now.segments.insert(stream, segment);
            }
        }
        if !now.segments.is_empty() {
            self.write(FILES, &now)?;
        }
        Ok(())
    }

    /// Makes the script's streams this process's again, before anything was carried.
    pub fn give_back(&self) -> io::Result<()> {
        match &self.input {
            In::Pipe(input) => nix::unistd::dup2_stdin(input.script()?)?,
            In::Plain | In::File(..) => {}
        }
        for output in &self.outputs {
            let to = output.script()?;
            if output.streams().contains(&1) {
                nix::unistd::dup2_stdout(to)?;
            }
            if output.streams().contains(&2) {
                nix::unistd::dup2_stderr(to)?;
            }
        }
        Ok(())
    }

    /// A checkpoint begins: nothing is read meanwhile, and nobody waits for a reader.
    pub fn hold(&self) {
        *self.lock_rest() = None;
        if let In::Pipe(input) = &self.input
            && let Err(why) = input.hold()
        {
            // It is found out again once the application is at rest.
            log::debug!("standard input is not held: {why}");
        }
        self.outputs.iter().for_each(Output::hold);
    }

    /// The application is held at the state that is saved: notes where the streams are.
    pub fn rest(&self) {
        let note = self.now(true).map(|note| Note {
            exact: true,
            ..note
        });
        // Without it the generation will not be taken for exact.
        let note = note.inspect_err(|why| log::warn!("the streams: {why}"));
        *self.lock_rest() = note.ok();
    }

    /// The checkpoint is over, and the application goes on.
    pub fn release(&self) {
        if let In::Pipe(input) = &self.input {
            input.release();
        }
        self.outputs.iter().for_each(Output::release);
    }

    /// Notes where the streams were at a generation whose checkpoint began with [`Streams::hold`].
    pub fn saved(&self, generation: u64) -> io::Result<()> {
        let note = match self.lock_rest().take() {
            Some(note) => note,
            None => self.now(false)?,
        };
        for output in &self.outputs {
            output.sync()?;
        }
        self.write(&name(generation), &note)
    }

    fn lock_rest(&self) -> MutexGuard<'_, Option<Note>> {
        self.at_rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The application has ended by itself: carries what is left and notes where the streams are.
    pub fn finish(&self) -> io::Result<()> {
        for output in &self.outputs {
            output.finish()?;
            output.sync()?;
        }
        let note = Note {
            exact: true,
            files: self.read(FILES)?,
            ..self.now(true)?
        };
        if let In::Pipe(input) = &self.input {
            input.finish();
        }
        self.write(COMPLETED, &note)
    }

    /// The application's end is told: what comes next under this name is another computation.
    pub fn completed(&self) -> io::Result<()> {
        disk::remove(&self.dir.join(FILES)).map_err(io::Error::other)
    }

    /// Waits until everything that was written is forwarded, or for `limit`: its reader may be gone, or
    /// not read.
    pub fn flush(&self, limit: Duration) {
        let end = Instant::now() + limit;
        for output in &self.outputs {
            if !output.flush(end) {
                log::debug!("not all of the output was forwarded within {limit:?}");
            }
        }
    }

    /// Does to the streams what the completed stage did: reads what it read, writes what it wrote.
    /// Or says why that cannot be; nothing has been written then.
    pub fn replay(&self) -> io::Result<Result<(), Why>> {
        let Some(note) = self.read::<Note>(COMPLETED)? else {
            return Ok(Err("nothing is known of its pipes".into()));
        };
        // A step that has ended is not run again, whatever it would read.
        if self.strict {
            if let Err(why) = self.has_written(&note)? {
                return Ok(Err(why));
            }
            if let Err(why) = self.reads_the_same(&note, &AtomicBool::new(false))? {
                return Ok(Err(why));
            }
        }
        if let Some(why) = self.aside.is_missing(&self.dir, self.job)? {
            return Ok(Err(why));
        }
        if self.unseen {
            log::warn!(
                "its srun runs on another node: if its output goes to `> file` or a pipe, it is missing \
                 there now. Use `>> file`, or completed_stages: rerun in the configuration"
            );
        }
        if let In::File(..) = &self.input {
            self.start_input(Some(&note))?;
        }
        self.start_outputs(Some(&note), note.files.clone().unwrap_or_default())?;
        self.completed()?;
        for output in &self.outputs {
            output.finish()?;
        }
        Ok(Ok(()))
    }

    /// Where the streams are now; input is held still.
    fn now(&self, ended: bool) -> io::Result<Note> {
        let written = self.outputs.iter().map(|output| output.written(ended));
        let written = written.collect::<io::Result<_>>()?;
        let (mut read, mut advanced) = (None, None);
        match &self.input {
            In::Plain => {}
            In::Pipe(input) => read = Some(input.hold()?),
            In::File(file, began) => {
                let at = (&*file).stream_position()?;
                advanced = Some(at.cast_signed() - began.cast_signed());
            }
        }
        Ok(Note {
            exact: false,
            read,
            advanced,
            written,
            files: None,
        })
    }

    fn read<T: DeserializeOwned>(&self, file: &str) -> io::Result<Option<T>> {
        read(&self.dir.join(file))
    }

    fn write(&self, file: &str, note: &impl Serialize) -> io::Result<()> {
        write(&self.dir.join(file), note)
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match disk::read_if_there(path, CAP).map_err(io::Error::other)? {
        None => Ok(None),
        Some(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|why| io::Error::other(format!("{} is damaged: {why}", path.display()))),
    }
}

fn write(path: &Path, note: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(note)?;
    disk::replace(path, &text).map_err(io::Error::other)
}

impl By<'_> {
    /// Whether a stage has to begin anew if it is not known what it wrote there.
    fn is_strict(&self, far: &Far) -> bool {
        matches!(self, By::Script { own } if !own.contains(&far.id()))
    }

    /// What of this process's output is not carried and yet goes where every run begins anew.
    fn aside(&self) -> io::Result<Aside> {
        let mut aside = Aside::default();
        let By::Srun {
            srun: Some(srun),
            alone,
        } = self
        else {
            return Ok(aside);
        };
        // The srun of several components has a file of each, and nothing tells which is whose.
        if !alone && std::env::var_os("SLURM_HET_SIZE").is_some() {
            return Ok(aside);
        }
        let mut seen = None;
        for number in [1, 2] {
            let terminal = match number {
                1 => io::stdout().is_terminal(),
                _ => io::stderr().is_terminal(),
            };
            // A terminal is one of --unbuffered or --pty.
            let by_srun = terminal || !alone && is_pipe(number)?;
            // The job's own output is put back by others.
            if by_srun
                && let Some(far) = srun.far(number)
                && (matches!(far, Far::Anew { .. }) || srun.has_opened(number))
                && seen.replace(far.id()) != Some(far.id())
            {
                let appended = matches!(far, Far::File(_));
                aside.add(number, srun.fd(number), appended);
            }
        }
        Ok(aside)
    }

    /// What stream `number` of this process ends in, if it is to be carried there.
    fn far(&self, number: i32) -> io::Result<Option<Far>> {
        let own = format!("/proc/self/fd/{number}");
        match self {
            By::Script { own: files } => {
                let far = Far::of(Path::new(&own), Vec::new());
                // What the job was given to write to is not made anew by the script.
                Ok(far.filter(|far| matches!(far, Far::File(_)) || !files.contains(&far.id())))
            }
            // What slurmstepd or somebody else does not carry is no business of srun's.
            By::Srun {
                srun: Some(srun),
                alone: true,
            } => match Far::of(Path::new(&own), Vec::new()) {
                Some(Far::Anew { .. }) if is_pipe(number)? => Ok(srun.far(number)),
                _ => Ok(None),
            },
            By::Srun { .. } => Ok(None),
        }
    }
}

/// Whether stream `number` of this process is a pipe.
fn is_pipe(number: i32) -> io::Result<bool> {
    let about = match number {
        1 => fstat(io::stdout())?,
        _ => fstat(io::stderr())?,
    };
    Ok(matches!(kind(&about), SFlag::S_IFIFO | SFlag::S_IFSOCK))
}

fn kind(about: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(about.st_mode & libc::S_IFMT)
}

fn name(generation: u64) -> String {
    format!("{generation}.json")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn what_is_not_recorded_stays_in_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let run = |generation: Option<u64>, text: &str| {
            let to = File::options().append(true).create(true).open(&path);
            let to = OwnedFd::from(to.unwrap());
            let fd = format!("/proc/self/fd/{}", to.as_raw_fd());
            let far = Far::of(Path::new(&fd), Vec::new()).unwrap();
            let record = dir.path().join("1.record");
            let (output, write) = Output::new((vec![1], false), to, far, &record).unwrap();
            let streams = Streams {
                dir: dir.path().into(),
                job: 7,
                exact: true,
                input: In::Plain,
                outputs: vec![output],
                aside: Aside::default(),
                unseen: false,
                strict: false,
                at_rest: Mutex::default(),
            };
            streams.start(generation).unwrap();
            File::from(write).write_all(text.as_bytes()).unwrap();
            streams.outputs[0].finish().unwrap();
            streams
        };
        let streams = run(None, "all that is recorded\n");
        let mut note = streams.now(true).unwrap();
        // As when the disk with the record is full.
        (note.exact, note.written[0].recorded) = (true, false);
        streams.write(&name(1), &note).unwrap();
        run(Some(1), "more\n");
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, "all that is recorded\nmore\n");
    }
}
