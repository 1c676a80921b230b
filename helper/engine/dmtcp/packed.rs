//! Process images that went through gzip, which is DMTCP's default (`--gzip`, `DMTCP_GZIP`).
//!
//! DMTCP pipes what it writes into `gzip -1 -` and waits for neither its end nor its success
//! (`ckptserializer.cpp`): a checkpoint is "complete" while gzip still writes, or has failed. So a
//! compressed image is believed only once all of it was unpacked, and what is kept is the plain image.
//!
//! Contract: gzip's own checksum and length are checked, and nothing may follow them. What is written
//! is a file beside the image, or where the caller says, that is removed again on any failure. An image
//! that is no longer growing is never waited for longer than [`SILENCE`].

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flate2::bufread::GzDecoder;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::image_file::{self, Fault, Header};

/// What a file of gzip's begins with (RFC 1952, 2.3.1).
const MAGIC: [u8; 2] = [0x1f, 0x8b];

/// How long a gzip that has all its input may write nothing before it is taken for dead.
const SILENCE: Duration = Duration::from_secs(10);

/// How often a file is looked at that another node writes: nobody tells of that.
const LOOK: Duration = Duration::from_millis(100);

/// Whether a file begins as gzip's do.
pub fn is_packed(file: &Path) -> io::Result<bool> {
    let mut start = Vec::new();
    File::open(file)?.take(2).read_to_end(&mut start)?;
    Ok(start == MAGIC)
}

/// The header of a compressed image.
pub fn header(path: &Path) -> Result<Header, Fault> {
    let file = File::open(path).map_err(|source| failed(path, source))?;
    image_file::header_of(path, &mut GzDecoder::new(BufReader::new(file)))
}

/// Reads a compressed image to its end; its header, and its size when unpacked in bytes.
pub fn walk(path: &Path) -> Result<(Header, u64), Fault> {
    let file = File::open(path).map_err(|source| failed(path, source))?;
    let mut stream = GzDecoder::new(BufReader::new(file));
    let walked = image_file::walk_through(path, &mut stream)?;
    nothing_more(&mut stream.into_inner()).map_err(|source| failed(path, source))?;
    Ok(walked)
}

/// Writes what is compressed in `from` to the new file `to`.
pub fn unpack(from: &Path, to: &Path) -> Result<(), Fault> {
    Source::whole(from)
        .and_then(|source| unpack_all(source, to))
        .map_err(|source| failed(from, source))
}

/// Replaces an image that DMTCP says is written by a plain one if it is compressed, as soon as gzip has
/// written all of it, at `end` at the latest.
pub fn settle(path: &Path, end: Instant) -> Result<(), Fault> {
    let failed = |source| failed(path, source);
    let size = fs::metadata(path).map_err(failed)?.len();
    // An empty file is gzip's, which begins to write late: a plain one has its header by now.
    if size > 0 && !is_packed(path).map_err(failed)? {
        return Ok(());
    }
    let mut plain = path.as_os_str().to_owned();
    plain.push(".plain");
    let plain = PathBuf::from(plain);
    let source = Source::growing(path, end).map_err(failed)?;
    unpack_all(source, &plain).map_err(failed)?;
    fs::rename(&plain, path).map_err(failed)
}

fn failed(path: &Path, source: io::Error) -> Fault {
    Fault::Packed {
        path: path.into(),
        source,
    }
}

fn unpack_all(from: Source, to: &Path) -> io::Result<()> {
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)?;
    let mut stream = GzDecoder::new(BufReader::new(from));
    io::copy(&mut stream, &mut file)
        .and_then(|_| {
            // All that gzip had to write is there.
            let mut rest = stream.into_inner();
            rest.get_mut().changes = None;
            nothing_more(&mut rest)
        })
        .inspect_err(|_| {
            // What is left is in a directory that is emptied after a failure.
            let _ = fs::remove_file(to);
        })
}

fn nothing_more(rest: &mut impl BufRead) -> io::Result<()> {
    if rest.fill_buf()?.is_empty() {
        return Ok(());
    }
    let why = "there is something behind what gzip wrote";
    Err(io::Error::new(io::ErrorKind::InvalidData, why))
}

/// A compressed file. Where a gzip may still be writing it, its end comes when that has closed it.
struct Source {
    file: File,
    /// Of what is still written.
    changes: Option<Inotify>,
    end: Instant,
    grew: Instant,
}

