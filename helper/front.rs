//! A front: the process that Slurm sees, while the helper and the application live out of its reach.
//!
//! Where `proctrack/cgroup` finds a step's processes, Slurm sends SIGTERM to its own child only,
//! which is the helper. `proctrack/linuxproc` signals the whole tree found by parent pid
//! (kill_proc_tree() in its kill_tree.c) and `proctrack/pgid` the process group: the application
//! would die before it can be saved. There the process that slurmstepd started becomes a front:
//!
//! ```text
//!   slurmstepd ── front ═socket═ keeper ═socket═ helper ── engine, application
//!                 (in the tree)  └───── another session, child of init ─────┘
//! ```
//!
//! Contract: [`enter`] returns in the helper, or in the only process there is if none of this is
//! needed. The front passes on every signal and ends exactly as the helper ends. The keeper is the
//! subreaper of everything behind the front. Once the front is gone (SIGKILL at the end of
//! KillWait) or the helper has ended, it kills what is left until nothing is, and only then does the
//! front end. If the keeper is killed, helper and engine die with it (PDEATHSIG). A front that is
//! stopped (suspended job) stops everything but the helper, within a second.
//!
//! Processes behind a front keep their cgroups, limits and CPU binding; only what Slurm finds by
//! parent pid (jobacct_gather/linux) does not see them.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpid, getppid, setpgid, setsid};

use crate::supervise::Signals;
use crate::words::variable;

/// How soon a stopped front is noticed: nothing but its parent is told of it by an event. Slurm
/// itself takes 2 s from SIGTSTP to SIGSTOP.
const LOOK: Duration = Duration::from_secs(1);

/// The helper's end of a front.
pub struct Source {
    socket: OwnedFd,
    suspended: bool,
}

/// Puts a front before this process where Slurm would otherwise signal the application itself, and
/// returns in the process behind it, where `signals` has what the front gets. To be called before
/// any thread is made.
///
/// # Errors
/// Something that every front needs (a process, a socket) cannot be had. Nothing is left behind.
pub fn enter(signals: &mut Signals) -> io::Result<()> {
    if !needed() {
        return Ok(());
    }
    // From here on what comes stays with this process, which becomes the front.
    SigSet::all().thread_set_mask()?;
    let mut early = Vec::new();
    while let Some(signal) = signals.next()? {
        early.push(signal as i32);
    }
    let source = split(early)?;
    SigSet::empty().thread_set_mask()?;
    signals.come_from(source)
}

impl Source {
    /// The number of the next signal that the front has got, if there is one.
    pub fn next(&mut self) -> io::Result<Option<i32>> {
        loop {
            match receive(&self.socket)? {
                // Children that end: the front's own.
                Received::Message([libc::SIGCHLD, _]) => {}
                Received::Message([libc::SIGSTOP, _]) => self.suspended = true,
                Received::Message([number, _]) => {
                    self.suspended &= number != libc::SIGCONT;
                    return Ok(Some(number));
                }
                // The keeper is gone: PDEATHSIG ends this process.
                Received::Nothing | Received::End => return Ok(None),
            }
        }
    }

    /// Whether the job is suspended: everything but this process is stopped.
    pub fn suspended(&self) -> bool {
        self.suspended
    }

