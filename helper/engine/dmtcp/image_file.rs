//! The files that DMTCP writes, one for each process ("process images").
//!
//! DMTCP keeps no checksum and says "complete" of a file that was cut off or of a set from which a
//! process is missing, so a checkpoint is believed only after its files were walked. The layout, as
//! DMTCP 4.0 to 4.2 write it (`dmtcp.h: DmtcpCkptHeader`, `procmapsarea.h`, `writeckpt.cpp`), little
//! endian, in records of 4096 bytes:
//!
//! ```text
//! header          signature, ids, number of processes in the set, vDSO layout, program name
//! header          the same again
//! area            addr, end, size, offset, prot, flags, device, inode, mmapFileSize, properties
//!   payload       unless it is a page of zeros or the parent of the areas that follow
//! area …
//! end             an area with addr 0 and size -1, exactly at the end of the file
//! ```
//!
//! Contract: nothing here trusts a byte of a file; damaged input gives an error that names the file
//! and the place, never a panic or a large allocation. The payload itself is not looked at: whoever
//! keeps the files hashes them.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// What every process image begins with.
const SIGNATURE: &[u8] = b"DMTCP_CHECKPOINT_IMAGE_v4.0\n";

/// Size of a header and of an area record in bytes.
const RECORD: usize = 4096;

const ZERO_PAGE: u64 = 1;
const PARENT: u64 = 2;
const CHILD: u64 = 4;

/// The end of a process image's name, before and after DMTCP's own rename.
pub const SUFFIX: &str = ".dmtcp";
pub const UNFINISHED_SUFFIX: &str = ".dmtcp.temp";

/// DMTCP's name for a process or a computation (`DmtcpUniqueProcessId`), without its generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct UniqueId {
    pub host: u64,
    pub time: u64,
    pub pid: i32,
}

/// What a process image says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub process: UniqueId,
    /// The computation: the same for all processes of a set.
    pub computation: UniqueId,
    /// Counts the checkpoints of a computation.
    pub generation: u32,
    /// How many processes the set has, over all ranks.
    pub peers: u32,
    /// Whether the process has no parent in the set.
    pub root: bool,
    /// Offsets of four functions in the kernel's vDSO, and its regions: a process can be restored
    /// only where these agree.
    pub vdso: Vdso,
    pub program: String,
}

/// Where the kernel's vDSO has its functions, and how large it and its data are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vdso {
    /// `clock_gettime`, `getcpu`, `gettimeofday`, `time`, from the start of the vDSO.
    pub offsets: [u64; 4],
    /// Sizes of vdso, vvar and vvar_vclock in bytes.
    pub sizes: [u64; 3],
}

/// What is wrong with a set of process images.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("cannot read the process image {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("cannot unpack the compressed process image {path}: {source}")]
    Packed { path: PathBuf, source: io::Error },
    #[error("the process image {path} is damaged: {what} at byte {at}")]
    Damaged {
        path: PathBuf,
        what: &'static str,
        at: u64,
    },
    #[error("there are {found} process images where the set has {expected} processes")]
    Count { found: usize, expected: u32 },
    #[error("{a} and {b} are of different checkpoints")]
    Mixed { a: PathBuf, b: PathBuf },
    #[error("{a} and {b} are of the same process")]
    Twice { a: PathBuf, b: PathBuf },
}

