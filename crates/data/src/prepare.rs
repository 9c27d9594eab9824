//! All records to rows, at once and on all cores.

use std::collections::HashSet;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::DataError;
use crate::example::{Tokenized, TokenizedExample, tokenize_with};
use crate::files;
use crate::order::shuffle;
use crate::prepared::{PreparedDataset, Rows};
use crate::record::{self, Records};
use crate::report::PrepareReport;
use crate::template::PromptTemplate;
use crate::tokenizer::TextTokenizer;

/// Goes into every key. Raise it whenever the same input begins to give other rows, so that old files are redone.
const FORMAT: u32 = 1;

/// The seed of the held-out choice. Fixed, so that evaluation losses of two runs over the same data compare,
/// whatever the seed of training.
const HELD_OUT_SEED: u64 = 42;

/// Records a worker takes at a time: enough to make the queue's cost vanish, few enough for all to end together.
const CHUNK: usize = 256;

/// What to prepare, and within which limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareConfig {
    /// The data files, read in this order.
    pub files: Vec<PathBuf>,
    /// A built-in template's name, or a template file's path.
    pub template: String,
    /// The longest row, in tokens; at least 2. Longer ones are cut at the right.
    pub max_seq_len: usize,
    /// Whether the prompt is learned too.
    pub train_on_inputs: bool,
    /// How many rows to hold out; 0 for none.
    pub val_size: usize,
    /// Whether to go on without the records that cannot be used.
    pub skip_bad: bool,
}

/// SHA-256 (hexadecimal) of everything that decides the prepared rows: the bytes of the data files, the template's
/// source, the tokenizer and the limits. A prepared file with the same key need not be prepared again.
pub fn key(
    config: &PrepareConfig,
    template: &PromptTemplate,
    tokenizer: &TextTokenizer,
) -> Result<String, DataError> {
    let mut digests = Vec::new();
    for path in &config.files {
        digests.push(Sha256::digest(record::load(path)?));
    }
    key_of(config, digests.iter().map(AsRef::as_ref), template, tokenizer)
}

fn key_of<'a>(
    config: &PrepareConfig,
    file_digests: impl Iterator<Item = &'a [u8]>,
    template: &PromptTemplate,
    tokenizer: &TextTokenizer,
) -> Result<String, DataError> {
    let PrepareConfig { files: _, template: _, max_seq_len, train_on_inputs, val_size, skip_bad } = config;
    let mut hasher = Sha256::new();
    let limits = format!("{FORMAT} {max_seq_len} {train_on_inputs} {val_size} {skip_bad}");
    files::hash_field(&mut hasher, limits.as_bytes());
    files::hash_field(&mut hasher, template.source().as_bytes());
    files::hash_field(&mut hasher, tokenizer.fingerprint()?.as_bytes());
    for digest in file_digests {
        files::hash_field(&mut hasher, digest);
    }
    Ok(files::hex(hasher))
}

