//! All records to rows, on all cores and in bounded memory.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

mod held_out;
mod workers;

use crate::error::DataError;
use crate::example::{ExampleView, RowConfig, Tokenized};
use crate::files;
use crate::order::{Mixture, Part};
use crate::prepared::file::{About, Tensor, offsets, write};
use crate::prepared::{PreparedDataset, Rows};
use crate::record::{BadRecords, Columns, Found, RecordFormat, RecordProblem, RecordReader};
use crate::report::{FileReport, PrepareReport};
use crate::spool::{Column, Spool};
use crate::template::PromptTemplate;
use crate::tokenizer::TextTokenizer;

/// Goes into every key. Raise it whenever the same input begins to give other rows, so that old files are redone.
const FORMAT: u32 = 3;

/// A data file and its share.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataFile {
    /// Where it is.
    pub path: PathBuf,
    /// How often an epoch sees its rows; 1 is once. A fraction is a choice of rows, another each epoch.
    pub weight: f64,
}

impl From<PathBuf> for DataFile {
    fn from(path: PathBuf) -> Self {
        Self { path, weight: 1.0 }
    }
}

/// What to prepare, and within which limits.
#[derive(Debug, Clone, PartialEq)]
pub struct PrepareConfig {
    /// The data files, read in this order.
    pub files: Vec<DataFile>,
    /// How their records are written.
    pub format: RecordFormat,
    /// How their fields are called.
    pub columns: Columns,
    /// A built-in template's name, "chat", or a template file's path.
    pub template: String,
    /// How a record becomes a row.
    pub row: RowConfig,
    /// How many rows to hold out; 0 for none.
    pub val_size: usize,
    /// Whether to go on without the records that cannot be used.
    pub skip_bad: bool,
}

/// SHA-256 (hexadecimal) of everything that decides the prepared rows: the bytes of the data files, what is said of
/// them, the template's source, the tokenizer and the limits. A prepared file with the same key need not be prepared
/// again.
pub fn key(
    config: &PrepareConfig,
    template: &PromptTemplate,
    tokenizer: &TextTokenizer,
) -> Result<String, DataError> {
    let PrepareConfig { files: data, format, columns, template: _, row, val_size, skip_bad } = config;
    let mut hasher = Sha256::new();
    let said = serde_json::json!([FORMAT, format, columns, row, val_size, skip_bad]);
    files::hash_field(&mut hasher, said.to_string().as_bytes());
    files::hash_field(&mut hasher, template.source().as_bytes());
    files::hash_field(&mut hasher, tokenizer.fingerprint()?.as_bytes());
    for DataFile { path, weight } in data {
        files::hash_field(&mut hasher, &weight.to_le_bytes());
        files::hash_field(&mut hasher, &digest(path)?);
    }
    Ok(files::hex(hasher))
}

/// SHA-256 of a file of any size.
fn digest(path: &Path) -> Result<impl std::ops::Deref<Target = [u8]>, DataError> {
    let mut hasher = Sha256::new();
    let copied = File::open(path).and_then(|mut file| io::copy(&mut file, &mut hasher));
    copied.map_err(DataError::io(path, "read the data file"))?;
    Ok(hasher.finalize().to_vec())
}

