//! The application's standard streams: pipes whose outer ends this process holds.
//!
//! CRIU can give a restored process another pipe in place of the one it had, so what the application
//! writes after a restart lands in the output of the job that restarted it. Threads carry the bytes:
//! they keep their order, their end and the back-pressure, and none is ever carried twice.
//!
//! Where standard output and standard error of the job are one file, the application gets one pipe
//! for both, so that their order stays as well.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};

use super::images;
use crate::pipes::{is_regular, pipe, ready, write_all};

/// The name of the record of streams in a rank's directory of a checkpoint.
const RECORD: &str = "streams.json";

/// Largest record that is read back, in bytes.
const RECORD_MAX: u64 = 4096;

/// The most that is put into the application's standard input at once: what a pipe that poll(2)
/// calls writable always takes whole.
const INPUT: usize = 4096;

/// How long somebody who reads the application's output is waited for.
const READER: Duration = Duration::from_secs(1);

/// What a checkpoint has to remember of the streams.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    /// The pipes' inode numbers as the saved processes have them: standard input, output, error.
    pub pipes: [u64; 3],
    /// How far standard input was read into its pipe, if it was a regular file.
    input: Option<u64>,
}

impl Record {
    /// Reads the record in a rank's directory.
    pub fn read(dir: &Path) -> Result<Record, String> {
        let path = dir.join(RECORD);
        let failed = |error: io::Error| format!("cannot read {}: {error}", path.display());
        let mut text = String::new();
        File::open(&path)
            .and_then(|file| file.take(RECORD_MAX).read_to_string(&mut text))
            .map_err(failed)?;
        serde_json::from_str(&text).map_err(|error| failed(error.into()))
    }

    /// Writes the record into a rank's directory.
    pub fn write(&self, dir: &Path) -> Result<(), String> {
        let path = dir.join(RECORD);
        let text = serde_json::to_vec(self).map_err(io::Error::from);
        text.and_then(|text| std::fs::write(&path, text))
            .map_err(|error| format!("cannot write {}: {error}", path.display()))
    }
}

/// The job's own streams.
#[derive(Debug)]
pub struct Job {
    pub input: OwnedFd,
    pub output: OwnedFd,
    pub error: OwnedFd,
}

impl Job {
    /// No input, and output that nobody sees.
    pub fn nowhere() -> io::Result<Job> {
        let null = || {
            File::options()
                .read(true)
                .write(true)
                .open("/dev/null")
                .map(OwnedFd::from)
        };
        Ok(Job {
            input: null()?,
            output: null()?,
            error: null()?,
        })
    }

    /// The streams of this process.
    pub fn of_this_process() -> io::Result<Job> {
        Ok(Job {
            input: io::stdin().as_fd().try_clone_to_owned()?,
            output: io::stdout().as_fd().try_clone_to_owned()?,
            error: io::stderr().as_fd().try_clone_to_owned()?,
        })
    }
}

/// The ends of the pipes that the application gets.
#[derive(Debug)]
pub struct Application {
    pub input: OwnedFd,
    pub output: OwnedFd,
    pub error: OwnedFd,
}

/// The pipes, not yet carried.
#[derive(Debug)]
pub struct Streams {
    job: Job,
    input: OwnedFd,
    output: OwnedFd,
    /// None where the output's pipe serves for both.
    error: Option<OwnedFd>,
    pipes: [u64; 3],
    /// The application's end of the input's pipe.
    input_read: OwnedFd,
}

/// The pipes while threads carry what is in them.
#[derive(Debug)]
pub struct Carried {
    pipes: [u64; 3],
    input: Arc<Mutex<Input>>,
    stop: Arc<EventFd>,
    /// The output pipes, while a thread carries them.
    outputs: Vec<Weak<Output>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// The job's standard input and the pipe it is carried into, if the former is a file.
    file: Option<(File, OwnedFd)>,
}

/// An output pipe and where it is carried to.
#[derive(Debug)]
struct Output {
    from: OwnedFd,
    to: OwnedFd,
    /// Held while something is on its way.
    busy: Mutex<()>,
}

/// How far standard input is.
#[derive(Debug)]
struct Input {
    /// Position in the job's standard input, if that is a regular file.
    position: Option<u64>,
}

fn inode(fd: &impl AsFd) -> io::Result<u64> {
    Ok(fstat(fd.as_fd())?.st_ino)
}