    /// A descriptor that is readable when `other` is or when a signal has come from the front.
    pub fn merged(&self, other: impl AsFd) -> io::Result<Epoll> {
        let both = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        both.add(&self.socket, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        both.add(other, EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
        Ok(both)
    }
}

// ------------------------------------------------------------------- whether a front is needed

/// Whether Slurm finds this process's children by parent pid or process group.
fn needed() -> bool {
    let proctrack = std::env::var(variable::PROCTRACK).ok();
    std::env::var_os("SLURM_JOB_ID").is_some()
        && !tracked_by_cgroup(proctrack.as_deref(), || {
            std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default()
        })
        && below_slurmstepd(getppid().as_raw(), stat)
}

/// Whether the step's processes are found by cgroup: as the plugin says, else as the freezer of
/// cgroup v1 says, which `proctrack/cgroup` alone uses. In cgroup v2 `task/cgroup` makes the same
/// directories, so nothing is known; a front that is not needed there does no harm.
fn tracked_by_cgroup(proctrack: Option<&str>, cgroups: impl Fn() -> String) -> bool {
    match proctrack {
        Some(kind) if !kind.is_empty() => kind == "cgroup",
        _ => cgroups().lines().any(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let freezer = fields.next() == Some("freezer");
            let path = fields.next().unwrap_or_default();
            freezer && path.contains("/job_") && path.contains("/step_")
        }),
    }
}

/// Whether slurmstepd is among the ancestors, as linuxproc finds it. What cannot be seen (hidepid)
/// is taken for it: it is another user's.
fn below_slurmstepd(parent: i32, stat: impl Fn(i32) -> Option<Stat>) -> bool {
    let mut pid = parent;
    while pid > 1 {
        match stat(pid) {
            Some(stat) if stat.comm == "slurmstepd" => return true,
            Some(stat) => pid = stat.parent,
            None => return true,
        }
    }
    false
}

// ------------------------------------------------------------------- the three processes

/// Makes this process a front and returns in the helper behind it, all signals blocked as here.
/// `early` has the signals that came before.
fn split(early: Vec<i32>) -> io::Result<Source> {
    let front = getpid();
    let (to_keeper, to_front) = pair()?;
    let in_foreground = crate::sys::in_foreground();
    if let Some(middle) = crate::sys::fork()? {
        drop(to_front);
        // It ends as soon as it has made the keeper.
        waitpid(middle, None)?;
        stand(&to_keeper, early)
    }
    drop(to_keeper);
    // From here on an error is this process's own; the front sees that nobody is left.
    behind(front, to_front, in_foreground).or_else(|why| {
        log::error!("cannot go behind a front: {why}");
        std::process::exit(1)
    })
}

/// In the middle process: leaves the tree and the process group. Returns in the helper.
fn behind(front: Pid, to_front: OwnedFd, in_foreground: bool) -> io::Result<Source> {
    if in_foreground {
        // A session of its own would lose the terminal.
        setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
    } else {
        setsid()?;
    }
    if crate::sys::fork()?.is_some() {
        std::process::exit(0);
    }
    let keeper = getpid();
    nix::sys::prctl::set_child_subreaper(true)?;
    let (to_helper, to_keeper) = pair()?;
    if let Some(helper) = crate::sys::fork()? {
        drop(to_keeper);
        let end = Keeper::new(front, to_front, to_helper, helper)
            .and_then(Keeper::keep)
            .inspect_err(|why| log::error!("what is behind the front is given up: {why}"));
        std::process::exit(end.is_err().into());
    }
    crate::sys::die_with_parent(libc::SIGKILL)?;
    if getppid() != keeper {
        return Err(io::Error::other("the keeper is gone"));
    }
    setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
    if in_foreground {
        nix::unistd::tcsetpgrp(io::stdin(), getpid())?;
    }
    Ok(Source {
        socket: to_keeper,
        suspended: false,
    })
}

/// The front: passes signals on, and ends as the helper did.
fn stand(keeper: &OwnedFd, early: Vec<i32>) -> ! {
    match pass_on(keeper, early) {
        Ok([EXITED, code]) => std::process::exit(code),
        Ok([_, signal]) => crate::sys::die_of(signal),
        Err(why) => {
            log::error!("the application was ended: {why}");
            std::process::exit(1)
        }
    }
}

fn pass_on(keeper: &OwnedFd, mut early: Vec<i32>) -> io::Result<Message> {
    become_small(c"ckpt-front")?;
    let signals = signal_fd(SigSet::all())?;
    // Plain tasks are killed with the slurmstepd that is killed; nobody would kill ours.
    let stepd = match stat(getppid().as_raw()) {
        Some(parent) if parent.comm == "slurmstepd" => Some(crate::sys::pidfd(getppid())?),
        _ => None,
    };
    let mut held = early.pop();
    loop {
        let to = if held.is_some() {
            PollFlags::POLLIN | PollFlags::POLLOUT
        } else {
            PollFlags::POLLIN
        };
        let mut fds = vec![
            PollFd::new(keeper.as_fd(), to),
            PollFd::new(
                signals.as_fd(),
                match held {
                    // What is not fetched stays pending.
                    Some(_) => PollFlags::empty(),
                    None => PollFlags::POLLIN,
                },
            ),
        ];
        if let Some(stepd) = &stepd {
            fds.push(PollFd::new(stepd.as_fd(), PollFlags::POLLIN));
        }
        poll(&mut fds, None)?;
        if fds.get(2).is_some_and(happened) {
            return Err(io::Error::other("slurmstepd is gone"));
        }
        match receive(keeper)? {
            Received::Message(end) => {
                // It ends once nothing is left; so do we.
                while !matches!(receive_waiting(keeper)?, Received::End) {}
                return Ok(end);
            }
            Received::End => return Err(io::Error::other("its keeper was killed")),
            Received::Nothing => {}
        }
        loop {
            if held.is_none() {
                held = match early.pop() {
                    Some(number) => Some(number),
                    None => signals.read_signal()?.map(|info| info.ssi_signo as i32),
                };
            }
            match held.map(|number| transmit(keeper, [number, 0])) {
                Some(Ok(true)) => held = None,
                Some(Ok(false)) | None => break,
                // Its last message is still to be read.
                Some(Err(why)) if why.kind() == io::ErrorKind::BrokenPipe => break,
                Some(Err(why)) => return Err(why),
            }
        }
    }
}

/// How the names of the processes begin that only wait.
pub const NAMES: &str = "ckpt-";

/// Frees what a process that only waits does not need: names itself, lets go of input and output.
/// Standard error stays, for messages.
fn become_small(name: &std::ffi::CStr) -> io::Result<()> {
    nix::sys::prctl::set_name(name)?;
    let null = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    Ok(())
}

/// The process between: relays signals, reaps, stops and kills.
struct Keeper {
    front: Pid,
    to_front: OwnedFd,
    to_helper: OwnedFd,
    helper: Pid,
    children: SignalFd,
    /// A signal that the helper has not had room for.
    held: Option<i32>,
    /// The helper has become another program, which gets its signals as any program does.
    unlinked: bool,
    stopped: bool,
}

impl Keeper {
    fn new(front: Pid, to_front: OwnedFd, to_helper: OwnedFd, helper: Pid) -> io::Result<Keeper> {
        become_small(c"ckpt-keeper")?;
        let mut only = SigSet::empty();
        only.add(Signal::SIGCHLD);
        Ok(Keeper {
            front,
            to_front,
            to_helper,
            helper,
            children: signal_fd(only)?,
            held: None,
            unlinked: false,
            stopped: false,
        })
    }

