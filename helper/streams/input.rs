//! Standard input, where it is a pipe: what was read of it is counted, so that a later
//! run gives the application the rest.
//!
//! The script's pipe is made anew in every run and carries everything from its beginning. The
//! application gets a pipe of ours instead; a thread carries from the one into the other. While a
//! checkpoint is taken our pipe is empty: what the application has not read is taken back first, by
//! one read(2), which Linux makes undivided as far as the pipe's own size (pipe_read() holds the
//! pipe's mutex). A hash of all that was read tells whether the next run gives the same.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};

use crate::pipes::pipe;

/// The most that is read at once, in bytes.
const CHUNK: usize = 1 << 16;

/// The most of what was read in earlier runs that is kept in memory, in case that it has to be read
/// again, in bytes.
const PREFIX: u64 = 64 << 20;

/// How often it is looked whether to give up waiting for the script's pipe.
const LOOK: Duration = Duration::from_millis(100);

/// How much was read, and what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Read {
    pub bytes: u64,
    /// BLAKE3 of it.
    hash: String,
    /// Whether that was all, and the application had it.
    #[serde(default)]
    pub ended: bool,
}

/// A pipe in place of standard input.
pub struct Input {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    /// The script's pipe.
    from: OwnedFd,
    /// Our pipe's end for reading, as a description of its own that does not block.
    back: OwnedFd,
    /// The size of our pipe.
    size: usize,
    state: Mutex<State>,
    wake: EventFd,
}

struct State {
    /// Our pipe's end for writing; none once the script's pipe has ended and all is written.
    to: Option<OwnedFd>,
    /// What was read from the script's pipe and is not in ours.
    pending: VecDeque<u8>,
    /// The end of what was written to our pipe: what may still be in it, at least.
    window: VecDeque<u8>,
    /// Of what was written before that.
    hash: blake3::Hasher,
    hashed: u64,
    /// All that was read ahead, as far as it is kept.
    prefix: Vec<u8>,
    ahead: u64,
    held: bool,
    ended: bool,
    /// Nothing of it is wanted any more; it is only read, as by an application that reads all.
    discarded: bool,
    over: bool,
}

/// What the thread has to do.
enum Next {
    Read,
    Discard,
    /// Into our pipe.
    Write(OwnedFd),
    Wait,
    End,
}

impl Input {
    /// A pipe that `from` will be carried into, and its end for reading.
    pub fn new(from: OwnedFd) -> io::Result<(Input, OwnedFd)> {
        let (read, write) = pipe()?;
        let again = |options: &mut OpenOptions| {
            options
                .custom_flags(libc::O_NONBLOCK)
                .open(format!("/proc/self/fd/{}", read.as_raw_fd()))
        };
        let back: OwnedFd = again(OpenOptions::new().read(true))?.into();
        let to: OwnedFd = again(OpenOptions::new().write(true))?.into();
        drop(write);
        let size = fcntl(&back, FcntlArg::F_GETPIPE_SZ)?;
        let shared = Arc::new(Shared {
            from,
            back,
            size: usize::try_from(size).unwrap_or(CHUNK),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            state: Mutex::new(State {
                to: Some(to),
                pending: VecDeque::new(),
                window: VecDeque::new(),
                hash: blake3::Hasher::new(),
                hashed: 0,
                prefix: Vec::new(),
                ahead: 0,
                held: true,
                ended: false,
                discarded: false,
                over: false,
            }),
        });
        let input = Input {
            shared,
            thread: Mutex::new(None),
        };
        Ok((input, read))
    }

    /// The script's pipe.
    ///
    /// # Errors
    /// Something was read of it.
    pub fn script(&self) -> io::Result<&OwnedFd> {
        let carried = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        match carried.is_some() || self.shared.lock().ahead > 0 {
            true => Err(io::Error::other("some of its input was read")),
            false => Ok(&self.shared.from),
        }
    }

