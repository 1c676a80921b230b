//! What workers and coordinator say to each other, as far as we take part.
//!
//! DMTCP 3.2 to 4.2 send one structure of 208 bytes (`dmtcpmessagetypes.h: DmtcpMessage`), little
//! endian, followed by `extraBytes` bytes. Later versions changed the structure and kept its magic
//! number, so an installation's version is looked at before a word is spoken.

use std::io::{self, Read, Write};

/// Size of a message without what follows it, in bytes.
pub const MESSAGE: usize = 208;

const MAGIC: &[u8] = b"DMTCP_CKPT_V0\n\0";

/// Most that may follow a message, in bytes. DMTCP sends paths and a process's memory map.
const EXTRA_MAX: usize = 64 << 20;

/// The barrier at which every process of the application is stopped and has written and closed its
/// process image; after its release they rename it and go on (`dmtcpworker.cpp: postCheckpoint`).
pub const WRITTEN: &[u8] = b"DMT:WriteCkpt\0";

/// Kinds of messages (`DmtcpMessageType`).
pub mod kind {
    pub const NEW_WORKER: u32 = 1;
    pub const RESTART_WORKER: u32 = 3;
    pub const ACCEPT: u32 = 4;
    pub const USER_COMMAND: u32 = 15;
    pub const USER_RESULT: u32 = 16;
    pub const DO_CHECKPOINT: u32 = 17;
    pub const BARRIER: u32 = 18;
    pub const BARRIER_RELEASED: u32 = 19;
    pub const WORKER_RESUMING: u32 = 20;
}

/// States of a process (`WorkerState`).
const RUNNING: u32 = 1;
const PRESUSPEND: u32 = 2;

/// Where fields are in a message.
mod at {
    pub const SIZE: usize = 88;
    pub const EXTRA: usize = 92;
    pub const KIND: usize = 96;
    pub const STATE: usize = 100;
    pub const PEERS: usize = 168;
    pub const RUNNING: usize = 172;
    pub const COMMAND: usize = 176;
    pub const STATUS: usize = 180;
    pub const ADDRESS: usize = 196;
}

/// A whole message with what follows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message(pub Vec<u8>);

impl Message {
    pub fn kind(&self) -> u32 {
        field(&self.0, at::KIND)
    }

    pub fn extra(&self) -> &[u8] {
        self.0.get(MESSAGE..).unwrap_or_default()
    }

    /// In an `ACCEPT`: the address under which other processes reach those of this node.
    pub fn set_address(&mut self, address: std::net::Ipv4Addr) {
        if let Some(bytes) = self.0.get_mut(at::ADDRESS..at::ADDRESS + 4) {
            bytes.copy_from_slice(&address.octets());
        }
    }
}

/// Bytes that are not a message of this protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Foreign;

/// Cuts a stream of bytes into messages.
#[derive(Debug, Default)]
pub struct Cutter {
    bytes: Vec<u8>,
}

impl Cutter {
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, or nothing until more bytes have come.
    pub fn next(&mut self) -> Result<Option<Message>, Foreign> {
        if self.bytes.len() < MESSAGE {
            return Ok(None);
        }
        let extra = extra(&self.bytes)?;
        if self.bytes.len() < MESSAGE + extra {
            return Ok(None);
        }
        let rest = self.bytes.split_off(MESSAGE + extra);
        Ok(Some(Message(std::mem::replace(&mut self.bytes, rest))))
    }
}

/// Looks at the kinds of messages in a stream that is passed on as it comes.
///
/// The coordinator, once it has the start of a message, waits for its end and does nothing else;
/// DMTCP relies on that order between connections. So nothing is kept back but a start that is not
/// whole.
#[derive(Debug, Default)]
pub struct Passage {
    start: Vec<u8>,
    /// How much of the message at hand is still to come, in bytes.
    left: usize,
}

