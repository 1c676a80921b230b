//! The application's end: `container-checkpoint inside …`.
//!
//! It runs as a process of the application and is saved and restored with it. So it holds nothing
//! open while it waits, it asks again instead of waiting for an event that would be lost with the
//! helper of an earlier run, and it counts how often it asked instead of looking at clocks, which
//! jump over a restart.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;

use super::protocol::{LINE_MAX, Outcome, Reply, Request};
use super::variable;

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(100);

/// How often nobody may answer before the helper is taken to be gone: a minute of the
/// application's own time. It is stopped for most of a checkpoint, and so is its client.
const TRIES: u32 = 600;

/// How long the helper may take for one answer. It answers at once.
const ANSWER: Duration = Duration::from_secs(10);

/// Longest answer that is read, in bytes.
const ANSWER_MAX: u64 = 64 << 10;

/// The path of a socket is shorter than this, in bytes (unix(7)).
const PATH_MAX: usize = 108;

/// The exit code where a checkpoint failed, or a hold was refused or had ended.
const FAILED: u8 = 1;
/// The exit code where no helper answers (EX_UNAVAILABLE of sysexits.h).
const NO_HELPER: u8 = 69;
/// The exit code where a checkpoint is in the way for too long (EX_TEMPFAIL of sysexits.h).
const BUSY: u8 = 75;

/// What can be asked.
#[derive(Debug, Subcommand)]
pub enum Ask {
    /// Ask for a checkpoint now; prints a ticket, or with --wait what became of it
    Save {
        /// Wait until there is a result: `saved GENERATION`, or `restarted GENERATION` if this
        /// process was restarted from it
        #[arg(long)]
        wait: bool,
    },
    /// Print what became of a checkpoint: waiting, saved GENERATION, restarted GENERATION, or
    /// failed and why
    Result {
        ticket: u64,
        #[arg(long)]
        wait: bool,
    },
    /// Print the seconds until the job's end, or `unlimited`
    TimeLeft,
    /// Let no checkpoint begin, for as long as the site allows or for SECONDS; prints the hold's
    /// number and its seconds
    Hold { seconds: Option<u64> },
    /// End a hold, by its number, or the one that would end first
    Release { number: Option<u32> },
    /// Print generation, holds and the last checkpoint's result
    Status,
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(
        "{} is not set: this program is not kept by container-checkpoint",
        variable::SOCKET
    )]
    NoVariable,
    #[error("no helper answers at {}: {why}", path.display())]
    NoHelper { path: PathBuf, why: io::Error },
    #[error("{0}; ask again later")]
    Busy(String),
    #[error("{0}")]
    Refused(String),
    #[error("cannot print the answer: {0}")]
    Print(io::Error),
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Failure::NoVariable | Failure::NoHelper { .. } => NO_HELPER,
            Failure::Busy(_) => BUSY,
            Failure::Refused(_) | Failure::Print(_) => FAILED,
        }
    }
}

/// Asks, prints the answer, and returns the exit code.
pub fn run(ask: &Ask) -> u8 {
    let Some(path) = std::env::var_os(variable::SOCKET).map(PathBuf::from) else {
        return fail(&Failure::NoVariable);
    };
    let mut asking = Asking {
        path,
        tries: TRIES,
        pause: PAUSE,
    };
    match asking.run(ask).and_then(|text| print(&text)) {
        Ok(()) => 0,
        Err(failure) => fail(&failure),
    }
}

fn fail(failure: &Failure) -> u8 {
    log::error!("{failure}");
    failure.code()
}

fn print(text: &str) -> Result<(), Failure> {
    match text {
        "" => Ok(()),
        text => writeln!(io::stdout(), "{text}").map_err(Failure::Print),
    }
}

struct Asking {
    path: PathBuf,
    tries: u32,
    pause: Duration,
}

