//! Who may hold what, and who is proved dead.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use super::*;

/// Says the same of every holder.
struct Says(Option<bool>);

impl Witness for Says {
    fn run_has_ended(&self, _: &Holder) -> Option<bool> {
        self.0
    }
}

fn try_lock(cell: &Cell, holder: &Holder) -> Result<Lock, LockError> {
    cell.lock(holder, &Unwitnessed, false, Duration::ZERO)
}

fn held_by(result: Result<Lock, LockError>) -> Option<u32> {
    match result {
        Err(LockError::Held { holder, .. }) => holder.job,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was given"),
    }
}

/// A holder that was, but is no more.
fn dead(job: u32, run: u32) -> Holder {
    let mut child = Command::new("true").spawn().unwrap();
    let pid = child.id();
    child.wait().unwrap();
    Holder {
        pid,
        ..me(job, run)
    }
}

#[test]
fn one_job_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let cell = cell(dir.path());
    let first = lock(&cell, &me(1, 0));
    assert_eq!(held_by(try_lock(&cell, &me(2, 0))), Some(1));
    // Neither another step of the same name, nor a person's command.
    let step = cell.step(&StepKey::parse("a").unwrap());
    assert_eq!(held_by(try_lock(&step, &me(2, 0))), Some(1));
    let person = Holder {
        job: None,
        ..me(0, 0)
    };
    assert_eq!(held_by(try_lock(&cell, &person)), Some(1));
    // But the same job's other steps, and not the same one twice.
    let inner = lock(&step, &me(1, 0));
    assert_eq!(held_by(try_lock(&step, &me(1, 0))), Some(1));
    drop(first);
    assert_eq!(
        held_by(try_lock(&cell, &me(2, 0))),
        Some(1),
        "the inner step still runs"
    );
    drop(inner);
    let second = lock(&cell, &me(2, 0));
    second.still_ours().unwrap();
    let message = try_lock(&cell, &me(3, 0)).err().unwrap().to_string();
    assert!(
        message.contains("heat") && message.contains("job 2"),
        "{message}"
    );
    // Nobody takes a name from what is seen to run; where it cannot be seen, the user may know.
    assert!(!message.contains("--steal-lock"), "{message}");
    let far = LockError::Held {
        name: "heat".into(),
        holder: Box::new(me(2, 0)),
        why: "Slurm does not say that it has ended".into(),
    };
    assert!(far.to_string().contains("--steal-lock"), "{far}");
}

#[test]
fn a_newer_run_takes_over() {
    let dir = tempfile::tempdir().unwrap();
    let cell = cell(dir.path());
    let old = lock(&cell, &me(1, 0));
    let draft = old.begin(1000).unwrap();
    let new = lock(&cell, &me(1, 1));
    assert!(matches!(old.still_ours(), Err(Error::LockLost { .. })));
    fs::create_dir(draft.dir().join("rank-0")).unwrap();
    fs::write(draft.dir().join("rank-0/x"), "x").unwrap();
    assert!(matches!(
        draft.commit(facts(1), 2),
        Err(Error::LockLost { .. })
    ));
    assert_eq!(cell.numbers().unwrap(), [0; 0]);
    assert_eq!(
        held_by(try_lock(&cell, &me(1, 0))),
        Some(1),
        "an older run may not"
    );
    drop(old);
    new.still_ours().unwrap();
}

