//! The check at submission: what the sbatch, srun or salloc around it was told, and how the user is
//! told what was found.
//!
//! The plugin gives the options of its own by variables. All else that a submission says is in the
//! command's own words and in its script's `#SBATCH` lines, and Slurm shows a plugin neither: they
//! are read here, as far as a warning needs them.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::script::Script;
use super::{Findings, HAS_PROBLEM, Level, OK, Of, Submission};
use crate::supervise;
use crate::task::{self, Request};

/// Largest part of a script that is looked at, in bytes; Slurm takes scripts up to 4 MiB.
const SCRIPT_MAX: u64 = 4 << 20;

/// A submission.
#[derive(Debug, Default)]
pub struct Submitted {
    /// The words of the command line up to the script.
    line: Vec<String>,
    /// Those of the script's `#SBATCH` lines.
    lines: Vec<String>,
    script: Option<Vec<u8>>,
    /// The file of the script; none for that of `--wrap`.
    file: Option<PathBuf>,
    /// Whether it is sbatch's.
    pub batch: bool,
}

impl Submitted {
    /// What the parent of this process was told.
    pub fn by_parent() -> Submitted {
        let parent = nix::unistd::getppid();
        // A parent that is gone has told nothing.
        let bytes = fs::read(format!("/proc/{parent}/cmdline")).unwrap_or_default();
        let words = bytes.split(|byte| *byte == 0);
        let mut words = words.map(|word| String::from_utf8_lossy(word).into_owned());
        let program = words.next().unwrap_or_default();
        let mut submitted = Submitted::read(words.collect());
        submitted.batch = program.rsplit('/').next() == Some("sbatch");
        if submitted.batch
            && submitted.script.is_none()
            && let Some(line) = value(&submitted.line, &["--wrap"])
        {
            // As sbatch makes it one.
            submitted.script = Some(format!("#!/bin/sh\n{line}\n").into());
        }
        submitted
    }

    /// What sbatch would be told by a script alone.
    pub fn by_script(path: &Path) -> io::Result<Submitted> {
        let mut text = Vec::new();
        fs::File::open(path)?
            .take(SCRIPT_MAX)
            .read_to_end(&mut text)?;
        if !text.starts_with(b"#!") {
            let why = "sbatch does not take it, since it does not begin with #!";
            return Err(io::Error::other(why));
        }
        Ok(Submitted {
            lines: sbatch_words(&String::from_utf8_lossy(&text)),
            script: Some(text),
            file: Some(path.to_path_buf()),
            batch: true,
            ..Submitted::default()
        })
    }

    fn read(mut line: Vec<String>) -> Submitted {
        let found = line.iter().enumerate().find_map(|(at, word)| {
            let mut text = Vec::new();
            let file = fs::File::open(word).ok()?;
            file.metadata().ok().filter(fs::Metadata::is_file)?;
            file.take(SCRIPT_MAX).read_to_end(&mut text).ok()?;
            text.starts_with(b"#!").then_some((at, text))
        });
        let Some((at, script)) = found else {
            return Submitted {
                line,
                ..Submitted::default()
            };
        };
        let file = line.get(at).map(PathBuf::from);
        line.truncate(at);
        Submitted {
            line,
            lines: sbatch_words(&String::from_utf8_lossy(&script)),
            script: Some(script),
            file,
            batch: false,
        }
    }

    /// The script, if it is one of a batch job.
    pub fn script(&self) -> Option<Script<'_>> {
        let text = self.script.as_deref().filter(|_| self.batch)?;
        let here = std::env::current_dir().ok()?;
        let dir = self.option(&["--chdir", "-D"], &[]);
        let file = self.file.as_deref().and_then(Path::file_name);
        Some(Script {
            text,
            name: file.map_or("--wrap".into(), |file| file.display().to_string()),
            wrapped: self.file.is_none(),
            dir: here.join(dir.unwrap_or_default()),
            exported: self
                .option(&["--export"], &["SBATCH_EXPORT"])
                .is_none_or(|export| export == "ALL"),
        })
    }

    /// What the script's lines ask of this plugin; `image` is what its `--container-image` is called.
    pub fn request(&self, image: &str) -> Request {
        let given = |name: &str| value(&self.lines, &[name]);
        Request {
            name: given("--container-checkpoint"),
            image: given(&format!("--{image}")).map(PathBuf::from),
            engine: given("--container-checkpoint-engine"),
            placement: given("--container-checkpoint-placement"),
            dir: given("--container-checkpoint-dir").and_then(|dir| task::dir_of(&dir)),
            ..Request::default()
        }
    }

    /// The interpreter of the script, with its arguments; empty without a script.
    pub fn interpreter(&self) -> Vec<OsString> {
        self.script
            .as_deref()
            .map(supervise::interpreter)
            .unwrap_or_default()
    }

    /// The value of an option: of the command line, of a variable, of the script, in Slurm's order.
    fn option(&self, names: &[&str], variables: &[&str]) -> Option<String> {
        let variable = || {
            let set = |name: &&str| std::env::var(name).ok().filter(|value| !value.is_empty());
            variables.iter().find_map(set)
        };
        value(&self.line, names)
            .or_else(variable)
            .or_else(|| value(&self.lines, names))
    }

    pub fn partition(&self) -> Option<String> {
        let variables = ["SBATCH_PARTITION", "SALLOC_PARTITION", "SLURM_PARTITION"];
        self.option(&["--partition", "-p"], &variables)
    }

    /// The option that asks for a GPU.
    pub fn gpu(&self) -> Option<String> {
        let long = [
            "--gpus",
            "--gpus-per-node",
            "--gpus-per-task",
            "--gpus-per-socket",
        ];
        // Without a script nobody knows where the options end and a command begins.
        let short = self.script.is_some().then_some("-G");
        for name in long.iter().copied().chain(short) {
            if let Some(value) = self.option(&[name], &[]) {
                return Some(format!("{name}={value}"));
            }
        }
        let gres = self.option(&["--gres"], &["SBATCH_GRES", "SALLOC_GRES", "SLURM_GRES"])?;
        gres.contains("gpu").then(|| format!("--gres={gres}"))
    }
}

