//! Command lines of srun.
//!
//! Contract: which options there are, and which take a value, is what the installed srun says
//! (`srun --help`, which asks nobody), this plugin's own among them under the name that they have
//! here. [`Srun::read`] tells nothing of a line of which it does not know where the options end.

use super::{SlurmError, command};
use crate::shellscript::Word;
use crate::words::IMAGE_USAGE;

/// Options of which help does not say that they take a value (Slurm 22.05 and 24.11), or with which
/// the words that follow are no command.
const UNCLEAR: &[&str] = &[
    "container",
    "container-id",
    "help",
    "multi-prog",
    "usage",
    "version",
];

/// The options of the installed srun.
#[derive(Debug, Default)]
pub struct Srun {
    flags: Vec<Flag>,
    /// What this plugin's `--container-image` is called here, if it has one.
    image: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
struct Flag {
    name: String,
    short: Option<u8>,
    value: Value,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    No,
    /// Only behind a `=`, or in the same word as the letter.
    Attached,
    Needed,
}

/// A step, as a line says it.
#[derive(Debug, PartialEq, Eq)]
pub struct Step<'a> {
    /// Options in their order: long name, and value where it is certain.
    options: Vec<(&'a str, Option<String>)>,
    /// The command and its arguments; not empty.
    pub command: &'a [Word],
}

impl Step<'_> {
    /// The last value of an option: `None` without it, `Some(None)` if its value is not certain.
    pub fn option(&self, name: &str) -> Option<Option<&str>> {
        let given = self.options.iter().rfind(|(given, _)| *given == name);
        given.map(|(_, value)| value.as_deref())
    }
}

impl Srun {
    /// Asks the srun in PATH.
    pub fn ask() -> Result<Srun, SlurmError> {
        Ok(Srun::parse(&command::run("srun", &["--help"])?))
    }

    /// Reads lines such as `  -n, --ntasks=ntasks   number of tasks`, `--pty[=fd]`, and what is below
    /// them further to the right.
    pub fn parse(help: &str) -> Srun {
        let mut srun = Srun::default();
        let mut about: Vec<String> = Vec::new();
        for line in help.lines() {
            let words = line.trim_start();
            let (short, long) = match words.as_bytes() {
                [b'-', letter, b',', b' ', b'-', b'-', ..] => (Some(*letter), &words[6..]),
                [b'-', b'-', ..] => (None, &words[2..]),
                _ => {
                    if let Some(about) = about.last_mut() {
                        about.push(' ');
                        about.push_str(words);
                    }
                    continue;
                }
            };
            let (option, what) = long.split_once(' ').unwrap_or((long, ""));
            let end = option.find(['=', '[']).unwrap_or(option.len());
            let (name, value) = option.split_at(end);
            srun.flags.push(Flag {
                name: name.to_owned(),
                short,
                value: match value.as_bytes().first() {
                    None => Value::No,
                    Some(b'[') => Value::Attached,
                    Some(_) => Value::Needed,
                },
            });
            about.push(what.trim().to_owned());
        }
        let squeezed = |text: &String| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let ours = about
            .iter()
            .position(|text| squeezed(text).starts_with(IMAGE_USAGE));
        srun.image = ours.map(|at| srun.flags[at].name.clone());
        srun
    }

    /// What this plugin's `--container-image` is called here.
    pub fn image_option(&self) -> Option<&str> {
        self.image.as_deref()
    }

