//! The criu engine: CRIU without any privilege, inside user and process-id namespaces.
//!
//! It holds any program, static and musl ones too, and gives processes their ids back. In a container
//! it runs *inside*, through the directory of our own programs, beside an agent of ours (see
//! `agent`), which makes the namespaces; on the bare host the same agent does the same. The process
//! tree:
//!
//! ```text
//! container-checkpoint run …                 this process: streams, control socket
//! └─ apptainer exec --userns …               Running::child
//!    └─ container-checkpoint agent enter …   makes the namespaces
//!       └─ container-checkpoint agent serve  told what to do over WORK/control
//!          ├─ criu dump | criu restore       when it is asked for
//!          └─ the application                started by the agent, or restored beside it
//! ```
//!
//! What the application is called inside: uid 0, which is the user outside (CRIU can set ids back
//! only in a user namespace that maps uid 0), with no capability.

pub mod agent;
mod clocks;
pub mod files;
mod images;
pub mod probe;
mod protobuf;
mod rpc;
mod running;
mod streams;
mod wire;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;

use self::running::Application;
use self::streams::{Job, Record, Streams};
use self::wire::{Ask, Lines, Say};
use super::known::Doubt;
use super::{Engine, Kind, Running, Start, StartError};
use crate::container::{Bind, INSIDE, INSIDE_WORK, Inside, Place};
use crate::runtime::{HELPER, Runtime};
use crate::sys;

/// Where CRIU is looked for besides PATH: users rarely have sbin in theirs.
const PLACES: &[&str] = &["/usr/sbin/criu", "/usr/local/sbin/criu", "/sbin/criu"];

/// The oldest CRIU that works without privileges (3.18 brought `--unprivileged`).
const OLDEST: (u32, u32) = (3, 18);

/// How an image is entered so that CRIU works inside. With an overlay as root the files that a
/// process maps have other numbers than their paths: hence `--underlay`. Not `--fakeroot`: it would
/// give the user another home, and need an entry in /etc/subuid; our agent makes the user namespace
/// with a uid 0 that CRIU needs.
const FLAGS: &[&str] = &["--userns", "--underlay"];

/// What Apptainer says about one of [`FLAGS`]: the first every time, the second of an image that
/// has none of the files that it binds (any but small ones have more in those directories).
const UNDERLAY: [&str; 2] = [
    "Flag --underlay has been deprecated",
    "INFO:    underlay of ",
];

/// The most that is kept of what a container says before the application starts, in bytes.
const SAID_MAX: usize = 1 << 20;

/// CRIU as found on this node.
#[derive(Debug)]
pub struct Criu {
    program: PathBuf,
    version: String,
}

