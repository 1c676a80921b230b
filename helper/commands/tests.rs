//! Every command on a store made for it: what it changes, and its exit code.

use std::fs;
use std::time::Duration;

use clap::Parser;

use super::*;
use crate::engine::{End, Kind};
use crate::store::tests::facts;
use crate::store::{Facts, Holder, Lock, Trigger, Unwitnessed, What};

/// The commands as a program of their own.
#[derive(Parser)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

struct Bench {
    dir: tempfile::TempDir,
    config: Config,
}

impl Bench {
    fn new() -> Bench {
        Bench {
            dir: tempfile::tempdir().unwrap(),
            config: Config::default(),
        }
    }

    fn path(&self, file: &str) -> String {
        self.dir.path().join(file).to_str().unwrap().into()
    }

    fn store(&self) -> Store {
        Store::open(&self.dir.path().join("store")).unwrap()
    }

    fn cell(&self, label: &str) -> Cell {
        let target = Target::parse(label).unwrap();
        let cell = self.store().name(&target.name);
        target.key.map_or(cell.clone(), |key| cell.step(&key))
    }

    fn lock(&self, label: &str, run: u32) -> Lock {
        let me = Holder::this_process(Some(42), "batch", run).unwrap();
        self.cell(label)
            .lock(&me, &Unwitnessed, false, Duration::ZERO)
            .unwrap()
    }

    fn run(&self, line: &str) -> u8 {
        let words = std::iter::once("x").chain(line.split_whitespace());
        let program = Program::try_parse_from(words)
            .map_err(|e| e.to_string())
            .unwrap();
        let store = self.dir.path().join("store");
        let verify = |_: &Manifest, dir: &Path| match fs::read(dir.join("ckpt_app.dmtcp")) {
            Ok(bytes) if bytes.starts_with(b"bad") => Err("no process image".into()),
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        };
        let context = Context {
            store: &store,
            config: &self.config,
            witness: &Unwitnessed,
            verify: &verify,
            engines: &Vec::new,
        };
        super::run(&program.command, &context)
    }
}

fn save(lock: &Lock, content: &str) -> u64 {
    let draft = lock.begin(1000).unwrap();
    fs::create_dir(draft.dir().join("rank-0")).unwrap();
    fs::write(
        draft.dir().join("rank-0/ckpt_app.dmtcp"),
        content.repeat(100_000),
    )
    .unwrap();
    let facts = Facts {
        trigger: Trigger::Preemption,
        ..facts(1)
    };
    let generation = draft.commit(facts, 2).unwrap();
    generation.number()
}

/// heat: two runs, completed nothing, generations 2 and 3. steps/0-app: one generation.
fn bench() -> Bench {
    let bench = Bench::new();
    {
        let lock = bench.lock("heat", 0);
        lock.note(What::Started {
            engine: Kind::Dmtcp,
        })
        .unwrap();
        save(&lock, "one");
        save(&lock, "two");
        lock.note(What::Requeued {
            reason: "preemption".into(),
        })
        .unwrap();
        let lock = bench.lock("heat", 1);
        lock.note(What::Restarted {
            engine: Kind::Dmtcp,
            generation: 2,
            took: 300,
        })
        .unwrap();
        save(&lock, "three");
        lock.note(What::CheckpointFailed {
            trigger: Trigger::Interval,
            reason: "disk full \u{1b}[2J".into(),
            lost: false,
        })
        .unwrap();
    }
    save(&bench.lock("multi/0-app", 0), "step");
    bench
}

#[test]
fn looking_changes_nothing() {
    let bench = bench();
    for (line, code) in [
        ("list", OK),
        ("list --json", OK),
        ("list heat", OK),
        ("list heat --json", OK),
        ("list multi", OK),
        ("list heat@3", OK),
        ("list heat@1", ABSENT),
        ("show heat", OK),
        ("show heat --json", OK),
        ("show multi", OK),
        ("show multi/0-app", OK),
        ("show heat@3", OK),
        ("show heat@3 --json", OK),
        ("show heat@9", ABSENT),
        ("show none", ABSENT),
        ("show ../x", USAGE),
        ("show heat@x", USAGE),
        ("verify", OK),
        ("verify heat@2", OK),
        ("verify heat multi --json", OK),
        ("verify none", ABSENT),
    ] {
        assert_eq!(bench.run(line), code, "{line}");
    }
    let empty = Bench::new();
    assert_eq!(empty.run("list"), OK);
    assert_eq!(empty.run("list --json"), OK);
    assert_eq!(empty.run("show heat"), ABSENT);
    assert!(!empty.dir.path().join("store").exists());
}

