//! `verify`, `pin`, `unpin`, `delete`, `prune`, `clone`: what changes something in a store.

use std::time::Duration;

use serde::Serialize;

use super::output::{Progress, clean, print, print_json};
use super::{
    Context, DAMAGED, Delete, Failure, HELD, One, Prune, Target, Verify, entry, existing, readable,
    store_with,
};
use crate::store::{Cell, Entry, Error, Fault, Holder, Lock, Name, Store, bytes_for_people};

/// A person's command takes locks in no job's name.
fn me() -> Result<Holder, Failure> {
    Ok(Holder::this_process(None, "command", 0)?)
}

pub fn lock(cell: &Cell, context: &Context<'_>, steal: bool) -> Result<Lock, Failure> {
    Ok(cell.lock(&me()?, context.witness, steal, Duration::ZERO)?)
}

#[derive(Serialize)]
struct Verified {
    name: String,
    generation: u64,
    /// `good`, `damaged` or `unreadable`.
    result: &'static str,
    reason: Option<String>,
    /// Whether it was marked bad before.
    marked_bad: bool,
    bytes: u64,
}

pub fn verify(verify: &Verify, context: &Context<'_>) -> Result<(), Failure> {
    let mut work: Vec<(Cell, Entry)> = Vec::new();
    let mut add = |cell: Cell, number: Option<u64>| -> Result<(), Failure> {
        match number {
            Some(_) => {
                let entry = entry(&cell, number)?;
                work.push((cell, entry));
            }
            None => work.extend(
                cell.entries()?
                    .into_iter()
                    .map(|entry| (cell.clone(), entry)),
            ),
        }
        Ok(())
    };
    if verify.names.is_empty()
        && let Some(store) = existing(context)?
    {
        for name in store.names()? {
            let cell = store.name(&name);
            for cell in cell.steps()?.into_iter().chain([cell]) {
                cell.check()?;
                add(cell, None)?;
            }
        }
    }
    for name in &verify.names {
        let target = Target::parse(name)?;
        for cell in target.cells(&store_with(context, name)?)? {
            add(cell, target.generation)?;
        }
    }
    let total = work
        .iter()
        .filter_map(|(_, entry)| entry.generation.as_ref().ok())
        .map(|generation| generation.manifest().bytes)
        .fold(0, u64::saturating_add);
    let mut results = Vec::new();
    let progress = Progress::new("verifying", total);
    for (cell, entry) in work {
        let name = format!("{}@{}", cell.label(), entry.number);
        progress.set_label(&name);
        let mut bytes = 0;
        let checked = entry.generation.and_then(|generation| {
            bytes = generation.manifest().bytes;
            let engine = |dir: &std::path::Path| (context.verify)(generation.manifest(), dir);
            generation.verify(&engine, &|bytes| progress.add(bytes))
        });
        let (result, reason) = match checked {
            Ok(()) => ("good", None),
            // Deleted meanwhile by the job that saves newer ones.
            Err(_) if !cell.numbers()?.contains(&entry.number) => continue,
            Err(Fault::Damaged(why)) => ("damaged", Some(why)),
            Err(Fault::Unreadable(why)) => ("unreadable", Some(why)),
        };
        if result == "damaged" && entry.bad.is_none() {
            cell.mark_bad(entry.number, reason.as_deref().unwrap_or("damaged"))?;
        }
        results.push(Verified {
            name: cell.label(),
            generation: entry.number,
            result,
            reason,
            marked_bad: entry.bad.is_some(),
            bytes,
        });
    }
    drop(progress);
    if verify.common.json {
        #[derive(Serialize)]
        struct Document<'a> {
            format: u32,
            generations: &'a [Verified],
        }
        print_json(&Document {
            format: 1,
            generations: &results,
        })?;
    } else {
        for one in &results {
            let told = match (&one.reason, one.marked_bad) {
                (Some(why), _) => format!("{}: {why}", one.result),
                (None, true) => "good as saved, but marked bad (see `show`)".into(),
                (None, false) => format!("good, {}", bytes_for_people(one.bytes)),
            };
            print(&format!(
                "{}@{}  {}\n",
                one.name,
                one.generation,
                clean(&told)
            ))?;
        }
    }
    if results.iter().any(|one| one.result == "damaged") {
        Err(Failure::Code(DAMAGED))
    } else if results.iter().any(|one| one.result == "unreadable") {
        Err(Failure::Code(super::FAILED))
    } else {
        Ok(())
    }
}

/// What `pin`, `unpin`, `delete` and `prune` did.
#[derive(Serialize)]
struct Done {
    name: String,
    generations: Vec<u64>,
}

