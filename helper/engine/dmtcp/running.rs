//! An application under DMTCP: its checkpoints and its end.

use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use super::RANK;
use super::contained::{self, Wish};
use super::image_file::{self, SUFFIX, UNFINISHED_SUFFIX};
use super::packed;
use super::protocol::{Answer, Command};
use super::relay::{Relay, RelayError, Release};
use crate::engine::processes::{self, Process};
use crate::engine::{CheckpointError, End, Running, Then};
use crate::fault;

/// DMTCP ends a process with this code when it cannot go on (`DMTCP_FAIL_RC`).
const FAILED: i32 = 99;

/// How long processes may take to end once they were told to, before they are killed.
const ENDING: Duration = Duration::from_secs(10);

/// How often it is said that other ranks are waited for.
const OTHERS: Duration = Duration::from_secs(600);

/// How long the relay may need to hear of the coordinator's end.
const HEARING: Duration = Duration::from_millis(200);

/// How often the coordinator is asked again when nothing was heard. Events come first; an event may
/// pass before the coordinator has worked on it.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// An application that runs, and the relay that it depends on.
#[derive(Debug)]
pub(super) struct Application {
    pub child: Pid,
    pub relay: Mutex<Relay>,
    /// The directories into which DMTCP writes, on the host, of every rank in order. Empty but for
    /// rank 0, which alone is asked for checkpoints.
    pub images: Vec<PathBuf>,
    pub over: AtomicBool,
    /// Whether the user was told of what DMTCP forgets (see `Application::say_what_is_forgotten`).
    pub forgotten: AtomicBool,
    /// Whether the coordinator had ended before the application did.
    pub coordinator_lost: AtomicBool,
    /// Whether the application starts DMTCP by itself: then `child` and others may not be under it.
    pub by_itself: bool,
    pub wish: Option<Wish>,
}

/// Why the application is not (yet) running as a whole.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotRunning {
    #[error("the application ended")]
    Ended,
    #[error(transparent)]
    Relay(#[from] RelayError),
    #[error("not all of its processes were running within {0:?}")]
    Late(Duration),
}

/// Waits until all processes (at least `peers`) run.
pub(super) fn until_running(
    relay: &Relay,
    peers: u32,
    limit: Duration,
) -> Result<Answer, NotRunning> {
    let end = Instant::now() + limit;
    loop {
        let state = relay.state();
        if state.child_gone {
            return Err(NotRunning::Ended);
        }
        let answer = relay.ask(Command::Status)?;
        if answer.running && answer.peers >= peers.max(1) {
            return Ok(answer);
        }
        if Instant::now() >= end {
            return Err(NotRunning::Late(limit));
        }
        let again = end.min(Instant::now() + ASK_AGAIN);
        relay.wait(again, |now| (now.events != state.events).then_some(()));
    }
}

/// Whether all `peers` processes of a restart have gone on, where its child has ended since: then it
/// was the application that ended, and not the restart that failed.
pub(super) fn has_run(relay: &Relay, peers: u32) -> bool {
    // What they said last may still be on its way.
    let end = Instant::now() + ENDING;
    relay.wait(end, |now| (now.links == 0).then_some(()));
    relay.state().resumed >= peers.max(1)
}

