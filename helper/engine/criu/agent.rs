//! The agent: this program once more, inside the container, next to the application.
//!
//! First it makes the namespaces that CRIU needs ([`enter`]): a user namespace with a uid 0, and
//! process-id and mount namespaces that belong to it. Its second process, the first one there, then
//! starts or restores the application, saves it on request by running CRIU beside it, passes signals
//! on and tells how the application ended. As first process it becomes the parent of whatever loses
//! its own: a restored process too, so that the true exit status is known; and with it everything
//! ends.
//!
//! Both block nearly all signals: what is sent to everything in the job must not end them before the
//! application.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::streams::Record;
use super::wire::{self, Ask, Lines, Say};
use super::{clocks, files, images, rpc};
use crate::engine::End;
use crate::fault;
use crate::runtime::{CRIU, HELPER, Runtime};
use crate::sys;

/// The hidden subcommand by which the helper runs as agent.
pub const SUBCOMMAND: &str = "agent";

/// What follows [`SUBCOMMAND`]: how it is started from outside,
pub const ENTER: &str = "enter";
/// what it is then, once it has its namespaces,
const SERVE: &str = "serve";
/// what it is for a moment, to start the application,
const LAUNCH: &str = "launch";
/// or to restore it,
const RESTORE: &str = "restore";
/// and a program that does nothing, which any image can run.
pub const IDLE: &str = "idle";

/// The application and its children get process ids above this one, all that is started before a
/// restore stays below: CRIU gives every process the id it had. Ids wrap around to 300.
const CLEAR: u32 = 5000;

/// What the kernel takes the next process id from, in this process-id namespace.
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// Where CRIU sees the streams of a process it restores: above what it uses itself.
const INHERITED: [i32; 3] = [107, 108, 109];

/// Where CRIU sees its request socket.
const REQUESTS: i32 = 110;

/// Where the process that starts the application finds the pipe to tell how that went.
const REPORT: i32 = 111;

/// The largest deleted file whose content CRIU keeps, in bytes (its own default is 1 MiB).
const GHOST_LIMIT: u64 = 2 << 30;

/// Runs the agent: `agent enter WORK PROGRAMS COMMAND…`, the first two being directories as seen
/// here. Returns the exit code.
pub fn main(arguments: &[OsString]) -> i32 {
    let role = arguments.first().and_then(|role| role.to_str());
    let run = || match (role, arguments.get(1..)) {
        (Some(ENTER), Some(rest)) => enter(rest),
        (Some(SERVE), Some(rest)) => Agent::new(rest).and_then(Agent::serve),
        (Some(LAUNCH), Some(command)) => launch(command),
        (Some(RESTORE), Some(rest)) => restore_in_time(rest),
        (Some(IDLE), _) => loop {
            nix::unistd::pause();
        },
        _ => Err(io::Error::other("it was started without its arguments")),
    };
    match run() {
        Ok(code) => code,
        Err(error) => {
            // Nobody may be left to hear it on the control socket.
            log::error!("the agent beside the application cannot go on: {error}");
            1
        }
    }
}

/// Makes new namespaces, starts the agent proper in them and waits for its end.
fn enter(arguments: &[OsString]) -> io::Result<i32> {
    sys::reset_dispositions();
    SigSet::all().thread_block()?;
    let failed = |what: &'static str| {
        move |error: io::Error| io::Error::other(format!("cannot {what}: {error}"))
    };
    let (user, group) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let flags = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID;
    nix::sched::unshare(flags)
        .map_err(io::Error::from)
        .map_err(failed("make user, mount and process-id namespaces"))?;
    // Without a privilege outside, one id can be mapped, and groups only if they are given up
    // (user_namespaces(7)).
    for (file, text) in [
        ("setgroups", "deny".into()),
        ("uid_map", format!("0 {user} 1")),
        ("gid_map", format!("0 {group} 1")),
    ] {
        fs::write(Path::new("/proc/self").join(file), text)
            .map_err(failed("map the user into its namespace"))?;
    }
    let [_, programs, ..] = arguments else {
        return Err(io::Error::other("it was started without its arguments"));
    };
    let argv = Runtime::argv(Path::new(programs), HELPER);
    let mut command = Command::new(&argv[0]);
    command
        .args(&argv[1..])
        .args([SUBCOMMAND, SERVE])
        .args(arguments);
    // The first process of the new process-id namespace: when it ends, all in it ends.
    sys::before_exec(&mut command, || sys::die_with_parent(libc::SIGKILL));
    let child = command
        .spawn()
        .map_err(failed("start the agent in its namespaces"))?;
    silence_own_streams()?;
    loop {
        match waitpid(pid(&child), None) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => sys::die_of(signal as i32),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Mounts a `/proc` that shows the new process-id namespace.
fn mount_proc() -> io::Result<()> {
    let none: Option<&str> = None;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, none)
        .map_err(|error| io::Error::other(format!("cannot mount /proc: {error}")))
}

