//! The store as a whole: what its users do with it, and what may happen meanwhile.

mod crash;
mod damage;
mod full;
mod locks;
mod transfers;

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::*;
use crate::engine::{End, Kind};

pub fn me(job: u32, run: u32) -> Holder {
    Holder::this_process(Some(job), "batch", run).unwrap()
}

pub fn facts(ranks: u32) -> Facts {
    Facts {
        trigger: Trigger::Interval,
        predecessor: None,
        ranks,
        engine: Kind::Dmtcp,
        engine_version: "4.1.1".into(),
        placement: None,
        kernel: "6.18.0".into(),
        cpu_flags: vec!["avx2".into()],
        image: None,
        command: vec!["./app".into()],
        durations: Durations::default(),
        truncate: Vec::new(),
        computed: None,
        needs: Vec::new(),
        listens: Vec::new(),
        streams: Vec::new(),
    }
}

pub fn lock(cell: &Cell, holder: &Holder) -> Lock {
    cell.lock(holder, &Unwitnessed, false, Duration::ZERO)
        .unwrap()
}

/// Commits a generation whose contents tell of its number.
pub fn save(lock: &Lock, ranks: u32, keep: usize) -> Generation {
    let draft = lock.begin(1000).unwrap();
    for rank in 0..ranks {
        let dir = draft.dir().join(format!("rank-{rank}"));
        fs::create_dir(&dir).unwrap();
        let content = format!("generation {} rank {rank} ", draft.number()).repeat(50);
        fs::write(dir.join("ckpt_app.dmtcp"), content).unwrap();
    }
    draft.commit(facts(ranks), keep).unwrap()
}

pub fn content_ok(_: &Manifest, dir: &Path) -> Result<(), String> {
    match fs::read_to_string(dir.join("ckpt_app.dmtcp")) {
        Ok(text) if text.starts_with("generation ") => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

pub fn newest(lock: &Lock) -> Option<u64> {
    lock.newest_good(true, &content_ok)
        .unwrap()
        .generation
        .map(|g| g.number())
}

fn cell(dir: &Path) -> Cell {
    Store::open(&dir.join("store"))
        .unwrap()
        .name(&Name::parse("heat").unwrap())
}

#[test]
fn saves_finds_and_forgets() {
    let dir = tempfile::tempdir().unwrap();
    let cell = cell(dir.path());
    let lock = lock(&cell, &me(1, 0));
    assert_eq!(newest(&lock), None);
    for number in 1..=4 {
        assert_eq!(save(&lock, 2, 2).number(), number);
        assert_eq!(newest(&lock), Some(number));
    }
    assert_eq!(cell.numbers().unwrap(), [3, 4]);
    let latest = fs::read_link(cell.dir().join("latest")).unwrap();
    assert_eq!(latest, Path::new("generations/000004"));

    drop(lock.begin(1000).unwrap());
    lock.completed(End::Exit(0)).unwrap();
    assert_eq!(newest(&lock), None);
    assert_eq!(cell.completion().unwrap().unwrap().generation, 4);
    assert_eq!(cell.numbers().unwrap(), [3, 4]);
    save(&lock, 1, 2);
    assert_eq!(cell.numbers().unwrap(), [5]);
    assert_eq!(cell.completion().unwrap(), None);
}