/// Reads, renders and tokenizes all records, in memory that does not grow with them but for some 24 bytes a row: the
/// rows lie in files without a name in the folder `scratch`. `progress` is told how many bytes of how many are read.
pub fn prepare(
    config: &PrepareConfig,
    tokenizer: &TextTokenizer,
    scratch: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<SpooledRows, DataError> {
    check(config)?;
    let template = PromptTemplate::load(&config.template, tokenizer)?;
    let readers = open_all(config)?;
    let states = config.files.iter().map(|file| state(&file.path)).collect::<Result<Vec<_>, _>>()?;
    let key = key(config, &template, tokenizer)?;
    let mut rows = Collecting {
        spool: Spool::new(scratch)?,
        report: PrepareReport { template_markers: template.markers(tokenizer), ..PrepareReport::default() },
        bad: BadRecords::default(),
        seen: HashSet::new(),
        hashes: Vec::new(),
        rows_of: vec![0; config.files.len()],
    };
    rows.collect(readers, config, &template, tokenizer, progress)?;
    // The key is that of the very bytes that were tokenized, unless somebody wrote to them meanwhile.
    for (file, before) in config.files.iter().zip(states) {
        if state(&file.path)? != before {
            return Err(DataError::Changed { path: file.path.clone() });
        }
    }
    rows.finish(config, key, &template)
}

fn check(config: &PrepareConfig) -> Result<(), DataError> {
    let setting = |name, value: String, message: &str| {
        Err(DataError::Setting { name, value, message: message.to_owned() })
    };
    if config.files.is_empty() {
        return setting("files", "[]".to_owned(), "expected at least one data file");
    }
    let wrong = |file: &&DataFile| !(file.weight >= 0.0 && file.weight <= 1000.0);
    if let Some(file) = config.files.iter().find(wrong) {
        let message = format!("expected a number from 0 to 1000, for {}", file.path.display());
        return setting("weight", file.weight.to_string(), &message);
    }
    if config.row.max_seq_len < 2 {
        let value = config.row.max_seq_len.to_string();
        return setting("max_seq_len", value, "expected at least 2: one token to see, and one to predict");
    }
    Ok(())
}

/// All files, or all that is wrong with any.
fn open_all(config: &PrepareConfig) -> Result<Vec<RecordReader>, DataError> {
    let mut failures = Vec::new();
    let mut readers = Vec::new();
    for file in &config.files {
        match RecordReader::open(&file.path, config.format, &config.columns) {
            Ok(reader) => readers.push(reader),
            Err(error) => failures.push(error),
        }
    }
    match failures.len() {
        0 => Ok(readers),
        1 => Err(failures.swap_remove(0)),
        _ => Err(DataError::Several(failures)),
    }
}

/// What changes when a file is written to.
fn state(path: &Path) -> Result<impl PartialEq + use<>, DataError> {
    let read = || fs::metadata(path).and_then(|data| Ok((data.len(), data.modified()?)));
    read().map_err(DataError::io(path, "read the data file"))
}

/// What is known while records are read.
struct Collecting {
    spool: Spool,
    report: PrepareReport,
    bad: BadRecords,
    /// Hashes of the records: 8 bytes each, where two different ones of a hundred million meet once in 3000 times.
    seen: HashSet<u64>,
    /// Hashes of the rows.
    hashes: Vec<u64>,
    /// Rows of each file.
    rows_of: Vec<usize>,
}

impl Collecting {
    fn collect(
        &mut self,
        readers: Vec<RecordReader>,
        config: &PrepareConfig,
        template: &PromptTemplate,
        tokenizer: &TextTokenizer,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), DataError> {
        let total = config.files.iter().filter_map(|file| Some(fs::metadata(&file.path).ok()?.len())).sum();
        workers::run(template, tokenizer, config.row, |pool| {
            let mut read = 0;
            for (number, (mut reader, file)) in readers.into_iter().zip(&config.files).enumerate() {
                let before = self.report.records;
                while let Some(found) = reader.next() {
                    self.take(found?, number, config.skip_bad, pool)?;
                    if self.report.records.is_multiple_of(1024) {
                        progress(read + reader.bytes_read(), total);
                    }
                }
                read += reader.bytes_read();
                progress(read, total);
                self.report.files.push(FileReport {
                    path: file.path.display().to_string(),
                    format: reader.format(),
                    records: self.report.records - before,
                    weight: file.weight,
                });
            }
            self.bad.records = self.report.records;
            if !config.skip_bad && self.bad.count > 0 {
                return Err(DataError::BadRecords(std::mem::take(&mut self.bad)));
            }
            pool.finish(&mut |place, outcome| self.keep(place, outcome))
        })
    }

    /// Counts a record, and passes it on to be tokenized.
    fn take(
        &mut self,
        found: Found,
        file: usize,
        skip_bad: bool,
        pool: &mut workers::Pool<'_>,
    ) -> Result<(), DataError> {
        self.report.records += 1;
        let Found { origin, record } = found;
        let (record, ignored) = match record {
            Ok(good) => good,
            Err(message) => {
                self.bad.push(RecordProblem { origin, message });
                return Ok(());
            }
        };
        self.report.duplicates += usize::from(!self.seen.insert(hash_of(&record)));
        self.report.empty_outputs += usize::from(record.has_empty_output());
        for field in ignored {
            *self.report.ignored_fields.entry(field).or_default() += 1;
        }
        // Once there is a bad record that matters, the others are only read to name them all.
        if skip_bad || self.bad.count == 0 {
            pool.push((file, origin), record, &mut |place, outcome| self.keep(place, outcome))?;
        }
        Ok(())
    }

    /// A row if there is one; the others are counted.
    fn keep(&mut self, (file, origin): workers::Place, outcome: Tokenized) -> Result<(), DataError> {
        match outcome {
            Tokenized::Kept { example, answers, truncated } => {
                let row = ExampleView { answers: &answers, ..example.view() };
                self.report.truncated += usize::from(truncated);
                self.report.count_row(row);
                self.hashes.push(hash_of(&example.token_ids));
                self.rows_of.get_mut(file).into_iter().for_each(|rows| *rows += 1);
                self.spool.push(row)
            }
            Tokenized::Dropped(reason) => {
                self.report.count_dropped(reason, &origin);
                Ok(())
            }
        }
    }

    /// Holds rows out. Both parts keep file order.
    fn finish(
        mut self,
        config: &PrepareConfig,
        key: String,
        template: &PromptTemplate,
    ) -> Result<SpooledRows, DataError> {
        self.report.bad_records = self.bad.count;
        let rows = self.spool.rows();
        if rows == 0 {
            return Err(nothing_left(config, &self.report));
        }
        if config.val_size >= rows {
            let message =
                format!("expected fewer than the {rows} rows there are, so that some are left to train on");
            let value = config.val_size.to_string();
            return Err(DataError::Setting { name: "val_size", value, message });
        }
        let held_out = held_out::held_out(&self.hashes, config.val_size);
        if held_out.is_empty() && config.val_size > 0 {
            let message = "every row has more exact duplicates than that, and they have to lie on one side; expected \
                           more, or data without duplicates";
            let value = config.val_size.to_string();
            return Err(DataError::Setting { name: "val_size", value, message: message.to_owned() });
        }
        self.report.train_rows = rows - held_out.len();
        self.report.validation_rows = held_out.len();
        let mut first = 0;
        let parts = self.rows_of.iter().zip(&config.files).map(|(&rows, file)| {
            let held_out = (first..first + rows).filter(|row| held_out.contains(row)).count();
            first += rows;
            Part { rows: rows - held_out, weight: file.weight }
        });
        let mixture = Mixture::new(parts.collect());
        if mixture.epoch_rows() == 0 {
            let message = "expected weights that leave an epoch at least one row".to_owned();
            return Err(DataError::Setting { name: "weight", value: "0".to_owned(), message });
        }
        self.spool.flush()?;
        let Self { spool, report, .. } = self;
        let (template, max_seq_len) = (template.name().to_owned(), config.row.max_seq_len);
        Ok(SpooledRows { spool, held_out, key, mixture, report, template, max_seq_len })
    }
}

fn hash_of(content: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    hasher.finish()
}

fn nothing_left(config: &PrepareConfig, report: &PrepareReport) -> DataError {
    let mut reasons: Vec<String> =
        report.dropped.iter().map(|(why, count)| format!("{count} {why}")).collect();
    if report.bad_records > 0 {
        reasons.push(format!("{} bad", report.bad_records));
    }
    DataError::NothingLeft {
        records: report.records,
        max_seq_len: config.row.max_seq_len,
        reasons: reasons.join(", "),
    }
}

/// Prepared rows that are in no file yet.
pub struct SpooledRows {
    spool: Spool,
    held_out: HashSet<usize>,
    key: String,
    mixture: Mixture,
    /// What preparing them found.
    pub report: PrepareReport,
    template: String,
    max_seq_len: usize,
}

impl SpooledRows {
    /// Writes the file that [`PreparedDataset::read`] reads: to a temporary name beside `path`, synced, then
    /// renamed.
    pub fn write(self, path: &Path) -> Result<(), DataError> {
        let [train, validation] = self.ends();
        let about = About {
            key: Cow::Borrowed(&self.key),
            template: Cow::Borrowed(&self.template),
            max_seq_len: self.max_seq_len,
            mixture: Cow::Borrowed(&self.mixture),
            report: Cow::Borrowed(&self.report),
        };
        let tokens = |ends: &[u64]| ends.last().copied().unwrap_or(0);
        let (learned, kept) = (tokens(&train), tokens(&validation));
        let column = |held_out: bool, column, bytes| Tensor {
            bytes,
            write: Box::new({
                let (spool, all) = (&self.spool, &self.held_out);
                move |out| spool.copy(column, &|row| all.contains(&row) == held_out, out)
            }),
        };
        let tensors = [
            offsets(train.into_iter()),
            offsets(validation.into_iter()),
            column(false, Column::TokenIds, 4 * learned),
            column(true, Column::TokenIds, 4 * kept),
            column(false, Column::LossMask, learned),
            column(true, Column::LossMask, kept),
        ];
        write(path, about, tensors)
    }

    /// The rows in memory.
    pub fn load(self) -> Result<PreparedDataset, DataError> {
        let [train, validation] = self.ends();
        let rows = |held_out: bool, ends: Vec<u64>| {
            let read = |column| -> io::Result<Vec<u8>> {
                let mut bytes = Vec::new();
                self.spool.copy(column, &|row| self.held_out.contains(&row) == held_out, &mut bytes)?;
                Ok(bytes)
            };
            let ids = read(Column::TokenIds)?;
            let marks = read(Column::LossMask)?;
            let ids = ids.as_chunks().0.iter().map(|&id| u32::from_le_bytes(id)).collect();
            Ok(Rows::from_columns(ids, &marks, ends.into_iter().map(|end| end as usize).collect()))
        };
        let read = |failure: io::Error| {
            DataError::io(self.spool.dir(), "read the prepared rows in this folder")(failure)
        };
        Ok(PreparedDataset {
            train: rows(false, train).map_err(read)?,
            validation: rows(true, validation).map_err(read)?,
            key: self.key,
            mixture: self.mixture,
            report: self.report,
            template: self.template,
            max_seq_len: self.max_seq_len,
        })
    }

    /// Where rows begin and the last one ends, in tokens: of those to train on, and of those held out.
    fn ends(&self) -> [Vec<u64>; 2] {
        let mut parts = [vec![0], vec![0]];
        for row in 0..self.spool.rows() {
            let [train, validation] = &mut parts;
            let part = if self.held_out.contains(&row) { validation } else { train };
            part.push(part.last().copied().unwrap_or(0) + self.spool.tokens(row));
        }
        parts
    }
}

#[cfg(test)]
mod tests;
