//! CRIU's files, as far as we read them ourselves: to check that a set is whole, and for what has to
//! be done around a restore.
//!
//! ```text
//! NAME.img   u32 0x54564319, u32 magic of its kind      (inventory.img: the second only)
//!            then entries: u32 length, protobuf message; some kinds have raw bytes after an entry
//! pages-N.img  memory, pages of 4096 bytes, in the order of the pagemap that names N
//! ```
//! (CRIU's `include/magic.h`, `image.c`, `image-desc.c`, `images/*.proto`; unchanged since 2.0.)
//!
//! Contract: nothing that stands in the files is believed before it was checked; hostile ones give
//! an error, never a panic or a large allocation.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use super::protobuf::{Fields, Value, message, number, varint};

const COMMON: u32 = 0x5456_4319;
const SERVICE: u32 = 0x5510_5940;
const INVENTORY: u32 = 0x5831_3116;

/// Image format that CRIU has written since 2.0 (CRTOOLS_IMAGES_V1_1).
const VERSION: u64 = 2;

/// Largest file of descriptions (not of pages) that is read, in bytes.
const FILE_MAX: u64 = 256 << 20;

/// Size of a page on this architecture as CRIU writes it.
const PAGE: u64 = 4096;

/// Flag of a pagemap entry: its pages are in the file (PE_PRESENT; older CRIU had no flags).
const PRESENT: u64 = 4;
/// Flag of a pagemap entry: its pages are in an earlier dump, which we never make (PE_PARENT).
const PARENT: u64 = 1;

/// State of a task that has ended but was not waited for (TASK_DEAD in CRIU's `pid.h`).
const DEAD: u64 = 2;

/// The kinds whose files hold entries and nothing else, and their magic: those of every process and
/// those that name all others.
const KINDS: &[(&str, u32)] = &[
    ("core-", 0x5505_3847),
    ("creds-", 0x5402_3547),
    ("fdinfo-", 0x5621_3732),
    ("files", 0x5630_3138),
    ("fs-", 0x5140_3912),
    ("ids-", 0x5443_2030),
    ("mm-", 0x5749_2820),
    ("pagemap-", 0x5608_4025),
    ("pstree", 0x5027_3030),
    ("seccomp", 0x6441_3049),
    ("timens-", 0x4311_4433),
];

/// Checks that the set in `dir` is whole: every process that it names has all its files, every file
/// is well-formed, every page is there.
pub fn verify(dir: &Path) -> Result<(), String> {
    let names = names(dir)?;
    for name in &names {
        check(dir, name)?;
    }
    let inventory = entries(dir, "inventory.img")?;
    let version = inventory
        .first()
        .map(|entry| number(entry, 1))
        .transpose()?;
    if version.flatten() != Some(VERSION) {
        return Err(format!(
            "{}: CRIU wrote another format than {VERSION}: {version:?}",
            dir.join("inventory.img").display()
        ));
    }
    let need = |name: String| match names.contains(&name) {
        true => Ok(name),
        false => Err(format!("{} is missing", dir.join(name).display())),
    };
    need("files.img".into())?;
    let processes = processes(dir)?;
    for process in &processes {
        let core = need(format!("core-{}.img", process.pid))?;
        let core = entries(dir, &core)?;
        let state = match core
            .first()
            .map(|core| message(core, 3))
            .transpose()?
            .flatten()
        {
            Some(task) => number(task, 1)?,
            None => None,
        };
        match state {
            Some(DEAD) => continue,
            Some(_) => {}
            None => return Err(format!("process {} has no state", process.pid)),
        }
        for thread in &process.threads {
            need(format!("core-{thread}.img"))?;
        }
        for kind in ["mm", "pagemap", "fs", "ids"] {
            need(format!("{kind}-{}.img", process.pid))?;
        }
    }
    pages(dir, &names)
}

/// A process of a set.
#[derive(Debug)]
pub struct Process {
    pub pid: u32,
    /// Their ids; of a dead one (see [`DEAD`]) anything, as CRIU writes what it has never set
    /// (`collect_threads` in its `seize.c`, 4.1 and 4.2).
    threads: Vec<u64>,
}

