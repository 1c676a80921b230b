//! An application under CRIU, seen from outside its container.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use super::streams::Carried;
use super::wire::{self, Ask, Lines, Say};
use crate::engine::processes::{self, Process};
use crate::engine::{CheckpointError, End, Running, Then};
use crate::fault;

/// What is allowed on top of a checkpoint's limit for the agent to give its answer.
const ANSWER: Duration = Duration::from_secs(10);

/// How long what is in the output pipes may take to get to the job's files, while all is held.
const SETTLING: Duration = Duration::from_secs(5);

/// An application that an agent looks after.
pub struct Application {
    child: Pid,
    /// The agent, as this process's `/proc` shows it.
    agent: Pid,
    work: PathBuf,
    socket: Arc<UnixStream>,
    streams: Carried,
    dumps: AtomicU32,
    /// Answers to a request to save. Locked for the length of a checkpoint.
    answers: Mutex<Receiver<Say>>,
    end: Arc<Mutex<Option<End>>>,
    killed: AtomicBool,
    listener: Mutex<Option<JoinHandle<()>>>,
}

impl Application {
    /// Takes over once the agent said that the application runs.
    pub fn new(
        child: Pid,
        agent: Pid,
        work: &Path,
        socket: UnixStream,
        lines: Lines,
        streams: Carried,
    ) -> std::io::Result<Application> {
        let socket = Arc::new(socket);
        let end = Arc::new(Mutex::new(None));
        let (sender, answers) = channel();
        let (heard, noted) = (socket.clone(), end.clone());
        let listener = std::thread::Builder::new()
            .name("criu agent".into())
            .spawn(move || listen(&heard, lines, &sender, &noted))?;
        Ok(Application {
            child,
            agent,
            work: work.into(),
            socket,
            streams,
            dumps: AtomicU32::new(0),
            answers: Mutex::new(answers),
            end,
            killed: AtomicBool::new(false),
            listener: Mutex::new(Some(listener)),
        })
    }

    fn ask(&self, ask: &Ask) -> Result<(), String> {
        wire::send(&self.socket, ask)
            .map_err(|error| format!("cannot reach the agent in the container: {error}"))
    }

    /// Has the agent save the application into `dir` below the working directory.
    fn dump(
        &self,
        dir: &str,
        then: Then,
        limit: Duration,
        at_rest: &dyn Fn(),
    ) -> Result<(), CheckpointError> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let ask = Ask::Dump {
            dir: dir.into(),
            stop: then == Then::Stop,
            limit_ms,
        };
        self.ask(&ask).map_err(CheckpointError::Lost)?;
        fault::point("criu-asked").map_err(|error| CheckpointError::Lost(error.to_string()))?;
        let patience = limit.saturating_add(ANSWER);
        let mut answer = answers.recv_timeout(patience);
        if let Ok(Say::Holds) = answer {
            self.streams.settle(SETTLING);
            at_rest();
            self.ask(&Ask::GoOn).map_err(CheckpointError::Lost)?;
            answer = answers.recv_timeout(patience);
        }
        match answer {
            Ok(Say::Dumped) => Ok(()),
            Ok(Say::NotDumped {
                reason,
                lost: false,
            }) => Err(CheckpointError::Alive(reason)),
            Ok(Say::NotDumped { reason, .. }) => Err(CheckpointError::Lost(reason)),
            Ok(other) => Err(CheckpointError::Lost(format!(
                "the agent answered {other:?}"
            ))),
            Err(RecvTimeoutError::Timeout) => Err(CheckpointError::Lost(format!(
                "the agent in the container gave no answer within {limit:?}"
            ))),
            Err(RecvTimeoutError::Disconnected) => {
                let end = *self.end.lock().unwrap_or_else(PoisonError::into_inner);
                Err(CheckpointError::Lost(match end {
                    Some(_) => "the application ended before it was saved".into(),
                    None => "the agent in the container ended".into(),
                }))
            }
        }
    }
}

