//! Signals as events.
//!
//! Contract: every signal that can be caught is, from [`Signals::take`] on, and is handed out by
//! [`Signals::next`] in no particular order, each number at most once per look. Nothing is blocked:
//! a blocked signal stays blocked over exec, and DMTCP's own would never reach the application.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags};
use nix::sys::epoll::Epoll;
use nix::sys::signal::{SigSet, Signal};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

use crate::front;

/// The signals of this process.
pub struct Signals {
    delivery: SignalDelivery<UnixStream, SignalOnly>,
    /// A descriptor of the delivery's pipe that can be polled.
    bell: UnixStream,
    waiting: Vec<Signal>,
    /// What the front gets, and a descriptor of both.
    front: Option<(front::Source, Epoll)>,
}

impl Signals {
    /// Catches every signal but those that the kernel raises for a fault of this very process. A
    /// mask that was inherited (slurmstepd of 25.05 leaves SIGCHLD blocked) and dispositions are
    /// reset first.
    pub fn take() -> io::Result<Signals> {
        crate::sys::reset_dispositions();
        SigSet::empty().thread_set_mask()?;
        let faults = [
            Signal::SIGSEGV,
            Signal::SIGBUS,
            Signal::SIGFPE,
            Signal::SIGILL,
            Signal::SIGTRAP,
            Signal::SIGSYS,
            Signal::SIGABRT,
        ];
        let numbers = Signal::iterator()
            .filter(|signal| !matches!(signal, Signal::SIGKILL | Signal::SIGSTOP))
            // These are of no use to anybody: ends of children, job control, a pipe that is gone.
            .filter(|signal| !matches!(signal, Signal::SIGCHLD | Signal::SIGTTIN | Signal::SIGTTOU))
            .filter(|signal| !faults.contains(signal))
            .map(|signal| signal as i32);
        let (read, write) = UnixStream::pair()?;
        let bell = read.try_clone()?;
        let delivery = SignalDelivery::with_pipe(read, write, SignalOnly, numbers)?;
        Ok(Signals {
            delivery,
            bell,
            waiting: Vec::new(),
            front: None,
        })
    }

    /// Hands out what comes from a front as well. What is sent to this very process (it is not in
    /// the tree that Slurm signals) still counts.
    pub fn come_from(&mut self, source: front::Source) -> io::Result<()> {
        let both = source.merged(&self.bell)?;
        self.front = Some((source, both));
        Ok(())
    }

    /// Whether the job is suspended and all of it but this process is stopped. Without a front this
    /// process would be stopped, too.
    pub fn suspended(&self) -> bool {
        self.front
            .as_ref()
            .is_some_and(|(source, _)| source.suspended())
    }

    /// Waits for a signal, for `fd` to be readable, or until `end`. Says whether `fd` is.
    pub fn or_readable(&self, fd: &impl AsFd, end: Option<Instant>) -> io::Result<bool> {
        let mut fds = [
            PollFd::new(fd.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.as_fd(), PollFlags::POLLIN),
        ];
        match nix::poll::poll(&mut fds, crate::sys::until(end)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(why) => return Err(why.into()),
        }
        Ok(fds[0].any().unwrap_or(false))
    }

    /// Signals that were taken and are to be handed out again.
    pub fn put_back(&mut self, signals: Vec<Signal>) {
        self.waiting.extend(signals);
    }

    /// The next signal that has come, if one has.
    pub fn next(&mut self) -> io::Result<Option<Signal>> {
        if self.waiting.is_empty() {
            // `pending` reads without waiting.
            let come = self
                .delivery
                .pending()
                .filter_map(|number| Signal::try_from(number).ok());
            self.waiting = come.filter(|signal| *signal != Signal::SIGPIPE).collect();
        }
        if self.waiting.is_empty()
            && let Some((source, _)) = &mut self.front
        {
            // In the order in which they came; real-time signals are left out, as above.
            while let Some(number) = source.next()? {
                if let Ok(signal) = Signal::try_from(number) {
                    return Ok(Some(signal));
                }
            }
        }
        Ok(self.waiting.pop())
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.front {
            Some((_, both)) => both.0.as_fd(),
            None => self.bell.as_fd(),
        }
    }
}
