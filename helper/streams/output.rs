//! An output stream that this process stands in: recorded, so that a later run can give it to whoever
//! reads it then.
//!
//! The script makes its pipes anew in every run and empties its files; who reads a pipe begins anew
//! as well. So what the application wrote in earlier runs comes first, from the record, then what it
//! writes now. A file that is only appended to may hold it already, and more than is wanted: that is
//! cut off, or, where others write to the file, not written again as long as it is the same.
//!
//! One thread records, another forwards. While a checkpoint is taken, recording does not wait for
//! whoever reads the stream.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};

use super::far::{Appended, Far};
use super::held::{self, Held, Segment};
use crate::pipes::{pipe, ready, write_all};
use crate::writers;

/// The most that is recorded of one stream, in bytes.
pub const MOST: u64 = 1 << 30;

const CHUNK: usize = 1 << 16;

/// How long a reader is waited for before everything is written again.
const READER: Duration = Duration::from_secs(5);

/// The most that is compared with what was written before, in bytes.
const COMPARED: u64 = 64 << 20;

/// What was written, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Streams: 1, 2 or both.
    pub streams: Vec<i32>,
    pub bytes: u64,
    /// Whether all of it is in the record.
    pub recorded: bool,
}

impl Written {
    /// The streams, for people.
    pub fn shown(&self) -> &'static str {
        match self.streams.as_slice() {
            [1] => "standard output",
            [2] => "standard error",
            _ => "output",
        }
    }
}

/// A pipe in place of one or both output streams.
pub struct Output {
    streams: Vec<i32>,
    shared: Arc<Shared>,
    /// Whether all of it has to be known exactly.
    strict: bool,
    /// What the stream ends in, if that is only appended to.
    file: Option<Appended>,
    /// Where what is cut off of that is kept.
    cut: PathBuf,
    stop: Arc<EventFd>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    /// The stream as this process got it.
    to: OwnedFd,
    /// The record.
    record: File,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Our pipe's end for reading; none once nobody reads the stream.
    from: Option<OwnedFd>,
    /// How much the application has written.
    bytes: u64,
    /// How much of it was forwarded.
    forwarded: u64,
    /// Whether all of it is in the record.
    recorded: bool,
    /// How much is in the record, and, where that is not all, what follows and was not forwarded.
    record_ends: u64,
    loose: VecDeque<u8>,
    /// Some is being forwarded at this moment.
    busy: bool,
    /// A checkpoint is being taken.
    held: bool,
    /// Nothing more comes.
    ended: bool,
    expected: Option<Expected>,
}

/// What was written after the state that is gone on from, and is there already.
struct Expected {
    /// Where in the stream it begins.
    from: u64,
    bytes: Vec<u8>,
}