    /// Reads the words behind `srun` as getopt_long(3) does with `+`.
    pub fn read<'a>(&'a self, words: &'a [Word]) -> Option<Step<'a>> {
        let mut options = Vec::new();
        let mut at = 0;
        loop {
            let word = words.get(at)?;
            if !word.is_one() {
                return None;
            }
            let start = word.start();
            if start == b"--" && word.text().is_some() {
                at += 1;
                break;
            }
            let Some(letters) = start.strip_prefix(b"-").filter(|rest| !rest.is_empty()) else {
                // A word of which not even the first byte is known may be anything.
                word.text()?;
                break;
            };
            at += 1;
            let mut open = None;
            if let Some(long) = letters.strip_prefix(b"-") {
                let end = long.iter().position(|byte| *byte == b'=');
                let name = std::str::from_utf8(&long[..end.unwrap_or(long.len())]).ok()?;
                let flag = self.flags.iter().find(|flag| flag.name == name);
                match (end, flag) {
                    // One that help does not list is one word all the same.
                    (Some(end), _) => {
                        let text = word.text().and_then(|text| text.into_string().ok());
                        let value = text.map(|text| text[2 + end + 1..].to_owned());
                        options.push((name, value));
                    }
                    (None, Some(flag)) if word.text().is_some() => match flag.value {
                        Value::Needed => open = Some(name),
                        _ => options.push((name, None)),
                    },
                    (None, _) => return None,
                }
            } else {
                let text = word.text()?.into_string().ok()?;
                let mut letters = text.strip_prefix('-')?;
                while let Some(letter) = letters.bytes().next() {
                    let flag = self.flags.iter().find(|flag| flag.short == Some(letter))?;
                    letters = letters.get(1..)?;
                    match flag.value {
                        Value::Needed if letters.is_empty() => open = Some(&flag.name[..]),
                        Value::No => options.push((&flag.name[..], None)),
                        Value::Needed | Value::Attached => {
                            options.push((&flag.name[..], Some(letters.to_owned())));
                            letters = "";
                        }
                    }
                }
            }
            if let Some(name) = open {
                let value = words.get(at).filter(|word| word.is_one())?;
                at += 1;
                options.push((name, value.text().and_then(|text| text.into_string().ok())));
            }
        }
        let command = &words[at..];
        let other = |word: &Word| word.text().is_some_and(|text| text == ":");
        let unclear = options.iter().any(|(name, _)| UNCLEAR.contains(name));
        if unclear || command.is_empty() || command.iter().any(other) {
            return None;
        }
        Some(Step { options, command })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shellscript;

    /// A part of what Slurm 24.11 prints.
    const HELP: &str = "\
Usage: srun [OPTIONS(0)... [executable(0) [args(0)...]]]

Parallel run options:
  -D, --chdir=path            change remote current working directory
      --container             Path to OCI container bundle
  -I, --immediate[=secs]      exit if resources not available in \"secs\"
  -K, --kill-on-bad-exit      kill the job if any task terminates with a
                              non-zero exit code
  -l, --label                 prepend task number to lines of stdout/err
  -n, --ntasks=ntasks         number of tasks to run
      --multi-prog            if set the program name specified is the
      --pty[=fd]              run task zero in pseudo terminal

Options provided by plugins:

      --container-checkpoint-engine=ENGINE
                              what saves and restores processes: auto, dmtcp or
                              criu
      --resumable-image=IMAGE with --container-checkpoint: run in this
                              container, a SIF file or a sandbox directory of
                              Apptainer

Help options:
  -h, --help                  show this help message
";

    #[test]
    fn help_is_read() {
        let srun = Srun::parse(HELP);
        assert_eq!(srun.image_option(), Some("resumable-image"));
        let values: Vec<_> = srun
            .flags
            .iter()
            .map(|flag| (&flag.name[..], flag.short, flag.value))
            .collect();
        assert_eq!(
            values[..4],
            [
                ("chdir", Some(b'D'), Value::Needed),
                ("container", None, Value::No),
                ("immediate", Some(b'I'), Value::Attached),
                ("kill-on-bad-exit", Some(b'K'), Value::No),
            ]
        );
        assert_eq!(Srun::parse("").image_option(), None);
    }

    #[test]
    fn the_command_begins_behind_the_options() {
        let srun = Srun::parse(HELP);
        let rest = |line: &str| {
            let (found, _) = shellscript::commands(line.as_bytes());
            let step = srun.read(&found.first()?.words)?;
            let words = step.command.iter();
            let words: Vec<_> = words
                .map(|word| word.text().unwrap_or("?".into()).into_string().unwrap())
                .collect();
            let chdir = step.option("chdir").flatten().unwrap_or("-").to_owned();
            Some(format!("{chdir}: {}", words.join(" ")))
        };
        for (line, expected) in [
            ("a -n 4", "-: a -n 4"),
            ("-n4 -lD /x a", "/x: a"),
            ("-ln 4 --chdir /x --chdir=/y --label a $B", "/y: a ?"),
            ("--ntasks \"$N\" --pty -I a", "-: a"),
            ("-I5 --cpu-bind=none --unknown=x -- -a", "-: -a"),
            ("-n $SLURM_NTASKS --ntasks=${SLURM_NTASKS} a", "-: a"),
            ("--export=\"A=$B\" --chdir=\"$C\" a", "-: a"),
        ] {
            assert_eq!(rest(line).as_deref(), Some(expected), "{line}");
        }
        for line in [
            "-n",
            "-n 4",
            "$A a",
            "\"$A\" a",
            "-n $N a",
            "--cpu-bind none a",
            "-q a",
            "--container x a",
            "--multi-prog a",
            "-h",
            "a : b",
            "--label$X a",
        ] {
            assert_eq!(rest(line), None, "{line}");
        }
    }
}
