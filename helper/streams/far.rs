//! What is at the far end of an output stream: the file that a line reaches in the end, or a pipe.
//!
//! What a step's task writes goes by a pipe to slurmstepd, from there to srun, and srun writes it. Its
//! files are looked at from outside: SLURM_SRUN_COMM_PORT is the port at which the step's srun listens
//! for messages (Slurm's src/common/env.c), and /proc tells whose it is and what that has open.
//!
//! Contract: only what runs on this node as this user is seen; what is not seen is nothing.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::net::{IpAddr, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::held::Cut;
use crate::engine::criu::files::{appends, writes};
use crate::listeners::{listeners, socket_inode};

/// The far end of a stream.
#[derive(Debug)]
pub enum Far {
    /// A file that is only appended to.
    File(Appended),
    /// A pipe, or a file that is written from its beginning: who reads it, or has emptied it, wants
    /// all of the stream.
    Anew { id: (u64, u64) },
}

/// A file that is only appended to.
#[derive(Debug)]
pub struct Appended {
    pub file: File,
    pub path: PathBuf,
    /// Device and inode.
    pub id: (u64, u64),
    /// Processes that write to it on behalf of this stream.
    pub by: Vec<u32>,
}

impl Appended {
    /// Cuts off what is in the `range` of `record` and written again, and keeps it in the file `kept`.
    pub fn cut(
        &self,
        cut: &Cut,
        record: &File,
        range: std::ops::Range<u64>,
        kept: &Path,
    ) -> io::Result<()> {
        let mut record = record;
        record.seek(SeekFrom::Start(range.start))?;
        let mut copy = File::create(kept)?;
        io::copy(&mut record.take(range.end - range.start), &mut copy)?;
        cut.make(&self.file)?;
        log::info!(
            "{} bytes that were written to {} after the saved state are cut off, since they are \
             written again; they are in {}",
            range.end - range.start,
            self.path.display(),
            kept.display()
        );
        Ok(())
    }
}

impl Far {
    /// What the open file `fd` of a process is, an entry of its /proc/PID/fd.
    pub fn of(fd: &Path, by: Vec<u32>) -> Option<Far> {
        use std::os::unix::fs::FileTypeExt;
        let about = fs::metadata(fd).ok()?;
        let id = (about.dev(), about.ino());
        let kind = about.file_type();
        if kind.is_fifo() || kind.is_socket() {
            return Some(Far::Anew { id });
        }
        if !kind.is_file() {
            return None;
        }
        if !appends(&info(fd)?) {
            return Some(Far::Anew { id });
        }
        // Most have it open for writing alone.
        let file = File::options().read(true).append(true).open(fd).ok()?;
        let path = fs::read_link(fd).ok()?;
        Some(Far::File(Appended { file, path, id, by }))
    }

    pub fn id(&self) -> (u64, u64) {
        match self {
            Far::File(file) => file.id,
            Far::Anew { id } => *id,
        }
    }
}

/// The srun that has started this process's step, if it runs on this node.
#[derive(Debug)]
pub struct Srun {
    pid: u32,
    /// With its children, which have its files open as well.
    all: Vec<u32>,
    /// Files and devices that it has opened for writing itself.
    opened: Vec<i32>,
}

impl Srun {
    pub fn of_this_step() -> Option<Srun> {
        let text = |name| std::env::var(name).ok();
        let port: u16 = text("SLURM_SRUN_COMM_PORT")?.parse().ok()?;
        let host: IpAddr = text("SLURM_LAUNCH_NODE_IPADDR")?.parse().ok()?;
        // Whether the address is one of this node's.
        UdpSocket::bind((host, 0)).ok()?;
        let user = nix::unistd::getuid().as_raw();
        let inode = ["/proc/self/net/tcp", "/proc/self/net/tcp6"]
            .iter()
            .filter_map(|table| fs::read_to_string(table).ok())
            .find_map(|table| listener(&table, port, user))?;
        let processes = of_user("srun");
        let has = |pid: &&u32| {
            let open = fs::read_dir(format!("/proc/{pid}/fd"))
                .into_iter()
                .flatten();
            let mut links = open
                .flatten()
                .filter_map(|fd| fs::read_link(fd.path()).ok());
            links.any(|link| socket_inode(&link) == Some(inode))
        };
        let pid = *processes.iter().find(has)?;
        let child = |other: &u32| {
            crate::front::stat(other.cast_signed()).is_some_and(|s| s.parent == pid.cast_signed())
        };
        let mut all: Vec<u32> = processes.into_iter().filter(child).collect();
        all.push(pid);
        let opened = opened(pid, &all);
        Some(Srun { pid, all, opened })
    }

    /// Whether it reads a terminal.
    pub fn has_terminal(&self) -> bool {
        fs::read_link(format!("/proc/{}/fd/0", self.pid))
            .is_ok_and(|link| link.starts_with("/dev/pts") || link.starts_with("/dev/tty"))
    }

    /// What is behind stream `number`, 1 or 2, of the step.
    pub fn far(&self, number: i32) -> Option<Far> {
        Far::of(&self.fd(number), self.all.clone())
    }