impl Criu {
    /// Finds CRIU: the program named in the configuration, or else in PATH and the usual places.
    ///
    /// # Errors
    /// [`StartError::Missing`] when there is none, or only one that cannot work here.
    pub fn find(configured: Option<&Path>) -> Result<Criu, StartError> {
        let program = match configured {
            Some(program) if program.is_file() => program.to_path_buf(),
            Some(program) => {
                return Err(StartError::Missing(format!(
                    "CRIU is not at {}, where the configuration says it is",
                    program.display()
                )));
            }
            None => in_path().ok_or_else(|| {
                StartError::Missing(
                    "CRIU is not installed on this node: no criu in PATH or /usr/sbin; its package \
                     is called criu"
                        .into(),
                )
            })?,
        };
        let out = Command::new(&program)
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| {
                StartError::Missing(format!("cannot run {}: {error}", program.display()))
            })?;
        let text = String::from_utf8_lossy(&out.stdout);
        // "Version: 4.1.1", then perhaps "GitID: …"
        let version = text
            .lines()
            .find_map(|line| line.strip_prefix("Version: "))
            .map(|version| version.trim().to_string())
            .ok_or_else(|| {
                StartError::Missing(format!("{} does not tell its version", program.display()))
            })?;
        match numbers(&version) {
            Some(numbers) if numbers >= OLDEST => Ok(Criu { program, version }),
            _ => Err(StartError::Missing(format!(
                "CRIU {version} in {} cannot work without privileges: {}.{} or newer is needed",
                program.display(),
                OLDEST.0,
                OLDEST.1
            ))),
        }
    }

    /// The program on the host, for [`Runtime::prepare`].
    pub fn program(&self) -> &Path {
        &self.program
    }

    fn begin(&self, start: &Start, job: Job, limit: Duration) -> Result<Application, StartError> {
        let failed = |what: &str, error: io::Error| StartError::Failed(format!("{what}: {error}"));
        let deadline = Instant::now() + limit;
        let saved = match &start.from {
            Some(from) => Some((
                Record::read(from).map_err(StartError::Failed)?,
                from.as_path(),
            )),
            None => None,
        };
        let saved = saved.as_ref().map(|(record, from)| (record, *from));
        let (streams, ends) = Streams::new(job, saved).map_err(StartError::Failed)?;
        let work = &start.work;
        fs::create_dir(work.join(wire::LOG)).map_err(|error| {
            failed(
                &format!("cannot make a directory in {}", work.display()),
                error,
            )
        })?;
        let listener = wire::listen(work).map_err(|error| {
            failed(
                &format!("cannot make a socket in {}", work.display()),
                error,
            )
        })?;

        let mut command = self.command(start)?;
        command
            .stdin(ends.input)
            .stdout(ends.output)
            .stderr(ends.error);
        let child = command.spawn().map_err(|error| {
            let program = command.get_program().display();
            StartError::Missing(format!("cannot run {program}: {error}"))
        })?;
        // Its copies of the pipes' ends would keep their other sides from ever seeing the end.
        drop(command);

        let mut starting = Starting {
            child,
            said: Vec::new(),
            asked: false,
            streams,
        };
        let begun = starting.meet(&listener, start.from.is_some(), deadline);
        let (socket, lines, agent) = match begun {
            Ok(begun) => begun,
            Err(reason) => return Err(starting.give_up(&reason)),
        };
        let child = Pid::from_raw(starting.child.id().cast_signed());
        let carried = starting.streams.carry();
        let carried = carried.map_err(|error| failed("cannot carry the streams", error))?;
        Application::new(child, agent, work, socket, lines, carried)
            .map_err(|error| failed("cannot listen to the agent", error))
    }

    /// The command that runs the agent.
    fn command(&self, start: &Start) -> Result<Command, StartError> {
        let programs = start.place.programs(&start.runtime);
        let work = start.place.work(&start.work);
        let mut inside = Inside {
            env: start.env.clone(),
            ..Inside::default()
        };
        match &start.place {
            Place::Bare => {
                if let Some(from) = &start.from {
                    let link = start.work.join(wire::FROM);
                    std::os::unix::fs::symlink(from, &link).map_err(|error| {
                        StartError::Failed(format!("cannot make {}: {error}", link.display()))
                    })?;
                }
            }
            Place::Apptainer(_) => {
                inside.flags = FLAGS.iter().map(OsString::from).collect();
                let bind = |host: &Path, inside: &Path, writable| Bind {
                    host: host.into(),
                    inside: inside.into(),
                    writable,
                };
                inside
                    .binds
                    .push(bind(&start.runtime, Path::new(INSIDE), false));
                inside
                    .binds
                    .push(bind(&start.work, Path::new(INSIDE_WORK), true));
                if let Some(from) = &start.from {
                    let point = start.work.join(wire::FROM);
                    fs::create_dir(&point).map_err(|error| {
                        StartError::Failed(format!("cannot make {}: {error}", point.display()))
                    })?;
                    inside
                        .binds
                        .push(bind(from, &Path::new(INSIDE_WORK).join(wire::FROM), false));
                }
            }
        }
        let mut argv = Runtime::argv(programs, HELPER);
        argv.extend([agent::SUBCOMMAND, agent::ENTER].map(OsString::from));
        argv.push(work.into());
        argv.push(programs.into());
        argv.extend(start.command.iter().cloned());
        inside.argv = argv;
        Ok(start.place.command(&inside))
    }
}

/// A container whose application does not run yet.
struct Starting {
    child: Child,
    /// What the container's own programs said so far.
    said: Vec<u8>,
    /// Whether the application was asked to run: then what comes is its own and stays in the pipes.
    asked: bool,
    streams: Streams,
}

impl Starting {
    /// Waits for the agent and has it start or restore the application.
    fn meet(
        &mut self,
        listener: &std::os::unix::net::UnixListener,
        restore: bool,
        deadline: Instant,
    ) -> Result<(UnixStream, Lines, Pid), String> {
        let failed = |error: io::Error| format!("cannot talk to the agent: {error}");
        let pid = Pid::from_raw(self.child.id().cast_signed());
        let ended = sys::pidfd(pid).map_err(failed)?;
        self.wait_for(listener, &ended, deadline)?;
        let (socket, _) = listener.accept().map_err(failed)?;
        let peer = getsockopt(&socket, PeerCredentials).map_err(|error| failed(error.into()))?;
        let agent = Pid::from_raw(peer.pid());
        let mut lines = Lines::default();
        loop {
            match lines.waiting().map_err(failed)? {
                Some(Say::Hello) => {
                    // Nothing but the container's own programs can have said anything by now.
                    self.streams.said(&mut self.said).map_err(failed)?;
                    self.streams.pass_on(&without_underlay(&self.said));
                    self.said.clear();
                    let ask = match restore {
                        true => Ask::Restore {
                            keep: self.streams.job_files(),
                        },
                        false => Ask::Launch,
                    };
                    wire::send(&socket, &ask).map_err(failed)?;
                    self.asked = true;
                }
                Some(Say::Running) => return Ok((socket, lines, agent)),
                Some(Say::NotStarted(reason)) => return Err(reason),
                Some(other) => return Err(format!("the agent said {other:?}")),
                None => {
                    self.wait_for(&socket, &ended, deadline)?;
                    if !lines.fill(&socket).map_err(failed)? {
                        return Err("the agent ended".into());
                    }
                }
            }
        }
    }