    /// Reads as much of the script's pipe as `read` says, before anything is carried. Whether it is
    /// the same. `told` ends the wait for it.
    pub fn read_ahead(&self, read: &Read, told: &AtomicBool) -> io::Result<bool> {
        let mut state = self.shared.lock();
        let mut hash = blake3::Hasher::new();
        let mut buffer = vec![0; CHUNK];
        let mut count = 0;
        hash.update(&state.prefix);
        if state.ahead == 0 {
            while count < read.bytes {
                if told.load(Ordering::SeqCst) {
                    return Err(io::Error::other("it was told to end"));
                }
                if !crate::sys::readable(&self.shared.from, Some(Instant::now() + LOOK))? {
                    continue;
                }
                let most = usize::try_from(read.bytes - count)
                    .unwrap_or(CHUNK)
                    .min(CHUNK);
                match nix::unistd::read(&self.shared.from, &mut buffer[..most]) {
                    Ok(0) => {
                        state.ended = true;
                        break;
                    }
                    Ok(got) => {
                        count += got as u64;
                        hash.update(&buffer[..got]);
                        if count <= PREFIX {
                            state.prefix.extend_from_slice(&buffer[..got]);
                        }
                    }
                    Err(Errno::EINTR | Errno::EAGAIN) => {}
                    Err(why) => return Err(why.into()),
                }
            }
            state.ahead = count;
            if count > PREFIX {
                state.prefix = Vec::new();
                state.hash = hash.clone();
                state.hashed = count;
            }
        }
        Ok(state.ahead == read.bytes && text(&hash) == read.hash)
    }

    /// Has the application get what follows what it has `read`. Once it has got anything, that has to
    /// be the same.
    pub fn start_at(&self, read: Option<&Read>) -> io::Result<()> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.shared.hold()?;
        let bytes = read.map_or(0, |read| read.bytes);
        let missing = "it was read further than the saved state, or than can be kept, and cannot be \
                       read again";
        let missing = || io::Error::other(missing);
        if thread.is_some() {
            if state.read() != bytes {
                return Err(missing());
            }
        } else if read.is_some_and(|read| read.ended) {
            state.hashed = bytes;
            state.discarded = true;
        } else if state.prefix.len() as u64 == state.ahead {
            let at = usize::try_from(bytes).map_err(io::Error::other)?;
            let prefix = std::mem::take(&mut state.prefix);
            let (before, after) = prefix.split_at_checked(at).ok_or_else(missing)?;
            state.hash = blake3::Hasher::new();
            state.hash.update(before);
            state.hashed = bytes;
            state.pending = after.iter().copied().collect();
        } else if state.ahead != bytes {
            return Err(missing());
        }
        drop(state);
        if thread.is_none() {
            let shared = self.shared.clone();
            let carry = move || {
                if let Err(why) = shared.carry() {
                    log::error!("standard input cannot be carried to the application: {why}");
                }
            };
            let builder = std::thread::Builder::new().name("input".into());
            *thread = Some(builder.spawn(carry)?);
        }
        drop(thread);
        self.release();
        Ok(())
    }

    /// Keeps standard input still, with nothing in the application's pipe, and says how much of it
    /// the application has.
    pub fn hold(&self) -> io::Result<Read> {
        let state = self.shared.hold()?;
        Ok(Read {
            bytes: state.read(),
            hash: text(&state.hash),
            ended: state.discarded || state.ended && state.pending.is_empty(),
        })
    }

    pub fn release(&self) {
        self.shared.lock().held = false;
        self.shared.wake();
    }

    /// Ends the thread.
    pub fn finish(&self) {
        self.shared.lock().over = true;
        self.shared.wake();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread of the stage's input failed");
        }
    }
}

impl State {
    /// What the application has read, if our pipe is empty.
    fn read(&self) -> u64 {
        self.hashed + self.window.len() as u64
    }

