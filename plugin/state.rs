//! What the plugin knows in this process: the administrator's words and the options given.

use std::ffi::CString;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::options::OPTIONS;
use crate::settings::Settings;

pub struct State {
    pub settings: Settings,
    /// By index in [`OPTIONS`].
    pub values: [Option<CString>; OPTIONS.len()],
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

/// The state; None before `slurm_spank_init`. Slurm calls its plugins from one thread, so this
/// never waits.
pub fn lock() -> MutexGuard<'static, Option<State>> {
    // A panic that was caught may have happened under the lock; every write below it is one
    // assignment, so nothing is half done.
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}
