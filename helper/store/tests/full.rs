//! Too little room: a checkpoint is refused, or fails cleanly, and the last good one stays.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::damage::TestRandom;
use super::*;

/// Runs `test` with a tmpfs of `size` mounted on a directory, in a mount namespace of its own.
fn on_tmpfs(size: &str, test: impl FnOnce(&Path) + Send) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root can mount a small file system");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        let inner = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let none: Option<&str> = None;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            let options = format!("size={size},mode=700");
            mount(
                none,
                dir.path(),
                Some("tmpfs"),
                MsFlags::empty(),
                Some(options.as_str()),
            )
            .unwrap();
            test(dir.path());
        });
        if let Err(panic) = inner.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Writes a checkpoint of `bytes` in the way an engine does, without asking for room.
fn write(lock: &Lock, bytes: usize) -> Result<Generation> {
    let draft = lock.begin(0)?;
    let dir = draft.dir().join("rank-0");
    fs::create_dir(&dir).at("create", &dir)?;
    let text = format!("generation {} ", draft.number());
    let content = text.repeat(bytes / text.len() + 1);
    fs::write(dir.join("ckpt_app.dmtcp"), content).at("write", &dir)?;
    draft.commit(facts(1), 2)
}

#[test]
fn at_random_fill_levels() {
    on_tmpfs("3m", |dir| {
        let cell = cell(dir);
        let lock = lock(&cell, &me(1, 0));
        let mut random = TestRandom(99);
        let mut last = write(&lock, 300_000).unwrap().number();
        let (mut failed, mut saved) = (0, 0);
        for _ in 0..100 {
            let fill = dir.join("fill");
            fs::write(&fill, vec![0; random.below(2_600_000)]).ok();
            match write(&lock, 200_000 + random.below(200_000)) {
                Ok(generation) => {
                    last = generation.number();
                    saved += 1;
                }
                Err(_) => failed += 1,
            }
            fs::remove_file(&fill).unwrap();
            assert_eq!(newest(&lock), Some(last));
            assert!(
                fs::read_dir(cell.dir().join("generations"))
                    .unwrap()
                    .count()
                    <= 3
            );
        }
        assert!(failed > 10 && saved > 10, "{failed} failed, {saved} saved");
    });
}

#[test]
fn old_generations_make_room_but_not_the_last_good_one() {
    on_tmpfs("4m", |dir| {
        let cell = cell(dir);
        let lock = lock(&cell, &me(1, 0));
        for _ in 0..4 {
            write(&lock, 800_000).unwrap();
        }
        assert_eq!(cell.numbers().unwrap(), [3, 4]);
        cell.pin(3).unwrap();
        write(&lock, 800_000).unwrap();
        assert_eq!(cell.numbers().unwrap(), [3, 4, 5]);
        // 2.4 of 4 MB are taken. Too much even if 4 goes: nothing is deleted.
        let error = lock.room_for(3_500_000).unwrap_err().to_string();
        assert!(error.contains("needs about 3.8 MB"), "{error}");
        assert_eq!(cell.numbers().unwrap(), [3, 4, 5]);
        // Enough once it is gone; 3 is pinned.
        assert_eq!(lock.room_for(2_000_000).unwrap(), [4]);
        assert_eq!(cell.numbers().unwrap(), [3, 5]);
        assert!(matches!(lock.begin(3_000_000), Err(Error::Shortage(_))));
        assert_eq!(newest(&lock), Some(5));
        let events = cell.history().unwrap().events;
        assert!(events.iter().any(|e| matches!(&e.what,
            What::Deleted { generation: 4, reason } if reason == "space")));
    });
}

#[test]
fn a_store_that_became_read_only() {
    on_tmpfs("4m", |dir| {
        let cell = cell(dir);
        let lock = lock(&cell, &me(1, 0));
        write(&lock, 1000).unwrap();
        let none: Option<&str> = None;
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(none, dir, none, flags, none).unwrap();
        let error = write(&lock, 1000).unwrap_err().to_string();
        assert!(error.contains("Read-only"), "{error}");
        let generation = cell.generation(1).unwrap();
        generation.verify(&|_| Ok(()), &|_| ()).unwrap();
        mount(none, dir, none, MsFlags::MS_REMOUNT, none).unwrap();
        write(&lock, 1000).unwrap();
    });
}
