//! The socket itself: who may connect, how long a line may be, and that nobody is left connected
//! while the application is saved.
//!
//! Contract: one request per connection, answered at once. Nothing here blocks but
//! [`Door::close`], and that for at most [`FAREWELL`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::PollTimeout;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::protocol::{LINE_MAX, Reply, Request};

/// Most connections at one time. A client of ours is connected for less than a millisecond.
const MOST: usize = 32;

/// How long a client may take to ask, or to go once it is answered, before others may have its
/// place.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long closing waits for clients to close their ends as well.
const FAREWELL: Duration = Duration::from_millis(250);

/// The listening socket's number among the events; those of clients count up from 1.
const LISTENER: u64 = 0;

/// A socket that can be closed and opened again.
pub struct Door {
    /// The socket's directory. Held open, because the path of a socket has at most 107 bytes
    /// (unix(7)) and that of a store may have more.
    dir: File,
    name: PathBuf,
    epoll: Epoll,
    listener: Option<UnixListener>,
    clients: BTreeMap<u64, Client>,
    next: u64,
}

struct Client {
    stream: UnixStream,
    since: Instant,
    line: Vec<u8>,
    /// Our side is shut, the other's end is waited for.
    answered: bool,
}

impl Door {
    /// Opens a socket at `path`, in a directory that only the user can enter. One that an earlier
    /// run has left there is replaced.
    pub fn open(path: &Path) -> io::Result<Door> {
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let dir = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(dir)?;
        let mut door = Door {
            dir,
            name: name.into(),
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            listener: None,
            clients: BTreeMap::new(),
            next: LISTENER + 1,
        };
        door.reopen()?;
        Ok(door)
    }

    /// Lets clients in again after [`Door::close`]; does nothing on an open door.
    pub fn reopen(&mut self) -> io::Result<()> {
        if self.listener.is_some() {
            return Ok(());
        }
        let path = self.short();
        match std::fs::remove_file(&path) {
            Err(why) if why.kind() != io::ErrorKind::NotFound => return Err(why),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        self.epoll
            .add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        self.listener = Some(listener);
        Ok(())
    }

    /// Turns everybody out and lets nobody in. Who has been answered is waited for until it has
    /// seen the answer and closed its end; who has not will find the door closed, and asks again.
    pub fn close(&mut self) -> io::Result<()> {
        let Some(listener) = self.listener.take() else {
            return Ok(());
        };
        // From here on the path leads nowhere. Who has connected before is met below.
        let removed = match std::fs::remove_file(self.short()) {
            Err(why) if why.kind() != io::ErrorKind::NotFound => Err(why),
            _ => Ok(()),
        };
        let waiting = self.accept(&listener);
        self.epoll.delete(&listener)?;
        drop(listener);
        let end = Instant::now() + FAREWELL;
        for client in self.clients.values_mut().filter(|client| !client.answered) {
            client.part();
        }
        while !self.clients.is_empty() && Instant::now() < end {
            // All have been parted with: nothing is answered any more.
            self.events(crate::sys::until(Some(end)), &mut |_| {
                Reply::Busy(String::new())
            })?;
        }
        for number in self.clients.keys().copied().collect::<Vec<_>>() {
            self.forget(number)?;
        }
        removed.and(waiting)
    }

    /// Answers everybody who has asked.
    pub fn serve(&mut self, answer: &mut dyn FnMut(Request) -> Reply) -> io::Result<()> {
        while self.events(PollTimeout::ZERO, answer)? {}
        Ok(())
    }

    /// Handles what has happened, waiting for it until `limit`; false if nothing has.
    fn events(
        &mut self,
        limit: PollTimeout,
        answer: &mut dyn FnMut(Request) -> Reply,
    ) -> io::Result<bool> {
        let mut events = [EpollEvent::empty(); MOST];
        let count = match self.epoll.wait(&mut events, limit) {
            Err(nix::errno::Errno::EINTR) => return Ok(true),
            other => other?,
        };
        for event in &events[..count] {
            if event.data() == LISTENER {
                if let Some(listener) = self.listener.take() {
                    let accepted = self.accept(&listener);
                    self.listener = Some(listener);
                    accepted?;
                }
            } else if let Some(client) = self.clients.get_mut(&event.data())
                && client.hear(answer)
            {
                self.forget(event.data())?;
            }
        }
        Ok(count > 0)
    }

    /// Takes in everybody who has connected.
    fn accept(&mut self, listener: &UnixListener) -> io::Result<()> {
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(why) => match why.kind() {
                    io::ErrorKind::WouldBlock => return Ok(()),
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => continue,
                    _ => return Err(why),
                },
            };
            let uid = getsockopt(&stream, PeerCredentials)?.uid();
            if uid != 0 && uid != nix::unistd::geteuid().as_raw() {
                log::warn!("refused a request of user {uid}: it is not the one of this job");
                continue;
            }
            if self.clients.len() >= MOST {
                self.forget_slow()?;
            }
            if self.clients.len() >= MOST {
                continue;
            }
            stream.set_nonblocking(true)?;
            let events = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP;
            self.epoll
                .add(&stream, EpollEvent::new(events, self.next))?;
            let client = Client {
                stream,
                since: Instant::now(),
                line: Vec::new(),
                answered: false,
            };
            self.clients.insert(self.next, client);
            self.next += 1;
        }
    }

    fn forget_slow(&mut self) -> io::Result<()> {
        let slow: Vec<u64> = self
            .clients
            .iter()
            .filter(|(_, client)| client.since.elapsed() > PATIENCE)
            .map(|(number, _)| *number)
            .collect();
        slow.into_iter().try_for_each(|number| self.forget(number))
    }

    fn forget(&mut self, number: u64) -> io::Result<()> {
        match self.clients.remove(&number) {
            Some(client) => Ok(self.epoll.delete(&client.stream)?),
            None => Ok(()),
        }
    }

    fn short(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.dir.as_raw_fd())).join(&self.name)
    }
}

