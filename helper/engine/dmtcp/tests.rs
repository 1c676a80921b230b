//! The engine with a real DMTCP, on the bare host.
//!
//! Where `dmtcp_launch` is missing these tests say so and pass, unless
//! `CONTAINER_CHECKPOINT_REQUIRE_DMTCP=1` is set.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};

use super::Dmtcp;
use super::installation::{InstallError, Search};
use crate::container::Place;
use crate::engine::{CheckpointError, End, Engine, Ranks, Running, Start, StartError, Then};

const LIMIT: Duration = Duration::from_secs(60);

/// DMTCP, or nothing where it is not installed and may be missing.
fn dmtcp() -> Option<Dmtcp> {
    match Dmtcp::find(&Search::default()) {
        Ok(found) => Some(found),
        Err(InstallError::NotInstalled) => {
            assert!(
                std::env::var_os("CONTAINER_CHECKPOINT_REQUIRE_DMTCP").is_none(),
                "DMTCP is required and not installed"
            );
            eprintln!("SKIPPED: DMTCP is not installed, nothing of the dmtcp engine was tested");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// One application with a directory of its own.
struct Case {
    engine: Dmtcp,
    dir: tempfile::TempDir,
    /// Runs so far: each gets its own working directory.
    runs: usize,
    generations: usize,
}

impl Case {
    fn new() -> Option<Case> {
        Some(Case {
            engine: dmtcp()?,
            dir: tempfile::tempdir().unwrap(),
            runs: 0,
            generations: 0,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    fn start_in(
        &mut self,
        work: PathBuf,
        command: &[&str],
        from: Option<PathBuf>,
    ) -> Result<Arc<dyn Running>, StartError> {
        fs::create_dir_all(&work).unwrap();
        let runtime = self.path("runtime");
        fs::create_dir_all(&runtime).unwrap();
        let start = Start {
            place: Place::Bare,
            command: self.command(command),
            runtime,
            work,
            from,
            ranks: Ranks {
                rank: 0,
                count: 1,
                one_node: true,
            },
        };
        self.engine.start(&start, LIMIT)
    }

    fn start(
        &mut self,
        command: &[&str],
        from: Option<PathBuf>,
    ) -> Result<Arc<dyn Running>, StartError> {
        self.runs += 1;
        let work = self.path(&format!("work-{}", self.runs));
        self.start_in(work, command, from)
    }

    /// Takes a checkpoint; returns the rank's directory.
    fn save(&mut self, running: &Arc<dyn Running>, then: Then) -> Result<PathBuf, CheckpointError> {
        self.generations += 1;
        let into = self.path(&format!("generation-{}", self.generations));
        fs::create_dir(&into).unwrap();
        running.checkpoint(&into, then, LIMIT)?;
        let rank = into.join("rank-0");
        self.engine.verify(&rank).unwrap();
        Ok(rank)
    }
}

fn reap(running: &Arc<dyn Running>) -> End {
    let status: WaitStatus = waitpid(running.child(), None).unwrap();
    running.ended(status)
}

/// Waits until `file` has at least `lines` lines. The file is what is waited for; there is no event
/// for it that a test could not miss.
fn wait_lines(file: &Path, lines: usize) {
    let end = Instant::now() + LIMIT;
    loop {
        let now = fs::read_to_string(file).unwrap_or_default();
        if now.lines().count() >= lines {
            return;
        }
        assert!(Instant::now() < end, "{} stays at {now:?}", file.display());
        std::thread::yield_now();
    }
}

/// A program that writes a numbered line every millisecond until `last`.
fn writer(file: &Path, last: usize) -> String {
    format!(
        "import time\nout = open({:?}, 'a', buffering=1)\nfor i in range({last}):\n    \
         out.write(f'{{i}}\\n')\n    time.sleep(0.001)\nout.write('done\\n')\n",
        file.display().to_string()
    )
}

fn expected(last: usize) -> String {
    let mut text: String = (0..last).map(|i| format!("{i}\n")).collect();
    text.push_str("done\n");
    text
}

#[test]
fn stop_and_restart_is_exact() {
    let Some(mut case) = Case::new() else { return };
    let out = case.path("out");
    let program = writer(&out, 3000);
    let mut running = case.start(&["python3", "-c", &program], None).unwrap();
    for cycle in 1..=5 {
        let before = fs::read_to_string(&out).unwrap_or_default().lines().count();
        wait_lines(&out, before + 100);
        let saved = case.save(&running, Then::Stop).unwrap();
        assert_eq!(End::Exit(0), reap(&running), "cycle {cycle}");
        running = case
            .start(&["python3", "-c", &program], Some(saved))
            .unwrap();
    }
    assert_eq!(End::Exit(0), reap(&running));
    assert_eq!(expected(3000), fs::read_to_string(&out).unwrap());
}
