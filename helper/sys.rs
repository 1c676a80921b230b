//! The helper's unsafe code: the few system calls that no library wraps safely for us, and small
//! questions to the kernel.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::unistd::Pid;

/// Whether standard input is our terminal and we are in its foreground (`srun --pty`).
pub fn in_foreground() -> bool {
    nix::unistd::tcgetpgrp(io::stdin()).is_ok_and(|group| group == nix::unistd::getpgrp())
}

/// A descriptor that becomes readable when process `pid` ends (pidfd_open(2), Linux 5.3).
pub fn pidfd(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed; a non-negative result is a new descriptor that is ours alone.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Waits until `fd` is readable (true) or `end` has come (false); without an `end`, for ever.
pub fn readable(fd: &impl AsFd, end: Option<Instant>) -> io::Result<bool> {
    loop {
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        match nix::poll::poll(&mut fds, until(end)) {
            Ok(0) if end.is_none_or(|end| Instant::now() < end) => {}
            Ok(count) => return Ok(count > 0),
            Err(nix::errno::Errno::EINTR) => {}
            Err(why) => return Err(why.into()),
        }
    }
}

/// The time until `end` as poll(2) takes it, rounded up so that nobody wakes up too early.
pub fn until(end: Option<Instant>) -> PollTimeout {
    let Some(end) = end else {
        return PollTimeout::NONE;
    };
    let left = end
        .saturating_duration_since(Instant::now())
        .as_micros()
        .div_ceil(1000);
    PollTimeout::try_from(i32::try_from(left).unwrap_or(i32::MAX)).unwrap_or(PollTimeout::MAX)
}

/// Gives every signal its default action back. A parent may have left some ignored (nohup,
/// slurmstepd of 25.05 leaves SIGCHLD blocked), and an ignored signal stays ignored over exec.
pub fn reset_dispositions() {
    for number in 1..=libc::SIGRTMAX() {
        if number == libc::SIGKILL || number == libc::SIGSTOP {
            continue;
        }
        // SAFETY: SIG_DFL is a valid action for every other number; numbers that libc keeps for
        // itself are refused with EINVAL, which is as good.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
}

/// Ends this process by `signal`, so that whoever waits for it sees the signal and not a code. No
/// core of ours is written: the application has written its own.
pub fn die_of(signal: i32) -> ! {
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: plain system calls on this process; the structures live until they return.
    unsafe {
        libc::setrlimit(libc::RLIMIT_CORE, &none);
        libc::signal(signal, libc::SIG_DFL);
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal);
        // This thread's: a process's may be taken by another thread, while this one exits.
        libc::raise(signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
    // A signal whose default is not to end a process.
    std::process::exit(128 + signal)
}

/// Seconds since the epoch of a local time `[year, month, day, hour, minute, second]`.
pub fn local_to_epoch(parts: [i32; 6]) -> Option<i64> {
    // SAFETY: `tm` is plain data for which zero is valid; mktime(3) reads and normalizes it.
    let seconds = unsafe {
        let mut tm: libc::tm = std::mem::zeroed();
        tm.tm_year = parts[0] - 1900;
        tm.tm_mon = parts[1] - 1;
        tm.tm_mday = parts[2];
        tm.tm_hour = parts[3];
        tm.tm_min = parts[4];
        tm.tm_sec = parts[5];
        tm.tm_isdst = -1;
        libc::mktime(&mut tm)
    };
    (seconds != -1).then_some(seconds)
}

/// The local time `[year, month, day, hour, minute, second]` of seconds since the epoch.
pub fn local_time(seconds: i64) -> Option<[i32; 6]> {
    // SAFETY: `tm` is plain data for which zero is valid; localtime_r(3) reads one number and writes
    // one `tm`, both of which live until it returns.
    let tm = unsafe {
        let mut tm: libc::tm = std::mem::zeroed();
        (!libc::localtime_r(&seconds, &mut tm).is_null()).then_some(tm)
    }?;
    Some([
        tm.tm_year + 1900,
        tm.tm_mon + 1,
        tm.tm_mday,
        tm.tm_hour,
        tm.tm_min,
        tm.tm_sec,
    ])
}

/// Makes the kernel send this process `signal` when its parent thread ends (prctl(2)).
pub fn die_with_parent(signal: i32) -> io::Result<()> {
    // SAFETY: no pointers are passed.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Runs `prepare` in the child between fork and exec. It may use only what is async-signal-safe:
/// plain system calls, no memory from the heap, no locks.
pub fn before_exec(
    command: &mut std::process::Command,
    prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    use std::os::unix::process::CommandExt;
    // SAFETY: every caller keeps to what is said above.
    unsafe { command.pre_exec(prepare) };
}

/// Lets descriptor `fd` be inherited by programs, under the number `as_number`. For use in
/// [`before_exec`].
pub fn inherit_as(fd: &impl AsRawFd, as_number: i32) -> io::Result<()> {
    // SAFETY: dup2(2) on descriptors of this process; the duplicate has no close-on-exec flag.
    match unsafe { libc::dup2(fd.as_raw_fd(), as_number) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Takes over descriptor `number`, which the parent put there for this process ([`inherit_as`]).
/// To be called once for a number, before anything else can have opened it.
pub fn inherited(number: i32) -> io::Result<std::fs::File> {
    // SAFETY: plain system call; a number that is not open gives EBADF.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and by the contract nothing else in this process owns it.
    Ok(unsafe { std::fs::File::from_raw_fd(number) })
}

/// Sets close-on-exec on every descriptor from `first` on (close_range(2), Linux 5.11), so that an
/// application inherits nothing of ours or of Slurm's. For use in [`before_exec`].
pub fn close_from(first: u32) -> io::Result<()> {
    const CLOEXEC: libc::c_uint = 4;
    // SAFETY: no pointers are passed; descriptors are only marked.
    match unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, CLOEXEC) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Columns of the terminal behind `fd`; `None` if there is none or it does not say.
pub fn terminal_width(fd: &impl AsRawFd) -> Option<usize> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one `winsize`, which lives until the call returns.
    let got = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &mut size) };
    (got == 0 && size.ws_col > 0).then_some(usize::from(size.ws_col))
}

/// Makes `to`, an empty file, share all blocks of `from` until one of them is written to
/// (FICLONE, ioctl_ficlonerange(2)): XFS, Btrfs, bcachefs and some network file systems can.
pub fn reflink(from: &impl AsRawFd, to: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: FICLONE takes a descriptor as its argument, no pointer.
    match unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives up every capability for good: programs started from now on have none, even as uid 0
/// (capabilities(7), bounding set). For use in [`before_exec`].
pub fn drop_capabilities() -> io::Result<()> {
    // Numbers above the kernel's last one are refused with EINVAL.
    for number in 0..64 {
        // SAFETY: no pointers are passed.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) } != 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EINVAL) if number > 0 => Ok(()),
                _ => Err(error),
            };
        }
    }
    Ok(())
}

/// Removes a variable from this process's environment. Only for the start of `main`, before any
/// thread is made.
pub fn forget_variable(name: &str) {
    // SAFETY: no other thread runs yet that could read the environment.
    unsafe { std::env::remove_var(name) };
}

/// Makes a child that goes on from here: its id, or None in the child. Only before any thread is
/// made; refused later, since a lock that another thread holds would never be released in the child.
pub fn fork() -> io::Result<Option<Pid>> {
    // The test harness runs a test in a second thread, while its first waits.
    let usual = if cfg!(test) { 2 } else { 1 };
    if std::fs::read_dir("/proc/self/task")?.count() > usual {
        return Err(io::Error::other("this process already has several threads"));
    }
    // SAFETY: this is the only thread, so the child has all that it needs.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => Ok(Some(child)),
        nix::unistd::ForkResult::Child => Ok(None),
    }
}

/// Bytes in a pipe that nobody has read yet (FIONREAD, pipe(7)).
pub fn unread(pipe: &impl AsRawFd) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, which lives until the call returns.
    match unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &mut count) } {
        0 => Ok(usize::try_from(count).unwrap_or(0)),
        _ => Err(io::Error::last_os_error()),
    }
}