/// The processes of the set, the first one (whose end is the application's) in front.
pub fn processes(dir: &Path) -> Result<Vec<Process>, String> {
    let mut processes = Vec::new();
    for entry in entries(dir, "pstree.img")? {
        let mut process = Process {
            pid: 0,
            threads: Vec::new(),
        };
        for field in Fields(&entry) {
            match field? {
                (1, Value::Number(pid)) => process.pid = pid_of(pid)?,
                (5, Value::Number(thread)) => process.threads.push(thread),
                // Repeated numbers may be packed.
                (5, Value::Bytes(mut packed)) => {
                    while !packed.is_empty() {
                        process.threads.push(varint(&mut packed)?);
                    }
                }
                _ => {}
            }
        }
        processes.push(process);
    }
    if processes.is_empty() {
        return Err(format!(
            "{}: no process is in it",
            dir.join("pstree.img").display()
        ));
    }
    Ok(processes)
}

fn pid_of(number: u64) -> Result<u32, String> {
    match u32::try_from(number) {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err(format!("{number} is no process id")),
    }
}

/// What was in the pipe `inode` and not yet read.
pub fn unread(dir: &Path, inode: u64) -> Result<Vec<u8>, String> {
    const NAME: &str = "pipes-data.img";
    if !dir.join(NAME).exists() {
        return Ok(Vec::new());
    }
    let file = read(dir, NAME)?;
    let mut rest = file.get(8..).unwrap_or_default();
    while !rest.is_empty() {
        let entry = entry(&mut rest).map_err(|error| describe(dir, NAME, error))?;
        let size = usize::try_from(number(entry, 2)?.unwrap_or(0)).unwrap_or(usize::MAX);
        let Some((data, after)) = rest.split_at_checked(size) else {
            return Err(describe(dir, NAME, "it is cut short".into()));
        };
        if number(entry, 1)? == Some(inode) {
            return Ok(data.to_vec());
        }
        rest = after;
    }
    Ok(Vec::new())
}

/// The names of the files in `dir`.
fn names(dir: &Path) -> Result<BTreeSet<String>, String> {
    let failed = |error| format!("cannot list {}: {error}", dir.display());
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        names.insert(
            entry
                .map_err(failed)?
                .file_name()
                .to_string_lossy()
                .into_owned(),
        );
    }
    Ok(names)
}

/// Checks one file for itself.
fn check(dir: &Path, name: &str) -> Result<(), String> {
    let raw = name.starts_with("pages-") || !name.ends_with(".img");
    if raw {
        return Ok(());
    }
    if name == "inventory.img" || KINDS.iter().any(|(kind, _)| is_kind(name, kind)) {
        return entries(dir, name).map(drop);
    }
    let path = dir.join(name);
    let failed = |error| format!("cannot read {}: {error}", path.display());
    let mut first = [0; 8];
    File::open(&path)
        .map_err(failed)?
        .read_exact(&mut first)
        .map_err(failed)?;
    match u32_at(&first, 0) {
        Some(COMMON | SERVICE) => Ok(()),
        _ => Err(describe(dir, name, "it is no file of CRIU's".into())),
    }
}

fn is_kind(name: &str, kind: &str) -> bool {
    match name.strip_prefix(kind) {
        Some(rest) => rest == ".img" || kind.ends_with('-'),
        None => false,
    }
}

