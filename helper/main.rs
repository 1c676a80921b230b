//! `container-checkpoint`: the helper that stands in place of a task, and the command for people.
#[path = "../plugin/words.rs"]
mod words;

mod config;
#[allow(dead_code)] // until supervise uses it
mod container;
mod engine;
#[allow(dead_code)] // until engines have points of their own
mod fault;
mod logging;
mod runtime;
mod slurm;
#[allow(dead_code)] // until supervise uses it
mod socket;
#[allow(dead_code, unused_imports)] // until supervise uses it
mod store;
#[allow(dead_code)] // until supervise uses all of it
mod sys;

fn main() {
    logging::init();
    // Before anything is parsed: what follows is the application's own command line.
    let arguments: Vec<std::ffi::OsString> = std::env::args_os().collect();
    if arguments.get(1).is_some_and(|word| word == engine::criu::agent::SUBCOMMAND) {
        std::process::exit(engine::criu::agent::main(&arguments[2..]));
    }
}