#[test]
fn verify_finds_damage_and_marks_it() {
    let bench = bench();
    let file = bench
        .cell("heat")
        .dir()
        .join("generations/000003/rank-0/ckpt_app.dmtcp");
    fs::remove_file(&file).unwrap();
    fs::write(&file, "thref".repeat(100_000)).unwrap();
    assert_eq!(bench.run("verify heat"), DAMAGED);
    assert_eq!(bench.run("list heat"), OK);
    assert_eq!(bench.run("verify heat@2"), OK);
    assert_eq!(bench.run("show heat"), OK);
    let entries = bench.cell("heat").entries().unwrap();
    assert!(entries[1].bad.as_ref().unwrap().reason.contains("BLAKE3"));
    // The newest good one is now the one before.
    assert_eq!(bench.run(&format!("export heat {}", bench.path("a"))), OK);
    assert_eq!(
        bench.run(&format!("import {} --name from", bench.path("a"))),
        OK
    );
    let text = fs::read(
        bench
            .cell("from")
            .dir()
            .join("generations/000001/rank-0/ckpt_app.dmtcp"),
    );
    assert!(text.unwrap().starts_with(b"twotwo"));
    fs::write(
        bench
            .cell("heat")
            .dir()
            .join("generations/000002/manifest.json"),
        "{}",
    )
    .ok();
    assert_eq!(bench.run("show heat@2"), DAMAGED);
    assert_eq!(bench.run("clone heat@2 new"), DAMAGED);
}

#[test]
fn pinned_is_kept() {
    let bench = bench();
    assert_eq!(bench.run("pin heat@2"), OK);
    save(&bench.lock("heat", 2), "four");
    save(&bench.lock("heat", 3), "five");
    assert_eq!(bench.cell("heat").numbers().unwrap(), [2, 4, 5]);
    assert_eq!(bench.run("delete heat@2"), FAILED);
    assert_eq!(bench.run("delete heat"), FAILED);
    assert_eq!(bench.run("unpin heat"), OK);
    assert_eq!(bench.run("prune heat --keep 1"), OK);
    assert_eq!(bench.cell("heat").numbers().unwrap(), [5]);
    assert_eq!(bench.run("pin heat"), OK);
    assert_eq!(bench.run("pin heat@7"), ABSENT);
    let why = entry(&bench.cell("multi"), None).unwrap_err().to_string();
    assert!(why.ends_with(": name one, such as multi/0-app"), "{why}");
    assert_eq!(bench.run("delete heat --force"), OK);
    assert!(!bench.cell("heat").exists());
}

#[test]
fn deleting() {
    let bench = bench();
    assert_eq!(bench.run("delete none"), ABSENT);
    assert_eq!(bench.run("delete heat@1"), ABSENT);
    assert_eq!(bench.run("delete heat@3"), OK);
    assert_eq!(bench.run("delete heat@2"), FAILED, "the only good one");
    assert_eq!(bench.run("delete heat@2 --force"), OK);
    assert_eq!(bench.run("delete multi/0-app"), USAGE);
    assert_eq!(bench.run("delete multi heat"), OK);
    assert_eq!(bench.store().names().unwrap(), []);
}

#[test]
fn what_is_in_use_stays() {
    let bench = bench();
    let lock = bench.lock("heat", 5);
    for line in ["delete heat", "delete heat@3", "prune heat"] {
        assert_eq!(bench.run(line), HELD, "{line}");
    }
    assert_eq!(bench.run("prune"), OK, "the others");
    for line in [
        "list",
        "show heat",
        "verify",
        "pin heat",
        "unpin heat",
        "clone heat copy",
    ] {
        assert_eq!(bench.run(line), OK, "{line}");
    }
    lock.still_ours().unwrap();
    assert_eq!(bench.run("delete heat@2 --steal-lock"), OK);
    assert!(lock.still_ours().is_err());
}

