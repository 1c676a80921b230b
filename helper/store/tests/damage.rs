//! Damage of every kind is found, and nothing that is read back can hurt.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::generation::Fault;
use super::super::manifest::{FORMAT, sample};
use super::*;

/// Writes JSON of any kind as a manifest with a check that fits.
fn seal(value: &Value) -> Vec<u8> {
    let mut text = serde_json::to_string_pretty(value).unwrap();
    let head = format!("{{\n  \"format\": {FORMAT},\n  \"check\": \"");
    text.replace_range(..1, &format!("{head}{}\",", "0".repeat(64)));
    let check = blake3::hash(text.as_bytes()).to_hex();
    text.replace_range(head.len()..head.len() + 64, &check);
    text.into_bytes()
}

fn plain() -> Value {
    serde_json::to_value(sample()).unwrap()
}

#[test]
fn a_manifest_comes_back() {
    let manifest = sample();
    let bytes = manifest.encode().unwrap();
    assert!(bytes.starts_with(b"{\n  \"format\": 1,\n"));
    // As docs/on-disk-format.md tells other programs to check it.
    let zeroed = [&bytes[..29], &[b'0'; 64], &bytes[93..]].concat();
    assert_eq!(blake3::hash(&zeroed).to_hex().as_bytes(), &bytes[29..93]);
    assert_eq!(Manifest::decode(&bytes).unwrap(), manifest);
    assert_eq!(Manifest::decode(&seal(&plain())).unwrap(), manifest);
    let mut more = plain();
    more["invented-later"] = json!({"x": [1]});
    assert_eq!(Manifest::decode(&seal(&more)).unwrap(), manifest);
}

#[test]
fn hostile_manifests_are_refused() {
    let hash = "0".repeat(64);
    let file = |path: &str, size: u64| json!({"path": path, "size": size, "blake3": hash});
    let paths = [
        "../../etc/passwd",
        "/etc/passwd",
        "rank-0/../../x",
        "rank-0/./x",
        "rank-0//x",
        "rank-0/x/",
        "rank-0",
        "",
        "rank-2/x",
        "rank-00/x",
        "rank--1/x",
        "rank-0/%00",
        "rank-0/%2e%2e/%2e%2e/x",
        "rank-0/%",
        "manifest.json",
        &format!("rank-0/{}", "x".repeat(256)),
        &format!("rank-0{}", "/x".repeat(20)),
    ];
    for path in paths {
        let mut value = plain();
        value["ranks"] = json!(1);
        value["files"] = json!([file(path, 30)]);
        let refused = Manifest::decode(&seal(&value));
        assert!(refused.is_err(), "{path}: {refused:?}");
    }
    for (field, wrong) in [
        ("name", json!("../x")),
        ("name", json!(".hidden")),
        ("step_key", json!("a/b")),
        ("generation", json!(0)),
        ("generation", json!(u64::MAX)),
        ("generation", json!(-1)),
        ("ranks", json!(0)),
        ("ranks", json!(4_000_000_000u32)),
        ("ranks", json!(3)),
        ("bytes", json!(31)),
        ("engine", json!("magic")),
        ("trigger", json!("whim")),
        ("created", json!("yesterday")),
        ("files", json!([])),
        ("files", json!([file("rank-0/a", 10), file("rank-0/a", 20)])),
        ("files", json!([file("rank-1/a", 10), file("rank-0/a", 20)])),
        (
            "files",
            json!([file("rank-0/a", u64::MAX), file("rank-1/a", 31)]),
        ),
        (
            "files",
            json!([{"path": "rank-0/a", "size": 30, "blake3": "g".repeat(64)}]),
        ),
        ("files", Value::Array(vec![file("rank-0/a", 0); 100_001])),
    ] {
        let mut value = plain();
        value[field] = wrong;
        let refused = Manifest::decode(&seal(&value));
        assert!(refused.is_err(), "{field}: {refused:?}");
    }
    let deep = "[".repeat(1_000_000);
    let mut bytes = sample().encode().unwrap();
    bytes.truncate(bytes.len() - 3);
    bytes.extend_from_slice(deep.as_bytes());
    assert!(Manifest::decode(&bytes).is_err());
    assert!(
        Manifest::decode(&vec![b' '; (32 << 20) + 1])
            .unwrap_err()
            .contains("larger")
    );
    let newer = br#"{"format": 2, "check": "x"}"#;
    assert!(Manifest::decode(newer).unwrap_err().contains("format 2"));
}

