//! `check`: whether a job will be able to save itself, told beforehand; and what this node has.
//!
//! Contract: this room gathers and prints findings and decides nothing: what can be held, what fits
//! and what is missing the other rooms know, and the path of a job has its own errors. A check
//! changes nothing but what a job would make first as well: the store's directory and the programs
//! for containers in it.
//!
//! ```text
//! job.rs        findings about a job that is to be submitted, from these three:
//!   state.rs      the store, the name, room and time
//!   containers.rs the image, and what the node needs to start one
//!   engines.rs    the program, and the engines that are to save it
//! node.rs       findings about this node, for its administrator
//! script.rs     findings about containers that the lines of a batch script start
//! submitted.rs  what the sbatch or srun around this check was told
//! ```

mod containers;
mod engines;
mod job;
mod node;
mod script;
mod state;
mod submitted;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{Common, FAILED, OK, output};

/// The worst finding is a warning.
pub const WARNED: u8 = 6;
/// The worst finding is a problem.
pub const HAS_PROBLEM: u8 = 7;

#[derive(Debug, Args)]
#[command(
    override_usage = "container-checkpoint check [OPTIONS] [--image IMAGE] [-- COMMAND...]\n       \
    container-checkpoint check [OPTIONS] --script FILE\n       \
    container-checkpoint check --node [OPTIONS]"
)]
pub struct Check {
    /// The container image
    #[arg(long)]
    pub image: Option<PathBuf>,
    /// What saves and restores: auto, dmtcp or criu
    #[arg(long)]
    pub engine: Option<String>,
    /// Where DMTCP comes from: auto, injected or contained
    #[arg(long)]
    pub placement: Option<String>,
    /// The computation's name: its last checkpoint tells how large the next one will be
    #[arg(long)]
    pub name: Option<String>,
    /// A batch script: its #SBATCH lines, and the containers that its other lines start
    #[arg(long, value_name = "FILE", conflicts_with_all = ["submission", "command"])]
    pub script: Option<PathBuf>,
    /// The partition the job will be in [default: the cluster's]
    #[arg(long)]
    pub partition: Option<String>,
    /// An option for `apptainer exec`; may be given several times
    #[arg(
        long = "apptainer-option",
        allow_hyphen_values = true,
        value_name = "OPTION"
    )]
    pub apptainer_options: Vec<OsString>,
    /// Look at this node instead of a job: what it has, one line each (for administrators)
    #[arg(long, conflicts_with_all = ["image", "engine", "placement", "name", "script", "partition", "submission", "command"])]
    pub node: bool,
    /// What the plugin asks for in sbatch, srun and salloc: only what concerns the job, whichever
    /// node it gets; nothing but warnings and problems; exit code 7 for problems if this is `fail`
    #[arg(long, hide = true)]
    pub submission: Option<Submission>,
    #[command(flatten)]
    pub common: Common,
    /// The application's command line
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// plugstack.conf's word `preflight`, where it is not `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Submission {
    Warn,
    Fail,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Ok,
    /// It may fail, or will only under circumstances.
    Warning,
    /// It will fail.
    Problem,
}

/// What a finding is true of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Of {
    /// The job, on whatever node.
    Job,
    /// The node that the check ran on.
    Node,
}

/// One thing that was found out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about, a word.
    pub about: &'static str,
    pub level: Level,
    pub of: Of,
    /// What is so; of a warning or a problem, its cause.
    pub cause: String,
    /// What can be done about it; none if all is well.
    pub cure: Option<String>,
}

impl Finding {
    fn is_of_job(&self) -> bool {
        self.of == Of::Job
    }
}

/// Findings, in the order in which they are told.
#[derive(Debug, Default)]
pub struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, of: Of, about: &'static str, what: impl Into<String>) {
        self.0.push(Finding {
            about,
            level: Level::Ok,
            of,
            cause: what.into(),
            cure: None,
        });
    }

    fn add(
        &mut self,
        level: Level,
        of: Of,
        about: &'static str,
        cause: impl Into<String>,
        cure: impl Into<String>,
    ) {
        self.0.push(Finding {
            about,
            level,
            of,
            cause: cause.into(),
            cure: Some(cure.into()),
        });
    }

    /// Takes an error's text apart, which names the way out behind its last semicolon; `cure` is
    /// for one that does not.
    fn told(&mut self, level: Level, of: Of, about: &'static str, text: &str, cure: &str) {
        let (cause, cure) = text.rsplit_once("; ").unwrap_or((text, cure));
        self.add(level, of, about, cause, cure);
    }

    fn worst(&self) -> Level {
        let levels = self.0.iter().map(|finding| finding.level);
        levels.max().unwrap_or(Level::Ok)
    }

    /// A line for each finding, one more for each cure.
    fn text(&self) -> String {
        let mut text = String::new();
        let width = self.0.iter().map(|finding| finding.about.len()).max();
        let width = width.unwrap_or(0);
        for finding in &self.0 {
            let level = match finding.level {
                Level::Ok => "ok",
                Level::Warning => "warning",
                Level::Problem => "problem",
            };
            let cause = output::clean(&finding.cause);
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{level:7}  {:width$}  {cause}", finding.about);
            if let Some(cure) = &finding.cure {
                let cure = output::clean(cure);
                let _ = writeln!(text, "{:7}  {:width$}  -> {cure}", "", "");
            }
        }
        text
    }
}

#[derive(Serialize)]
struct Document<'a> {
    format: u32,
    worst: Level,
    findings: &'a [Finding],
}

/// Does it; what is returned is the program's exit code.
pub fn main(check: &Check) -> u8 {
    let mut findings = Findings::default();
    if check.submission.is_some()
        && let Err(why) = crate::sys::die_with_parent(libc::SIGKILL)
    {
        log::debug!("cannot be tied to the command that submits: {why}");
    }
    if check.node {
        node::look(check, &mut findings);
    } else {
        job::look(check, &mut findings);
    }
    if let Some(submission) = check.submission {
        return submitted::tell(&mut findings, submission);
    }
    let worst = findings.worst();
    let printed = if check.common.json {
        output::print_json(&Document {
            format: 1,
            worst,
            findings: &findings.0,
        })
    } else {
        output::print(&findings.text())
    };
    if let Err(why) = printed {
        log::error!("{why}");
        return FAILED;
    }
    match worst {
        Level::Ok => OK,
        Level::Warning => WARNED,
        Level::Problem => HAS_PROBLEM,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_a_line_and_its_cure_another() {
        let mut findings = Findings::default();
        assert_eq!(findings.worst(), Level::Ok);
        findings.ok(Of::Job, "image", "a.sif is whole");
        let text = "DMTCP cannot hold a: it is linked statically; use criu";
        findings.told(Level::Warning, Of::Job, "engine", text, "none");
        assert_eq!(
            findings.text(),
            "ok       image   a.sif is whole\n\
             warning  engine  DMTCP cannot hold a: it is linked statically\n\
             \x20                -> use criu\n"
        );
        assert_eq!(findings.worst(), Level::Warning);
        findings.told(Level::Problem, Of::Job, "image", "bad\x1b[2J", "another");
        assert!(
            findings
                .text()
                .ends_with("problem  image   bad?[2J\n                 -> another\n")
        );
        assert_eq!(findings.worst(), Level::Problem);
    }
}
