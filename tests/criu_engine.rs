//! The criu engine on real containers, without Slurm and without the rest of the helper.
//!
//! Three roles of one program, since CRIU needs a whole process tree:
//! - *inside* the lab's root file system, as a user: runs the cases and reads what jobs write;
//! - *one*: one run of one job, as the helper would do it: starts or restarts the application with the
//!   engine on its own standard streams, and does what the case says over a socket;
//! - *agent*: the engine's own agent in the container.
// The helper's modules are only partly used here, and their own tests are not in this program.
#![allow(dead_code, unused_imports)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../plugin/words.rs"]
mod words;

#[path = "../helper/container/mod.rs"]
mod container;
#[path = "../helper/engine/mod.rs"]
mod engine;
#[path = "../helper/fault.rs"]
mod fault;
#[path = "../helper/logging.rs"]
mod logging;
#[path = "../helper/pipes.rs"]
mod pipes;
#[path = "../helper/runtime.rs"]
mod runtime;
#[path = "../helper/shell.rs"]
mod shell;
#[path = "../helper/shellscript.rs"]
mod shellscript;
#[path = "../helper/sys.rs"]
mod sys;

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use container::{Apptainer, Place};
use engine::criu::Criu;
use engine::{End, Engine, Ranks, Running, Start, Then};
use nix::sys::signal::Signal;
use runtime::Runtime;

const LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    logging::init();
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let word = arguments
        .get(1)
        .and_then(|word| word.to_str())
        .unwrap_or_default();
    match word {
        "agent" => {
            let code = engine::criu::agent::main(&arguments[2..]);
            ExitCode::from(u8::try_from(code).unwrap_or(1))
        }
        "one" => one(&arguments[2..]),
        "inside" => inside(&arguments[2..]),
        _ => in_a_cluster(),
    }
}