struct Agent {
    work: PathBuf,
    programs: PathBuf,
    command: Vec<OsString>,
    socket: UnixStream,
    lines: Lines,
    /// What was asked while something else was waited for.
    deferred: Vec<Ask>,
    children: SignalFd,
    /// The standard streams of the application to come.
    streams: Option<[OwnedFd; 3]>,
    application: Option<Pid>,
    /// Whether the application is saved and stopped for good.
    stopped: bool,
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
        mount_proc()?;
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
            deferred: Vec::new(),
            children,
            streams: Some(streams),
            application: None,
            stopped: false,
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
            let deferred = (!self.deferred.is_empty()).then(|| self.deferred.remove(0));
            if let Some(ask) = deferred.map_or_else(|| self.lines.waiting(), |ask| Ok(Some(ask)))? {
                if self.answer(ask)? {
                    return Ok(0);
                }
                continue;
            }
            match self.wait(None, None)? {
                Event::Child => self.reap()?,
                Event::Asked if self.lines.fill(&self.socket)? => {}
                Event::Asked => return self.kill_all(),
                Event::Requests | Event::Late => {}
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
            Ask::Restore { keep } => {
                let said = match self.restore(&keep)? {
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
                    Ok(()) => {
                        self.stopped = stop;
                        self.say(&Say::Dumped)?;
                    }
                    Err((reason, lost)) => self.say(&Say::NotDumped { reason, lost })?,
                }
            }
            // It came too late to be waited for.
            Ask::GoOn => {}
            // CRIU stopped all of them; nothing else is here that could mind.
            Ask::Resume => {
                self.stopped = false;
                ignore_gone(kill(Pid::from_raw(-1), Signal::SIGCONT))?;
            }
            // Slurm sends it with the SIGTERM of a pre-emption. What the application did after it was
            // saved would be seen twice.
            Ask::Signal(libc::SIGCONT) if self.stopped => {}
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
    fn wait(&self, requests: Option<&OwnedFd>, deadline: Option<Instant>) -> io::Result<Event> {
        let mut fds = vec![
            PollFd::new(self.children.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(requests.map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, sys::until(deadline)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let events = [Event::Child, Event::Asked, Event::Requests];
        let ready = fds.iter().map(|fd| fd.any().unwrap_or(false));
        Ok(events
            .into_iter()
            .zip(ready)
            .find(|(_, ready)| *ready)
            .map_or(Event::Late, |(e, _)| e))
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

    /// Kills every process beside us.
    fn kill_all(&self) -> io::Result<i32> {
        ignore_gone(kill(Pid::from_raw(-1), Signal::SIGKILL))?;
        Ok(128 + Signal::SIGKILL as i32)
    }

    fn launch(&mut self) -> Result<(), String> {
        clear_pids(CLEAR)?;
        let Some([input, output, error]) = self.streams.take() else {
            return Err("the application was started before".into());
        };
        let failed = |error: io::Error| format!("cannot start the application: {error}");
        let (report, theirs) =
            nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|error| failed(error.into()))?;
        let argv = Runtime::argv(&self.programs, HELPER);
        let mut command = Command::new(&argv[0]);
        command
            .args(&argv[1..])
            .args([SUBCOMMAND, LAUNCH])
            .args(&self.command);
        command.stdin(input).stdout(output).stderr(error);
        sys::before_exec(&mut command, move || sys::inherit_as(&theirs, REPORT));
        let spawned = command.spawn().map_err(failed);
        // With it go our copies of what the application gets.
        drop(command);
        spawned?;
        let mut said = String::new();
        File::from(report)
            .read_to_string(&mut said)
            .map_err(failed)?;
        match said.parse() {
            Ok(pid) => self.application = Some(Pid::from_raw(pid)),
            Err(_) => return Err(said),
        }
        silence_own_streams().map_err(|error| format!("cannot let go of the streams: {error}"))
    }

    /// Restores what is in [`wire::FROM`].
    fn restore(&mut self, keep: &[(u64, u64)]) -> io::Result<Result<(), String>> {
        let from = self.work.join(wire::FROM);
        let (root, arguments) = match prepare_restore(&from, &self.work.join(wire::LOG), keep) {
            Ok(prepared) => prepared,
            Err(reason) => return Ok(Err(reason)),
        };
        let Some(ends) = self.streams.take() else {
            return Ok(Err("the application was started before".into()));
        };
        self.application = Some(root);
        let inherited = ends.iter().zip(INHERITED).map(|(end, number)| {
            let end = end.try_clone()?;
            Ok((end, number))
        });
        let inherited = inherited.collect::<io::Result<Vec<_>>>()?;
        let run = self.criu(&arguments, "restore.log", inherited, None, None)?;
        drop(ends);
        if let Err(failed) = run {
            self.application = None;
            self.end = None;
            return Ok(Err(failed.reason));
        }
        silence_own_streams()?;
        // What the application starts from now on must not take an id that something of ours has
        // in the next container.
        let highest = highest_pid()?;
        Ok(clear_pids(highest.max(CLEAR)))
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
        let images = File::open(&into)?;
        let logs = File::open(self.work.join(wire::LOG))?;
        let (socket, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        let log = format!("{dir}.log");
        let dump = rpc::Dump {
            pid: u64::from(root.as_raw().unsigned_abs()),
            images: u64::from(images.as_raw_fd().unsigned_abs()),
            work: u64::from(logs.as_raw_fd().unsigned_abs()),
            log: &log,
            stop,
            // Some processes may be in a long read from a slow file system.
            timeout: limit.as_secs().max(1),
            ghost_limit: GHOST_LIMIT,
        };
        send(socket.as_raw_fd(), &dump.packet(), MsgFlags::MSG_NOSIGNAL)?;
        let deadline = Instant::now() + limit;
        let arguments = ["swrk".into(), REQUESTS.to_string().into()];
        let inherited = vec![(theirs, REQUESTS)];
        let requests = Some((socket, into.as_path()));
        let run = self.criu(&arguments, &log, inherited, requests, Some(deadline))?;
        fault::point("agent-dumped")?;
        let late = Instant::now() >= deadline;
        // One that was killed has left the application as it was at that moment: stopped, with
        // CRIU's own code in it.
        Ok(run.map_err(|failed| (failed.reason, late || failed.killed)))
    }

    /// Answers what CRIU says on its request socket while it saves into `dir`; false if it says no
    /// more. The error is ours.
    fn converse(&mut self, requests: &OwnedFd, dir: &Path) -> Result<bool, String> {
        let mut packet = [0; 4096];
        let failed = |error: io::Error| format!("cannot talk to CRIU: {error}");
        let size = recv(requests.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT)
            .map_err(|error| failed(error.into()))?;
        if size == 0 {
            return Ok(false);
        }
        let mut recorded = Ok(());
        if let rpc::Said::Notice { post_dump } = rpc::said(&packet[..size])? {
            if post_dump {
                recorded = record(dir).and_then(|()| self.hold().map_err(failed));
            }
            let answer = rpc::noted(recorded.is_ok());
            send(requests.as_raw_fd(), &answer, MsgFlags::MSG_NOSIGNAL)
                .map_err(|error| failed(error.into()))?;
        }
        recorded.map(|()| true)
    }

    /// Tells the engine that all is held, and waits for its word. What else it asks meanwhile waits.
    fn hold(&mut self) -> io::Result<()> {
        self.say(&Say::Holds)?;
        loop {
            match self.lines.next(&self.socket)? {
                Some(Ask::GoOn) => return Ok(()),
                Some(other) => self.deferred.push(other),
                None => {
                    self.kill_all()?;
                    return Err(io::Error::other("the engine outside is gone"));
                }
            }
        }
    }

    /// Runs CRIU to its end, and kills it at `deadline`. It gets the descriptors `inherited` by
    /// those numbers; `requests` is our end of its request socket and the directory it saves into.
    fn criu(
        &mut self,
        arguments: &[OsString],
        log: &str,
        inherited: Vec<(OwnedFd, i32)>,
        mut requests: Option<(OwnedFd, &Path)>,
        deadline: Option<Instant>,
    ) -> io::Result<Result<(), Failed>> {
        let what = if requests.is_some() {
            "save"
        } else {
            "restore"
        };
        let logs = self.work.join(wire::LOG);
        let mut argv = Runtime::argv(&self.programs, CRIU);
        if requests.is_none() {
            let mut before = Runtime::argv(&self.programs, HELPER);
            before.extend([SUBCOMMAND, RESTORE].map(OsString::from));
            before.push(self.work.join(wire::FROM).into());
            argv.splice(..0, before);
        }
        let mut command = Command::new(&argv[0]);
        command.args(&argv[1..]).args(arguments);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        sys::before_exec(&mut command, move || {
            SigSet::empty().thread_set_mask()?;
            for (end, number) in &inherited {
                sys::inherit_as(end, *number)?;
            }
            Ok(())
        });
        let spawned = command.spawn();
        // With it go our copies of what CRIU inherited.
        drop(command);
        let child = match spawned {
            Ok(child) => child,
            Err(error) => {
                return Ok(Err(Failed {
                    reason: format!("cannot run CRIU: {error}"),
                    killed: false,
                }));
            }
        };
        let criu = pid(&child);
        self.criu = Some((criu, None));
        let mut killed = false;
        let mut trouble = None;
        let status = loop {
            if let Some((_, Some(status))) = self.criu {
                break status;
            }
            let deadline = deadline.filter(|_| !killed);
            let socket = requests.as_ref().map(|(socket, _)| socket);
            match self.wait(socket, deadline)? {
                Event::Child => self.reap()?,
                Event::Asked if self.lines.fill(&self.socket)? => {}
                Event::Asked => {
                    self.kill_all()?;
                    return Err(io::Error::other("the engine outside is gone"));
                }
                Event::Requests => {
                    let more = match &requests {
                        Some((socket, dir)) => self.converse(socket, dir),
                        None => Ok(false),
                    };
                    match more {
                        Ok(true) => {}
                        Ok(false) => requests = None,
                        // Its end follows from that.
                        Err(reason) => {
                            requests = None;
                            trouble = Some(reason);
                        }
                    }
                }
                Event::Late => {}
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                kill(criu, Signal::SIGKILL)?;
                killed = true;
            }
        };
        self.criu = None;
        if killed {
            return Ok(Err(Failed {
                reason: format!("CRIU did not {what} the application within the time limit"),
                killed,
            }));
        }
        if status == WaitStatus::Exited(criu, 0) {
            return Ok(Ok(()));
        }
        let complaints = complaints(&logs.join(log));
        let trouble = trouble
            .map(|trouble| format!("; {trouble}"))
            .unwrap_or_default();
        Ok(Err(Failed {
            reason: format!(
                "CRIU could not {what} the application ({}): {complaints}{trouble}",
                in_words(status)
            ),
            killed: matches!(status, WaitStatus::Signaled(..)),
        }))
    }
}

/// Why CRIU did not do what it was asked.
struct Failed {
    reason: String,
    /// Whether it was ended in the middle of it.
    killed: bool,
}

enum Event {
    Child,
    Asked,
    /// CRIU says something on its request socket.
    Requests,
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

/// Starts the application with clocks of its own (see `clocks`) and leaves it to the agent. Only
/// children enter a time namespace that a process makes, and neither the agent nor CRIU, when it
/// saves, may be in it: hence a process for this alone.
fn launch(command: &[OsString]) -> io::Result<i32> {
    // The application has to get neither this nor anything else above its standard streams.
    sys::close_from(3)?;
    let mut report = sys::inherited(REPORT)?;
    let said = match start(command) {
        Ok(child) => child.id().to_string(),
        Err(reason) => reason,
    };
    report.write_all(said.as_bytes())?;
    Ok(0)
}

fn start(command: &[OsString]) -> Result<Child, String> {
    let Some((program, arguments)) = command.split_first() else {
        return Err("no command was given".into());
    };
    clocks::own(None).map_err(|error| format!("cannot give it clocks of its own: {error}"))?;
    let mut command = Command::new(program);
    command.args(arguments);
    sys::before_exec(&mut command, || {
        nix::unistd::setsid()?;
        // As uid 0 it would have all over the user's own files.
        sys::drop_capabilities()?;
        SigSet::empty().thread_set_mask()?;
        Ok(())
    });
    command.spawn().map_err(|error| match error.kind() {
        // The same if its interpreter is missing.
        io::ErrorKind::NotFound => format!(
            "{} is not found; check the command and the container image",
            program.display()
        ),
        _ => format!("cannot start {}: {error}", program.display()),
    })
}

/// Records what CRIU does not, while it holds the processes that it saved into `dir`.
fn record(dir: &Path) -> Result<(), String> {
    fault::point("agent-holds").map_err(|error| error.to_string())?;
    let pids: Vec<u32> = images::processes(dir)?
        .iter()
        .map(|process| process.pid)
        .collect();
    if let Some(root) = pids.first() {
        clocks::record(*root, dir).map_err(|error| format!("cannot record its clocks: {error}"))?;
    }
    files::record(pids, dir)
        .map_err(|error| format!("cannot record the files that it writes: {error}"))
}

/// Runs CRIU's restore, `argv`, where the clocks go on from those in the checkpoint `from`.
fn restore_in_time(arguments: &[OsString]) -> io::Result<i32> {
    let [from, program, arguments @ ..] = arguments else {
        return Err(io::Error::other("it was started without its arguments"));
    };
    clocks::own(clocks::read(Path::new(from)).map_err(io::Error::other)?)?;
    let mut criu = Command::new(program).args(arguments).spawn()?;
    let status = criu.wait()?;
    match (status.code(), status.signal()) {
        (Some(code), _) => Ok(code),
        (None, signal) => sys::die_of(signal.unwrap_or(libc::SIGKILL)),
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

/// What has to be right before CRIU restores: files as they were. Gives the application's first
/// process and CRIU's arguments.
fn prepare_restore(
    from: &Path,
    logs: &Path,
    keep: &[(u64, u64)],
) -> Result<(Pid, Vec<OsString>), String> {
    let record = Record::read(from)?;
    for file in files::read(from)? {
        files::take_back(&file, keep)?;
    }
    let first = images::processes(from)?;
    let root = first.first().map(|process| process.pid).unwrap_or_default();
    let root = i32::try_from(root).map_err(|_| format!("{root} is no process id"))?;
    let mut arguments: Vec<OsString> = vec![
        "restore".into(),
        "--unprivileged".into(),
        "--restore-detached".into(),
        "--manage-cgroups=ignore".into(),
        "--file-locks".into(),
        "-v2".into(),
        "--log-file".into(),
        "restore.log".into(),
        "--work-dir".into(),
        logs.into(),
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

/// What CRIU's log complains of, for people: the first errors, without their places in its source.
fn complaints(log: &Path) -> String {
    const SHOWN: usize = 3;
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
    let mut said = match errors.len().min(SHOWN) {
        0 => "its log names no error".into(),
        shown => errors[..shown].join("; "),
    };
    let known = KNOWN
        .iter()
        .find(|(sign, _)| errors.iter().any(|error| error.contains(sign)));
    if let Some((_, meaning)) = known {
        said = format!("{meaning} ({said})");
    }
    said
}

/// Errors that CRIU logs in every rootless run.
const HARMLESS: &[&str] = &["net: Unexpected error", "rlimit: Can't setup RLIMIT_NOFILE"];

/// What some of CRIU's errors mean for the user.
const KNOWN: &[(&str, &str)] = &[
    (
        // Linux 6.16 refuses SO_PASSCRED where CRIU before 4.2 asks for it.
        "sockets: Can't get 1:16 opt",
        "it has a network socket open, which CRIU can save on this kernel from version 4.2 on",
    ),
    (
        "Connected TCP socket",
        "it has a network connection open, which cannot be saved",
    ),
    ("No space left on device", "the store is full"),
    ("Disk quota exceeded", "the store's quota is used up"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_the_first_real_errors() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let text = "(00.000001) Error (criu/net.c:1): net: Unexpected error -1\n\
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
}
