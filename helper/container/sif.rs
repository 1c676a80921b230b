//! Whether an image file is whole, as far as its header and, of a SIF file, its table of contents
//! tell.
//!
//! Contract: [`check`] reads some kilobytes, never the contents: a file that was cut short, written
//! over, or made for another machine is found, a byte that changed deep inside is not (the digest of
//! [`super::image`] tells that). Offsets are those of `type header` and `type rawDescriptor` of
//! sylabs/sif (`pkg/sif/sif.go`, `descriptor.go`), all integers little-endian.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::image;

/// Bytes of the header.
const HEADER: usize = 128;
/// Bytes of a descriptor.
const DESCRIPTOR: usize = 585;
/// Most descriptors that are looked at; SIF files are made with room for 48.
const DESCRIPTORS_MAX: u64 = 4096;

/// DataPartition of `pkg/sif/descriptor_input.go`: a file system.
const PARTITION: u64 = 0x4004;
/// PartPrimSys: the partition that a container starts from.
const PRIMARY: u64 = 2;
/// FsSquash.
const SQUASHFS: u64 = 1;

/// This machine's code in the header, of `pkg/sif/arch.go`, and its name there.
#[cfg(target_arch = "x86_64")]
const MACHINE: (&[u8], &str) = (b"02", "amd64");
#[cfg(target_arch = "aarch64")]
const MACHINE: (&[u8], &str) = (b"04", "arm64");

/// What an image file is, of what Apptainer takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Sif,
    Squashfs,
    Ext3,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SifError {
    #[error("could not read the container image: {0}")]
    Io(#[from] io::Error),
    #[error("it is no container image: neither SIF nor squashfs nor ext3")]
    Foreign,
    #[error("the container image is damaged: {0}")]
    Damaged(String),
    #[error(
        "the container image is made for another machine (code {found} in its header, not {wanted})"
    )]
    Machine { found: String, wanted: String },
}

/// Which format the file has; an error if it is none, or a SIF file that is not whole or not for this
/// machine.
pub fn check(path: &Path) -> Result<Format, SifError> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    if image::sif_id(path)?.is_none() {
        return plain(&file);
    }
    let cut = |what: &str, end: Option<u64>| match end {
        Some(end) if end <= length => Ok(()),
        end => Err(SifError::Damaged(format!(
            "it has {length} bytes, and {what} goes to {}: it was cut short or written over",
            end.map_or("nowhere".to_owned(), |end| format!("byte {end}"))
        ))),
    };
    let mut header = [0; HEADER];
    cut("its header", Some(HEADER as u64))?;
    file.read_exact_at(&mut header, 0)?;
    let machine = &header[45..47];
    // 00 says nothing of it.
    if machine != MACHINE.0 && machine != b"00" {
        return Err(SifError::Machine {
            found: String::from_utf8_lossy(machine).into_owned(),
            wanted: format!("{}, {}", String::from_utf8_lossy(MACHINE.0), MACHINE.1),
        });
    }
    let total = integer(&header, 88);
    let table = integer(&header, 96);
    cut(
        "its data",
        integer(&header, 112).checked_add(integer(&header, 120)),
    )?;
    if total > DESCRIPTORS_MAX {
        return Err(SifError::Damaged(format!(
            "it claims to hold {total} objects"
        )));
    }
    let mut primary = false;
    for number in 0..total {
        let at = number * DESCRIPTOR as u64;
        let end = table.checked_add(at + DESCRIPTOR as u64);
        cut("its table of contents", end)?;
        let mut descriptor = [0; DESCRIPTOR];
        file.read_exact_at(&mut descriptor, table + at)?;
        if descriptor[4] == 0 {
            continue; // unused
        }
        let (offset, size) = (integer(&descriptor, 17), integer(&descriptor, 25));
        cut("an object in it", offset.checked_add(size))?;
        // Of a partition the descriptor's last 384 bytes begin with file system and use.
        let (system, usage) = (small(&descriptor, 201), small(&descriptor, 205));
        if small(&descriptor, 0) != PARTITION || usage != PRIMARY {
            continue;
        }
        primary = true;
        let mut magic = [0; 4];
        file.read_exact_at(&mut magic, offset)?;
        if system == SQUASHFS && &magic != b"hsqs" {
            return Err(SifError::Damaged(
                "there is no squashfs where its table of contents says".into(),
            ));
        }
    }
    if primary {
        Ok(Format::Sif)
    } else {
        Err(SifError::Damaged("it holds no root file system".into()))
    }
}