/// Runs the cases on a node of a cluster, as a user with subordinate ids and as one without.
fn in_a_cluster() -> ExitCode {
    let spec = lab::Spec {
        nodes: 1,
        dmtcp: false,
        helper: Some(std::env::current_exe().unwrap()),
        ..lab::Spec::default()
    };
    let cluster = match lab::Cluster::start(&spec) {
        Ok(cluster) => cluster,
        Err(error) => {
            println!("cannot start a cluster: {error:?}");
            return ExitCode::FAILURE;
        }
    };
    let limit = Duration::from_secs(900);
    let small = "mkdir /small && mount -t tmpfs -o size=40m,mode=1777 tmpfs /small";
    cluster.run_on("n1", "root", small).unwrap().ok().unwrap();
    let program = "/usr/bin/container-checkpoint";
    let mut failed = false;
    for (user, filters) in [
        ("alice", &[][..]),
        ("carol", &["exact_over_restarts", "places"]),
    ] {
        let argv = [&[program, "inside", "/images"], filters].concat();
        let output = cluster.exec(Some("n1"), user, &argv, "", limit).unwrap();
        print!("as {user}:\n{}", output.stdout);
        if !output.status.success() {
            print!("{}", output.stderr);
            failed = true;
        }
    }
    if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

/// `one RUNTIME STORE SOCKET IMAGE|- FROM|- COMMAND…`
fn one(arguments: &[OsString]) -> ExitCode {
    let [base, store, socket, image, from, command @ ..] = arguments else {
        return ExitCode::from(2);
    };
    let store = Path::new(store);
    let mut talk = UnixStream::connect(socket).unwrap();
    let mut heard = BufReader::new(talk.try_clone().unwrap());
    let criu = Criu::find(None).unwrap();
    let runtime = Runtime::prepare(Path::new(base), Some(criu.program())).unwrap();
    let work = tempfile::Builder::new()
        .prefix("work-")
        .tempdir_in(store)
        .unwrap();
    let start = Start {
        place: place(image.to_str().unwrap()),
        command: command.to_vec(),
        probe: command.to_vec(),
        env: Vec::new(),
        runtime: runtime.dir().into(),
        work: work.path().into(),
        from: (from != "-").then(|| PathBuf::from(from)),
        ranks: Ranks {
            rank: 0,
            count: 1,
            one_node: true,
        },
    };
    let running = match criu.start(&start, LIMIT) {
        Ok(running) => running,
        Err(error) => {
            writeln!(talk, "failed {error}").unwrap();
            return ExitCode::from(90);
        }
    };
    writeln!(talk, "running {}", running.child()).unwrap();
    let asked = running.clone();
    // Held while a request is answered: this process stays for the answer.
    let busy = Arc::new(Mutex::new(()));
    let ours = busy.clone();
    std::thread::spawn(move || {
        let mut line = String::new();
        while heard.read_line(&mut line).unwrap() > 0 {
            let _busy = ours.lock().unwrap();
            let words: Vec<&str> = line.split_whitespace().collect();
            let answer = obey(&criu, &*asked, &words);
            // The case may have gone on without it.
            let _ = writeln!(talk, "{answer}");
            line.clear();
        }
    });
    let status = nix::sys::wait::waitpid(running.child(), None).unwrap();
    let _idle = busy.lock();
    match running.ended(status) {
        End::Exit(code) => ExitCode::from(u8::try_from(code).unwrap()),
        End::Signal(signal) => sys::die_of(signal),
    }
}

fn place(image: &str) -> Place {
    match image {
        "-" => Place::Bare,
        _ => Place::Apptainer(Apptainer {
            prefix: Vec::new(),
            program: "apptainer".into(),
            globals: Vec::new(),
            options: Vec::new(),
            flags: Default::default(),
            image: image.into(),
            binds: Vec::new(),
            variables: Vec::new(),
        }),
    }
}

fn obey(criu: &Criu, running: &dyn Running, words: &[&str]) -> String {
    match words {
        [then @ ("stop" | "continue"), dir, limit_ms] => {
            let then = if *then == "stop" {
                Then::Stop
            } else {
                Then::Continue
            };
            let limit = Duration::from_millis(limit_ms.parse().unwrap());
            let saved = running
                .checkpoint(Path::new(dir), then, limit, &|| ())
                .map(|()| {
                    criu.verify(&Path::new(dir).join("rank-0")).unwrap();
                });
            match saved {
                Ok(()) => "saved".into(),
                Err(engine::CheckpointError::Alive(why)) => {
                    format!("alive {}", why.replace('\n', " "))
                }
                Err(engine::CheckpointError::Lost(why) | engine::CheckpointError::Ended(why)) => {
                    format!("lost {}", why.replace('\n', " "))
                }
            }
        }
        ["signal", number] => {
            running.signal(Signal::try_from(number.parse::<i32>().unwrap()).unwrap());
            "sent".into()
        }
        ["memory"] => running.memory().to_string(),
        ["kill"] => {
            running.kill();
            "killed".into()
        }
        other => format!("what is {other:?}?"),
    }
}

/// What a case runs in.
struct Case {
    store: PathBuf,
    /// Where our programs are, if not in the store.
    runtime: Option<PathBuf>,
    image: String,
    generations: u32,
}

/// One run of a job, seen by the case.
struct Run {
    process: Child,
    output: BufReader<ChildStdout>,
    talk: BufReader<UnixStream>,
    /// What was read of the output so far.
    text: String,
}

impl Case {
    fn run(&self, from: Option<&Path>, input: Stdio, command: &[&str]) -> Run {
        let path = self.store.join("socket");
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .current_dir(&self.store)
            .arg("one")
            .args([
                self.runtime.as_ref().unwrap_or(&self.store),
                &self.store,
                &path,
            ])
            .arg(&self.image)
            .arg(from.map(|dir| dir.join("rank-0")).unwrap_or("-".into()))
            .args(command)
            .stdin(input)
            .stdout(Stdio::piped())
            .spawn();
        let mut process = process.unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let (talk, _) = listener.accept().unwrap();
        Run {
            process,
            output,
            talk: BufReader::new(talk),
            text: String::new(),
        }
    }

    fn start(&self, from: Option<&Path>, command: &[&str]) -> Run {
        let mut run = self.run(from, Stdio::null(), command);
        let said = run.said();
        assert!(said.starts_with("running"), "{said}");
        run
    }

    /// Opens a gate of [`COUNTER`].
    fn open(&self, gate: &str) {
        fs::write(self.store.join(gate), "").unwrap();
    }

    fn generation(&mut self) -> PathBuf {
        self.generations += 1;
        let dir = self.store.join(format!("g{}", self.generations));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        dir
    }
}

impl Run {
    fn said(&mut self) -> String {
        let mut line = String::new();
        self.talk.read_line(&mut line).unwrap();
        line.trim_end().into()
    }

    fn ask(&mut self, what: &str) -> String {
        writeln!(self.talk.get_mut(), "{what}").unwrap();
        self.said()
    }

    /// Reads `lines` more lines of output.
    fn read(&mut self, lines: usize) {
        for _ in 0..lines {
            assert!(
                self.output.read_line(&mut self.text).unwrap() > 0,
                "output ended: {}",
                self.text
            );
        }
    }

    /// Reads lines until there is `path`.
    fn read_until(&mut self, path: &Path) {
        while !path.exists() {
            self.read(1);
        }
    }

    fn save(&mut self, then: &str, dir: &Path) {
        let said = self.ask(&format!("{then} {} 60000", dir.display()));
        assert_eq!("saved", said);
    }

    /// Reads all output there will be; gives it and how the run ended, as a shell would put it.
    fn finish(mut self) -> (String, i32) {
        self.output.read_to_string(&mut self.text).unwrap();
        let status = self.process.wait().unwrap();
        use std::os::unix::process::ExitStatusExt;
        (
            self.text,
            status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap()),
        )
    }
}