fn report(json: bool, what: &str, done: &[Done]) -> Result<(), Failure> {
    if json {
        #[derive(Serialize)]
        struct Document<'a> {
            format: u32,
            action: &'a str,
            names: &'a [Done],
        }
        return print_json(&Document {
            format: 1,
            action: what,
            names: done,
        });
    }
    for one in done {
        for number in &one.generations {
            print(&format!("{}@{number} {what}\n", one.name))?;
        }
        if one.generations.is_empty() && what == "deleted" {
            print(&format!("{} {what}\n", one.name))?;
        }
    }
    Ok(())
}

pub fn pin(one: &One, context: &Context<'_>) -> Result<(), Failure> {
    let target = Target::parse(&one.name)?;
    let cell = target.cell(&store_with(context, &one.name)?)?;
    let number = entry(&cell, target.generation)?.number;
    cell.pin(number)?;
    report(
        one.common.json,
        "pinned",
        &[Done {
            name: cell.label(),
            generations: vec![number],
        }],
    )
}

pub fn unpin(one: &One, context: &Context<'_>) -> Result<(), Failure> {
    let target = Target::parse(&one.name)?;
    let mut done = Vec::new();
    for cell in target.cells(&store_with(context, &one.name)?)? {
        let numbers = match target.generation {
            Some(number) => vec![number],
            None => cell.numbers()?,
        };
        let mut generations = Vec::new();
        for number in numbers {
            if cell.unpin(number)? {
                generations.push(number);
            }
        }
        done.push(Done {
            name: cell.label(),
            generations,
        });
    }
    if done.iter().all(|one| one.generations.is_empty()) {
        log::info!("nothing of {} was pinned", one.name);
    }
    report(one.common.json, "unpinned", &done)
}

pub fn delete(delete: &Delete, context: &Context<'_>) -> Result<(), Failure> {
    let mut done = Vec::new();
    let result = delete_each(delete, context, &mut done);
    // What is gone is told, whatever became of the rest.
    report(delete.common.json, "deleted", &done)?;
    result
}

fn delete_each(
    delete: &Delete,
    context: &Context<'_>,
    done: &mut Vec<Done>,
) -> Result<(), Failure> {
    for name in &delete.names {
        let target = Target::parse(name)?;
        let store = store_with(context, name)?;
        let cell = target.cell(&store)?;
        match target.generation {
            Some(number) => {
                let lock = lock(&cell, context, delete.steal_lock)?;
                delete_generation(&lock, number, delete.force)?;
                done.push(Done {
                    name: cell.label(),
                    generations: vec![number],
                });
            }
            None if target.key.is_some() => {
                return Err(Failure::Usage(format!(
                    "`{name}`: a step is deleted with its whole name, or one generation at a \
                     time ({name}@N)"
                )));
            }
            None => {
                cell.delete_name(&me()?, context.witness, delete.steal_lock, delete.force)?;
                done.push(Done {
                    name: cell.label(),
                    generations: Vec::new(),
                });
            }
        }
        store.sweep()?;
    }
    Ok(())
}

fn delete_generation(lock: &Lock, number: u64, force: bool) -> Result<(), Failure> {
    let cell = lock.cell();
    let entries = cell.entries()?;
    if !entries.iter().any(|entry| entry.number == number) {
        return Err(Error::Absent(format!("generation {number} of {}", cell.label())).into());
    }
    let mut good = entries
        .iter()
        .filter(|entry| entry.bad.is_none() && entry.generation.is_ok());
    let others = good.any(|entry| entry.number != number);
    let is_good = entries
        .iter()
        .any(|entry| entry.number == number && entry.bad.is_none() && entry.generation.is_ok());
    if is_good && !others && !force && cell.completion()?.is_none() {
        return Err(Failure::Other(format!(
            "generation {number} is the only good one of {}: --force deletes it all the same",
            cell.label()
        )));
    }
    if force {
        cell.unpin(number)?;
    }
    Ok(lock.delete(number, "delete")?)
}

pub fn prune(prune: &Prune, context: &Context<'_>) -> Result<(), Failure> {
    let keep = prune.keep.unwrap_or(context.config.keep);
    if keep == 0 {
        return Err(Failure::Usage(
            "--keep 0 would keep nothing: see `delete`".into(),
        ));
    }
    let keep = usize::try_from(keep).unwrap_or(usize::MAX);
    let mut done = Vec::new();
    let mut held = false;
    let mut cells = Vec::new();
    if prune.names.is_empty()
        && let Some(store) = existing(context)?
    {
        store.sweep()?;
        for name in store.names()? {
            cells.extend(cells_of(&store, &name)?);
        }
    }
    for name in &prune.names {
        cells.extend(Target::parse(name)?.cells(&store_with(context, name)?)?);
    }
    for cell in cells {
        match lock(&cell, context, prune.steal_lock) {
            Ok(lock) => {
                let generations = prune_cell(&lock, keep, prune.completed)?;
                done.push(Done {
                    name: cell.label(),
                    generations,
                });
            }
            Err(Failure::Store(Error::Locked(error))) => {
                // Without names, those in use are not meant.
                match prune.names.is_empty() {
                    true => log::debug!("{error}"),
                    false => log::warn!("{error}"),
                }
                held = true;
            }
            Err(failure) => return Err(failure),
        }
    }
    report(prune.common.json, "deleted by prune", &done)?;
    // Who names what is in use has to know that nothing came of it.
    if held && !prune.names.is_empty() {
        Err(Failure::Code(HELD))
    } else {
        Ok(())
    }
}

