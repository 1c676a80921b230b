//! What an application may ask the helper that keeps it: a checkpoint, the time left, a moment
//! without checkpoints.
//!
//! ```text
//! application ── client (any program) ── socket ── helper: supervise
//! ```
//!
//! Contract: a connection that is open while its application is saved could not be restored, by
//! either engine. So connections are short, a request for a checkpoint is answered by a ticket
//! before the checkpoint begins, and between [`Socket::begin`] and [`Socket::reopen`] nobody is
//! connected. What waits for a ticket asks again, also in the run that it is restarted in.
//! [`Socket`] never fails: where there is no socket, an application cannot ask, and that is all.
//! It decides nothing: `supervise` asks what is [`Socket::due`] and [`Socket::held_until`].

pub mod client;
mod door;
pub mod environment;
mod holds;
mod protocol;
mod tickets;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::container::{INSIDE, INSIDE_WORK, Place};
use crate::runtime::CLIENT;
use door::Door;
use holds::Holds;
use protocol::{Outcome, Reply, Request};
use tickets::Tickets;

/// File names of the socket and of the environment's values (see [`environment`]).
const SOCKET: &str = "socket";
const ENVIRONMENT: &str = "environment";

/// How long after it was asked for a checkpoint begins. Who asks has just been started, often by a
/// shell that has become one program and then another, or is about to end. DMTCP's coordinator may
/// not have read yet what such a process has to tell it; a checkpoint that begins before that ends
/// the process (`waitForBarrier` in coordinatorapi.cpp of 4.1.1 expects one message sent twice, and
/// finds three), seen on a busy machine.
const SETTLE: Duration = Duration::from_millis(300);

/// Variables that lead an application to what is here.
pub mod variable {
    pub const SOCKET: &str = "CONTAINER_CHECKPOINT_SOCKET";
    pub const CLIENT: &str = "CONTAINER_CHECKPOINT_CLIENT";
    pub const ENVIRONMENT: &str = "CONTAINER_CHECKPOINT_ENVIRONMENT";
}

/// Where socket and environment of one rank are, on the host and as its application sees them. In
/// the place the paths are the same in every run: a restored process keeps its variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    pub socket: PathBuf,
    pub environment: PathBuf,
}

impl Paths {
    /// On the host. In a container all is below the working directory `work` of this run, which is
    /// bound to the same path in every run; on the bare host it is in the directory `cell` of the
    /// computation.
    pub fn on_host(place: &Place, cell: &Path, work: &Path, rank: u32) -> Paths {
        match place {
            Place::Bare => Paths::bare(cell, rank),
            Place::Apptainer(_) => Paths::below(work),
        }
    }

    fn bare(cell: &Path, rank: u32) -> Paths {
        Paths {
            socket: cell.join(format!("{SOCKET}-{rank}")),
            environment: cell.join(format!("{ENVIRONMENT}-{rank}")),
        }
    }

    fn below(work: &Path) -> Paths {
        Paths {
            socket: work.join(SOCKET),
            environment: work.join(ENVIRONMENT),
        }
    }
}

/// The variables that an application in `place` gets. `runtime` is the host directory of our
/// programs; the others are as for [`Paths::on_host`].
pub fn variables(
    place: &Place,
    cell: &Path,
    rank: u32,
    runtime: &Path,
) -> [(&'static str, PathBuf); 3] {
    let (paths, programs) = match place {
        Place::Bare => (Paths::bare(cell, rank), runtime),
        Place::Apptainer(_) => (Paths::below(Path::new(INSIDE_WORK)), Path::new(INSIDE)),
    };
    [
        (variable::SOCKET, paths.socket),
        (variable::CLIENT, programs.join(CLIENT)),
        (variable::ENVIRONMENT, paths.environment),
    ]
}

/// The helper's end.
pub struct Socket {
    door: Option<Door>,
    holds: Holds,
    tickets: Tickets,
    /// The newest generation that the application knows of.
    generation: Option<u64>,
    /// When somebody first asked for the checkpoint that is wanted.
    asked: Instant,
    /// Until when a checkpoint waits after the last release.
    quiet: Option<Instant>,
}

/// What `supervise` knows and applications ask for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Known {
    /// Until the job's end; None if it has none.
    pub time_left: Option<Duration>,
    /// A checkpoint waits for the end of a hold: nobody gets a new one.
    pub waiting: bool,
}