/// What DMTCP gets silently wrong: timers and memory behind descriptors, memory that processes share;
/// and socket pairs between processes, a deleted file, a lock.
const OBJECTS: &str = r#"
import ctypes, fcntl, mmap, multiprocessing, os, select, struct, sys, tempfile, time
libc = ctypes.CDLL(None, use_errno=True)
timer = libc.timerfd_create(1, 0)
memory = os.memfd_create('numbers'); os.ftruncate(memory, 4096)
shared = mmap.mmap(-1, 4096)
name = tempfile.mkdtemp(dir='.')
gone = tempfile.TemporaryFile(dir='.'); locked = open(name + '/lock', 'w'); fcntl.flock(locked, fcntl.LOCK_EX)
poll = select.epoll(); poll.register(timer, select.EPOLLIN)
ours, theirs = multiprocessing.Pipe()
def child():
    while (n := theirs.recv()) is not None:
        shared[0:8] = struct.pack('q', n); theirs.send(n * n)
worker = multiprocessing.Process(target=child, daemon=True); worker.start()
for i in range(200):
    libc.timerfd_settime(timer, 0, struct.pack('4q', 0, 0, 0, 10**7), None)
    assert poll.poll(5)
    assert struct.unpack('q', os.read(timer, 8))[0] > 0
    ours.send(i); got = ours.recv()
    assert struct.unpack('q', shared[0:8])[0] == i and got == i * i
    os.pwrite(memory, str(i).encode(), 0); os.lseek(gone.fileno(), 0, 2); gone.write(b'x'); gone.flush()
    print(got, os.pread(memory, 9, 0).strip(b'\0').decode(), os.fstat(gone.fileno()).st_size, flush=True)
ours.send(None); worker.join()
print('done', flush=True)
"#;

/// A program that prints a line every millisecond until its first gate is there, tells so, goes on
/// until the next, and ends with 7 after the last: however slow the machine is, it runs as long as
/// the case needs it. A case puts what is to be done at each line and at each gate into it.
const COUNTER: &str = "
import os, socket, sys, time
START
i = 0
for gate in sys.argv[1:]:
    while not os.path.exists(gate):
        print(i, flush=True)
        LINE
        i += 1
        time.sleep(0.001)
    GATE
sys.exit(7)
";