impl Client {
    /// Reads what has come, and answers a whole line. True once there is nothing more to do with
    /// this client.
    fn hear(&mut self, answer: &mut dyn FnMut(Request) -> Reply) -> bool {
        let mut bytes = [0; LINE_MAX];
        loop {
            let count = match self.stream.read(&mut bytes) {
                Ok(0) if self.answered || self.line.is_empty() => return true,
                // It says nothing more, so the line is whole.
                Ok(0) => {
                    bytes[0] = b'\n';
                    1
                }
                Ok(count) => count,
                Err(why) => match why.kind() {
                    io::ErrorKind::WouldBlock => return false,
                    io::ErrorKind::Interrupted => continue,
                    _ => return true,
                },
            };
            if self.answered {
                continue;
            }
            self.line.extend_from_slice(&bytes[..count]);
            let reply = match self.line.iter().position(|byte| *byte == b'\n') {
                Some(end) => match str::from_utf8(&self.line[..end]).map(str::parse) {
                    Ok(Ok(request)) => answer(request),
                    Ok(Err(why)) => Reply::Error(why),
                    Err(_) => Reply::Error("the request is no text".into()),
                },
                None if self.line.len() > LINE_MAX => {
                    Reply::Error(format!("a request has at most {LINE_MAX} bytes"))
                }
                None => continue,
            };
            // An answer is far smaller than what a socket takes at once.
            if let Err(why) = self.stream.write_all(format!("{reply}\n").as_bytes()) {
                log::debug!("a client has gone before its answer: {why}");
                return true;
            }
            self.part();
        }
    }

    /// Says that nothing more comes from here.
    fn part(&mut self) {
        self.answered = true;
        if let Err(why) = self.stream.shutdown(std::net::Shutdown::Write) {
            log::debug!("a client has gone: {why}");
        }
    }
}

