//! The standard streams of a stage, over a requeue of its script.
//!
//! A requeued job runs its script from the first line: pipes are new, files are emptied by `>`,
//! whoever reads a pipe begins anew. So what a stage has read and written belongs to its saved
//! state. Streams that are the job's own, a terminal or a device are left alone (the job's output
//! is put back by `supervise`); the others:
//!
//! | stream | what is done |
//! |---|---|
//! | a pipe that is read | [`Input`]: a later run skips what was read |
//! | a file that is read | a later run goes on at the same place in it |
//! | a pipe or file that is written | [`Output`]: recorded; a later run writes it first |
//!
//! Contract: the application gets exactly the rest of its input, and its readers all of its output
//! once. Where that cannot be (too much to record, other input than before, output while a
//! checkpoint was taken that it did not end with) the stage begins anew and says why; it never goes
//! on with something wrong. What belongs to generation N is in `streams/N.json` of the cell, what
//! belongs to the end in `streams/completed.json`.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

use nix::sys::stat::{FileStat, SFlag, fstat};
use serde::{Deserialize, Serialize};

use super::input::{Input, Read};
use super::output::{Output, Written};
use crate::store::disk;

const COMPLETED: &str = "completed.json";

/// Largest note that is read back, in bytes.
const CAP: u64 = 1 << 16;

/// How far the streams were.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// Whether this is where they were at the saved state, and not only at about that time.
    exact: bool,
    read: Option<Read>,
    /// How far a file was read, from where it was at first, in bytes.
    advanced: Option<i64>,
    written: Vec<Written>,
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
    input: In,
    outputs: Vec<Output>,
    /// Where they were when the checkpoint that is under way began.
    before: Mutex<Option<Note>>,
}

/// Why an earlier state of the streams cannot be used.
pub type Why = String;

impl Streams {
    /// Takes this process's streams over; records go into `dir`, which is this stage's alone.
    /// `own` are device and inode of the job's own files. To be called before anything is started.
    pub fn take(dir: PathBuf, own: &[(u64, u64)]) -> io::Result<Streams> {
        disk::private_dir(&dir, false).map_err(io::Error::other)?;
        let input = match kind(&fstat(io::stdin())?) {
            SFlag::S_IFREG => {
                let mut file = File::from(io::stdin().as_fd().try_clone_to_owned()?);
                let at = file.stream_position()?;
                In::File(file, at)
            }
            SFlag::S_IFIFO | SFlag::S_IFSOCK => {
                let from = io::stdin().as_fd().try_clone_to_owned()?;
                let (input, read) = Input::new(from)?;
                nix::unistd::dup2_stdin(&read)?;
                In::Pipe(input)
            }
            _ => In::Plain,
        };
        let carried = |about: &FileStat| {
            matches!(
                kind(about),
                SFlag::S_IFREG | SFlag::S_IFIFO | SFlag::S_IFSOCK
            ) && !own.contains(&(about.st_dev, about.st_ino))
        };
        let (one, two) = (fstat(io::stdout())?, fstat(io::stderr())?);
        let same = (one.st_dev, one.st_ino) == (two.st_dev, two.st_ino);
        let mut outputs = Vec::new();
        let mut add = |streams: Vec<i32>, to: OwnedFd| -> io::Result<OwnedFd> {
            let record = dir.join(format!("{}.record", streams[0]));
            let (output, write) = Output::new(streams, to, &record)?;
            outputs.push(output);
            Ok(write)
        };
        if carried(&one) {
            let streams = if same { vec![1, 2] } else { vec![1] };
            let write = add(streams, io::stdout().as_fd().try_clone_to_owned()?)?;
            nix::unistd::dup2_stdout(&write)?;
            if same {
                nix::unistd::dup2_stderr(&write)?;
            }
        }
        if carried(&two) && !same {
            let write = add(vec![2], io::stderr().as_fd().try_clone_to_owned()?)?;
            nix::unistd::dup2_stderr(&write)?;
        }
        Ok(Streams {
            dir,
            input,
            outputs,
            before: Mutex::new(None),
        })
    }

    /// Whether the streams can go on from generation `generation`, or why not. Reads what the
    /// application has read by then; `told` ends the wait for it.
    pub fn can_go_on(&self, generation: u64, told: &AtomicBool) -> io::Result<Result<(), Why>> {
        match self.note(&name(generation))? {
            None => Ok(Err("nothing is known of its pipes".into())),
            Some(note) => self.fits(&note, told),
        }
    }

    /// Whether anything was noted of generation `generation`.
    pub fn knows(&self, generation: u64) -> bool {
        self.dir.join(name(generation)).exists()
    }

