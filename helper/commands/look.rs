//! `list` and `show`: what is there, and what happened. Neither takes a lock nor changes anything.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;

use super::output::{
    self, bar, clean, cut, drawing_width, duration, left, print, print_json, right, table, unicode,
};
use super::{Common, Context, Failure, List, Show, Target, entry, existing, store_with, users};
use crate::engine::{End, Kind};
use crate::store::{
    Bad, Cell, Completion, Entry, Event, History, Holder, Manifest, Store, Time, Unwitnessed, What,
    bytes_for_people,
};

/// A cell in short, as `list` shows it.
#[derive(Debug, Serialize)]
pub struct Summary {
    pub name: String,
    /// The key of an inner step.
    pub step: Option<String>,
    /// `running`, `waiting` (to go on), `completed` or `empty` (nothing to go on from).
    pub state: &'static str,
    pub holder: Option<Holder>,
    pub completed: Option<Completion>,
    /// How many generations there are, and how many of them are good.
    pub generations: usize,
    pub good: usize,
    /// The newest good one.
    pub newest: Option<u64>,
    pub saved: Option<Time>,
    pub engine: Option<Kind>,
    pub image: Option<String>,
    /// Of all readable generations; clones may share some of them.
    pub bytes: u64,
}

/// A generation, as `list NAME` shows it.
#[derive(Debug, Serialize)]
pub struct Line {
    pub generation: u64,
    pub pinned: bool,
    pub bad: Option<Bad>,
    /// Of an earlier computation of that name.
    pub earlier: bool,
    /// What is wrong with the manifest, if it cannot be read.
    pub damaged: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manifest: Option<Short>,
}

/// A manifest without its files.
#[derive(Debug, Serialize)]
pub struct Short {
    pub created: Time,
    pub trigger: String,
    pub job: Option<u32>,
    pub step: String,
    pub run: u32,
    pub host: String,
    pub ranks: u32,
    pub engine: Kind,
    pub engine_version: String,
    pub image: Option<String>,
    pub files: usize,
    pub bytes: u64,
}

impl Line {
    fn of(entry: &Entry, floor: u64) -> Line {
        let manifest = entry
            .generation
            .as_ref()
            .ok()
            .map(|generation| generation.manifest());
        Line {
            generation: entry.number,
            pinned: entry.pinned,
            bad: entry.bad.clone(),
            earlier: entry.number <= floor,
            damaged: entry
                .generation
                .as_ref()
                .err()
                .map(|fault| fault.reason().to_string()),
            manifest: manifest.map(|m| Short {
                created: m.created,
                trigger: m.trigger.to_string(),
                job: m.job,
                step: m.step.clone(),
                run: m.run,
                host: m.host.clone(),
                ranks: m.ranks,
                engine: m.engine,
                engine_version: m.engine_version.clone(),
                image: m.image.as_ref().map(|image| image.path.clone()),
                files: m.files.len(),
                bytes: m.bytes,
            }),
        }
    }
}

fn lines(cell: &Cell) -> Result<Vec<Line>, Failure> {
    let floor = cell.floor()?;
    Ok(cell
        .entries()?
        .iter()
        .map(|entry| Line::of(entry, floor))
        .collect())
}

fn summary(cell: &Cell) -> Result<Summary, Failure> {
    cell.check()?;
    let lines = lines(cell)?;
    let me = Holder::this_process(None, "command", 0)?;
    // Whether a holder on another node lives only Slurm knows, and a list asks nobody.
    let ended = cell.holder_has_ended(&me, &Unwitnessed)?;
    let holder = cell.holder()?.filter(|_| ended != Some(true));
    let completed = cell.completion()?;
    let good = |line: &&Line| line.bad.is_none() && line.damaged.is_none();
    let newest = lines.iter().rfind(|line| good(line) && !line.earlier);
    let any = newest.or(lines.iter().rfind(good));
    let manifest = any.and_then(|line| line.manifest.as_ref());
    let state = if holder.is_some() {
        "running"
    } else if completed.is_some() {
        "completed"
    } else if newest.is_some() {
        "waiting"
    } else {
        "empty"
    };
    Ok(Summary {
        name: cell.name().to_string(),
        step: cell.key().map(ToString::to_string),
        state,
        holder,
        completed,
        generations: lines.len(),
        good: lines.iter().filter(good).count(),
        newest: any.map(|line| line.generation),
        saved: manifest.map(|m| m.created),
        engine: manifest.map(|m| m.engine),
        image: manifest.and_then(|m| m.image.clone()),
        bytes: lines
            .iter()
            .filter_map(|l| l.manifest.as_ref())
            .map(|m| m.bytes)
            .sum(),
    })
}

