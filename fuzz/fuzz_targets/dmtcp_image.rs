//! A DMTCP process image, damaged or hostile: an error, never a panic; and an accepted one ends
//! where its file ends.
//!
//! Records of 4096 bytes are nearly all padding, so the input is also read as the fields alone: 200
//! bytes of a header, then 88 of each area, whose payload is made up for it.
#![no_main]
#![allow(dead_code)]

#[path = "../../helper/engine/dmtcp/image_file.rs"]
mod image_file;

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};

const RECORD: usize = 4096;
const PAYLOAD_MAX: u64 = 64 << 10;

fuzz_target!(|data: &[u8]| {
    walk(data);
    let whole = expand(data);
    if walk(&whole) {
        assert!(!walk(&whole[..whole.len() - 1]), "one byte short");
        assert!(!walk(&[&whole[..], b"x"].concat()), "one byte more");
    }
});

/// Whether `bytes` are taken for a whole process image.
fn walk(bytes: &[u8]) -> bool {
    let mut file = File::from(memfd_create("image", MFdFlags::empty()).expect("memfd_create"));
    file.write_all(bytes).expect("write");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let header = image_file::header(&path);
    match image_file::walk(&path) {
        Ok(walked) => {
            assert_eq!(walked, header.expect("what was walked has a header"));
            let _ = image_file::verify(&[path.clone(), path]);
            true
        }
        Err(_) => false,
    }
}

fn expand(data: &[u8]) -> Vec<u8> {
    let (header, areas) = data.split_at(data.len().min(200));
    let mut record = b"DMTCP_CHECKPOINT_IMAGE_v4.0\n".to_vec();
    record.extend(header);
    record.resize(RECORD, 0);
    let mut whole = record.repeat(2);
    for area in areas.chunks(88) {
        let mut record = area.to_vec();
        record.resize(RECORD, 0);
        let number = |at: usize| {
            let bytes = record[at..at + 8].try_into().expect("8 bytes");
            u64::from_le_bytes(bytes)
        };
        let (size, of_file, properties) = (number(16), number(72), number(80));
        let payload = match properties & 3 {
            0 if (1..=size).contains(&of_file) => of_file,
            0 => size,
            _ => 0,
        };
        whole.extend(record);
        whole.resize(whole.len() + payload.min(PAYLOAD_MAX) as usize, 0);
    }
    let mut end = vec![0; RECORD];
    end[16..24].fill(0xff);
    whole.extend(end);
    whole
}
