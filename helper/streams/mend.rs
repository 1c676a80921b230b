//! The output file of a batch script's job, after a run that ended without notice.
//!
//! It holds lines that its steps and stages have written after they were last saved, and will write
//! again; or, where Slurm has emptied it, only what was copied by some moment before. Once the script
//! runs nobody may cut the file any more, so its helper calls [`mend`] before.
//!
//! Contract: afterwards the file holds what each of the parts had written at the state that it goes on
//! from, once. Where something else is in between nothing is changed.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::far::{Appended, Far};
use super::held::{self, Held, Segment};
use super::{COMPLETED, FILES, Files, Note, name, read, write};
use crate::writers;

/// A step or stage of the job.
pub struct Part {
    /// Where its streams' records are.
    pub dir: PathBuf,
    /// The generation that it goes on from; None: it begins anew.
    pub generation: Option<u64>,
    /// Whether it has completed.
    pub completed: bool,
}

/// What a part has in the file.
struct Piece {
    dir: PathBuf,
    stream: i32,
    segment: Segment,
    /// How much of its record is to be there.
    wanted: u64,
    /// Whether it has ended, and writes nothing again.
    ended: bool,
}

/// Mends the file that this process's stream `number` of `job` goes to, if it is one that is appended
/// to.
pub fn mend(job: u32, number: i32, parts: &[Part]) -> io::Result<()> {
    let fd = format!("/proc/self/fd/{number}");
    let Some(Far::File(file)) = Far::of(Path::new(&fd), Vec::new()) else {
        return Ok(());
    };
    let mut pieces = Vec::new();
    for part in parts {
        // One part whose notes are damaged must not keep the others from being mended.
        match pieces_of(part, job, file.id) {
            Ok(found) => pieces.extend(found),
            Err(why) => log::debug!("{}: {why}", part.dir.display()),
        }
    }
    pieces.sort_by_key(|piece| piece.segment.at);
    for piece in &pieces {
        piece.mend(&file)?;
    }
    Ok(())
}

fn pieces_of(part: &Part, job: u32, id: (u64, u64)) -> io::Result<Vec<Piece>> {
    let of_job = |files: &Files| files.job == job;
    let completed: Option<Note> = match part.completed {
        true => read(&part.dir.join(COMPLETED))?,
        // It was noted, and the run lost before that was told: the end comes once more.
        false => None,
    };
    let completed =
        completed.and_then(|note| Some((note.files.clone().filter(of_job)?, Some(note))));
    let ended = completed.is_some();
    let (files, note) = match completed {
        Some(completed) => completed,
        None => {
            let files: Option<Files> = read(&part.dir.join(FILES))?;
            let Some(files) = files.filter(of_job) else {
                return Ok(Vec::new());
            };
            let note: Option<Note> = match part.generation {
                Some(generation) => read(&part.dir.join(name(generation)))?,
                None => None,
            };
            if note.is_none() && part.generation.is_some() {
                return Ok(Vec::new());
            }
            (files, note)
        }
    };
    let wanted = |stream: &i32| match &note {
        None => Some(0),
        Some(note) => {
            let mut written = note.written.iter();
            let written = written.find(|written| written.streams.first() == Some(stream))?;
            written.recorded.then_some(written.bytes)
        }
    };
    let pieces = files.segments.into_iter();
    let pieces = pieces.filter(|(_, segment)| segment.file == id);
    Ok(pieces
        .filter_map(|(stream, segment)| {
            Some(Piece {
                dir: part.dir.clone(),
                stream,
                segment,
                wanted: wanted(&stream)?,
                ended,
            })
        })
        .collect())
}

impl Piece {
    fn mend(&self, file: &Appended) -> io::Result<()> {
        let path = self.dir.join(format!("{}.record", self.stream));
        let record = File::open(&path)?;
        let held = held::look(&self.segment, &file.file, &record, self.wanted)?;
        log::debug!("{} in {}: {held:?}", path.display(), file.path.display());
        match held {
            Held::Upto(upto, Some(cut)) if !self.ended => {
                if writers::others(&file.file, &[]).is_empty() {
                    file.cut(
                        &cut,
                        &record,
                        self.wanted..upto,
                        &path.with_extension("cut"),
                    )?;
                }
                Ok(())
            }
            Held::Upto(upto, _) => self.append(file, &record, upto),
            Held::Nothing => {
                let size = file.file.metadata()?.len();
                if size >= self.segment.at {
                    return Ok(());
                }
                let from = if size == 0 { 0 } else { self.segment.from };
                self.moved(Segment::at_end(&file.file, file.id, from)?)?;
                self.append(file, &record, from)
            }
            Held::Unclear => Ok(()),
        }
    }