impl Asking {
    fn run(&mut self, ask: &Ask) -> Result<String, Failure> {
        match *ask {
            Ask::Save { wait } => {
                let ticket = self.ask(Request::Save)?;
                match ticket.parse() {
                    Ok(ticket) if wait => self.result(ticket, true),
                    Ok(_) => Ok(ticket),
                    Err(_) => Err(Failure::Refused(format!(
                        "the ticket {ticket} is no number"
                    ))),
                }
            }
            Ask::Result { ticket, wait } => self.result(ticket, wait),
            Ask::TimeLeft => self.ask(Request::TimeLeft),
            Ask::Hold { seconds } => self.ask(Request::Hold(seconds)),
            Ask::Release { number } => self.ask(Request::Release(number)),
            Ask::Status => self.ask(Request::Status),
        }
    }

    fn result(&mut self, ticket: u64, wait: bool) -> Result<String, Failure> {
        loop {
            let outcome = self.ask(Request::Result(ticket))?.parse();
            match outcome.map_err(Failure::Refused)? {
                Outcome::Waiting if wait => std::thread::sleep(self.pause),
                Outcome::Failed(why) => {
                    return Err(Failure::Refused(format!("the checkpoint failed: {why}")));
                }
                outcome => return Ok(outcome.to_string()),
            }
        }
    }

    /// Asks until somebody answers.
    fn ask(&mut self, request: Request) -> Result<String, Failure> {
        let mut tries = 0;
        loop {
            let failure = match exchange(&self.path, request) {
                Ok(line) => match line.parse().map_err(Failure::Refused)? {
                    Reply::Ok(text) => return Ok(text),
                    Reply::Error(why) => return Err(Failure::Refused(why)),
                    Reply::Busy(why) => Failure::Busy(why),
                },
                Err(why) => {
                    let again = is_passing(&why);
                    let failure = Failure::NoHelper {
                        path: self.path.clone(),
                        why,
                    };
                    if !again {
                        return Err(failure);
                    }
                    failure
                }
            };
            tries += 1;
            if tries >= self.tries {
                return Err(failure);
            }
            std::thread::sleep(self.pause);
        }
    }
}

/// Whether this is what a client sees that comes while a checkpoint begins or is taken.
fn is_passing(why: &io::Error) -> bool {
    matches!(
        why.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::NotConnected
            | io::ErrorKind::UnexpectedEof
            | io::ErrorKind::WouldBlock
            | io::ErrorKind::TimedOut
            | io::ErrorKind::Interrupted
    )
}

/// One question, one answer. An error means that the question was not heard: the helper answers
/// what it has read before it closes.
fn exchange(path: &Path, request: Request) -> io::Result<String> {
    let mut stream = connect(path)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    let line = format!("{request}\n");
    debug_assert!(line.len() <= LINE_MAX);
    stream.write_all(line.as_bytes())?;
    let mut answer = String::new();
    (&stream).take(ANSWER_MAX).read_to_string(&mut answer)?;
    match answer.strip_suffix('\n') {
        Some(line) => Ok(line.to_owned()),
        None => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the answer was cut off",
        )),
    }
}