impl Passage {
    /// Appends what may be passed on of `bytes` to `out`, and the kinds of messages that began to
    /// `kinds`.
    pub fn pass(
        &mut self,
        mut bytes: &[u8],
        out: &mut Vec<u8>,
        kinds: &mut Vec<u32>,
    ) -> Result<(), Foreign> {
        while !bytes.is_empty() {
            if self.left > 0 {
                let (now, rest) = bytes.split_at(self.left.min(bytes.len()));
                out.extend_from_slice(now);
                self.left -= now.len();
                bytes = rest;
                continue;
            }
            let (now, rest) = bytes.split_at((MESSAGE - self.start.len()).min(bytes.len()));
            self.start.extend_from_slice(now);
            bytes = rest;
            if self.start.len() == MESSAGE {
                self.left = extra(&self.start)?;
                let kind = field(&self.start, at::KIND);
                kinds.push(kind);
                // A process that starts another just after it heard of a checkpoint says so in the
                // new one's name. The coordinator leaves that without an answer, and both hang; of
                // a running one it would know that it has to be saved as well
                // (`dmtcp_coordinator.cpp: validateNewWorkerProcess`).
                if kind == kind::NEW_WORKER && field(&self.start, at::STATE) == PRESUSPEND {
                    self.start[at::STATE..at::STATE + 4].copy_from_slice(&RUNNING.to_le_bytes());
                }
                out.append(&mut self.start);
            }
        }
        Ok(())
    }
}

/// How many bytes follow the message that begins with `start`, of at least [`MESSAGE`] bytes.
fn extra(start: &[u8]) -> Result<usize, Foreign> {
    let extra = field(start, at::EXTRA) as usize;
    if !start.starts_with(MAGIC) || field(start, at::SIZE) as usize != MESSAGE || extra > EXTRA_MAX
    {
        return Err(Foreign);
    }
    Ok(extra)
}

/// What the coordinator is asked to do (`dmtcp_coordinator.cpp: handleUserCommand`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Status,
    Checkpoint,
    /// End every process of the application, with exit code 0.
    Kill,
    /// End. There is no answer.
    Quit,
}

/// The coordinator's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// Processes of the application, over all ranks.
    pub peers: u32,
    /// Whether all of them are running (and not being saved, or not yet under control).
    pub running: bool,
    /// Whether the command was taken.
    pub taken: bool,
}

/// The message that asks the coordinator.
pub fn question(command: Command) -> Vec<u8> {
    let mut message = vec![0; MESSAGE];
    message[..MAGIC.len()].copy_from_slice(MAGIC);
    let letter = match command {
        Command::Status => b's',
        Command::Checkpoint => b'c',
        Command::Kill => b'k',
        Command::Quit => b'q',
    };
    for (place, value) in [
        (at::SIZE, MESSAGE as u32),
        (at::KIND, kind::USER_COMMAND),
        (at::COMMAND, u32::from(letter)),
    ] {
        message[place..place + 4].copy_from_slice(&value.to_le_bytes());
    }
    message
}

/// What an answer says, if `message` is one.
pub fn answer(message: &Message) -> Option<Answer> {
    (message.kind() == kind::USER_RESULT).then(|| Answer {
        peers: field(&message.0, at::PEERS),
        running: field(&message.0, at::RUNNING) != 0,
        taken: field(&message.0, at::STATUS) == 0,
    })
}

/// Asks the coordinator at the other end of `stream`, which has its time limits set.
pub fn ask(stream: &mut (impl Read + Write), command: Command) -> io::Result<Answer> {
    stream.write_all(&question(command))?;
    let mut cutter = Cutter::default();
    let mut bytes = [0; MESSAGE];
    loop {
        let count = match stream.read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        cutter.push(&bytes[..count]);
        let heard = match cutter.next() {
            Ok(None) => continue,
            Ok(Some(message)) => answer(&message),
            Err(Foreign) => None,
        };
        return heard.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "the answer is not in the protocol of DMTCP 3.2 to 4.2",
            )
        });
    }
}

/// The 32-bit number at `at`; 0 where there is none.
fn field(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}
