//! The clocks of an application: its time namespace (time_namespaces(7)).
//!
//! A restored process goes on with the monotonic clock that it had. Without that, the clock would
//! jump to the uptime of another node: timers would fire at once or not before the day that the old
//! node would have been up for long enough. CRIU does not do it without privileges.
//!
//! ```text
//! clocks     {"monotonic": NANOSECONDS, "boottime": NANOSECONDS}, when the processes were held
//! ```

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use nix::errno::Errno;
use nix::sched::CloneFlags;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// The name of the record in a rank's directory.
const RECORD: &str = "clocks";

/// Largest record that is read back, in bytes.
const RECORD_MAX: u64 = 4096;

/// Nanoseconds in a second.
const SECOND: i128 = 1_000_000_000;

/// Readings of the two clocks that a time namespace shifts, or differences between such, in
/// nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    monotonic: i64,
    boottime: i64,
}

impl Clocks {
    /// Of this process.
    fn now() -> io::Result<Clocks> {
        let read = |clock| -> io::Result<i64> {
            let time = clock_gettime(clock)?;
            Ok(nanoseconds(time.tv_sec(), time.tv_nsec()))
        };
        Ok(Clocks {
            monotonic: read(ClockId::CLOCK_MONOTONIC)?,
            boottime: read(ClockId::CLOCK_BOOTTIME)?,
        })
    }

    fn with(self, other: Clocks, combine: impl Fn(i64, i64) -> i64) -> Clocks {
        Clocks {
            monotonic: combine(self.monotonic, other.monotonic),
            boottime: combine(self.boottime, other.boottime),
        }
    }

    /// As `/proc/PID/timens_offsets` shows and takes it. Nanoseconds have to be positive there.
    fn offsets(self) -> String {
        let line = |name: &str, value: i64| {
            let (seconds, rest) = (
                value.div_euclid(1_000_000_000),
                value.rem_euclid(1_000_000_000),
            );
            format!("{name} {seconds} {rest}\n")
        };
        line("monotonic", self.monotonic) + &line("boottime", self.boottime)
    }

    fn from_offsets(text: &str) -> Option<Clocks> {
        let find = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            let mut numbers = line.split_whitespace().map(|word| word.parse::<i64>().ok());
            Some(nanoseconds(numbers.next()??, numbers.next()??))
        };
        Some(Clocks {
            monotonic: find("monotonic")?,
            boottime: find("boottime")?,
        })
    }
}

fn nanoseconds(seconds: i64, rest: i64) -> i64 {
    let sum = i128::from(seconds) * SECOND + i128::from(rest);
    i64::try_from(sum).unwrap_or(i64::MAX)
}

/// Puts what this process starts from now on into a time namespace of its own, whose clocks go on
/// from `clocks`, or else are the same as here.
pub fn own(clocks: Option<Clocks>) -> io::Result<()> {
    match nix::sched::unshare(CloneFlags::from_bits_retain(libc::CLONE_NEWTIME)) {
        Ok(()) => {}
        // A kernel without them (before 5.6, or built so): as without us.
        Err(Errno::EINVAL) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    if let Some(clocks) = clocks {
        let offsets = clocks.with(Clocks::now()?, i64::saturating_sub).offsets();
        fs::write("/proc/self/timens_offsets", offsets)?;
    }
    Ok(())
}

/// Records the clocks of process `pid`, which is held still, in `dir`.
pub fn record(pid: u32, dir: &Path) -> io::Result<()> {
    let path = format!("/proc/{pid}/timens_offsets");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        // The kernel has no time namespaces.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let offsets = Clocks::from_offsets(&text)
        .ok_or_else(|| io::Error::other(format!("{path} is not understood: {text}")))?;
    let clocks = offsets.with(Clocks::now()?, i64::saturating_add);
    fs::write(dir.join(RECORD), serde_json::to_vec(&clocks)?)
}

/// Reads the record in a rank's directory; `None` if there was nothing to record.
pub fn read(dir: &Path) -> Result<Option<Clocks>, String> {
    let path = dir.join(RECORD);
    let failed = |error: io::Error| format!("cannot read {}: {error}", path.display());
    let mut text = Vec::new();
    match fs::File::open(&path) {
        Ok(file) => file
            .take(RECORD_MAX)
            .read_to_end(&mut text)
            .map_err(failed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| failed(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_come_through_as_the_kernel_writes_them() {
        let clocks = Clocks {
            monotonic: -1,
            boottime: 2_000_000_003,
        };
        let text = clocks.offsets();
        assert_eq!("monotonic -1 999999999\nboottime 2 3\n", text);
        assert_eq!(Some(clocks), Clocks::from_offsets(&text));
        let kernels = "monotonic           5         7\nboottime           -1         0\n";
        let clocks = Clocks {
            monotonic: 5_000_000_007,
            boottime: -1_000_000_000,
        };
        assert_eq!(Some(clocks), Clocks::from_offsets(kernels));
        assert_eq!(None, Clocks::from_offsets("monotonic 1"));
    }

    #[test]
    fn a_record_is_read_back_and_a_damaged_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Ok(None), read(dir.path()));
        record(std::process::id(), dir.path()).unwrap();
        if let Some(clocks) = read(dir.path()).unwrap() {
            assert!(Clocks::now().unwrap().monotonic >= clocks.monotonic);
        }
        fs::write(dir.path().join(RECORD), "{").unwrap();
        assert!(read(dir.path()).is_err());
    }
}