    /// Moves all but the last `keep` bytes of the window into the hash.
    fn settle(&mut self, keep: usize) {
        let count = self.window.len().saturating_sub(keep);
        let settled: Vec<u8> = self.window.drain(..count).collect();
        self.hash.update(&settled);
        self.hashed += count as u64;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // It fails only if it is raised already.
        let _ = self.wake.write(1);
    }

    fn hold(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        state.held = true;
        if state.to.is_none() && crate::sys::unread(&self.back)? > 0 {
            // Its reader must not take the pipe's being empty for its end.
            let path = format!("/proc/self/fd/{}", self.back.as_raw_fd());
            let mut options = OpenOptions::new();
            let to = options.write(true).custom_flags(libc::O_NONBLOCK);
            state.to = Some(to.open(path)?.into());
        }
        let mut buffer = vec![0; self.size];
        let count = match nix::unistd::read(&self.back, &mut buffer) {
            Ok(count) => count,
            Err(Errno::EAGAIN) => 0,
            Err(why) => return Err(why.into()),
        };
        for byte in buffer[..count].iter().rev() {
            state.window.pop_back();
            state.pending.push_front(*byte);
        }
        state.settle(0);
        Ok(state)
    }

    fn carry(&self) -> io::Result<()> {
        loop {
            let next = self.next()?;
            let mut fds = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
            match &next {
                Next::End => return Ok(()),
                Next::Wait => {}
                Next::Read | Next::Discard => {
                    fds.push(PollFd::new(self.from.as_fd(), PollFlags::POLLIN))
                }
                Next::Write(to) => fds.push(PollFd::new(to.as_fd(), PollFlags::POLLOUT)),
            }
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(why) => return Err(why.into()),
            }
            let ready = fds.get(1).and_then(PollFd::any).unwrap_or(false);
            // Nothing to read is as good: it is looked at again in any case.
            let _ = self.wake.read();
            if ready {
                self.step()?;
            }
        }
    }

    fn next(&self) -> io::Result<Next> {
        let mut state = self.lock();
        if state.over {
            return Ok(Next::End);
        }
        if state.held {
            return Ok(Next::Wait);
        }
        if state.discarded {
            // Its reader sees the end.
            state.to = None;
            return Ok(match state.ended {
                true => Next::Wait,
                false => Next::Discard,
            });
        }
        Ok(match &state.to {
            Some(to) if !state.pending.is_empty() => Next::Write(to.try_clone()?),
            Some(_) if !state.ended => Next::Read,
            _ => {
                // Its reader sees the end.
                state.to = None;
                Next::Wait
            }
        })
    }

    /// Reads or writes once, if that is still what is to be done.
    fn step(&self) -> io::Result<()> {
        let mut state = self.lock();
        if state.held || state.over {
            return Ok(());
        }
        if state.pending.is_empty() {
            let mut buffer = vec![0; CHUNK];
            match nix::unistd::read(&self.from, &mut buffer) {
                Ok(0) => state.ended = true,
                Ok(_) if state.discarded => {}
                Ok(count) => state.pending.extend(&buffer[..count]),
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(why) => return Err(why.into()),
            }
            return Ok(());
        }
        let Some(to) = state.to.as_ref() else {
            return Ok(());
        };
        match nix::unistd::write(to, state.pending.as_slices().0) {
            Ok(count) => {
                let written: Vec<u8> = state.pending.drain(..count).collect();
                state.window.extend(written);
                if state.window.len() > 4 * self.size {
                    state.settle(self.size);
                }
            }
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(why) => return Err(why.into()),
        }
        Ok(())
    }
}

