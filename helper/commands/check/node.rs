//! Findings about this node, for its administrator.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Check, Findings, Level, Of, containers};
use crate::config::{self, Config};
use crate::container::Place;
use crate::engine::{Engine, criu, dmtcp};
use crate::runtime::Runtime;
use crate::slurm::site::{self, Site};
use crate::task;
use crate::words::{self, variable};

use Level::{Problem, Warning};

/// Largest library that is looked into, in bytes.
const LIBRARY_MAX: u64 = 256 << 20;

/// The file name of the plugin, as it is built and installed.
const PLUGIN: &str = "container_checkpoint.so";

/// How deep files of plugstack.conf are followed that include each other.
const INCLUDES_MAX: usize = 8;

pub fn look(check: &Check, found: &mut Findings) {
    let site = slurm(found);
    let (dirs, plugstack) = match &site {
        Some(site) => (&site.plugin_dirs[..], site.plugstack.clone()),
        None => (&[][..], PathBuf::from("/etc/slurm/plugstack.conf")),
    };
    let named = plugin(&plugstack, dirs, found);
    let chosen = check.common.config.clone();
    let chosen = chosen.or_else(|| std::env::var_os(variable::CONFIG).map(PathBuf::from));
    let config = configuration(chosen.or(named), found);
    engines(&config, found);
    match task::apptainer(&task::Request::default(), &config) {
        Ok(program) => {
            if let Some(installed) = containers::apptainer(&program, found) {
                containers::fuse(&installed, found);
            }
        }
        Err(why) => found.told(
            Warning,
            Of::Node,
            "apptainer",
            &why.to_string(),
            "install Apptainer",
        ),
    }
    containers::namespaces("CRIU and Apptainer without setuid", Warning, found);
}

/// Slurm's release and those of its settings that count.
fn slurm(found: &mut Findings) -> Option<Site> {
    let site = match site::site() {
        Ok(site) => site,
        Err(why) => {
            let cure = "see whether Slurm's controller runs (scontrol ping)";
            found.add(Problem, Of::Node, "slurm", why.to_string(), cure);
            return None;
        }
    };
    let release: Vec<&str> = site.version.split('.').take(2).collect();
    let release = release.join(".");
    let kill_wait = site.kill_wait.as_secs();
    if words::SLURM_RELEASES
        .iter()
        .any(|(_, known, _)| *known == release)
    {
        let text = format!("Slurm {}, KillWait {kill_wait} s", site.version);
        found.ok(Of::Node, "slurm", text);
    } else {
        let known: Vec<&str> = words::SLURM_RELEASES
            .iter()
            .map(|(_, known, _)| *known)
            .collect();
        let cause = format!("the plugin does not know Slurm {}", site.version);
        let cure = format!(
            "use one of {}, or a newer container-checkpoint",
            known.join(", ")
        );
        found.add(Problem, Of::Node, "slurm", cause, cure);
    }
    if site.requeue {
        found.ok(Of::Node, "requeue", "JobRequeue=1: jobs may be requeued");
    } else {
        let cause = "JobRequeue=0: only jobs that say --requeue can go on by themselves";
        let cure = "set JobRequeue=1 in slurm.conf";
        found.add(Warning, Of::Node, "requeue", cause, cure);
    }
    match site.proctrack.as_str() {
        "proctrack/cgroup" => found.ok(Of::Node, "proctrack", "proctrack/cgroup"),
        kind @ ("proctrack/linuxproc" | "proctrack/pgid") => {
            let text =
                format!("{kind}: each job has a small process more, which catches its signals");
            found.ok(Of::Node, "proctrack", text);
        }
        other => found.add(
            Warning,
            Of::Node,
            "proctrack",
            format!("nobody has tried {other}: Slurm's signals may reach the application directly"),
            "set ProctrackType=proctrack/cgroup in slurm.conf",
        ),
    }
    Some(site)
}

/// A line of plugstack.conf that loads the plugin.
struct Line {
    file: PathBuf,
    plugin: PathBuf,
    words: Vec<String>,
}

