//! Who listens to the spans of a step: a trace file, and the sums of a benchmark.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use miette::{IntoDiagnostic, Result, WrapErr};
use serde_json::{Map, Value, json};
use tracing::Subscriber;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::{LookupSpan, Registry, SpanRef};

/// Listens from now on: writes every span to the file `trace`, up to where the result is dropped, and
/// adds it to `totals`.
pub fn listen(trace: Option<&Path>, totals: Option<Totals>) -> Result<Option<EndOfTrace>> {
    let trace = trace.map(Trace::create).transpose()?;
    let end = trace.clone().map(EndOfTrace);
    // Libraries have spans of their own.
    let ours = filter_fn(|metadata| metadata.target().starts_with("pronk"));
    let listeners = Registry::default().with(ours).with(Clock).with(totals).with(trace);
    tracing::subscriber::set_global_default(listeners).into_diagnostic()?;
    Ok(end)
}

/// When a span was entered.
struct Entered(Instant);

/// Notes when spans are entered, for those that want to know when they are left.
struct Clock;

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Clock {
    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            span.extensions_mut().replace(Entered(Instant::now()));
        }
    }
}

/// How long ago a span was entered that is being left.
fn elapsed<'a, S: LookupSpan<'a>>(span: &SpanRef<'a, S>) -> Option<Duration> {
    span.extensions().get::<Entered>().map(|Entered(at)| at.elapsed())
}

/// How long spans took together, by name.
#[derive(Debug, Clone, Default)]
pub struct Totals(Arc<Mutex<BTreeMap<&'static str, Duration>>>);

impl Totals {
    /// Begins anew, and returns what was counted so far.
    pub fn take(&self) -> BTreeMap<&'static str, Duration> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Totals {
    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let Some(took) = elapsed(&span) else { return };
        let mut totals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *totals.entry(span.name()).or_default() += took;
    }
}

/// A file in Chrome's trace event format, which `chrome://tracing` and Perfetto open: an array of
/// events, a line each. Both do without its closing bracket, so a run that is killed leaves a trace too.
#[derive(Clone)]
struct Trace {
    start: Instant,
    out: Arc<Mutex<BufWriter<File>>>,
}

impl Trace {
    fn create(path: &Path) -> Result<Self> {
        let begin = || {
            let mut out = BufWriter::new(File::create(path)?);
            write!(out, "[{}", json!({"name": "pronk", "ph": "i", "ts": 0, "pid": 1, "tid": 1})).map(|()| out)
        };
        let out = begin().into_diagnostic().wrap_err_with(|| format!("--profile {}", path.display()))?;
        Ok(Self { start: Instant::now(), out: Arc::new(Mutex::new(out)) })
    }
}

/// Ends a trace when it is dropped.
pub struct EndOfTrace(Trace);

impl Drop for EndOfTrace {
    fn drop(&mut self) {
        let mut out = self.0.out.lock().unwrap_or_else(PoisonError::into_inner);
        // A full disk costs the profile, not the run.
        let _ = out.write_all(b"\n]\n").and_then(|()| out.flush());
    }
}

/// The thread as a trace shows it: the one that trains, or the one that writes saves meanwhile.
fn lane() -> u32 {
    if std::thread::current().name() == Some("save") { 2 } else { 1 }
}

/// The fields of a span, such as its layer.
#[derive(Default)]
struct Fields(Map<String, Value>);

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name().into(), format!("{value:?}").into());
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Trace {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let Some(took) = elapsed(&span) else { return };
        let microseconds = |d: Duration| d.as_secs_f64() * 1e6;
        let event = json!({
            "name": span.name(),
            "ph": "X", // a complete event: its begin and how long it took
            "ts": microseconds(self.start.elapsed().saturating_sub(took)),
            "dur": microseconds(took),
            "pid": 1,
            "tid": lane(),
            "args": span.extensions().get::<Fields>().map(|fields| fields.0.clone()),
        });
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        let last = span.parent().is_none();
        let _ = write!(out, ",\n{event}").and_then(|()| if last { out.flush() } else { Ok(()) });
    }
}

#[cfg(test)]
mod tests {
    use tracing::trace_span;

    use super::*;

    #[test]
    fn spans_add_up_by_name() {
        let totals = Totals::default();
        tracing::subscriber::with_default(Registry::default().with(Clock).with(totals.clone()), || {
            for _ in 0..2 {
                let _outer = trace_span!("outer").entered();
                trace_span!("inner").in_scope(|| std::thread::sleep(Duration::from_millis(2)));
            }
        });
        let found = totals.take();
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), ["inner", "outer"]);
        assert!(found["inner"] >= Duration::from_millis(4) && found["outer"] >= found["inner"], "{found:?}");
        assert!(totals.take().is_empty());
    }

    #[test]
    fn a_trace_is_json_that_nests() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        let trace = Trace::create(&path).unwrap();
        let end = EndOfTrace(trace.clone());
        tracing::subscriber::with_default(Registry::default().with(Clock).with(trace), || {
            let _step = trace_span!("step", step = 3_u64).entered();
            trace_span!("forward", layer = 7_usize).in_scope(|| std::thread::sleep(Duration::from_millis(1)));
        });
        let cut_short = std::fs::read_to_string(&path).unwrap();
        assert!(serde_json::from_str::<Value>(&(cut_short + "]")).is_ok(), "what a killed run leaves");
        drop(end);
        let events: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let [_, forward, step] = &events[..] else { panic!("{events:?}") };
        assert_eq!((&forward["name"], &forward["args"]["layer"]), (&"forward".into(), &7.into()));
        assert_eq!((&step["name"], &step["args"]["step"]), (&"step".into(), &3.into()));
        let range = |event: &Value| {
            let (begin, length) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
            (begin, begin + length)
        };
        let (inner, outer) = (range(forward), range(step));
        assert!(outer.0 <= inner.0 && inner.1 <= outer.1 + 1.0, "{inner:?} in {outer:?}");
    }
}
