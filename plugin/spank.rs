//! Slurm's plugin interface, as far as it is used here, made safe.
//!
//! Contract: everything that crosses between Rust and Slurm does so in this file and in `lib.rs`;
//! nothing here panics. What some Slurm from 22.05 on lacks is looked up when it is needed: this
//! library is bound at load (BIND_NOW), so a plain reference to a missing function would keep it
//! from loading.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem;

use crate::options::{OPTIONS, PLUGIN};
use crate::words::SLURM_RELEASES;

#[allow(non_camel_case_types, non_upper_case_globals, dead_code)]
mod sys {
    include!(concat!(env!("OUT_DIR"), "/spank.rs"));
}

pub use sys::{spank_option, spank_t};

/// What kind of process this is, of those that the plugin has something to do in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// `sbatch` or `salloc`.
    Allocator,
    /// `srun`.
    Srun,
    /// slurmstepd, for a step of any kind.
    Step,
    /// slurmd itself.
    Slurmd,
    Other,
}

/// In which kind of process Slurm has loaded us.
pub fn context() -> Context {
    // SAFETY: takes nothing and only reads which stack of plugins this process has.
    match unsafe { sys::spank_context() } {
        sys::S_CTX_ALLOCATOR => Context::Allocator,
        sys::S_CTX_LOCAL => Context::Srun,
        sys::S_CTX_REMOTE => Context::Step,
        sys::S_CTX_SLURMD => Context::Slurmd,
        _ => Context::Other,
    }
}

/// An error of this plugin, on the terminal of a command or in the output of a job.
pub fn error(message: &str) {
    log(sys::slurm_error, message);
}

/// A line that everybody sees.
pub fn info(message: &str) {
    log(sys::slurm_info, message);
}

/// A line for those who asked for more, by `-v`.
pub fn verbose(message: &str) {
    log(sys::slurm_verbose, message);
}

fn log(to: unsafe extern "C" fn(*const c_char, ...), message: &str) {
    let line = text(format!("{PLUGIN}: {message}").into_bytes());
    // SAFETY: the format takes one string, which is terminated and lives through the call.
    unsafe { to(c"%s".as_ptr(), line.as_ptr()) }
}

/// A C string of `bytes` up to the first NUL: Slurm's own strings have none.
pub fn text(mut bytes: Vec<u8>) -> CString {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    CString::new(bytes).unwrap_or_default()
}

/// What Slurm calls when an option was given: the value registered with it, the argument, and
/// whether this is slurmstepd.
pub type Callback = unsafe extern "C" fn(c_int, *const c_char, c_int) -> c_int;

/// Slurm's handle of one callback.
#[derive(Clone, Copy)]
pub struct Spank(spank_t);

impl Spank {
    /// # Safety
    /// `handle` is what Slurm gave to a callback that has not returned yet.
    pub unsafe fn new(handle: spank_t) -> Self {
        Self(handle)
    }

    /// Registers the option at `index` of [`OPTIONS`] under `name`; `index` is what `callback` is
    /// called with. Only in `slurm_spank_init`.
    pub fn register(self, index: usize, name: &str, callback: Callback) -> Result<(), String> {
        let (Some(option), Ok(val)) = (OPTIONS.get(index), c_int::try_from(index)) else {
            return Ok(());
        };
        let (name, arginfo, usage) = (
            text(name.into()),
            text(option.arginfo.into()),
            text(option.usage.into()),
        );
        let mut raw = spank_option {
            name: name.as_ptr().cast_mut(),
            arginfo: arginfo.as_ptr().cast_mut(),
            usage: usage.as_ptr().cast_mut(),
            has_arg: 1,
            val,
            cb: Some(callback),
        };
        // SAFETY: the handle is Slurm's; Slurm copies the option with its strings
        // (_spank_option_copy() of its spank.c) and writes to none of them.
        let code = unsafe { sys::spank_option_register(self.0, &raw mut raw) };
        ok(code, || {
            format!("could not register the option --{}", name.to_string_lossy())
        })
    }

    /// Whether an option of this name was given, whichever plugin it belongs to.
    pub fn was_given(self, option: &CStr) -> bool {
        let mut raw = spank_option {
            name: option.as_ptr().cast_mut(),
            arginfo: std::ptr::null_mut(),
            usage: std::ptr::null_mut(),
            has_arg: 1,
            val: 0,
            cb: None,
        };
        let mut value: *mut c_char = std::ptr::null_mut();
        // SAFETY: Slurm looks for the name and copies what it keeps; it accepts null for the rest.
        let code = unsafe { sys::spank_option_getopt(self.0, &raw mut raw, &raw mut value) };
        code == sys::ESPANK_SUCCESS
    }