impl Streams {
    /// Makes pipes for the streams `job`. `saved` are those of the checkpoint that is restarted, and
    /// the directory it is in.
    pub fn new(
        job: Job,
        saved: Option<(&Record, &Path)>,
    ) -> Result<(Streams, Application), String> {
        let failed = |error: io::Error| format!("cannot make pipes for the streams: {error}");
        let one = match saved {
            Some((record, _)) => record.pipes[1] == record.pipes[2],
            None => {
                let (out, err) = (fstat(&job.output), fstat(&job.error));
                matches!((out, err), (Ok(o), Ok(e)) if (o.st_dev, o.st_ino) == (e.st_dev, e.st_ino))
            }
        };
        let (input_read, input) = pipe().map_err(failed)?;
        let (output, output_write) = pipe().map_err(failed)?;
        let (error, error_write) = if one {
            (None, output_write.try_clone().map_err(failed)?)
        } else {
            let (read, write) = pipe().map_err(failed)?;
            (Some(read), write)
        };
        // Ours is a description of its own: the application's end stays as it is.
        fcntl(&input, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|e| failed(e.into()))?;
        let pipes = [
            inode(&input).map_err(failed)?,
            inode(&output).map_err(failed)?,
            inode(error.as_ref().unwrap_or(&output)).map_err(failed)?,
        ];
        if let Some((record, dir)) = saved {
            resume_input(&job, &input, record, dir)?;
        }
        let application = Application {
            input: input_read.try_clone().map_err(failed)?,
            output: output_write,
            error: error_write,
        };
        Ok((
            Streams {
                job,
                input,
                output,
                error,
                pipes,
                input_read,
            },
            application,
        ))
    }

    /// What is in the output pipes now and was not carried: what the container's own programs said.
    /// Also the descriptors to wait at for more.
    pub fn said(&self, into: &mut Vec<u8>) -> io::Result<()> {
        for pipe in [Some(&self.output), self.error.as_ref()]
            .into_iter()
            .flatten()
        {
            loop {
                let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
                if poll(&mut fds, PollTimeout::ZERO)? == 0 {
                    break;
                }
                let mut buffer = [0; 4096];
                match nix::unistd::read(pipe, &mut buffer)? {
                    0 => break,
                    count => into.extend_from_slice(&buffer[..count]),
                }
            }
        }
        Ok(())
    }

    /// Writes what the container's own programs said to the job's standard error.
    pub fn pass_on(&self, said: &[u8]) {
        if let Err(error) = write_all(&self.job.error, said) {
            log::debug!("cannot pass on what the container said: {error}");
        }
    }

    /// Device and inode of the job's own output, where that is in files.
    pub fn job_files(&self) -> Vec<(u64, u64)> {
        let regular = |fd: &OwnedFd| {
            let about = fstat(fd).ok()?;
            let regular = about.st_mode & libc::S_IFMT == libc::S_IFREG;
            regular.then_some((about.st_dev, about.st_ino))
        };
        [&self.job.output, &self.job.error]
            .into_iter()
            .filter_map(regular)
            .collect()
    }

    /// The outer ends of the output pipes.
    pub fn outputs(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [Some(&self.output), self.error.as_ref()]
            .into_iter()
            .flatten()
            .map(AsFd::as_fd)
    }

    /// Begins to carry.
    pub fn carry(self) -> io::Result<Carried> {
        let stop = Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?);
        let file = match is_regular(self.job.input.as_fd()) {
            Ok(true) => Some((File::from(self.job.input.try_clone()?), self.input_read)),
            _ => None,
        };
        let position = file.as_ref().map(|(file, _)| (&*file).stream_position());
        let position = position.transpose()?;
        let input = Arc::new(Mutex::new(Input { position }));
        let mut threads = Vec::new();
        let mut start = |name: &str, run: Box<dyn FnOnce() + Send>| -> io::Result<()> {
            threads.push(std::thread::Builder::new().name(name.into()).spawn(run)?);
            Ok(())
        };
        let (ours, ended) = (input.clone(), stop.clone());
        let (from, to) = (self.job.input, self.input);
        start(
            "standard input",
            Box::new(move || carry_input(from, to, &ours, &ended)),
        )?;
        let mut outputs = Vec::new();
        for (from, to, name) in [
            (Some(self.output), self.job.output, "standard output"),
            (self.error, self.job.error, "standard error"),
        ] {
            let Some(from) = from else { continue };
            let ended = stop.clone();
            let output = Arc::new(Output {
                from,
                to,
                busy: Mutex::default(),
            });
            outputs.push(Arc::downgrade(&output));
            start(name, Box::new(move || carry_output(&output, &ended, name)))?;
        }
        Ok(Carried {
            pipes: self.pipes,
            input,
            stop,
            outputs,
            threads: Mutex::new(threads),
            file,
        })
    }
}

impl Carried {
    /// Keeps standard input still and says where it is. What is in its pipe is CRIU's to save.
    pub fn hold(&self) -> (Record, Held<'_>) {
        let input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        (
            Record {
                pipes: self.pipes,
                input: input.position,
            },
            Held { _input: input },
        )
    }