    fn fits(&self, note: &Note, told: &AtomicBool) -> io::Result<Result<(), Why>> {
        if !note.exact {
            return Ok(Err(
                "it wrote while it was saved, and nobody knows how much of that belongs to the saved \
                 state"
                    .into(),
            ));
        }
        if note.written.len() != self.outputs.len() {
            return Ok(Err("it writes to other streams now".into()));
        }
        for (output, written) in self.outputs.iter().zip(&note.written) {
            if !written.recorded {
                return Ok(Err(format!(
                    "it wrote more than {} GiB into a pipe or file, which is not recorded",
                    super::output::MOST >> 30
                )));
            }
            if !output.has(written)? {
                return Ok(Err("it writes to other streams now".into()));
            }
        }
        match (&self.input, &note.read, note.advanced) {
            (In::Plain, None, None) | (In::File(..), None, Some(_)) => Ok(Ok(())),
            (In::Pipe(input), Some(read), None) => Ok(match input.read_ahead(read, told)? {
                true => Ok(()),
                false => Err("what it reads is not what it read before".into()),
            }),
            _ => Ok(Err("its standard input is another one".into())),
        }
    }

    /// Brings the streams where they were at generation `generation`, or to their beginning, and
    /// begins to carry.
    pub fn start(&self, generation: Option<u64>) -> io::Result<()> {
        let note = match generation {
            None => {
                for file in disk::names_in(&self.dir).map_err(io::Error::other)? {
                    if Path::new(&file)
                        .extension()
                        .is_some_and(|end| end == "json")
                    {
                        disk::remove(&self.dir.join(file)).map_err(io::Error::other)?;
                    }
                }
                None
            }
            Some(generation) => {
                let note = self.note(&name(generation))?;
                let unknown = || io::Error::other("nothing is known of its pipes");
                Some(note.filter(|note| note.exact).ok_or_else(unknown)?)
            }
        };
        self.start_at(note.as_ref())
    }

    fn start_at(&self, note: Option<&Note>) -> io::Result<()> {
        match &self.input {
            In::Plain => {}
            In::Pipe(input) => {
                let read = note.and_then(|note| note.read.as_ref());
                input.start_at(read.map_or(0, |read| read.bytes))?;
            }
            In::File(file, began) => {
                let advanced = note.and_then(|note| note.advanced).unwrap_or(0);
                let at = began.saturating_add_signed(advanced);
                (&*file).seek(SeekFrom::Start(at))?;
            }
        }
        for (number, output) in self.outputs.iter().enumerate() {
            output.start_after(note.and_then(|note| note.written.get(number)))?;
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
            if output.is_of(1) {
                nix::unistd::dup2_stdout(to)?;
            }
            if output.is_of(2) {
                nix::unistd::dup2_stderr(to)?;
            }
        }
        Ok(())
    }

    /// A checkpoint begins: nothing is read meanwhile.
    pub fn hold(&self) {
        let note = self.now(false);
        // Without it the generation will not be taken for exact.
        let note = note.inspect_err(|why| log::warn!("the stage's streams: {why}"));
        *self.before.lock().unwrap_or_else(PoisonError::into_inner) = note.ok();
    }

    /// The checkpoint is over, and the application goes on.
    pub fn release(&self) {
        if let In::Pipe(input) = &self.input {
            input.release();
        }
    }

    /// Notes where the streams were at a generation whose checkpoint began with [`Streams::hold`].
    /// `stopped` says that the application has ended at that state, and was waited for.
    pub fn saved(&self, generation: u64, stopped: bool) -> io::Result<()> {
        let now = self.now(stopped)?;
        let before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        let exact = stopped || before.as_ref() == Some(&now);
        for output in &self.outputs {
            output.sync()?;
        }
        self.write(&name(generation), &Note { exact, ..now })
    }

    /// The application has ended by itself: carries what is left and notes where the streams are.
    pub fn finish(&self) -> io::Result<()> {
        for output in &self.outputs {
            output.finish()?;
            output.sync()?;
        }
        let note = Note {
            exact: true,
            ..self.now(true)?
        };
        if let In::Pipe(input) = &self.input {
            input.finish();
        }
        self.write(COMPLETED, &note)
    }

    /// Does to the streams what the completed stage did: reads what it read, writes what it wrote.
    /// Or says why that cannot be; nothing has been written then.
    pub fn replay(&self) -> io::Result<Result<(), Why>> {
        let Some(note) = self.note(COMPLETED)? else {
            return Ok(Err("nothing is known of its pipes".into()));
        };
        if let Err(why) = self.fits(&note, &AtomicBool::new(false))? {
            return Ok(Err(why));
        }
        if let In::File(..) = &self.input {
            self.start_at(Some(&note))?;
        } else {
            for (output, written) in self.outputs.iter().zip(&note.written) {
                output.start_after(Some(written))?;
            }
        }
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
        })
    }

    fn note(&self, file: &str) -> io::Result<Option<Note>> {
        let path = self.dir.join(file);
        match disk::read_if_there(&path, CAP).map_err(io::Error::other)? {
            None => Ok(None),
            Some(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|why| io::Error::other(format!("{} is damaged: {why}", path.display()))),
        }
    }

    fn write(&self, file: &str, note: &Note) -> io::Result<()> {
        let text = serde_json::to_vec(note)?;
        disk::replace(&self.dir.join(file), &text).map_err(io::Error::other)
    }
}

fn kind(about: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(about.st_mode & libc::S_IFMT)
}

fn name(generation: u64) -> String {
    format!("{generation}.json")
}
