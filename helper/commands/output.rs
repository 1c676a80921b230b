//! What people see: tables, bars, sizes, times, progress; and JSON.
//!
//! Contract: a table fits the terminal; what is written into a file or a pipe is never cut. Text
//! from files is shown without control characters.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::Failure;
use crate::store::{Time, bytes_for_people};
use crate::sys;

/// Columns to write in: those of the terminal, or as many as it takes.
pub fn width() -> usize {
    let out = io::stdout();
    if !out.is_terminal() {
        return usize::MAX;
    }
    sys::terminal_width(&out).unwrap_or(80).max(20)
}

/// Columns for a drawing, which has to end somewhere.
pub fn drawing_width() -> usize {
    match width() {
        usize::MAX => 100,
        width => width.min(160),
    }
}

/// Whether the locale has more than ASCII.
pub fn unicode() -> bool {
    ["LC_ALL", "LC_CTYPE", "LANG"]
        .iter()
        .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
        .is_some_and(|locale| {
            let locale = locale.to_ascii_lowercase();
            locale.contains("utf-8") || locale.contains("utf8")
        })
}

/// Without control characters, which could do anything to a terminal.
pub fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

/// Writes text to standard output. That nobody reads it any more is no failure.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::Other(format!(
            "could not write to standard output: {error}"
        ))),
        _ => Ok(()),
    }
}

pub fn print_json(document: &impl Serialize) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(document)
        .map_err(|error| Failure::Other(format!("could not write JSON: {error}")))?;
    text.push('\n');
    print(&text)
}

/// `2026-11-26 07:31:05`, UTC.
pub fn time(time: Time) -> String {
    time.to_string()[..19].replace('T', " ")
}

/// `5 s`, `12 min`, `3 h`, `2 d`, for ages.
pub fn age(age: Duration) -> String {
    match age.as_secs() {
        s if s < 60 => format!("{s} s"),
        s if s < 3600 => format!("{} min", s / 60),
        s if s < 2 * 86400 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86400),
    }
}

/// `812 ms`, `3.4 s`, `2m05s`, `1h02m`, `3d04h`.
pub fn duration(millis: u64) -> String {
    let seconds = millis / 1000;
    match seconds {
        0 => format!("{millis} ms"),
        s if s < 60 => format!("{}.{} s", s, millis % 1000 / 100),
        s if s < 3600 => format!("{}m{:02}s", s / 60, s % 60),
        s if s < 86400 => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
        s => format!("{}d{:02}h", s / 86400, s % 86400 / 3600),
    }
}

/// A column of a table.
pub struct Column {
    pub title: &'static str,
    pub right: bool,
    /// Which columns go first where there is no room; those with 0 never.
    pub expendable: u8,
}

pub const fn left(title: &'static str, expendable: u8) -> Column {
    Column {
        title,
        right: false,
        expendable,
    }
}

pub const fn right(title: &'static str, expendable: u8) -> Column {
    Column {
        title,
        right: true,
        expendable,
    }
}

/// The least a column is cut to.
const LEAST: usize = 6;