/// The directories beside process images in which DMTCP keeps copies of files: those that were
/// deleted, and those mapped shared, such as glibc's gconv-modules.cache
/// (`fileconnection.cpp: getSavedFilePath`). A restart looks for them under the same path.
pub(super) fn copies(images: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(images)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("ckpt_") && name.ends_with("_files") && entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

impl Application {
    fn relay(&self) -> MutexGuard<'_, Relay> {
        self.relay.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until its process says how it has ended, too. To be asked only before the application is
    /// told to end: DMTCP has it end with code 0.
    fn gone(&self, relay: &Relay) -> CheckpointError {
        let why = "the application ended during the checkpoint".to_owned();
        let ended = relay.wait(Instant::now() + ENDING, |now| now.child_gone.then_some(()));
        // Left to be waited for. Any other end may be of DMTCP's making, as on a full disk; and the
        // other ranks cannot go on.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        match ended.map(|()| waitid(Id::Pid(self.child), flags)) {
            Some(Ok(WaitStatus::Exited(_, 0))) if self.images.len() == 1 => {
                CheckpointError::Ended(why)
            }
            _ => CheckpointError::Lost(why),
        }
    }

    /// Lets the application go on after a checkpoint that failed while all of it was stopped.
    fn go_on(&self, relay: &Relay, limit: Duration, why: String) -> CheckpointError {
        relay.release(Release::Pass);
        match until_running(relay, 1, limit) {
            Ok(_) => CheckpointError::Alive(why),
            Err(error) => CheckpointError::Lost(format!("{why}; and then {error}")),
        }
    }

    /// Ends what is left of the application.
    fn end(&self, relay: &Relay, left: &[Process], told: bool) {
        if told {
            let end = Instant::now() + ENDING;
            relay.wait(end, |now| (now.child_gone && now.links == 0).then_some(()));
        }
        processes::kill_all(left);
    }

    /// Has every process write, and returns while all are held.
    fn hold(&self, relay: &Relay, end: Instant) -> Result<(), CheckpointError> {
        let before = relay.state().written;
        relay.release(Release::Hold);
        let held = self.request(relay, end).and_then(|()| {
            point("dmtcp-requested").map_err(CheckpointError::Lost)?;
            let written = relay.wait(end, |now| {
                let gone = now.child_gone || now.coordinator_gone || now.foreign;
                (gone || now.written > before).then_some(!gone)
            });
            match written {
                Some(true) => Ok(()),
                Some(false) => Err(self.gone(relay)),
                None => Err(late()),
            }
        });
        match held {
            Ok(()) => self.say_what_is_forgotten(),
            Err(_) => relay.release(Release::Pass),
        }
        held
    }

    /// A process whose working directory is gone: DMTCP asks for its name at a checkpoint, and ends
    /// the application when there is none (seen with 4.1.1).
    fn without_directory(&self) -> Option<Process> {
        let gone = |process: &Process| {
            // The kernel's mark; a directory may be called so as well, but is there then.
            fs::read_link(format!("/proc/{}/cwd", process.pid))
                .is_ok_and(|dir| dir.as_os_str().as_bytes().ends_with(b" (deleted)"))
                && fs::metadata(format!("/proc/{}/cwd", process.pid))
                    .is_ok_and(|about| about.nlink() == 0)
        };
        processes::tree(self.child).into_iter().find(gone)
    }

    /// DMTCP saves no child that has ended and is not waited for: after a restart, to wait for it
    /// fails with ECHILD, which Python's `subprocess`, for one, takes for the exit code 0.
    fn say_what_is_forgotten(&self) {
        let mut ended = processes::tree(self.child);
        ended.retain(Process::has_ended);
        if ended.is_empty() || self.forgotten.swap(true, Ordering::AcqRel) {
            return;
        }
        let names: Vec<String> = ended
            .iter()
            .map(|process| format!("{} (process {})", process.name(), process.pid))
            .collect();
        log::warn!(
            "the checkpoint does not hold how {} ended: a program that waits for it only after a \
             restart will not learn its exit code; --container-checkpoint-engine=criu keeps it",
            names.join(", ")
        );
    }

    fn stop(
        &self,
        relay: &Relay,
        end: Instant,
        at_rest: &dyn Fn(),
    ) -> Result<Vec<Vec<PathBuf>>, CheckpointError> {
        self.hold(relay, end)?;
        at_rest();
        // Every process is stopped and has written, and none goes on before we say so.
        let checked = point("dmtcp-held").and_then(|()| self.files(UNFINISHED_SUFFIX, end));
        let files = match checked {
            Ok(files) => files,
            Err(why) => return Err(self.go_on(relay, ENDING, why)),
        };
        let left = processes::tree(self.child);
        relay.release(Release::Drop);
        if self.by_itself {
            // A script that waits for what is saved here must not hear of its end and go on: it has
            // to be the first to end.
            processes::kill_contents(&left);
            // Those of other ranks are out of reach.
            if self.images.len() > 1
                && let Err(error) = relay.ask(Command::Kill)
            {
                log::warn!("cannot tell the other ranks to end: {error}");
            }
            self.end(relay, &left, true);
            point("dmtcp-ended").map_err(CheckpointError::Lost)?;
            return Ok(files);
        }
        let told = relay.ask(Command::Kill);
        if let Err(error) = &told {
            log::warn!("cannot tell the application to end, it is killed: {error}");
        }
        self.end(relay, &left, told.is_ok());
        point("dmtcp-ended").map_err(CheckpointError::Lost)?;
        Ok(files)
    }

    fn go_through(
        &self,
        relay: &Relay,
        end: Instant,
        at_rest: &dyn Fn(),
    ) -> Result<Vec<Vec<PathBuf>>, CheckpointError> {
        self.hold(relay, end)?;
        at_rest();
        relay.release(Release::Pass);
        point("dmtcp-written").map_err(CheckpointError::Lost)?;
        // What remains is a rename in each process.
        let left = end.saturating_duration_since(Instant::now()).max(ENDING);
        match until_running(relay, 1, left) {
            Ok(_) => {}
            Err(NotRunning::Ended) => {
                // It ended by itself after the checkpoint; the files may be whole all the same.
                log::info!("the application ended right after a checkpoint");
            }
            Err(error) => return Err(CheckpointError::Lost(error.to_string())),
        }
        self.files(SUFFIX, end).map_err(CheckpointError::Alive)
    }

    /// Asks for a checkpoint until it is taken up: a process that starts or ends stands in its way.
    fn request(&self, relay: &Relay, end: Instant) -> Result<(), CheckpointError> {
        if self.by_itself && relay.state().links == 0 {
            return Err(CheckpointError::Alive(
                "nothing of it is under DMTCP at this moment: it starts DMTCP by itself, and does not \
                 run dmtcp_launch now, or calls it by another name or path"
                    .to_owned(),
            ));
        }
        loop {
            let left = end.saturating_duration_since(Instant::now());
            until_running(relay, 1, left).map_err(|error| match error {
                NotRunning::Ended => self.gone(relay),
                NotRunning::Relay(error @ RelayError::Ended(_)) => {
                    CheckpointError::Lost(error.to_string())
                }
                error => CheckpointError::Alive(format!(
                    "DMTCP does not have the application under control: {error}; a program that is \
                     linked statically would be a reason"
                )),
            })?;
            match relay.ask(Command::Checkpoint) {
                Ok(answer) if answer.taken => return Ok(()),
                Ok(_) if Instant::now() < end => {}
                Ok(_) => return Err(late()),
                Err(error) => return Err(CheckpointError::Lost(error.to_string())),
            }
        }
    }

    /// The whole and verified set of process images that end in `suffix`, for each rank. Those that an
    /// application has compressed (by changing `DMTCP_GZIP`, or taking it away) are plain then; `end`
    /// is when that has to be done.
    fn files(&self, suffix: &str, end: Instant) -> Result<Vec<Vec<PathBuf>>, String> {
        let mut all = Vec::new();
        for (rank, dir) in self.images.iter().enumerate() {
            let files = image_file::list(dir, suffix).map_err(|fault| fault.to_string())?;
            if files.is_empty() {
                return Err(match self.images.len() {
                    1 => "DMTCP wrote no process image".to_owned(),
                    _ => format!("rank {rank} has no process that could be saved; it has ended?"),
                });
            }
            for file in &files {
                packed::settle(file, end).map_err(|fault| fault.to_string())?;
            }
            all.push(files);
        }
        image_file::verify(&all.concat()).map_err(|fault| fault.to_string())?;
        Ok(all)
    }

    /// Moves process images to where they are wanted, under their final names.
    fn hand_over(&self, files: &[Vec<PathBuf>], into: &Path) -> Result<(), String> {
        for (rank, (files, images)) in files.iter().zip(&self.images).enumerate() {
            let dir = into.join(format!("{RANK}{rank}"));
            fs::create_dir(&dir)
                .map_err(|error| format!("cannot make the directory {}: {error}", dir.display()))?;
            let copies = copies(images)
                .map_err(|error| format!("cannot list {}: {error}", images.display()))?;
            for file in files.iter().chain(&copies) {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                let to = dir.join(name.strip_suffix(".temp").unwrap_or(&name));
                fs::rename(file, &to).map_err(|error| {
                    format!(
                        "cannot move {} to {}: {error}",
                        file.display(),
                        to.display()
                    )
                })?;
                point("dmtcp-handed-over")?;
            }
            if let Some(work) = images.parent() {
                contained::keep(work, &dir)
                    .map_err(|error| format!("cannot write into {}: {error}", dir.display()))?;
            }
        }
        Ok(())
    }

    fn empty(&self) -> Result<(), String> {
        for dir in &self.images {
            empty(dir).map_err(|error| format!("cannot empty {}: {error}", dir.display()))?;
        }
        Ok(())
    }
}