fn counter(start: &str, line: &str, gate: &str) -> String {
    COUNTER
        .replace("START", start)
        .replace("LINE", line)
        .replace("GATE", if gate.is_empty() { "pass" } else { gate })
}

/// What a counter printed in all of its runs, and how the last ended.
fn assert_counted((text, code): (String, i32)) {
    assert_eq!(counted(text.lines().count()), text);
    assert_eq!(7, code);
}

fn counted(to: usize) -> String {
    (0..to).map(|i| format!("{i}\n")).collect()
}

fn output_is_exact_over_restarts(case: &mut Case, restarts: usize) {
    let program = counter("", "", "");
    let command = ["python3", "-c", &program, "end"];
    let mut text = String::new();
    let mut from: Option<PathBuf> = None;
    for _ in 0..restarts {
        let mut run = case.start(from.as_deref(), &command);
        run.read(50);
        let dir = case.generation();
        run.save("stop", &dir);
        let (more, code) = run.finish();
        assert_eq!(137, code);
        text += &more;
        from = Some(dir);
    }
    let mut run = case.start(from.as_deref(), &command);
    run.read(50);
    case.open("end");
    let (more, code) = run.finish();
    assert_counted((text + &more, code));
}

fn output_is_exact_over_checkpoints(case: &mut Case, checkpoints: usize) {
    let program = counter("", "", "");
    let mut run = case.start(None, &["python3", "-c", &program, "end"]);
    for _ in 0..checkpoints {
        run.read(30);
        let dir = case.generation();
        run.save("continue", &dir);
    }
    run.read(30);
    case.open("end");
    assert_counted(run.finish());
}

/// Runs `command` to its end without interruption, and again with a stop after `lines` lines and a
/// restart: both have to be the same.
fn same_as_uninterrupted(case: &mut Case, lines: usize, command: &[&str]) {
    let whole = case.start(None, command).finish();
    let mut run = case.start(None, command);
    run.read(lines);
    let dir = case.generation();
    run.save("stop", &dir);
    let (text, _) = run.finish();
    assert!(text.len() < whole.0.len(), "it was not interrupted: {text}");
    let (more, code) = case.start(Some(&dir), command).finish();
    assert_eq!(whole, (text + &more, code));
}

const NUMPY: &str = "
import numpy as np
a=np.random.default_rng(1).random((300,300))
for i in range(60):
    a=a@a; a/=np.abs(a).max()
    if i%2==0: print(i,repr(float(a.sum())),flush=True)
";

/// A shell, two pipelines and a background child; ends by itself.
const PIPELINE: &str = "(for i in $(seq 1 300); do echo $i; sleep 0.003; done) | while read n; do \
    echo $((n * n)); done | cat & wait; echo done; exit 3";

fn ends_are_reported(case: &mut Case) {
    for (script, code) in [
        ("exit 7", 7),
        ("kill -SEGV $$", 139),
        ("kill -TERM $$", 143),
        ("true", 0),
    ] {
        // Without a restart, and with one.
        assert_eq!(
            (String::new(), code),
            case.start(None, &["sh", "-c", script]).finish()
        );
        let script = format!("echo a; read x; {script}");
        let (input, mut hold) = nix::unistd::pipe().map(|(r, w)| (r, Some(w))).unwrap();
        let mut run = case.run(None, input.into(), &["sh", "-c", &script]);
        assert!(run.said().starts_with("running"));
        run.read(1);
        let dir = case.generation();
        run.save("stop", &dir);
        hold.take();
        run.finish();
        let (more, ended) = case.start(Some(&dir), &["sh"]).finish();
        assert_eq!((String::new(), code), (more, ended));
    }
}

fn signals_come_through(case: &mut Case) {
    let script = "trap 'echo hup' HUP; trap 'echo term; exit 4' TERM; echo up; \
        while :; do sleep 0.01; done";
    let mut run = case.start(None, &["bash", "-c", script]);
    run.read(1);
    assert_eq!("sent", run.ask("signal 1"));
    run.read(1);
    let dir = case.generation();
    run.save("stop", &dir);
    assert_eq!("up\nhup\n", run.finish().0);
    let mut run = case.start(Some(&dir), &["bash"]);
    assert_eq!("sent", run.ask("signal 1"));
    run.read(1);
    assert_eq!("sent", run.ask("signal 15"));
    assert_eq!(("hup\nterm\n".into(), 4), run.finish());
}

