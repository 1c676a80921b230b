//! What Slurm looks up in the plugin: three words about it and the callbacks.
//!
//! Slurm ignores what an `optional` plugin returns, and a `required` one that fails at the wrong
//! moment drains a node or fails jobs of people who did not ask. So the callbacks of slurmstepd and
//! slurmd never fail, and where a user has to be refused the process is ended here: `sbatch`, `srun`
//! and `salloc`, or the child of slurmstepd that would have become the task.

use std::ffi::{CStr, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::options::{IMAGE, NAME, OPTIONS};
use crate::settings::Settings;
use crate::spank::{self, Context, Spank, spank_t};
use crate::state::{self, State};
use crate::{preflight, submit, task};

const OK: c_int = 0;
const FAILED: c_int = -1;

/// The name of [`crate::options::PLUGIN`].
#[unsafe(no_mangle)]
pub static plugin_name: [u8; 21] = *b"container-checkpoint\0";

#[unsafe(no_mangle)]
pub static plugin_type: [u8; 6] = *b"spank\0";

/// Slurm takes only plugins that were built for its own year and month (`plugin_peek()` and
/// `plugin_load_from_file()` of its `src/common/plugin.c`), so this is set to what it wants before
/// it looks. It stays 0, which no Slurm takes, where that version has not been tried.
#[unsafe(no_mangle)]
pub static plugin_version: AtomicU32 = AtomicU32::new(0);

/// ESPANK_JOB_FAILURE of `slurm/slurm_errno.h`: from Slurm 25.05 on, a failing
/// `slurm_spank_init` fails the job instead of draining the node. Ours does not fail there at all.
#[unsafe(no_mangle)]
pub static slurm_spank_init_failure_mode: c_int = 3012;

/// By which the helper's `check --node` knows the version of this file.
#[used]
static MARK: &str = crate::words::PLUGIN_MARK;

#[used]
#[unsafe(link_section = ".init_array")]
static SET_VERSION: extern "C" fn() = set_version;

extern "C" fn set_version() {
    if let Some(version) = spank::wanted_version() {
        plugin_version.store(version, Ordering::Relaxed);
    }
}

/// Whether `--container-checkpoint` was given, kept apart from the state: it has to be known
/// whatever else fails.
static ASKED: AtomicBool = AtomicBool::new(false);

/// # Safety
/// Called by Slurm as `slurm/spank.h` describes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn slurm_spank_init(
    handle: spank_t,
    argc: c_int,
    argv: *const *mut c_char,
) -> c_int {
    caught("init", OK, || {
        std::panic::set_hook(Box::new(|panic| {
            spank::error(&format!("internal error, please report it: {panic}"));
        }));
        // SAFETY: what Slurm has just given to this callback.
        let (spank, words) = unsafe { (Spank::new(handle), spank::words(argc, argv)) };
        init(spank, Settings::new(words))
    })
}

fn init(spank: Spank, settings: Settings) -> c_int {
    let context = spank::context();
    let submitting = matches!(context, Context::Allocator | Context::Srun);
    if let (Some(fault), true) = (&settings.fault, submitting || context == Context::Slurmd) {
        spank::error(fault);
        return if submitting { FAILED } else { OK };
    }
    let mut state = state::lock();
    let settings = &state
        .insert(State {
            settings,
            values: Default::default(),
        })
        .settings;
    fault_point("init", settings);
    if context == Context::Allocator {
        submit::forget_outer_job(settings);
    }
    let skipped = image_of_another(settings, context);
    if submitting || context == Context::Step {
        for index in (0..OPTIONS.len()).filter(|index| Some(*index) != skipped) {
            if let Err(error) = spank.register(index, settings.option_name(index), on_option) {
                spank::error(&error);
            }
        }
    }
    OK
}

