//! Libraries whose users an engine is known not to save.
//!
//! Contract: [`doubts`] judges by the libraries that a program is linked with, which says what it
//! can do, not what it will: so nothing here keeps an application from being started.

use super::Kind;

/// Something that a program may do and an engine cannot save.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doubt {
    pub library: String,
    pub cause: &'static str,
    pub cure: &'static str,
}

/// What a library stands for.
struct Known {
    /// How the names of its files begin.
    starts: &'static [&'static str],
    engine: Kind,
    cause: &'static str,
    cure: &'static str,
}

const WITHOUT_IO_URING: &str = "let the application do without io_uring (an option or a variable of \
its own), or let it save its state itself";

const WITHOUT_GPU: &str = "run it without a GPU, or let the application save its state itself";

const KNOWN: &[Known] = &[
    Known {
        starts: &["liburing.so"],
        engine: Kind::Dmtcp,
        cause: "if it uses io_uring, the first checkpoint ends it",
        cure: WITHOUT_IO_URING,
    },
    Known {
        starts: &["liburing.so"],
        engine: Kind::Criu,
        cause: "if it uses io_uring, its checkpoints are refused",
        cure: WITHOUT_IO_URING,
    },
    Known {
        starts: GPU,
        engine: Kind::Dmtcp,
        cause: "what it keeps on a GPU is not saved",
        cure: WITHOUT_GPU,
    },
    Known {
        starts: GPU,
        engine: Kind::Criu,
        cause: "what it keeps on a GPU is not saved",
        cure: WITHOUT_GPU,
    },
];

/// Of NVIDIA's and AMD's drivers and run-time libraries.
const GPU: &[&str] = &[
    "libcuda.so",
    "libcudart.so",
    "libnvidia-",
    "libamdhip64.so",
    "libhsa-runtime64.so",
];

/// What `engine` is known not to save of a program that is linked with `libraries` (file names).
pub fn doubts(engine: Kind, libraries: &[String]) -> Vec<Doubt> {
    let known = KNOWN.iter().filter(|known| known.engine == engine);
    known
        .filter_map(|known| {
            let meant = |name: &&String| known.starts.iter().any(|start| name.starts_with(start));
            Some(Doubt {
                library: libraries.iter().find(meant)?.clone(),
                cause: known.cause,
                cure: known.cure,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_known_by_how_their_names_begin() {
        let names = ["libc.so.6", "liburing.so.2", "libcudart.so.12"].map(String::from);
        for engine in [Kind::Dmtcp, Kind::Criu] {
            let found = doubts(engine, &names);
            let libraries: Vec<_> = found.iter().map(|doubt| &doubt.library[..]).collect();
            assert_eq!(libraries, ["liburing.so.2", "libcudart.so.12"]);
            assert_eq!(doubts(engine, &names[..1]), []);
        }
    }
}
