//! What application and helper say to each other: one line asks, one line answers.
//!
//! `docs/inside.md` describes the lines for people. Both ends of the socket use this file.

use std::fmt;
use std::str::FromStr;

/// Longest line, in bytes, without its end.
pub const LINE_MAX: usize = 256;

/// What an application may ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// A checkpoint, now.
    Save,
    /// What became of an earlier [`Request::Save`], by its ticket.
    Result(u64),
    TimeLeft,
    /// No checkpoint for this many seconds, or for as long as the site allows.
    Hold(Option<u64>),
    /// The end of a hold, by its number, or of the one that would end first.
    Release(Option<u32>),
    Status,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Ok(String),
    /// Not now; asking again is of use.
    Busy(String),
    /// Asking again is of no use.
    Error(String),
}

/// What became of a checkpoint that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Waiting,
    /// Committed as this generation; the application runs on.
    Saved(u64),
    /// Whoever asks has been restarted from this generation.
    Restarted(u64),
    /// There is no new generation; the application runs on.
    Failed(String),
}

impl FromStr for Request {
    type Err = String;

    fn from_str(line: &str) -> Result<Request, String> {
        let mut words = line.split_ascii_whitespace();
        let (Some(word), argument) = (words.next(), words.next()) else {
            return Err("an empty line".into());
        };
        let request = match (word, argument) {
            ("save", None) => Request::Save,
            ("result", Some(ticket)) => Request::Result(number(ticket)?),
            ("time-left", None) => Request::TimeLeft,
            ("hold", seconds) => Request::Hold(seconds.map(number).transpose()?),
            ("release", which) => Request::Release(which.map(number).transpose()?),
            ("status", None) => Request::Status,
            _ => return Err(unknown(line)),
        };
        match words.next() {
            None => Ok(request),
            Some(_) => Err(unknown(line)),
        }
    }
}

fn unknown(line: &str) -> String {
    format!(
        "`{}` is none of save, result TICKET, time-left, hold [SECONDS], release [NUMBER], status",
        line.escape_debug()
    )
}

fn number<T: FromStr>(word: &str) -> Result<T, String> {
    match word.bytes().all(|byte| byte.is_ascii_digit()) {
        true => word.parse().map_err(|_| format!("{word} is too large")),
        false => Err(format!("`{}` is no whole number", word.escape_debug())),
    }
}

impl fmt::Display for Request {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Request::Save => out.write_str("save"),
            Request::Result(ticket) => write!(out, "result {ticket}"),
            Request::TimeLeft => out.write_str("time-left"),
            Request::Hold(None) => out.write_str("hold"),
            Request::Hold(Some(seconds)) => write!(out, "hold {seconds}"),
            Request::Release(None) => out.write_str("release"),
            Request::Release(Some(which)) => write!(out, "release {which}"),
            Request::Status => out.write_str("status"),
        }
    }
}

impl FromStr for Reply {
    type Err = String;

    fn from_str(line: &str) -> Result<Reply, String> {
        let (word, text) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "ok" => Ok(Reply::Ok(text.into())),
            "busy" => Ok(Reply::Busy(text.into())),
            "error" => Ok(Reply::Error(text.into())),
            _ => Err(format!(
                "the helper's answer makes no sense: {}",
                line.escape_debug()
            )),
        }
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, text) = match self {
            Reply::Ok(text) => ("ok", text),
            Reply::Busy(text) => ("busy", text),
            Reply::Error(text) => ("error", text),
        };
        // A reason may come from anywhere, an engine's log for example.
        let line: String = format!("{word} {text}")
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        out.write_str(line.trim_end())
    }
}

impl FromStr for Outcome {
    type Err = String;

    fn from_str(text: &str) -> Result<Outcome, String> {
        match text.split_once(' ').unwrap_or((text, "")) {
            ("waiting", "") => Ok(Outcome::Waiting),
            ("saved", generation) => Ok(Outcome::Saved(number(generation)?)),
            ("restarted", generation) => Ok(Outcome::Restarted(number(generation)?)),
            ("failed", why) => Ok(Outcome::Failed(why.into())),
            _ => Err(format!(
                "the helper's answer makes no sense: {}",
                text.escape_debug()
            )),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Waiting => out.write_str("waiting"),
            Outcome::Saved(generation) => write!(out, "saved {generation}"),
            Outcome::Restarted(generation) => write!(out, "restarted {generation}"),
            Outcome::Failed(why) => write!(out, "failed {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_one_end_writes_the_other_reads() {
        for request in [
            Request::Save,
            Request::Result(u64::MAX),
            Request::TimeLeft,
            Request::Hold(None),
            Request::Hold(Some(0)),
            Request::Release(None),
            Request::Release(Some(7)),
            Request::Status,
        ] {
            assert_eq!(request.to_string().parse(), Ok(request));
        }
        for outcome in [
            Outcome::Waiting,
            Outcome::Saved(1),
            Outcome::Restarted(7),
            Outcome::Failed("the disk is full".into()),
        ] {
            assert_eq!(outcome.to_string().parse(), Ok(outcome));
        }
        for reply in [
            Reply::Ok(String::new()),
            Reply::Busy("a checkpoint".into()),
            Reply::Error("no".into()),
        ] {
            assert_eq!(reply.to_string().parse(), Ok(reply));
        }
    }

    #[test]
    fn other_lines_are_refused() {
        for line in [
            "",
            " ",
            "SAVE",
            "save now",
            "result",
            "result x",
            "result -1",
            "result 1 2",
            "hold 1.5",
            "hold 1 2",
            "release all",
            "time-left 1",
            "stop",
            "result 99999999999999999999",
        ] {
            assert!(line.parse::<Request>().is_err(), "{line}");
        }
    }

    #[test]
    fn an_answer_is_one_line_whatever_the_reason() {
        assert_eq!(Reply::Error("a\nok b\r".into()).to_string(), "error a ok b");
    }

    proptest! {
        #[test]
        fn no_line_is_a_surprise(line in ".*") {
            if let Ok(request) = line.parse::<Request>() {
                prop_assert_eq!(request.to_string().parse(), Ok(request));
            }
            let _ = line.parse::<Reply>();
            let _ = line.parse::<Outcome>();
        }
    }
}