    /// The id of the step; of those above 0xfffffff0 each is one kind of step (`slurm/slurm.h`).
    pub fn step_id(self) -> Result<u32, String> {
        let mut id = 0_u32;
        // SAFETY: S_JOB_STEPID takes a pointer to one uint32_t.
        let code = unsafe { sys::spank_get_item(self.0, sys::S_JOB_STEPID, &raw mut id) };
        ok(code, || "could not learn the id of this step".to_owned()).map(|()| id)
    }

    /// Whether the task's environment has the variable.
    pub fn has_env(self, name: &CStr) -> bool {
        let mut buffer = [0 as c_char; 2];
        // SAFETY: `buffer` has the two bytes that Slurm is told of.
        let code = unsafe { sys::spank_getenv(self.0, name.as_ptr(), buffer.as_mut_ptr(), 2) };
        // A value that does not fit is a value.
        code == sys::ESPANK_SUCCESS || code == sys::ESPANK_NOSPACE
    }

    /// A variable of the task's environment. Values of 64 KiB and more are taken for none.
    pub fn env(self, name: &CStr) -> Option<CString> {
        const LENGTH: c_int = 64 * 1024;
        let mut buffer = vec![0_u8; LENGTH as usize];
        // SAFETY: `buffer` has the LENGTH bytes that Slurm is told of; Slurm terminates the value.
        let code = unsafe {
            sys::spank_getenv(
                self.0,
                name.as_ptr(),
                buffer.as_mut_ptr().cast::<c_char>(),
                LENGTH,
            )
        };
        (code == sys::ESPANK_SUCCESS).then(|| text(buffer))
    }

    /// Sets a variable of the task's environment.
    pub fn set_env(self, name: &CStr, value: &CStr) -> Result<(), String> {
        // SAFETY: two terminated strings, which Slurm copies.
        let code = unsafe { sys::spank_setenv(self.0, name.as_ptr(), value.as_ptr(), 1) };
        ok(code, || {
            format!(
                "could not set {} in the task's environment",
                name.to_string_lossy()
            )
        })
    }

    /// Removes a variable of the task's environment, if it is there.
    pub fn unset_env(self, name: &CStr) -> Result<(), String> {
        // SAFETY: one terminated string, which is only read.
        let code = unsafe { sys::spank_unsetenv(self.0, name.as_ptr()) };
        ok(code, || {
            format!(
                "could not unset {} in the task's environment",
                name.to_string_lossy()
            )
        })
    }

    /// Puts `argv` in front of the task's own, by `spank_prepend_task_argv` of Slurm 23.11 and
    /// newer. False where Slurm has no such function. Only in `slurm_spank_task_init`.
    pub fn prepend(self, argv: &[&CStr]) -> Result<bool, String> {
        type Prepend = unsafe extern "C" fn(spank_t, c_int, *const *const c_char) -> c_int;
        let found = symbol(c"spank_prepend_task_argv");
        if found.is_null() {
            return Ok(false);
        }
        // SAFETY: what Slurm exports by this name has this type: `slurm/spank.h` of 23.11.
        let prepend: Prepend = unsafe { mem::transmute(found) };
        let mut pointers: Vec<*const c_char> = argv.iter().map(|arg| arg.as_ptr()).collect();
        let count = c_int::try_from(pointers.len()).unwrap_or(0);
        pointers.push(std::ptr::null());
        // SAFETY: `count` terminated strings, which Slurm copies.
        let code = unsafe { prepend(self.0, count, pointers.as_ptr()) };
        let code = sys::spank_err_t::try_from(code).unwrap_or(sys::ESPANK_ERROR);
        ok(code, || {
            "could not put the helper in front of the task".to_owned()
        })
        .map(|()| true)
    }

    /// The step's command, which is every task's too except with `srun --multi-prog`.
    pub fn command(self) -> Result<Command, String> {
        let mut count: c_int = 0;
        let mut argv: *mut *mut c_char = std::ptr::null_mut();
        // SAFETY: S_JOB_ARGV takes a pointer to an int and one to a char **.
        let code =
            unsafe { sys::spank_get_item(self.0, sys::S_JOB_ARGV, &raw mut count, &raw mut argv) };
        ok(code, || "could not learn the task's command".to_owned())?;
        Ok(Command {
            argv,
            count: usize::try_from(count).unwrap_or(0),
        })
    }
}