/// The plugin, as plugstack.conf names it; the configuration that its words name.
fn plugin(plugstack: &Path, dirs: &[PathBuf], found: &mut Findings) -> Option<PathBuf> {
    let mut lines = Vec::new();
    if let Err((file, why)) = gather(plugstack, 0, &mut lines) {
        let cause = format!("cannot read {}: {why}", file.display());
        let cure = "make the file, with the line that docs/admin-guide.md shows";
        found.add(Problem, Of::Node, "plugin", cause, cure);
        return None;
    }
    let Some(line) = lines.first() else {
        let cause = format!("no line of {} names {PLUGIN}", plugstack.display());
        let cure = "add the line that docs/admin-guide.md shows";
        found.add(Problem, Of::Node, "plugin", cause, cure);
        return None;
    };
    let file = match line.plugin.is_absolute() {
        true => Some(line.plugin.clone()),
        false => dirs
            .iter()
            .map(|dir| dir.join(&line.plugin))
            .find(|file| file.is_file()),
    };
    let by = line.file.display();
    match file.as_deref().map(marked) {
        None => found.add(
            Problem,
            Of::Node,
            "plugin",
            format!(
                "{by} names {}, which is in no PluginDir",
                line.plugin.display()
            ),
            "copy the plugin into Slurm's PluginDir, or give its whole path",
        ),
        Some(Err(why)) => found.add(
            Problem,
            Of::Node,
            "plugin",
            format!("{by} names {}: {why}", line.plugin.display()),
            "copy the plugin there, readable by everybody",
        ),
        Some(Ok(false)) => found.add(
            Problem,
            Of::Node,
            "plugin",
            format!(
                "the plugin that {by} names is not of this program's version, {}",
                env!("CARGO_PKG_VERSION")
            ),
            "install plugin and helper of one version on all nodes",
        ),
        Some(Ok(true)) => {
            let file = file.as_deref().unwrap_or(&line.plugin).display();
            let text = format!("{file} {}, by {by}", env!("CARGO_PKG_VERSION"));
            found.ok(Of::Node, "plugin", text);
        }
    }
    let word = |key: &str| {
        line.words
            .iter()
            .rev()
            .find_map(|word| word.strip_prefix(key))
    };
    let helper = Path::new(word("helper=").unwrap_or("/usr/bin/container-checkpoint"));
    let can_run = nix::unistd::access(helper, nix::unistd::AccessFlags::X_OK);
    match can_run {
        Ok(()) => found.ok(Of::Node, "helper", helper.display().to_string()),
        Err(why) => found.add(
            Problem,
            Of::Node,
            "helper",
            format!("{by} makes jobs start {}: {}", helper.display(), why.desc()),
            "install the helper there, or name its path with helper= in that line",
        ),
    }
    word("config=").map(PathBuf::from)
}

/// The lines of plugstack.conf that name the plugin, in files that it includes as well. Slurm's
/// `_spank_stack_process_line()` in `src/common/spank.c`, `plugstack.c` before 23.02: relative
/// patterns are those of the including file's directory.
fn gather(
    file: &Path,
    depth: usize,
    lines: &mut Vec<Line>,
) -> Result<(), (PathBuf, std::io::Error)> {
    let text = fs::read_to_string(file).map_err(|why| (file.to_path_buf(), why))?;
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("include"), Some(pattern)) if depth < INCLUDES_MAX => {
                let pattern = file.parent().unwrap_or(file).join(pattern);
                for included in glob(&pattern) {
                    gather(&included, depth + 1, lines)?;
                }
            }
            (Some("required" | "optional"), Some(plugin))
                if Path::new(plugin).file_name() == Some(PLUGIN.as_ref()) =>
            {
                lines.push(Line {
                    file: file.into(),
                    plugin: plugin.into(),
                    words: words.map(String::from).collect(),
                });
            }
            _ => {}
        }
    }
    Ok(())
}

/// The files that a pattern with `*` and `?` in its last part means, sorted.
fn glob(pattern: &Path) -> Vec<PathBuf> {
    let dir = pattern.parent().unwrap_or(Path::new("/"));
    let name = pattern.file_name().unwrap_or_default().to_string_lossy();
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries
        .filter(|entry| {
            let found = entry.file_name();
            let found = found.to_string_lossy();
            // As in a shell, what begins with a dot has to be named so.
            found.starts_with('.') == name.starts_with('.')
                && matches(name.as_bytes(), found.as_bytes())
        })
        .map(|entry| entry.path())
        .collect();
    files.sort();
    files
}

fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => {
            matches(rest, name)
                || name
                    .split_first()
                    .is_some_and(|(_, name)| matches(pattern, name))
        }
        (Some((b'?', rest)), Some((_, name))) => matches(rest, name),
        (Some((wanted, rest)), Some((byte, name))) => wanted == byte && matches(rest, name),
        _ => false,
    }
}

/// Whether a plugin's file is of this program's version.
fn marked(file: &Path) -> std::io::Result<bool> {
    if fs::metadata(file)?.len() > LIBRARY_MAX {
        return Ok(false);
    }
    let bytes = fs::read(file)?;
    let mark = words::PLUGIN_MARK.as_bytes();
    Ok(bytes.windows(mark.len()).any(|window| window == mark))
}

