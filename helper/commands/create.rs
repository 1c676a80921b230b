//! `create`: a NAME's place in the store, made before anything runs.
//!
//! Contract: what would stop a run of this NAME later and can be seen from here is found now: the
//! name, the configuration, a store that cannot be used or is full, no engine. Nothing is made if
//! the name is there already. A run needs no `create` before it.

use serde::Serialize;

use super::change::lock;
use super::output::{print, print_json};
use super::{Context, Create, Failure};
use crate::store::{Name, Store};

pub fn create(create: &Create, context: &Context<'_>) -> Result<(), Failure> {
    let names: Vec<Name> = create
        .names
        .iter()
        .map(|name| Name::parse(name))
        .collect::<Result<_, _>>()?;
    let store = Store::open(context.store)?;
    for name in &names {
        if store.name(name).exists() {
            return Err(Failure::Other(format!(
                "there is a checkpoint {name} already: `container-checkpoint list {name}` shows \
                 what it has, a run with that name goes on from it, and `container-checkpoint \
                 delete {name}` deletes it"
            )));
        }
    }
    for name in &names {
        // Taking the lock makes what a run would make, and proves that it can be made.
        lock(&store.name(name), context, false)?;
    }
    let engines = (context.engines)();
    if engines.is_empty() {
        log::warn!(
            "this machine has neither DMTCP nor CRIU, one of which the nodes need for saving \
             anything"
        );
    }
    if create.common.json {
        #[derive(Serialize)]
        struct Document<'a> {
            format: u32,
            store: String,
            names: Vec<&'a str>,
            engines: Vec<String>,
        }
        return print_json(&Document {
            format: 1,
            store: store.dir().display().to_string(),
            names: names.iter().map(Name::as_str).collect(),
            engines,
        });
    }
    for name in &names {
        print(&format!("{name} created in {}\n", store.dir().display()))?;
    }
    Ok(())
}