/// Checks that each pagemap's pages are there, and no others.
fn pages(dir: &Path, names: &BTreeSet<String>) -> Result<(), String> {
    // Several pagemaps never share a file of pages.
    let mut seen = BTreeSet::new();
    for name in names.iter().filter(|name| name.starts_with("pagemap-")) {
        let all = entries(dir, name)?;
        let Some((head, entries)) = all.split_first() else {
            return Err(describe(dir, name, "it is empty".into()));
        };
        let Some(id) = number(head, 1)? else {
            return Err(describe(dir, name, "it names no pages".into()));
        };
        let mut count: u64 = 0;
        for entry in entries {
            let flags = number(entry, 4)?.unwrap_or(PRESENT);
            if flags & PARENT != 0 || number(entry, 3)? == Some(1) {
                return Err(describe(
                    dir,
                    name,
                    "some of its pages are in another dump".into(),
                ));
            }
            if flags & PRESENT != 0 {
                let pages = number(entry, 5)?.or(number(entry, 2)?).unwrap_or(0);
                count = count.saturating_add(pages);
            }
        }
        let path = dir.join(format!("pages-{id}.img"));
        let want = count.saturating_mul(PAGE);
        let size = match fs::metadata(&path) {
            Ok(about) => about.len(),
            // CRIU makes the file even for no pages, but an absent one would be no loss.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && want == 0 => 0,
            Err(error) => return Err(format!("cannot examine {}: {error}", path.display())),
        };
        if size != want {
            return Err(format!(
                "{} has {size} bytes instead of {want}",
                path.display()
            ));
        }
        if !seen.insert(id) {
            return Err(describe(
                dir,
                name,
                format!("pages-{id}.img is named twice"),
            ));
        }
    }
    Ok(())
}

fn describe(dir: &Path, name: &str, what: String) -> String {
    format!("{}: {what}", dir.join(name).display())
}

