//! The regular files that an application was writing when it was saved.
//!
//! What it adds to them after the checkpoint, it will add again after a restart: they have to be cut
//! back first. CRIU does not do that, and does not even know the size of files that are only
//! appended to, so sizes are recorded while CRIU holds the processes still.
//!
//! ```text
//! files      SIZE SPACE PATH NUL, for each; as the application sees them
//! ```

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::engine::processes;

/// The name of the record in a rank's directory.
const RECORD: &str = "files";

/// Largest record that is read back, in bytes.
const RECORD_MAX: u64 = 16 << 20;

/// A regular file that was open for writing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    pub path: PathBuf,
    /// In bytes.
    pub size: u64,
}

/// Records the files of the processes `pids`, which are held still, in `dir`.
pub fn record(pids: impl IntoIterator<Item = u32>, dir: &Path) -> io::Result<()> {
    let mut files = BTreeMap::new();
    for pid in pids {
        // One that ended and was not waited for has no files, and on some kernels belongs to root.
        if i32::try_from(pid).is_ok_and(processes::has_ended) {
            continue;
        }
        let process = PathBuf::from(format!("/proc/{pid}"));
        for entry in fs::read_dir(process.join("fd"))? {
            let entry = entry?;
            let about = fs::metadata(entry.path());
            // Nothing is behind some descriptors that could be examined.
            let Ok(about) = about else { continue };
            // Deleted files are CRIU's to keep.
            if !about.is_file() || about.nlink() == 0 {
                continue;
            }
            let info = fs::read_to_string(process.join("fdinfo").join(entry.file_name()))?;
            if writes(&info) {
                files.insert(fs::read_link(entry.path())?, about.size());
            }
        }
    }
    let mut text = Vec::new();
    for (path, size) in files {
        text.extend_from_slice(size.to_string().as_bytes());
        text.push(b' ');
        text.extend_from_slice(path.as_os_str().as_bytes());
        text.push(0);
    }
    fs::write(dir.join(RECORD), text)
}

/// How a descriptor was opened, by its `/proc/PID/fdinfo`, where that is in octal.
fn flags(info: &str) -> Option<i32> {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    i32::from_str_radix(flags.trim(), 8).ok()
}

/// Whether a descriptor was opened for writing, by its `/proc/PID/fdinfo`.
pub fn writes(info: &str) -> bool {
    flags(info).is_some_and(|flags| flags & libc::O_ACCMODE != libc::O_RDONLY)
}

/// Whether what is written to a descriptor is appended, by its `/proc/PID/fdinfo`.
pub fn appends(info: &str) -> bool {
    flags(info).is_some_and(|flags| flags & libc::O_APPEND != 0)
}

/// Reads the record in a rank's directory.
pub fn read(dir: &Path) -> Result<Vec<Written>, String> {
    let path = dir.join(RECORD);
    let mut bytes = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(RECORD_MAX).read_to_end(&mut bytes))
        .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let parse = |entry: &[u8]| -> Option<Written> {
        let entry = entry.strip_suffix(&[0])?;
        let space = entry.iter().position(|byte| *byte == b' ')?;
        Some(Written {
            size: std::str::from_utf8(&entry[..space]).ok()?.parse().ok()?,
            path: PathBuf::from(OsStr::from_bytes(&entry[space + 1..])),
        })
    };
    bytes
        .split_inclusive(|byte| *byte == 0)
        .map(|entry| parse(entry).ok_or_else(|| format!("{} is damaged", path.display())))
        .collect()
}

/// Gives a file the size back that it had. `keep` are files (device and inode) that are not touched:
/// the job's own output.
pub fn take_back(file: &Written, keep: &[(u64, u64)]) -> Result<(), String> {
    let path = file.path.display();
    let about = match fs::symlink_metadata(&file.path) {
        Ok(about) if keep.contains(&(about.dev(), about.ino())) => return Ok(()),
        Ok(about) => about,
        Err(error) => {
            return Err(format!(
                "the application was writing {path} when it was saved, which cannot be found now: \
                 {error}; put it back, with at least {} bytes",
                file.size
            ));
        }
    };
    let size = about.len();
    if !about.is_file() || size < file.size {
        return Err(format!(
            "the application was writing {path} when it was saved; it had {} bytes then and has \
             only {size} now: put it back",
            file.size
        ));
    }
    if size > file.size {
        fs::OpenOptions::new()
            .write(true)
            .open(&file.path)
            .and_then(|open| open.set_len(file.size))
            .map_err(|error| format!("cannot shorten {path} to its saved size: {error}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_recorded_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| File::create(dir.path().join(name)).unwrap();
        fs::write(dir.path().join("read"), "x").unwrap();
        let mut written = open("with space\nand line");
        io::Write::write_all(&mut written, b"12345").unwrap();
        // A process of its own: in ours, other tests open and close files meanwhile.
        let mut process = std::process::Command::new("sleep")
            .arg("60")
            .stdin(File::open(dir.path().join("read")).unwrap())
            .stdout(written)
            .stderr(open("gone"))
            .spawn()
            .unwrap();
        fs::remove_file(dir.path().join("gone")).unwrap();
        record([process.id()], dir.path()).unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
        let files = read(dir.path()).unwrap();
        let path = dir.path().join("with space\nand line");
        assert_eq!(vec![Written { path, size: 5 }], files);

        for damaged in ["x", "1\0", "5 /a", "-1 /a\0"] {
            fs::write(dir.path().join(RECORD), damaged).unwrap();
            assert!(read(dir.path()).is_err(), "{damaged}");
        }
    }

    #[test]
    fn files_are_taken_back_only_to_what_they_had() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        fs::write(&path, "0123456789").unwrap();
        let written = |size| Written {
            path: path.clone(),
            size,
        };
        take_back(&written(10), &[]).unwrap();
        let about = fs::metadata(&path).unwrap();
        take_back(&written(4), &[(about.dev(), about.ino())]).unwrap();
        assert_eq!(10, fs::metadata(&path).unwrap().len());
        take_back(&written(4), &[]).unwrap();
        assert_eq!("0123", fs::read_to_string(&path).unwrap());
        let short = take_back(&written(5), &[]).unwrap_err();
        assert!(short.contains("out") && short.contains("only 4"), "{short}");
        fs::remove_file(&path).unwrap();
        assert!(
            take_back(&written(5), &[])
                .unwrap_err()
                .contains("put it back")
        );
    }
}
