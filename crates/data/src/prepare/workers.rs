//! Threads that render and tokenize. Of our own rather than the tokenizers crate's batches, which the environment
//! variable `TOKENIZERS_PARALLELISM` can switch off.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::error::DataError;
use crate::example::{RowConfig, Tokenized, tokenize};
use crate::record::{Origin, Record};
use crate::template::{PromptTemplate, no_thread};
use crate::tokenizer::{Encoder, TextTokenizer};

/// Records a worker takes at a time: enough to make the queue's cost vanish, few enough for all to end together.
pub(super) const CHUNK: usize = 256;

/// The number of a record's file, and where it stands there.
pub(super) type Place = (usize, Origin);
type Records = Vec<(Place, Record)>;
type Outcomes = Result<Vec<(Place, Tokenized)>, DataError>;

/// Takes what became of records, in the order of the records.
pub(super) type Keep<'a> = &'a mut dyn FnMut(Place, Tokenized) -> Result<(), DataError>;

/// The way to the workers and back.
pub(super) struct Pool<'a> {
    /// Until all is sent.
    work: Option<SyncSender<(usize, Records)>>,
    done: &'a Receiver<(usize, Outcomes)>,
    chunk: Records,
    sent: usize,
    kept: usize,
    /// Done before an earlier chunk was.
    early: BTreeMap<usize, Outcomes>,
}

/// Runs `feed` with workers at its service, one for each core.
pub(super) fn run(
    template: &PromptTemplate,
    tokenizer: &TextTokenizer,
    config: RowConfig,
    feed: impl FnOnce(&mut Pool<'_>) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let workers = thread::available_parallelism().map_or(1, NonZero::get);
    // Bounded: reading waits for the workers, and memory does not grow with the file.
    let (work, queue) = mpsc::sync_channel::<(usize, Records)>(2 * workers);
    let (finished, done) = mpsc::channel();
    let queue = Arc::new(Mutex::new(queue));
    thread::scope(|scope| {
        for _ in 0..workers {
            let (queue, finished) = (Arc::clone(&queue), finished.clone());
            let work = move || {
                let mut encoder = tokenizer.encoder();
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((number, records)) = next else { return };
                    let rows = tokenize_chunk(&mut encoder, records, template, config);
                    if finished.send((number, rows)).is_err() {
                        return;
                    }
                }
            };
            let spawned = thread::Builder::new().spawn_scoped(scope, work);
            spawned.map_err(|error| no_thread(template.name(), &error))?;
        }
        // Both ends of both queues are the workers' own now: if one panics, nobody waits for it.
        drop((finished, queue));
        let mut pool = Pool {
            work: Some(work),
            done: &done,
            chunk: Vec::new(),
            sent: 0,
            kept: 0,
            early: BTreeMap::new(),
        };
        feed(&mut pool) // the pool goes with it, and the workers find their queue closed
    })
}

fn tokenize_chunk(
    encoder: &mut Encoder<'_>,
    records: Records,
    template: &PromptTemplate,
    config: RowConfig,
) -> Outcomes {
    let rows = records.into_iter().map(|((file, origin), record)| {
        match tokenize(encoder, &record, template, config) {
            Ok(row) => Ok(((file, origin), row)),
            Err(source) => Err(DataError::Record { origin, source: Box::new(source) }),
        }
    });
    rows.collect()
}

impl Pool<'_> {
    /// Passes a record on; `keep` gets the rows that are done meanwhile.
    pub(super) fn push(&mut self, place: Place, record: Record, keep: Keep<'_>) -> Result<(), DataError> {
        self.chunk.push((place, record));
        if self.chunk.len() < CHUNK {
            return Ok(());
        }
        self.send();
        while let Ok((number, rows)) = self.done.try_recv() {
            self.early.insert(number, rows);
        }
        self.keep_in_order(keep)
    }

    /// Waits for the rows of all records.
    pub(super) fn finish(&mut self, keep: Keep<'_>) -> Result<(), DataError> {
        if !self.chunk.is_empty() {
            self.send();
        }
        self.work = None;
        self.keep_in_order(keep)?;
        while self.kept < self.sent {
            let Ok((number, rows)) = self.done.recv() else { break };
            self.early.insert(number, rows);
            self.keep_in_order(keep)?;
        }
        Ok(())
    }

    fn send(&mut self) {
        let chunk = (self.sent, std::mem::take(&mut self.chunk));
        // No worker ends before this queue does, unless it panicked; the scope will tell.
        if let Some(work) = &self.work {
            let _ = work.send(chunk);
        }
        self.sent += 1;
    }

    fn keep_in_order(&mut self, keep: Keep<'_>) -> Result<(), DataError> {
        while let Some(rows) = self.early.remove(&self.kept) {
            self.kept += 1;
            for (place, row) in rows? {
                keep(place, row)?;
            }
        }
        Ok(())
    }
}
