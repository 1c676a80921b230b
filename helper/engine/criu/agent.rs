//! The agent: this program once more, inside the container, next to the application.
//!
//! It starts or restores the application, saves it on request by running CRIU beside it, passes
//! signals on and tells how the application ended. It is the parent of whatever loses its own: a
//! restored process too becomes its child, so that the true exit status is known.
//!
//! It is started with nearly all signals blocked: what is sent to everything in the job must not
//! end it before the application.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::streams::Record;
use super::wire::{self, Ask, Lines, Say};
use super::{images, streams};
use crate::engine::End;
use crate::runtime::{CRIU, Runtime};
use crate::sys;

/// The hidden subcommand by which the helper runs as agent.
pub const SUBCOMMAND: &str = "agent";

/// The application and its children get process ids above this one, all that is started before a
/// restore stays below: CRIU gives every process the id it had. Ids wrap around to 300.
const CLEAR: u32 = 5000;

/// What the kernel takes the next process id from, in this process-id namespace.
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// Where CRIU sees the streams of a process it restores: above what it uses itself.
const INHERITED: [i32; 3] = [107, 108, 109];

/// The largest deleted file whose content CRIU keeps (its own default is 1 MiB).
const GHOST_LIMIT: &str = "2G";

/// Runs the agent: `agent WORK PROGRAMS COMMAND…`, the first two being directories as seen here.
/// Returns the exit code.
pub fn main(arguments: &[OsString]) -> i32 {
    match Agent::new(arguments).and_then(Agent::serve) {
        Ok(code) => code,
        Err(error) => {
            // Nobody may be left to hear it on the control socket.
            log::error!("the agent in the container cannot go on: {error}");
            1
        }
    }
}

struct Agent {
    work: PathBuf,
    programs: PathBuf,
    command: Vec<OsString>,
    socket: UnixStream,
    lines: Lines,
    children: SignalFd,
    /// The standard streams of the application to come.
    streams: Option<[OwnedFd; 3]>,
    application: Option<Pid>,
    /// How the application ended, once it did.
    end: Option<End>,
    /// How CRIU ended, once it did.
    criu: Option<(Pid, Option<WaitStatus>)>,
}

impl Agent {
    fn new(arguments: &[OsString]) -> io::Result<Agent> {
        sys::reset_dispositions();
        // SIGCHLD is read from a descriptor, which needs it blocked as well.
        SigSet::all().thread_block()?;
        let [work, programs, command @ ..] = arguments else {
            return Err(io::Error::other("it was started without its arguments"));
        };
        sys::close_from(3)?;
        nix::sys::prctl::set_child_subreaper(true)?;
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        let children = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let work = PathBuf::from(work);
        let socket = wire::call(&work)?;
        let streams = [
            io::stdin().as_fd().try_clone_to_owned()?,
            io::stdout().as_fd().try_clone_to_owned()?,
            io::stderr().as_fd().try_clone_to_owned()?,
        ];
        Ok(Agent {
            work,
            programs: programs.into(),
            command: command.to_vec(),
            socket,
            lines: Lines::default(),
            children,
            streams: Some(streams),
            application: None,
            end: None,
            criu: None,
        })
    }

    fn say(&self, say: &Say) -> io::Result<()> {
        wire::send(&self.socket, say)
    }

    /// Does what the engine asks, until the application or the connection ends.
    fn serve(mut self) -> io::Result<i32> {
        self.say(&Say::Hello)?;
        loop {
            if let Some(end) = self.end {
                self.say(&Say::Ended(end))?;
                return Ok(match end {
                    End::Exit(code) => code,
                    End::Signal(signal) => 128 + signal,
                });
            }
            if let Some(ask) = self.lines.waiting()? {
                if self.answer(ask)? {
                    return Ok(0);
                }
                continue;
            }
            match self.wait(None)? {
                Event::Child => self.reap()?,
                Event::Asked if self.lines.fill(&self.socket)? => {}
                Event::Asked => return self.kill_all(),
                Event::Late => {}
            }
        }
    }