/// The summaries of a store. A cell that cannot be looked at costs a warning, not the list; the
/// second value says whether there was one.
fn summaries(store: &Store) -> Result<(Vec<Summary>, bool), Failure> {
    let (mut found, mut trouble) = (Vec::new(), false);
    for name in store.names()? {
        let cell = store.name(&name);
        let cells = cell.steps().map(|steps| std::iter::once(cell).chain(steps));
        let cells: Vec<Cell> = match cells {
            Ok(cells) => cells.collect(),
            Err(error) => {
                log::warn!("{error}");
                trouble = true;
                continue;
            }
        };
        let steps = cells.len() > 1;
        for cell in cells {
            match summary(&cell) {
                // A job whose steps are saved saves nothing itself.
                Ok(summary) if steps && cell.key().is_none() && summary.generations == 0 => {
                    if summary.state == "running" {
                        found.push(summary);
                    }
                }
                Ok(summary) => found.push(summary),
                Err(error) => {
                    log::warn!("{error}");
                    trouble = true;
                }
            }
        }
    }
    Ok((found, trouble))
}

#[derive(Serialize)]
struct StoreDocument<'a> {
    format: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<&'a str>,
    store: String,
    names: &'a [Summary],
}

pub fn list(list: &List, context: &Context<'_>) -> Result<(), Failure> {
    if let Some(name) = &list.name {
        return list_name(name, &list.common, context);
    }
    let (names, trouble) = match existing(context)? {
        Some(store) => summaries(&store)?,
        None => (Vec::new(), false),
    };
    if list.common.json {
        let store = context.store.display().to_string();
        print_json(&StoreDocument {
            format: 1,
            user: None,
            store,
            names: &names,
        })?;
    } else if names.is_empty() {
        log::info!("no checkpoints in {}", context.store.display());
    } else {
        let rows: Vec<Vec<String>> = names.iter().map(|name| summary_row(None, name)).collect();
        print_summaries(&rows, false)?;
    }
    if trouble {
        Err(Failure::Code(super::FAILED))
    } else {
        Ok(())
    }
}

pub fn list_all_users(list: &List, context: &Context<'_>) -> Result<(), Failure> {
    let mut rows = Vec::new();
    let mut documents = Vec::new();
    let mut trouble = false;
    for found in users::stores(context.config)? {
        let names = users::as_owner(&found.dir, || match Store::existing(&found.dir)? {
            Some(store) => summaries(&store),
            None => Ok((Vec::new(), false)),
        });
        match names {
            Ok((names, some_trouble)) => {
                trouble |= some_trouble;
                rows.extend(
                    names
                        .iter()
                        .map(|name| summary_row(Some(&found.user), name)),
                );
                documents.push((found, names));
            }
            Err(failure) => {
                log::warn!("the store of {}: {failure}", found.user);
                trouble = true;
            }
        }
    }
    if list.common.json {
        #[derive(Serialize)]
        struct Document<'a> {
            format: u32,
            stores: Vec<StoreDocument<'a>>,
        }
        let stores = documents
            .iter()
            .map(|(found, names)| StoreDocument {
                format: 1,
                user: Some(&found.user),
                store: found.dir.display().to_string(),
                names,
            })
            .collect();
        print_json(&Document { format: 1, stores })?;
    } else if rows.is_empty() {
        log::info!("no user has checkpoints");
    } else {
        print_summaries(&rows, true)?;
    }
    if trouble {
        Err(Failure::Code(super::FAILED))
    } else {
        Ok(())
    }
}

