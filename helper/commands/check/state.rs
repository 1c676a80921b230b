//! Findings about what is saved and what will be: the store, the name, room and time.

use std::time::Duration;

use super::{Common, Findings, Level, Of, output};
use crate::commands::around;
use crate::config::Config;
use crate::holder;
use crate::policy::{self, Cost};
use crate::slurm::Notice;
use crate::slurm::site;
use crate::slurm::{self, Job, SlurmError};
use crate::store::{self, Cell, Manifest, Name, Store, bytes_for_people};
use crate::supervise;
use crate::task::Request;
use crate::words::NAME_RULE;

use Level::{Problem, Warning};

/// The store, opened as a job opens it.
pub fn store(common: &Common, config: &Config, found: &mut Findings) -> Option<Store> {
    let opened = around::chosen_store(common, config).and_then(|dir| {
        let store = Store::open(&dir)?;
        store.try_writing()?;
        Ok(store)
    });
    match opened {
        Ok(store) => {
            let text = format!("{} can be written", store.dir().display());
            found.ok(Of::Job, "store", text);
            Some(store)
        }
        Err(why) => {
            let cure = "choose another directory as the store (--container-checkpoint-dir, `dir` in \
                        the configuration)";
            found.add(Problem, Of::Job, "store", format!("{why:#}"), cure);
            None
        }
    }
}

/// What was saved under a name.
#[derive(Default)]
pub struct Last {
    /// The sum of the newest generations of the name and its steps, in bytes; none without any.
    bytes: Option<u64>,
    /// That which took longest.
    slowest: Option<Cost>,
    /// What a run would go on from, as far as one state stands for all.
    pub goes_on: Option<Manifest>,
}

/// What the name of a request is, if it has one, and what was saved under it.
pub fn name(
    request: &Request,
    submission: bool,
    store: Option<&Store>,
    found: &mut Findings,
) -> Last {
    let (Some(pattern), Some(store)) = (&request.name, store) else {
        return Last::default();
    };
    // Before it is submitted nobody knows a job's id.
    if pattern.contains('%') && (submission || Job::from_environment().is_none()) {
        return Last::default();
    }
    let name = match Name::parse(&slurm::expand(pattern)) {
        Ok(name) => name,
        Err(why) => {
            let text = why.to_string();
            let (cause, cure) = text.split_once(": ").unwrap_or((&text, NAME_RULE));
            found.add(Problem, Of::Job, "name", cause, cure);
            return Last::default();
        }
    };
    let cell = store.name(&name);
    if !cell.exists() {
        found.ok(Of::Job, "name", format!("nothing is saved as {name}"));
        return Last::default();
    }
    match saved(&cell, found) {
        Ok(last) => last,
        Err(why) => {
            let cure = "see what `container-checkpoint show` and `verify` say of it";
            found.add(Problem, Of::Job, "name", why.to_string(), cure);
            Last::default()
        }
    }
}

/// What was saved in a name's cell and those of its steps.
fn saved(name: &Cell, found: &mut Findings) -> store::Result<Last> {
    name.check()?;
    let mut last = Last::default();
    let completed = name.completion()?.is_some();
    for cell in std::iter::once(name.clone()).chain(name.steps()?) {
        // What is damaged in there is for `verify`.
        let entries = cell.entries()?.into_iter().rev();
        let good = entries.filter(|entry| entry.bad.is_none());
        let Some(newest) = good.filter_map(|entry| entry.generation.ok()).next() else {
            continue;
        };
        let sum = last.bytes.unwrap_or(0);
        last.bytes = Some(sum.saturating_add(newest.manifest().bytes));
        let cost = supervise::cost(&newest);
        if cost.map(|cost| cost.took) > last.slowest.map(|cost| cost.took) {
            last.slowest = cost;
        }
        if !completed && cell.completion()?.is_none() {
            last.goes_on = Some(newest.manifest().clone());
        }
    }
    let label = name.label();
    let held = match name.holder()? {
        Some(holder) => {
            let ended = name.holder_has_ended(&holder::own(None)?, &holder::Slurm)?;
            (ended != Some(true)).then_some(holder)
        }
        None => None,
    };
    if let Some(holder) = held {
        let cause = format!("{label} is in use: {}", holder.describe());
        let cure = "let that one end first, or choose another name";
        found.add(Warning, Of::Job, "name", cause, cure);
    } else if last.goes_on.is_some() {
        found.ok(
            Of::Job,
            "name",
            format!("{label} goes on from what is saved"),
        );
    } else {
        found.ok(
            Of::Job,
            "name",
            format!("{label} starts from its beginning"),
        );
    }
    Ok(last)
}