/// The command of a step, in slurmstepd's memory.
pub struct Command {
    argv: *mut *mut c_char,
    count: usize,
}

impl Command {
    /// The argument at `index`, if there is one.
    pub fn argument(&self, index: usize) -> Option<&CStr> {
        if index >= self.count || self.argv.is_null() {
            return None;
        }
        // SAFETY: Slurm gave `count` pointers behind `argv`.
        let argument = unsafe { *self.argv.add(index) };
        // SAFETY: not null then, and terminated: it is what Slurm is about to execute.
        (!argument.is_null()).then(|| unsafe { CStr::from_ptr(argument) })
    }

    /// Puts `program` in the place of argv[0] and returns the old one; None if there is none.
    /// For Slurm before 23.11, where a task's argv is its step's
    /// (`src/slurmd/slurmstepd/slurmstepd_job.c`).
    pub fn replace_program(self, program: CString) -> Option<CString> {
        let old = self.argument(0)?.to_owned();
        // SAFETY: there is an argv[0], as just seen. Slurm owns the array in the process that is
        // about to become the task, and execve is all that reads it from now on. The new string is
        // never freed, nor is the old.
        unsafe { *self.argv = program.into_raw() };
        Some(old)
    }
}

/// What a callback was given as `argc` and `argv`.
///
/// # Safety
/// `argv` points to `argc` terminated strings that live as long as `'a`, or is null.
pub unsafe fn words<'a>(argc: c_int, argv: *const *mut c_char) -> Vec<&'a [u8]> {
    let count = if argv.is_null() {
        0
    } else {
        usize::try_from(argc).unwrap_or(0)
    };
    // SAFETY: as the caller promises; an index below `count` is inside.
    let pointers = (0..count).map(|index| unsafe { *argv.add(index) });
    // SAFETY: as the caller promises, and not null.
    pointers
        .filter(|p| !p.is_null())
        .map(|p| unsafe { CStr::from_ptr(p) }.to_bytes())
        .collect()
}

/// The version of Slurm's plugin interface that this process wants, as SLURM_VERSION_NUMBER of
/// `slurm/slurm_version.h` is made: year, month, micro, one byte each. None where it is not known.
pub fn wanted_version() -> Option<u32> {
    let found = symbol(c"slurm_api_version");
    if found.is_null() {
        return None;
    }
    // SAFETY: `slurm/slurm.h` declares it so, in all versions.
    let api_version: unsafe extern "C" fn() -> std::ffi::c_long = unsafe { mem::transmute(found) };
    // SAFETY: takes nothing and returns a constant.
    let api = unsafe { api_version() } >> 16;
    let known = SLURM_RELEASES.iter().find(|(known, ..)| *known == api);
    known.map(|(_, _, release)| release << 8)
}

/// Whether a library of this file name is loaded in this process.
pub fn is_loaded(file: &'static CStr) -> bool {
    unsafe extern "C" fn look(
        info: *mut libc::dl_phdr_info,
        _size: libc::size_t,
        file: *mut c_void,
    ) -> c_int {
        // SAFETY: the loader gives a valid pointer, which lives through the call.
        let path = unsafe { (*info).dlpi_name };
        if path.is_null() {
            return 0;
        }
        // SAFETY: both are terminated strings; `file` is what `is_loaded` passes below.
        let (path, file) = unsafe { (CStr::from_ptr(path), CStr::from_ptr(file.cast())) };
        let base = path.to_bytes().rsplit(|byte| *byte == b'/').next();
        c_int::from(base == Some(file.to_bytes()))
    }
    // SAFETY: `look` only reads, and what it is given as data is the string it expects.
    unsafe { libc::dl_iterate_phdr(Some(look), file.as_ptr().cast_mut().cast()) != 0 }
}

fn symbol(name: &CStr) -> *mut c_void {
    // SAFETY: a terminated string; looking a name up has no other effect.
    unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) }
}

fn ok(code: sys::spank_err_t, tried: impl FnOnce() -> String) -> Result<(), String> {
    if code == sys::ESPANK_SUCCESS {
        return Ok(());
    }
    // SAFETY: takes a number and returns a string that lives as long as the process, or null.
    let why = unsafe { sys::spank_strerror(code) };
    let why = if why.is_null() {
        "unknown error".into()
    } else {
        // SAFETY: not null, terminated.
        unsafe { CStr::from_ptr(why) }.to_string_lossy()
    };
    Err(format!("{}: Slurm says: {why} ({code})", tried()))
}