    /// Returns once nothing behind the front is left.
    fn keep(mut self) -> io::Result<()> {
        let mut next_look = Instant::now() + LOOK;
        loop {
            self.wait(next_look)?;
            if let Some(end) = self.reap()? {
                kill_descendants()?;
                // A front that is gone has nobody to tell it to.
                return match transmit(&self.to_front, end) {
                    Err(why) if why.kind() != io::ErrorKind::BrokenPipe => Err(why),
                    _ => Ok(()),
                };
            }
            if !self.relay()? {
                return kill_descendants();
            }
            if Instant::now() >= next_look {
                next_look = Instant::now() + LOOK;
                self.look()?;
            }
        }
    }

    fn wait(&mut self, until: Instant) -> io::Result<()> {
        let (from, to) = match self.held {
            // The end of the other side is told in any case.
            Some(_) => (PollFlags::empty(), PollFlags::POLLOUT),
            None => (PollFlags::POLLIN, PollFlags::empty()),
        };
        let mut fds = vec![
            PollFd::new(self.to_front.as_fd(), from),
            PollFd::new(self.children.as_fd(), PollFlags::POLLIN),
        ];
        if !self.unlinked {
            fds.push(PollFd::new(self.to_helper.as_fd(), to));
        }
        poll(&mut fds, Some(until))?;
        let closed = |fd: &PollFd| {
            fd.revents()
                .is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
        };
        self.unlinked |= fds.get(2).is_some_and(closed);
        Ok(())
    }

