//! A job's comment (`squeue -o %k`, `scontrol show job`): what is in it, whether it may be replaced.

use super::{SlurmError, command};
use crate::evacuation;

/// What comments of ours begin with: a checkpoint's, and that of a job that was held.
pub const CHECKPOINT: &str = "checkpoint generation ";
pub const HELD: &str = "container-checkpoint: ";

/// Whether a comment may be replaced: nobody has written one, or we have.
pub fn is_ours(comment: &str) -> bool {
    let ours = comment.starts_with(CHECKPOINT) || comment.starts_with(HELD);
    // What is said to an operator stays until he has read it.
    comment.is_empty() || ours && evacuation::without_answer(comment) == comment
}

/// The comment of the job that `target` means ([`super::Job::target`]), empty if it has none.
pub fn comment(target: &str) -> Result<String, SlurmError> {
    // `scontrol show job` puts other fields behind it on the same line.
    let arguments = ["--noheader", "--format=%k", "--jobs", target];
    let text = command::run("squeue", &arguments)?;
    // A het job has a line per component, the leader's first.
    Ok(match text.lines().next().unwrap_or_default() {
        "(null)" => String::new(),
        comment => comment.to_owned(),
    })
}

/// Sets the comment of a job, which its owner may at any time.
pub fn set_comment(target: &str, text: &str) -> Result<(), SlurmError> {
    let (job, comment) = (format!("JobId={target}"), format!("Comment={text}"));
    command::run("scontrol", &["update", &job, &comment]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comment_of_the_users_is_not_ours() {
        assert!(is_ours(""));
        assert!(is_ours("checkpoint generation 7 of heat"));
        assert!(is_ours("container-checkpoint: held"));
        assert!(!is_ours(
            "checkpoint generation 7 [container-checkpoint #1f3a9c07: leaving]"
        ));
        assert!(!is_ours("checkpoint the results"));
        assert!(!is_ours("for the paper; container-checkpoint: held"));
    }
}