/// Small random changes of a manifest's JSON.
fn mutated() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<u64>().prop_map(|n| json!(n)),
        any::<i64>().prop_map(|n| json!(n)),
        any::<f64>().prop_map(|n| json!(n)),
        "\\PC{0,12}".prop_map(|s| json!(s)),
        "(rank-[0-9]{1,2}|\\.\\.|%2e|/){1,4}".prop_map(|s| json!(s)),
        Just(json!([])),
        Just(json!({})),
    ];
    (
        any::<prop::sample::Index>(),
        any::<prop::sample::Index>(),
        leaf,
    )
        .prop_map(|(which, inner, leaf)| {
            let mut value = plain();
            let keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
            let key = which.get(&keys);
            if key == "files" && inner.index(2) == 1 {
                let file = &mut value["files"][inner.index(2)];
                let field = ["path", "size", "blake3"][inner.index(3)];
                file[field] = leaf;
            } else {
                value[key.as_str()] = leaf;
            }
            value
        })
}

proptest! {
    #[test]
    fn any_bytes_give_an_error(bytes: Vec<u8>) {
        prop_assert!(Manifest::decode(&bytes).is_err());
    }

    #[test]
    fn what_is_accepted_is_in_bounds(value in mutated()) {
        if let Ok(manifest) = Manifest::decode(&seal(&value)) {
            for file in &manifest.files {
                let path = Path::new("/store").join(file.relative().unwrap());
                prop_assert!(path.starts_with("/store"));
                prop_assert!(!path.to_str().unwrap_or_default().contains(".."));
            }
            prop_assert_eq!(&Manifest::decode(&manifest.encode().unwrap()).unwrap(), &manifest);
        }
    }

    #[test]
    fn locks_and_notes_never_panic(bytes: Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let cell = cell(dir.path());
        cell.create().unwrap();
        for file in ["lock", "completed.json", "fresh.json", "history.jsonl", "marks/000001.bad"] {
            fs::write(cell.dir().join(file), &bytes).unwrap();
        }
        let _ = cell.holder();
        let _ = cell.completion();
        let _ = cell.floor();
        prop_assert!(cell.history().is_ok());
        prop_assert!(cell.marks().bad(1).unwrap().is_some());
    }
}

#[test]
fn a_thousand_flipped_bits() {
    let dir = tempfile::tempdir().unwrap();
    let cell = cell(dir.path());
    let lock = lock(&cell, &me(1, 0));
    let generation = save(&lock, 3, 2);
    let mut files: Vec<_> = generation
        .manifest()
        .files
        .iter()
        .map(|f| generation.dir().join(f.relative().unwrap()))
        .collect();
    files.push(generation.dir().join("manifest.json"));
    let check = || Generation::load(generation.dir(), 1)?.check(&|_| ());
    check().unwrap();
    let mut random = TestRandom(7);
    for round in 0..1000 {
        let file = &files[random.below(files.len())];
        let good = fs::read(file).unwrap();
        let mut flipped = good.clone();
        let bit = random.below(good.len() * 8);
        flipped[bit / 8] ^= 1 << (bit % 8);
        overwrite(file, &flipped);
        let found = check();
        assert!(
            matches!(found, Err(Fault::Damaged(_))),
            "{round}: bit {bit} of {file:?}"
        );
        overwrite(file, &good);
    }
    check().unwrap();
}

/// As root, modes do not matter; others need the write permission back first.
fn overwrite(file: &Path, bytes: &[u8]) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(file, bytes).unwrap();
}

/// A small generator (xorshift), so that a failure can be repeated.
pub struct TestRandom(pub u64);