#[test]
fn pruning() {
    let bench = bench();
    let cell = bench.cell("heat");
    cell.mark_bad(2, "no good").unwrap();
    fs::create_dir(cell.dir().join("generations/000009.partial")).unwrap();
    fs::create_dir(bench.store().dir().join(".deleted.x")).unwrap();
    assert_eq!(bench.run("prune --keep 0"), USAGE);
    assert_eq!(bench.run("prune --json"), OK);
    assert_eq!(cell.numbers().unwrap(), [3]);
    assert_eq!(
        fs::read_dir(cell.dir().join("generations"))
            .unwrap()
            .count(),
        1
    );
    assert!(!bench.store().dir().join(".deleted.x").exists());
    bench.lock("heat", 1).completed(End::Exit(0)).unwrap();
    assert_eq!(bench.run("list"), OK);
    assert_eq!(bench.run("prune heat"), OK);
    assert_eq!(cell.numbers().unwrap(), [3]);
    assert_eq!(bench.run("prune heat --completed"), OK);
    assert_eq!(cell.numbers().unwrap(), [0; 0]);
}

#[test]
fn cloning() {
    let bench = bench();
    let first = |label: &str| {
        let file = bench
            .cell(label)
            .dir()
            .join("generations/000001/rank-0/ckpt_app.dmtcp");
        String::from_utf8(fs::read(file).unwrap()).unwrap()[..4].to_string()
    };
    assert_eq!(bench.run("clone heat fork"), OK);
    assert_eq!(first("fork"), "thre");
    assert_eq!(bench.run("clone heat@2 fork"), FAILED, "exists");
    assert_eq!(bench.run("clone heat@2 fork2"), OK);
    assert_eq!(first("fork2"), "twot");
    assert_eq!(bench.run("clone heat fork3@2"), OK);
    assert_eq!(first("fork3"), "twot");
    assert_eq!(bench.run("clone heat@3 fork4@2"), USAGE);
    assert_eq!(bench.run("clone heat@9 fork4"), ABSENT);
    assert_eq!(bench.run("clone none fork4"), ABSENT);
    assert_eq!(bench.run("clone heat fork4/a"), USAGE);
    assert_eq!(bench.run("clone multi many --json"), OK);
    assert_eq!(first("many/0-app"), "step");
    assert_eq!(bench.run("clone multi/0-app many/1-app"), OK);
    assert_eq!(first("many/1-app"), "step");
}

#[test]
fn exporting_and_importing() {
    let bench = bench();
    let file = bench.path("heat.ckpt");
    assert_eq!(bench.run(&format!("export heat {file}")), OK);
    assert_eq!(bench.run(&format!("export heat {file}")), FAILED, "exists");
    assert_eq!(
        bench.run(&format!("export heat@2 {file} --force --json")),
        OK
    );
    assert_eq!(
        bench.run(&format!("export heat@2 {}", bench.path("none/x"))),
        FAILED
    );
    assert_eq!(
        bench.run(&format!("import {file}")),
        FAILED,
        "has generations"
    );
    assert_eq!(bench.run(&format!("import {file} --name a@3")), USAGE);
    assert_eq!(bench.run(&format!("import {file} --name moved")), OK);
    assert_eq!(bench.run("verify moved"), OK);
    assert_eq!(bench.run(&format!("import {}", bench.path("none"))), FAILED);
    assert_eq!(bench.run("delete heat"), OK);
    assert_eq!(bench.run(&format!("import {file} --json")), OK);
    assert_eq!(bench.cell("heat").numbers().unwrap(), [1]);
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    assert_eq!(bench.run(&format!("import {file} --name half")), DAMAGED);
    assert!(bench.cell("half").numbers().unwrap().is_empty());

    // What no engine can use is not even imported.
    save(&bench.lock("wrong", 0), "bad");
    let file = bench.path("wrong.ckpt");
    assert_eq!(bench.run(&format!("export wrong {file}")), OK);
    assert_eq!(bench.run(&format!("import {file} --name wrong2")), DAMAGED);
    assert!(bench.cell("wrong2").numbers().unwrap().is_empty());

    let file = bench.path("step.ckpt");
    assert_eq!(bench.run(&format!("export multi/0-app {file}")), OK);
    assert_eq!(bench.run("delete multi"), OK);
    assert_eq!(bench.run(&format!("import {file}")), OK);
    assert_eq!(bench.cell("multi/0-app").numbers().unwrap(), [1]);
    let files: Vec<_> = fs::read_dir(bench.dir.path()).unwrap().collect();
    assert_eq!(files.len(), 4, "no temporary file is left: {files:?}");
}

