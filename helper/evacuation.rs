//! What `container-checkpoint evacuate` and the helpers of a node say to each other, through Slurm.
//!
//! Contract: the wish is an addition to the reason for which the node is drained, the answer one to
//! the job's comment; both carry the number of the evacuation, so that an old one is never taken
//! for a new one. Only an operator can give a node a reason, and only the user (or an operator) a job
//! a comment: whoever may ask or answer is Slurm's business, nothing of a user's is opened by an
//! administrator, and it works from any node. What stood there before is kept, and whoever asked
//! takes an answer away again. No I/O.
//!
//! ```text
//! Reason=fan is loud; container-checkpoint evacuate #1f3a9c07 [root@2026-11-26T10:50:08]
//! Comment=mine [container-checkpoint #1f3a9c07: failed: no space left on device]
//! ```

/// What marks a reason; the number follows.
const WISH: &str = "container-checkpoint evacuate #";

/// What an answer in a comment begins with; the number follows.
const ANSWER: &str = "[container-checkpoint #";

/// Digits of a number.
const DIGITS: usize = 8;

/// Longest reason of a failure that goes into a comment, in bytes.
const REASON_MAX: usize = 300;

const LEAVING: &str = "leaving";
const SAVED: &str = "saved";
const FAILED: &str = "failed: ";

/// What a job's helper answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The job is being saved and will be requeued.
    Leaving,
    /// It is saved, and about to be requeued.
    Saved,
    /// It runs on, and why.
    Failed(String),
}

/// A new evacuation's number: eight hexadecimal digits, from a longer `nonce`.
pub fn number(nonce: &str) -> String {
    nonce.chars().take(DIGITS).collect()
}

/// The number of the evacuation that a node's reason asks for.
pub fn wish_in(reason: &str) -> Option<String> {
    let at = reason.rfind(WISH)? + WISH.len();
    let digits = reason.get(at..at + DIGITS)?;
    let whole = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    whole.then(|| digits.to_owned())
}

/// A node's reason with the wish added, instead of an earlier one.
pub fn with_wish(reason: &str, number: &str) -> String {
    let kept = match reason.find(WISH) {
        Some(at) => reason[..at].trim_end().trim_end_matches(';'),
        None => reason.trim_end(),
    };
    if kept.is_empty() {
        format!("{WISH}{number}")
    } else {
        format!("{kept}; {WISH}{number}")
    }
}

/// The answer to this evacuation that a job's comment holds.
pub fn answer_in(comment: &str, number: &str) -> Option<Answer> {
    let at = comment.rfind(ANSWER)? + ANSWER.len();
    let said = comment[at..].strip_prefix(number)?.strip_prefix(": ")?;
    let said = &said[..said.rfind(']')?];
    match said.strip_prefix(FAILED) {
        Some(why) => Some(Answer::Failed(why.to_owned())),
        None if said == LEAVING => Some(Answer::Leaving),
        None if said == SAVED => Some(Answer::Saved),
        None => None,
    }
}

/// A job's comment with this answer added; an earlier one goes.
pub fn with_answer(comment: &str, number: &str, answer: &Answer) -> String {
    let said = match answer {
        Answer::Leaving => LEAVING.to_owned(),
        Answer::Saved => SAVED.to_owned(),
        Answer::Failed(why) => {
            let mut why: String = why
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect();
            why.truncate(why.floor_char_boundary(REASON_MAX));
            format!("{FAILED}{why}")
        }
    };
    let kept = without_answer(comment);
    let blank = if kept.is_empty() { "" } else { " " };
    format!("{kept}{blank}{ANSWER}{number}: {said}]")
}

/// A job's comment without any answer.
pub fn without_answer(comment: &str) -> String {
    let Some(at) = comment.rfind(ANSWER) else {
        return comment.to_owned();
    };
    let after = comment[at..]
        .rfind(']')
        .map_or("", |end| &comment[at + end + 1..]);
    format!("{}{after}", comment[..at].trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_is_added_to_what_stood_there() {
        for (before, after) in [
            ("", "container-checkpoint evacuate #00000002"),
            (
                "fan is loud",
                "fan is loud; container-checkpoint evacuate #00000002",
            ),
            (
                "fan; container-checkpoint evacuate #00000001",
                "fan; container-checkpoint evacuate #00000002",
            ),
            (
                "container-checkpoint evacuate #00000001",
                "container-checkpoint evacuate #00000002",
            ),
        ] {
            let wish = with_wish(before, "00000002");
            assert_eq!(wish, after);
            assert_eq!(
                wish_in(&format!("{wish} [root@2026-11-26T10:50:08]")).unwrap(),
                "00000002"
            );
        }
        for none in [
            "",
            "fan",
            "container-checkpoint evacuate #12",
            "container-checkpoint evacuate #nothexxx",
        ] {
            assert_eq!(wish_in(none), None, "{none}");
        }
    }

    #[test]
    fn an_answer_is_added_to_what_stood_there_and_goes_again() {
        let failed = Answer::Failed("no space [left]\non device".into());
        for comment in ["", "mine | x", "[a]"] {
            let leaving = with_answer(comment, "00000001", &Answer::Leaving);
            assert_eq!(answer_in(&leaving, "00000001"), Some(Answer::Leaving));
            assert_eq!(answer_in(&leaving, "00000002"), None);
            let saved = with_answer(&leaving, "00000001", &Answer::Saved);
            assert_eq!(answer_in(&saved, "00000001"), Some(Answer::Saved));
            let second = with_answer(&saved, "00000002", &failed);
            assert_eq!(
                answer_in(&second, "00000002"),
                Some(Answer::Failed("no space [left] on device".into()))
            );
            assert_eq!(without_answer(&second), comment);
        }
        let held = format!("{}; held", with_answer("x", "1", &Answer::Leaving));
        assert_eq!(without_answer(&held), "x; held");
        assert_eq!(
            with_answer("x", "1", &Answer::Leaving),
            "x [container-checkpoint #1: leaving]"
        );
        let long = with_answer("", "1", &Answer::Failed("é".repeat(400)));
        assert!(long.len() < 400);
        assert_eq!(answer_in("[container-checkpoint #1: leav", "1"), None);
    }
}