/// Lays out rows below titles within `width` columns: first whole columns go, then the widest
/// left-aligned ones are cut.
pub fn table(columns: &[Column], rows: &[Vec<String>], width: usize, unicode: bool) -> String {
    let count = |text: &str| text.chars().count();
    let mut widths: Vec<usize> = columns
        .iter()
        .enumerate()
        .map(|(at, column)| {
            let cells = rows
                .iter()
                .filter_map(|row| row.get(at))
                .map(|cell| count(cell));
            cells.max().unwrap_or(0).max(count(column.title))
        })
        .collect();
    let mut shown: Vec<usize> = (0..columns.len()).collect();
    let total = |shown: &[usize], widths: &[usize]| {
        shown
            .iter()
            .map(|at| widths[*at] + 2)
            .sum::<usize>()
            .saturating_sub(2)
    };
    while total(&shown, &widths) > width {
        let candidate = shown
            .iter()
            .copied()
            .max_by_key(|at| columns[*at].expendable);
        match candidate.filter(|at| columns[*at].expendable > 0) {
            Some(gone) => shown.retain(|at| *at != gone),
            None => break,
        }
    }
    while total(&shown, &widths) > width {
        let widest = shown
            .iter()
            .copied()
            .filter(|at| !columns[*at].right && widths[*at] > LEAST)
            .max_by_key(|at| widths[*at]);
        match widest {
            Some(at) => widths[at] -= 1,
            None => break,
        }
    }
    let line = |cell: &dyn Fn(usize) -> String| {
        let mut line = String::new();
        for at in &shown {
            let text = cut(&cell(*at), widths[*at], unicode);
            let space = " ".repeat(widths[*at] - count(&text));
            if !line.is_empty() || *at != shown[0] {
                line.push_str("  ");
            }
            if columns[*at].right {
                line.push_str(&space);
                line.push_str(&text);
            } else {
                line.push_str(&text);
                line.push_str(&space);
            }
        }
        line.truncate(line.trim_end().len());
        line.push('\n');
        line
    };
    let mut text = line(&|at| columns[at].title.to_string());
    for row in rows {
        text.push_str(&line(&|at| {
            row.get(at).map(|cell| clean(cell)).unwrap_or_default()
        }));
    }
    text
}

/// At most `width` characters, with a sign where something is missing.
pub fn cut(text: &str, width: usize, unicode: bool) -> String {
    if text.chars().count() <= width {
        return text.into();
    }
    let mut short: String = text.chars().take(width.saturating_sub(1)).collect();
    short.push(if unicode { '…' } else { '~' });
    short
}

/// A bar for `value` of `most`, in `width` columns; something, unless it is nothing.
pub fn bar(value: u64, most: u64, width: usize, unicode: bool) -> String {
    if value == 0 || most == 0 || width == 0 {
        return String::new();
    }
    let eighths = (value as f64 / most as f64 * width as f64 * 8.0).round() as usize;
    let eighths = eighths.clamp(1, width * 8);
    if !unicode {
        return "#".repeat(eighths.div_ceil(8));
    }
    let mut bar = "█".repeat(eighths / 8);
    if let Some(part) = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"].get(eighths % 8) {
        bar.push_str(part);
    }
    bar
}

/// Shows how far long work has come, on standard error if that is a terminal.
pub struct Progress {
    label: Mutex<String>,
    total: AtomicU64,
    done: AtomicU64,
    shown: Mutex<Instant>,
    start: Instant,
    terminal: bool,
}

/// How often it is drawn, and how long work may be before anything is.
const DRAW_EVERY: Duration = Duration::from_millis(100);

impl Progress {
    pub fn new(label: &str, total: u64) -> Progress {
        Progress {
            label: Mutex::new(label.into()),
            total: AtomicU64::new(total),
            done: AtomicU64::new(0),
            shown: Mutex::new(Instant::now()),
            start: Instant::now(),
            terminal: io::stderr().is_terminal(),
        }
    }

    /// Sets how much there is, once it is known.
    pub fn set_total(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    /// Goes on with other work under the same bar.
    pub fn set_label(&self, label: &str) {
        *self.label.lock().unwrap_or_else(PoisonError::into_inner) = label.into();
    }

    /// Tells of `bytes` more.
    pub fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if !self.terminal {
            return;
        }
        // Who draws, draws for all threads; nobody waits for it.
        let Ok(mut shown) = self.shown.try_lock() else {
            return;
        };
        if shown.elapsed() < DRAW_EVERY {
            return;
        }
        *shown = Instant::now();
        let label = self
            .label
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let total = self.total.load(Ordering::Relaxed);
        let width = sys::terminal_width(&io::stderr()).unwrap_or(80);
        let line = progress_line(&label, done, total, self.start.elapsed(), width, unicode());
        // A terminal that went away is no reason to stop working.
        let _ = write!(io::stderr().lock(), "\r{line}\x1b[K");
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.terminal {
            let _ = write!(io::stderr().lock(), "\r\x1b[K");
        }
    }
}