    /// Reaps what has ended, and says how the helper has.
    fn reap(&mut self) -> io::Result<Option<Message>> {
        while self.children.read_signal()?.is_some() {}
        let mut end = None;
        loop {
            let status = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(end),
                Ok(status) => status,
                Err(Errno::EINTR) => continue,
                Err(why) => return Err(why.into()),
            };
            match status {
                WaitStatus::Exited(pid, code) if pid == self.helper => end = Some([EXITED, code]),
                WaitStatus::Signaled(pid, signal, _) if pid == self.helper => {
                    end = Some([SIGNALED, signal as i32]);
                }
                _ => {}
            }
        }
    }

    /// Hands on what the front has sent; false once the front is gone.
    fn relay(&mut self) -> io::Result<bool> {
        loop {
            if self.held.is_none() {
                match receive(&self.to_front)? {
                    Received::Message([number, _]) => self.held = Some(number),
                    Received::Nothing => return Ok(true),
                    Received::End => return Ok(false),
                }
            }
            let Some(number) = self.held else {
                return Ok(true);
            };
            if number == libc::SIGCONT && self.stopped {
                self.stopped = false;
                signal_descendants(Signal::SIGCONT, None)?;
            }
            if !self.give(number)? {
                return Ok(!gone(&self.to_front)?);
            }
            self.held = None;
        }
    }

    /// Gives the helper a signal; false if it has no room for it now.
    fn give(&mut self, number: i32) -> io::Result<bool> {
        if !self.unlinked {
            match transmit(&self.to_helper, [number, 0]) {
                Err(why) if why.kind() == io::ErrorKind::BrokenPipe => self.unlinked = true,
                other => return other,
            }
        }
        if let Ok(signal) = Signal::try_from(number) {
            // If it has just ended, the next wait says so.
            let _ = kill(self.helper, signal);
        }
        Ok(true)
    }

    /// Stops everything if the front is stopped: again while it is, for what was just being forked.
    fn look(&mut self) -> io::Result<()> {
        let stopped = stat(self.front.as_raw()).is_some_and(|front| front.state == 'T');
        if stopped {
            let spared = (!self.unlinked).then_some(self.helper);
            signal_descendants(Signal::SIGSTOP, spared)?;
            if !self.stopped && !self.unlinked {
                // A helper that has no room for it is not waiting for anything now.
                self.give(libc::SIGSTOP)?;
            }
            self.stopped = true;
        }
        Ok(())
    }
}

// ------------------------------------------------------------------- everything behind a front

/// Kills all descendants of this process until none is left. Those that may not be killed (another
/// user's) are left alone.
fn kill_descendants() -> io::Result<()> {
    loop {
        let mut dying = Vec::new();
        for process in descendants()? {
            let pid = Pid::from_raw(process.pid);
            if process.state == 'Z' {
                continue;
            }
            // Opened before it is killed: afterwards its number may be free again.
            let Ok(fd) = crate::sys::pidfd(pid) else {
                continue;
            };
            if kill(pid, Signal::SIGKILL).is_ok() {
                dying.push(fd);
            }
        }
        if dying.is_empty() {
            return Ok(());
        }
        for fd in &dying {
            crate::sys::readable(fd, None)?;
        }
        // Their orphans are ours now; the next look finds them.
        while !matches!(
            waitpid(None, Some(WaitPidFlag::WNOHANG)),
            Ok(WaitStatus::StillAlive) | Err(_)
        ) {}
    }
}

