//! Output that goes by us: of steps of several tasks, and where `srun --unbuffered` gives a terminal.
//!
//! What is not carried is not recorded, and a requeued script empties the file of `srun … > file` when
//! it comes to that line. So its helper copies what the file holds before the script begins, by
//! [`keep`], and the step's first task writes it again, by [`Aside::go_first`].
//!
//! Contract: a step that is not run again, or goes on, leaves in its file what it left there before,
//! after which comes what it writes now; or [`Aside::is_missing`] says why it cannot.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use super::output::MOST;
use super::{Part, Why, read, write};
use crate::pipes::write_all;
use crate::store::{self, disk};

/// Where it is noted which files these are.
const NOTE: &str = "aside.json";

const LOST: &str =
    "it wrote into a pipe, which is not recorded of several tasks and of `srun --unbuffered`";

/// The streams of a step that are not carried.
#[derive(Debug, Default)]
pub struct Aside {
    /// srun's open files of those that end in files, an entry of /proc/PID/fd each, and whether they
    /// are only appended to.
    files: BTreeMap<i32, (PathBuf, bool)>,
    lost: bool,
    begun: AtomicBool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Note {
    job: u32,
    places: BTreeMap<i32, Place>,
}

/// Where a step began to write in a file.
#[derive(Debug, Serialize, Deserialize)]
struct Place {
    /// Device and inode.
    file: (u64, u64),
    /// As [`store::escape`] writes it.
    path: String,
    at: u64,
}

impl Aside {
    /// Stream `number` is not carried and ends in srun's open file `fd`.
    pub fn add(&mut self, number: i32, fd: PathBuf, appended: bool) {
        match fs::metadata(&fd) {
            Ok(about) if about.is_file() => drop(self.files.insert(number, (fd, appended))),
            Ok(about) => self.lost |= about.file_type().is_fifo() || about.file_type().is_socket(),
            Err(_) => {}
        }
    }

    /// Why what a completed step of `job` wrote cannot be written again.
    pub fn is_missing(&self, dir: &Path, job: u32) -> io::Result<Option<Why>> {
        if self.lost {
            return Ok(Some(LOST.into()));
        }
        let note: Option<Note> = read(&dir.join(NOTE))?;
        let places = note.filter(|note| note.job == job);
        let places = places.map(|note| note.places).unwrap_or_default();
        for (number, (fd, appended)) in &self.files {
            let (kept, now) = (kept(dir, *number), Place::at_end(fd)?);
            let holds = |place: &Place| *appended && place.holds(&now, &kept);
            if !kept.exists() && !places.get(number).is_some_and(holds) {
                let path = now.path;
                return Ok(Some(format!(
                    "what it wrote to {path} is not there any more"
                )));
            }
        }
        Ok(None)
    }

    /// Has what was kept of `job` go first, if the step has not begun `anew`; once in a run.
    pub fn go_first(&self, dir: &Path, job: u32, anew: bool) -> io::Result<()> {
        if self.begun.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        if self.lost && !anew {
            log::warn!("what it had written before does not come again: {LOST}");
        }
        let path = dir.join(NOTE);
        let before: Option<Note> = read(&path)?;
        let is_of_job = !anew && before.as_ref().is_some_and(|note| note.job == job);
        let mut before = before.filter(|_| is_of_job).map(|note| note.places);
        let mut places = BTreeMap::new();
        let mut first = Vec::new();
        for number in [1, 2] {
            let kept = kept(dir, number);
            let earlier = before.as_mut().and_then(|places| places.remove(&number));
            let Some((fd, appended)) = self.files.get(&number) else {
                disk::remove(&kept).map_err(io::Error::other)?;
                continue;
            };
            let now = Place::at_end(fd)?;
            let place = match earlier {
                // It was not emptied.
                Some(earlier) if *appended && earlier.holds(&now, &kept) => earlier,
                Some(_) => {
                    if !kept.exists() {
                        let path = &now.path;
                        log::warn!("what it had written to {path} before is not there any more");
                    }
                    first.push((number, kept));
                    now
                }
                None => {
                    disk::remove(&kept).map_err(io::Error::other)?;
                    now
                }
            };
            places.insert(number, place);
        }
        match places.is_empty() {
            true => disk::remove(&path).map_err(io::Error::other)?,
            false => write(&path, &Note { job, places })?,
        }
        let mut first = first.iter();
        first.try_for_each(|(number, kept)| give(*number, kept))
    }
}

/// Writes what was kept to stream `number`. It stays there: this may end half-way.
fn give(number: i32, kept: &Path) -> io::Result<()> {
    let mut kept = match File::open(kept) {
        Ok(kept) => kept,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(why) => return Err(why),
    };
    let to = match number {
        1 => io::stdout().as_fd().try_clone_to_owned()?,
        _ => io::stderr().as_fd().try_clone_to_owned()?,
    };
    let mut buffer = vec![0; 1 << 16];
    loop {
        match kept.read(&mut buffer)? {
            0 => return Ok(()),
            count => write_all(&to, &buffer[..count])?,
        }
    }
}

fn kept(dir: &Path, number: i32) -> PathBuf {
    dir.join(format!("{number}.kept"))
}

/// Copies what the steps of `job` have in files that its script makes anew, before it begins.
pub fn keep(job: u32, parts: &[Part]) {
    let mut found = Vec::new();
    for Part { dir, .. } in parts {
        match read::<Note>(&dir.join(NOTE)) {
            Ok(note) => {
                let note = note.filter(|note| note.job == job);
                let places = note.map(|note| note.places).unwrap_or_default();
                found.extend(
                    places
                        .into_iter()
                        .map(|(number, place)| (dir, number, place)),
                );
            }
            Err(why) => log::debug!("{}: {why}", dir.display()),
        }
    }
    for (dir, number, place) in &found {
        // Where the next one began, its own ends.
        let next = found.iter().map(|(_, _, other)| other);
        let next = next.filter(|other| other.file == place.file && other.at > place.at);
        let end = next.map(|other| other.at).min();
        if let Err(why) = place.keep(end, &kept(dir, *number)) {
            log::warn!("what {} holds may be missing there: {why}", place.path);
        }
    }
}

impl Place {
    fn at_end(fd: &Path) -> io::Result<Place> {
        let about = fs::metadata(fd)?;
        Ok(Place {
            file: (about.dev(), about.ino()),
            path: store::escape(fs::read_link(fd)?.as_os_str()),
            at: about.len(),
        })
    }

