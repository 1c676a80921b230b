//! The helper's hidden command that stands directly before DMTCP in a container, where alone can be
//! known which variables the image sets.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;

/// `container-checkpoint within [--append VAR=DIRS]… [--default VAR=VALUE]… -- COMMAND…`
pub const WITHIN: &str = "within";

/// Becomes the command in `arguments`, those after [`WITHIN`]. `--append` puts directories behind
/// those that a variable has already; `--default` sets a variable that is not set. Returns only if
/// the command cannot be started.
pub fn become_command(arguments: &[OsString]) -> io::Error {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
    let mut words = arguments.iter();
    let mut variables = Vec::new();
    loop {
        let append = match words.next().map(|word| word.as_bytes()) {
            Some(b"--append") => true,
            Some(b"--default") => false,
            Some(b"--") => break,
            _ => return wrong("--append, --default or -- expected"),
        };
        let Some((name, value)) = words.next().and_then(|word| split(word)) else {
            return wrong("VAR=VALUE expected");
        };
        let now = std::env::var_os(name);
        match (append, now) {
            (true, Some(now)) if !now.is_empty() => {
                let mut both = now.into_vec();
                both.push(b':');
                both.extend_from_slice(value.as_bytes());
                variables.push((name, OsString::from_vec(both)));
            }
            (false, Some(_)) => {}
            _ => variables.push((name, value.to_owned())),
        }
    }
    let Some(program) = words.next() else {
        return wrong("a command expected");
    };
    std::process::Command::new(program)
        .args(words)
        .envs(variables)
        .exec()
}

fn split(word: &OsStr) -> Option<(&OsStr, &OsStr)> {
    let bytes = word.as_bytes();
    let at = bytes.iter().position(|byte| *byte == b'=')?;
    Some((
        OsStr::from_bytes(&bytes[..at]),
        OsStr::from_bytes(&bytes[at + 1..]),
    ))
}
