//! `container-checkpoint`: the helper that stands in place of a task, and the command for people.
//!
//! This file only dispatches. Exit codes of the helper's own failures: 1; of a wrong command line:
//! 2; of the commands for people see `commands`. In place of a task it ends exactly as the
//! application does.

#[path = "../plugin/words.rs"]
mod words;

mod cli;
mod clock;
mod commands;
mod config;
mod container;
mod engine;
mod evacuation;
mod fault;
mod front;
mod holder;
mod listeners;
mod logging;
mod pipes;
mod policy;
mod requests;
mod runtime;
mod shell;
mod shellscript;
mod slurm;
mod socket;
mod stage;
mod store;
mod streams;
mod supervise;
mod sys;
mod task;
mod writers;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

use engine::{End, criu, dmtcp};
use supervise::Signals;

fn main() -> ExitCode {
    let mut words: Vec<OsString> = std::env::args_os().collect();
    // On Slurm without spank_prepend_task_argv the task's argv[0] has been replaced by us, and all
    // the other words are the task's own.
    let argv0 = std::env::var_os(words::variable::ARGV0);
    if argv0.is_none() && words.first().is_some_and(|name| stage::is_caught(name)) {
        logging::init();
        log::error!("{}", stage::main(&words));
        return ExitCode::from(127);
    }
    let word = words.get(1).and_then(|word| word.to_str()).unwrap_or("");
    if argv0.is_none() {
        // Commands of our own inside containers. What follows them is the application's own command
        // line, and they leave signals alone.
        match word {
            criu::agent::SUBCOMMAND => {
                logging::init();
                return ExitCode::from(criu::agent::main(&words[2..]) as u8);
            }
            container::inspect::INSPECT => return inspect(&words[2..]),
            dmtcp::within::WITHIN => {
                logging::init();
                log::error!("{}", dmtcp::within::become_command(&words[2..]));
                return ExitCode::from(127);
            }
            stage::STAGE => {
                logging::init();
                return end(task::stage(words.split_off(2)));
            }
            "task" | "run" => {}
            // Commands for people, and `inside`, which is a process of the application: signals keep
            // their usual meaning.
            _ => {
                logging::init();
                match cli::Cli::parse_from(&words).command {
                    cli::Command::Inside { ask } => {
                        return ExitCode::from(socket::client::run(&ask));
                    }
                    cli::Command::Store(command) => {
                        return ExitCode::from(commands::main(&command));
                    }
                    cli::Command::Save(save) => {
                        return ExitCode::from(commands::save::main(&save));
                    }
                    cli::Command::Check(check) => {
                        return ExitCode::from(commands::check::main(&check));
                    }
                    cli::Command::Evacuate(evacuate) => {
                        return ExitCode::from(commands::evacuate::main(&evacuate));
                    }
                    cli::Command::Task { .. } | cli::Command::Run(_) => {}
                }
            }
        }
    }
    // A pre-emption may come at any moment: from here on signals wait until they are asked for.
    let signals = Signals::take();
    logging::init();
    let result = signals
        .map_err(anyhow::Error::from)
        .and_then(|mut signals| {
            if let Some(argv0) = argv0 {
                sys::forget_variable(words::variable::ARGV0);
                words[0] = argv0;
                return task::task(words, &mut signals);
            }
            dispatch(cli::Cli::parse_from(&words), &words, &mut signals)
        });
    end(result)
}

/// Ends as the application did.
fn end(result: anyhow::Result<End>) -> ExitCode {
    match result {
        Ok(End::Exit(code)) => ExitCode::from(code as u8),
        Ok(End::Signal(signal)) => sys::die_of(signal),
        Err(why) => {
            log::error!("{why:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: cli::Cli, raw: &[OsString], signals: &mut Signals) -> anyhow::Result<End> {
    match cli.command {
        cli::Command::Inside { ask } => Ok(End::Exit(socket::client::run(&ask).into())),
        cli::Command::Store(command) => Ok(End::Exit(commands::main(&command).into())),
        cli::Command::Save(save) => Ok(End::Exit(commands::save::main(&save).into())),
        cli::Command::Check(check) => Ok(End::Exit(commands::check::main(&check).into())),
        cli::Command::Evacuate(evacuate) => {
            Ok(End::Exit(commands::evacuate::main(&evacuate).into()))
        }
        cli::Command::Task { command } => task::task(command, signals),
        cli::Command::Run(run) => {
            let (request, command) = task::Request::of_run(run, raw)?;
            let mut environment = task::Request {
                image: None,
                ..task::Request::from_environment()
            };
            if request.from.is_some() {
                environment.name = None;
            }
            task::run(request.or_else(environment), command, signals)
        }
    }
}

/// What a program in a container is, for this program outside of it.
fn inspect(arguments: &[OsString]) -> ExitCode {
    match container::inspect::inside(arguments) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            log::error!("{why}");
            ExitCode::FAILURE
        }
    }
}