/// Reads, renders and tokenizes all records. `progress` is told how many records of how many are done.
///
/// `val_size` rows are held out by a shuffle of its own, the same at every call; both parts keep file order.
pub fn prepare(
    config: &PrepareConfig,
    tokenizer: &TextTokenizer,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<PreparedDataset, DataError> {
    check(config)?;
    let template = PromptTemplate::load(&config.template)?;
    // Each file is read once, so that the key is sure to be that of the very bytes that were tokenized.
    let (key, records) = {
        let loaded = load(config)?;
        let digests: Vec<_> = loaded.iter().map(|(_, bytes)| Sha256::digest(bytes)).collect();
        let key = key_of(config, digests.iter().map(AsRef::as_ref), &template, tokenizer)?;
        (key, record::read_loaded(&loaded)?)
    };
    records.check(config.skip_bad)?;
    let mut report = first_counts(config, &records);
    let rows = kept(tokenize_all(&records, &template, tokenizer, config, progress)?, &mut report);
    if rows.is_empty() {
        return Err(nothing_left(config, &report));
    }
    let (train, validation) = hold_out(&rows, config.val_size)?;
    report.train_rows = train.len();
    report.validation_rows = validation.len();
    Ok(PreparedDataset {
        key,
        train,
        validation,
        report,
        template: template.name().to_owned(),
        max_seq_len: config.max_seq_len,
    })
}

fn check(config: &PrepareConfig) -> Result<(), DataError> {
    let setting = |name, value: String, message: &str| {
        Err(DataError::Setting { name, value, message: message.to_owned() })
    };
    if config.files.is_empty() {
        return setting("files", "[]".to_owned(), "expected at least one data file");
    }
    if config.max_seq_len < 2 {
        let value = config.max_seq_len.to_string();
        return setting("max_seq_len", value, "expected at least 2: one token to see, and one to predict");
    }
    Ok(())
}

fn load(config: &PrepareConfig) -> Result<Vec<(PathBuf, Vec<u8>)>, DataError> {
    let mut failures = Vec::new();
    let mut loaded = Vec::new();
    for path in &config.files {
        match record::load(path) {
            Ok(bytes) => loaded.push((path.clone(), bytes)),
            Err(error) => failures.push(error),
        }
    }
    match failures.len() {
        0 => Ok(loaded),
        1 => Err(failures.swap_remove(0)),
        _ => Err(DataError::Several(failures)),
    }
}

/// What can be counted before anything is tokenized.
fn first_counts(config: &PrepareConfig, records: &Records) -> PrepareReport {
    let mut seen = HashSet::with_capacity(records.records.len());
    PrepareReport {
        files: config.files.iter().map(|path| path.display().to_string()).collect(),
        records: records.records.len() + records.problems.len(),
        bad_records: records.problems.len(),
        duplicates: records.records.iter().filter(|record| !seen.insert(*record)).count(),
        empty_outputs: records.records.iter().filter(|record| record.output.trim().is_empty()).count(),
        ignored_fields: records.ignored_fields.clone(),
        ..PrepareReport::default()
    }
}

/// What became of each record, in order. Threads of its own rather than the tokenizers crate's batches, which the
/// environment variable `TOKENIZERS_PARALLELISM` can switch off.
fn tokenize_all(
    records: &Records,
    template: &PromptTemplate,
    tokenizer: &TextTokenizer,
    config: &PrepareConfig,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Tokenized>, DataError> {
    let total = records.records.len();
    let workers = thread::available_parallelism().map_or(1, NonZero::get).min(total.div_ceil(CHUNK)).max(1);
    let next = AtomicUsize::new(0);
    let mut parts = thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        for _ in 0..workers {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                let mut encoder = tokenizer.encoder();
                loop {
                    let first = next.fetch_add(CHUNK, Ordering::Relaxed);
                    let Some(chunk) =
                        records.records.get(first..total.min(first + CHUNK)).filter(|c| !c.is_empty())
                    else {
                        return;
                    };
                    let rows: Vec<Result<Tokenized, DataError>> = chunk
                        .iter()
                        .map(|r| {
                            tokenize_with(
                                &mut encoder,
                                r,
                                template,
                                config.max_seq_len,
                                config.train_on_inputs,
                            )
                        })
                        .collect();
                    if sender.send((first, rows)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender); // the loop below ends with the last worker
        let mut parts = Vec::with_capacity(total.div_ceil(CHUNK));
        let mut done = 0;
        for (first, rows) in receiver {
            done += rows.len();
            parts.push((first, rows));
            progress(done, total);
        }
        parts
    });
    parts.sort_unstable_by_key(|(first, _)| *first);
    let rows = parts.into_iter().flat_map(|(_, rows)| rows);
    let named = rows.zip(&records.origins).map(|(row, origin)| {
        row.map_err(|source| DataError::Record { origin: origin.clone(), source: Box::new(source) })
    });
    named.collect()
}

/// The rows there are; the others are counted.
fn kept(outcomes: Vec<Tokenized>, report: &mut PrepareReport) -> Vec<TokenizedExample> {
    let mut rows = Vec::with_capacity(outcomes.len());
    for outcome in outcomes {
        match outcome {
            Tokenized::Kept { example, truncated } => {
                report.truncated += usize::from(truncated);
                report.count_row(example.token_ids.len(), example.supervised());
                rows.push(example);
            }
            Tokenized::Dropped(reason) => *report.dropped.entry(reason).or_default() += 1,
        }
    }
    rows
}

fn nothing_left(config: &PrepareConfig, report: &PrepareReport) -> DataError {
    let mut reasons: Vec<String> =
        report.dropped.iter().map(|(why, count)| format!("{count} {why}")).collect();
    if report.bad_records > 0 {
        reasons.push(format!("{} bad", report.bad_records));
    }
    DataError::NothingLeft {
        records: report.records,
        max_seq_len: config.max_seq_len,
        reasons: reasons.join(", "),
    }
}

/// Splits off `size` rows; returns those to train on and those held out.
fn hold_out(rows: &[TokenizedExample], size: usize) -> Result<(Rows, Rows), DataError> {
    if size >= rows.len() {
        let message = format!(
            "expected fewer than the {} rows there are, so that some are left to train on",
            rows.len()
        );
        return Err(DataError::Setting { name: "val_size", value: size.to_string(), message });
    }
    let mut numbers: Vec<usize> = (0..rows.len()).collect();
    shuffle(&mut numbers, *b"pronk  held  out", HELD_OUT_SEED, 0);
    let held_out: HashSet<usize> = numbers.into_iter().take(size).collect();
    let (mut train, mut validation) = (Rows::default(), Rows::default());
    for (number, row) in rows.iter().enumerate() {
        if held_out.contains(&number) { validation.push(row.view()) } else { train.push(row.view()) }
    }
    Ok((train, validation))
}

#[cfg(test)]
mod tests;