/// A child that has ended and is not waited for yet is there again, with how it ended.
fn ended_children_are_kept(case: &mut Case) {
    let program = "import os, sys\nchild = os.fork()\nif child == 0: os._exit(3)\n\
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)\nprint('ended', flush=True)\n\
        sys.stdin.read()\nprint(os.waitpid(child, 0)[1] >> 8)";
    let mut run = case.run(None, Stdio::piped(), &["python3", "-c", program]);
    assert!(run.said().starts_with("running"));
    run.read(1);
    let dir = case.generation();
    run.save("continue", &dir);
    drop(run.process.stdin.take());
    assert_eq!(("ended\n3\n".into(), 0), run.finish());
    let run = case.start(Some(&dir), &["python3"]);
    assert_eq!(("3\n".into(), 0), run.finish());
}

fn input_is_exact(case: &mut Case) {
    let lines: String = (0..60_000).map(|i| format!("{i}\n")).collect();
    let path = case.store.join("input");
    fs::write(&path, &lines).unwrap();
    let open = || Stdio::from(fs::File::open(&path).unwrap());
    let script = "import sys,time\nfor n,l in enumerate(sys.stdin.buffer):\n sys.stdout.buffer.write(l)\n if n%500==0: sys.stdout.flush(); time.sleep(0.005)";
    let mut text = String::new();
    let mut from: Option<PathBuf> = None;
    for _ in 0..2 {
        let mut run = case.run(from.as_deref(), open(), &["python3", "-c", script]);
        assert!(run.said().starts_with("running"));
        run.read(5000);
        let dir = case.generation();
        run.save("stop", &dir);
        text += &run.finish().0;
        from = Some(dir);
    }
    let mut run = case.run(from.as_deref(), open(), &["python3"]);
    assert!(run.said().starts_with("running"));
    let (more, code) = run.finish();
    assert_eq!((lines, 0), (text + &more, code));
}

/// Files that grew after the checkpoint are as they were again; one that is gone is named.
fn files_go_back(case: &mut Case) {
    let path = case.store.join("out.txt");
    let program = counter(
        &format!("f = open('{}', 'a')", path.display()),
        "f.write(f'{i}\\n'); f.flush()",
        "",
    );
    let command = ["python3", "-c", &program, "end"];
    let mut run = case.start(None, &command);
    run.read(20);
    let dir = case.generation();
    run.save("continue", &dir);
    run.read(100);
    run.ask("kill");
    run.finish();
    let grown = fs::read_to_string(&path).unwrap();
    let mut run = case.start(Some(&dir), &command);
    run.read(1);
    let first: usize = run.text.trim().parse().unwrap();
    assert!(grown.lines().count() > first);
    case.open("end");
    let (more, code) = run.finish();
    assert_eq!(7, code);
    assert_eq!(
        counted(first + more.lines().count()),
        fs::read_to_string(&path).unwrap()
    );

    fs::write(&path, "0").unwrap();
    let mut run = case.run(Some(&dir), Stdio::null(), &command);
    let said = run.said();
    assert!(
        said.starts_with("failed") && said.contains("out.txt"),
        "{said}"
    );
    run.finish();
    fs::remove_file(&path).unwrap();
    let mut run = case.run(Some(&dir), Stdio::null(), &command);
    let said = run.said();
    assert!(
        said.contains("out.txt") && said.contains("put it back"),
        "{said}"
    );
    run.finish();
}