#[test]
fn a_run_that_saves_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let cell = cell(dir.path());
    let old = lock(&cell, &me(1, 0));
    old.set_state(State::Saving).unwrap();
    assert_eq!(cell.holder().unwrap().unwrap().state, State::Saving);
    let (tell, told) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            struct Tells(std::sync::mpsc::Sender<()>);
            impl Witness for Tells {
                // Asked after it has seen who holds the lock.
                fn run_has_ended(&self, _: &Holder) -> Option<bool> {
                    self.0.send(()).unwrap();
                    None
                }
            }
            // In another namespace, so that only the witness could know.
            let new = Holder {
                pid_namespace: 1,
                ..me(1, 1)
            };
            let lock = cell
                .lock(&new, &Tells(tell), false, Duration::from_secs(60))
                .unwrap();
            newest(&lock)
        });
        told.recv().unwrap();
        save(&old, 1, 2);
        old.release().unwrap();
        assert_eq!(waiter.join().unwrap(), Some(1), "it waited for the commit");
    });

    let old = lock(&cell, &me(1, 1));
    old.set_state(State::Saving).unwrap();
    // Not for ever: Slurm has started the newer run.
    let new = cell
        .lock(&me(1, 2), &Unwitnessed, false, Duration::from_millis(1))
        .unwrap();
    new.still_ours().unwrap();
    assert!(matches!(
        old.set_state(State::Running),
        Err(Error::LockLost { .. })
    ));
}

#[test]
fn what_is_dead_is_broken_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let cell = cell(dir.path());
    let leave = |holder: &Holder| std::mem::forget(lock(&cell, holder));

    leave(&dead(1, 0));
    lock(&cell, &me(2, 0)).release().unwrap();

    // The same number, but another process.
    let reused = me(1, 0);
    leave(&Holder {
        pid_started: reused.pid_started - 1,
        ..reused
    });
    lock(&cell, &me(2, 0)).release().unwrap();

    // On another node nobody can see it: only Slurm's word counts.
    let elsewhere = Holder {
        boot_id: "other".into(),
        host: "n2".into(),
        pid: 1,
        ..me(1, 0)
    };
    leave(&elsewhere);
    assert_eq!(held_by(try_lock(&cell, &me(2, 0))), Some(1));
    for answer in [None, Some(false)] {
        let taken = cell.lock(&me(2, 0), &Says(answer), false, Duration::ZERO);
        assert_eq!(held_by(taken), Some(1));
    }
    cell.lock(&me(2, 0), &Says(Some(true)), false, Duration::ZERO)
        .unwrap();

    // The same node after a reboot.
    let here = me(1, 0);
    if !here.machine.is_empty() {
        leave(&Holder {
            boot_id: "earlier".into(),
            ..here
        });
        lock(&cell, &me(2, 0)).release().unwrap();
    }

    // A living process is not dead, whatever Slurm says.
    let alive = lock(&cell, &me(1, 0));
    let taken = cell.lock(&me(2, 0), &Says(Some(true)), false, Duration::ZERO);
    assert_eq!(held_by(taken), Some(1));

    // People may know better.
    let stolen = cell
        .lock(&me(2, 0), &Unwitnessed, true, Duration::ZERO)
        .unwrap();
    stolen.still_ours().unwrap();
    assert!(alive.still_ours().is_err());
    let events = cell.history().unwrap().events;
    assert!(
        matches!(&events.last().unwrap().what, What::LockStolen { from } if from.contains("job 1"))
    );
}

#[test]
fn stealing_takes_every_step_of_the_other_job() {
    let dir = tempfile::tempdir().unwrap();
    let cell = cell(dir.path());
    let step = cell.step(&StepKey::parse("a").unwrap());
    let theirs = lock(&step, &me(1, 0));
    let ours = cell
        .lock(&me(2, 0), &Unwitnessed, true, Duration::ZERO)
        .unwrap();
    assert!(theirs.still_ours().is_err());
    ours.still_ours().unwrap();
}

#[test]
fn a_damaged_lock_is_not_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let cell = cell(dir.path());
    lock(&cell, &me(1, 0)).release().unwrap();
    for content in ["", "{}", "\u{0}\u{0}", "[[[[[[["] {
        fs::write(cell.dir().join("lock"), content).unwrap();
        let error = try_lock(&cell, &me(1, 0)).err().unwrap().to_string();
        assert!(error.contains("--steal-lock"), "{error}");
    }
    cell.lock(&me(1, 0), &Unwitnessed, true, Duration::ZERO)
        .unwrap();
}