fn cells_of(store: &Store, name: &Name) -> Result<Vec<Cell>, Failure> {
    let cell = store.name(name);
    cell.check()?;
    Ok(std::iter::once(cell.clone()).chain(cell.steps()?).collect())
}

fn prune_cell(lock: &Lock, keep: usize, completed: bool) -> Result<Vec<u64>, Failure> {
    lock.sweep()?;
    let cell = lock.cell();
    let mut gone = lock.retain(keep)?;
    let finished = completed && cell.completion()?.is_some();
    for entry in cell.entries()? {
        let useless = entry.bad.is_some() || entry.generation.is_err();
        if (useless || finished) && !entry.pinned {
            lock.delete(entry.number, "prune")?;
            gone.push(entry.number);
        }
    }
    gone.sort_unstable();
    Ok(gone)
}

#[derive(Serialize)]
struct Cloned {
    from: String,
    generation: u64,
    name: String,
    /// `reflink`, `hard link` or `copy`.
    by: String,
    bytes: u64,
}

pub fn clone(clone: &super::Clone, context: &Context<'_>) -> Result<(), Failure> {
    let mut from = Target::parse(&clone.name)?;
    let mut new = Target::parse(&clone.new)?;
    from.generation = match (from.generation, new.generation.take()) {
        (Some(one), Some(other)) if one != other => {
            return Err(Failure::Usage(format!(
                "which generation, {one} or {other}? Name it once"
            )));
        }
        (one, other) => one.or(other),
    };
    if new.key.is_some() && from.key.is_none() {
        return Err(Failure::Usage(format!(
            "`{}` is a whole name and cannot become the step {}",
            clone.name, clone.new
        )));
    }
    let store = store_with(context, &clone.name)?;
    let mut sources = Vec::new();
    for cell in from.cells(&store)? {
        match entry(&cell, from.generation) {
            Ok(entry) => sources.push((cell.clone(), readable(&cell, entry)?)),
            // A name whose steps are saved has no generation itself.
            Err(Failure::Store(Error::Absent(_))) if from.generation.is_none() => {}
            Err(failure) => return Err(failure),
        }
    }
    if sources.is_empty() {
        return Err(Error::Absent(format!("good generation of {}", clone.name)).into());
    }
    let target = store.name(&new.name);
    if from.key.is_none() && target.exists() {
        return Err(Failure::Other(format!(
            "there is a checkpoint {} already: choose another name, or delete it first",
            new.name
        )));
    }
    let mut done = Vec::new();
    let bytes = sources
        .iter()
        .map(|(_, generation)| generation.manifest().bytes)
        .sum();
    let progress = Progress::new("cloning", bytes);
    for (cell, generation) in &sources {
        let cell_of_new = match cell
            .key()
            .filter(|_| from.key.is_none())
            .or(new.key.as_ref())
        {
            Some(key) => target.step(key),
            None => target.clone(),
        };
        if !cell_of_new.numbers()?.is_empty() {
            return Err(Failure::Other(format!(
                "{} has generations already",
                cell_of_new.label()
            )));
        }
        let lock = lock(&cell_of_new, context, false)?;
        let (cloned, way) = lock.clone_from(generation, &|bytes| progress.add(bytes))?;
        super::warn_of_paths(generation.manifest(), &cell.label());
        done.push(Cloned {
            from: format!("{}@{}", cell.label(), generation.number()),
            generation: cloned.number(),
            name: cell_of_new.label(),
            by: way.to_string(),
            bytes: cloned.manifest().bytes,
        });
    }
    drop(progress);
    if clone.common.json {
        #[derive(Serialize)]
        struct Document<'a> {
            format: u32,
            clones: &'a [Cloned],
        }
        return print_json(&Document {
            format: 1,
            clones: &done,
        });
    }
    for one in &done {
        print(&format!(
            "{}@{} is {} ({}, by {})\n",
            one.name,
            one.generation,
            one.from,
            bytes_for_people(one.bytes),
            one.by
        ))?;
    }
    Ok(())
}
