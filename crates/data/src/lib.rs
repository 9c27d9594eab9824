//! The way of the data, from a file of instructions to the tokens a training step sees. No tensors here.
//!
//! One file per station, in the order a record passes them:
//!
//! 1. [`record`]: data files of many kinds to [`Record`]s, every bad one named
//! 2. [`template`]: a [`PromptTemplate`] renders a record to prompt and response segments
//! 3. [`tokenizer`]: [`TextTokenizer`], from a Hugging Face directory or a GGUF vocabulary
//! 4. [`example`]: a [`TokenizedExample`], token ids and which of them are labels
//! 5. [`prepare`](mod@prepare): all records on all cores, as [`SpooledRows`] with a [`PrepareReport`]
//! 6. [`prepared`]: the [`PreparedDataset`] and its file
//!    ([`checks`] looks for what would spoil a run)
//! 7. [`order`]: which row comes when
//! 8. [`batch`]: rows laid end to end, without padding, as a [`PackedBatch`]

pub mod batch;
pub mod checks;
pub mod error;
pub mod example;
mod files;
pub mod gguf_vocabulary;
mod guarded;
pub mod order;
pub mod prepare;
pub mod prepared;
pub mod record;
pub mod report;
mod spool;
pub mod template;
pub mod tokenizer;

pub use batch::{MicroBatches, PackedBatch};
pub use checks::{Check, Finding, check};
pub use error::DataError;
pub use example::{
    DropReason, ExampleView, Learn, RowConfig, Tokenized, TokenizedExample, tokenize, tokenize_prompt,
};
pub use gguf_vocabulary::GgufVocabulary;
pub use guarded::is_guarded;
pub use order::{Mixture, Order, Part, epoch_order};
pub use prepare::{DataFile, PrepareConfig, SpooledRows, key, prepare};
pub use prepared::{PreparedDataset, Rows};
pub use record::{
    BadRecords, Columns, Conversation, Found, InstructRecord, Origin, Question, Record, RecordFormat,
    RecordProblem, RecordReader,
};
pub use report::{FileReport, PrepareReport};
pub use template::{CHAT_TEMPLATE, PROMPT_TEMPLATE, PromptTemplate, Role, Segment};
pub use tokenizer::{DecodeStream, Encoder, TextTokenizer};