/// The rows of cells, `users` with their owners.
fn print_summaries(rows: &[Vec<String>], users: bool) -> Result<(), Failure> {
    let columns = summary_columns(users);
    print(&table(&columns, rows, output::width(), unicode()))
}

fn summary_columns(users: bool) -> Vec<output::Column> {
    let mut columns = vec![
        left("NAME", 0),
        left("STATE", 0),
        right("NEWEST", 3),
        right("SAVED", 0),
        right("KEPT", 4),
        right("SIZE", 0),
        left("ENGINE", 5),
        left("IMAGE", 6),
    ];
    if users {
        columns.insert(0, left("USER", 0));
    }
    columns
}

fn summary_row(user: Option<&str>, name: &Summary) -> Vec<String> {
    let label = match &name.step {
        Some(step) => format!("{}/{step}", name.name),
        None => name.name.clone(),
    };
    let state = match (&name.holder, &name.completed) {
        (
            Some(Holder {
                job: Some(job),
                host,
                ..
            }),
            _,
        ) => format!("running: job {job}, {host}"),
        (Some(Holder { host, .. }), _) => format!("running: {host}"),
        (None, Some(completed)) => format!("completed, {}", end(completed.end)),
        _ => name.state.into(),
    };
    let bad = name.generations - name.good;
    let mut row = vec![
        label,
        state,
        name.newest
            .map(|number| format!("@{number}"))
            .unwrap_or_default(),
        name.saved
            .map(|saved| output::age(saved.age()))
            .unwrap_or_default(),
        if bad > 0 {
            format!("{} ({bad} bad)", name.generations)
        } else {
            name.generations.to_string()
        },
        bytes_for_people(name.bytes),
        name.engine
            .map(|engine| engine.to_string())
            .unwrap_or_default(),
        name.image.clone().unwrap_or_default(),
    ];
    if let Some(user) = user {
        row.insert(0, user.into());
    }
    row
}

fn end(end: End) -> String {
    match end {
        End::Exit(code) => format!("exit code {code}"),
        End::Signal(number) => match nix::sys::signal::Signal::try_from(number) {
            Ok(signal) => signal.to_string(),
            Err(_) => format!("signal {number}"),
        },
    }
}

#[derive(Serialize)]
struct CellDocument {
    #[serde(flatten)]
    summary: Summary,
    list: Vec<Line>,
    #[serde(skip_serializing_if = "Option::is_none")]
    history: Option<HistoryDocument>,
}

#[derive(Serialize)]
struct HistoryDocument {
    events: Vec<Event>,
    /// Older events that were left out, or lines that could not be read.
    incomplete: bool,
}

#[derive(Serialize)]
struct CellsDocument {
    format: u32,
    cells: Vec<CellDocument>,
}

fn list_name(name: &str, common: &Common, context: &Context<'_>) -> Result<(), Failure> {
    let target = Target::parse(name)?;
    let store = store_with(context, name)?;
    let mut cells = Vec::new();
    for cell in target.cells(&store)? {
        let mut list = lines(&cell)?;
        list.retain(|line| {
            target
                .generation
                .is_none_or(|number| number == line.generation)
        });
        cells.push(CellDocument {
            summary: summary(&cell)?,
            list,
            history: None,
        });
    }
    if let (Some(number), [cell]) = (target.generation, cells.as_slice())
        && cell.list.is_empty()
    {
        let label = format!("generation {number} of {}", target.cell(&store)?.label());
        return Err(crate::store::Error::Absent(label).into());
    }
    if common.json {
        return print_json(&CellsDocument { format: 1, cells });
    }
    let columns = [
        left("GENERATION", 0),
        left("SAVED", 0),
        left("TRIGGER", 2),
        left("JOB", 3),
        left("HOST", 4),
        right("RANKS", 6),
        left("ENGINE", 5),
        right("SIZE", 0),
        left("", 1),
    ];
    let mut rows = Vec::new();
    for cell in &cells {
        let newest = cell.summary.newest;
        rows.extend(
            cell.list
                .iter()
                .map(|line| generation_row(&cell.summary, line, newest)),
        );
    }
    if rows.is_empty() {
        log::info!("{} has no generations", clean(name));
        return Ok(());
    }
    print(&table(&columns, &rows, output::width(), unicode()))
}