fn text(hash: &blake3::Hasher) -> String {
    hash.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Write as _};

    use super::*;

    fn not_told() -> AtomicBool {
        AtomicBool::new(false)
    }

    #[test]
    fn what_was_not_read_is_not_counted_and_comes_again() {
        let (script, mut write) = pipe().map(|(r, w)| (r, File::from(w))).unwrap();
        let (input, read) = Input::new(script).unwrap();
        let mut read = File::from(read);
        write.write_all(b"0123456789").unwrap();
        drop(write);
        input.start_at(None).unwrap();
        let mut got = [0; 4];
        read.read_exact(&mut got).unwrap();
        let held = input.hold().unwrap();
        assert_eq!((&got, held.bytes), (b"0123", 4));
        // Its end has been reached, but it must not be seen yet.
        assert!(!crate::sys::readable(&read, Some(Instant::now())).unwrap());
        input.release();
        let mut rest = String::new();
        read.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "456789");
        assert_eq!(input.hold().unwrap().bytes, 10);
        input.finish();

        // The next run, with the same and with another input.
        for (text, same, expected) in [("0123456789", true, "456789"), ("0x23", false, "0x23")] {
            let (script, mut write) = pipe().map(|(r, w)| (r, File::from(w))).unwrap();
            write.write_all(text.as_bytes()).unwrap();
            drop(write);
            let (input, read) = Input::new(script).unwrap();
            assert_eq!(input.read_ahead(&held, &not_told()).unwrap(), same);
            input.start_at(same.then_some(&held)).unwrap();
            let mut rest = String::new();
            File::from(read).read_to_string(&mut rest).unwrap();
            assert_eq!(rest, expected);
            assert_eq!(input.hold().unwrap().bytes, text.len() as u64);
            input.finish();
        }
    }

    #[test]
    fn one_that_has_read_all_needs_nothing_again() {
        let given = |text: &str| {
            let (script, mut write) = pipe().map(|(r, w)| (r, File::from(w))).unwrap();
            write.write_all(text.as_bytes()).unwrap();
            Input::new(script).map(|(input, read)| (input, File::from(read), write))
        };
        let (input, mut read, write) = given("all").unwrap();
        drop(write);
        input.start_at(None).unwrap();
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        let held = input.hold().unwrap();
        assert!(text == "all" && held.ended);
        input.finish();
        // Whoever writes in the next run is not kept waiting.
        let (input, mut read, mut write) = given("").unwrap();
        input.start_at(Some(&held)).unwrap();
        write.write_all(&vec![b'x'; 1 << 20]).unwrap();
        drop(write);
        assert_eq!(read.read_to_string(&mut text).unwrap(), 0);
        let again = input.hold().unwrap();
        assert_eq!((again.bytes, again.ended), (3, true));
        input.finish();
    }

    #[test]
    fn bytes_keep_their_order_while_checkpoints_are_taken() {
        let (script, write) = pipe().map(|(r, w)| (r, File::from(w))).unwrap();
        let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
        let (input, read) = Input::new(script).unwrap();
        input.start_at(None).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut write = write;
                write.write_all(&bytes).unwrap();
            });
            let reader = scope.spawn(|| {
                let mut got = Vec::new();
                File::from(read).read_to_end(&mut got).unwrap();
                got
            });
            let mut last = 0;
            while !reader.is_finished() {
                let held = input.hold().unwrap();
                assert!(held.bytes >= last);
                last = held.bytes;
                input.release();
            }
            assert!(reader.join().unwrap() == bytes);
        });
        let held = input.hold().unwrap();
        assert_eq!(held.bytes, bytes.len() as u64);
        assert_eq!(held.hash, blake3::hash(&bytes).to_hex().to_string());
        input.finish();
    }

    #[test]
    fn what_was_read_too_far_cannot_be_given_again() {
        let (script, mut write) = pipe().map(|(r, w)| (r, File::from(w))).unwrap();
        write.write_all(b"0123456789").unwrap();
        let (input, read) = Input::new(script).unwrap();
        input.start_at(None).unwrap();
        let mut got = [0; 4];
        File::from(read).read_exact(&mut got).unwrap();
        let read = |bytes| Read {
            bytes,
            hash: String::new(),
            ended: false,
        };
        assert!(input.start_at(Some(&read(2))).is_err());
        assert!(input.start_at(Some(&read(4))).is_ok());
        input.finish();
    }
}
