//! What the engine outside and its agent inside say to each other: one JSON value per line over a
//! unix socket in the engine's working directory.
//!
//! The end of the connection means the end of the other side: an agent whose engine is gone kills
//! the application, so that nothing goes on that nobody watches.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::engine::End;

/// Longest line that is accepted, in bytes.
const LINE_MAX: usize = 1 << 20;

/// What the engine asks of the agent. Directories are names below the working directory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Start the application.
    Launch,
    /// Restore the application from the checkpoint in [`FROM`]. The files `keep` (device and inode)
    /// are the job's own output, which is not cut back.
    Restore {
        keep: Vec<(u64, u64)>,
    },
    /// Save the application into a new directory of that name. With `stop` it is left stopped and
    /// has to be met with [`Ask::Resume`] or [`Ask::Kill`].
    Dump {
        dir: String,
        stop: bool,
        limit_ms: u64,
    },
    Resume,
    /// Answers [`Say::Holds`].
    GoOn,
    /// Send a signal to the application's first process.
    Signal(i32),
    /// Kill every process and end.
    Kill,
}

/// What the agent says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Say {
    /// It waits for [`Ask::Launch`] or [`Ask::Restore`].
    Hello,
    /// The application runs.
    Running,
    /// The application does not run and never did.
    NotStarted(String),
    /// Every process of the application is held at the state that is saved, until [`Ask::GoOn`].
    Holds,
    /// The application is saved.
    Dumped,
    /// The application is not saved; `lost` says that it may no longer be sound.
    NotDumped { reason: String, lost: bool },
    /// The application ended.
    Ended(End),
}

/// The name of the checkpoint to restore from, below the working directory.
pub const FROM: &str = "from";

/// The name of the directory of CRIU's logs, below the working directory.
pub const LOG: &str = "log";

/// The socket, below the working directory.
const CONTROL: &str = "control";

/// Opens the working directory and names the socket through it: the path of a socket has at most
/// 107 bytes (unix(7)), that of a store may have more.
fn control(work: &Path) -> io::Result<(std::fs::File, PathBuf)> {
    let dir = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY)
        .open(work)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{CONTROL}", dir.as_raw_fd()));
    Ok((dir, path))
}

/// Waits at the socket of this working directory from now on.
pub fn listen(work: &Path) -> io::Result<UnixListener> {
    let (_dir, path) = control(work)?;
    UnixListener::bind(path)
}

/// Calls the engine that listens at this working directory.
pub fn call(work: &Path) -> io::Result<UnixStream> {
    let (_dir, path) = control(work)?;
    UnixStream::connect(path)
}

/// Sends one value.
pub fn send<T: Serialize>(mut socket: &UnixStream, value: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    socket.write_all(&line)
}

/// Takes values out of what arrives at a socket.
#[derive(Debug, Default)]
pub struct Lines {
    arrived: Vec<u8>,
}

impl Lines {
    /// The next value; waits for it where necessary. `None` is the end of the connection.
    pub fn next<T: DeserializeOwned>(&mut self, socket: &UnixStream) -> io::Result<Option<T>> {
        loop {
            if let Some(value) = self.waiting()? {
                return Ok(Some(value));
            }
            if !self.fill(socket)? {
                return Ok(None);
            }
        }
    }

    /// Takes what arrived, and waits for something where nothing did. False is the end of the
    /// connection.
    pub fn fill(&mut self, mut socket: &UnixStream) -> io::Result<bool> {
        if self.arrived.len() > LINE_MAX {
            return Err(io::Error::other("a line on the control socket is too long"));
        }
        let mut buffer = [0; 4096];
        match socket.read(&mut buffer) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.arrived.extend_from_slice(&buffer[..count]);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The next value, if it has arrived already.
    pub fn waiting<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let Some(end) = self.arrived.iter().position(|byte| *byte == b'\n') else {
            return Ok(None);
        };
        let value = serde_json::from_slice(&self.arrived[..end])?;
        self.arrived.drain(..=end);
        Ok(Some(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_through_whole_and_in_order_until_the_end() {
        let work = tempfile::tempdir().unwrap();
        let long = work.path().join("x".repeat(120));
        std::fs::create_dir(&long).unwrap();
        let listener = listen(&long).unwrap();
        let there = call(&long).unwrap();
        let (here, _) = listener.accept().unwrap();
        send(&there, &Say::Hello).unwrap();
        send(&there, &Say::Ended(End::Exit(7))).unwrap();
        let mut lines = Lines::default();
        assert!(matches!(lines.next(&here).unwrap(), Some(Say::Hello)));
        assert!(matches!(
            lines.waiting().unwrap(),
            Some(Say::Ended(End::Exit(7)))
        ));
        drop(there);
        assert!(lines.next::<Say>(&here).unwrap().is_none());
    }
}