/// The format of a file that is a file system itself, perhaps behind the line by which images of
/// Singularity 2 are programs (`pkg/image/squashfs.go`, `ext3.go`).
fn plain(file: &File) -> Result<Format, SifError> {
    const LAUNCH: &[u8] = b"#!/usr/bin/env run-singularity\n";
    let mut start = Vec::new();
    file.take(2048).read_to_end(&mut start)?;
    let start = start.strip_prefix(LAUNCH).unwrap_or(&start);
    if start.starts_with(b"hsqs") {
        Ok(Format::Squashfs)
    } else if start.get(1080..1082) == Some(&[0x53, 0xef]) {
        Ok(Format::Ext3)
    } else {
        Err(SifError::Foreign)
    }
}

fn integer(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(eight)
}

fn small(bytes: &[u8], at: usize) -> u64 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(four).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A SIF file with one partition that holds `content`.
    fn sif(content: &[u8]) -> Vec<u8> {
        let mut bytes = b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\x0001\0".to_vec();
        bytes.extend(MACHINE.0);
        bytes.push(0);
        bytes.extend([7; 16]);
        let data = (HEADER + DESCRIPTOR) as u64;
        for value in [0, 0, 0, 1, HEADER as u64, DESCRIPTOR as u64, data] {
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend((content.len() as u64).to_le_bytes());
        assert_eq!(bytes.len(), HEADER);
        let mut descriptor = vec![0; DESCRIPTOR];
        descriptor[..4].copy_from_slice(&(PARTITION as u32).to_le_bytes());
        descriptor[4] = 1;
        descriptor[17..25].copy_from_slice(&data.to_le_bytes());
        descriptor[25..33].copy_from_slice(&(content.len() as u64).to_le_bytes());
        descriptor[201] = SQUASHFS as u8;
        descriptor[205] = PRIMARY as u8;
        bytes.extend(descriptor);
        bytes.extend(content);
        bytes
    }

    #[test]
    fn damage_is_told_from_a_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app.sif");
        let checked = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            check(&path).map_err(|error| error.to_string())
        };
        let whole = sif(b"hsqs, and more");
        assert_eq!(checked(&whole), Ok(Format::Sif));
        let script = b"#!/usr/bin/env run-singularity\nhsqs";
        assert_eq!(checked(script), Ok(Format::Squashfs));
        let mut ext3 = vec![0; 1082];
        ext3[1080..].copy_from_slice(&[0x53, 0xef]);
        assert_eq!(checked(&ext3), Ok(Format::Ext3));
        for other in ["", "#!/bin/sh\n", "text"] {
            assert!(
                checked(other.as_bytes())
                    .unwrap_err()
                    .starts_with("it is no container")
            );
        }
        for length in 64..whole.len() {
            assert!(checked(&whole[..length]).is_err(), "{length}");
        }
        let mut other = whole.clone();
        other[45..47].copy_from_slice(b"05");
        assert!(checked(&other).unwrap_err().contains("another machine"));
        assert!(
            checked(&sif(b"nothing"))
                .unwrap_err()
                .contains("no squashfs")
        );
        // No number in header and table may lead to more than an error.
        for at in (64..HEADER + DESCRIPTOR).step_by(8) {
            let mut wild = whole.clone();
            wild[at..at + 8].fill(0xff);
            let _ = checked(&wild);
        }
    }
}