fn generation_row(cell: &Summary, line: &Line, newest: Option<u64>) -> Vec<String> {
    let label = match &cell.step {
        Some(step) => format!("{}/{step}@{}", cell.name, line.generation),
        None => format!("{}@{}", cell.name, line.generation),
    };
    let mut notes = Vec::new();
    if newest == Some(line.generation) {
        notes.push("newest".to_string());
    }
    if line.earlier {
        notes.push(match cell.completed {
            Some(_) => "completed".into(),
            None => "earlier computation".into(),
        });
    }
    if line.pinned {
        notes.push("pinned".into());
    }
    match (&line.bad, &line.damaged) {
        (Some(bad), _) => notes.push(format!("bad: {}", bad.reason)),
        (None, Some(why)) => notes.push(format!("bad: {why}")),
        (None, None) => {}
    }
    let notes = notes.join(", ");
    match &line.manifest {
        None => {
            let mut row = vec![label];
            row.resize(8, String::new());
            row.push(notes);
            row
        }
        Some(m) => vec![
            label,
            output::time(m.created),
            m.trigger.clone(),
            m.job
                .map(|job| format!("{job}.{} run {}", m.step, m.run))
                .unwrap_or_default(),
            m.host.clone(),
            m.ranks.to_string(),
            format!("{} {}", m.engine, m.engine_version),
            bytes_for_people(m.bytes),
            notes,
        ],
    }
}

pub fn show(show: &Show, context: &Context<'_>) -> Result<(), Failure> {
    let target = Target::parse(&show.name)?;
    let store = store_with(context, &show.name)?;
    if target.generation.is_some() {
        return show_generation(&target, &store, &show.common);
    }
    let cells = target.cells(&store)?;
    let mut documents = Vec::new();
    let mut text = String::new();
    for cell in &cells {
        let history = cell.history()?;
        let (summary, list) = (summary(cell)?, lines(cell)?);
        if cells.len() > 1 && history.events.is_empty() && list.is_empty() {
            continue;
        }
        if show.common.json {
            let History {
                events,
                skipped,
                cut,
            } = history;
            let history = Some(HistoryDocument {
                events,
                incomplete: skipped > 0 || cut,
            });
            documents.push(CellDocument {
                summary,
                list,
                history,
            });
        } else {
            if !text.is_empty() {
                text.push('\n');
            }
            text.push_str(&story(&summary, &list, &history, show.events));
        }
    }
    if show.common.json {
        print_json(&CellsDocument {
            format: 1,
            cells: documents,
        })
    } else {
        print(&text)
    }
}

/// All that is told of a cell: in short, its runs as bars, its checkpoints as bars, its events.
fn story(summary: &Summary, list: &[Line], history: &History, most: usize) -> String {
    let (width, unicode) = (drawing_width(), unicode());
    let row = summary_row(None, summary);
    let mut text = format!("{}: {}", row[0], row[1]);
    if let (Some(number), Some(saved)) = (summary.newest, summary.saved) {
        let _ = write!(
            text,
            "; generation {number} was saved {} ago; {} in {} generation{}",
            output::age(saved.age()),
            bytes_for_people(summary.bytes),
            summary.generations,
            if summary.generations == 1 { "" } else { "s" }
        );
    }
    text.push('\n');
    let runs = runs(&history.events, summary.holder.as_ref());
    if !runs.is_empty() {
        text.push_str("\nRuns\n");
        text.push_str(&draw_runs(&runs, width, unicode));
    }
    let checkpoints = draw_checkpoints(&history.events, list, width, unicode);
    if !checkpoints.is_empty() {
        text.push_str("\nCheckpoints\n");
        text.push_str(&checkpoints);
    }
    if !history.events.is_empty() {
        text.push_str("\nEvents (UTC)\n");
        let left_out = history.events.len().saturating_sub(most);
        if left_out > 0 || history.cut {
            let _ = writeln!(text, "  … {left_out} earlier ones: --events N shows more");
        }
        for event in &history.events[left_out..] {
            let who = match event.job {
                Some(job) => format!("job {job} run {} on {}", event.run, event.host),
                None => format!("on {}", event.host),
            };
            let line = format!(
                "  {}  {:<24} {}",
                output::time(event.time),
                who,
                tell(&event.what)
            );
            let _ = writeln!(text, "{}", clean(&line));
        }
    }
    if history.skipped > 0 {
        let _ = writeln!(
            text,
            "  {} lines of the history could not be read",
            history.skipped
        );
    }
    text
}

