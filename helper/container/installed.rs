//! Apptainer as it is installed on this host.
//!
//! Contract: [`Installed::ask`] asks the program itself (`--version`, `buildcfg`) and reads its
//! configuration, which every user may read; it changes nothing. SingularityCE answers the same way
//! with its own prefix of names.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Largest apptainer.conf that is read, in bytes.
const CONF_MAX: u64 = 1 << 20;

/// What is known of an installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    /// As `--version` says, e.g. `apptainer version 1.4.5`.
    pub version: String,
    /// Its configuration file, where it tells.
    pub conf: Option<PathBuf>,
    /// Whether it was installed with the setuid starter, and so does without user namespaces.
    pub setuid: bool,
    /// Whether the configuration lets users bind (`user bind control`, default yes). Without, the
    /// options `--bind` are dropped with a warning (`internal/pkg/runtime/engine/apptainer`).
    pub user_binds: bool,
}

impl Installed {
    /// Asks `program`, `apptainer` or `singularity`.
    ///
    /// # Errors
    /// Its own words when it cannot be run.
    pub fn ask(program: &Path) -> Result<Installed, String> {
        let version = said(program, "--version")?;
        // Lines like `APPTAINER_CONF_FILE=/etc/apptainer/apptainer.conf`.
        let build = said(program, "buildcfg").unwrap_or_default();
        let value = |key: &str| {
            build.lines().find_map(|line| {
                let (name, value) = line.split_once('=')?;
                name.ends_with(key).then(|| value.to_owned())
            })
        };
        let conf = value("_CONF_FILE").map(PathBuf::from);
        let text = conf.as_deref().map(read).unwrap_or_default();
        Ok(Installed {
            version: version.lines().next().unwrap_or_default().to_owned(),
            user_binds: directive(&text, "user bind control") != Some("no"),
            conf,
            setuid: value("_SUID_INSTALL").as_deref() == Some("1"),
        })
    }
}

/// Standard output of `program argument`.
fn said(program: &Path, argument: &str) -> Result<String, String> {
    let failed = |why: String| format!("cannot run `{} {argument}`: {why}", program.display());
    let out = Command::new(program)
        .arg(argument)
        .stdin(Stdio::null())
        .output()
        .map_err(|why| failed(why.to_string()))?;
    if !out.status.success() {
        return Err(failed(String::from_utf8_lossy(&out.stderr).trim().into()));
    }
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

/// A configuration that cannot be read decides nothing: Apptainer itself will complain.
fn read(conf: &Path) -> String {
    let mut text = Vec::new();
    if let Ok(file) = fs::File::open(conf) {
        // What was read before an error counts.
        let _ = file.take(CONF_MAX).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// The value of a directive, `name = value`; the last one counts.
fn directive<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once('='))
        .filter(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim())
        .next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_are_read() {
        let text = "# user bind control = no\nuser bind control = yes\nmount tmp = yes\n";
        assert_eq!(directive(text, "user bind control"), Some("yes"));
        let twice = format!("{text}user bind control=no\n");
        assert_eq!(directive(&twice, "user bind control"), Some("no"));
        assert_eq!(directive("", "user bind control"), None);
    }
}
