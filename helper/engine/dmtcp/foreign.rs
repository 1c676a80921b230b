//! Process images that DMTCP wrote without us.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::image_file::{self, Header};
use super::packed;
use super::protocol::{self, Command};
use super::running;

/// What is known of the version that wrote such images: that of their format.
pub const IMAGES_VERSION: &str = "4";

/// The file in a rank's directory that tells under which path the application saw the directory of
/// its images. DMTCP looks there for its copies of files.
const SEEN_AT: &str = "seen-at";

/// How long a coordinator may take to answer.
const ANSWER: Duration = Duration::from_secs(5);

/// A complete set.
#[derive(Debug)]
pub struct Set {
    files: Vec<PathBuf>,
    /// Directories with DMTCP's copies of files.
    copies: Vec<PathBuf>,
    /// The program of the first process.
    pub program: String,
    /// Size of the process images, unpacked, in bytes.
    pub bytes: u64,
}

/// The newest complete set in `dir`, by the headers of its images; or what is wrong with what is
/// there.
pub fn newest_set(dir: &Path) -> Result<Set, String> {
    let text = |fault: image_file::Fault| fault.to_string();
    let files = image_file::list(dir, image_file::SUFFIX).map_err(text)?;
    if files.is_empty() {
        return Err("there is no process image: no checkpoint was completed".into());
    }
    let mut sets: Vec<(Vec<PathBuf>, Vec<Header>)> = Vec::new();
    for file in files {
        let header = match is_packed(&file)? {
            true => packed::header(&file),
            false => image_file::header(&file),
        };
        let header = header.map_err(text)?;
        let of = |(_, headers): &&mut (_, Vec<Header>)| {
            headers.first().is_some_and(|first: &Header| {
                (first.computation, first.generation) == (header.computation, header.generation)
            })
        };
        match sets.iter_mut().find(of) {
            Some((files, headers)) => {
                files.push(file);
                headers.push(header);
            }
            None => sets.push((vec![file], vec![header])),
        }
    }
    let mut wrong = String::new();
    let mut best: Option<(SystemTime, Vec<PathBuf>, Vec<Header>)> = None;
    for (files, headers) in sets {
        if let Err(fault) = image_file::one_set(&files, &headers) {
            wrong = fault.to_string();
            continue;
        }
        let written = files
            .iter()
            .filter_map(|file| fs::metadata(file).ok()?.modified().ok())
            .max()
            .unwrap_or(SystemTime::UNIX_EPOCH);
        if best.as_ref().is_none_or(|(other, _, _)| *other < written) {
            best = Some((written, files, headers));
        }
    }
    let Some((_, files, headers)) = best else {
        return Err(format!("no set of process images is complete: {wrong}"));
    };
    let copies = running::copies(dir).map_err(|error| error.to_string())?;
    let first = headers.iter().find(|header| header.root);
    let mut bytes = 0_u64;
    for file in &files {
        bytes = bytes.saturating_add(match is_packed(file)? {
            true => packed::walk(file).map_err(text)?.1,
            false => fs::metadata(file).map_or(0, |seen| seen.len()),
        });
    }
    Ok(Set {
        program: first.map_or_else(String::new, |header| header.program.clone()),
        bytes,
        // A copy is named after the image that it belongs to.
        copies: copies
            .into_iter()
            .filter(|copies| {
                let name = copies.file_name().unwrap_or_default().to_string_lossy();
                let stem = name.trim_end_matches("_files");
                files.iter().any(|file| {
                    let file = file.file_name().unwrap_or_default().to_string_lossy();
                    file.starts_with(stem)
                })
            })
            .collect(),
        files,
    })
}

fn is_packed(file: &Path) -> Result<bool, String> {
    packed::is_packed(file).map_err(|error| format!("cannot read {}: {error}", file.display()))
}

/// Copies a set into a rank's directory, compressed images as plain ones. `seen_at` is the path
/// under which the application saw the directory it is in.
pub fn bring(set: &Set, seen_at: &Path, rank: &Path) -> io::Result<()> {
    for file in &set.files {
        let to = rank.join(file.file_name().unwrap_or_default());
        if packed::is_packed(file)? {
            packed::unpack(file, &to).map_err(io::Error::other)?;
        } else {
            fs::copy(file, &to)?;
        }
        image_file::adopt(&to).map_err(io::Error::other)?;
    }
    for dir in &set.copies {
        super::copy_tree(dir, &rank.join(dir.file_name().unwrap_or_default()))?;
    }
    fs::write(rank.join(SEEN_AT), seen_at.as_os_str().as_bytes())
}

/// Walks through every byte of a rank's images, which have to be one complete set.
pub fn check(rank: &Path) -> Result<(), String> {
    super::verify(rank).map_err(|fault| fault.to_string())
}

/// DMTCP's copies of files in `images` that belong to the generation's directory `from`, and where the
/// application looks for them. Nothing for what was saved here: there they are where they were.
pub fn copies(from: &Path, images: &Path) -> Vec<(PathBuf, PathBuf)> {
    let Ok(seen_at) = fs::read(from.join(SEEN_AT)) else {
        return Vec::new();
    };
    let seen_at = PathBuf::from(OsString::from_vec(seen_at));
    running::copies(images)
        .unwrap_or_default()
        .into_iter()
        .map(|dir| {
            let inside = seen_at.join(dir.file_name().unwrap_or_default());
            (dir, inside)
        })
        .collect()
}

/// How many processes run under the coordinator at `port` of this host; `None` if no coordinator of
/// DMTCP answers there.
pub fn processes_at(port: u16) -> Option<u32> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, ANSWER).ok()?;
    stream.set_read_timeout(Some(ANSWER)).ok()?;
    stream.set_write_timeout(Some(ANSWER)).ok()?;
    let answer = protocol::ask(&mut stream, Command::Status).ok()?;
    Some(answer.peers)
}
