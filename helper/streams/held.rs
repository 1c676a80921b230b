//! How much of a record a file holds that is only appended to, such as a job's output file.
//!
//! A next run finds it as the last one has left it, emptied by Slurm or by the script, or with lines
//! that were written after the state it goes on from. Others may have written to it as well.
//!
//! Contract: a [`Segment`] says from where on the file holds what is in the record from some place
//! on. [`look`] compares byte by byte, but for lines of Slurm and of this program, and only looks;
//! [`Cut::make`] takes off what comes after a place.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

/// How lines begin that are not the application's.
const NOT_ITS: [&[u8]; 3] = [b"container-checkpoint: ", b"slurmstepd", b"srun: "];

/// What follows the time in lines of slurmstepd 26.05, which begin with `[2026-11-26T15:38:09.747]`.
const NOTICE: &[u8] = b"] error: *** ";

/// How much before its beginning tells that a segment's file is still the same, in bytes.
const TAIL: u64 = 4096;

/// The most that is looked at at once, in bytes.
const PIECE: u64 = 1 << 16;

/// A part of a file that holds a part of a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Device and inode of the file.
    pub file: (u64, u64),
    /// Where in the file it begins, and at what place of the record.
    pub at: u64,
    pub from: u64,
    /// BLAKE3 of what was in the file just before that.
    before: String,
}

/// What a file holds of a record.
#[derive(Debug)]
pub enum Held {
    /// Nothing: it was emptied.
    Nothing,
    /// Everything up to this place of the record; and, if that is further than was wanted and nothing
    /// else follows, what to cut off.
    Upto(u64, Option<Cut>),
    /// Something else is in between, or before all of it, as of `srun --label`.
    Unclear,
}

/// What is to be cut off of a file.
#[derive(Debug)]
pub struct Cut {
    at: u64,
    /// Lines behind that which stay.
    rest: Vec<u8>,
}

impl Segment {
    /// The end of `file`, where what is in the record from `from` on will be written.
    pub fn at_end(file: &File, id: (u64, u64), from: u64) -> io::Result<Segment> {
        let at = file.metadata()?.len();
        Ok(Segment {
            file: id,
            at,
            from,
            before: before(file, at)?,
        })
    }
}

/// Whether a line that begins so is Slurm's or ours, and not the application's.
pub fn is_not_its(line: &[u8]) -> bool {
    let of_time = |byte: &&u8| byte.is_ascii_digit() || b"[-:.TZ+".contains(byte);
    let time = line.iter().take_while(of_time).count();
    let notice = line.starts_with(b"[20") && line[time..].starts_with(NOTICE);
    notice || NOT_ITS.iter().any(|begin| line.starts_with(begin))
}

fn before(file: &File, at: u64) -> io::Result<String> {
    let count = at.min(TAIL);
    let mut tail = vec![0; usize::try_from(count).map_err(io::Error::other)?];
    file.read_exact_at(&mut tail, at - count)?;
    Ok(blake3::hash(&tail).to_hex().to_string())
}

/// What `file` holds of the first `wanted` bytes of `record`, and of those behind them.
pub fn look(segment: &Segment, file: &File, record: &File, wanted: u64) -> io::Result<Held> {
    let size = file.metadata()?.len();
    if size < segment.at || before(file, segment.at)? != segment.before {
        return Ok(Held::Nothing);
    }
    let recorded = record.metadata()?.len();
    let mut line_begins = segment.at == 0 || byte_at(file, segment.at - 1)? == b'\n';
    let mut file = BufReader::new(file);
    file.seek(SeekFrom::Start(segment.at))?;
    // Where we are, in the file and in the record.
    let (mut at, mut upto) = (segment.at, segment.from);
    let mut cut = (wanted == upto).then(|| Cut {
        at,
        rest: Vec::new(),
    });
    let (mut piece, mut same) = (Vec::new(), Vec::new());
    let mut not_its = false;
    let only = loop {
        piece.clear();
        if (&mut file).take(PIECE).read_until(b'\n', &mut piece)? == 0 {
            break true;
        }
        if line_begins {
            not_its = is_not_its(&piece);
        }
        line_begins = piece.ends_with(b"\n");
        if not_its {
            if let Some(cut) = &mut cut {
                cut.rest.extend_from_slice(&piece);
            }
        } else {
            let left = usize::try_from(recorded.saturating_sub(upto)).unwrap_or(usize::MAX);
            same.resize(piece.len().min(left), 0);
            record.read_exact_at(&mut same, upto)?;
            let count = common(&piece, &same);
            let next = upto + count as u64;
            if cut.is_none() && next >= wanted {
                cut = Some(Cut {
                    at: at + (wanted - upto),
                    rest: Vec::new(),
                });
            }
            upto = next;
            if count < piece.len() {
                break false;
            }
        }
        at += piece.len() as u64;
    };
    Ok(match only {
        false if upto < wanted => Held::Unclear,
        false => Held::Upto(upto, None),
        true => Held::Upto(upto, cut.filter(|_| upto > wanted)),
    })
}

