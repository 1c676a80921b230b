//! What is loaded into every process under DMTCP beside DMTCP's own library: an `sbrk` that knows
//! where the heap may grow after a restart. `build.rs` makes it a shared library of its own; why it
//! is there is said in `heap/mod.rs`.
//!
//! It needs two symbols of any glibc and nothing else, so that it can be loaded in every image.
#![no_std]

use core::ffi::{c_int, c_void};
use core::ptr;

#[link(name = "c")]
unsafe extern "C" {
    /// Where glibc takes the heap to end.
    static mut __curbrk: *mut c_void;
    /// Sets the heap's end, and [`__curbrk`] to what the kernel says then; if `end` is null to what
    /// the kernel has.
    fn brk(end: *mut c_void) -> c_int;
}

/// As sbrk(2), but that after an increment of 0, with which DMTCP asks at every restart, the heap
/// goes on from the kernel's own end where that is higher than the one that was saved. DMTCP still
/// gets the saved one: it needs to do nothing then, and would say so on standard error.
///
/// # Safety
/// As of sbrk(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sbrk(increment: isize) -> *mut c_void {
    // SAFETY: glibc's own variable, used as glibc does: without a lock, as callers of sbrk(2) are
    // to have one.
    unsafe {
        if __curbrk.is_null() {
            brk(ptr::null_mut());
        }
        let end = __curbrk;
        if increment == 0 {
            brk(ptr::null_mut());
            if __curbrk < end {
                __curbrk = end;
            }
            return end;
        }
        match brk(end.wrapping_byte_offset(increment)) {
            0 => end,
            _ => ptr::without_provenance_mut(usize::MAX),
        }
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