impl TestRandom {
    pub fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

#[test]
fn an_older_good_one_is_used_and_the_reason_kept() {
    type Harm = fn(&Path);
    let harms: &[(&str, Harm)] = &[
        ("BLAKE3", |dir| {
            overwrite(&dir.join("rank-1/ckpt_app.dmtcp"), &[b'x'; 1000])
        }),
        ("000003/rank-1/ckpt_app.dmtcp", |dir| {
            fs::remove_file(dir.join("rank-1/ckpt_app.dmtcp")).unwrap()
        }),
        ("not a file of", |dir| {
            overwrite(&dir.join("rank-0/ckpt_app.dmtcp"), b"short")
        }),
        ("was not saved with it", |dir| {
            fs::write(dir.join("rank-0/ckpt_old.dmtcp"), "").unwrap()
        }),
        ("neither a file nor", |dir| {
            std::os::unix::fs::symlink("/etc/passwd", dir.join("rank-0/link")).unwrap();
        }),
        ("manifest.json", |dir| {
            fs::remove_file(dir.join("manifest.json")).unwrap()
        }),
        ("cut short", |dir| {
            overwrite(&dir.join("manifest.json"), b"")
        }),
        ("not a regular file", |dir| {
            fs::remove_file(dir.join("manifest.json")).unwrap();
            nix::unistd::mkfifo(&dir.join("manifest.json"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        }),
    ];
    for (reason, harm) in harms {
        let dir = tempfile::tempdir().unwrap();
        let cell = cell(dir.path());
        let lock = lock(&cell, &me(1, 0));
        for _ in 0..3 {
            // All of one length, so that only the contents tell.
            save(&lock, 2, 3);
        }
        harm(&cell.dir().join("generations/000003"));
        let found = lock.newest_good(true, &content_ok).unwrap();
        assert_eq!(found.generation.unwrap().number(), 2, "{reason}");
        assert_eq!(found.rejected.len(), 1);
        assert!(
            found.rejected[0].1.contains(reason),
            "{:?} lacks {reason}",
            found.rejected
        );
        let bad = cell.marks().bad(3).unwrap().unwrap();
        assert!(bad.reason.contains(reason));
        assert_eq!(
            cell.numbers().unwrap(),
            [1, 2, 3],
            "a bad one is never deleted"
        );
        // Nor does it count as one of those that are kept.
        save(&lock, 2, 2);
        assert_eq!(cell.numbers().unwrap(), [2, 3, 4]);
        let events = cell.history().unwrap().events;
        assert!(
            events
                .iter()
                .any(|e| matches!(&e.what, What::MarkedBad { generation: 3, .. }))
        );
    }
}

#[test]
fn what_the_engine_refuses_is_marked_too() {
    let dir = tempfile::tempdir().unwrap();
    let cell = cell(dir.path());
    let lock = lock(&cell, &me(1, 0));
    save(&lock, 2, 3);
    save(&lock, 2, 3);
    let newest_is_wrong = |manifest: &Manifest, rank: &Path| {
        if manifest.generation == 2 && rank.ends_with("rank-1") {
            Err("no end mark".into())
        } else {
            Ok(())
        }
    };
    let found = lock.newest_good(true, &newest_is_wrong).unwrap();
    assert_eq!(found.generation.unwrap().number(), 1);
    assert!(
        found.rejected[0]
            .1
            .contains("dmtcp cannot use rank 1: no end mark")
    );
    // Marked is marked; asked to look again, it is tried again.
    assert_eq!(newest(&lock), Some(1));
    let again = lock.newest_good(false, &content_ok).unwrap();
    assert_eq!(again.generation.unwrap().number(), 2);
    let nothing = lock.newest_good(false, &|_, _| Err("no".into())).unwrap();
    assert!(nothing.generation.is_none());
    assert_eq!(
        nothing.rejected.iter().map(|r| r.0).collect::<Vec<_>>(),
        [2, 1]
    );
}

#[test]
fn drafts_that_are_no_generation() {
    let dir = tempfile::tempdir().unwrap();
    let cell = cell(dir.path());
    let lock = lock(&cell, &me(1, 0));
    type Prepare = fn(&Path);
    let attempts: &[(&str, Prepare)] = &[
        ("only 0 of 1", |_| ()),
        ("is of no rank", |dir| {
            fs::create_dir(dir.join("rank-1")).unwrap();
            fs::write(dir.join("rank-1/x"), "x").unwrap();
        }),
        ("plain form", |dir| fs::write(dir.join("x"), "x").unwrap()),
        ("neither a file nor", |dir| {
            fs::create_dir(dir.join("rank-0")).unwrap();
            std::os::unix::fs::symlink("x", dir.join("rank-0/link")).unwrap();
        }),
    ];
    for (why, prepare) in attempts {
        let draft = lock.begin(1000).unwrap();
        prepare(draft.dir());
        let error = draft.commit(facts(1), 2).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        assert_eq!(
            fs::read_dir(cell.dir().join("generations"))
                .unwrap()
                .count(),
            0
        );
    }
}