fn read(dir: &Path, name: &str) -> Result<Vec<u8>, String> {
    let path = dir.join(name);
    let failed = |error| format!("cannot read {}: {error}", path.display());
    let file = File::open(&path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    if size > FILE_MAX {
        return Err(describe(dir, name, format!("{size} bytes are too many")));
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Ok(bytes)
}

/// The messages of a file that holds nothing else.
fn entries(dir: &Path, name: &str) -> Result<Vec<Vec<u8>>, String> {
    let parse = |bytes: &[u8]| -> Result<Vec<Vec<u8>>, String> {
        let mut rest = if name == "inventory.img" {
            match u32_at(bytes, 0) {
                Some(INVENTORY) => &bytes[4..],
                _ => return Err("it is no inventory of CRIU's".into()),
            }
        } else {
            let kind = KINDS
                .iter()
                .find(|(kind, _)| is_kind(name, kind))
                .map(|(_, magic)| *magic);
            match (u32_at(bytes, 0), u32_at(bytes, 4)) {
                (Some(COMMON), found) if found.is_some() && found == kind => &bytes[8..],
                _ => return Err("it is not what CRIU writes by that name".into()),
            }
        };
        let mut entries = Vec::new();
        while !rest.is_empty() {
            let message = entry(&mut rest)?;
            for field in Fields(message) {
                field?;
            }
            entries.push(message.to_vec());
        }
        Ok(entries)
    };
    parse(&read(dir, name)?).map_err(|error| describe(dir, name, error))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// Takes one message with its length off the front of `rest`.
fn entry<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], String> {
    let size = u32_at(rest, 0).ok_or("it is cut short")?;
    let size = usize::try_from(size).map_err(|_| "it is cut short")?;
    let (message, after) = rest[4..].split_at_checked(size).ok_or("it is cut short")?;
    *rest = after;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::protobuf::{put_bytes, put_number};
    use super::*;

    fn file(magic: &[u32], entries: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes: Vec<u8> = magic.iter().flat_map(|word| word.to_le_bytes()).collect();
        for entry in entries {
            bytes.extend_from_slice(&(entry.len() as u32).to_le_bytes());
            bytes.extend_from_slice(entry);
        }
        bytes
    }

    fn numbers(fields: &[(u64, u64)]) -> Vec<u8> {
        let mut message = Vec::new();
        for (which, value) in fields {
            put_number(&mut message, *which, *value);
        }
        message
    }

    /// One process with a second thread, two pages, and five unread bytes in pipe 77.
    fn set() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let kind = |name: &str| {
            let found = KINDS.iter().find(|(kind, _)| is_kind(name, kind));
            found.map(|(_, magic)| *magic).unwrap()
        };
        let write = |name: &str, bytes: Vec<u8>| fs::write(dir.path().join(name), bytes).unwrap();
        let put =
            |name: &str, entries: &[Vec<u8>]| write(name, file(&[COMMON, kind(name)], entries));
        write(
            "inventory.img",
            file(&[INVENTORY], &[numbers(&[(1, VERSION)])]),
        );
        put(
            "pstree.img",
            &[
                numbers(&[(1, 5001), (2, 0), (5, 5001), (5, 5002)]),
                // One that has ended.
                numbers(&[(1, 5003), (2, 5001), (5, 0)]),
            ],
        );
        let mut dead = numbers(&[(1, 1)]);
        put_bytes(&mut dead, 3, &numbers(&[(1, DEAD)]));
        put("core-5003.img", &[dead]);
        let mut core = numbers(&[(1, 1)]);
        put_bytes(&mut core, 3, &numbers(&[(1, 1)]));
        put("core-5001.img", &[core]);
        put("core-5002.img", &[numbers(&[(1, 1)])]);
        put("mm-5001.img", &[numbers(&[(1, 4096)])]);
        put("fs-5001.img", &[numbers(&[(1, 1)])]);
        put("ids-5001.img", &[numbers(&[(1, 1)])]);
        put("files.img", &[]);
        let present = numbers(&[(1, 4096), (2, 1), (4, PRESENT), (5, 2)]);
        let lazy = numbers(&[(1, 65536), (2, 9), (4, 2)]);
        put("pagemap-5001.img", &[numbers(&[(1, 3)]), present, lazy]);
        write("pages-3.img", vec![7; 2 * 4096]);
        let unread = numbers(&[(1, 77), (2, 5)]);
        let mut data = file(&[COMMON, 0x5645_3709], &[unread]);
        data.extend_from_slice(b"words");
        write("pipes-data.img", data);
        dir
    }

    #[test]
    fn a_whole_set_is_good_and_told_what_is_in_it() {
        let set = set();
        verify(set.path()).unwrap();
        let processes = processes(set.path()).unwrap();
        assert_eq!((2, 5001), (processes.len(), processes[0].pid));
        assert_eq!(vec![5001, 5002], processes[0].threads);
        assert_eq!(Ok(b"words".to_vec()), unread(set.path(), 77));
        assert_eq!(Ok(Vec::new()), unread(set.path(), 78));
    }

    #[test]
    fn whatever_is_missing_or_cut_is_named() {
        for entry in fs::read_dir(set().path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name == "pipes-data.img" {
                continue;
            }
            let missing = set();
            fs::remove_file(missing.path().join(&name)).unwrap();
            let error = verify(missing.path()).unwrap_err();
            assert!(error.contains(&name), "{name}: {error}");

            let cut = set();
            let path = cut.path().join(&name);
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
            let error = verify(cut.path()).unwrap_err();
            assert!(error.contains(&name), "{name}: {error}");
        }
        let cut = set();
        fs::write(cut.path().join("pipes-data.img"), [0; 9]).unwrap();
        assert!(verify(cut.path()).is_err() && unread(cut.path(), 77).is_err());
    }

    #[test]
    fn pages_of_another_dump_are_refused() {
        let set = set();
        let path = set.path().join("pagemap-5001.img");
        let entries = [
            numbers(&[(1, 3)]),
            numbers(&[(1, 4096), (2, 2), (4, PARENT)]),
        ];
        fs::write(&path, file(&[COMMON, 0x5608_4025], &entries)).unwrap();
        assert!(verify(set.path()).unwrap_err().contains("another dump"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn nothing_that_stands_there_harms(which: usize, at: usize, with in prop::collection::vec(any::<u8>(), 1..12)) {
            let set = set();
            let mut names: Vec<String> = names(set.path()).unwrap().into_iter().collect();
            names.sort();
            let path = set.path().join(&names[which % names.len()]);
            let mut bytes = fs::read(&path).unwrap();
            let at = at % bytes.len();
            bytes.splice(at..(at + with.len()).min(bytes.len()), with);
            fs::write(&path, bytes).unwrap();
            let _ = verify(set.path());
            let _ = unread(set.path(), 77);
            let _ = processes(set.path());
        }
    }
}
