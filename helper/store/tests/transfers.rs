//! Clones, archives, pins and deletion.

use std::io::Read;
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::store::transfer::Shared;

fn import(lock: &Lock, archive: &[u8]) -> Result<Generation> {
    let choose = |_: &Manifest| Ok(lock.clone());
    super::super::import(
        archive,
        Path::new("app.ckpt"),
        &choose,
        &|_, _| Ok(()),
        &|_| (),
    )
}

fn export(generation: &Generation) -> Vec<u8> {
    let mut archive = Vec::new();
    generation.export(&mut archive, &|_| ()).unwrap();
    archive
}

fn other(cell: &Cell, name: &str) -> Cell {
    cell.store().name(&Name::parse(name).unwrap())
}

#[test]
fn a_clone_is_a_generation_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let cell = cell(dir.path());
    let first = lock(&cell, &me(1, 0));
    let source = save(&first, 2, 2);
    let second = lock(&other(&cell, "fork"), &me(2, 0));
    let (clone, way) = second.clone_from(&source, &|_| ()).unwrap();
    assert_eq!(clone.manifest().name, "fork");
    assert_eq!(clone.manifest().files, source.manifest().files);
    assert_eq!(newest(&second), Some(1));
    let inode = |g: &Generation| {
        fs::metadata(g.rank_dir(1).join("ckpt_app.dmtcp"))
            .unwrap()
            .ino()
    };
    assert_eq!(inode(&clone) == inode(&source), way == Shared::HardLink);
    // Each can go without the other.
    first.delete(1, "delete").unwrap();
    assert_eq!(newest(&second), Some(1));

    let source = save(&first, 2, 2);
    fs::remove_file(source.rank_dir(0).join("ckpt_app.dmtcp")).unwrap();
    fs::write(source.rank_dir(0).join("ckpt_app.dmtcp"), "x".repeat(1000)).unwrap();
    assert!(matches!(
        second.clone_from(&source, &|_| ()),
        Err(Error::Damaged { .. })
    ));
    assert_eq!(second.cell().numbers().unwrap(), [1]);
}

#[test]
fn an_archive_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let cell = cell(dir.path());
    let first = lock(&cell, &me(1, 0));
    let draft = first.begin(1000).unwrap();
    let rank = draft.dir().join("rank-0");
    let deep = rank.join("d".repeat(200)).join("e".repeat(200));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("long \u{e4}%"), vec![7; 3_000_000]).unwrap();
    fs::write(rank.join("ckpt_app.dmtcp"), "generation 1").unwrap();
    fs::write(rank.join("empty"), "").unwrap();
    let source = draft.commit(facts(1), 2).unwrap();
    let archive = export(&source);

    let second = lock(&other(&cell, "moved"), &me(2, 0));
    let sum = std::sync::atomic::AtomicU64::new(0);
    let expected = std::sync::atomic::AtomicU64::new(0);
    let order = std::sync::atomic::Ordering::SeqCst;
    let progress = |n| {
        sum.fetch_add(n, order);
    };
    let choose = |manifest: &Manifest| {
        expected.store(manifest.bytes, order);
        Ok(second.clone())
    };
    let from = Path::new("-");
    let came =
        super::super::import(archive.as_slice(), from, &choose, &content_ok, &progress).unwrap();
    assert_eq!(came.manifest().files, source.manifest().files);
    assert_eq!(came.manifest().name, "moved");
    assert_eq!(sum.load(order), expected.load(order));
    assert_eq!(newest(&second), Some(1));
    // Other programs can read it: tar with the manifest first.
    let mut first_name = String::new();
    let mut tar = tar::Archive::new(zstd::Decoder::new(archive.as_slice()).unwrap());
    for (at, entry) in tar.entries().unwrap().enumerate() {
        let mut entry = entry.unwrap();
        if at == 0 {
            first_name = entry.path().unwrap().display().to_string();
        }
        entry.read_to_end(&mut Vec::new()).unwrap();
    }
    assert_eq!(first_name, "manifest.json");
}

