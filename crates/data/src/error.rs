//! Everything that can go wrong on the way from a data file to a batch.

use std::fmt;
use std::path::PathBuf;

use crate::record::{BadRecords, Origin};

/// The one error of this crate. Every message says where, what was expected, what was found and what to do.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The operating system refused to read or write a file.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or directory concerned.
        path: PathBuf,
        /// What was being done, as in "cannot read the data file".
        action: &'static str,
        /// The system's own words.
        source: std::io::Error,
    },
    /// A text file holds bytes that are no UTF-8.
    #[error(
        "{}: invalid UTF-8 at byte {offset} (line {line}); save the file as UTF-8, for instance with \
         `iconv -t UTF-8`",
        path.display()
    )]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// 0-based offset of the first byte that does not belong to a valid character.
        offset: usize,
        /// 1-based line of that byte.
        line: usize,
    },
    /// A data file of nothing, or of nothing but white space.
    #[error("{}: the file is empty; expected a JSON array of records, one JSON record a line, or a table", path.display())]
    EmptyFile {
        /// The file.
        path: PathBuf,
    },
    /// A well-formed data file without a single record.
    #[error("{}: the file holds no record; expected at least one {{\"instruction\": .., \"output\": ..}}", path.display())]
    NoRecords {
        /// The file.
        path: PathBuf,
    },
    /// A JSON array that does not parse, so that nothing after the break can be trusted.
    #[error(
        "{}: broken JSON at line {line}, column {column}, after {records} whole records: {message}",
        path.display()
    )]
    BrokenJson {
        /// The file.
        path: PathBuf,
        /// 1-based line of the break.
        line: usize,
        /// 1-based column of the break.
        column: usize,
        /// How many records had been read before it.
        records: usize,
        /// What the JSON reader expected.
        message: String,
    },
    /// One JSON value that is no list of records, such as `{"data": [..]}`.
    #[error(
        "{}: the file is one JSON object; expected a JSON array of records `[{{..}}, {{..}}]`, or one record a \
         line. If the records sit inside a field, take them out, for instance with `jq .data`",
        path.display()
    )]
    NotAList {
        /// The file.
        path: PathBuf,
    },
    /// A record that goes on and on.
    #[error(
        "{origin}: it is longer than {most} MiB, the most that a record may be; expected a JSON array of records \
         `[{{..}}, {{..}}]`, one record a line, or a table with a record a row. Cut it into several, or leave it out"
    )]
    TooLong {
        /// Which record.
        origin: Origin,
        /// The limit, in MiB.
        most: usize,
    },
    /// A table whose columns are strangers.
    #[error(
        "{}: the columns are {found}; expected instruction and output, prompt and completion, or text. Name them by \
         data.columns in a recipe, or --column instruction=question",
        path.display()
    )]
    Columns {
        /// The file.
        path: PathBuf,
        /// The names in its first row.
        found: String,
    },
    /// A Parquet or Arrow file that cannot be read to its end.
    #[error(
        "{}: cannot be read as {kind} after {records} whole records: {message}; download it, or write it, again",
        path.display()
    )]
    BrokenTable {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
        /// How many records had been read before.
        records: usize,
        /// What its reader says.
        message: String,
    },
    /// A Parquet file inside a compressed one.
    #[error("{}: a Parquet file packed by gzip or zstd, which can be read unpacked alone; unpack it", path.display())]
    PackedParquet {
        /// The file.
        path: PathBuf,
    },
    /// A file that was written to while it was read.
    #[error("{}: the file changed while it was read; prepare it again when nobody writes to it", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Records that cannot be used.
    #[error("{0}")]
    BadRecords(BadRecords),
    /// More than one file failed as a whole.
    #[error("{}", Lines(.0))]
    Several(Vec<DataError>),
    /// A template that is neither built in nor a file.
    #[error(
        "template {name:?}: no built-in template and no file of this name{}; built in are {}",
        suggest(.suggestion.as_deref()), .known.join(", ")
    )]
    UnknownTemplate {
        /// What was asked for.
        name: String,
        /// The built-in name nearest to it.
        suggestion: Option<String>,
        /// All built-in names.
        known: Vec<String>,
    },
    /// A template that does not parse, does not render, or leaves unclear where the response is.
    #[error("template {name}: {message}")]
    Template {
        /// Name or path.
        name: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// A tokenizer that cannot be read, built or trusted.
    #[error("tokenizer {place}: {message}")]
    Tokenizer {
        /// File, directory or "of the GGUF file".
        place: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// Tokens that cannot be added to a tokenizer.
    #[error("{place}: {message}")]
    AddedTokens {
        /// The knob or the file that names them.
        place: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// A record that reads well but could not be rendered or tokenized.
    #[error("{origin}: {source}")]
    Record {
        /// Which record.
        origin: Origin,
        /// What happened.
        source: Box<DataError>,
    },
    /// A setting outside its range.
    #[error("{name} = {value}: {message}")]
    Setting {
        /// The setting's name, as in a recipe.
        name: &'static str,
        /// What it was set to.
        value: String,
        /// What was expected and what to do.
        message: String,
    },
    /// Every row was dropped.
    #[error(
        "none of {records} records is left to train on: {reasons}; raise max_seq_len = {max_seq_len}, or shorten \
         the prompts"
    )]
    NothingLeft {
        /// Records read.
        records: usize,
        /// The limit in force, in tokens.
        max_seq_len: usize,
        /// Each reason with its count.
        reasons: String,
    },
    /// A file that is no prepared dataset, or a damaged one.
    #[error("{}: {message}; run `pronk prep` to write it anew", path.display())]
    Prepared {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        message: String,
    },
}

impl DataError {
    /// A table with these columns.
    pub(crate) fn unknown_columns(path: &std::path::Path, names: &[String]) -> Self {
        Self::Columns { path: path.to_path_buf(), found: names.join(", ").chars().take(200).collect() }
    }

    /// For `map_err`: names the file and the deed.
    pub(crate) fn io(path: &std::path::Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, action, source }
    }
}

/// " (did you mean "x"?)", or nothing.
fn suggest(suggestion: Option<&str>) -> String {
    suggestion.map_or_else(String::new, |name| format!(" (did you mean {name:?}?)"))
}

/// Shows each error on a line of its own.
struct Lines<'a>(&'a [DataError]);

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.0.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}
