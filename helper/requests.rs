//! Requests for a checkpoint from outside of the job: `container-checkpoint save`.
//!
//! Contract: a request is a file `requests/ID.json` in the cell of a running application, written
//! whole by the user whose store it is, followed by SIGURG to the helper: who does not know SIGURG
//! ignores it, so it harms nobody. The helper takes the requests of its cell ([`take`]), acts and
//! leaves `requests/ID.done.json` ([`answer`]). Whoever asked reads that and removes both. What is
//! read is capped and checked like everything else in a store.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::slurm;
use crate::store::{Cell, Holder, Trigger, Witness, disk};

/// A request is some hundred bytes.
const LARGEST: u64 = 4096;
/// More than people ask for at once; the rest is taken with the next signal.
const MOST: usize = 64;
/// How often an answer is looked for: nothing but files connects nodes.
const LOOK: Duration = Duration::from_millis(200);

const ASKED: &str = ".json";
const DONE: &str = ".done.json";

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Sixteen hexadecimal digits.
    pub id: String,
    /// Whether the application is ended at the saved state, and its job with it.
    pub stop: bool,
    /// Why the job ends, where its other steps ask that this one be saved and ended with it.
    #[serde(default)]
    pub trigger: Option<Trigger>,
    /// Who asks, for messages.
    pub by: String,
    /// The job whose own script asks: one that stops a service of its does not want to end the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<u32>,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    Saved { generation: u64, bytes: u64 },
    Failed { why: String },
}

impl Request {
    /// `stop`: whether the application is ended, and why.
    pub fn new(stop: Option<Trigger>) -> Request {
        let user = nix::unistd::User::from_uid(nix::unistd::getuid());
        let user = user
            .ok()
            .flatten()
            .map_or("somebody".into(), |user| user.name);
        Request {
            id: disk::nonce(),
            stop: stop.is_some(),
            trigger: stop,
            within: None,
            by: format!("{user} on {}", crate::holder::host()),
        }
    }
}

/// The requests in `cell` that were not answered yet. One that cannot be read is told and removed.
pub fn take(cell: &Cell) -> Vec<Request> {
    let dir = dir(cell);
    let names = disk::names_in(&dir).unwrap_or_else(|why| {
        log::warn!("{why}");
        Vec::new()
    });
    let ids = names.iter().filter_map(|name| {
        let id = name.to_str()?.strip_suffix(ASKED)?;
        (is_id(id) && !dir.join(format!("{id}{DONE}")).exists()).then(|| id.to_owned())
    });
    ids.take(MOST)
        .filter_map(|id| {
            let path = dir.join(format!("{id}{ASKED}"));
            let read = disk::read_capped(&path, LARGEST)
                .map_err(|why| why.to_string())
                .and_then(|text| serde_json::from_slice(&text).map_err(|why| why.to_string()));
            match read {
                Ok(request) => Some(Request { id, ..request }),
                Err(why) => {
                    log::warn!("the request {} is ignored: {why}", path.display());
                    remove(&path);
                    None
                }
            }
        })
        .collect()
}

/// Says what became of a request.
pub fn answer(cell: &Cell, request: &Request, answer: &Answer) {
    let path = dir(cell).join(format!("{}{DONE}", request.id));
    // Whoever asked has given up, and taken the request back.
    if !dir(cell).join(format!("{}{ASKED}", request.id)).exists() {
        return;
    }
    let written = serde_json::to_vec(answer)
        .map_err(|why| why.to_string())
        .and_then(|text| disk::replace(&path, &text).map_err(|why| why.to_string()));
    if let Err(why) = written {
        log::warn!("a request of {} cannot be answered: {why}", request.by);
    }
}

/// Removes what earlier runs have left unanswered.
pub fn forget(cell: &Cell) {
    remove(&dir(cell));
}

/// A request on its way.
pub struct Placed {
    cell: Cell,
    request: Request,
}

impl Placed {
    /// Asks whoever holds `cell`, with `stop` that the application ends, too, and why; `within` is the
    /// job whose own script asks. The request is taken back when this is dropped.
    pub fn place(
        cell: &Cell,
        holder: &Holder,
        stop: Option<Trigger>,
        within: Option<u32>,
    ) -> anyhow::Result<Placed> {
        let request = Request {
            within,
            ..Request::new(stop)
        };
        disk::private_dir(&dir(cell), false)?;
        let path = dir(cell).join(format!("{}{ASKED}", request.id));
        disk::replace(&path, &serde_json::to_vec(&request)?)?;
        let placed = Placed {
            cell: cell.clone(),
            request,
        };
        poke(holder)?;
        Ok(placed)
    }