impl Output {
    /// A pipe that will be carried to `to`, which ends in `far`, recorded in the file `record`; and its
    /// end for writing.
    pub fn new(
        (streams, strict): (Vec<i32>, bool),
        to: OwnedFd,
        far: Far,
        record: &Path,
    ) -> io::Result<(Output, OwnedFd)> {
        let (read, write) = pipe()?;
        let cut = record.with_extension("cut");
        let record = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(record)?;
        let output = Output {
            streams,
            strict,
            shared: Arc::new(Shared {
                to,
                record,
                state: Mutex::new(State {
                    from: Some(read),
                    bytes: 0,
                    forwarded: 0,
                    recorded: true,
                    record_ends: 0,
                    loose: VecDeque::new(),
                    busy: false,
                    held: false,
                    ended: false,
                    expected: None,
                }),
                changed: Condvar::new(),
            }),
            file: match far {
                Far::File(file) => Some(file),
                Far::Anew { .. } => None,
            },
            cut,
            stop: Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?),
            threads: Mutex::default(),
        };
        Ok((output, write))
    }

    pub fn streams(&self) -> &[i32] {
        &self.streams
    }

    pub fn is_strict(&self) -> bool {
        self.strict
    }

    /// The stream as this process got it.
    ///
    /// # Errors
    /// It may have been written to.
    pub fn script(&self) -> io::Result<&OwnedFd> {
        match self.lock_threads().is_empty() {
            true => Ok(&self.shared.to),
            false => Err(io::Error::other("its output is being carried")),
        }
    }

    /// Whether what was `written` in an earlier run is here for this one.
    pub fn has(&self, written: &Written) -> io::Result<bool> {
        Ok(written.recorded
            && written.streams == self.streams
            && self.shared.record.metadata()?.len() >= written.bytes)
    }

    /// Has everything that was `written` go first, or begins with nothing, and carries what comes.
    /// `segment` says what the file that is appended to got in the last run; what it gets in this one
    /// is returned. If that was not in this job (`here`), another file gets only what comes.
    pub fn start_after(
        &self,
        written: Option<&Written>,
        segment: Option<&Segment>,
        here: bool,
    ) -> io::Result<Option<Segment>> {
        let mut state = self.shared.idle()?;
        let wanted = written.map_or(0, |written| written.bytes);
        let fresh = self.lock_threads().is_empty();
        // Of a stream that is carried already everything was forwarded, or will be.
        let there = match (fresh, &self.file, segment) {
            (false, ..) => state.forwarded,
            (true, Some(file), Some(segment)) if here || written.is_some() => self
                .find(file, segment, wanted)?
                .unwrap_or(if here { 0 } else { wanted }),
            (true, Some(_), _) if !here => wanted,
            (true, ..) => 0,
        };
        state.forwarded = there.min(wanted);
        state.expected = (there > wanted)
            .then(|| self.shared.expect(wanted, there))
            .transpose()?;
        if !fresh && wanted > state.record_ends {
            return Err(io::Error::other(
                "what was written before is not recorded any more",
            ));
        }
        state.bytes = wanted;
        (state.recorded, state.record_ends) = (true, wanted);
        state.loose.clear();
        self.shared.record.set_len(wanted)?;
        let segment = self.file.as_ref().filter(|_| fresh);
        let segment = segment.map(|file| Segment::at_end(&file.file, file.id, state.forwarded));
        let segment = segment.transpose()?;
        drop(state);
        if fresh {
            self.carry()?;
        }
        Ok(segment)
    }

    fn carry(&self) -> io::Result<()> {
        let mut threads = self.lock_threads();
        let (shared, stop) = (self.shared.clone(), self.stop.clone());
        let record = move || {
            if let Err(why) = shared.take_all(&stop) {
                log::error!("the application's output cannot be recorded, some is lost: {why}");
            }
            shared.lock().ended = true;
            shared.changed.notify_all();
        };
        let (shared, stop) = (self.shared.clone(), self.stop.clone());
        let forward = move || {
            if let Err(why) = shared.forward() {
                // As without us: its reader is gone, our pipe closes, and the application gets SIGPIPE.
                shared.lock().from = None;
                shared.changed.notify_all();
                let _ = stop.write(1);
                if why.kind() != io::ErrorKind::BrokenPipe {
                    log::error!("the application's output cannot be carried, some is lost: {why}");
                }
            }
        };
        let builder = || std::thread::Builder::new().name("output".into());
        threads.push(builder().spawn(record)?);
        threads.push(builder().spawn(forward)?);
        Ok(())
    }

    /// How much of the record `file` holds, if any; what is not wanted is cut off if that can be.
    fn find(&self, file: &Appended, segment: &Segment, wanted: u64) -> io::Result<Option<u64>> {
        let shown = file.path.display();
        if segment.file != file.id {
            return Ok(None);
        }
        let held = held::look(segment, &file.file, &self.shared.record, wanted)?;
        log::debug!("{shown} of {segment:?}, {wanted} wanted: {held:?}");
        Ok(match held {
            Held::Nothing => None,
            Held::Unclear => {
                log::info!(
                    "others have written to {shown} as well: if the last run ended without notice, what \
                     was written to it after the saved state is there twice"
                );
                Some(wanted)
            }
            Held::Upto(upto, Some(cut)) if writers::others(&file.file, &file.by).is_empty() => {
                file.cut(&cut, &self.shared.record, wanted..upto, &self.cut)?;
                Some(wanted)
            }
            Held::Upto(upto, _) => Some(upto),
        })
    }

    /// From now on until [`Output::release`], recording does not wait for whoever reads.
    pub fn hold(&self) {
        self.shared.lock().held = true;
        self.shared.changed.notify_all();
    }

    pub fn release(&self) {
        self.shared.lock().held = false;
    }

    /// What has been written by now; all of it, once the application writes no more.
    pub fn written(&self, all: bool) -> io::Result<Written> {
        let mut state = self.shared.lock();
        // Without an end it might never be done with a fast writer.
        while self.shared.take(&mut state)? && all {}
        Ok(Written {
            streams: self.streams.clone(),
            bytes: state.bytes,
            recorded: state.recorded,
        })
    }

    /// Waits until everything is forwarded; false if it is not by `end`.
    pub fn flush(&self, end: Instant) -> bool {
        let mut state = self.shared.lock();
        while state.forwarded < state.bytes && state.from.is_some() {
            let Some(left) = end.checked_duration_since(Instant::now()) else {
                return false;
            };
            let woken = self.shared.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Makes the record durable.
    pub fn sync(&self) -> io::Result<()> {
        self.shared.record.sync_data()
    }

    /// Carries what is left, once the application has ended.
    pub fn finish(&self) -> io::Result<()> {
        self.stop.write(1)?;
        for thread in self.lock_threads().drain(..) {
            thread
                .join()
                .map_err(|_| io::Error::other("a thread of the application's output failed"))?;
        }
        Ok(())
    }

    fn lock_threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, once nothing is being forwarded.
    fn idle(&self) -> io::Result<MutexGuard<'_, State>> {
        let end = Instant::now() + READER;
        let mut state = self.lock();
        while state.busy {
            let Some(left) = end.checked_duration_since(Instant::now()) else {
                return Err(io::Error::other("whoever reads its output does not"));
            };
            let woken = self.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state)
    }

    /// What is recorded between two places, as far as it is compared.
    fn expect(&self, from: u64, to: u64) -> io::Result<Expected> {
        let to = to.min(self.record.metadata()?.len()).min(from + COMPARED);
        let count = usize::try_from(to.saturating_sub(from)).map_err(io::Error::other)?;
        let mut bytes = vec![0; count];
        self.record.read_exact_at(&mut bytes, from)?;
        Ok(Expected { from, bytes })
    }

    /// Takes what is in our pipe now. Whether there was something.
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
        let bytes = &buffer[..count];
        if state.recorded {
            self.record(state, bytes);
        }
        match state.recorded {
            true => state.record_ends += count as u64,
            false => state.loose.extend(bytes),
        }
        state.bytes += count as u64;
        self.changed.notify_all();
        Ok(count > 0)
    }

    /// Records `bytes` if that can be. An application does not wait for a disk that is full.
    fn record(&self, state: &mut State, bytes: &[u8]) {
        let written = if state.bytes + bytes.len() as u64 > MOST {
            Err(io::Error::other(format!(
                "it is more than {} GiB",
                MOST >> 30
            )))
        } else {
            self.record.write_all_at(bytes, state.bytes)
        };
        if let Err(why) = written {
            log::warn!(
                "what the application writes is not recorded any more, and may be missing in the output \
                 of its next run: {why}"
            );
            state.recorded = false;
        }
    }

    /// Records until there is nothing more.
    fn take_all(&self, stop: &EventFd) -> io::Result<()> {
        loop {
            let mut state = self.lock();
            // Who reads the stream keeps its writer back, as without us.
            while !state.held && state.bytes.saturating_sub(state.forwarded) >= CHUNK as u64 {
                if state.from.is_none() {
                    return Ok(());
                }
                state = self.wait(state);
            }
            let from = state.from.as_ref().map(OwnedFd::try_clone).transpose()?;
            drop(state);
            let Some(from) = from else { return Ok(()) };
            if !ready(from.as_fd(), PollFlags::POLLIN, stop)? {
                return Ok(());
            }
            let taken = self.take(&mut self.lock());
            match taken {
                Ok(true) => {}
                // All of its writers are gone, or somebody has asked what was written by now.
                Ok(false) if hung_up(&from)? => return Ok(()),
                Ok(false) => {}
                Err(why) if why.raw_os_error() == Some(Errno::EINTR as i32) => {}
                Err(why) => return Err(why),
            }
        }
    }

    /// What is to be forwarded next, and how much that is.
    fn next(&self, state: &mut State, buffer: &mut [u8]) -> io::Result<usize> {
        let most = |left: u64| usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        if state.forwarded < state.record_ends {
            let count = most(state.record_ends - state.forwarded);
            self.record
                .read_exact_at(&mut buffer[..count], state.forwarded)?;
            return Ok(count);
        }
        state.expected = None;
        let count = most(state.bytes - state.forwarded);
        // It may have been forwarded already, before it was written again.
        let skipped = state.loose.len().saturating_sub(
            usize::try_from(state.bytes - state.forwarded).map_err(io::Error::other)?,
        );
        state.loose.drain(..skipped);
        for (byte, next) in buffer[..count].iter_mut().zip(state.loose.drain(..count)) {
            *byte = next;
        }
        Ok(count)
    }

    /// Forwards until everything is. What a disk that is full does not take is only in the record: most
    /// applications would not notice, and a SIGPIPE would end them.
    fn forward(&self) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        let mut refused = false;
        loop {
            let mut state = self.lock();
            while state.forwarded >= state.bytes {
                if state.ended {
                    return Ok(());
                }
                state = self.wait(state);
            }
            let at = state.forwarded;
            let count = self.next(&mut state, &mut buffer)?;
            let chunk = match state.unexpected(&buffer[..count]) {
                Unexpected::Same(same) => {
                    state.forwarded += same as u64;
                    self.changed.notify_all();
                    continue;
                }
                Unexpected::Other { again, line } => {
                    // It is another line: all of it, and not behind half of the old one.
                    state.forwarded -= again;
                    drop(state);
                    if line {
                        write_all(&self.to, b"\n")?;
                    }
                    continue;
                }
                Unexpected::Nothing => &buffer[..count],
            };
            state.busy = true;
            drop(state);
            match write_all(&self.to, chunk) {
                Err(why) if why.kind() == io::ErrorKind::BrokenPipe => return Err(why),
                Err(why) if !refused => {
                    refused = true;
                    log::error!(
                        "some of the application's output is missing where it goes; it runs on: {why}"
                    );
                }
                Ok(()) | Err(_) => {}
            }
            let mut state = self.lock();
            (state.busy, state.forwarded) = (false, at + count as u64);
            drop(state);
            self.changed.notify_all();
        }
    }
}

