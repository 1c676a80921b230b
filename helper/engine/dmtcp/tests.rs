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

use super::installation::{InstallError, Search};
use super::{Dmtcp, image_file};
use crate::container::Place;
use crate::engine::{
    CheckpointError, End, Engine, Placement, Ranks, Running, Start, StartError, Then,
};

const LIMIT: Duration = Duration::from_secs(60);

/// DMTCP, or nothing where it is not installed and may be missing.
fn dmtcp() -> Option<Dmtcp> {
    match Dmtcp::find(&Search::default(), Some(Placement::Injected)) {
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
    generations: usize,
}

impl Case {
    fn new() -> Option<Case> {
        crate::logging::init();
        Some(Case {
            engine: dmtcp()?,
            dir: tempfile::tempdir().unwrap(),
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
            probe: self.command(command),
            env: Vec::new(),
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
        // DMTCP looks for copies of files where they were: the directory is the same for all runs.
        let work = self.path("work");
        if work.exists() {
            fs::remove_dir_all(&work).unwrap();
        }
        self.start_in(work, command, from)
    }

    /// Takes a checkpoint; returns the rank's directory.
    fn save(&mut self, running: &Arc<dyn Running>, then: Then) -> Result<PathBuf, CheckpointError> {
        self.generations += 1;
        let into = self.path(&format!("generation-{}", self.generations));
        fs::create_dir(&into).unwrap();
        running.checkpoint(&into, then, LIMIT, &|| ())?;
        let rank = into.join("rank-0");
        self.engine.verify(&rank).unwrap();
        Ok(rank)
    }
}

/// An end of its own may be completion; one at the checkpoint's hands never is, though DMTCP has it
/// end with code 0 as well.
#[test]
fn an_application_that_ended_before_is_told_from_one_that_was_saved() {
    let Some(mut case) = Case::new() else { return };
    let running = case.start(&["python3", "-c", "pass"], None).unwrap();
    let process = crate::sys::pidfd(running.child()).unwrap();
    assert!(crate::sys::readable(&process, Some(Instant::now() + LIMIT)).unwrap());
    let error = case.save(&running, Then::Stop).unwrap_err();
    assert!(matches!(error, CheckpointError::Ended(_)), "{error:?}");
    assert_eq!(reap(&running), End::Exit(0));
    let out = case.path("out");
    let program = writer(&out);
    let running = case.start(&["python3", "-c", &program], None).unwrap();
    wait_lines(&out, 10);
    case.save(&running, Then::Stop).unwrap();
    assert_eq!(reap(&running), End::Exit(0));
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

/// A program that writes a numbered line every millisecond until [`finish`] says so.
fn writer(file: &Path) -> String {
    format!(
        "import os, time\nout = open({:?}, 'a', buffering=1)\ni, left = 0, 100\nwhile left:\n    \
         out.write(f'{{i}}\\n')\n    i += 1\n    time.sleep(0.001)\n    \
         left -= left < 100 or os.path.exists({:?})\nout.write('done\\n')\n",
        file.display().to_string(),
        gate(file).display().to_string(),
    )
}

fn gate(file: &Path) -> PathBuf {
    file.with_extension("gate")
}

/// Lets a writer come to its end.
fn finish(file: &Path) {
    fs::write(gate(file), "").unwrap();
}

/// Checks that a writer's file is that of one uninterrupted run.
fn assert_exact(file: &Path) {
    let text = fs::read_to_string(file).unwrap();
    assert_eq!(expected(text.lines().count() - 1), text);
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
    let program = writer(&out);
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
    finish(&out);
    assert_eq!(End::Exit(0), reap(&running));
    assert_exact(&out);
}

/// A shell that starts processes all the time: those that start while a checkpoint does must be
/// held as well, and the shell may be neither lost nor frozen on the way back. What those processes
/// do themselves is not looked at: DMTCP may end one that is just being started (docs/engines.md).
/// Returns what the shell wrote.
fn while_processes_come_and_go(then: Then) -> Option<String> {
    let mut case = Case::new()?;
    let out = case.path("out");
    let program = format!(
        "i=0; while [ ! -e {1} ]; do echo $i >> {0}; /bin/true; i=$((i+1)); done; \
         echo done >> {0}; exit 7",
        out.display(),
        gate(&out).display()
    );
    let mut running = case.start(&["bash", "-c", &program], None).unwrap();
    for cycle in 1..=5 {
        let before = fs::read_to_string(&out).unwrap_or_default().lines().count();
        wait_lines(&out, before + 5 + 3 * cycle);
        let saved = case.save(&running, then).unwrap();
        running.kill();
        reap(&running);
        running = case.start(&["bash", "-c", &program], Some(saved)).unwrap();
    }
    finish(&out);
    assert_eq!(End::Exit(7), reap(&running));
    Some(fs::read_to_string(&out).unwrap())
}

#[test]
fn stop_is_exact_while_processes_come_and_go() {
    if let Some(out) = while_processes_come_and_go(Then::Stop) {
        assert_eq!(expected(out.lines().count() - 1), out);
    }
}

#[test]
fn going_on_loses_nothing_while_processes_come_and_go() {
    if let Some(out) = while_processes_come_and_go(Then::Continue) {
        // What was written between checkpoint and kill is written again: at the checkpoint nobody
        // had the file open, so DMTCP does not cut it.
        let mut seen = std::collections::BTreeSet::new();
        let first: String = out
            .split_inclusive('\n')
            .filter(|line| seen.insert(*line))
            .collect();
        assert_eq!(expected(first.lines().count() - 1), first);
    }
}

#[test]
fn a_checkpoint_on_the_way_disturbs_nothing() {
    let Some(mut case) = Case::new() else { return };
    let out = case.path("out");
    let program = writer(&out);
    let running = case.start(&["python3", "-c", &program], None).unwrap();
    let mut last = PathBuf::new();
    for checkpoint in 1..=4 {
        wait_lines(&out, 200 * checkpoint);
        assert!(running.memory() > 1 << 20);
        last = case.save(&running, Then::Continue).unwrap();
    }
    let saved = fs::read_to_string(&out).unwrap().lines().count();
    wait_lines(&out, saved + 100);
    running.signal(Signal::SIGKILL);
    assert_eq!(End::Signal(libc::SIGKILL), reap(&running));
    // The file is longer than it was at the checkpoint: DMTCP cuts it.
    let running = case
        .start(&["python3", "-c", &program], Some(last))
        .unwrap();
    finish(&out);
    assert_eq!(End::Exit(0), reap(&running));
    assert_exact(&out);
}

/// DMTCP itself would end the application.
#[test]
fn a_deleted_working_directory_is_refused() {
    let Some(mut case) = Case::new() else { return };
    let (out, dir) = (case.path("out"), case.path("dir"));
    fs::create_dir(&dir).unwrap();
    let program = format!(
        "import os\nos.chdir({dir:?})\nos.rmdir({dir:?})\n{}\nos.chdir('/')\n{}",
        writer(&out),
        writer(&case.path("more")),
    );
    let running = case.start(&["python3", "-c", &program], None).unwrap();
    wait_lines(&out, 10);
    for then in [Then::Continue, Then::Stop] {
        let error = case.save(&running, then).unwrap_err();
        assert!(
            matches!(&error, CheckpointError::Alive(why) if why.contains("was deleted")),
            "{error:?}"
        );
    }
    finish(&out);
    wait_lines(&case.path("more"), 10);
    case.save(&running, Then::Stop).unwrap();
    assert_eq!(End::Exit(0), reap(&running));
    assert_exact(&out);
}

#[test]
fn ends_come_through() {
    let Some(mut case) = Case::new() else { return };
    for (program, end) in [
        ("true", End::Exit(0)),
        ("exit 7", End::Exit(7)),
        ("kill -SEGV $$", End::Signal(libc::SIGSEGV)),
    ] {
        let running = case.start(&["bash", "-c", program], None).unwrap();
        assert_eq!(end, reap(&running), "{program}");
    }
    let started = case.path("started");
    let program = format!(
        "trap 'exit 5' TERM; touch {}; while :; do :; done",
        started.display()
    );
    let running = case.start(&["bash", "-c", &program], None).unwrap();
    while !started.exists() {
        std::thread::yield_now();
    }
    running.signal(Signal::SIGTERM);
    assert_eq!(End::Exit(5), reap(&running));
}

/// One that has nothing left to do when it is restarted has not failed to restart.
#[test]
fn an_end_right_after_a_restart_comes_through() {
    let Some(mut case) = Case::new() else { return };
    let (out, over) = (case.path("out"), case.path("over"));
    let program = format!(
        "import os, sys, time\nout = open({out:?}, 'a', buffering=1)\n\
         while not os.path.exists({over:?}):\n    out.write('on\\n')\nos._exit(7)\n"
    );
    let running = case.start(&["python3", "-c", &program], None).unwrap();
    wait_lines(&out, 10);
    let saved = case.save(&running, Then::Stop).unwrap();
    reap(&running);
    fs::write(&over, "").unwrap();
    for _ in 0..10 {
        let running = case.start(&["python3"], Some(saved.clone())).unwrap();
        assert_eq!(End::Exit(7), reap(&running));
    }
}

/// What cannot be held is refused before it starts, with the way out.
#[test]
fn what_cannot_be_held_is_refused() {
    let Some(mut case) = Case::new() else { return };
    let source = case.path("static.c");
    let program = case.path("static");
    fs::write(&source, "int main(void) { return 0; }\n").unwrap();
    let made = std::process::Command::new("gcc")
        .args(["-static", "-o"])
        .args([&program, &source])
        .status();
    if made.is_ok_and(|status| status.success()) {
        let program = program.display().to_string();
        let Err(StartError::Unable(why)) = case.start(&[&program], None) else {
            panic!("a static program was started");
        };
        assert!(
            why.contains("statically") && why.contains("engine=criu"),
            "{why}"
        );
    } else {
        eprintln!("SKIPPED: no gcc that links statically");
    }
    let Err(StartError::Unable(why)) = case.start(&["su"], None) else {
        panic!("a setuid program was started");
    };
    assert!(why.contains("setuid"), "{why}");
    assert!(matches!(
        case.start(&["no-such-program"], None),
        Err(StartError::Failed(_))
    ));
}

/// A full disk ends the application in DMTCP's hands: that has to be told, and nothing may pass for
/// a checkpoint.
#[test]
fn a_full_disk_is_told_as_a_loss() {
    let Some(mut case) = Case::new() else { return };
    let small = case.path("small");
    fs::create_dir(&small).unwrap();
    let mounted = nix::mount::mount(
        Some("tmpfs"),
        &small,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        Some("size=10m"),
    );
    if let Err(errno) = mounted {
        eprintln!("SKIPPED: cannot mount a small tmpfs: {errno}");
        return;
    }
    struct Mounted(PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH).unwrap();
        }
    }
    let _mounted = Mounted(small.clone());
    let out = case.path("out");
    let program = writer(&out);
    for then in [Then::Continue, Then::Stop] {
        let before = fs::read_to_string(&out).unwrap_or_default().lines().count();
        let work = small.join(format!("work-{then:?}"));
        // What the last one left must not fill the disk for this one.
        for old in fs::read_dir(&small).unwrap() {
            fs::remove_dir_all(old.unwrap().path()).unwrap();
        }
        let running = case
            .start_in(work, &["python3", "-c", &program], None)
            .unwrap();
        wait_lines(&out, before + 10);
        let into = case.path(&format!("full-{then:?}"));
        fs::create_dir(&into).unwrap();
        let error = running.checkpoint(&into, then, LIMIT, &|| ()).unwrap_err();
        assert!(matches!(error, CheckpointError::Lost(_)), "{error:?}");
        assert_eq!(0, fs::read_dir(&into).unwrap().count());
        running.kill();
        reap(&running);
    }
}

#[test]
fn damaged_process_images_are_found() {
    let Some(mut case) = Case::new() else { return };
    let out = case.path("out");
    let program = writer(&out);
    let running = case.start(&["python3", "-c", &program], None).unwrap();
    wait_lines(&out, 10);
    let saved = case.save(&running, Then::Stop).unwrap();
    reap(&running);
    let file = image_file::list(&saved, image_file::SUFFIX)
        .unwrap()
        .remove(0);
    let whole = fs::read(&file).unwrap();
    let mut damaged = vec![Vec::new(), b"x".to_vec(), whole[..4096].to_vec()];
    damaged.push(whole[..whole.len() - 1].to_vec());
    damaged.push(whole[..whole.len() / 2].to_vec());
    damaged.push([&whole[..], b"x"].concat());
    let mut twisted = whole.clone();
    twisted[128] ^= 1;
    damaged.push(twisted);
    for bytes in damaged {
        fs::write(&file, &bytes).unwrap();
        let error = case.engine.verify(&saved).unwrap_err();
        assert!(error.contains("process image"), "{error}");
    }
    fs::write(&file, &whole).unwrap();
    case.engine.verify(&saved).unwrap();
    fs::rename(&file, saved.join("other")).unwrap();
    assert!(case.engine.verify(&saved).is_err());
}

/// A restart that cannot work ends with an error in time and leaves nothing behind.
#[test]
fn a_restart_that_fails_is_told() {
    let Some(mut case) = Case::new() else { return };
    let out = case.path("out");
    let program = writer(&out);
    let running = case.start(&["python3", "-c", &program], None).unwrap();
    wait_lines(&out, 10);
    let saved = case.save(&running, Then::Stop).unwrap();
    reap(&running);
    fs::remove_file(&out).unwrap();
    fs::create_dir(&out).unwrap();
    let Err(StartError::Failed(why)) = case.start(&["python3", "-c", &program], Some(saved)) else {
        panic!("restarted without the file that was open");
    };
    assert!(why.contains("restart"), "{why}");
}

/// The port of the relay to which a process under DMTCP is connected.
fn relay_port(process: nix::unistd::Pid) -> String {
    let sockets: Vec<String> = fs::read_dir(format!("/proc/{process}/fd"))
        .unwrap()
        .filter_map(|fd| fs::read_link(fd.unwrap().path()).ok())
        .filter_map(|target| {
            let inode = target.to_str()?.strip_prefix("socket:[")?;
            Some(inode.strip_suffix(']')?.to_owned())
        })
        .collect();
    // proc(5): the third field is the other end, the tenth the inode.
    fs::read_to_string("/proc/net/tcp")
        .unwrap()
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|fields| sockets.iter().any(|inode| inode == fields[9]))
        .and_then(|fields| u16::from_str_radix(fields[2].split_once(':')?.1, 16).ok())
        .unwrap()
        .to_string()
}

/// Nobody but this user's processes reaches the coordinator, and they cannot command it.
#[test]
fn commands_of_others_are_refused() {
    let Some(mut case) = Case::new() else { return };
    let out = case.path("out");
    let program = writer(&out);
    let running = case.start(&["python3", "-c", &program], None).unwrap();
    wait_lines(&out, 10);
    let port = relay_port(running.child());
    let out = std::process::Command::new("dmtcp_command")
        .args(["--coord-port", &port, "--kill"])
        .output()
        .unwrap();
    assert!(!out.status.success() || !out.stdout.is_empty());
    case.save(&running, Then::Continue).unwrap();
    running.kill();
    assert_eq!(End::Signal(libc::SIGKILL), reap(&running));
}

/// Several ranks are saved together by rank 0, and restarted together.
#[test]
fn ranks_are_one_set() {
    const RANKS: u32 = 3;
    let Some(mut case) = Case::new() else { return };
    let outs: Vec<PathBuf> = (0..RANKS)
        .map(|rank| case.path(&format!("out-{rank}")))
        .collect();
    let start_all = |case: &Case, from: Option<&Path>| -> Vec<Arc<dyn Running>> {
        let one = |rank: u32| {
            let program = writer(&outs[rank as usize]);
            let command = case.command(&["python3", "-c", &program]);
            let work = case.path("work").join(format!("rank-{rank}"));
            fs::create_dir_all(&work).unwrap();
            let runtime = case.path("runtime");
            fs::create_dir_all(&runtime).unwrap();
            let start = Start {
                place: Place::Bare,
                probe: command.clone(),
                command,
                env: Vec::new(),
                runtime,
                work,
                from: from.map(|from| from.join(format!("rank-{rank}"))),
                ranks: Ranks {
                    rank,
                    count: RANKS,
                    one_node: true,
                },
            };
            case.engine.start(&start, LIMIT).unwrap()
        };
        let one = &one;
        std::thread::scope(|scope| {
            // The other ranks are there first and wait.
            let threads: Vec<_> = (0..RANKS)
                .rev()
                .map(|rank| scope.spawn(move || one(rank)))
                .collect();
            let mut all: Vec<_> = threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect();
            all.reverse();
            all
        })
    };
    let mut running = start_all(&case, None);
    for cycle in 1..=3 {
        for out in &outs {
            let before = fs::read_to_string(out).unwrap_or_default().lines().count();
            wait_lines(out, before + 50);
        }
        let other = case.path("other");
        fs::create_dir_all(&other).unwrap();
        let refused = running[1].checkpoint(&other, Then::Stop, LIMIT, &|| ());
        assert!(
            matches!(refused, Err(CheckpointError::Alive(_))),
            "{refused:?}"
        );

        let first = case.save(&running[0], Then::Stop).unwrap();
        for one in &running {
            assert_eq!(End::Exit(0), reap(one), "cycle {cycle}");
        }
        let generation = first.parent().unwrap().to_path_buf();
        for rank in 1..RANKS {
            case.engine
                .verify(&generation.join(format!("rank-{rank}")))
                .unwrap();
        }
        let aside = case.path("aside");
        fs::rename(generation.join("rank-2"), &aside).unwrap();
        assert!(case.engine.verify(&first).is_err());
        fs::rename(&aside, generation.join("rank-2")).unwrap();
        fs::remove_dir_all(case.path("work")).unwrap();
        running = start_all(&case, Some(&generation));
    }
    outs.iter().for_each(|out| finish(out));
    for one in &running {
        assert_eq!(End::Exit(0), reap(one));
    }
    outs.iter().for_each(|out| assert_exact(out));
}