    /// The answer, if there is one.
    pub fn answer(&self) -> anyhow::Result<Option<Answer>> {
        let path = dir(&self.cell).join(format!("{}{DONE}", self.request.id));
        Ok(match disk::read_if_there(&path, LARGEST)? {
            Some(text) => Some(serde_json::from_slice(&text)?),
            None => None,
        })
    }

    /// Waits for the answer. None: whoever held the cell has ended without one.
    pub fn wait(
        &self,
        me: &Holder,
        witness: &dyn Witness,
        limit: Duration,
    ) -> anyhow::Result<Option<Answer>> {
        let begun = std::time::Instant::now();
        loop {
            // Looked at first: an answer may come just before the end.
            let gone = self.cell.holder_has_ended(me, witness)?;
            if let Some(answer) = self.answer()? {
                return Ok(Some(answer));
            }
            if gone == Some(true) || self.cell.holder()?.is_none() {
                return Ok(None);
            }
            if begun.elapsed() >= limit {
                anyhow::bail!(
                    "no answer within {} s: the helper may still be starting or saving",
                    limit.as_secs()
                );
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until `holder` has let go of the cell, so that another run can take it. False: it has
    /// not within `limit`.
    pub fn wait_free(&self, holder: &Holder, limit: Duration) -> anyhow::Result<bool> {
        let begun = std::time::Instant::now();
        loop {
            match self.cell.holder()? {
                Some(now) if now.same_process(holder) => {}
                _ => return Ok(true),
            }
            if begun.elapsed() >= limit {
                return Ok(false);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Leaves the request to the helper without waiting for what becomes of it.
    pub fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        for suffix in [ASKED, DONE] {
            remove(&dir(&self.cell).join(format!("{}{suffix}", self.request.id)));
        }
    }
}

/// Tells a helper that there is something to read, or to look at.
pub fn poke(holder: &Holder) -> anyhow::Result<()> {
    if holder.is_here(&crate::holder::own(None)?) {
        // Slurm is not needed, which may be away.
        let pid = nix::unistd::Pid::from_raw(i32::try_from(holder.pid)?);
        return Ok(nix::sys::signal::kill(pid, nix::sys::signal::SIGURG)?);
    }
    match holder.job {
        Some(job) => Ok(slurm::poke(job, &holder.step)?),
        None => anyhow::bail!(
            "it runs outside of Slurm on {}: ask from there",
            holder.host
        ),
    }
}

fn dir(cell: &Cell) -> PathBuf {
    cell.dir().join("requests")
}

fn is_id(id: &str) -> bool {
    id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn remove(path: &Path) {
    if let Err(why) = disk::remove(path) {
        log::warn!("{why}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Name, Store};

    fn cell(dir: &Path) -> Cell {
        let cell = Store::open(&dir.join("store"))
            .unwrap()
            .name(&Name::parse("run").unwrap());
        std::fs::create_dir_all(super::dir(&cell)).unwrap();
        cell
    }

    fn write(cell: &Cell, name: &str, text: &str) {
        std::fs::write(dir(cell).join(name), text).unwrap();
    }

    #[test]
    fn a_request_is_taken_until_it_is_answered() {
        let home = tempfile::tempdir().unwrap();
        let cell = cell(home.path());
        let request = Request::new(Some(Trigger::ExitRequest));
        let text = serde_json::to_string(&request).unwrap();
        write(&cell, &format!("{}.json", request.id), &text);
        assert_eq!(take(&cell), vec![request.clone()]);
        let placed = Placed {
            cell: cell.clone(),
            request: request.clone(),
        };
        assert_eq!(placed.answer().unwrap(), None);
        let saved = Answer::Saved {
            generation: 3,
            bytes: 9,
        };
        answer(&cell, &request, &saved);
        assert!(take(&cell).is_empty());
        assert_eq!(placed.answer().unwrap(), Some(saved.clone()));
        drop(placed);
        answer(&cell, &request, &saved);
        assert!(disk::names_in(&dir(&cell)).unwrap().is_empty());
    }

    #[test]
    fn what_is_no_request_is_left_out() {
        let home = tempfile::tempdir().unwrap();
        let cell = cell(home.path());
        let good = Request::new(None);
        let text = serde_json::to_string(&good).unwrap();
        write(&cell, "0123456789abcdef.json", &text);
        write(&cell, "x.json", &text);
        write(&cell, "../evil.json", &text);
        write(&cell, "1123456789abcdef.json", "{");
        write(&cell, "2123456789abcdef.json", &" ".repeat(5000));
        let taken = take(&cell);
        assert_eq!(taken.len(), 1);
        assert_eq!(taken[0].id, "0123456789abcdef", "the file's name counts");
        forget(&cell);
        assert!(take(&cell).is_empty());
    }
}