#[test]
fn damaged_archives_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cell = cell(dir.path());
    let first = lock(&cell, &me(1, 0));
    let archive = export(&save(&first, 2, 2));
    let second = lock(&other(&cell, "moved"), &me(2, 0));
    let refused = |bytes: &[u8], what: &str| {
        let result = import(&second, bytes);
        assert!(
            matches!(result, Err(Error::Damaged { .. })),
            "{what}: {result:?}"
        );
        let left = fs::read_dir(second.cell().dir().join("generations"))
            .unwrap()
            .count();
        assert_eq!(left, 0, "{what}");
    };
    // Before the zstd frame's end nothing may be missing; the last bytes are its checksum.
    for cut in (0..archive.len() - 5).step_by(37) {
        refused(&archive[..cut], &format!("cut at {cut}"));
    }
    for bit in (0..archive.len() * 8).step_by(61) {
        let mut flipped = archive.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        // A flip in a tar header's unused fields or in zstd's own may change nothing that counts.
        if let Ok(generation) = import(&second, &flipped) {
            generation.verify(&|_| Ok(()), &|_| ()).unwrap();
            second.delete(generation.number(), "delete").unwrap();
        }
    }
    refused(b"", "empty");
    refused(b"no archive at all", "text");

    // The same as a tar file, with members changed.
    let plain = zstd::decode_all(archive.as_slice()).unwrap();
    let members = || {
        let mut members = Vec::new();
        for entry in tar::Archive::new(plain.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            members.push((entry.path().unwrap().to_path_buf(), content));
        }
        members
    };
    let pack = |members: &[(PathBuf, Vec<u8>)]| {
        let mut tar = tar::Builder::new(zstd::Encoder::new(Vec::new(), 1).unwrap());
        for (path, content) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, path, content.as_slice())
                .unwrap();
        }
        tar
    };
    let finish = |tar: tar::Builder<zstd::Encoder<'static, Vec<u8>>>| {
        tar.into_inner().unwrap().finish().unwrap()
    };
    let mut changed = members();
    changed[1].1[0] ^= 1;
    refused(&finish(pack(&changed)), "changed file");
    let mut swapped = members();
    swapped.swap(1, 2);
    refused(&finish(pack(&swapped)), "swapped files");
    let mut fewer = members();
    fewer.pop();
    refused(&finish(pack(&fewer)), "fewer files");
    let mut more = members();
    more.push(("more".into(), b"x".to_vec()));
    refused(&finish(pack(&more)), "more files");
    let mut tar = pack(&members()[..1]);
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    tar.append_link(&mut header, "rank-0", "/etc").unwrap();
    refused(&finish(tar), "a link");

    // Names in an archive mean nothing.
    let mut renamed = members();
    renamed[1].0 = "elsewhere/x".into();
    let generation = import(&second, &finish(pack(&renamed))).unwrap();
    assert!(generation.rank_dir(0).join("ckpt_app.dmtcp").is_file());
}

#[test]
fn a_file_that_was_damaged_is_not_exported() {
    let dir = tempfile::tempdir().unwrap();
    let lock = lock(&cell(dir.path()), &me(1, 0));
    let generation = save(&lock, 1, 2);
    let file = generation.rank_dir(0).join("ckpt_app.dmtcp");
    fs::remove_file(&file).unwrap();
    fs::write(&file, "x".repeat(1000)).unwrap();
    let exported = generation.export(std::io::sink(), &|_| ());
    assert!(matches!(exported, Err(Error::Damaged { .. })));
}

#[test]
fn pins_and_deletion() {
    let dir = tempfile::tempdir().unwrap();
    let cell = cell(dir.path());
    {
        let lock = lock(&cell, &me(1, 0));
        save(&lock, 1, 1);
        cell.pin(1).unwrap();
        save(&lock, 1, 1);
        save(&lock, 1, 1);
        assert_eq!(cell.numbers().unwrap(), [1, 3]);
        assert!(
            lock.delete(1, "delete")
                .unwrap_err()
                .to_string()
                .contains("unpin heat@1")
        );
        assert!(matches!(lock.delete(2, "delete"), Err(Error::Absent(_))));
        assert!(matches!(cell.pin(2), Err(Error::Absent(_))));
        lock.delete(3, "delete").unwrap();
        let latest = fs::read_link(cell.dir().join("latest")).unwrap();
        assert_eq!(latest, Path::new("generations/000001"));
        // A number is not used twice, even if it was the newest.
        assert_eq!(save(&lock, 1, 1).number(), 4);
        // A held name is not deleted.
        let held = cell.delete_name(&me(2, 0), &Unwitnessed, false, true);
        assert!(matches!(held, Err(Error::Locked(_))), "{held:?}");
    }
    let step = cell.step(&StepKey::parse("a").unwrap());
    let person = Holder {
        job: None,
        ..me(0, 0)
    };
    drop(lock(&step, &me(1, 0)));
    let refused = cell
        .delete_name(&person, &Unwitnessed, false, false)
        .unwrap_err();
    assert!(
        refused.to_string().contains("heat@1 is pinned")
            || refused.to_string().contains("unpin heat@1")
    );
    assert!(cell.unpin(1).unwrap());
    assert!(!cell.unpin(1).unwrap());
    cell.delete_name(&person, &Unwitnessed, false, false)
        .unwrap();
    assert!(!cell.exists());
    assert_eq!(fs::read_dir(cell.store().dir()).unwrap().count(), 0);
    assert!(matches!(
        cell.delete_name(&person, &Unwitnessed, false, false),
        Err(Error::Absent(_))
    ));
}
