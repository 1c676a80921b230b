//! A manifest, damaged or hostile: an error, never a panic; and what is accepted can be written
//! again and reads the same.
//!
//! The input is what follows the digits of `check`. It is tried with the check that fits it, which
//! no fuzzer finds by itself, and as a whole file. A corpus starts from seeds/manifest.
#![no_main]
// Of the helper's modules only the manifest is used.
#![allow(dead_code, unused_imports)]

#[path = "../../helper/container/mod.rs"]
mod container;
#[path = "../../helper/engine/mod.rs"]
mod engine;
#[path = "../../helper/fault.rs"]
mod fault;
#[path = "../../helper/pipes.rs"]
mod pipes;
#[path = "../../helper/shell.rs"]
mod shell;
#[path = "../../helper/shellscript.rs"]
mod shellscript;
#[path = "../../helper/runtime.rs"]
mod runtime;
#[path = "../../helper/store/mod.rs"]
mod store;
#[path = "../../helper/sys.rs"]
mod sys;
#[path = "../../plugin/words.rs"]
mod words;

use libfuzzer_sys::fuzz_target;

use store::Manifest;

const HEAD: &[u8] = b"{\n  \"format\": 1,\n  \"check\": \"";

fuzz_target!(|tail: &[u8]| {
    let _ = Manifest::decode(tail);
    let check = blake3::hash(&[HEAD, &[b'0'; 64], tail].concat()).to_hex();
    let Ok(manifest) = Manifest::decode(&[HEAD, check.as_bytes(), tail].concat()) else {
        return;
    };
    for file in &manifest.files {
        let path = file.relative().expect("an accepted path is good");
        assert!(!path.starts_with("/") && !path.components().any(|part| part.as_os_str() == ".."));
    }
    let again = manifest.encode().expect("what was accepted can be written");
    assert_eq!(Manifest::decode(&again).as_ref(), Ok(&manifest));
});