/// The configuration, whose defaults stand in for one that cannot be used.
fn configuration(path: Option<PathBuf>, found: &mut Findings) -> Config {
    let shown = path.as_deref().unwrap_or(Path::new(config::DEFAULT_PATH));
    match Config::load(path.as_deref()) {
        Ok(config) => {
            let text = match shown.exists() {
                true => format!("{} is valid", shown.display()),
                false => format!("no {}: the defaults count", shown.display()),
            };
            found.ok(Of::Node, "config", text);
            config
        }
        Err(why) => {
            let cure = "correct the file: jobs that ask for checkpoints fail at their start";
            found.add(Problem, Of::Node, "config", why.to_string(), cure);
            Config::default()
        }
    }
}

/// What saves and restores. One that works is enough.
fn engines(config: &Config, found: &mut Findings) {
    let search = dmtcp::installation::Search::here(&config.dmtcp, config.dmtcp_conf.as_deref());
    let dmtcp = dmtcp::installation::find(&search);
    let criu = criu(config);
    let level = match (&dmtcp, &criu) {
        (Err(_), Err(_)) => Problem,
        _ => Warning,
    };
    match dmtcp {
        Ok(installations) => {
            for one in installations {
                let (major, minor) = one.glibc;
                let text = format!(
                    "{} in {}, for images with glibc {major}.{minor} or newer",
                    one.version,
                    one.prefix.display()
                );
                found.ok(Of::Node, "dmtcp", text);
            }
        }
        Err(why) => {
            let cure =
                "install DMTCP 4.0 to 4.2 and name its prefix with `dmtcp` in the configuration";
            found.told(level, Of::Node, "dmtcp", &why.to_string(), cure);
        }
    }
    match criu {
        Ok(text) => found.ok(Of::Node, "criu", text),
        Err(why) => {
            let cure = "install CRIU 3.18 or newer and a kernel that it works with";
            found.told(level, Of::Node, "criu", &why, cure);
        }
    }
}

/// What CRIU is, once it has saved and restored a program here.
fn criu(config: &Config) -> Result<String, String> {
    let criu = criu::Criu::find(config.criu.as_deref()).map_err(|why| why.to_string())?;
    let program = criu.program().to_path_buf();
    let scratch = tempfile::Builder::new()
        .prefix("container-checkpoint-")
        .tempdir()
        .map_err(|why| format!("no directory to try CRIU in: {why}"))?;
    let runtime =
        Runtime::prepare(scratch.path(), Some(&program)).map_err(|why| why.to_string())?;
    criu.can_hold(&Place::Bare, &[], runtime.dir())
        .map_err(|why| why.to_string())?;
    let kernel = nix::sys::utsname::uname()
        .map(|uname| uname.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    Ok(format!(
        "{} ({}{}) saves and restores on kernel {kernel}",
        criu.version(),
        program.display(),
        capabilities(&program)
    ))
}

/// The program's file capabilities, which it needs none of.
fn capabilities(program: &Path) -> String {
    let out = Command::new("getcap")
        .arg(program)
        .stdin(Stdio::null())
        .output();
    let text = out.map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
    match text.unwrap_or_default().trim().split_once(' ') {
        Some((_, capabilities)) => format!(", {capabilities}"),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_through_includes() {
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("plugstack.conf");
        let included = dir.path().join("d");
        fs::create_dir(&included).unwrap();
        fs::write(
            &conf,
            "# x\ninclude d/*.conf # all\ninclude plugstack.conf\n",
        )
        .unwrap();
        fs::write(
            included.join("b.conf"),
            "optional /x/container_checkpoint.so a=b c=d\n",
        )
        .unwrap();
        fs::write(included.join("a.conf"), "required other.so\n").unwrap();
        fs::write(included.join("off"), "required container_checkpoint.so\n").unwrap();
        let mut lines = Vec::new();
        gather(&conf, INCLUDES_MAX - 1, &mut lines).unwrap();
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0].plugin, Path::new("/x/container_checkpoint.so"));
        assert_eq!(lines[0].words, ["a=b", "c=d"]);
    }

    #[test]
    fn patterns() {
        for (pattern, name, expected) in [
            ("*.conf", "a.conf", true),
            ("*.conf", "a.conf~", false),
            ("a?c*", "abc", true),
            ("", "a", false),
            ("a", "", false),
        ] {
            assert_eq!(
                matches(pattern.as_bytes(), name.as_bytes()),
                expected,
                "{pattern}"
            );
        }
    }
}
