//! Foreign readers that panic on some damaged files: to be told as errors, like any other damage.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is inside a reader whose panics become errors. A panic hook that asks need not speak of them.
pub fn is_guarded() -> bool {
    GUARDED.get()
}

/// Runs `read`; its panic is an error. What it wrote to is not to be used afterwards.
pub(crate) fn guarded<T>(read: impl FnOnce() -> T) -> Result<T, String> {
    let before = GUARDED.replace(true);
    let done = catch_unwind(AssertUnwindSafe(read));
    GUARDED.set(before);
    done.map_err(|panic| {
        format!("damaged in a way that its reader does not know ({})", words(panic.as_ref()))
    })
}

fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked")
}