    /// Waits until `fd` is readable, and keeps what the container says meanwhile.
    fn wait_for(
        &mut self,
        fd: &impl AsFd,
        ended: &impl AsFd,
        deadline: Instant,
    ) -> Result<(), String> {
        loop {
            let mut fds = vec![
                PollFd::new(fd.as_fd(), PollFlags::POLLIN),
                PollFd::new(ended.as_fd(), PollFlags::POLLIN),
            ];
            if !self.asked && self.said.len() < SAID_MAX {
                fds.extend(
                    self.streams
                        .outputs()
                        .map(|fd| PollFd::new(fd, PollFlags::POLLIN)),
                );
            }
            match poll(&mut fds, sys::until(Some(deadline))) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(format!("cannot wait for the container: {error}")),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            if ready[0] {
                return Ok(());
            }
            if ready[1] {
                return Err("the container ended before the application was started".into());
            }
            if Instant::now() >= deadline {
                return Err("the container did not get ready within the time limit".into());
            }
            if ready[2..].iter().any(|ready| *ready) {
                self.streams
                    .said(&mut self.said)
                    .map_err(|error| format!("cannot read what the container says: {error}"))?;
            }
        }
    }

    /// Ends the container and says why.
    fn give_up(mut self, reason: &str) -> StartError {
        let mut said = std::mem::take(&mut self.said);
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait().map(drop)) {
            log::error!("cannot end the container: {error}");
        }
        if let Err(error) = self.streams.said(&mut said) {
            log::debug!("cannot read what the container said: {error}");
        }
        let said = without_underlay(&said);
        let said = String::from_utf8_lossy(&said);
        StartError::Failed(match said.trim() {
            "" => reason.into(),
            said => format!("{reason}: {said}"),
        })
    }
}

/// Checks a rank's files: ours and CRIU's.
fn verify(rank: &Path) -> Result<(), String> {
    Record::read(rank)?;
    clocks::read(rank)?;
    files::read(rank)?;
    images::verify(rank)
}

/// What a container said, without the lines that it says because of us.
fn without_underlay(said: &[u8]) -> Vec<u8> {
    said.split_inclusive(|byte| *byte == b'\n')
        .filter(|line| {
            let line = String::from_utf8_lossy(line);
            !UNDERLAY.iter().any(|said| line.contains(said))
        })
        .flatten()
        .copied()
        .collect()
}

/// CRIU in PATH, or where packages put it.
fn in_path() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join("criu"))
        .chain(PLACES.iter().map(PathBuf::from))
        .find(|program| program.is_file())
}

/// The first two numbers of a version such as `4.1.1` or `4.2`.
fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split(|c: char| !c.is_ascii_digit());
    let major = parts.next()?.parse().ok()?;
    let minor = parts
        .next()
        .and_then(|minor| minor.parse().ok())
        .unwrap_or(0);
    Some((major, minor))
}

impl Engine for Criu {
    fn kind(&self) -> Kind {
        Kind::Criu
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn can_hold(
        &self,
        place: &Place,
        _command: &[OsString],
        runtime: &Path,
    ) -> Result<Vec<Doubt>, StartError> {
        if let Place::Apptainer(apptainer) = place
            && apptainer.is_singularity()
        {
            return Err(StartError::Unable(format!(
                "{} is SingularityCE, whose exec has no --underlay, without which CRIU does not find \
                 the image's files; use --container-checkpoint-engine=dmtcp, or Apptainer",
                apptainer.program.display()
            )));
        }
        // Any program will do; the place has to be right.
        probe::probe(self, place, runtime).map(|()| Vec::new())
    }

    fn start(&self, start: &Start, limit: Duration) -> Result<Arc<dyn Running>, StartError> {
        if start.ranks.count > 1 {
            return Err(StartError::Unable(format!(
                "CRIU saves each process tree by itself, and this step has {} tasks that may talk to \
                 each other: use the dmtcp engine, or one task per step",
                start.ranks.count
            )));
        }
        super::refuse_typed(&start.command)?;
        let job = Job::of_this_process().map_err(|error| {
            StartError::Failed(format!("cannot use the standard streams: {error}"))
        })?;
        Ok(Arc::new(self.begin(start, job, limit)?))
    }

    fn verify(&self, files: &Path) -> Result<(), String> {
        verify(files)
    }

    fn written(&self, files: &Path) -> Result<Vec<(PathBuf, u64)>, String> {
        let written = files::read(files)?.into_iter();
        Ok(written.map(|file| (file.path, file.size)).collect())
    }
}