    /// Answers one request; true if it was the last.
    fn answer(&mut self, ask: Ask) -> io::Result<bool> {
        match ask {
            Ask::Launch => {
                let said = match self.launch() {
                    Ok(()) => Say::Running,
                    Err(reason) => Say::NotStarted(reason),
                };
                self.say(&said)?;
            }
            Ask::Restore => {
                let said = match self.restore()? {
                    Ok(()) => Say::Running,
                    Err(reason) => Say::NotStarted(reason),
                };
                self.say(&said)?;
            }
            Ask::Dump {
                dir,
                stop,
                limit_ms,
            } => {
                let limit = Duration::from_millis(limit_ms);
                match self.dump(&dir, stop, limit)? {
                    Ok(()) => self.say(&Say::Dumped)?,
                    Err((reason, lost)) => self.say(&Say::NotDumped { reason, lost })?,
                }
            }
            // CRIU stopped all of them; nothing else is here that could mind.
            Ask::Resume => ignore_gone(kill(Pid::from_raw(-1), Signal::SIGCONT))?,
            Ask::Signal(number) => {
                if let (Some(pid), Ok(signal)) = (self.application, Signal::try_from(number)) {
                    ignore_gone(kill(pid, signal))?;
                }
            }
            Ask::Kill => {
                self.kill_all()?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Waits for the next event; until `deadline`, if there is one.
    fn wait(&self, deadline: Option<Instant>) -> io::Result<Event> {
        let mut fds = [
            PollFd::new(self.children.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, sys::until(deadline)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        if fds[0].any().unwrap_or(false) {
            return Ok(Event::Child);
        }
        if fds[1].any().unwrap_or(false) {
            return Ok(Event::Asked);
        }
        Ok(Event::Late)
    }

    /// Takes note of every child that ended.
    fn reap(&mut self) -> io::Result<()> {
        while self.children.read_signal()?.is_some() {}
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
                Ok(status) => self.ended(status),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn ended(&mut self, status: WaitStatus) {
        if let Some((pid, result)) = &mut self.criu
            && status.pid() == Some(*pid)
        {
            *result = Some(status);
        } else if self.application.is_some() && status.pid() == self.application {
            self.end = match status {
                WaitStatus::Exited(_, code) => Some(End::Exit(code)),
                WaitStatus::Signaled(_, signal, _) => Some(End::Signal(signal as i32)),
                _ => self.end,
            };
        }
    }

    /// Kills every process of this container but ourselves and its first one, which ends with us.
    fn kill_all(&self) -> io::Result<i32> {
        ignore_gone(kill(Pid::from_raw(-1), Signal::SIGKILL))?;
        Ok(128 + Signal::SIGKILL as i32)
    }

    fn launch(&mut self) -> Result<(), String> {
        clear_pids(CLEAR)?;
        let Some((program, arguments)) = self.command.split_first() else {
            return Err("no command was given".into());
        };
        let Some([input, output, error]) = self.streams.take() else {
            return Err("the application was started before".into());
        };
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(input)
            .stdout(output)
            .stderr(error);
        sys::before_exec(&mut command, || {
            nix::unistd::setsid()?;
            SigSet::empty().thread_set_mask()?;
            Ok(())
        });
        let child = command
            .spawn()
            .map_err(|error| format!("cannot start {}: {error}", program.display()))?;
        self.application = Some(pid(&child));
        silence_own_streams().map_err(|error| format!("cannot let go of the streams: {error}"))
    }

    /// Restores what is in [`wire::FROM`].
    fn restore(&mut self) -> io::Result<Result<(), String>> {
        let from = self.work.join(wire::FROM);
        let (root, arguments) = match self.prepare_restore(&from) {
            Ok(prepared) => prepared,
            Err(reason) => return Ok(Err(reason)),
        };
        let Some(ends) = self.streams.take() else {
            return Ok(Err("the application was started before".into()));
        };
        self.application = Some(root);
        let log = "restore.log";
        let run = self.criu(&arguments, log, Some(&ends), None)?;
        drop(ends);
        if let Err(reason) = run {
            self.application = None;
            self.end = None;
            return Ok(Err(reason));
        }
        silence_own_streams()?;
        // What the application starts from now on must not take an id that something of ours has
        // in the next container.
        let highest = highest_pid()?;
        Ok(clear_pids(highest.max(CLEAR)))
    }

    /// What has to be right before CRIU restores: files as they were. Gives the application's first
    /// process and CRIU's arguments.
    fn prepare_restore(&self, from: &Path) -> Result<(Pid, Vec<OsString>), String> {
        let record = Record::read(from)?;
        for file in images::written(from)? {
            take_back(&file)?;
        }
        let first = images::processes(from)?;
        let root = first.first().map(|process| process.pid).unwrap_or_default();
        let root = i32::try_from(root).map_err(|_| format!("{root} is no process id"))?;
        let mut arguments: Vec<OsString> = vec![
            "restore".into(),
            "--unprivileged".into(),
            "--restore-detached".into(),
            "--images-dir".into(),
            from.into(),
        ];
        let mut seen = Vec::new();
        for (number, inode) in INHERITED.iter().zip(record.pipes) {
            if !seen.contains(&inode) {
                arguments.push("--inherit-fd".into());
                arguments.push(format!("fd[{number}]:pipe:[{inode}]").into());
                seen.push(inode);
            }
        }
        Ok((Pid::from_raw(root), arguments))
    }

    /// Saves the application into a new directory; otherwise the reason, and whether it may have
    /// been harmed.
    fn dump(
        &mut self,
        dir: &str,
        stop: bool,
        limit: Duration,
    ) -> io::Result<Result<(), (String, bool)>> {
        let Some(root) = self.application else {
            return Ok(Err(("no application runs".into(), false)));
        };
        let into = self.work.join(dir);
        if let Err(error) = fs::create_dir(&into) {
            return Ok(Err((
                format!("cannot make {}: {error}", into.display()),
                false,
            )));
        }
        let arguments: Vec<OsString> = vec![
            "dump".into(),
            "--unprivileged".into(),
            "--tree".into(),
            root.to_string().into(),
            if stop {
                "--leave-stopped"
            } else {
                "--leave-running"
            }
            .into(),
            "--ghost-limit".into(),
            GHOST_LIMIT.into(),
            // Time to stop all processes; some may be in a long read from a slow file system.
            "--timeout".into(),
            limit.as_secs().max(1).to_string().into(),
            "--images-dir".into(),
            into.into(),
        ];
        let deadline = Instant::now() + limit;
        let run = self.criu(&arguments, &format!("{dir}.log"), None, Some(deadline))?;
        let late = Instant::now() >= deadline;
        Ok(run.map_err(|reason| (reason, late)))
    }

    /// Runs CRIU to its end, and kills it at `deadline`.
    fn criu(
        &mut self,
        arguments: &[OsString],
        log: &str,
        streams: Option<&[OwnedFd; 3]>,
        deadline: Option<Instant>,
    ) -> io::Result<Result<(), String>> {
        let logs = self.work.join(wire::LOG);
        let argv = Runtime::argv(&self.programs, CRIU);
        let what = arguments
            .first()
            .map(|word| word.display().to_string())
            .unwrap_or_default();
        let mut command = Command::new(&argv[0]);
        command.args(&argv[1..]).args(arguments);
        command.args([
            "--manage-cgroups=ignore",
            "--file-locks",
            "-v2",
            "--log-file",
            log,
        ]);
        command.arg("--work-dir").arg(&logs);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let passed = match streams {
            Some(ends) => {
                let [input, output, error] = ends;
                vec![
                    (input.try_clone()?, INHERITED[0]),
                    (output.try_clone()?, INHERITED[1]),
                    (error.try_clone()?, INHERITED[2]),
                ]
            }
            None => Vec::new(),
        };
        sys::before_exec(&mut command, move || {
            SigSet::empty().thread_set_mask()?;
            for (end, number) in &passed {
                sys::inherit_as(end, *number)?;
            }
            Ok(())
        });
        let child = match command.spawn() {
            Ok(child) => child,
            Err(error) => return Ok(Err(format!("cannot run CRIU: {error}"))),
        };
        let criu = pid(&child);
        self.criu = Some((criu, None));
        let mut killed = false;
        let status = loop {
            if let Some((_, Some(status))) = self.criu {
                break status;
            }
            let event = self.wait(if killed { None } else { deadline })?;
            match event {
                Event::Child => self.reap()?,
                Event::Asked if self.lines.fill(&self.socket)? => {}
                Event::Asked => {
                    self.kill_all()?;
                    return Err(io::Error::other("the engine outside is gone"));
                }
                Event::Late => {}
            }
            if !killed && deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                kill(criu, Signal::SIGKILL)?;
                killed = true;
            }
        };
        self.criu = None;
        if killed {
            return Ok(Err(format!(
                "CRIU did not end its {what} within its time limit"
            )));
        }
        match status {
            WaitStatus::Exited(_, 0) => Ok(Ok(())),
            status => Ok(Err(format!(
                "CRIU could not {what} the application ({}): {}",
                in_words(status),
                complaints(&logs.join(log))
            ))),
        }
    }
}

enum Event {
    Child,
    Asked,
    Late,
}

fn pid(child: &Child) -> Pid {
    // A process id fits, the standard library only gives it another sign.
    Pid::from_raw(child.id().cast_signed())
}

/// A process that is gone already needs no signal.
fn ignore_gone(result: nix::Result<()>) -> io::Result<()> {
    match result {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn in_words(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, code) => format!("exit code {code}"),
        WaitStatus::Signaled(_, signal, _) => format!("killed by {signal}"),
        other => format!("{other:?}"),
    }
}

/// Lets the next process get an id above `last`.
fn clear_pids(last: u32) -> Result<(), String> {
    fs::write(LAST_PID, last.to_string())
        .map_err(|error| format!("cannot keep process ids clear through {LAST_PID}: {error}"))
}

/// The highest process id that is in use here.
fn highest_pid() -> io::Result<u32> {
    let mut highest = 0;
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        if let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) {
            highest = highest.max(pid);
        }
    }
    Ok(highest)
}

/// The application has its streams now. As long as anyone else held their ends, their other side
/// would never see the end.
fn silence_own_streams() -> io::Result<()> {
    let null = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    Ok(())
}

/// Shortens a file that grew after the checkpoint. CRIU refuses any other size than it saw, and what
/// was written after the checkpoint will be written again.
fn take_back(file: &images::Written) -> Result<(), String> {
    let path = file.path.display();
    let size = match fs::symlink_metadata(&file.path) {
        Ok(about) if about.is_file() => about.len(),
        // Devices and directories have no size to care for; the rest is CRIU's to judge.
        Ok(_) => return Ok(()),
        Err(error) => {
            return Err(format!(
                "the application was writing {path} when it was saved, which cannot be found now: \
                 {error}; put it back, with at least {} bytes",
                file.size
            ));
        }
    };
    if size < file.size {
        return Err(format!(
            "the application was writing {path} when it was saved; it had {} bytes then and has \
             only {size} now: put it back",
            file.size
        ));
    }
    if size > file.size {
        fs::OpenOptions::new()
            .write(true)
            .open(&file.path)
            .and_then(|open| open.set_len(file.size))
            .map_err(|error| format!("cannot shorten {path} to its saved size: {error}"))?;
    }
    Ok(())
}

/// What CRIU's log complains of, for people: the last errors, without their places in its source.
fn complaints(log: &Path) -> String {
    const SHOWN: usize = 4;
    let text = match fs::read(log) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => return format!("it left no log ({error})"),
    };
    // "(00.012345)   5001: Error (criu/files-reg.c:1831): Can't lookup mount=…"
    let errors: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split_once("Error ("))
        .map(|(_, rest)| rest.split_once("): ").map_or(rest, |(_, what)| what).trim())
        .filter(|what| !HARMLESS.iter().any(|harmless| what.starts_with(harmless)))
        .collect();
    let first = errors.len().min(SHOWN);
    match first {
        0 => "its log names no error".into(),
        _ => errors[..first].join("; "),
    }
}

/// Errors that CRIU logs in every rootless run.
const HARMLESS: &[&str] = &["Unexpected error", "Can't setup RLIMIT_NOFILE"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_the_first_real_errors() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let text = "(00.000001) Error (criu/net.c:1): Unexpected error -1\n\
            (00.1) Warn  (criu/x.c:2): no\n\
            (00.2)   5001: Error (criu/files-reg.c:1831): Can't lookup mount=3 for fd=1\n\
            (00.3) Error (criu/cr-dump.c:2098): Dumping FAILED.\n";
        fs::write(log.path(), text).unwrap();
        assert_eq!(
            "Can't lookup mount=3 for fd=1; Dumping FAILED.",
            complaints(log.path())
        );
        assert!(complaints(Path::new("/none")).contains("no log"));
    }

    #[test]
    fn files_are_taken_back_only_to_what_they_had() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        fs::write(&path, "0123456789").unwrap();
        let written = |size| images::Written {
            path: path.clone(),
            size,
        };
        take_back(&written(10)).unwrap();
        take_back(&written(4)).unwrap();
        assert_eq!("0123", fs::read_to_string(&path).unwrap());
        let short = take_back(&written(5)).unwrap_err();
        assert!(short.contains("out") && short.contains("only 4"), "{short}");
        fs::remove_file(&path).unwrap();
        assert!(take_back(&written(5)).unwrap_err().contains("put it back"));
    }
}
