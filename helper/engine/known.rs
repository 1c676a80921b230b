//! What applications do that engines are known not to save.
//!
//! Contract: libraries are judged by the names that a program is linked with, which say what it can
//! do, not what it will. A [`Doubt`] is told; whether it keeps the application from being started
//! is the site's decision (`preflight`).

use super::Kind;

/// Something that an application may do and an engine cannot save.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doubt {
    pub cause: String,
    /// What can be done about it.
    pub cure: String,
}

impl std::fmt::Display for Doubt {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}; {}", self.cause, self.cure)
    }
}

/// What a library stands for.
struct Known {
    /// How the names of its files begin.
    starts: &'static [&'static str],
    engines: &'static [Kind],
    cause: &'static str,
    cure: &'static str,
}

const WITHOUT_IO_URING: &str = "let the application do without io_uring (an option or a variable of \
its own), or let it save its state itself";

const KNOWN: &[Known] = &[
    Known {
        starts: &["liburing.so"],
        engines: &[Kind::Dmtcp],
        cause: "if it uses io_uring, the first checkpoint ends it",
        cure: WITHOUT_IO_URING,
    },
    Known {
        starts: &["liburing.so"],
        engines: &[Kind::Criu],
        cause: "if it uses io_uring, its checkpoints are refused",
        cure: WITHOUT_IO_URING,
    },
    Known {
        // Of NVIDIA's and AMD's drivers and run-time libraries.
        starts: &[
            "libcuda.so",
            "libcudart.so",
            "libnvidia-",
            "libamdhip64.so",
            "libhsa-runtime64.so",
        ],
        engines: &[Kind::Dmtcp, Kind::Criu],
        cause: "what it keeps on a GPU is not saved",
        cure: "run it without a GPU, or let the application save its state itself",
    },
];

/// What `engine` is known not to save of a program that is linked with `libraries` (file names).
pub fn doubts(engine: Kind, libraries: &[String]) -> Vec<Doubt> {
    let known = KNOWN.iter().filter(|known| known.engines.contains(&engine));
    known
        .filter_map(|known| {
            let meant = |name: &&String| known.starts.iter().any(|start| name.starts_with(start));
            let library = libraries.iter().find(meant)?;
            Some(Doubt {
                cause: format!("it is linked with {library}: {}", known.cause),
                cure: known.cure.to_owned(),
            })
        })
        .collect()
}

/// What is known of a job with a GPU; `by` is the option or variable that says so.
pub fn gpu(by: &str) -> Doubt {
    Doubt {
        cause: format!("a GPU is asked for ({by}): what an application keeps on it is not saved"),
        cure: "ask for none, use it in parts of the job that are not made resumable, or let the \
               application save its state itself"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_known_by_how_their_names_begin() {
        let names = ["libc.so.6", "liburing.so.2", "libcudart.so.12"].map(String::from);
        for (engine, end) in [
            (Kind::Dmtcp, "the first checkpoint ends it"),
            (Kind::Criu, "its checkpoints are refused"),
        ] {
            let causes: Vec<_> = doubts(engine, &names)
                .into_iter()
                .map(|d| d.cause)
                .collect();
            let expected = [
                format!("it is linked with liburing.so.2: if it uses io_uring, {end}"),
                "it is linked with libcudart.so.12: what it keeps on a GPU is not saved".into(),
            ];
            assert_eq!(causes, expected);
            assert_eq!(doubts(engine, &names[..1]), []);
        }
    }
}