/// Sorts what the agent says until it is gone.
fn listen(socket: &UnixStream, mut lines: Lines, answers: &Sender<Say>, end: &Mutex<Option<End>>) {
    loop {
        match lines.next::<Say>(socket) {
            Ok(Some(Say::Ended(how))) => {
                *end.lock().unwrap_or_else(PoisonError::into_inner) = Some(how);
            }
            // Nobody waits for it only if the checkpoint was given up.
            Ok(Some(answer)) => drop(answers.send(answer)),
            Ok(None) => return,
            Err(error) => return log::error!("cannot understand the agent: {error}"),
        }
    }
}

impl Running for Application {
    fn child(&self) -> Pid {
        self.child
    }

    fn signal(&self, signal: Signal) {
        if let Err(error) = self.ask(&Ask::Signal(signal as i32)) {
            log::debug!("signal {signal} was not passed on: {error}");
        }
    }

    fn checkpoint(
        &self,
        into: &Path,
        then: Then,
        limit: Duration,
        at_rest: &dyn Fn(),
    ) -> Result<(), CheckpointError> {
        // CRIU writes inside the container, which sees the working directory only: the files are
        // moved from there.
        let dir = format!("dump-{}", self.dumps.fetch_add(1, Ordering::Relaxed) + 1);
        let from = self.work.join(&dir);
        let (record, held) = self.streams.hold();
        let dumped = self.dump(&dir, then, limit, at_rest);
        drop(held);
        let saved = dumped.and_then(|()| {
            let point = |name| fault::point(name).map_err(|error| error.to_string());
            let finish = || -> Result<(), String> {
                point("criu-dumped")?;
                record.write(&from)?;
                super::verify(&from)?;
                let rank = into.join("rank-0");
                fs::rename(&from, &rank).map_err(|error| {
                    format!(
                        "cannot move {} to {}: {error}",
                        from.display(),
                        rank.display()
                    )
                })?;
                point("criu-moved")
            };
            finish().map_err(|reason| {
                // It may go on: it is stopped, and whole.
                if then == Then::Stop
                    && let Err(error) = self.ask(&Ask::Resume)
                {
                    return CheckpointError::Lost(format!("{reason}; {error}"));
                }
                CheckpointError::Alive(reason)
            })
        });
        if saved.is_err()
            && let Err(error) = fs::remove_dir_all(&from)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            log::warn!(
                "cannot remove the failed checkpoint in {}: {error}",
                from.display()
            );
        }
        if saved.is_ok() && then == Then::Stop {
            self.kill();
        }
        saved
    }

    fn processes(&self) -> Vec<Process> {
        processes::below(self.agent)
    }

    fn ended(&self, status: WaitStatus) -> End {
        // The agent is gone, so both the connection and the pipes have their end.
        let listener = self
            .listener
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if listener.is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread that listens to the agent failed");
        }
        self.streams.finish();
        let end = *self.end.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(end) = end {
            return end;
        }
        if self.killed.load(Ordering::Relaxed) {
            return End::Signal(Signal::SIGKILL as i32);
        }
        match status {
            WaitStatus::Signaled(_, signal, _) => End::Signal(signal as i32),
            // Apptainer's first process in the container ends with 128 and the signal's number.
            WaitStatus::Exited(_, code) if code > 128 => End::Signal(code - 128),
            WaitStatus::Exited(_, code) => End::Exit(code),
            _ => End::Exit(1),
        }
    }

    fn lost(&self, _: WaitStatus) -> Option<String> {
        let told = self
            .end
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some();
        (!told && !self.killed.load(Ordering::Relaxed))
            .then(|| "the agent in the container ended, and the application with it".to_owned())
    }

    fn kill(&self) {
        self.killed.store(true, Ordering::Relaxed);
        if let Err(error) = self.ask(&Ask::Kill) {
            log::debug!("{error}");
        }
        // The agent ends, and with it everything in its process-id namespace. Should it be stuck,
        // this ends it as surely.
        match kill(self.agent, Signal::SIGKILL) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(error) => log::error!("cannot kill the agent in the container: {error}"),
        }
    }
}
