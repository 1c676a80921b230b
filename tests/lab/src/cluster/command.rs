//! Running a command with a time limit, and what it says.

use std::fs;
use std::io::{Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How a command ended and what it wrote.
#[derive(Debug, Clone)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// The standard output, or an error with everything if the command did not exit with 0.
    pub fn ok(self) -> Result<String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        bail!(
            "{}\nstandard output:\n{}\nstandard error:\n{}",
            self.status,
            self.stdout,
            self.stderr
        )
    }
}

/// Runs a command to its end with the given input.
pub fn run_limited(command: &mut Command, input: &str, limit: Duration) -> Result<Output> {
    // Files, not pipes: a daemon that the command leaves behind may keep them open.
    let file = || tempfile::tempfile().context("cannot create a temporary file");
    let (mut stdin, stdout, stderr) = (file()?, file()?, file()?);
    stdin
        .write_all(input.as_bytes())
        .and_then(|()| stdin.rewind())
        .context("cannot write a temporary file")?;
    let clone = |file: &fs::File| file.try_clone().context("cannot duplicate a descriptor");
    let mut child = command
        .stdin(stdin)
        .stdout(clone(&stdout)?)
        .stderr(clone(&stderr)?)
        .process_group(0)
        .spawn()
        .context("cannot run nsenter")?;
    let group = Pid::from_raw(i32::try_from(child.id()).context("a process id is too large")?);
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait()));
    let waited = receiver.recv_timeout(limit);
    if waited.is_err() {
        // Not reaped yet, so the group is still this command's. What left the group ends with the
        // cluster.
        killpg(group, Signal::SIGKILL).context("cannot end a command that took too long")?;
    }
    let read = |mut file: fs::File| -> Result<String> {
        let mut bytes = Vec::new();
        file.rewind()
            .and_then(|()| file.read_to_end(&mut bytes))
            .context("cannot read a temporary file")?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let (stdout, stderr) = (read(stdout)?, read(stderr)?);
    match waited {
        Ok(status) => Ok(Output {
            status: status.context("cannot wait")?,
            stdout,
            stderr,
        }),
        Err(_) => bail!("did not end in {limit:?}; standard output:\n{stdout}\nerror:\n{stderr}"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_command_that_takes_too_long_is_ended_with_what_it_wrote() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo begun; exec sleep 1000"]);
        let error = run_limited(&mut command, "", Duration::from_millis(300)).unwrap_err();
        assert!(error.to_string().contains("begun"), "{error:#}");
    }

    #[test]
    fn a_background_process_does_not_hold_up_a_command() {
        let mut command = Command::new("sh");
        command.args(["-c", "cat; sleep 20 & exit 3"]);
        let start = Instant::now();
        let output = run_limited(&mut command, "input", Duration::from_secs(15)).unwrap();
        assert_eq!(
            (output.stdout.as_str(), output.status.code()),
            ("input", Some(3))
        );
        assert!(start.elapsed() < Duration::from_secs(15));
    }
}