/// A damaged or incomplete set is found before it is used.
fn damage_is_found(case: &mut Case) {
    let mut run = case.start(None, &["sleep", "60"]);
    let dir = case.generation();
    run.save("stop", &dir);
    run.finish();
    let criu = Criu::find(None).unwrap();
    let rank = dir.join("rank-0");
    criu.verify(&rank).unwrap();
    for entry in fs::read_dir(&rank).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let bytes = fs::read(&path).unwrap();
        if bytes.is_empty() {
            continue;
        }
        let needed = [
            "core",
            "mm",
            "pagemap",
            "pages",
            "pstree",
            "files",
            "inventory",
            "fs-",
            "ids-",
        ]
        .iter()
        .any(|kind| name.starts_with(kind));
        if needed {
            fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
            assert!(criu.verify(&rank).is_err(), "{name} cut");
            fs::remove_file(&path).unwrap();
            assert!(criu.verify(&rank).is_err(), "{name} missing");
        }
        // Whatever stands in a file, nothing panics.
        for at in (0..bytes.len().min(400)).step_by(3) {
            let mut other = bytes.clone();
            other[at] ^= 0xff;
            fs::write(&path, &other).unwrap();
            let _ = criu.verify(&rank);
            let _ = criu.written(&rank);
        }
        fs::write(&path, &bytes).unwrap();
    }
    criu.verify(&rank).unwrap();
}

/// A checkpoint that fails leaves the application as it was, and the next one works.
fn failed_checkpoints_harm_nothing(case: &mut Case) {
    // A listening socket with a connected peer outside is what CRIU cannot hold by itself.
    let program = counter(
        "a = socket.create_server(('127.0.0.1', 0))\nb = socket.create_connection(a.getsockname())\nc, _ = a.accept()",
        "",
        "if gate == 'closed': a.close(); b.close(); c.close(); open('is-closed', 'w').close()",
    );
    let mut run = case.start(None, &["python3", "-c", &program, "closed", "end"]);
    run.read(20);
    for then in ["continue", "stop"] {
        let dir = case.generation();
        let said = run.ask(&format!("{then} {} 60000", dir.display()));
        assert!(
            said.starts_with("alive") && said.contains("network"),
            "{said}"
        );
        assert_eq!(0, fs::read_dir(&dir).unwrap().count());
    }
    case.open("closed");
    run.read_until(&case.store.join("is-closed"));
    let dir = case.generation();
    run.save("continue", &dir);
    case.open("end");
    assert_counted(run.finish());
}

fn the_dead_leave_nothing(case: &mut Case) {
    // The application dies with its agent, and with the process outside.
    let mark = format!("{}", 100_000 + std::process::id());
    let alive = || {
        let mut pids = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(line) = fs::read(entry.path().join("cmdline")) else {
                continue;
            };
            if line == format!("sleep\0{mark}\0").into_bytes() {
                pids.push(
                    entry
                        .file_name()
                        .into_string()
                        .unwrap()
                        .parse::<i32>()
                        .unwrap(),
                );
            }
        }
        pids
    };
    let mut run = case.start(None, &["sleep", &mark]);
    let found = alive();
    assert_eq!(1, found.len());
    // The program may just be about to map its libraries.
    let limit = Instant::now() + LIMIT;
    loop {
        let memory: u64 = run.ask("memory").parse().unwrap();
        assert!(memory < 100_000_000, "{memory}");
        if memory > 100_000 {
            break;
        }
        assert!(Instant::now() < limit, "{memory}");
    }
    let application = nix::unistd::Pid::from_raw(found[0]);
    let agent = parent(application);
    let end = sys::pidfd(application).unwrap();
    nix::sys::signal::kill(agent, Signal::SIGKILL).unwrap();
    assert!(sys::readable(&end, Some(Instant::now() + LIMIT)).unwrap());
    assert_eq!(137, run.finish().1);

    let mut run = case.start(None, &["sleep", &mark]);
    let application = nix::unistd::Pid::from_raw(alive()[0]);
    let end = sys::pidfd(application).unwrap();
    run.process.kill().unwrap();
    assert!(sys::readable(&end, Some(Instant::now() + LIMIT)).unwrap());
    run.finish();
}

fn parent(pid: nix::unistd::Pid) -> nix::unistd::Pid {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("PPid:"))
        .unwrap();
    nix::unistd::Pid::from_raw(line.trim().parse().unwrap())
}

