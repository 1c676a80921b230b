//! The cluster's own scripts: started, listened to, ended.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How long starting the cluster or a node may take: daemons and the file system, no downloads.
pub const START_LIMIT: Duration = Duration::from_secs(90);

/// A script that reports its progress on standard output.
pub struct Starting {
    pub child: Child,
    pub stdin: Option<ChildStdin>,
    pub lines: Lines,
}

pub struct Lines(mpsc::Receiver<String>);

impl Lines {
    /// The words after `keyword` of the next line, which has to start with it.
    pub fn line(&mut self, keyword: &str, limit: Duration) -> Result<String> {
        let line = self.0.recv_timeout(limit).map_err(|_| {
            anyhow!(
                "a script of the cluster ended, or did nothing for {limit:?}, before {keyword:?}"
            )
        })?;
        line.strip_prefix(keyword)
            .map(|rest| rest.trim().to_owned())
            .with_context(|| {
                format!("a script of the cluster said {line:?} instead of {keyword:?}")
            })
    }
}

impl Starting {
    pub fn spawn(command: &mut Command, log: &fs::File) -> Result<Starting> {
        let log = log.try_clone().context("cannot duplicate a descriptor")?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            // A group of its own: Ctrl-C is for the command that runs in the cluster.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {:?}", command.get_program()))?;
        let stdin = child.stdin.take();
        let (sender, receiver) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Starting {
            child,
            stdin,
            lines: Lines(receiver),
        })
    }

    pub fn line(&mut self, keyword: &str, limit: Duration) -> Result<String> {
        self.lines.line(keyword, limit)
    }

    /// A node's first process, on the login host and on this host, and the pipe it lives by.
    pub fn node(&mut self) -> Result<(i32, i32, ChildStdin)> {
        let words = self.lines.line("pid", START_LIMIT)?;
        let on_login = first_number(&words)?;
        let namespace = words
            .split(' ')
            .nth(1)
            .context("a node did not tell its namespace")?;
        let on_host = first_process_of(namespace)
            .with_context(|| format!("no process is the first of {namespace}"))?;
        Ok((
            on_login,
            on_host,
            self.stdin.take().context("a node has no standard input")?,
        ))
    }

    /// Ends a node that did not come up.
    pub fn end(&mut self) {
        drop(self.stdin.take());
        // nsenter, unshare and the node's shell are one group.
        if let Ok(pid) = i32::try_from(self.child.id())
            && let Err(error) = killpg(Pid::from_raw(pid), Signal::SIGKILL)
        {
            eprintln!("lab: cannot end a node that did not start: {error}");
        }
        if let Err(error) = self.child.wait() {
            eprintln!("lab: cannot wait for the end of a node: {error}");
        }
    }
}

/// A file without a name whose writers don't overwrite each other.
pub fn append_only_file() -> Result<fs::File> {
    let file = tempfile::NamedTempFile::new().context("cannot create a temporary file")?;
    fs::File::options()
        .read(true)
        .append(true)
        .open(file.path())
        .with_context(|| format!("cannot open {}", file.path().display()))
}

pub fn first_number(words: &str) -> Result<i32> {
    let word = words.split(' ').next().unwrap_or_default();
    word.parse()
        .with_context(|| format!("{word:?} is no process id"))
}

/// This host's number of the process that is number 1 in a PID namespace (`pid:[4026532…]`).
fn first_process_of(namespace: &str) -> Option<i32> {
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let link = fs::read_link(entry.path().join("ns/pid")).ok()?;
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        let chain = status
            .lines()
            .find_map(|line| line.strip_prefix("NSpid:"))?;
        (link.as_os_str() == namespace && chain.split_whitespace().next_back() == Some("1"))
            .then_some(pid)
    })
}

/// This process's group in the v1 freezer's hierarchy, without a slash at the end; the root where
/// the host does not use that hierarchy.
pub fn own_freezer() -> Result<String> {
    let own = fs::read_to_string("/proc/self/cgroup").context("cannot read /proc/self/cgroup")?;
    let group = own.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        (controllers == "freezer").then_some(path)
    });
    Ok(group.unwrap_or("/").trim_end_matches('/').to_owned())
}