impl AsFd for Door {
    /// Readable whenever [`Door::serve`] has something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if self.listener.is_some()
            && let Err(why) = std::fs::remove_file(self.short())
        {
            log::debug!("cannot remove the socket {}: {why}", self.name.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn door() -> (tempfile::TempDir, PathBuf, Door) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let door = Door::open(&path).unwrap();
        (dir, path, door)
    }

    fn echo(request: Request) -> Reply {
        Reply::Ok(request.to_string())
    }

    /// Serves until `client` is through.
    fn serve(door: &mut Door, client: impl FnOnce() -> String + Send + 'static) -> String {
        let client = thread::spawn(client);
        while !client.is_finished() {
            let soon = Instant::now() + Duration::from_millis(20);
            if crate::sys::readable(door, Some(soon)).unwrap() {
                door.serve(&mut echo).unwrap();
            }
        }
        client.join().unwrap()
    }

    fn ask(path: &Path, text: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        stream.write_all(text).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn one_line_is_answered_by_one_line() {
        let (_dir, path, mut door) = door();
        for (asked, answered) in [
            (&b"save\n"[..], "ok save\n"),
            (b"hold 5\nrelease\n", "ok hold 5\n"),
            (b"status", "ok status\n"),
            (b"", ""),
            (b"save me\n", "error `save me` is none of"),
            (b"\xff\n", "error the request is no text\n"),
            (
                &[b'x'; LINE_MAX + 1],
                "error a request has at most 256 bytes\n",
            ),
        ] {
            let path = path.clone();
            let answer = serve(&mut door, move || ask(&path, asked));
            assert!(answer.starts_with(answered), "{answer}");
        }
        assert!(door.clients.is_empty());
    }

    #[test]
    fn a_line_may_come_in_pieces_and_a_client_may_change_its_mind() {
        let (_dir, path, mut door) = door();
        drop(UnixStream::connect(&path).unwrap());
        let mut slow = UnixStream::connect(&path).unwrap();
        slow.write_all(b"time-").unwrap();
        door.serve(&mut echo).unwrap();
        assert_eq!(door.clients.len(), 1);
        slow.write_all(b"left\n").unwrap();
        let answer = serve(&mut door, move || {
            let mut answer = String::new();
            slow.read_to_string(&mut answer).unwrap();
            answer
        });
        assert_eq!(answer, "ok time-left\n");
    }

    #[test]
    fn a_closed_door_leaves_nobody_connected() {
        let (_dir, path, mut door) = door();
        // One that never asks, one that is served, one that nobody has looked at yet.
        let mut idle = UnixStream::connect(&path).unwrap();
        door.serve(&mut echo).unwrap();
        let mut late = UnixStream::connect(&path).unwrap();
        late.write_all(b"save\n").unwrap();
        let leaver = thread::spawn(move || {
            let mut answer = String::new();
            let end = late.read_to_string(&mut answer);
            (end.is_ok(), answer)
        });
        door.close().unwrap();
        assert!(door.clients.is_empty());
        let (clean, answer) = leaver.join().unwrap();
        assert!(
            clean && answer.is_empty(),
            "not answered, so that it asks again: {answer}"
        );
        assert_eq!(idle.read(&mut [0; 8]).unwrap(), 0);
        assert!(UnixStream::connect(&path).is_err());
        door.reopen().unwrap();
        door.reopen().unwrap();
        let answer = serve(&mut door, move || ask(&path, b"save\n"));
        assert_eq!(answer, "ok save\n");
    }

    #[test]
    fn clients_that_hang_do_not_shut_others_out_for_ever() {
        let (_dir, path, mut door) = door();
        let idle: Vec<UnixStream> = (0..MOST + 4)
            .map(|_| UnixStream::connect(&path).unwrap())
            .collect();
        door.serve(&mut echo).unwrap();
        assert_eq!(door.clients.len(), MOST);
        for client in door.clients.values_mut() {
            client.since -= PATIENCE + Duration::from_secs(1);
        }
        let answer = serve(&mut door, move || ask(&path, b"save\n"));
        assert_eq!(answer, "ok save\n");
        drop(idle);
    }

    #[test]
    fn a_long_path_and_what_an_earlier_run_left_are_no_trouble() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(150));
        std::fs::create_dir(&deep).unwrap();
        let path = deep.join("socket");
        std::fs::write(&path, "left").unwrap();
        let door = Door::open(&path).unwrap();
        assert!(path.exists());
        drop(door);
        assert!(!path.exists());
        assert!(Door::open(&dir.path().join("none/socket")).is_err());
    }
}