    /// Whether what was `kept` is still in the file, which ends at `end`.
    fn holds(&self, end: &Place, kept: &Path) -> bool {
        let count = fs::metadata(kept).map_or(0, |kept| kept.len());
        self.file == end.file && end.at >= self.at + count
    }

    fn keep(&self, end: Option<u64>, kept: &Path) -> io::Result<()> {
        let Some(path) = store::unescape(&self.path) else {
            return Ok(());
        };
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(why) => return Err(why),
        };
        let about = file.metadata()?;
        let size = end.unwrap_or(about.len()).min(about.len());
        let size = size.saturating_sub(self.at);
        // What was kept before is the beginning of it, unless that run ended before it was written.
        let before = fs::metadata(kept).map_or(0, |kept| kept.len());
        if (about.dev(), about.ino()) != self.file || !about.is_file() || size < before {
            return Ok(());
        }
        if size > MOST {
            let most = MOST >> 30;
            return Err(io::Error::other(format!("it is more than {most} GiB")));
        }
        file.seek(SeekFrom::Start(self.at))?;
        let new = kept.with_extension("new");
        let options = &mut File::options();
        let options = options.write(true).create(true).truncate(true).mode(0o600);
        let mut copy = options.open(&new)?;
        io::copy(&mut file.take(size), &mut copy)?;
        copy.sync_data()?;
        fs::rename(&new, kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: u32 = 7;

    #[test]
    fn what_each_step_has_in_a_file_is_kept_until_there_is_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let part = |name: &str| Part {
            dir: dir.path().join(name),
            generation: None,
            completed: false,
        };
        let parts = [part("one"), part("two")];
        // Each begins at the end of what is there then.
        for (part, held) in parts.iter().zip(["head\n", "head\n1\n"]) {
            fs::create_dir(&part.dir).unwrap();
            fs::write(&path, held).unwrap();
            let link = part.dir.join("fd");
            std::os::unix::fs::symlink(&path, &link).unwrap();
            let place = Place::at_end(&link).unwrap();
            let places = BTreeMap::from([(1, place)]);
            write(&part.dir.join(NOTE), &Note { job: JOB, places }).unwrap();
        }
        let kept_of = |n: usize| kept(&parts[n].dir, 1);
        let kept = || {
            parts
                .each_ref()
                .map(|p| fs::read_to_string(kept(&p.dir, 1)).ok())
        };
        fs::write(&path, "head\n1\n2\n").unwrap();
        keep(JOB + 1, &parts);
        assert_eq!(kept(), [None, None]);
        for held in ["head\n1\n2\n", "head\n", ""] {
            fs::write(&path, held).unwrap();
            keep(JOB, &parts);
            assert_eq!(kept(), [Some("1\n".into()), Some("2\n".into())], "{held:?}");
        }
        fs::write(&path, "head\n1\n2\nmore\n").unwrap();
        keep(JOB, &parts);
        assert_eq!(kept()[1].as_deref(), Some("2\nmore\n"));
        // Of a file that is appended to and was not emptied nothing has to be written again.
        let [one, two] = parts.each_ref().map(|part| {
            let note: Note = read(&part.dir.join(NOTE)).unwrap().unwrap();
            note.places.into_values().next().unwrap()
        });
        let end = || Place::at_end(&parts[0].dir.join("fd")).unwrap();
        assert!(one.holds(&end(), &kept_of(0)) && two.holds(&end(), &kept_of(1)));
        fs::write(&path, "head\n1\n").unwrap();
        assert!(one.holds(&end(), &kept_of(0)) && !two.holds(&end(), &kept_of(1)));
    }
}
