//! The JSON side of records: one pass over the text, nothing kept but the three fields.

use std::cell::Cell;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::de::{self, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{InstructRecord, Origin, RecordProblem, Records};
use crate::error::DataError;

/// Reads `[{..}, {..}]`.
pub(super) fn array(path: &Path, text: &str, found: &mut Records) -> Result<(), DataError> {
    let file: Arc<Path> = Arc::from(path);
    let read = Cell::new(0);
    let mut json = serde_json::Deserializer::from_str(text);
    let array = ArrayVisitor { file: &file, read: &read, found };
    de::Deserializer::deserialize_seq(&mut json, array).and_then(|()| json.end()).map_err(|error| {
        DataError::BrokenJson {
            path: path.to_path_buf(),
            line: error.line(),
            column: error.column(),
            records: read.get(),
            message: without_place(&error),
        }
    })
}

/// Reads one record a line; blank lines are passed over.
pub(super) fn lines(path: &Path, text: &str, found: &mut Records) -> Result<(), DataError> {
    let file: Arc<Path> = Arc::from(path);
    let mut record = 0;
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        record += 1;
        let origin = Origin { file: Arc::clone(&file), record, line: Some(index + 1) };
        let mut json = serde_json::Deserializer::from_str(line);
        match AnyRecord.deserialize(&mut json).and_then(|any| json.end().map(|()| any)) {
            Ok(any) => found.take(origin, any),
            Err(error) => {
                // An object spread over lines would give one complaint a line; say the one thing that helps.
                if record == 1 && serde_json::from_str::<IgnoredAny>(text).is_ok() {
                    return Err(DataError::NotAList { path: path.to_path_buf() });
                }
                let message = format!("broken JSON at column {}: {}", error.column(), without_place(&error));
                found.problems.push(RecordProblem { origin, message });
            }
        }
    }
    Ok(())
}

/// `serde_json`'s message without its " at line 1 column 2", which the caller says in its own way.
fn without_place(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    message.strip_suffix(&place).unwrap_or(&message).to_owned()
}

impl Records {
    /// Files a record away as good or bad.
    fn take(&mut self, origin: Origin, any: Any) {
        match any.into_record() {
            Ok((record, ignored)) => {
                self.records.push(record);
                self.origins.push(origin);
                for field in ignored {
                    *self.ignored_fields.entry(field).or_default() += 1;
                }
            }
            Err(message) => self.problems.push(RecordProblem { origin, message }),
        }
    }
}

struct ArrayVisitor<'a> {
    file: &'a Arc<Path>,
    read: &'a Cell<usize>,
    found: &'a mut Records,
}

impl<'de> Visitor<'de> for ArrayVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of records")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(any) = seq.next_element_seed(AnyRecord)? {
            self.read.set(self.read.get() + 1);
            let origin = Origin { file: Arc::clone(self.file), record: self.read.get(), line: None };
            self.found.take(origin, any);
        }
        Ok(())
    }
}

/// Any JSON value, as far as a record is concerned.
enum Any {
    Text(String),
    Object(Box<Fields>),
    /// Neither: "a number", "null", ..
    Other(&'static str),
}

/// The fields of an object, of whatever type they turned out to be.
#[derive(Default)]
struct Fields {
    instruction: Option<Any>,
    input: Option<Any>,
    output: Option<Any>,
    ignored: Vec<String>,
}

impl Any {
    fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "a string",
            Self::Object(_) => "an object",
            Self::Other(kind) => kind,
        }
    }

    /// The record and its other fields' names, or everything that is wrong with it.
    fn into_record(self) -> Result<(InstructRecord, Vec<String>), String> {
        let Self::Object(fields) = self else {
            return Err(format!("expected an object with instruction and output, found {}", self.kind()));
        };
        let mut wrong = Vec::new();
        let mut text = |name: &str, value: Option<Any>, optional: bool| match value {
            Some(Any::Text(text)) => text,
            None | Some(Any::Other("null")) if optional => String::new(),
            None => {
                wrong.push(format!("`{name}` is missing"));
                String::new()
            }
            Some(other) => {
                wrong.push(format!("`{name}` is {}, expected a string", other.kind()));
                String::new()
            }
        };
        let record = InstructRecord {
            instruction: text("instruction", fields.instruction, false),
            input: text("input", fields.input, true),
            output: text("output", fields.output, false),
        };
        if wrong.is_empty() { Ok((record, fields.ignored)) } else { Err(wrong.join("; ")) }
    }
}

/// Reads any JSON value without ever objecting to its type.
#[derive(Clone, Copy)]
struct AnyRecord;

/// Like [`AnyRecord`], for a field's value: the inside of an object is of no interest.
#[derive(Clone, Copy)]
struct AnyField;

macro_rules! any_visitor {
    ($name:ident, $map:expr) => {
        impl<'de> DeserializeSeed<'de> for $name {
            type Value = Any;

            fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Any, D::Error> {
                deserializer.deserialize_any(self)
            }
        }

        impl<'de> Visitor<'de> for $name {
            type Value = Any;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any JSON value")
            }

            fn visit_str<E>(self, text: &str) -> Result<Any, E> {
                Ok(Any::Text(text.to_owned()))
            }

            fn visit_unit<E>(self) -> Result<Any, E> {
                Ok(Any::Other("null"))
            }

            fn visit_bool<E>(self, _: bool) -> Result<Any, E> {
                Ok(Any::Other("true or false"))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Any, E> {
                Ok(Any::Other("a number"))
            }

            fn visit_u64<E>(self, _: u64) -> Result<Any, E> {
                Ok(Any::Other("a number"))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Any, E> {
                Ok(Any::Other("a number"))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Any, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Any::Other("a list"))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Any, A::Error> {
                $map(map)
            }
        }
    };
}

any_visitor!(AnyRecord, read_fields);
any_visitor!(AnyField, skip_fields);

fn skip_fields<'de, A: MapAccess<'de>>(mut map: A) -> Result<Any, A::Error> {
    while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
    Ok(Any::Object(Box::default()))
}

/// As everywhere in JSON's world, the last of two fields of one name counts.
fn read_fields<'de, A: MapAccess<'de>>(mut map: A) -> Result<Any, A::Error> {
    let mut fields = Fields::default();
    while let Some(name) = map.next_key::<String>()? {
        let slot = match name.as_str() {
            "instruction" => &mut fields.instruction,
            "input" => &mut fields.input,
            "output" => &mut fields.output,
            _ => {
                map.next_value::<IgnoredAny>()?;
                if !fields.ignored.contains(&name) {
                    fields.ignored.push(name);
                }
                continue;
            }
        };
        *slot = Some(map.next_value_seed(AnyField)?);
    }
    Ok(Any::Object(Box::new(fields)))
}
