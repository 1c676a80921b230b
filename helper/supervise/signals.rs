//! Signals as events.
//!
//! Contract: every signal that can be caught is, from [`Signals::take`] on, and is handed out by
//! [`Signals::next`] in no particular order, each number at most once per look. Nothing is blocked:
//! a blocked signal stays blocked over exec, and DMTCP's own would never reach the application.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::sys::signal::{SigSet, Signal};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

/// The signals of this process.
pub struct Signals {
    delivery: SignalDelivery<UnixStream, SignalOnly>,
    /// A descriptor of the delivery's pipe that can be polled.
    bell: UnixStream,
    waiting: Vec<Signal>,
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
        })
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
        Ok(self.waiting.pop())
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
