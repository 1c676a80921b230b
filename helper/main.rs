//! `container-checkpoint`: the helper that stands in place of a task, and the command for people.
#[path = "../plugin/words.rs"]
mod words;

mod config;
mod container;
mod engine;
mod logging;
mod runtime;
mod slurm;
mod store;
#[allow(dead_code)] // until supervise uses all of it
mod sys;

fn main() {
    logging::init();
}