/// The monotonic clock stands still while the application is away, and so do its timers.
fn clocks_go_on(case: &mut Case) {
    let script = "import time\nstart=time.monotonic()\nfor i in range(6):\n print(round(time.monotonic()-start,3),flush=True); time.sleep(0.2)";
    let mut run = case.start(None, &["python3", "-c", script]);
    run.read(2);
    let dir = case.generation();
    run.save("stop", &dir);
    let (text, _) = run.finish();
    let away = Duration::from_secs(2);
    // Not to wait for anything: the time itself is what is tested.
    std::thread::sleep(away);
    let (more, code) = case.start(Some(&dir), &["python3"]).finish();
    let times: Vec<f32> = (text + &more)
        .lines()
        .map(|line| line.parse().unwrap())
        .collect();
    assert_eq!(0, code);
    for pair in times.windows(2) {
        assert!(pair[1] - pair[0] < away.as_secs_f32(), "{times:?}");
    }
}

/// One that takes too long says that the application may be harmed, and it still can be ended.
fn late_checkpoints_are_lost(case: &mut Case) {
    let mut run = case.start(
        None,
        &[
            "python3",
            "-c",
            "import os,time\nx=os.urandom(200<<20)\nprint(1,flush=True)\ntime.sleep(99)",
        ],
    );
    run.read(1);
    let dir = case.generation();
    let said = run.ask(&format!("stop {} 20", dir.display()));
    assert!(
        said.starts_with("lost") && said.contains("time limit"),
        "{said}"
    );
    assert_eq!("killed", run.ask("kill"));
    assert_eq!(137, run.finish().1);
}

/// A checkpoint that does not fit leaves the application as it was.
fn full_disks_harm_nothing(case: &mut Case) {
    let small = Path::new("/small");
    if !small.is_dir() {
        println!("skipped: no small file system here");
        return;
    }
    let gates = ["freed", "is-freed", "end"].map(|gate| case.store.join(gate));
    let [freed, is_freed, end] = gates.each_ref().map(|gate| gate.to_str().unwrap());
    let program = counter(
        "big = os.urandom(60 << 20)",
        "",
        &format!("if gate == '{freed}': big = None; open('{is_freed}', 'w').close()"),
    );
    let store = std::mem::replace(&mut case.store, small.into());
    case.runtime = Some(store);
    let mut run = case.start(None, &["python3", "-c", &program, freed, end]);
    run.read(20);
    let dir = case.generation();
    for then in ["continue", "stop"] {
        let said = run.ask(&format!("{then} {} 60000", dir.display()));
        assert!(
            said.starts_with("alive") && said.contains("store is full"),
            "{said}"
        );
        assert_eq!(0, fs::read_dir(&dir).unwrap().count());
    }
    fs::write(freed, "").unwrap();
    run.read_until(Path::new(is_freed));
    run.save("stop", &dir);
    let (text, _) = run.finish();
    let run = case.start(Some(&dir), &["python3"]);
    fs::write(end, "").unwrap();
    let (more, code) = run.finish();
    assert_counted((text + &more, code));
}

/// The place is tried out without a trace, and one that cannot work is refused.
fn places_are_tried_out(case: &mut Case) {
    let criu = Criu::find(None).unwrap();
    let runtime = Runtime::prepare(&case.store, Some(criu.program())).unwrap();
    let mut place = place(&case.image);
    let listed = |dir: &Path| fs::read_dir(dir).unwrap().count();
    let before = listed(&std::env::temp_dir());
    criu.can_hold(&place, &["true".into()], runtime.dir())
        .unwrap();
    assert_eq!(before, listed(&std::env::temp_dir()));
    if let Place::Apptainer(apptainer) = &mut place {
        apptainer.image = "/none.sif".into();
        let error = criu
            .can_hold(&place, &["true".into()], runtime.dir())
            .unwrap_err();
        assert!(error.to_string().contains("/none.sif"), "{error}");
    }
}

