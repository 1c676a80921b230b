//! What commands need from around them: configuration, store, engines, Slurm.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use super::{Command, Context, FAILED};
use crate::config::Config;
use crate::engine::{Engine, criu, dmtcp};
use crate::store::Manifest;
use crate::{holder, task};

/// Does a command; what is returned is the program's exit code. Signals keep their usual meaning
/// meanwhile: nothing that a command does is harmed by being interrupted.
pub fn main(command: &Command) -> u8 {
    let common = command.common();
    let found = place(common);
    let (config, store) = match found {
        Ok(found) => found,
        Err(why) => {
            log::error!("{why:#}");
            return FAILED;
        }
    };
    let engines = OnceCell::new();
    let here = || {
        let found = engines.get_or_init(|| find_engines(&config));
        let found = found.iter();
        found
            .map(|engine| format!("{} {}", engine.kind(), engine.version()))
            .collect()
    };
    let verify = |manifest: &Manifest, rank: &Path| {
        let engines: &Vec<Box<dyn Engine>> = engines.get_or_init(|| find_engines(&config));
        match engines
            .iter()
            .find(|engine| engine.kind() == manifest.engine)
        {
            Some(engine) => engine.verify(rank),
            // Its files are what was saved, and they were looked at when they were saved.
            None => Ok(()),
        }
    };
    let context = Context {
        store: &store,
        config: &config,
        witness: &holder::Slurm,
        verify: &verify,
        engines: &here,
    };
    super::run(command, &context)
}

/// The configuration, and the directory of this user's store.
pub(super) fn place(common: &super::Common) -> anyhow::Result<(Config, PathBuf)> {
    let config = Config::load(common.config.as_deref())?;
    let store = chosen_store(common, &config)?;
    Ok((config, store))
}

/// The directory of this user's store.
pub(super) fn chosen_store(common: &super::Common, config: &Config) -> anyhow::Result<PathBuf> {
    let chosen = match &common.dir {
        Some(dir) => Some(task::dir_of_option(dir)?),
        None => task::dir_of_variable(),
    };
    task::store_dir(chosen.as_deref(), config)
}

/// The engines of this node. A login node may have none.
fn find_engines(config: &Config) -> Vec<Box<dyn Engine>> {
    let mut engines: Vec<Box<dyn Engine>> = Vec::new();
    let search = dmtcp::installation::Search::here(&config.dmtcp, config.dmtcp_conf.as_deref());
    // Files can be checked without an installation.
    match dmtcp::Dmtcp::find(&search, None) {
        Ok(found) => engines.push(Box::new(found)),
        Err(why) => log::debug!("dmtcp: {why}"),
    }
    match criu::Criu::find(config.criu.as_deref()) {
        Ok(found) => engines.push(Box::new(found)),
        Err(why) => log::debug!("criu: {why}"),
    }
    engines
}
