//! What a profile shows: the parts of a step, as spans of `tracing`. Where nobody listens they cost
//! a look at a flag.

use burn::tensor::Device;
use tracing::Span;

/// Does `work` in `span`, which ends when the device is done with it. Only where somebody listens is
/// a device waited for that computes on its own.
pub(crate) fn spanned<T>(span: &Span, device: &Device, work: impl FnOnce() -> T) -> T {
    let _entered = span.enter();
    let result = work();
    if !span.is_disabled() {
        // What fails there fails again, with its error, where a result is read.
        let _ = device.sync();
    }
    result
}