/// The words of a script's `#SBATCH` lines, which come before its first command.
fn sbatch_words(script: &str) -> Vec<String> {
    let head = script
        .lines()
        .take_while(|line| line.trim().is_empty() || line.starts_with('#'));
    head.filter_map(|line| line.strip_prefix("#SBATCH"))
        .flat_map(|line| {
            let words = line
                .split_whitespace()
                .take_while(|word| !word.starts_with('#'));
            words.map(|word| word.trim_matches(['"', '\'']).to_owned())
        })
        .collect()
}

/// The value of the last option of one of these names: `--name=value`, `--name value`, `-nvalue`.
fn value(words: &[String], names: &[&str]) -> Option<String> {
    let mut found = None;
    for (at, word) in words.iter().enumerate() {
        for name in names {
            let Some(rest) = word.strip_prefix(name) else {
                continue;
            };
            if rest.is_empty() {
                found = words.get(at + 1).cloned();
            } else if let Some(value) = rest.strip_prefix('=') {
                found = Some(value.to_owned());
            } else if !name.starts_with("--") {
                found = Some(rest.to_owned());
            }
        }
    }
    found
}

/// Tells the user what concerns the job and is not well; what is returned is the exit code.
pub fn tell(findings: &mut Findings, submission: Submission) -> u8 {
    let told = |finding: &super::Finding| finding.of == Of::Job && finding.level > Level::Ok;
    findings.0.retain(told);
    for finding in &findings.0 {
        let cure = finding.cure.as_deref().unwrap_or_default();
        let line = format!("{}: {}; {cure}", finding.about, finding.cause);
        match finding.level {
            Level::Problem => log::error!("{line}"),
            _ => log::warn!("{line}"),
        }
    }
    if submission == Submission::Fail && findings.worst() == Level::Problem {
        HAS_PROBLEM
    } else {
        OK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(String::from).collect()
    }

    #[test]
    fn options_are_found_where_slurm_finds_them() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("job.sh");
        let text = "#!/bin/bash -l\n#SBATCH -p slow --gpus=2 # --gres=gpu\n\n# x\n\
                    #SBATCH --partition \"last\"\ntrue\n#SBATCH -p never\n";
        fs::write(&script, text).unwrap();
        let script = script.to_str().unwrap();
        let found = Submitted::read(words(&format!("-n2 {script} -p no --gres=gpu:9")));
        assert_eq!(found.interpreter(), ["/bin/bash", "-l"]);
        assert_eq!(found.partition().as_deref(), Some("last"));
        assert_eq!(found.gpu().as_deref(), Some("--gpus=2"));
        for (line, expected) in [
            ("-pfast", "fast"),
            ("-p fast", "fast"),
            ("--partition=a -p fast", "fast"),
            ("--partition fast", "fast"),
        ] {
            let found = Submitted::read(words(&format!("{line} {script}")));
            assert_eq!(found.partition().as_deref(), Some(expected), "{line}");
        }
    }

    #[test]
    fn a_command_without_a_script() {
        let found = Submitted::read(words("--gres=gpu:1 -G app"));
        assert_eq!(found.gpu().as_deref(), Some("--gres=gpu:1"));
        assert_eq!(
            Submitted::read(words("--gres=craynetwork:1 -G2 app")).gpu(),
            None
        );
        assert!(found.interpreter().is_empty());
        assert_eq!(value(&words("--partition"), &["--partition"]), None);
    }
}