/// One run of a job on the time axis.
#[derive(Debug, PartialEq)]
struct Run {
    label: String,
    start: u64,
    end: u64,
    /// What happened when: a sign for each.
    marks: Vec<(u64, Mark)>,
    ending: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    Saved,
    Failed,
}

/// The runs in a history. One that still goes on ends now.
fn runs(events: &[Event], holder: Option<&Holder>) -> Vec<Run> {
    let mut runs: Vec<((Option<u32>, u32), Run)> = Vec::new();
    for event in events {
        // People's commands write events as well.
        let starts = matches!(
            event.what,
            What::Started { .. } | What::Restarted { .. } | What::RestartFailed { .. }
        );
        let key = (event.job, event.run);
        // Outside of Slurm every start is a run of its own.
        let known = runs
            .iter_mut()
            .rev()
            .find(|(k, _)| *k == key)
            .filter(|_| !(starts && event.job.is_none()));
        let now = event.time.millis();
        let run = match known {
            Some((_, run)) => run,
            None if !starts => continue,
            None => {
                let label = match event.job {
                    Some(job) => format!("job {job} run {} on {}", event.run, event.host),
                    None => format!("on {}", event.host),
                };
                runs.push((
                    key,
                    Run {
                        label,
                        start: now,
                        end: now,
                        marks: vec![],
                        ending: String::new(),
                    },
                ));
                match runs.last_mut() {
                    Some((_, run)) => run,
                    None => continue,
                }
            }
        };
        run.end = run.end.max(now);
        match &event.what {
            What::Checkpointed { .. } => run.marks.push((now, Mark::Saved)),
            What::CheckpointFailed { .. } | What::CheckpointRefused { .. } => {
                run.marks.push((now, Mark::Failed));
            }
            What::RestartFailed { .. } => run.ending = "restart failed".into(),
            What::Requeued { reason } => run.ending = format!("requeued: {reason}"),
            What::Ended { end: e } if run.ending.is_empty() => run.ending = end(*e),
            What::Completed { end: e } => run.ending = format!("completed, {}", end(*e)),
            What::Started { .. } | What::Restarted { .. } => run.ending.clear(),
            _ => {}
        }
    }
    if let Some(holder) = holder
        && let Some((_, run)) = runs
            .iter_mut()
            .rev()
            .find(|(key, _)| *key == (holder.job, holder.run))
    {
        run.end = run.end.max(Time::now().millis());
        run.ending = "running".into();
    }
    runs.into_iter().map(|(_, run)| run).collect()
}

/// Most runs that are drawn.
const RUNS_MAX: usize = 30;