fn wrong_starts_say_why(case: &mut Case) {
    let mut run = case.run(None, Stdio::null(), &["no-such-program"]);
    let said = run.said();
    assert!(
        said.starts_with("failed") && said.contains("no-such-program"),
        "{said}"
    );
    assert_eq!(90, run.finish().1);
    if case.image != "-" {
        case.image = "/none.sif".into();
        let mut run = case.run(None, Stdio::null(), &["true"]);
        let said = run.said();
        assert!(
            said.starts_with("failed") && said.contains("/none.sif"),
            "{said}"
        );
    }
}

/// A case: the image it needs, its name and what it does. Those without a `+` are run on the bare
/// host as well, which has no NumPy and no programs of ours.
type Named = (&'static str, &'static str, fn(&mut Case));

const CASES: &[Named] = &[
    ("python", "exact_over_restarts", |case| {
        output_is_exact_over_restarts(case, 3)
    }),
    ("python", "exact_over_checkpoints", |case| {
        output_is_exact_over_checkpoints(case, 3)
    }),
    ("python", "+numpy", |case| {
        same_as_uninterrupted(case, 5, &["python3", "-c", NUMPY])
    }),
    ("openmp", "+openmp", |case| {
        same_as_uninterrupted(case, 5, &["iterate", "2000", "100", "256"])
    }),
    ("static", "+static", |case| {
        same_as_uninterrupted(case, 50, &["/usr/bin/counter", "200", "2"])
    }),
    ("python", "pipeline", |case| {
        same_as_uninterrupted(case, 30, &["bash", "-c", PIPELINE])
    }),
    ("python", "+objects", |case| {
        same_as_uninterrupted(case, 50, &["python3", "-c", OBJECTS])
    }),
    ("python", "ends", ends_are_reported),
    ("python", "signals", signals_come_through),
    ("python", "children", ended_children_are_kept),
    ("python", "input", input_is_exact),
    ("python", "files", files_go_back),
    ("python", "damage", damage_is_found),
    (
        "python",
        "failed_checkpoints",
        failed_checkpoints_harm_nothing,
    ),
    ("python", "the_dead", the_dead_leave_nothing),
    ("python", "wrong_starts", wrong_starts_say_why),
    ("static", "places", places_are_tried_out),
    ("python", "clocks", clocks_go_on),
    ("python", "late", late_checkpoints_are_lost),
    ("python", "full_disks", full_disks_harm_nothing),
    ("python", "+many_restarts", |case| {
        output_is_exact_over_restarts(case, 20)
    }),
    ("python", "+many_checkpoints", |case| {
        output_is_exact_over_checkpoints(case, 20)
    }),
];

/// `inside IMAGES [FILTER…]`
fn inside(arguments: &[OsString]) -> ExitCode {
    let [images, filters @ ..] = arguments else {
        return ExitCode::from(2);
    };
    let images = Path::new(images);
    let (mut passed, mut failed) = (0, 0);
    for place in ["apptainer", "bare"] {
        for (image, name, case) in CASES {
            if place == "bare" && name.starts_with('+') {
                continue;
            }
            let name = format!("{place}::{name}");
            let image = match place {
                "bare" => PathBuf::from("-"),
                _ => images.join(format!("{image}.sif")),
            };
            let wanted = |filter: &OsString| name.contains(filter.to_str().unwrap());
            if !filters.is_empty() && !filters.iter().any(wanted) {
                continue;
            }
            let store = tempfile::tempdir_in(std::env::var_os("HOME").unwrap()).unwrap();
            let image = image.to_str().unwrap().to_string();
            let mut place = Case {
                store: store.path().into(),
                runtime: None,
                image,
                generations: 0,
            };
            let begun = Instant::now();
            let result =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| case(&mut place)));
            let seconds = begun.elapsed().as_secs_f32();
            match result {
                Ok(()) => passed += 1,
                Err(_) => failed += 1,
            }
            let word = if result.is_ok() { "ok" } else { "FAILED" };
            println!("test {name} ... {word} ({seconds:.1} s)");
        }
    }
    println!("{passed} passed, {failed} failed");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