impl Source {
    fn whole(path: &Path) -> io::Result<Source> {
        let now = Instant::now();
        Ok(Source {
            file: File::open(path)?,
            changes: None,
            end: now,
            grew: now,
        })
    }

    fn growing(path: &Path, end: Instant) -> io::Result<Source> {
        let changes = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let events = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CLOSE_WRITE;
        changes.add_watch(path, events)?;
        Ok(Source {
            changes: Some(changes),
            end,
            ..Source::whole(path)?
        })
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.file.read(buffer)?;
            let Some(changes) = &self.changes else {
                return Ok(count);
            };
            let now = Instant::now();
            if count > 0 {
                self.grew = now;
                return Ok(count);
            }
            if now >= self.end.min(self.grew + SILENCE) {
                return Ok(0);
            }
            crate::sys::readable(changes, Some(now + LOOK))?;
            let mut closed = false;
            while let Ok(events) = changes.read_events() {
                let close = AddWatchFlags::IN_CLOSE_WRITE;
                closed |= events.iter().any(|event| event.mask.intersects(close));
            }
            // DMTCP and gzip share one open file, so that there is one close and it is the last; what
            // was written before it is still to be read.
            if closed {
                self.changes = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;
    use crate::engine::dmtcp::image_file::tests::image;

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut stream = GzEncoder::new(Vec::new(), Compression::fast());
        stream.write_all(bytes).unwrap();
        stream.finish().unwrap()
    }

    #[test]
    fn a_whole_one_is_walked_and_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
        fs::write(&from, packed(&image())).unwrap();
        assert!(is_packed(&from).unwrap());
        let (header_, size) = walk(&from).unwrap();
        assert_eq!(
            (header(&from).unwrap(), size),
            (header_, image().len() as u64)
        );
        unpack(&from, &to).unwrap();
        assert!(fs::read(&to).unwrap() == image() && !is_packed(&to).unwrap());
        assert!(
            unpack(&from, &to).is_err(),
            "what is there is not written over"
        );
        assert!(fs::read(&to).unwrap() == image());
    }

    #[test]
    fn what_is_cut_flipped_or_followed_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
        let whole = packed(&image());
        let mut flipped = whole.clone();
        // The checksum.
        let at = flipped.len() - 5;
        flipped[at] ^= 1;
        let followed = [&whole[..], b"x"].concat();
        let not_one = packed(b"something else");
        for length in (2..whole.len()).step_by(37).chain([whole.len() - 1]) {
            fs::write(&from, &whole[..length]).unwrap();
            assert!(walk(&from).is_err(), "{length}");
            assert!(unpack(&from, &to).is_err() && !to.exists(), "{length}");
        }
        for wrong in [flipped, followed] {
            fs::write(&from, &wrong).unwrap();
            assert!(walk(&from).is_err());
            assert!(unpack(&from, &to).is_err() && !to.exists());
        }
        fs::write(&from, not_one).unwrap();
        assert!(walk(&from).is_err());
    }

    /// As DMTCP leaves it: somebody else still writes into the file.
    #[test]
    fn what_is_still_written_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let bytes = packed(&image());
        let mut writer = File::create(&path).unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        let settled = {
            let path = path.clone();
            std::thread::spawn(move || settle(&path, end))
        };
        for part in bytes.chunks(100) {
            writer.write_all(part).unwrap();
        }
        drop(writer);
        settled.join().unwrap().unwrap();
        assert!(fs::read(&path).unwrap() == image());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        // A plain one is left alone.
        settle(&path, end).unwrap();
        assert!(fs::read(&path).unwrap() == image());
    }

    #[test]
    fn a_compressor_that_ends_too_early_is_noticed_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let bytes = packed(&image());
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let writer = File::options().append(true).open(&path).unwrap();
        let mut growing = Source::growing(&path, Instant::now() + Duration::from_secs(60)).unwrap();
        let begun = Instant::now();
        drop(writer);
        let mut read = Vec::new();
        growing.read_to_end(&mut read).unwrap();
        assert!(begun.elapsed() < SILENCE / 2);
        assert!(read == bytes[..bytes.len() / 2]);
        // Past its end nothing is waited for.
        assert!(settle(&path, Instant::now()).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