/// The process images in `dir` whose names end in `suffix`, sorted. Other files are left out.
pub fn list(dir: &Path, suffix: &str) -> Result<Vec<PathBuf>, Fault> {
    let failed = |source| Fault::Io {
        path: dir.into(),
        source,
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("ckpt_")
            && name.ends_with(suffix)
            && entry.file_type().map_err(failed)?.is_file()
        {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// Checks that `files` are whole and together one complete set; returns their headers in order.
pub fn verify(files: &[PathBuf]) -> Result<Vec<Header>, Fault> {
    let headers: Vec<Header> = files.iter().map(|f| walk(f)).collect::<Result<_, _>>()?;
    one_set(files, &headers)?;
    Ok(headers)
}

/// Checks that `headers`, of `files`, are those of one complete set.
pub fn one_set(files: &[PathBuf], headers: &[Header]) -> Result<(), Fault> {
    let (Some(first), Some(first_file)) = (headers.first(), files.first()) else {
        return Err(Fault::Count {
            found: 0,
            expected: 1,
        });
    };
    let mut seen = std::collections::BTreeMap::new();
    for (header, file) in headers.iter().zip(files) {
        if (header.computation, header.generation, header.peers)
            != (first.computation, first.generation, first.peers)
        {
            return Err(Fault::Mixed {
                a: first_file.clone(),
                b: file.clone(),
            });
        }
        if let Some(other) = seen.insert(header.process, file) {
            return Err(Fault::Twice {
                a: other.clone(),
                b: file.clone(),
            });
        }
    }
    if headers.len() != first.peers as usize {
        return Err(Fault::Count {
            found: headers.len(),
            expected: first.peers,
        });
    }
    Ok(())
}

/// Reads the header of one process image.
pub fn header(path: &Path) -> Result<Header, Fault> {
    Walker::open(path)?.only_header()
}

/// Where a header has the parent's process id, and the id that means that there is none any more.
const PARENT_ID: usize = 108;
const NOBODY: i32 = 1;

/// Gives the process of an image a parent if it has none in the set and had the first process of its
/// process-id namespace for one, as in an instance of Apptainer: DMTCP takes it for an orphan, makes one
/// again at a restart and ends itself (`isOrphan` and createOrphanedProcess in its
/// dmtcprestartinternal.cpp), and the container with it.
pub fn adopt(path: &Path) -> Result<(), Fault> {
    let io_fault = |source| Fault::Io {
        path: path.into(),
        source,
    };
    let mut walker = Walker::open(path)?;
    let record = walker.record("cut off")?;
    if !walker.header(&record)?.root || small(&record, PARENT_ID).cast_signed() != NOBODY {
        return Ok(());
    }
    let file = File::options().write(true).open(path).map_err(io_fault)?;
    // The header is there twice. Nothing but this comparison looks at the id.
    for at in [PARENT_ID, RECORD + PARENT_ID] {
        let somebody = (NOBODY + 1).to_le_bytes();
        file.write_all_at(&somebody, at as u64).map_err(io_fault)?;
    }
    Ok(())
}

/// Reads one process image from its start to its end marker.
pub fn walk(path: &Path) -> Result<Header, Fault> {
    Walker::open(path)?.walk()
}

/// Reads the header of a process image that comes as a stream; `path` is what errors name.
pub fn header_of(path: &Path, stream: &mut dyn Read) -> Result<Header, Fault> {
    Walker::of(path, stream).only_header()
}

/// Reads a process image that comes as a stream, which has to end where it does; says how many bytes it
/// has. `path` is what errors name.
pub fn walk_through(path: &Path, stream: &mut dyn Read) -> Result<(Header, u64), Fault> {
    let mut walker = Walker::of(path, stream);
    let header = walker.walk()?;
    Ok((header, walker.at))
}

impl Walker<'_> {
    fn only_header(&mut self) -> Result<Header, Fault> {
        let record = self.record("cut off")?;
        self.header(&record)
    }

    fn walk(&mut self) -> Result<Header, Fault> {
        let file = self;
        let first = file.record("cut off in the header")?;
        let header = file.header(&first)?;
        if file.record("cut off in the header")? != first {
            return Err(file.damaged("the two copies of the header differ"));
        }
        // What the areas after a parent still have to cover.
        let mut open: Option<(u64, u64)> = None;
        loop {
            let area = file.record("cut off between areas")?;
            let [addr, end, size] = [0, 8, 16].map(|at| number(&area, at));
            if addr == 0 {
                // The rest of the end marker is whatever was there before, but for the size.
                if size != u64::MAX || open.is_some() {
                    return Err(file.damaged("wrong end marker"));
                }
                if !file.at_end()? {
                    return Err(file.damaged("data after the end marker"));
                }
                return Ok(header);
            }
            let properties = number(&area, 80);
            if addr.checked_add(size) != Some(end) || size == 0 || !size.is_multiple_of(4096) {
                return Err(file.damaged("an area whose size is not that between its addresses"));
            }
            if properties & !(ZERO_PAGE | PARENT | CHILD) != 0 || small(&area, 32) > 7 {
                return Err(file.damaged("an area with unknown properties"));
            }
            match open {
                Some((from, to)) => {
                    if properties & CHILD == 0 || addr != from || end > to {
                        return Err(file.damaged("an area with a gap in it"));
                    }
                    open = (end < to).then_some((end, to));
                }
                None if properties & CHILD != 0 => {
                    return Err(file.damaged("a part of an area without the area"));
                }
                None if properties & PARENT != 0 => open = Some((addr, end)),
                None => {}
            }
            if properties & (ZERO_PAGE | PARENT) != 0 {
                continue;
            }
            // -1 where there is no file. The flags, as the protection above, are 32 bits wide in a
            // field of 64 whose other half holds whatever was there before.
            let of_file = number(&area, 72).cast_signed();
            let anonymous = small(&area, 40) & libc::MAP_ANONYMOUS.cast_unsigned() != 0;
            let payload = match u64::try_from(of_file) {
                Ok(of_file) if of_file > 0 && !anonymous && properties & CHILD == 0 => of_file,
                _ => size,
            };
            if payload > size {
                return Err(file.damaged("an area with more in it than its size"));
            }
            file.skip(payload)?;
        }
    }
}

/// Reads one process image record by record.
struct Walker<'a> {
    path: &'a Path,
    input: Input<'a>,
    at: u64,
}

/// Where a process image comes from.
enum Input<'a> {
    File { file: File, length: u64 },
    Stream(&'a mut dyn Read),
}

impl<'a> Walker<'a> {
    fn open(path: &'a Path) -> Result<Walker<'a>, Fault> {
        let failed = |source| Fault::Io {
            path: path.into(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        Ok(Walker {
            path,
            input: Input::File { file, length },
            at: 0,
        })
    }

    fn of(path: &'a Path, stream: &'a mut dyn Read) -> Walker<'a> {
        Walker {
            path,
            input: Input::Stream(stream),
            at: 0,
        }
    }

    fn damaged(&self, what: &'static str) -> Fault {
        Fault::Damaged {
            path: self.path.into(),
            what,
            at: self.at,
        }
    }

    fn failed(&self, source: io::Error) -> Fault {
        Fault::Io {
            path: self.path.into(),
            source,
        }
    }

    fn record(&mut self, cut: &'static str) -> Result<[u8; RECORD], Fault> {
        let mut record = [0; RECORD];
        let read = match &mut self.input {
            Input::File { length, .. } if *length - self.at < RECORD as u64 => {
                return Err(self.damaged(cut));
            }
            Input::File { file, .. } => file.read_exact(&mut record),
            Input::Stream(stream) => stream.read_exact(&mut record),
        };
        read.map_err(|source| self.ended(source, cut))?;
        self.at += RECORD as u64;
        Ok(record)
    }

    fn skip(&mut self, bytes: u64) -> Result<(), Fault> {
        const CUT: &str = "cut off within an area";
        let skipped = match &mut self.input {
            Input::File { length, .. } if *length - self.at < bytes => {
                return Err(self.damaged(CUT));
            }
            Input::File { file, .. } => file.seek(SeekFrom::Start(self.at + bytes)).map(|_| bytes),
            Input::Stream(stream) => io::copy(&mut stream.take(bytes), &mut io::sink()),
        };
        match skipped {
            Ok(skipped) if skipped == bytes => {}
            Ok(_) => return Err(self.damaged(CUT)),
            Err(source) => return Err(self.ended(source, CUT)),
        }
        self.at += bytes;
        Ok(())
    }

    /// Whether nothing follows.
    fn at_end(&mut self) -> Result<bool, Fault> {
        let more = match &mut self.input {
            Input::File { length, .. } => return Ok(self.at == *length),
            Input::Stream(stream) => stream.take(1).read_to_end(&mut Vec::new()),
        };
        Ok(more.map_err(|source| self.failed(source))? == 0)
    }

    /// A stream's end where there should be more is damage, and told as a file's is.
    fn ended(&self, source: io::Error, cut: &'static str) -> Fault {
        match source.kind() {
            io::ErrorKind::UnexpectedEof => self.damaged(cut),
            _ => self.failed(source),
        }
    }

    fn header(&self, record: &[u8; RECORD]) -> Result<Header, Fault> {
        if !record.starts_with(SIGNATURE) {
            return Err(self.damaged("no DMTCP 4 process image"));
        }
        let id = |at| UniqueId {
            host: number(record, at),
            time: number(record, at + 8),
            pid: small(record, at + 16).cast_signed(),
        };
        let size = |at| number(record, at + 8).saturating_sub(number(record, at));
        let header = Header {
            process: id(32),
            computation: id(80),
            generation: small(record, 100),
            root: small(record, 124) != 0,
            peers: small(record, 128),
            vdso: Vdso {
                offsets: [136, 144, 152, 160].map(|at| number(record, at)),
                sizes: [184, 200, 216].map(size),
            },
            program: text(&record[256..1280]),
        };
        if header.peers == 0 {
            return Err(self.damaged("a header without processes"));
        }
        Ok(header)
    }
}

/// The 64-bit number at `at` of a record. `at` is a constant of the format, below 4089.
fn number(record: &[u8; RECORD], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&record[at..at + 8]);
    u64::from_le_bytes(bytes)
}

/// The 32-bit number at `at` of a record.
fn small(record: &[u8; RECORD], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&record[at..at + 4]);
    u32::from_le_bytes(bytes)
}

/// The bytes before the first NUL.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use proptest::prelude::*;

    fn put(record: &mut [u8], at: usize, value: u64) {
        record[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// A small process image as DMTCP would write it: a file's pages, and memory of which a part is
    /// zero.
    pub fn image() -> Vec<u8> {
        let mut header = vec![0; RECORD];
        header[..SIGNATURE.len()].copy_from_slice(SIGNATURE);
        put(&mut header, 32, 7);
        put(&mut header, 80, 7);
        header[100] = 3;
        header[128] = 1;
        header[256..260].copy_from_slice(b"prog");
        let mut bytes = [header.clone(), header].concat();
        let mut area = |addr: u64, size: u64, flags: u64, of_file: i64, properties: u64| {
            let mut area = vec![0; RECORD];
            for (at, value) in [(0, addr), (8, addr + size), (16, size), (40, flags)] {
                put(&mut area, at, value);
            }
            // Only half of the field is DMTCP's.
            put(&mut area, 32, 5 | (0xdead << 32));
            put(&mut area, 72, of_file as u64);
            put(&mut area, 80, properties);
            bytes.append(&mut area);
            if properties & (ZERO_PAGE | PARENT) == 0 {
                let payload = if of_file > 0 { of_file as u64 } else { size };
                bytes.resize(bytes.len() + payload as usize, 0xaa);
            }
        };
        area(0x40_0000, 0x2000, 2, 0x1234, 0);
        area(0x50_0000, 0x4000, 0x22, -1, PARENT);
        area(0x50_0000, 0x1000, 0x22, -1, CHILD);
        area(0x50_1000, 0x3000, 0x22, -1, CHILD | ZERO_PAGE);
        area(0x60_0000, 0x1000, 2, -1, 0);
        let mut end = vec![0; RECORD];
        put(&mut end, 16, u64::MAX);
        bytes.append(&mut end);
        bytes
    }

    fn walk_bytes(bytes: &[u8]) -> Result<Header, Fault> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        walk(file.path())
    }

    #[test]
    fn a_whole_one_passes() {
        let header = walk_bytes(&image()).unwrap();
        assert_eq!(
            ("prog", 3, 1),
            (header.program.as_str(), header.generation, header.peers)
        );
    }

    #[test]
    fn a_cut_or_longer_one_does_not() {
        let whole = image();
        for length in (0..whole.len()).step_by(509).chain([whole.len() - 1]) {
            assert!(walk_bytes(&whole[..length]).is_err(), "{length}");
        }
        assert!(walk_bytes(&[&whole[..], b"x"].concat()).is_err());
    }

    #[test]
    fn a_set_has_all_its_processes_once_and_of_one_time() {
        let one = walk_bytes(&image()).unwrap();
        let files: Vec<PathBuf> = ["a", "b"].map(PathBuf::from).into();
        assert!(one_set(&files[..1], std::slice::from_ref(&one)).is_ok());
        assert!(matches!(one_set(&[], &[]), Err(Fault::Count { .. })));
        let twice = [one.clone(), one.clone()];
        assert!(matches!(one_set(&files, &twice), Err(Fault::Twice { .. })));
        let mut other = one.clone();
        other.process.time = 1;
        let more = [one.clone(), other.clone()];
        assert!(matches!(one_set(&files, &more), Err(Fault::Count { .. })));
        other.generation = 4;
        let mixed = [one, other];
        assert!(matches!(one_set(&files, &mixed), Err(Fault::Mixed { .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        /// Whatever is in a file, the walk ends, and what it accepts is as long as it should be.
        #[test]
        fn nothing_hostile_panics(
            flips in proptest::collection::vec((0..24_usize * RECORD, any::<u8>()), 1..8),
            cut in 0..24_usize * RECORD,
        ) {
            let mut bytes = image();
            for (at, value) in flips {
                let at = at % bytes.len();
                bytes[at] = value;
            }
            let _ = walk_bytes(&bytes);
            bytes.truncate(cut.min(bytes.len()));
            if walk_bytes(&bytes).is_ok() {
                prop_assert_eq!(bytes.len(), image().len());
            }
        }

        #[test]
        fn no_stream_of_bytes_panics(bytes in proptest::collection::vec(any::<u8>(), 0..3 * RECORD)) {
            prop_assert!(walk_bytes(&bytes).is_err());
        }
    }
}