#[test]
fn a_guard_of_a_dead_process_is_broken_by_many_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let cell = cell(dir.path());
    lock(&cell, &me(1, 0)).release().unwrap();
    let inside = AtomicU32::new(0);
    let given = AtomicU32::new(0);
    for _ in 0..10 {
        // What a process leaves that was killed with the guard in hand.
        std::mem::forget(lock(&cell, &dead(1, 0)));
        fs::rename(cell.dir().join("lock"), cell.dir().join("guard")).unwrap();
        thread::scope(|scope| {
            for job in 10..18 {
                let (cell, inside, given) = (&cell, &inside, &given);
                scope.spawn(move || {
                    // Refused where another one holds it just now; never both.
                    if let Ok(lock) = try_lock(cell, &me(job, 0)) {
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        lock.still_ours().unwrap();
                        given.fetch_add(1, Ordering::SeqCst);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        lock.release().unwrap();
                    }
                });
            }
        });
    }
    assert!(given.into_inner() >= 10);
    assert!(!cell.dir().join("guard").exists());
}

#[test]
fn places_that_are_refused() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().join("real");
    Store::open(&real).unwrap();
    assert_eq!(
        fs::metadata(&real).unwrap().permissions().mode() & 0o777,
        0o700
    );
    symlink(&real, dir.path().join("link")).unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    for (place, why) in [("link", "symbolic link"), ("file", "not a directory")] {
        let error = Store::open(&dir.path().join(place))
            .unwrap_err()
            .to_string();
        assert!(error.contains(why), "{error}");
    }
    fs::set_permissions(&real, fs::Permissions::from_mode(0o770)).unwrap();
    let error = Store::open(&real).unwrap_err().to_string();
    assert!(error.contains("0770") && error.contains("chmod"), "{error}");
    fs::set_permissions(&real, fs::Permissions::from_mode(0o755)).unwrap();
    let store = Store::open(&real).unwrap();
    // A NAME that is a link elsewhere.
    symlink("/tmp", real.join("heat")).unwrap();
    let cell = store.name(&Name::parse("heat").unwrap());
    assert!(matches!(
        try_lock(&cell, &me(1, 0)),
        Err(LockError::Store(Error::Place { .. }))
    ));
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::lchown(real.join("heat"), Some(0), Some(0)).unwrap();
        fs::remove_file(real.join("heat")).unwrap();
        fs::create_dir(real.join("heat")).unwrap();
        std::os::unix::fs::chown(real.join("heat"), Some(12345), None).unwrap();
        let error = try_lock(&cell, &me(1, 0)).err().unwrap().to_string();
        assert!(error.contains("12345"), "{error}");
    } else {
        eprintln!("skipped: another user's directory (only root can make one)");
    }
}

/// Another step's sweep may take what is about to become a guard for torn.
#[test]
fn a_guard_is_taken_although_its_beginnings_are_swept() {
    let dir = tempfile::tempdir().unwrap();
    let cell = cell(dir.path());
    drop(try_lock(&cell, &me(1, 0)).unwrap());
    let over = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut swept = std::collections::HashSet::new();
            while !over.load(Ordering::SeqCst) {
                for entry in std::fs::read_dir(cell.dir()).unwrap().flatten() {
                    let name = entry.file_name();
                    if name.to_string_lossy().starts_with(".guard.") && swept.insert(name) {
                        // It may be gone already.
                        let _ = std::fs::remove_file(entry.path());
                    }
                }
            }
        });
        let taken: Vec<_> = (0..200)
            .map(|_| try_lock(&cell, &me(1, 0)).map(drop))
            .filter_map(Result::err)
            .collect();
        over.store(true, Ordering::SeqCst);
        assert!(taken.is_empty(), "{taken:?}");
    });
}