    /// Appends what is missing.
    fn append(&self, file: &Appended, mut record: &File, from: u64) -> io::Result<()> {
        if from >= self.wanted {
            return Ok(());
        }
        record.seek(SeekFrom::Start(from))?;
        io::copy(&mut record.take(self.wanted - from), &mut &file.file).map(drop)
    }

    /// Notes where in the file this is now.
    fn moved(&self, segment: Segment) -> io::Result<()> {
        let moved = |files: &mut Files| {
            files.segments.insert(self.stream, segment.clone());
        };
        if self.ended {
            let path = self.dir.join(COMPLETED);
            let mut note: Option<Note> = read(&path)?;
            if let Some(note) = &mut note {
                note.files.iter_mut().for_each(moved);
                write(&path, note)?;
            }
            return Ok(());
        }
        let path = self.dir.join(FILES);
        let mut files: Option<Files> = read(&path)?;
        if let Some(files) = &mut files {
            moved(files);
            write(&path, files)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;

    use super::super::output::Written;
    use super::*;

    const JOB: u32 = 7;

    /// A part that began in `file` when that held `before`, recorded `record`, and goes on from or
    /// ended at `wanted` bytes of it.
    fn part(
        dir: &Path,
        file: &Path,
        (before, record): (&str, &str),
        wanted: u64,
        ended: bool,
    ) -> Part {
        fs::create_dir(dir).unwrap();
        fs::write(file, before).unwrap();
        fs::write(dir.join("1.record"), record).unwrap();
        let open = File::open(file).unwrap();
        let about = open.metadata().unwrap();
        let segment = Segment::at_end(&open, (about.dev(), about.ino()), 0).unwrap();
        let files = Files {
            job: JOB,
            segments: BTreeMap::from([(1, segment)]),
        };
        let note = Note {
            exact: true,
            read: None,
            advanced: None,
            written: vec![Written {
                streams: vec![1, 2],
                bytes: wanted,
                recorded: true,
            }],
            files: ended.then(|| files.clone()),
        };
        match ended {
            true => write(&dir.join(COMPLETED), &note).unwrap(),
            false => {
                write(&dir.join(name(3)), &note).unwrap();
                write(&dir.join(FILES), &files).unwrap();
            }
        }
        Part {
            dir: dir.into(),
            generation: Some(3),
            completed: ended,
        }
    }

    #[test]
    fn every_part_is_in_the_file_once_as_far_as_it_goes_on_from() {
        for (now, expected) in [
            // Nothing was emptied.
            ("head\none\nuno\n-\ntwo\ndos\n", "head\none\nuno\n-\ntwo\n"),
            // What was copied at some moment.
            ("head\none\nuno\n-\nt", "head\none\nuno\n-\ntwo\n"),
            ("head\none\nuno\n", "head\none\nuno\ntwo\n"),
            ("head\none\n", "head\none\nuno\ntwo\n"),
            ("he", "heone\nuno\ntwo\n"),
            // Something else.
            (
                "head\none\nuno\n-\ntwo\nhost\n",
                "head\none\nuno\n-\ntwo\nhost\n",
            ),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("out");
            let first = ("head\n", "one\nuno\n");
            let first = part(&dir.path().join("first"), &path, first, 8, true);
            let second = ("head\none\nuno\n-\n", "two\ndos\n");
            let second = part(&dir.path().join("second"), &path, second, 4, false);
            let parts = [second, first];
            fs::write(&path, now).unwrap();
            let file = File::options().append(true).open(&path).unwrap();
            for _ in 0..2 {
                mend(JOB, file.as_raw_fd(), &parts).unwrap();
                assert_eq!(fs::read_to_string(&path).unwrap(), expected, "{now:?}");
            }
            mend(JOB + 1, file.as_raw_fd(), &parts).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), expected);
        }
    }
}
