//! Running one of Slurm's commands with a time limit.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::{ANSWER_LIMIT, SlurmError};

/// Standard output of `program arguments`, or why it failed. Its answers are in English and plain
/// whatever the user has set for his own use of it.
pub fn run(program: &str, arguments: &[&str]) -> Result<String, SlurmError> {
    let shown = || format!("`{program} {}`", arguments.join(" "));
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
        .env("LC_ALL", "C")
        .env_remove("SLURM_TIME_FORMAT")
        .env_remove("SLURM_BITSTR_LEN");
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SCONTROL_") {
            command.env_remove(name);
        }
    }
    let mut child = command
        .spawn()
        .map_err(|why| SlurmError::Start(program.to_owned(), why))?;
    let gather = |stream: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut stream) = stream {
                // What was read before an error is what the command managed to say.
                let _ = stream.by_ref().take(16 << 20).read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).trim().to_owned()
        })
    };
    let out = gather(child.stdout.take().map(|s| Box::new(s) as _));
    let err = gather(child.stderr.take().map(|s| Box::new(s) as _));
    let status = wait(&mut child).map_err(|why| SlurmError::Start(program.to_owned(), why))?;
    let Some(status) = status else {
        return Err(SlurmError::Silent(shown(), ANSWER_LIMIT.as_secs()));
    };
    let out = out.join().unwrap_or_default();
    let err = err.join().unwrap_or_default();
    if status.success() {
        return Ok(out);
    }
    let why = if err.is_empty() {
        format!("{status} {out}")
    } else {
        err
    };
    Err(SlurmError::Failed(shown(), why))
}

/// Waits for the child's end by its pidfd; None, and the child is gone, if it took too long.
fn wait(child: &mut std::process::Child) -> std::io::Result<Option<std::process::ExitStatus>> {
    let end = Instant::now() + ANSWER_LIMIT;
    let pidfd = crate::sys::pidfd(nix::unistd::Pid::from_raw(child.id() as i32))?;
    if crate::sys::readable(&pidfd, Some(end))? {
        return child.wait().map(Some);
    }
    child.kill()?;
    child.wait()?;
    Ok(None)
}