fn draw_runs(runs: &[Run], width: usize, unicode: bool) -> String {
    let left_out = runs.len().saturating_sub(RUNS_MAX);
    let runs = &runs[left_out..];
    let start = runs.iter().map(|run| run.start).min().unwrap_or(0);
    let end = runs
        .iter()
        .map(|run| run.end)
        .max()
        .unwrap_or(0)
        .max(start + 1);
    let labels = runs
        .iter()
        .map(|run| run.label.chars().count())
        .max()
        .unwrap_or(0)
        .min(32);
    let endings = runs
        .iter()
        .map(|run| run.ending.chars().count())
        .max()
        .unwrap_or(0)
        .min(24);
    let room = width.saturating_sub(labels + endings + 16).max(10);
    let (full, saved, failed) = if unicode {
        ('█', '◆', '✗')
    } else {
        ('=', 'o', 'x')
    };
    let column = |at: u64| {
        let share = (at - start) as f64 / (end - start) as f64;
        ((share * room as f64) as usize).min(room - 1)
    };
    let mut text = String::new();
    if left_out > 0 {
        let _ = writeln!(text, "  … {left_out} earlier ones");
    }
    for run in runs {
        let mut line = vec![' '; room];
        for cell in &mut line[column(run.start)..=column(run.end)] {
            *cell = full;
        }
        for (at, mark) in &run.marks {
            let sign = match mark {
                Mark::Saved => saved,
                Mark::Failed => failed,
            };
            line[column(*at)] = sign;
        }
        let line: String = line.into_iter().collect();
        let label = cut(&clean(&run.label), labels, unicode);
        let ending = cut(&clean(&run.ending), endings, unicode);
        let took = duration(run.end - run.start);
        let whole = format!("  {label:<labels$} |{line}| {took:>7}  {ending}");
        let _ = writeln!(text, "{}", whole.trim_end());
    }
    let _ = writeln!(
        text,
        "  {saved} checkpoint  {failed} none came of it\n  from {} to {} UTC",
        output::time(Time::from_millis(start)),
        output::time(Time::from_millis(end))
    );
    text
}

/// Most checkpoints that are drawn.
const CHECKPOINTS_MAX: usize = 20;

fn draw_checkpoints(events: &[Event], list: &[Line], width: usize, unicode: bool) -> String {
    let mut all: Vec<(u64, u64, u64, String)> = events
        .iter()
        .filter_map(|event| match &event.what {
            What::Checkpointed {
                trigger,
                generation,
                bytes,
                took,
            } => Some((*generation, *bytes, *took, trigger.to_string())),
            _ => None,
        })
        .collect();
    all.drain(..all.len().saturating_sub(CHECKPOINTS_MAX));
    let most = all.iter().map(|(_, bytes, ..)| *bytes).max().unwrap_or(0);
    let room = width.saturating_sub(62).clamp(10, 60);
    let mut text = String::new();
    for (number, bytes, took, trigger) in all {
        let line = list.iter().find(|line| line.generation == number);
        let now = match line {
            None => "deleted",
            Some(
                Line { bad: Some(_), .. }
                | Line {
                    damaged: Some(_), ..
                },
            ) => "bad",
            Some(Line { pinned: true, .. }) => "pinned",
            Some(_) => "",
        };
        let bar = bar(bytes, most, room, unicode);
        let whole = format!(
            "  {:>6}  {bar:<room$} {:>9} in {:>7}  {trigger:<12} {now}",
            format!("@{number}"),
            bytes_for_people(bytes),
            duration(took)
        );
        let _ = writeln!(text, "{}", whole.trim_end());
    }
    text
}

/// An event in words.
fn tell(what: &What) -> String {
    match what {
        What::Started { engine } => format!("started under {engine}"),
        What::Restarted {
            engine,
            generation,
            took,
        } => {
            format!(
                "went on from generation {generation} under {engine}, after {}",
                duration(*took)
            )
        }
        What::RestartFailed { generation, reason } => {
            format!("could not go on from generation {generation}: {reason}")
        }
        What::Triggered { trigger } => format!("{trigger}: checkpoint begun"),
        What::Checkpointed {
            trigger,
            generation,
            bytes,
            took,
        } => format!(
            "{trigger}: generation {generation} committed, {} in {}",
            bytes_for_people(*bytes),
            duration(*took)
        ),
        What::CheckpointFailed {
            trigger,
            reason,
            lost,
        } => format!(
            "{trigger}: checkpoint failed{}: {reason}",
            if *lost {
                ", the application was lost"
            } else {
                ""
            }
        ),
        What::CheckpointRefused { trigger, reason } => {
            format!("{trigger}: no checkpoint tried: {reason}")
        }
        What::Requeued { reason } => format!("requeued: {reason}"),
        What::Ended { end: e } => format!("ended: {}", end(*e)),
        What::Completed { end: e } => format!("completed: {}", end(*e)),
        What::MarkedBad { generation, reason } => {
            format!("generation {generation} marked bad: {reason}")
        }
        What::Deleted { generation, reason } => {
            format!("generation {generation} deleted: {reason}")
        }
        What::Imported { generation, from } => format!("generation {generation} came from {from}"),
        What::LockStolen { from } => format!("lock taken with --steal-lock from {from}"),
        What::Note { text } => text.clone(),
    }
}

