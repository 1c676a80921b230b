//! The criu engine on real containers, without Slurm and without the rest of the helper.
//!
//! Three roles of one program, since CRIU needs a whole process tree:
//! - *inside* the lab's root file system, as a user: runs the cases and reads what jobs write;
//! - *one*: one run of one job, as the helper would do it: starts or restarts the application with the
//!   engine on its own standard streams, and does what the case says over a socket;
//! - *agent*: the engine's own agent in the container.
#[path = "../plugin/words.rs"]
#[allow(dead_code)]
mod words;

#[path = "../helper/container/mod.rs"]
#[allow(dead_code)]
mod container;
#[path = "../helper/engine/mod.rs"]
#[allow(dead_code)]
mod engine;
#[path = "../helper/logging.rs"]
#[allow(dead_code)]
mod logging;
#[path = "../helper/runtime.rs"]
#[allow(dead_code)]
mod runtime;
#[path = "../helper/sys.rs"]
#[allow(dead_code)]
mod sys;

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
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
        _ => {
            println!("0 passed, 0 failed, 1 skipped");
            ExitCode::SUCCESS
        }
    }
}

/// `one STORE SOCKET IMAGE|- FROM|- COMMAND…`
fn one(arguments: &[OsString]) -> ExitCode {
    let [store, socket, image, from, command @ ..] = arguments else {
        return ExitCode::from(2);
    };
    let store = Path::new(store);
    let mut talk = UnixStream::connect(socket).unwrap();
    let mut heard = BufReader::new(talk.try_clone().unwrap());
    let criu = Criu::find(None).unwrap();
    let runtime = Runtime::prepare(store, Some(criu.program())).unwrap();
    let work = tempfile::Builder::new()
        .prefix("work-")
        .tempdir_in(store)
        .unwrap();
    let place = match image.to_str() {
        Some("-") => Place::Bare,
        _ => Place::Apptainer(Apptainer {
            program: "apptainer".into(),
            options: Vec::new(),
            image: image.into(),
            binds: Vec::new(),
        }),
    };
    let start = Start {
        place,
        command: command.to_vec(),
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
    std::thread::spawn(move || {
        let mut line = String::new();
        while heard.read_line(&mut line).unwrap() > 0 {
            let words: Vec<&str> = line.split_whitespace().collect();
            let answer = obey(&criu, &*asked, &words);
            writeln!(talk, "{answer}").unwrap();
            line.clear();
        }
    });
    let status = nix::sys::wait::waitpid(running.child(), None).unwrap();
    match running.ended(status) {
        End::Exit(code) => ExitCode::from(u8::try_from(code).unwrap()),
        End::Signal(signal) => sys::die_of(signal),
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
            let saved = running.checkpoint(Path::new(dir), then, limit).map(|()| {
                criu.verify(&Path::new(dir).join("rank-0")).unwrap();
            });
            match saved {
                Ok(()) => "saved".into(),
                Err(engine::CheckpointError::Alive(why)) => {
                    format!("alive {}", why.replace('\n', " "))
                }
                Err(engine::CheckpointError::Lost(why)) => {
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
            .arg("one")
            .args([&self.store, &path])
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

    fn generation(&mut self) -> PathBuf {
        self.generations += 1;
        let dir = self.store.join(format!("g{}", self.generations));
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

/// A program that prints a line every millisecond, and ends with 7.
const COUNTER: &str = "import time,sys\nfor i in range(int(sys.argv[1])):\n print(i,flush=True)\n time.sleep(0.001)\nsys.exit(7)";

fn counted(to: usize) -> String {
    (0..to).map(|i| format!("{i}\n")).collect()
}

fn output_is_exact_over_restarts(case: &mut Case, restarts: usize) {
    let lines = 400 + restarts * 100;
    let total = lines.to_string();
    let command = ["python3", "-c", COUNTER, &total];
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
    let (more, code) = case.start(from.as_deref(), &command).finish();
    text += &more;
    assert_eq!(counted(lines), text);
    assert_eq!(7, code);
}

fn output_is_exact_over_checkpoints(case: &mut Case, checkpoints: usize) {
    let lines = 400 + checkpoints * 60;
    let total = lines.to_string();
    let command = ["python3", "-c", COUNTER, &total];
    let mut run = case.start(None, &command);
    for _ in 0..checkpoints {
        run.read(30);
        let dir = case.generation();
        run.save("continue", &dir);
    }
    let (text, code) = run.finish();
    assert_eq!(counted(lines), text);
    assert_eq!(7, code);
}

/// A case: its name and what it does.
type Named = (&'static str, fn(&mut Case));

const CASES: &[Named] = &[
    ("exact_over_restarts", |case| {
        output_is_exact_over_restarts(case, 3)
    }),
    ("exact_over_checkpoints", |case| {
        output_is_exact_over_checkpoints(case, 3)
    }),
];

/// `inside IMAGES [FILTER…]`
fn inside(arguments: &[OsString]) -> ExitCode {
    let [images, filters @ ..] = arguments else {
        return ExitCode::from(2);
    };
    let images = Path::new(images);
    let (mut passed, mut failed) = (0, 0);
    for (place, image) in [
        ("apptainer", images.join("python.sif")),
        ("bare", "-".into()),
    ] {
        for (name, case) in CASES {
            let name = format!("{place}::{name}");
            let wanted = |filter: &OsString| name.contains(filter.to_str().unwrap());
            if !filters.is_empty() && !filters.iter().any(wanted) {
                continue;
            }
            let store = tempfile::tempdir_in(std::env::var_os("HOME").unwrap()).unwrap();
            let image = image.to_str().unwrap().to_string();
            let mut place = Case {
                store: store.path().into(),
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
