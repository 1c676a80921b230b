//! An output stream of a stage that goes into a pipe or a file of the script's: recorded, so that a
//! later run can give it to whoever reads it then.
//!
//! The script makes the pipe anew in every run, and empties the file; who reads the pipe begins
//! anew as well. So what the application wrote in earlier runs comes first, from the record, then
//! what it writes now. A thread carries it. A file that is only appended to may hold it already.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};

use crate::pipes::{is_regular, pipe, ready, write_all};

/// The most that is recorded of one stream, in bytes.
pub const MOST: u64 = 1 << 30;

const CHUNK: usize = 1 << 16;

/// How much of a record that is kept no longer may wait in its file, in bytes.
const SPOOL: u64 = 16 << 20;

/// What was written, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Streams: 1, 2 or both.
    pub streams: Vec<i32>,
    pub bytes: u64,
    /// Whether all of it is in the record.
    pub recorded: bool,
    /// Where it begins in the file it is appended to.
    begins: Option<u64>,
}

/// A pipe in place of one or both output streams.
pub struct Output {
    streams: Vec<i32>,
    shared: Arc<Shared>,
    stop: Arc<EventFd>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    /// The script's pipe or file.
    to: OwnedFd,
    /// The record.
    file: File,
    state: Mutex<State>,
}

struct State {
    /// Our pipe's end for reading; none once nobody reads the script's pipe.
    from: Option<OwnedFd>,
    /// How much the application has written.
    bytes: u64,
    /// How much of it the script's pipe or file has.
    forwarded: u64,
    /// Where in the stream the file begins: 0 as long as all is recorded.
    base: u64,
    recorded: bool,
    begins: Option<u64>,
}

impl Output {
    /// A pipe that will be carried to `to`, recorded in the file `record`, and its end for writing.
    pub fn new(streams: Vec<i32>, to: OwnedFd, record: &Path) -> io::Result<(Output, OwnedFd)> {
        let (read, write) = pipe()?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(record)?;
        let appends = is_regular(to.as_fd())?
            && OFlag::from_bits_truncate(fcntl(&to, FcntlArg::F_GETFL)?).contains(OFlag::O_APPEND);
        let begins = match appends {
            true => Some(File::from(to.try_clone()?).metadata()?.size()),
            false => None,
        };
        let output = Output {
            streams,
            shared: Arc::new(Shared {
                to,
                file,
                state: Mutex::new(State {
                    from: Some(read),
                    bytes: 0,
                    forwarded: 0,
                    base: 0,
                    recorded: true,
                    begins,
                }),
            }),
            stop: Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?),
            thread: Mutex::new(None),
        };
        Ok((output, write))
    }

    pub fn is_of(&self, stream: i32) -> bool {
        self.streams.contains(&stream)
    }

    /// The script's pipe or file.
    ///
    /// # Errors
    /// It may have been written to.
    pub fn script(&self) -> io::Result<&OwnedFd> {
        match self.lock_thread().is_some() {
            true => Err(io::Error::other("its output is being carried")),
            false => Ok(&self.shared.to),
        }
    }

    /// Whether what was `written` in an earlier run is here for this one.
    pub fn has(&self, written: &Written) -> io::Result<bool> {
        Ok(written.recorded
            && written.streams == self.streams
            && self.shared.file.metadata()?.len() >= written.bytes)
    }

    /// Has everything that was `written` go first, or begins with nothing, and carries what comes.
    pub fn start_after(&self, written: Option<&Written>) -> io::Result<()> {
        let mut state = self.shared.lock();
        if state.base > 0 {
            return Err(io::Error::other(
                "so much was written that it is no longer recorded",
            ));
        }
        let fresh = self.lock_thread().is_none();
        if let (Some(written), true) = (written, fresh) {
            self.shared.find(&mut state, written)?;
        }
        state.bytes = written.map_or(0, |written| written.bytes);
        self.shared.file.set_len(state.bytes)?;
        drop(state);
        let mut thread = self.lock_thread();
        if thread.is_none() {
            let (shared, stop) = (self.shared.clone(), self.stop.clone());
            let carry = move || {
                if let Err(why) = shared.carry(&stop) {
                    log::error!("the stage's output cannot be carried, some is lost: {why}");
                }
            };
            let builder = std::thread::Builder::new().name("stage's output".into());
            *thread = Some(builder.spawn(carry)?);
        }
        Ok(())
    }

    /// What has been written by now; all of it, once the application has `ended`.
    pub fn written(&self, ended: bool) -> io::Result<Written> {
        let mut state = self.shared.lock();
        // Without an end it might never be done with a fast writer.
        while self.shared.take(&mut state)? && ended {}
        Ok(Written {
            streams: self.streams.clone(),
            bytes: state.bytes,
            recorded: state.recorded,
            begins: state.begins,
        })
    }

    /// Makes the record durable.
    pub fn sync(&self) -> io::Result<()> {
        self.shared.file.sync_data()
    }

    /// Carries what is left, once the application has ended.
    pub fn finish(&self) -> io::Result<()> {
        self.stop.write(1)?;
        match self.lock_thread().take() {
            Some(thread) => thread
                .join()
                .map_err(|_| io::Error::other("the thread of the stage's output failed")),
            None => Ok(()),
        }
    }

    fn lock_thread(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks how much of the record the file that is appended to holds already.
    fn find(&self, state: &mut State, written: &Written) -> io::Result<()> {
        let (Some(now), Some(begins)) = (state.begins, written.begins) else {
            return Ok(());
        };
        let recorded = self.file.metadata()?.len();
        let there = now.saturating_sub(begins).min(recorded);
        if there < written.bytes {
            return Ok(());
        }
        // It is open for writing alone.
        let file = match File::open(format!("/proc/self/fd/{}", fd_number(&self.to))) {
            Ok(file) => file,
            Err(_) => return Ok(()),
        };
        let (mut one, mut other) = (vec![0; CHUNK], vec![0; CHUNK]);
        let mut at = 0;
        while at < there {
            let count = usize::try_from(there - at).unwrap_or(CHUNK).min(CHUNK);
            file.read_exact_at(&mut one[..count], begins + at)?;
            self.file.read_exact_at(&mut other[..count], at)?;
            if one[..count] != other[..count] {
                return Ok(());
            }
            at += count as u64;
        }
        state.begins = Some(begins);
        state.forwarded = there;
        Ok(())
    }

    /// Records what is in our pipe now. Whether there was something.
    fn take(&self, state: &mut State) -> io::Result<bool> {
        let Some(from) = &state.from else {
            return Ok(false);
        };
        let count = crate::sys::unread(from)?.min(CHUNK);
        if count == 0 {
            return Ok(false);
        }
        let mut buffer = vec![0; count];
        let count = nix::unistd::read(from, &mut buffer)?;
        if state.forwarded == state.bytes && state.bytes - state.base > SPOOL && !state.recorded {
            self.file.set_len(0)?;
            state.base = state.bytes;
        }
        self.file
            .write_all_at(&buffer[..count], state.bytes - state.base)?;
        state.bytes += count as u64;
        state.recorded &= state.bytes <= MOST;
        Ok(count > 0)
    }

    fn carry(&self, stop: &EventFd) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        loop {
            let (at, bytes, base, from) = {
                let state = self.lock();
                let from = state.from.as_ref().map(OwnedFd::try_clone);
                (state.forwarded, state.bytes, state.base, from.transpose()?)
            };
            let Some(from) = from else { return Ok(()) };
            if at < bytes {
                let count = usize::try_from(bytes - at).unwrap_or(CHUNK).min(CHUNK);
                self.file.read_exact_at(&mut buffer[..count], at - base)?;
                match write_all(&self.to, &buffer[..count]) {
                    Ok(()) => self.lock().forwarded += count as u64,
                    // As without us: our pipe closes, and the application gets SIGPIPE.
                    Err(why) if why.kind() == io::ErrorKind::BrokenPipe => {
                        self.lock().from = None;
                        return Ok(());
                    }
                    Err(why) => return Err(why),
                }
                continue;
            }
            if !ready(from.as_fd(), PollFlags::POLLIN, stop)? {
                return Ok(());
            }
            let mut state = self.lock();
            match self.take(&mut state) {
                Ok(true) => {}
                // All of its writers are gone, or somebody has asked what was written by now.
                Ok(false) if hung_up(&from)? => return Ok(()),
                Ok(false) => {}
                Err(why) if why.raw_os_error() == Some(Errno::EINTR as i32) => {}
                Err(why) => return Err(why),
            }
        }
    }
}

