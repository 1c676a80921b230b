//! Keeps the heap of restarted processes from growing into nothing.
//!
//! A process that DMTCP restores has the kernel's end of the heap (its "break") of `mtcp_restart`,
//! at a random address, while glibc goes on from the one that was saved. To grow the heap glibc asks
//! for a break a little above that. Where the kernel's is higher still, the kernel takes this for a
//! heap that is to shrink below its beginning, leaves it as it is and says so by giving its own;
//! glibc only looks whether that is high enough, takes it for a yes, and the next `malloc` writes to
//! memory that is not there. Programs that are not position independent have their heap where
//! `mtcp_restart` has its own, between 0x400000 and 1.3 GiB: about one restart in three ended such
//! an application with SIGSEGV as soon as its heap had to grow.
//!
//! DMTCP means to bring the two together at a restart (`ProcessInfo::restoreHeap`, 4.0 to 4.2), and
//! asks glibc's `sbrk(0)` for the kernel's break, which gives glibc's own instead. Ours brings
//! glibc to the kernel's then: see `library.rs`, which is loaded in front of DMTCP's library by
//! `dmtcp_launch --with-plugin`.

use std::io::{self, Write};
use std::path::Path;

/// The library's name among our programs (see [`crate::runtime`]). Processes remember its path.
pub const LIBRARY: &str = "heap.so";

/// The library itself; `build.rs` makes it.
const CODE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/heap.so"));

/// Puts the library among our programs in `runtime`, if it is not there.
pub fn stage(runtime: &Path) -> io::Result<()> {
    let path = runtime.join(LIBRARY);
    if std::fs::read(&path).is_ok_and(|code| code == CODE) {
        return Ok(());
    }
    let mut file = tempfile::NamedTempFile::new_in(runtime)?;
    file.write_all(CODE)?;
    file.as_file().sync_all()?;
    file.persist(&path)?;
    Ok(())
}