impl Socket {
    /// Opens the socket for an application that was `restarted` from this generation, or starts
    /// now. No hold will last longer than `hold_limit`.
    pub fn open(path: &Path, hold_limit: Duration, restarted: Option<u64>) -> Socket {
        let door = Door::open(path)
            .inspect_err(|why| {
                log::warn!(
                    "the application cannot ask for checkpoints: no socket at {}: {why}",
                    path.display()
                );
            })
            .ok();
        Socket {
            door,
            holds: Holds::new(hold_limit),
            tickets: Tickets::new(restarted),
            generation: restarted,
            asked: Instant::now(),
            quiet: None,
        }
    }

    /// What becomes readable when somebody asks; None if nobody can.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.door.as_ref().map(AsFd::as_fd)
    }

    /// Answers all who have asked.
    pub fn serve(&mut self, known: Known) {
        let Some(mut door) = self.door.take() else {
            return;
        };
        match door.serve(&mut |request| self.answer(request, known, Instant::now())) {
            Ok(()) => self.door = Some(door),
            Err(why) => log::warn!("applications can ask for nothing more: {why}"),
        }
    }

    /// When the checkpoint that somebody has asked for may begin, which may be past; None if nobody
    /// has.
    pub fn due(&self) -> Option<Instant> {
        let settled = self.asked + SETTLE;
        let due = self.held_until().map_or(settled, |end| end.max(settled));
        self.tickets.wanted().then_some(due)
    }

    /// Until when no checkpoint may begin.
    pub fn held_until(&self) -> Option<Instant> {
        let now = Instant::now();
        // Who has released a hold is a process that has just begun and is about to end, too.
        self.holds
            .until(now)
            .max(self.quiet.filter(|end| *end > now))
    }

    /// A checkpoint begins: nobody is connected when this returns.
    pub fn begin(&mut self) {
        self.tickets.begin();
        if let Some(door) = &mut self.door
            && let Err(why) = door.close()
        {
            log::warn!("cannot close the application's socket for a checkpoint: {why}");
        }
    }

    /// The application runs on: it may ask again.
    pub fn reopen(&mut self) {
        if let Some(door) = &mut self.door
            && let Err(why) = door.reopen()
        {
            log::warn!("the application can ask for nothing more: {why}");
            self.door = None;
        }
    }

    /// The checkpoint that has begun is over: committed as a generation, or failed.
    pub fn finish(&mut self, result: Result<u64, &str>) {
        self.tickets.finish(match result {
            Ok(generation) => {
                self.generation = Some(generation);
                Outcome::Saved(generation)
            }
            Err(why) => Outcome::Failed(why.into()),
        });
    }

    fn answer(&mut self, request: Request, known: Known, now: Instant) -> Reply {
        match request {
            Request::Save => {
                // Who asks again and again does not put it off for ever.
                if !self.tickets.wanted() {
                    self.asked = now;
                }
                Reply::Ok(self.tickets.ask().to_string())
            }
            Request::Result(ticket) => match self.tickets.result(ticket) {
                Some(outcome) => Reply::Ok(outcome.to_string()),
                None => Reply::Error(format!("there is no ticket {ticket}, or it is too old")),
            },
            Request::TimeLeft => Reply::Ok(seconds(known.time_left)),
            Request::Hold(_) if known.waiting || self.tickets.wanted() => {
                Reply::Busy("a checkpoint is about to be taken".into())
            }
            Request::Hold(asked) => match self.holds.hold(now, asked.map(Duration::from_secs)) {
                Ok(held) => Reply::Ok(format!("{} {}", held.number, held.length.as_secs())),
                Err(why) => Reply::Error(why.to_string()),
            },
            Request::Release(which) => match self.holds.release(now, which) {
                true => {
                    self.quiet = Some(now + SETTLE);
                    Reply::Ok(String::new())
                }
                false => Reply::Error("the hold has ended before, or never was".into()),
            },
            Request::Status => Reply::Ok(self.status(known, now)),
        }
    }

    fn status(&self, known: Known, now: Instant) -> String {
        let or_none = |number: Option<u64>| number.map_or("none".into(), |n| n.to_string());
        let held = self
            .holds
            .until(now)
            .map(|end| end - now)
            .unwrap_or_default();
        let (last, why) = match self.tickets.last() {
            None => ("none", ""),
            Some(Outcome::Failed(why)) => ("failed", why.as_str()),
            Some(Outcome::Waiting) => ("running", ""),
            Some(_) => ("saved", ""),
        };
        let status = format!(
            "generation={} restarted={} time-left={} holds={} held={} waiting={} last={last} {why}",
            or_none(self.generation),
            or_none(self.tickets.restarted()),
            seconds(known.time_left),
            self.holds.count(now),
            held.as_secs_f64().ceil(),
            if known.waiting || self.tickets.wanted() {
                "yes"
            } else {
                "no"
            },
        );
        status.trim_end().to_owned()
    }
}