/// How what is to be forwarded next compares with what is there already.
enum Unexpected {
    Nothing,
    /// So many bytes are the same, which is not 0.
    Same(usize),
    /// It is something else. So many bytes before belong to the same line, and whether what is there
    /// ends within a line.
    Other {
        again: u64,
        line: bool,
    },
}

impl State {
    fn unexpected(&mut self, next: &[u8]) -> Unexpected {
        let Some(Expected { from, bytes }) = &self.expected else {
            return Unexpected::Nothing;
        };
        let at = self.forwarded.checked_sub(*from);
        let at = at.map(|at| usize::try_from(at).unwrap_or(usize::MAX));
        // What comes before it is forwarded as ever.
        let Some(at) = at else {
            return Unexpected::Nothing;
        };
        let left = bytes.get(at..).unwrap_or_default();
        let same = held::common(left, next);
        if left.is_empty() {
            self.expected = None;
            return Unexpected::Nothing;
        }
        if same > 0 {
            return Unexpected::Same(same);
        }
        let line = bytes[..at].iter().rposition(|byte| *byte == b'\n');
        let again = (at - line.map_or(0, |end| end + 1)) as u64;
        let line = bytes.last() != Some(&b'\n');
        self.expected = None;
        Unexpected::Other { again, line }
    }
}