/// Room for one checkpoint more.
pub fn room(store: &Store, last: &Last, found: &mut Findings) {
    match store.room_for(last.bytes.unwrap_or(0)) {
        Ok(Ok(())) => {
            let text = match last.bytes {
                Some(bytes) => format!(
                    "there is room for another {} like the last checkpoint",
                    bytes_for_people(bytes)
                ),
                None => "how much will be needed is not known yet".into(),
            };
            found.ok(Of::Job, "room", text);
        }
        Ok(Err(shortage)) => {
            // Older generations go before that.
            let level = if last.bytes.is_some() {
                Warning
            } else {
                Problem
            };
            let text = shortage.to_string();
            let (cause, cure) = text
                .split_once(": ")
                .unwrap_or((&text, "name a larger store"));
            found.add(level, Of::Job, "room", cause, cure);
        }
        Err(why) => found.add(
            Problem,
            Of::Job,
            "room",
            why.to_string(),
            "choose another directory as the store (--container-checkpoint-dir)",
        ),
    }
}

/// Whether the time between Slurm's first signal and its last is enough; `batch_step`: the script itself
/// is what is to be saved.
pub fn time(
    config: &Config,
    partition: Option<String>,
    batch_step: bool,
    last: &Last,
    found: &mut Findings,
) {
    let asked = site::site().and_then(|site| {
        let partition = site::partition(partition.as_deref())?;
        Ok((site, partition))
    });
    let (site, queue) = match asked {
        Ok(asked) => asked,
        Err(SlurmError::Start(..)) => {
            return found.ok(
                Of::Node,
                "time",
                "Slurm is not here to be asked how much there is",
            );
        }
        Err(why) => {
            let cure = "see whether Slurm's controller runs (scontrol ping)";
            return found.add(Warning, Of::Node, "time", why.to_string(), cure);
        }
    };
    if let (Some(named), None) = (&partition, &queue) {
        let cause = format!("there is no partition {named}");
        found.add(Warning, Of::Job, "time", cause, "see `sinfo -s`");
    }
    if !site.requeue {
        let cause = "jobs are not requeued here unless they say so (JobRequeue=0)";
        found.add(Warning, Of::Job, "requeue", cause, "submit with --requeue");
    }
    let of = Notice::new(&site, queue.as_ref());
    let notice = policy::notice(&of, batch_step);
    let who = match of.preemptible {
        true => "a pre-empted job",
        false => "a job that is requeued or cancelled",
    };
    let mut text = format!(
        "{who} has {} (KillWait {}",
        seconds(notice),
        seconds(of.kill_wait)
    );
    if let Some(queue) = queue.filter(|_| of.preemptible && !of.grace_time.is_zero()) {
        let grace = seconds(of.grace_time);
        text += &format!(", GraceTime {grace} of {}", queue.name);
        if batch_step {
            text += ", of which the batch step hears late";
        }
    }
    text += ")";
    let cure = "take checkpoints in between (--container-checkpoint-interval=auto), use a partition \
                with a GraceTime, or have the administrator raise KillWait";
    let Some(cost) = last.slowest else {
        let fits = policy::fits(notice, config.safety);
        if fits < SOMETHING {
            let cause = format!("{text}: not enough for any but the smallest applications");
            return found.add(Warning, Of::Job, "time", cause, cure);
        }
        let fits = bytes_for_people(fits);
        let text = format!("{text}: enough for about {fits} of memory, more on a fast store");
        return found.ok(Of::Job, "time", text);
    };
    let needed = policy::time_to_save(cost.bytes, Some(cost), config.safety);
    let text = format!(
        "a checkpoint like the last ({} in {}) may need {}, and {text}",
        bytes_for_people(cost.bytes),
        seconds(cost.took),
        seconds(needed),
    );
    if needed <= notice {
        found.ok(Of::Job, "time", text);
    } else {
        found.add(Warning, Of::Job, "time", text, cure);
    }
}

/// Memory of an application that is more than a toy.
const SOMETHING: u64 = 256 << 20;

fn seconds(time: Duration) -> String {
    output::duration(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}