fn signal_descendants(signal: Signal, spared: Option<Pid>) -> io::Result<()> {
    for process in descendants()? {
        let pid = Pid::from_raw(process.pid);
        let there_already = signal == Signal::SIGSTOP && process.state == 'T';
        if spared != Some(pid) && !there_already {
            // It may have ended, and another user's is not ours to stop.
            let _ = kill(pid, signal);
        }
    }
    Ok(())
}

/// All processes below this one, found by parent pid.
fn descendants() -> io::Result<Vec<Stat>> {
    let mut children: HashMap<i32, Vec<Stat>> = HashMap::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let pid = name.to_str().and_then(|name| name.parse().ok());
        if let Some(process) = pid.and_then(stat) {
            children.entry(process.parent).or_default().push(process);
        }
    }
    let mut found = Vec::new();
    let mut parents = vec![getpid().as_raw()];
    while let Some(parent) = parents.pop() {
        let below = children.remove(&parent).unwrap_or_default();
        parents.extend(below.iter().map(|process| process.pid));
        found.extend(below);
    }
    Ok(found)
}

/// What /proc/PID/stat says of a process (proc_pid_stat(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    pid: i32,
    pub comm: String,
    state: char,
    pub parent: i32,
}

/// Whether slurmstepd has started this process itself; None if that cannot be seen.
pub fn is_task() -> Option<bool> {
    stat(getppid().as_raw()).map(|parent| parent.comm == "slurmstepd")
}

pub fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_stat(text: &str) -> Option<Stat> {
    // The name may hold blanks and parentheses.
    let (before, after) = text.rsplit_once(") ")?;
    let (pid, comm) = before.split_once(" (")?;
    let mut fields = after.split(' ');
    Some(Stat {
        pid: pid.parse().ok()?,
        comm: comm.to_owned(),
        state: fields.next()?.chars().next()?,
        parent: fields.next()?.parse().ok()?,
    })
}

// ------------------------------------------------------------------- messages

/// Downwards: a signal's number. Upwards: how the helper ended, and its code or signal.
type Message = [i32; 2];

const EXITED: i32 = 1;
const SIGNALED: i32 = 2;

enum Received {
    Message(Message),
    Nothing,
    /// The other side is gone.
    End,
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?)
}

/// Sends a message; false if there is no room for it.
fn transmit(to: &OwnedFd, [kind, value]: Message) -> io::Result<bool> {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&kind.to_ne_bytes());
    bytes[4..].copy_from_slice(&value.to_ne_bytes());
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    match send(to.as_raw_fd(), &bytes, flags) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(false),
        Err(why) => Err(why.into()),
    }
}

fn receive(from: &OwnedFd) -> io::Result<Received> {
    receive_with(from, MsgFlags::MSG_DONTWAIT)
}

fn receive_waiting(from: &OwnedFd) -> io::Result<Received> {
    receive_with(from, MsgFlags::empty())
}

fn receive_with(from: &OwnedFd, flags: MsgFlags) -> io::Result<Received> {
    let mut bytes = [0; 8];
    loop {
        match recv(from.as_raw_fd(), &mut bytes, flags) {
            Ok(8) => {
                let [a, b, c, d, e, f, g, h] = bytes;
                return Ok(Received::Message([
                    i32::from_ne_bytes([a, b, c, d]),
                    i32::from_ne_bytes([e, f, g, h]),
                ]));
            }
            Ok(_) => return Ok(Received::End),
            // It ended without having read all of ours. What it has sent can still be read.
            Err(Errno::ECONNRESET) => {}
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Received::Nothing),
            Err(why) => return Err(why.into()),
        }
    }
}