fn show_generation(target: &Target, store: &Store, common: &Common) -> Result<(), Failure> {
    let cell = target.cell(store)?;
    let entry = entry(&cell, target.generation)?;
    let (number, pinned, bad) = (entry.number, entry.pinned, entry.bad.clone());
    let earlier = number <= cell.floor()?;
    let generation = super::readable(&cell, entry)?;
    if common.json {
        #[derive(Serialize)]
        struct Document<'a> {
            format: u32,
            path: String,
            pinned: bool,
            bad: Option<Bad>,
            earlier: bool,
            manifest: &'a Manifest,
        }
        return print_json(&Document {
            format: 1,
            path: generation.dir().display().to_string(),
            pinned,
            bad,
            earlier,
            manifest: generation.manifest(),
        });
    }
    let mut text = describe(generation.manifest(), generation.dir());
    if pinned {
        text.push_str("Pinned       yes\n");
    }
    if earlier {
        text.push_str("Belongs to   an earlier computation of this name\n");
    }
    if let Some(bad) = bad {
        let _ = writeln!(
            text,
            "Bad          {} ({} UTC)",
            clean(&bad.reason),
            output::time(bad.time)
        );
    }
    text.push('\n');
    let most = generation
        .manifest()
        .files
        .iter()
        .map(|f| f.size)
        .max()
        .unwrap_or(0);
    let columns = [
        left("FILE", 0),
        right("SIZE", 0),
        left("", 1),
        left("BLAKE3", 2),
    ];
    let rows: Vec<Vec<String>> = generation
        .manifest()
        .files
        .iter()
        .map(|file| {
            vec![
                file.path.clone(),
                bytes_for_people(file.size),
                bar(file.size, most, 20, unicode()),
                file.blake3[..16].to_string(),
            ]
        })
        .collect();
    text.push_str(&table(&columns, &rows, output::width(), unicode()));
    print(&text)
}

fn describe(m: &Manifest, dir: &Path) -> String {
    let mut lines = vec![
        ("Generation", format!("{} of {}", m.generation, m.name)),
        ("Path", dir.display().to_string()),
        (
            "Saved",
            format!(
                "{} UTC, {} ago",
                output::time(m.created),
                output::age(m.created.age())
            ),
        ),
        ("Trigger", m.trigger.to_string()),
        (
            "Job",
            match m.job {
                Some(job) => format!("{job}, step {}, run {}, on {}", m.step, m.run, m.host),
                None => format!("none, on {}", m.host),
            },
        ),
        ("Engine", format!("{} {}", m.engine, m.engine_version)),
        ("Kernel", m.kernel.clone()),
        ("Processor", m.cpu_flags.join(" ")),
    ];
    if let Some(image) = &m.image {
        lines.push(("Image", image.path.clone()));
        lines.push(("", image.digest.clone()));
    }
    lines.push(("Command", m.command.join(" ")));
    lines.push((
        "Size",
        format!(
            "{} in {} files, {} rank(s)",
            bytes_for_people(m.bytes),
            m.files.len(),
            m.ranks
        ),
    ));
    let took: Vec<String> = m
        .durations
        .phases()
        .iter()
        .map(|(phase, ms)| format!("{phase} {}", duration(*ms)))
        .collect();
    lines.push(("Took", took.join(", ")));
    if let Some(predecessor) = m.predecessor {
        lines.push(("After", format!("generation {predecessor}")));
    }
    for file in &m.truncate {
        lines.push((
            "Open file",
            format!("{} ({})", file.path, bytes_for_people(file.size)),
        ));
    }
    let mut text = String::new();
    for (title, value) in lines {
        let _ = writeln!(text, "{title:<12} {}", clean(&value));
    }
    text
}