    /// Its open file behind stream `number`, 1 or 2, of the step: an entry of /proc/PID/fd.
    pub fn fd(&self, number: i32) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", self.pid, self.behind(number)))
    }

    /// Whether that is a file of `--output` or `--error`, which it may empty.
    pub fn has_opened(&self, number: i32) -> bool {
        self.opened.contains(&self.behind(number))
    }

    /// Its descriptor behind stream `number`. Files of `--output` and `--error` are opened in this
    /// order, and standard error goes with the output where only that has a file
    /// (launch_common_set_stdio_fds() in srun's launch.c).
    fn behind(&self, number: i32) -> i32 {
        match (self.opened.as_slice(), number) {
            ([], _) => number,
            ([only], _) if !self.error_only() => *only,
            ([error], 2) => *error,
            ([_], _) => number,
            ([output, ..], 1) => *output,
            ([_, error, ..], _) => *error,
        }
    }

    /// Whether it was told where standard error goes and not where the output does.
    fn error_only(&self) -> bool {
        let read = |file: &str| fs::read(format!("/proc/{}/{file}", self.pid)).unwrap_or_default();
        let (words, variables) = (read("cmdline"), read("environ"));
        let given = |option: &[&[u8]], variable: &[u8]| {
            words
                .split(|byte| *byte == 0)
                .any(|word| option.iter().any(|option| word.starts_with(option)))
                || variables
                    .split(|byte| *byte == 0)
                    .any(|entry| entry.starts_with(variable))
        };
        given(&[b"--error", b"-e"], b"SLURM_STDERRMODE=")
            && !given(&[b"--output", b"-o"], b"SLURM_STDOUTMODE=")
    }
}

/// The descriptors of files and devices that the srun `pid` has opened for writing itself, each once.
/// Those of the script, as by `exec 9> lock`, its child has as well (`all` are both): srun forks that one
/// before it opens anything (_shepherd_spawn() in its srun_job.c).
fn opened(pid: u32, all: &[u32]) -> Vec<i32> {
    let is_inherited = |number: i32, id: (u64, u64)| {
        let mut children = all.iter().filter(|other| **other != pid);
        children.any(|child| written(Path::new(&format!("/proc/{child}/fd/{number}"))) == Some(id))
    };
    let mut found = BTreeMap::new();
    let open = fs::read_dir(format!("/proc/{pid}/fd"));
    for fd in open.into_iter().flatten().flatten() {
        let number = fd.file_name().to_str().and_then(|name| name.parse().ok());
        if let (Some(number), Some(id)) = (number, written(&fd.path()))
            && number > 2
            && !is_inherited(number, id)
        {
            found.insert(number, id);
        }
    }
    let mut seen = Vec::new();
    found.retain(|_, id| {
        let new = !seen.contains(id);
        seen.push(*id);
        new
    });
    found.into_keys().collect()
}

/// Device and inode of an entry of /proc/PID/fd, if it is a file or device that is open for writing;
/// `--output=none` is /dev/null.
fn written(fd: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::FileTypeExt;
    let about = fs::metadata(fd).ok()?;
    let kind = about.file_type();
    let is_it = kind.is_file() || kind.is_char_device();
    let writes = || info(fd).is_some_and(|info| writes(&info));
    (is_it && writes()).then(|| (about.dev(), about.ino()))
}

/// The /proc/PID/fdinfo of an entry of /proc/PID/fd.
fn info(fd: &Path) -> Option<String> {
    let info = fd.parent()?.with_file_name("fdinfo").join(fd.file_name()?);
    fs::read_to_string(info).ok()
}

/// Processes of this user by the name of their program.
fn of_user(name: &str) -> Vec<u32> {
    let user = nix::unistd::getuid().as_raw();
    let ours = |process: &fs::DirEntry| {
        process.metadata().is_ok_and(|about| about.uid() == user)
            && fs::read_to_string(process.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter(ours)
        .filter_map(|process| process.file_name().to_str()?.parse().ok())
        .collect()
}

/// The inode of `user`'s socket that listens at `port`, in a table of /proc/net.
fn listener(table: &str, port: u16, user: u32) -> Option<u64> {
    let mut all = listeners(table);
    let found = all.find(|one| (one.address.port(), one.user) == (port, user))?;
    Some(found.inode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_found_by_port_and_user() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
             1: 00000000:8759 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1001        0 77 1 0\n\
             2: 0B0200C0:8759 0B0200C0:8D9C 06 00000000:00000000 03:0000175C 00000000     0        0 0 3 0\n\
             3: 00000000:875A 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1002        0 78 1 0\n";
        assert_eq!(listener(table, 0x8759, 1001), Some(77));
        assert_eq!(listener(table, 0x8759, 1002), None);
        assert_eq!(listener(table, 0x875a, 1002), Some(78));
        assert_eq!(listener("", 1, 0), None);
    }

    #[test]
    fn files_that_are_appended_to_are_told_from_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let fd = |file: &File| {
            use std::os::fd::AsRawFd;
            PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
        };
        let anew = File::create(&path).unwrap();
        assert!(matches!(
            Far::of(&fd(&anew), vec![]),
            Some(Far::Anew { .. })
        ));
        let append = File::options().append(true).open(&path).unwrap();
        let far = Far::of(&fd(&append), vec![]);
        assert!(matches!(far, Some(Far::File(file)) if file.path == path));
        let null = File::open("/dev/null").unwrap();
        assert!(Far::of(&fd(&null), vec![]).is_none());
    }
}