fn connect(path: &Path) -> io::Result<UnixStream> {
    match (path.parent(), path.file_name()) {
        // Only on the bare host: in a container the path is short.
        (Some(dir), Some(name)) if path.as_os_str().len() >= PATH_MAX => {
            let dir = std::fs::File::open(dir)?;
            let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
            UnixStream::connect(short.join(name))
        }
        _ => UnixStream::connect(path),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Known, Socket};
    use super::*;
    use std::time::Instant;

    /// Runs the client against a helper that takes checkpoints when asked.
    fn answered(
        socket: &mut Socket,
        path: &Path,
        ask: Ask,
        on_save: &mut dyn FnMut(&mut Socket),
    ) -> Result<String, Failure> {
        let mut asking = Asking {
            path: path.into(),
            tries: 1000,
            pause: Duration::from_millis(2),
        };
        let client = std::thread::spawn(move || asking.run(&ask));
        while !client.is_finished() {
            let soon = Instant::now() + Duration::from_millis(10);
            let ready = socket
                .fd()
                .map(|fd| crate::sys::readable(&fd, Some(soon)).unwrap());
            if ready == Some(true) {
                socket.serve(Known::default());
            }
            if socket.due().is_some() {
                on_save(socket);
            }
        }
        client.join().unwrap()
    }

    fn socket(dir: &tempfile::TempDir) -> (PathBuf, Socket) {
        // Longer than a socket's path may be.
        let deep = dir.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let path = deep.join("s");
        let socket = Socket::open(&path, Duration::from_secs(5), None);
        (path, socket)
    }

    #[test]
    fn who_waits_hears_the_result_of_this_run_or_of_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut socket) = socket(&dir);
        let mut good = |socket: &mut Socket| {
            socket.begin();
            socket.reopen();
            socket.finish(Ok(1));
        };
        let save = Ask::Save { wait: true };
        assert_eq!(
            answered(&mut socket, &path, save, &mut good).unwrap(),
            "saved 1"
        );

        let mut bad = |socket: &mut Socket| {
            socket.begin();
            socket.reopen();
            socket.finish(Err("the disk is full"));
        };
        let failure = answered(&mut socket, &path, Ask::Save { wait: true }, &mut bad).unwrap_err();
        assert_eq!(failure.code(), FAILED);
        assert_eq!(
            failure.to_string(),
            "the checkpoint failed: the disk is full"
        );

        // The helper's end comes with the checkpoint; another helper restarts the client.
        let mut end = |socket: &mut Socket| {
            socket.begin();
            *socket = Socket::open(&path, Duration::ZERO, Some(2));
        };
        let save = Ask::Save { wait: true };
        assert_eq!(
            answered(&mut socket, &path, save, &mut end).unwrap(),
            "restarted 2"
        );
    }

    #[test]
    fn a_ticket_can_be_asked_for_later() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut socket) = socket(&dir);
        let mut none = |_: &mut Socket| {};
        let mut ask = |ask| answered(&mut socket, &path, ask, &mut none);
        assert_eq!(ask(Ask::Save { wait: false }).unwrap(), "1");
        assert_eq!(
            ask(Ask::Result {
                ticket: 1,
                wait: false
            })
            .unwrap(),
            "waiting"
        );
        assert_eq!(
            ask(Ask::Result {
                ticket: 5,
                wait: true
            })
            .unwrap_err()
            .code(),
            FAILED
        );
        assert_eq!(ask(Ask::TimeLeft).unwrap(), "unlimited");
        assert!(ask(Ask::Status).unwrap().starts_with("generation=none "));
    }

    #[test]
    fn holds_are_numbered_and_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut socket) = socket(&dir);
        let mut none = |_: &mut Socket| {};
        let mut ask = |ask| answered(&mut socket, &path, ask, &mut none);
        assert_eq!(ask(Ask::Hold { seconds: None }).unwrap(), "1 5");
        assert_eq!(ask(Ask::Release { number: Some(1) }).unwrap(), "");
        assert_eq!(
            ask(Ask::Release { number: None }).unwrap_err().code(),
            FAILED
        );
        ask(Ask::Save { wait: false }).unwrap();
        // A hold that is asked for while a checkpoint waits is given after it.
        let mut save = |socket: &mut Socket| {
            socket.begin();
            socket.reopen();
            socket.finish(Ok(1));
        };
        let hold = Ask::Hold { seconds: Some(3) };
        assert_eq!(
            answered(&mut socket, &path, hold, &mut save).unwrap(),
            "2 3"
        );
    }

    #[test]
    fn where_nobody_answers_the_client_gives_up() {
        let dir = tempfile::tempdir().unwrap();
        let pause = Duration::from_millis(1);
        let mut asking = Asking {
            path: dir.path().join("none"),
            tries: 3,
            pause,
        };
        assert_eq!(asking.run(&Ask::TimeLeft).unwrap_err().code(), NO_HELPER);
    }
}