fn progress_line(
    label: &str,
    done: u64,
    total: u64,
    elapsed: Duration,
    width: usize,
    unicode: bool,
) -> String {
    let rate = (done as f64 / elapsed.as_secs_f64().max(0.001)) as u64;
    let percent = (done.min(total) * 100).checked_div(total).unwrap_or(0);
    let numbers = format!(
        " {percent:3} % of {}, {}/s",
        bytes_for_people(total.max(done)),
        bytes_for_people(rate)
    );
    let room = width.saturating_sub(numbers.len() + 1);
    let label = cut(&clean(label), room.min(32), unicode);
    let space = room.saturating_sub(label.chars().count() + 3).min(30);
    if space < 5 {
        return cut(&format!("{label}{numbers}"), width, unicode);
    }
    let bar = bar(done.min(total), total, space, unicode);
    let rest = " ".repeat(space - bar.chars().count());
    format!("{label} |{bar}{rest}|{numbers}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const COLUMNS: [Column; 4] = [
        left("NAME", 0),
        left("IMAGE", 2),
        right("SIZE", 0),
        left("HOST", 1),
    ];

    fn rows() -> Vec<Vec<String>> {
        [
            ["heat", "/a/rather/long/path/to/app.sif", "1.2 GB", "n1"],
            ["x", "y", "3 B", "n\u{1b}[2J"],
        ]
        .map(|row| row.map(String::from).to_vec())
        .to_vec()
    }

    #[test]
    fn a_table_with_room() {
        assert_eq!(
            table(&COLUMNS, &rows(), usize::MAX, true),
            "NAME  IMAGE                             SIZE  HOST\n\
             heat  /a/rather/long/path/to/app.sif  1.2 GB  n1\n\
             x     y                                  3 B  n?[2J\n"
        );
    }

    #[test]
    fn a_table_without() {
        assert_eq!(
            table(&COLUMNS, &rows(), 22, true),
            "NAME    SIZE  HOST\nheat  1.2 GB  n1\nx        3 B  n?[2J\n"
        );
        let columns = [left("NAME", 0), right("SIZE", 0)];
        let rows = [vec!["a-long-name-indeed".to_string(), "1 B".to_string()]];
        assert_eq!(
            table(&columns, &rows, 14, false),
            "NAME      SIZE\na-long-~   1 B\n"
        );
    }

    #[test]
    fn words_for_numbers() {
        assert_eq!(duration(812), "812 ms");
        assert_eq!(duration(3449), "3.4 s");
        assert_eq!(duration(125_000), "2m05s");
        assert_eq!(duration(3_720_000), "1h02m");
        assert_eq!(duration(273_600_000), "3d04h");
        assert_eq!(age(Duration::from_secs(7199)), "1 h");
        assert_eq!(bytes_for_people(999), "999 B");
        assert_eq!(bytes_for_people(999_949), "999.9 kB");
        assert_eq!(bytes_for_people(999_951), "1.0 MB");
        assert_eq!(bytes_for_people(u64::MAX), "18.4 EB");
        assert_eq!(bar(1, 2, 4, true), "██");
        assert_eq!(bar(1, 1000, 4, true), "▏");
        assert_eq!(bar(0, 5, 4, true), "");
    }

    proptest! {
        #[test]
        fn a_table_fits(cells in prop::collection::vec(prop::array::uniform4("[a-z/]{0,40}"), 0..5),
                        width in 32usize..200) {
            let rows: Vec<Vec<String>> = cells.into_iter().map(|row| row.to_vec()).collect();
            // A column whose values must not be cut can be too wide for any terminal.
            let columns = [left("A", 0), left("B", 1), left("C", 2), left("D", 0)];
            for line in table(&columns, &rows, width, true).lines() {
                prop_assert!(line.chars().count() <= width);
            }
        }

        #[test]
        fn a_bar_fits(value: u64, most: u64, width in 0usize..50) {
            prop_assert!(bar(value.min(most), most, width, true).chars().count() <= width);
            prop_assert!(bar(value.min(most), most, width, false).len() <= width);
        }

        #[test]
        fn a_progress_line_fits(label in "\\PC{0,50}", done: u64, total: u64, width in 1usize..150) {
            let elapsed = Duration::from_secs(1);
            let (done, total) = (done >> 10, total >> 10);
            let line = progress_line(&label, done, total, elapsed, width, true);
            prop_assert!(line.chars().count() <= width, "{line}");
        }
    }
}