/// Whether nobody can write to the pipe any more.
fn hung_up(pipe: &OwnedFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].any().unwrap_or(false))
}

fn fd_number(fd: &OwnedFd) -> i32 {
    use std::os::fd::AsRawFd;
    fd.as_raw_fd()
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    fn outcome(to: File, record: &Path, before: Option<&Written>, text: &str) -> Written {
        let (output, write) = Output::new(vec![1], to.into(), record).unwrap();
        assert!(before.is_none_or(|before| output.has(before).unwrap()));
        output.start_after(before).unwrap();
        File::from(write).write_all(text.as_bytes()).unwrap();
        output.finish().unwrap();
        output.written(true).unwrap()
    }

    #[test]
    fn a_new_pipe_gets_everything_from_its_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let record = dir.path().join("1");
        let run = |before: Option<&Written>, text: &str| {
            let (read, write) = pipe().unwrap();
            let written = outcome(write.into(), &record, before, text);
            let mut got = String::new();
            File::from(read).read_to_string(&mut got).unwrap();
            (got, written)
        };
        let (got, first) = run(None, "one ");
        assert_eq!((got.as_str(), first.bytes), ("one ", 4));
        // What was written after the state that is gone on from does not count.
        run(Some(&first), "lost");
        let (got, second) = run(Some(&first), "two");
        assert_eq!((got.as_str(), second.bytes), ("one two", 7));
        assert_eq!(run(None, "anew").0, "anew");
    }

    #[test]
    fn a_file_that_is_appended_to_gets_what_it_lacks() {
        let dir = tempfile::tempdir().unwrap();
        let (record, path) = (dir.path().join("1"), dir.path().join("out"));
        let append = || {
            File::options()
                .append(true)
                .create(true)
                .open(&path)
                .unwrap()
        };
        let text = || std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, "head ").unwrap();
        let first = outcome(append(), &record, None, "one ");
        outcome(append(), &record, Some(&first), "two ");
        assert_eq!(text(), "head one two ");
        // Lines after the state that is gone on from are written once.
        let third = outcome(append(), &record, Some(&first), "two three");
        assert_eq!(text(), "head one two three");
        // The script has emptied it.
        std::fs::write(&path, "").unwrap();
        outcome(append(), &record, Some(&third), ".");
        assert_eq!(text(), "one two three.");
    }

    #[test]
    fn a_reader_that_is_gone_is_told_to_the_application() {
        let dir = tempfile::tempdir().unwrap();
        let (read, write) = pipe().unwrap();
        let (output, write_end) = Output::new(vec![1, 2], write, &dir.path().join("1")).unwrap();
        output.start_after(None).unwrap();
        drop(read);
        let mut file = File::from(write_end);
        let end = std::iter::repeat_with(|| file.write_all(b"y\n")).find_map(Result::err);
        assert_eq!(end.unwrap().kind(), io::ErrorKind::BrokenPipe);
        output.finish().unwrap();
    }
}