/// Steps back from `--container-image` where Pyxis is loaded, before or after us. Any other plugin
/// that has this option and comes first in plugstack.conf keeps it by Slurm's own rule.
fn image_of_another(settings: &Settings, context: Context) -> Option<usize> {
    let ours = settings.option_name(IMAGE);
    if ours != OPTIONS[IMAGE].name || !spank::is_loaded(c"spank_pyxis.so") {
        return None;
    }
    let line = format!(
        "--{ours} is Pyxis's here and not this plugin's; image-option=NAME in plugstack.conf gives \
         this plugin's another name"
    );
    // Once in slurmd's log; in commands only for those who want to know.
    match context {
        Context::Slurmd => spank::info(&line),
        _ => spank::verbose(&line),
    }
    Some(IMAGE)
}

/// Slurm's call for one option given; the value is its index in [`OPTIONS`].
unsafe extern "C" fn on_option(index: c_int, argument: *const c_char, remote: c_int) -> c_int {
    caught("option", FAILED, || {
        let Ok(index) = usize::try_from(index) else {
            return FAILED;
        };
        if index == NAME {
            ASKED.store(true, Ordering::Relaxed);
        }
        // SAFETY: Slurm gives a terminated string, or null.
        let argument = unsafe { (!argument.is_null()).then(|| CStr::from_ptr(argument)) };
        take(index, argument.unwrap_or_default(), remote != 0)
    })
}

fn take(index: usize, argument: &CStr, remote: bool) -> c_int {
    let mut state = state::lock();
    let (Some(state), Some(option)) = (state.as_mut(), OPTIONS.get(index)) else {
        return FAILED;
    };
    if !remote
        && let Err(refused) = option.check(state.settings.option_name(index), argument.to_bytes())
    {
        spank::error(&refused);
        return FAILED;
    }
    state.values[index] = Some(argument.to_owned());
    OK
}

/// # Safety
/// Called by Slurm as `slurm/spank.h` describes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn slurm_spank_init_post_opt(
    _handle: spank_t,
    _argc: c_int,
    _argv: *const *mut c_char,
) -> c_int {
    caught("init_post_opt", OK, || {
        let context = spank::context();
        if !matches!(context, Context::Allocator | Context::Srun) {
            return OK;
        }
        let checked = |state| submit::check(state).and_then(|()| preflight::check(state, context));
        if let Some(Err(refused)) = state::lock().as_ref().map(checked) {
            spank::error(&refused);
            std::process::exit(1);
        }
        OK
    })
}

/// # Safety
/// Called by Slurm as `slurm/spank.h` describes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn slurm_spank_task_init(
    handle: spank_t,
    _argc: c_int,
    _argv: *const *mut c_char,
) -> c_int {
    let code = caught("task_init", FAILED, || {
        // SAFETY: what Slurm has just given to this callback.
        let spank = unsafe { Spank::new(handle) };
        let asked = |given| ASKED.fetch_or(given, Ordering::Relaxed) || given;
        match state::lock()
            .as_mut()
            .map(|state| task::wrap(spank, state, &asked))
        {
            Some(Err(error)) => {
                spank::error(&error);
                FAILED
            }
            Some(Ok(())) => OK,
            None => FAILED,
        }
    });
    if code != OK && ASKED.load(Ordering::Relaxed) {
        spank::error("this task asked to be resumable and is therefore not started");
        // SAFETY: ends this child of slurmstepd at once, as slurmstepd itself does when a required
        // plugin fails here; handlers of exit() belong to the parent.
        unsafe { libc::_exit(1) }
    }
    OK
}

/// Runs a callback and keeps a panic from Slurm, which would not survive it. The panic's message is
/// logged by the hook.
fn caught(name: &str, after_panic: c_int, callback: impl FnOnce() -> c_int) -> c_int {
    let run = || {
        if let Some(state) = state::lock().as_ref() {
            fault_point(name, &state.settings);
        }
        callback()
    };
    catch_unwind(AssertUnwindSafe(run)).unwrap_or(after_panic)
}

/// Panics where a test's `panic=CALLBACK` in plugstack.conf says so.
#[cfg(feature = "fault-points")]
fn fault_point(name: &str, settings: &Settings) {
    if settings.panic_in == name.as_bytes() {
        panic!("fault point {name}");
    }
}

#[cfg(not(feature = "fault-points"))]
fn fault_point(_name: &str, _settings: &Settings) {}
