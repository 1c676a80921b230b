//! The job's comment tells of its newest checkpoint (config `comment`).
//!
//! Contract: [`Comment::saved`] returns at once; a thread of its own asks Slurm, at most once a minute,
//! and writes what is newest then. What is still to be written when this is dropped, which is at the
//! end of the run, is written without waiting for the minute. A comment that the user has set stays.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use super::watch::size;
use crate::slurm::{self, Job};

const PAUSE: Duration = Duration::from_secs(60);

/// Dropping it ends the thread.
pub struct Comment(Option<(Sender<String>, JoinHandle<()>)>);

impl Comment {
    /// Does nothing outside of a job, or where it is not wanted.
    pub fn of(job: Option<&Job>, wanted: bool) -> Comment {
        let Some(job) = job.filter(|_| wanted).cloned() else {
            return Comment(None);
        };
        let (sender, texts) = channel();
        let thread = std::thread::Builder::new()
            .name("comment".into())
            .spawn(move || work(&texts, PAUSE, |text| write(&job, text)));
        match thread {
            Ok(thread) => Comment(Some((sender, thread))),
            Err(why) => {
                log::warn!("the job's comment is not kept up to date: {why}");
                Comment(None)
            }
        }
    }

    /// A generation of `title` has been committed.
    pub fn saved(&self, title: &str, generation: u64, bytes: u64, took: Duration) {
        if let Some((sender, _)) = &self.0 {
            // The thread lives as long as its sender.
            let _ = sender.send(text(title, generation, bytes, took, SystemTime::now()));
        }
    }
}

impl Comment {
    /// Returns once nothing more will be written.
    pub fn finish(&mut self) {
        if let Some((sender, thread)) = self.0.take() {
            drop(sender);
            if thread.join().is_err() {
                log::warn!("the job's comment may not be up to date");
            }
        }
    }
}

impl Drop for Comment {
    fn drop(&mut self) {
        self.finish();
    }
}

/// True at any time, unlike an age.
fn text(title: &str, generation: u64, bytes: u64, took: Duration, now: SystemTime) -> String {
    let at = slurm::time_text(now).map_or(String::new(), |time| format!(" at {time}"));
    format!(
        "{}{generation} of {title}{at}, {} in {:.1} s",
        slurm::CHECKPOINT,
        size(bytes),
        took.as_secs_f64()
    )
}

/// Writes what comes, the newest only and not more often than each `pause`, until nothing more can
/// come.
fn work(texts: &Receiver<String>, pause: Duration, write: impl Fn(&str)) {
    let mut newest: Option<String> = None;
    let mut next = Instant::now();
    loop {
        let heard = match &newest {
            Some(_) => texts.recv_timeout(next.saturating_duration_since(Instant::now())),
            None => texts.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match heard {
            Ok(text) => newest = Some(text),
            Err(why) => {
                if let Some(text) = newest.take() {
                    write(&text);
                    next = Instant::now() + pause;
                }
                if why == RecvTimeoutError::Disconnected {
                    return;
                }
            }
        }
    }
}

fn write(job: &Job, text: &str) {
    let written = slurm::comment(&job.target).and_then(|comment| {
        if slurm::is_ours(&comment) {
            slurm::set_comment(&job.target, text)
        } else {
            log::debug!("job {} has a comment of its user's, which stays", job.id);
            Ok(())
        }
    });
    if let Err(why) = written {
        log::warn!("the job's comment is not up to date: {why}");
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn the_newest_is_written_at_the_end() {
        let (sender, texts) = channel();
        let written = RefCell::new(Vec::new());
        for text in ["one", "two", "three"] {
            sender.send(text.to_owned()).unwrap();
        }
        drop(sender);
        work(&texts, Duration::from_secs(3600), |text| {
            written.borrow_mut().push(text.to_owned());
        });
        assert_eq!(written.into_inner(), ["three"]);
    }

    #[test]
    fn between_two_is_a_pause() {
        let (sender, texts) = channel();
        let (done, seen) = channel();
        let pause = Duration::from_millis(300);
        let thread = std::thread::spawn(move || {
            work(&texts, pause, |text| {
                done.send((Instant::now(), text.to_owned())).unwrap();
            });
        });
        sender.send("one".into()).unwrap();
        let (first, text) = seen.recv().unwrap();
        assert_eq!(text, "one");
        sender.send("two".into()).unwrap();
        sender.send("three".into()).unwrap();
        let (second, text) = seen.recv().unwrap();
        assert_eq!(text, "three");
        assert!(second - first >= pause);
        drop(sender);
        thread.join().unwrap();
    }

    #[test]
    fn the_text_says_what_and_when() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let text = text("heat", 7, 1_200_000_000, Duration::from_millis(3040), now);
        let time = slurm::time_text(now).unwrap();
        assert_eq!(
            text,
            format!("checkpoint generation 7 of heat at {time}, 1.2 GB in 3.0 s")
        );
        assert!(slurm::is_ours(&text));
    }
}
