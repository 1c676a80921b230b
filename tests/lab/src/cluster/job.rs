//! What Slurm says of a job.

use std::collections::BTreeMap;

/// What `scontrol show job -o` says of a job, by key.
pub type Job = BTreeMap<String, String>;

/// `scontrol show job -o`: words "key=value"; a value may hold blanks.
pub fn parse_job(line: &str) -> Job {
    let mut job = Job::new();
    let mut last = String::new();
    for word in line.lines().next().unwrap_or_default().split(' ') {
        let key = word.split_once('=').filter(|(key, _)| {
            key.starts_with(|first: char| first.is_ascii_uppercase())
                && key
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "/:_".contains(c))
        });
        match key {
            Some((key, value)) => {
                last = key.to_owned();
                job.insert(last.clone(), value.to_owned());
            }
            None => {
                if let Some(value) = job.get_mut(&last) {
                    *value += " ";
                    *value += word;
                }
            }
        }
    }
    for value in job.values_mut() {
        value.truncate(value.trim_end().len());
    }
    job
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_line_is_split_at_its_keys() {
        let line = "JobId=3 JobName=a b c UserId=alice(1001) ReqNodeList=(null) Command=/x y=1 \
                    NumNodes=1 OverSubscribe=OK\n";
        let job = parse_job(line);
        assert_eq!(job["JobName"], "a b c");
        assert_eq!(job["Command"], "/x y=1");
        assert_eq!(job["OverSubscribe"], "OK");
        assert_eq!(parse_job(""), Job::new());
    }
}