/// Whether nobody can write to the pipe any more.
fn hung_up(pipe: &OwnedFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].any().unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsRawFd;

    use super::*;

    /// Writes `text` to `to` through an output, after what was written `before`.
    fn outcome(
        to: File,
        record: &Path,
        before: Option<&(Written, Option<Segment>)>,
        text: &str,
    ) -> (Written, Option<Segment>) {
        let far = Far::of(
            Path::new(&format!("/proc/self/fd/{}", to.as_raw_fd())),
            vec![],
        );
        let (output, write) =
            Output::new((vec![1], true), to.into(), far.unwrap(), record).unwrap();
        let (written, segment) = match before {
            Some((written, segment)) => (Some(written), segment.as_ref()),
            None => (None, None),
        };
        assert!(written.is_none_or(|written| output.has(written).unwrap()));
        let segment = output.start_after(written, segment, true).unwrap();
        File::from(write).write_all(text.as_bytes()).unwrap();
        output.finish().unwrap();
        (output.written(true).unwrap(), segment)
    }

    fn appended(path: &Path) -> File {
        let mut options = File::options();
        options.append(true).create(true).open(path).unwrap()
    }

    #[test]
    fn a_new_pipe_gets_everything_from_its_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let record = dir.path().join("1");
        let run = |before: Option<&(Written, Option<Segment>)>, text: &str| {
            let (read, write) = pipe().unwrap();
            let written = outcome(write.into(), &record, before, text);
            let mut got = String::new();
            File::from(read).read_to_string(&mut got).unwrap();
            (got, written)
        };
        let (got, first) = run(None, "one ");
        assert_eq!((got.as_str(), first.0.bytes), ("one ", 4));
        // What was written after the state that is gone on from does not count.
        run(Some(&first), "lost");
        let (got, second) = run(Some(&first), "two");
        assert_eq!((got.as_str(), second.0.bytes), ("one two", 7));
        assert_eq!(run(None, "anew").0, "anew");
    }

    #[test]
    fn a_file_that_is_appended_to_gets_what_it_lacks() {
        let dir = tempfile::tempdir().unwrap();
        let (record, path) = (dir.path().join("1"), dir.path().join("out"));
        let append = || appended(&path);
        let text = || std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, "head ").unwrap();
        let first = outcome(append(), &record, None, "one ");
        let (_, segment) = outcome(append(), &record, Some(&first), "two ");
        assert_eq!(text(), "head one two ");
        // Lines after the state that is gone on from are cut off.
        let third = outcome(append(), &record, Some(&(first.0, segment)), "2 three");
        assert_eq!(text(), "head one 2 three");
        // The script has emptied it.
        std::fs::write(&path, "").unwrap();
        outcome(append(), &record, Some(&third), ".");
        assert_eq!(text(), "one 2 three.");
    }

    #[test]
    fn where_others_write_the_same_is_not_written_again() {
        let run = |text: &str| {
            let dir = tempfile::tempdir().unwrap();
            let (record, path) = (dir.path().join("1"), dir.path().join("out"));
            let append = || appended(&path);
            let first = outcome(append(), &record, None, "one\n");
            let (_, segment) = outcome(append(), &record, Some(&first), "two\nthree\nfo");
            // The script's own line, in the next run.
            append().write_all(b"\nhost\n").unwrap();
            outcome(append(), &record, Some(&(first.0, segment)), text);
            std::fs::read_to_string(&path).unwrap()
        };
        let before = "one\ntwo\nthree\nfo\nhost\n";
        assert_eq!(run("two\nthree\nfour\n"), format!("{before}ur\n"));
        assert_eq!(run("two\nthen\nfour\n"), format!("{before}\nthen\nfour\n"));
        assert_eq!(run("two\n"), before);
    }

    #[test]
    fn a_reader_that_is_gone_is_told_to_the_application() {
        let dir = tempfile::tempdir().unwrap();
        let (read, write) = pipe().unwrap();
        let far = Far::Anew { id: (0, 0) };
        let record = dir.path().join("1");
        let (output, write_end) = Output::new((vec![1, 2], true), write, far, &record).unwrap();
        output.start_after(None, None, true).unwrap();
        drop(read);
        let mut file = File::from(write_end);
        let end = std::iter::repeat_with(|| file.write_all(b"y\n")).find_map(Result::err);
        assert_eq!(end.unwrap().kind(), io::ErrorKind::BrokenPipe);
        output.finish().unwrap();
    }

    #[test]
    fn a_full_disk_does_not_end_the_application() {
        let dir = tempfile::tempdir().unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let far = Far::Anew { id: (0, 0) };
        let record = dir.path().join("1");
        let (output, write) = Output::new((vec![1], true), full.into(), far, &record).unwrap();
        output.start_after(None, None, true).unwrap();
        let text = vec![b'x'; 1 << 20];
        File::from(write).write_all(&text).unwrap();
        output.finish().unwrap();
        assert!(std::fs::read(&record).unwrap() == text);
    }

    #[test]
    fn a_reader_that_is_slow_keeps_nobody_from_being_saved() {
        let dir = tempfile::tempdir().unwrap();
        let (read, write) = pipe().unwrap();
        let far = Far::Anew { id: (0, 0) };
        let (output, write_end) =
            Output::new((vec![1], true), write, far, &dir.path().join("1")).unwrap();
        output.start_after(None, None, true).unwrap();
        output.hold();
        let text = vec![b'x'; 1 << 20];
        File::from(write_end).write_all(&text).unwrap();
        assert_eq!(output.written(true).unwrap().bytes, 1 << 20);
        output.release();
        let reader = std::thread::spawn(move || {
            let mut got = Vec::new();
            File::from(read).read_to_end(&mut got).unwrap();
            got
        });
        output.finish().unwrap();
        drop(output);
        assert_eq!(reader.join().unwrap(), text);
    }
}