fn seconds(left: Option<Duration>) -> String {
    left.map_or("unlimited".into(), |left| left.as_secs().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(restarted: Option<u64>) -> (tempfile::TempDir, Socket) {
        let dir = tempfile::tempdir().unwrap();
        let socket = Socket::open(&dir.path().join("s"), Duration::from_secs(60), restarted);
        assert!(socket.fd().is_some());
        (dir, socket)
    }

    fn ask(socket: &mut Socket, line: &str) -> String {
        let known = Known {
            time_left: Some(Duration::from_millis(90_500)),
            waiting: false,
        };
        socket
            .answer(line.parse().unwrap(), known, Instant::now())
            .to_string()
    }

    #[test]
    fn a_checkpoint_is_asked_for_and_its_result_told() {
        let (dir, mut socket) = socket(None);
        assert_eq!(socket.due(), None);
        assert_eq!(ask(&mut socket, "save"), "ok 1");
        let due = socket.due().unwrap();
        assert!(due > Instant::now() && due <= Instant::now() + SETTLE);
        assert_eq!(ask(&mut socket, "save"), "ok 1");
        assert_eq!(socket.due(), Some(due));
        assert_eq!(ask(&mut socket, "result 1"), "ok waiting");
        assert!(ask(&mut socket, "result 2").starts_with("error there is no ticket 2"));
        socket.begin();
        assert!(!dir.path().join("s").exists());
        assert_eq!(socket.due(), None);
        socket.reopen();
        assert!(dir.path().join("s").exists());
        assert_eq!(ask(&mut socket, "result 1"), "ok waiting");
        socket.finish(Ok(1));
        assert_eq!(ask(&mut socket, "result 1"), "ok saved 1");
        socket.begin();
        socket.finish(Err("the disk\nis full"));
        assert_eq!(
            ask(&mut socket, "status"),
            "ok generation=1 restarted=none time-left=90 holds=0 held=0 waiting=no last=failed \
             the disk is full"
        );
    }

    #[test]
    fn holds_are_not_given_while_a_checkpoint_waits() {
        let (_dir, mut socket) = socket(Some(4));
        assert_eq!(ask(&mut socket, "hold 10"), "ok 1 10");
        assert_eq!(ask(&mut socket, "hold"), "ok 2 60");
        assert!(socket.held_until().is_some());
        assert_eq!(ask(&mut socket, "save"), "ok 4000000001");
        assert_eq!(socket.due(), socket.held_until());
        assert!(ask(&mut socket, "hold").starts_with("busy "));
        assert_eq!(ask(&mut socket, "release 1"), "ok");
        assert_eq!(ask(&mut socket, "release"), "ok");
        assert!(ask(&mut socket, "release").starts_with("error "));
        let quiet = socket.held_until().unwrap();
        assert!(
            quiet <= Instant::now() + SETTLE,
            "what was released settles"
        );
        let waiting = Known {
            time_left: None,
            waiting: true,
        };
        let busy = socket.answer(Request::Hold(None), waiting, Instant::now());
        assert!(matches!(busy, Reply::Busy(_)));
        let status = socket
            .answer(Request::Status, waiting, Instant::now())
            .to_string();
        assert_eq!(
            status,
            "ok generation=4 restarted=4 time-left=unlimited holds=0 held=0 waiting=yes last=none"
        );
    }

    #[test]
    fn without_a_socket_nothing_fails() {
        let mut socket = Socket::open(Path::new("/nowhere/s"), Duration::ZERO, None);
        assert!(socket.fd().is_none());
        socket.serve(Known::default());
        socket.begin();
        socket.reopen();
        socket.finish(Ok(1));
        assert!(socket.due().is_none() && socket.held_until().is_none());
    }
}
