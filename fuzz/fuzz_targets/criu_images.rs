//! A set of CRIU's files, damaged or hostile: an error, never a panic.
//!
//! The input is a row of files: a byte that chooses the name, one that says how long the file is in
//! bytes, the bytes. Each starts as CRIU starts a file of that name, unless bit 7 of the first is set.
#![no_main]
#![allow(dead_code)]

#[path = "../../helper/engine/criu/images.rs"]
mod images;
#[path = "../../helper/engine/criu/protobuf.rs"]
mod protobuf;

use std::fs;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

const COMMON: u32 = 0x5456_4319;
const NAMES: &[(&str, u32)] = &[
    ("inventory.img", 0x5831_3116),
    ("pstree.img", 0x5027_3030),
    ("files.img", 0x5630_3138),
    ("core-1.img", 0x5505_3847),
    ("core-2.img", 0x5505_3847),
    ("mm-1.img", 0x5749_2820),
    ("pagemap-1.img", 0x5608_4025),
    ("pages-1.img", 0),
    ("fs-1.img", 0x5140_3912),
    ("ids-1.img", 0x5443_2030),
    ("pipes-data.img", 0x5618_3732),
    ("timens-0.img", 0x4311_4433),
];

static DIR: OnceLock<TempDir> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let dir = DIR.get_or_init(|| tempfile::tempdir_in("/dev/shm").expect("a directory"));
    for (name, _) in NAMES {
        let _ = fs::remove_file(dir.path().join(name));
    }
    let mut rest = data;
    while let [which, length, tail @ ..] = rest {
        let (name, magic) = NAMES[usize::from(which & 0x7f) % NAMES.len()];
        let (body, after) = tail.split_at(tail.len().min(usize::from(*length)));
        rest = after;
        let mut bytes = Vec::new();
        if which & 0x80 == 0 && magic != 0 {
            if name != "inventory.img" {
                bytes.extend(COMMON.to_le_bytes());
            }
            bytes.extend(magic.to_le_bytes());
        }
        bytes.extend(body);
        fs::write(dir.path().join(name), bytes).expect("write");
    }
    let _ = images::verify(dir.path());
    let _ = images::processes(dir.path());
    let _ = images::unread(dir.path(), 1);
});
