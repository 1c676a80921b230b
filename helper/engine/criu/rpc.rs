//! A dump asked for over CRIU's request socket (`criu swrk`, CRIU's `images/rpc.proto`).
//!
//! CRIU tells there when all is written and the processes are still held: the moment to look at
//! their files. The program's own command line has no such way that works in an image without a
//! shell.

use super::protobuf::{message, number, put_bytes, put_number};

const DUMP: u64 = 1;
const NOTIFY: u64 = 6;

/// What CRIU says on the socket, one packet each.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    /// It waits for [`noted`].
    Notice { post_dump: bool },
    /// It is done, and ends.
    Done,
}

/// The request to save a process tree. Descriptors are those of the process that made the socket.
pub struct Dump<'a> {
    pub pid: u64,
    pub images: u64,
    pub work: u64,
    pub log: &'a str,
    /// Leave the processes stopped, instead of running.
    pub stop: bool,
    /// Time to stop all processes, in seconds.
    pub timeout: u64,
    /// The largest deleted file whose content is saved, in bytes.
    pub ghost_limit: u64,
}

impl Dump<'_> {
    /// The packet (criu_req).
    pub fn packet(&self) -> Vec<u8> {
        let mut options = Vec::new();
        put_number(&mut options, 1, self.images);
        put_number(&mut options, 2, self.pid);
        put_number(&mut options, if self.stop { 69 } else { 3 }, 1);
        // file_locks, log_level, log_file, notify_scripts, work_dir_fd
        put_number(&mut options, 8, 1);
        put_number(&mut options, 9, 2);
        put_bytes(&mut options, 10, self.log.as_bytes());
        put_number(&mut options, 12, 1);
        put_number(&mut options, 17, self.work);
        // manage_cgroups_mode: the job's are Slurm's, and another's after a restart.
        put_number(&mut options, 34, 0);
        put_number(&mut options, 35, self.ghost_limit);
        put_number(&mut options, 45, self.timeout);
        put_number(&mut options, 67, 1);
        let mut request = Vec::new();
        put_number(&mut request, 1, DUMP);
        put_bytes(&mut request, 2, &options);
        request
    }
}

/// The answer to a notice: whether to go on.
pub fn noted(go_on: bool) -> Vec<u8> {
    let mut request = Vec::new();
    put_number(&mut request, 1, NOTIFY);
    put_number(&mut request, 3, u64::from(go_on));
    request
}

/// Understands one packet (criu_resp).
pub fn said(packet: &[u8]) -> Result<Said, String> {
    if number(packet, 1)? != Some(NOTIFY) {
        return Ok(Said::Done);
    }
    let script = match message(packet, 5)? {
        Some(notice) => message(notice, 1)?,
        None => None,
    };
    Ok(Said::Notice {
        post_dump: script == Some(b"post-dump"),
    })
}