/// Whether the other side of a socket that is not read now is gone.
fn gone(socket: &OwnedFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    poll(&mut fds, Some(Instant::now()))?;
    Ok(happened(&fds[0]))
}

fn happened(fd: &PollFd) -> bool {
    fd.any().unwrap_or(false)
}

fn poll(fds: &mut [PollFd], until: Option<Instant>) -> io::Result<()> {
    match nix::poll::poll(fds, crate::sys::until(until)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(why) => Err(why.into()),
    }
}

/// A descriptor for `signals`; all are blocked from now on.
fn signal_fd(signals: SigSet) -> io::Result<SignalFd> {
    SigSet::all().thread_set_mask()?;
    Ok(SignalFd::with_flags(
        &signals,
        SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC,
    )?)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

    use super::*;

    /// Tells this test program to be a task, and what kind.
    const TASK: &str = "FRONT_TEST_TASK";

    #[test]
    fn processes_are_read() {
        let expected = Stat {
            pid: 7,
            comm: "a) S (b".into(),
            state: 'T',
            parent: 3,
        };
        assert_eq!(parse_stat("7 (a) S (b) T 3 7 7 0 -1"), Some(expected));
        assert_eq!(parse_stat("7 (a"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn only_where_slurm_signals_trees_a_front_is_needed() {
        let freezer = "5:freezer:/slurm_n1/uid_1000/job_3/step_batch";
        let limits_only = "6:memory:/slurm/uid_1000/job_3/step_0\n5:freezer:/";
        let unified = "0::/system.slice/slurmstepd.scope/job_3/step_0/user/task_0";
        for (proctrack, cgroups, expected) in [
            (None, freezer, true),
            (None, limits_only, false),
            (None, unified, false),
            (Some("cgroup"), "", true),
            (Some("linuxproc"), freezer, false),
            (Some("pgid"), "", false),
            (Some(""), freezer, true),
        ] {
            assert_eq!(
                tracked_by_cgroup(proctrack, || cgroups.into()),
                expected,
                "{proctrack:?} {cgroups}"
            );
        }
    }

    #[test]
    fn slurmstepd_is_looked_for_among_the_ancestors() {
        let tree = |stepd: &'static str| {
            move |pid| {
                let (comm, parent) = match pid {
                    30 => ("bash", 20),
                    20 => (stepd, 10),
                    10 => ("slurmd", 1),
                    _ => return None,
                };
                Some(Stat {
                    pid,
                    comm: comm.into(),
                    state: 'S',
                    parent,
                })
            }
        };
        assert!(below_slurmstepd(30, tree("slurmstepd")));
        assert!(!below_slurmstepd(30, tree("sshd")));
        assert!(!below_slurmstepd(1, tree("slurmstepd")), "a keeper");
        assert!(below_slurmstepd(40, tree("sshd")), "hidden by hidepid");
    }

    /// Not a test of its own: what the tests below start, by [`Task::start`].
    #[test]
    fn task() {
        let Ok(program) = std::env::var(TASK) else {
            return;
        };
        // The harness has a thread of its own, which no task has: the task is a child.
        if let Some(task) = crate::sys::fork().unwrap() {
            match waitpid(task, None).unwrap() {
                WaitStatus::Exited(_, code) => std::process::exit(code),
                WaitStatus::Signaled(_, signal, _) => crate::sys::die_of(signal as i32),
                other => panic!("{other:?}"),
            }
        }
        say(&format!("front {}", getpid()));
        let mut source = split(vec![libc::SIGHUP]).unwrap();
        SigSet::empty().thread_set_mask().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", &program]).stdout(Stdio::inherit());
        crate::sys::before_exec(&mut command, || crate::sys::die_with_parent(libc::SIGKILL));
        let mut child = command.spawn().unwrap();
        say(&format!("helper {}", getpid()));
        let ended = crate::sys::pidfd(Pid::from_raw(child.id() as i32)).unwrap();
        loop {
            let events = source.merged(&ended).unwrap();
            crate::sys::readable(&events.0, None).unwrap();
            while let Some(number) = source.next().unwrap() {
                say(&format!("signal {number}"));
            }
            if let Some(status) = child.try_wait().unwrap() {
                match status.code() {
                    Some(code) => std::process::exit(code),
                    None => crate::sys::die_of(status.signal().unwrap()),
                }
            }
        }
    }

    fn say(line: &str) {
        let mut out = std::io::stdout();
        out.write_all(format!("{line}\n").as_bytes()).unwrap();
        out.flush().unwrap();
    }

    /// A task as slurmstepd starts it: this process plays slurmstepd.
    struct Task {
        /// The parent of the front; ends as it does.
        harness: Child,
        front: i32,
        output: BufReader<ChildStdout>,
    }

    impl Task {
        /// A front with a shell behind it that runs `program`.
        fn start(program: &str) -> Task {
            let mut harness = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "front::tests::task", "--nocapture"])
                .args(["--test-threads=1", "-q"])
                .env(TASK, program)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let output = BufReader::new(harness.stdout.take().unwrap());
            let mut task = Task {
                harness,
                front: 0,
                output,
            };
            task.front = task.number("front ");
            task
        }

        /// The numbers after these words, whose lines come in any order.
        fn numbers<const N: usize>(&mut self, words: [&str; N]) -> [i32; N] {
            let mut found = [0; N];
            while found.contains(&0) {
                let line = self.line("");
                for (number, word) in found.iter_mut().zip(words) {
                    if let Some(rest) = line.strip_prefix(word) {
                        *number = rest.trim().parse().unwrap();
                    }
                }
            }
            found
        }

        /// The rest of the first line of output that begins with `start`.
        fn line(&mut self, start: &str) -> String {
            loop {
                let mut line = String::new();
                let end = Some(Instant::now() + 10 * LOOK);
                let said = !self.output.buffer().is_empty()
                    || crate::sys::readable(self.output.get_ref(), end).unwrap();
                assert!(said, "no {start}");
                assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "no {start}");
                if let Some(rest) = line.strip_prefix(start) {
                    return rest.trim().to_owned();
                }
            }
        }

        fn number(&mut self, start: &str) -> i32 {
            self.line(start).parse().unwrap()
        }

        /// What linuxproc does: `signal` for everything below this process.
        fn signal_tree(&self, signal: Signal) {
            let me = Stat {
                pid: self.front,
                comm: String::new(),
                state: 'S',
                parent: 0,
            };
            let mut below = vec![me];
            while let Some(process) = below.pop() {
                kill(Pid::from_raw(process.pid), signal).unwrap();
                for entry in std::fs::read_dir("/proc").unwrap() {
                    let name = entry.unwrap().file_name().into_string().unwrap();
                    let found = name.parse().ok().and_then(stat);
                    below.extend(found.filter(|found| found.parent == process.pid));
                }
            }
        }

        /// Waits for the front's end, reading to the end of its output: so everything that has
        /// inherited it is gone too.
        fn end(mut self) -> ExitStatus {
            std::io::copy(&mut self.output, &mut std::io::sink()).unwrap();
            self.harness.wait().unwrap()
        }
    }

    fn alive(pid: i32) -> bool {
        stat(pid).is_some_and(|process| process.state != 'Z')
    }

    /// Waits for the end of a process that is no child.
    fn wait_gone(pid: i32) {
        if let Ok(fd) = crate::sys::pidfd(Pid::from_raw(pid)) {
            assert!(crate::sys::readable(&fd, Some(Instant::now() + 10 * LOOK)).unwrap());
        }
    }

    #[test]
    fn the_end_comes_through() {
        assert_eq!(Task::start("exit 0").end().code(), Some(0));
        assert_eq!(Task::start("exit 7").end().code(), Some(7));
        let status = Task::start("kill -SEGV $$").end();
        assert_eq!(status.signal(), Some(libc::SIGSEGV));
    }

    #[test]
    fn what_slurm_signals_reaches_the_helper_and_nobody_else() {
        let mut task = Task::start("echo app $$; exec sleep 600");
        let [app, early] = task.numbers(["app", "signal"]);
        assert_eq!(early, libc::SIGHUP, "came before the front");
        for signal in [Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGTSTP] {
            task.signal_tree(signal);
            assert_eq!(task.number("signal "), signal as i32);
        }
        assert!(alive(app) && alive(task.front));
        kill(Pid::from_raw(app), Signal::SIGKILL).unwrap();
        assert_eq!(task.end().signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn a_killed_front_takes_everything_with_it() {
        // A daemon as well: another session, re-parented.
        let daemon = "(setsid sleep 600 & echo daemon $!); ";
        let mut task = Task::start(&format!("{daemon} echo app $$; exec sleep 600"));
        let [daemon, app, helper] = task.numbers(["daemon", "app", "helper"]);
        task.signal_tree(Signal::SIGKILL);
        assert_eq!(task.end().signal(), Some(libc::SIGKILL));
        for pid in [daemon, app, helper] {
            wait_gone(pid);
        }
    }

    #[test]
    fn daemons_end_with_the_application() {
        let mut task = Task::start("(setsid sleep 600 & echo daemon $!); exit 3");
        let daemon = task.number("daemon ");
        assert_eq!(task.harness.wait().unwrap().code(), Some(3));
        assert!(!alive(daemon), "it is gone when the front is");
    }

    #[test]
    fn a_killed_helper_or_keeper_leaves_nothing() {
        for keeper in [false, true] {
            let mut task = Task::start("echo app $$; exec sleep 600");
            let [app, helper] = task.numbers(["app", "helper"]);
            let victim = if keeper {
                stat(helper).unwrap().parent
            } else {
                helper
            };
            kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
            let status = task.harness.wait().unwrap();
            if keeper {
                assert_eq!(status.code(), Some(1));
            } else {
                assert_eq!(status.signal(), Some(libc::SIGKILL));
            }
            wait_gone(app);
            wait_gone(helper);
        }
    }

    #[test]
    fn a_suspended_job_is_stopped_and_goes_on() {
        let mut task = Task::start("echo app $$; exec sleep 600");
        let [app, helper] = task.numbers(["app", "helper"]);
        let until = |state: char| {
            let end = Instant::now() + 10 * LOOK;
            while stat(app).unwrap().state != state {
                assert!(Instant::now() < end, "never {state}");
                std::thread::yield_now();
            }
        };
        until('S');
        task.signal_tree(Signal::SIGSTOP);
        until('T');
        assert_ne!(stat(helper).unwrap().state, 'T');
        task.signal_tree(Signal::SIGCONT);
        until('S');
        // Stopped processes die as well.
        task.signal_tree(Signal::SIGSTOP);
        until('T');
        task.signal_tree(Signal::SIGKILL);
        assert_eq!(task.end().signal(), Some(libc::SIGKILL));
        wait_gone(app);
        wait_gone(helper);
    }

    #[test]
    fn a_front_is_small() {
        let mut task = Task::start("echo app $$; exec sleep 600");
        let [_, helper] = task.numbers(["app", "helper"]);
        let keeper = stat(helper).unwrap().parent;
        for pid in [task.front, keeper] {
            let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
            let own: u64 = smaps
                .lines()
                .filter(|line| line.starts_with("Private_Dirty:"))
                .map(|line| {
                    line.split_whitespace()
                        .nth(1)
                        .unwrap()
                        .parse::<u64>()
                        .unwrap()
                })
                .sum();
            assert!(own < 1024, "{own} KiB of its own: {smaps}");
        }
        task.signal_tree(Signal::SIGKILL);
        task.end();
    }
}
