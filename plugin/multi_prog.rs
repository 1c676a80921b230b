//! `srun --multi-prog` on Slurm before 23.11: each task has an argv of its own then, which a plugin
//! cannot reach. Nothing tells of it but the step's command, whose second argument is the whole text
//! of the configuration (`_load_multi()` of `src/plugins/launch/slurm/launch_slurm.c`).

/// Whether the argument is such a text: every line that says something starts with the ranks it is
/// for, such as `0`, `1-3`, `0,2` or `*`, and goes on with a program; there is at least one line end.
pub fn is_config(argument: &[u8]) -> bool {
    if !argument.contains(&b'\n') {
        return false;
    }
    let mut continued = false;
    let mut programs = 0;
    for line in argument.split(|byte| *byte == b'\n') {
        let line = line.trim_ascii();
        let was_continued = std::mem::replace(&mut continued, line.ends_with(b"\\"));
        if was_continued || line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let mut words = line
            .split(u8::is_ascii_whitespace)
            .filter(|word| !word.is_empty());
        let is_rank = |byte: &u8| byte.is_ascii_digit() || matches!(byte, b'-' | b',' | b'*');
        let ranks = words.next().is_some_and(|word| word.iter().all(is_rank));
        if !ranks || words.next().is_none() {
            return false;
        }
        programs += 1;
    }
    programs > 0
}

#[cfg(test)]
mod tests {
    use super::is_config;

    #[test]
    fn configurations_are_known_from_other_arguments() {
        for text in [
            "0 a\n",
            "# two\n\n0-1,3  /bin/a x\n* b %t\n",
            "0 a \\\n  more arguments\n1 b",
        ] {
            assert!(is_config(text.as_bytes()), "{text}");
        }
        for text in [
            "",
            "\n",
            "0 a",
            "print(1)\nprint(2)\n",
            "0\n1\n",
            "0 a\nb c\n",
            "#\n# \n",
        ] {
            assert!(!is_config(text.as_bytes()), "{text}");
        }
    }
}