const ALL: &str = "TEST_STORES_OF_ALL";

/// As root on stores of others, in a process of its own; not a test by itself.
#[test]
fn child_of_root() {
    let Some(dir) = std::env::var_os(ALL) else {
        return;
    };
    let dir = PathBuf::from(dir);
    let config = Config {
        dir: format!("{}/%u/store", dir.display()),
        ..Config::default()
    };
    let store = dir.join("alice/store");
    let verify = |_: &Manifest, _: &Path| Ok(());
    let context = Context {
        store: &store,
        config: &config,
        witness: &Unwitnessed,
        verify: &verify,
        engines: &Vec::new,
    };
    let run = |line: &str| {
        let words = std::iter::once("x").chain(line.split_whitespace());
        super::run(&Program::try_parse_from(words).unwrap().command, &context)
    };
    assert_eq!(run("list --all-users"), OK);
    assert!(nix::unistd::geteuid().is_root());
    assert_eq!(run("clone heat fork"), OK);
    assert_eq!(nix::unistd::geteuid().as_raw(), 12345);
    assert_eq!(run("delete heat@2"), OK);
    assert_eq!(run("list --all-users"), USAGE);
}

#[test]
fn root_works_as_the_owner() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    use std::process::Command;
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root can work on stores of others");
        return;
    }
    let bench = bench();
    let all = bench.dir.path();
    fs::set_permissions(all, fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(all.join("alice")).unwrap();
    fs::rename(all.join("store"), all.join("alice/store")).unwrap();
    let walk = |act: &dyn Fn(&Path)| {
        let mut todo = vec![all.join("alice")];
        while let Some(path) = todo.pop() {
            act(&path);
            if path.is_dir() && !path.is_symlink() {
                todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            }
        }
    };
    walk(&|path| {
        if !path.is_symlink() {
            chown(path, Some(12345), Some(12345)).unwrap();
        }
    });
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "commands::tests::child_of_root", "--nocapture"])
        .env(ALL, all)
        .output()
        .unwrap();
    let text = String::from_utf8(child.stdout).unwrap();
    assert!(
        child.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&child.stderr)
    );
    let row = |user: &str, name: &str| {
        text.lines()
            .any(|line| line.starts_with(user) && line.contains(name))
    };
    assert!(
        row("alice", "heat") && row("alice", "multi/0-app"),
        "{text}"
    );
    assert!(
        all.join("alice/store/fork/generations/000001/manifest.json")
            .exists()
    );
    walk(&|path| {
        let owner = fs::symlink_metadata(path).unwrap().uid();
        assert!(owner == 12345 || path.is_symlink(), "{}", path.display());
    });
}

#[test]
fn create_makes_a_name_once() {
    let bench = Bench::new();
    assert_eq!(bench.run("create heat other --json"), OK);
    assert!(bench.cell("heat").exists() && bench.cell("other").exists());
    assert_eq!(bench.cell("heat").holder().unwrap(), None);
    assert_eq!(bench.run("list heat"), OK);
    assert_eq!(bench.run("create heat"), FAILED);
    assert_eq!(bench.run("create new heat"), FAILED);
    assert!(!bench.cell("new").exists(), "all or none");
    assert_eq!(bench.run("create .hidden"), USAGE);
    assert_eq!(bench.run("create new@3"), USAGE);
    let _running = bench.lock("heat", 0);
    assert_eq!(bench.run("delete heat"), HELD);
    assert_eq!(bench.run("delete other"), OK);
    assert!(!bench.cell("other").exists());
}