    /// Waits until all that is in the pipes has got to where it belongs; nobody may be writing into
    /// them. Gives up after `limit`, since a file system may hang, and sooner on whoever reads a pipe: he
    /// may not do so.
    pub fn settle(&self, limit: Duration) {
        let begun = Instant::now();
        for output in self.outputs.iter().filter_map(Weak::upgrade) {
            let settled = || {
                let Ok(_still) = output.busy.try_lock() else {
                    return false;
                };
                let mut fds = [PollFd::new(output.from.as_fd(), PollFlags::POLLIN)];
                !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
                    || !fds[0]
                        .revents()
                        .unwrap_or(PollFlags::empty())
                        .contains(PollFlags::POLLIN)
            };
            let file = is_regular(output.to.as_fd()).unwrap_or(false);
            let limit = if file { limit } else { limit.min(READER) };
            while !settled() {
                if begun.elapsed() >= limit {
                    match file {
                        true => log::warn!(
                            "the application's output does not get to its file in {limit:?}"
                        ),
                        false => log::debug!("whoever reads the application's output does not"),
                    }
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// Carries what is left, once nobody writes any more, and ends the threads.
    pub fn finish(&self) {
        if let Err(error) = self.stop.write(1) {
            log::error!("cannot end the threads of the standard streams: {error}");
            return;
        }
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread of the standard streams failed");
            }
        }
        // Whoever reads on in the file, such as the script's own loop, goes on where the application
        // was, not where we are.
        if let Some((file, pipe)) = &self.file {
            let unread = crate::sys::unread(pipe).map(|count| -(count as i64));
            if let Err(error) = unread.and_then(|unread| (&*file).seek(SeekFrom::Current(unread))) {
                log::warn!("standard input is not put back to where it was read: {error}");
            }
        }
    }
}

/// While this lives, nothing is put into the application's standard input.
pub struct Held<'a> {
    _input: MutexGuard<'a, Input>,
}

/// Puts back what the saved application had not read of its standard input, and goes on in a file
/// where it was.
fn resume_input(job: &Job, pipe: &OwnedFd, record: &Record, dir: &Path) -> Result<(), String> {
    let failed = |error: io::Error| format!("cannot go on with standard input: {error}");
    let unread = images::unread(dir, record.pipes[0])?;
    if !unread.is_empty() {
        // It was in such a pipe before, but that one may have been made larger.
        if let Ok(size) = i32::try_from(unread.len())
            && size > 65536
        {
            fcntl(pipe, FcntlArg::F_SETPIPE_SZ(size)).map_err(|e| failed(e.into()))?;
        }
        let written = nix::unistd::write(pipe, &unread).map_err(|e| failed(e.into()))?;
        if written != unread.len() {
            return Err(failed(io::Error::other("it does not fit into a pipe")));
        }
    }
    if let Some(position) = record.input
        && is_regular(job.input.as_fd()).map_err(failed)?
    {
        let mut file = File::from(job.input.try_clone().map_err(failed)?);
        let size = file.metadata().map_err(failed)?.len();
        if size < position {
            return Err(format!(
                "standard input is a file of {size} bytes, but {position} were read before the \
                 checkpoint: give the job the same input as before"
            ));
        }
        file.seek(SeekFrom::Start(position)).map_err(failed)?;
    }
    Ok(())
}

fn carry_input(from: OwnedFd, to: OwnedFd, input: &Mutex<Input>, stop: &EventFd) {
    let mut from = File::from(from);
    let mut run = || -> io::Result<()> {
        loop {
            if !ready(to.as_fd(), PollFlags::POLLOUT, stop)?
                || !ready(from.as_fd(), PollFlags::POLLIN, stop)?
                || raised(stop)?
            {
                return Ok(());
            }
            let mut input = input.lock().unwrap_or_else(PoisonError::into_inner);
            let mut buffer = [0; INPUT];
            let count = match from.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if retry(&error) => continue,
                Err(error) => return Err(error),
            };
            match nix::unistd::write(&to, &buffer[..count]) {
                Ok(_) => {}
                // The application closed its standard input.
                Err(nix::errno::Errno::EPIPE) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            if let Some(position) = &mut input.position {
                *position += count as u64;
            }
        }
    };
    // A standard input that is closed (EBADF) or a directory (EISDIR) has nothing to read: the
    // application sees its end.
    if let Err(error) = run() {
        log::debug!("standard input ended: {error}");
    }
}

fn raised(stop: &EventFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
}

fn retry(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

fn carry_output(output: &Output, stop: &EventFd, name: &str) {
    let Output { from, to, busy } = output;
    let mut lost = false;
    let mut buffer = vec![0; 65536];
    loop {
        match ready(from.as_fd(), PollFlags::POLLIN, stop) {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => return log::error!("cannot wait for the {name}: {error}"),
        }
        let _busy = busy.lock().unwrap_or_else(PoisonError::into_inner);
        let count = match nix::unistd::read(from, &mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return log::error!("cannot read the {name}: {error}"),
        };
        match write_all(to, &buffer[..count]) {
            Ok(()) => lost = false,
            // As without us: the pipe's end closes, and the application gets SIGPIPE.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return,
            // A program can go on without its output, and most would.
            Err(error) if !lost => {
                log::error!("cannot write the {name} of the application, some is lost: {error}");
                lost = true;
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn job(dir: &Path, output: OwnedFd) -> Job {
        std::fs::write(
            dir.join("input"),
            (0..20_000u32)
                .flat_map(u32::to_le_bytes)
                .collect::<Vec<_>>(),
        )
        .unwrap();
        Job {
            input: File::open(dir.join("input")).unwrap().into(),
            error: output.try_clone().unwrap(),
            output,
        }
    }

    #[test]
    fn every_byte_comes_out_once_and_then_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let (mut read, write) = std::io::pipe().unwrap();
        let (streams, ends) = Streams::new(job(dir.path(), write.into()), None).unwrap();
        let carried = streams.carry().unwrap();
        let bytes: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
        let want = bytes.clone();
        // More than the pipes hold: the writer has to wait for the reader.
        let writer = std::thread::spawn(move || {
            File::from(ends.output).write_all(&bytes).unwrap();
        });
        let mut got = vec![0; want.len()];
        read.read_exact(&mut got).unwrap();
        writer.join().unwrap();
        carried.finish();
        assert!(want == got);
        // Nobody of ours holds the job's stream any more.
        drop(carried);
        assert_eq!(0, read.read(&mut [0]).unwrap());
    }

    #[test]
    fn what_was_written_last_is_not_lost_when_the_threads_end() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let output = File::create(&out).unwrap();
        let (streams, ends) = Streams::new(job(dir.path(), output.into()), None).unwrap();
        let carried = streams.carry().unwrap();
        // The writer's end stays open, as in a process that was killed only now.
        let mut writer = File::from(ends.error);
        writer.write_all(b"last words").unwrap();
        carried.finish();
        assert_eq!("last words", std::fs::read_to_string(&out).unwrap());
    }

    #[test]
    fn one_file_for_both_makes_one_pipe_that_keeps_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let output = File::create(&out).unwrap();
        let (streams, ends) = Streams::new(job(dir.path(), output.into()), None).unwrap();
        assert_eq!(streams.pipes[1], streams.pipes[2]);
        let carried = streams.carry().unwrap();
        let (mut one, mut two) = (File::from(ends.output), File::from(ends.error));
        for n in 0..100 {
            write!(one, "{n} ").unwrap();
            writeln!(two, "{n}").unwrap();
        }
        carried.finish();
        let want: String = (0..100).map(|n| format!("{n} {n}\n")).collect();
        assert_eq!(want, std::fs::read_to_string(&out).unwrap());
    }

    #[test]
    fn input_goes_on_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let null = || OwnedFd::from(File::options().write(true).open("/dev/null").unwrap());
        let (streams, ends) = Streams::new(job(dir.path(), null()), None).unwrap();
        let carried = streams.carry().unwrap();
        let mut input = File::from(ends.input);
        let mut got = vec![0; 30_000];
        input.read_exact(&mut got).unwrap();
        let (record, held) = carried.hold();
        // What CRIU would save: what is in the pipe while nobody adds to it.
        let position = record.input.unwrap();
        let mut unread = vec![0; usize::try_from(position).unwrap() - got.len()];
        input.read_exact(&mut unread).unwrap();
        drop(held);
        carried.finish();
        drop(input);
        let mut image = [0x5456_4319u32, 0x5645_3709].map(u32::to_le_bytes).concat();
        let mut entry = Vec::new();
        super::super::protobuf::put_number(&mut entry, 1, record.pipes[0]);
        super::super::protobuf::put_number(&mut entry, 2, unread.len() as u64);
        image.extend_from_slice(&(entry.len() as u32).to_le_bytes());
        image.extend_from_slice(&entry);
        image.extend_from_slice(&unread);
        std::fs::write(dir.path().join("pipes-data.img"), image).unwrap();
        record.write(dir.path()).unwrap();

        let record = Record::read(dir.path()).unwrap();
        let saved = Some((&record, dir.path()));
        let (streams, ends) = Streams::new(job(dir.path(), null()), saved).unwrap();
        let carried = streams.carry().unwrap();
        File::from(ends.input).read_to_end(&mut got).unwrap();
        carried.finish();
        assert!(got == std::fs::read(dir.path().join("input")).unwrap());

        let short = job(dir.path(), null());
        std::fs::write(dir.path().join("input"), "x").unwrap();
        let error = Streams::new(short, saved).unwrap_err();
        assert!(error.contains("same input as before"), "{error}");
    }
}