impl Cut {
    /// Cuts `file`, which is open to be appended to.
    pub fn make(&self, file: &File) -> io::Result<()> {
        file.set_len(self.at)?;
        (&*file).write_all(&self.rest)
    }
}

fn byte_at(file: &File, at: u64) -> io::Result<u8> {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    Ok(byte[0])
}

/// How many bytes are the same at the beginning of both.
pub fn common(one: &[u8], other: &[u8]) -> usize {
    one.iter().zip(other).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = "one\ntwo\nthree\nfour\n";

    /// The file after `begins` was there at first and `now` is there now, as `wanted` of the record is.
    fn held(begins: &str, now: &str, wanted: u64) -> (Held, String) {
        let dir = tempfile::tempdir().unwrap();
        let (path, record) = (dir.path().join("file"), dir.path().join("record"));
        std::fs::write(&record, RECORD).unwrap();
        std::fs::write(&path, begins).unwrap();
        let file = File::options().read(true).append(true).open(&path).unwrap();
        let segment = Segment::at_end(&file, (0, 0), 4).unwrap();
        std::fs::write(&path, now).unwrap();
        let held = look(&segment, &file, &File::open(&record).unwrap(), wanted).unwrap();
        if let Held::Upto(_, Some(cut)) = &held {
            cut.make(&file).unwrap();
        }
        (held, std::fs::read_to_string(&path).unwrap())
    }

    #[test]
    fn lines_of_slurm_are_known() {
        for (line, is) in [
            ("slurmstepd-n1: error: *** JOB 1 ON n1 CANCELLED\n", true),
            (
                "[2026-11-26T15:38:09.747] error: *** JOB 2 ON n1 CANCELLED\n",
                true,
            ),
            (
                "[2026-11-26T15:38:09.747] error: the application's\n",
                false,
            ),
            ("[20", false),
            ("2\n", false),
            ("", false),
        ] {
            assert_eq!(is_not_its(line.as_bytes()), is, "{line}");
        }
    }

    #[test]
    fn what_is_missing_or_too_much_is_found() {
        for (now, wanted, upto) in [
            ("head\none\n", 4, 4),
            ("head\none\n", 8, 4),
            ("head\none\ntwo\n", 8, 8),
            ("head\none\ntw", 8, 6),
            // Others have written behind it.
            ("head\none\ntwo\nhost\n", 8, 8),
            ("head\none\ntwo\nthree\nhost\n", 8, 14),
            // More than is recorded.
            ("head\none\ntwo\nthree\nfour\nfive", 8, 19),
        ] {
            let (held, text) = held("head\none\n", now, wanted);
            assert!(
                matches!(held, Held::Upto(at, None) if at == upto),
                "{now:?}: {held:?}"
            );
            assert_eq!(text, now);
        }
    }

    #[test]
    fn what_came_after_the_saved_state_is_cut_off_but_for_lines_of_others() {
        for (now, wanted, expected) in [
            ("head\ntwo\nthree\nfo", 8, "head\ntwo\n"),
            ("head\ntwo\nthree\n", 4, "head\n"),
            ("head\ntwo\nth", 10, "head\ntwo\nth"),
            (
                "head\nsrun: a\ntwo\nslurmstepd: b\nthree\nsrun: c\nfour\nsrun: d\n",
                8,
                "head\nsrun: a\ntwo\nslurmstepd: b\nsrun: c\nsrun: d\n",
            ),
        ] {
            let (held, text) = held("head\n", now, wanted);
            assert!(matches!(held, Held::Upto(..)), "{held:?}");
            assert_eq!(text, expected);
        }
    }

    #[test]
    fn a_file_that_was_emptied_or_mixed_up_is_known() {
        for now in ["", "he", "HEAD\ntwo\n"] {
            assert!(matches!(held("head\n", now, 8).0, Held::Nothing), "{now:?}");
        }
        // As of `srun --label`.
        for now in ["head\nt other\n", "head\n0: two\n"] {
            assert!(matches!(held("head\n", now, 8).0, Held::Unclear), "{now:?}");
        }
    }
}