fn empty(dir: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

fn point(name: &str) -> Result<(), String> {
    fault::point(name).map_err(|error| error.to_string())
}

fn late() -> CheckpointError {
    CheckpointError::Lost(
        "the checkpoint was not finished in time and the application is stopped in it".to_owned(),
    )
}

impl Running for Application {
    fn child(&self) -> Pid {
        self.child
    }

    fn signal(&self, signal: Signal) {
        if signal == Signal::SIGUSR2 {
            // DMTCP stops threads with it.
            log::warn!("SIGUSR2 is not passed on: DMTCP uses it itself");
        } else if !self.over.load(Ordering::Acquire)
            && let Err(errno) = nix::sys::signal::kill(self.child, signal)
        {
            log::warn!("cannot pass {signal} on to the application: {errno}");
        }
    }

    fn checkpoint(
        &self,
        into: &Path,
        then: Then,
        limit: Duration,
        at_rest: &dyn Fn(),
    ) -> Result<(), CheckpointError> {
        let end = Instant::now() + limit;
        let relay = self.relay();
        if relay.state().foreign {
            return Err(CheckpointError::Alive(
                "a process of the application speaks to the coordinator in another version of \
                 DMTCP than 4.0 to 4.2"
                    .to_owned(),
            ));
        }
        if self.images.is_empty() {
            return Err(CheckpointError::Alive(
                "only rank 0 saves: the checkpoint is of all ranks".to_owned(),
            ));
        }
        if let Some(process) = self.without_directory() {
            return Err(CheckpointError::Alive(format!(
                "the working directory of {} (process {}) was deleted, and DMTCP would end the \
                 application",
                process.name(),
                process.pid
            )));
        }
        self.empty().map_err(CheckpointError::Alive)?;
        let taken = match then {
            Then::Continue => self
                .go_through(&relay, end, at_rest)
                .and_then(|files| self.hand_over(&files, into).map_err(CheckpointError::Alive)),
            Then::Stop => self
                .stop(&relay, end, at_rest)
                .and_then(|files| self.hand_over(&files, into).map_err(CheckpointError::Lost)),
        };
        if taken.is_err()
            && let Err(error) = self.empty()
        {
            log::warn!("{error}");
        }
        taken
    }

    fn wish(&self) -> Option<Duration> {
        self.wish.as_ref()?.interval()
    }

    fn wishes(&self) -> Option<BorrowedFd<'_>> {
        self.wish.as_ref().map(Wish::fd)
    }

    fn processes(&self) -> Vec<Process> {
        let mut found = processes::tree(self.child);
        found.retain(|process| !process.serves());
        found
    }

    fn ended(&self, status: WaitStatus) -> End {
        self.over.store(true, Ordering::Release);
        let mut relay = self.relay();
        if self.images.len() > 1 {
            // The other ranks cannot go on without the coordinator. Their end is waited for, however
            // long that takes: a step ends when all its tasks have.
            while relay
                .wait(Instant::now() + OTHERS, |now| {
                    (now.links == 0 || now.coordinator_gone).then_some(())
                })
                .is_none()
            {
                log::debug!("rank 0 has ended, the coordinator stays for the others");
            }
        }
        if matches!(status, WaitStatus::Exited(_, FAILED)) {
            // See `lost`: the relay may hear later of the coordinator's end than the application.
            relay.wait(Instant::now() + HEARING, |now| {
                now.coordinator_gone.then_some(())
            });
        }
        // Once the relay has stopped, the coordinator is gone in any case.
        let gone = relay.state().coordinator_gone;
        self.coordinator_lost.store(gone, Ordering::Release);
        relay.stop();
        match status {
            WaitStatus::Signaled(_, signal, _) => End::Signal(signal as i32),
            WaitStatus::Exited(_, code) => {
                if code == FAILED {
                    log::warn!(
                        "exit code {FAILED} is the application's own or DMTCP's, which ends a \
                         program with it when it cannot go on; DMTCP then said why on standard error"
                    );
                }
                End::Exit(code)
            }
            other => {
                log::error!("the application is said to have ended and has not: {other:?}");
                End::Exit(1)
            }
        }
    }

    fn lost(&self, status: WaitStatus) -> Option<String> {
        let gone = self.coordinator_lost.load(Ordering::Acquire);
        (gone && matches!(status, WaitStatus::Exited(_, FAILED)))
            .then(|| "DMTCP's coordinator ended, and the application with it".to_owned())
    }

    fn kill(&self) {
        // Not through the lock: a checkpoint that hangs holds it.
        processes::kill_all(&processes::tree(self.child));
    }
}
