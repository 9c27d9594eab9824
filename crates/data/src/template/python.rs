//! What chat templates expect of their world: Jinja2 in Python, with the additions of transformers'
//! `utils/chat_template_utils.py`.

use std::io::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, Output, State, UndefinedBehavior, escape_formatter,
};
use minijinja_contrib::pycompat;
use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, PrettyFormatter, Serializer};

/// Stands before what a `{% generation %}` block wrote, in a rendering.
pub(super) const OPEN: char = '\u{f8f0}';
/// Stands after it.
pub(super) const CLOSE: char = '\u{f8f1}';

/// The function that a `{% generation %}` block becomes a call of.
const GENERATION: &str = "__generation";

/// An environment in which chat templates mean what they mean in transformers.
pub(super) fn environment() -> Result<Environment<'static>, Error> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_syntax(syntax);
    environment.set_unknown_method_callback(method);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_function(GENERATION, generation);
    Ok(environment)
}

/// transformers' own `{% generation %}` block, as the call that it is there too: the same scope, the same
/// treatment of white space.
pub(super) fn with_generation_calls(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        text.push_str(before);
        let Some(end) = tag.find("%}") else { break };
        let (tag, after) = tag.split_at(end);
        let word = tag.trim_start_matches(['{', '%', '-', '+']).trim_end_matches(['-', '+']).trim();
        text.push_str(&match word {
            "generation" => tag.replacen("generation", &format!("call {GENERATION}()"), 1),
            "endgeneration" => tag.replacen("endgeneration", "endcall", 1),
            _ => tag.to_owned(),
        });
        rest = after;
    }
    text.push_str(rest);
    text
}

#[allow(clippy::needless_pass_by_value)] // as minijinja calls it
fn generation(state: &mut State, arguments: Kwargs) -> Result<String, Error> {
    let body: Value = arguments.get::<Value>("caller")?.call(state, &[])?;
    Ok(format!("{OPEN}{body}{CLOSE}"))
}

/// What a template writes of a value. One that holds others takes a step for every byte: it may hold them over and over.
pub(super) fn write_value(output: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    if matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
        // Written in vain first, so that what is too large never is in memory.
        write!(Fuelled(state), "{value}").map_err(|_| Error::from(ErrorKind::OutOfFuel))?;
    }
    escape_formatter(output, state, value)
}

/// Python's methods of strings, lists and dictionaries. `str.format` takes a step for every byte of the widths that it
/// is asked for.
fn method(state: &mut State, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    if let ("format", Some(format)) = (method, value.as_str()) {
        let fields = format.split('{').skip(1).filter_map(|rest| rest.split('}').next());
        let numbers = fields.flat_map(|field| field.split(|c: char| !c.is_ascii_digit()));
        let widths = numbers.filter(|digits| !digits.is_empty());
        let bytes = widths.map(|digits| digits.parse().unwrap_or(u64::MAX)).fold(0, u64::saturating_add);
        state.consume_fuel(bytes)?;
    }
    pycompat::unknown_method_callback(state, value, method, arguments)
}

fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, format!("the template refuses: {message}")))
}

/// Python's `datetime.now().strftime(format)`.
fn strftime_now(format: &str) -> Result<String, Error> {
    use std::fmt::Write;
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(format)).map_err(|_| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now: unknown format {format:?}"))
    })?;
    Ok(text)
}

/// Spaces that a line of JSON is indented by, level by level, at most.
const MAX_INDENT: usize = 64;

/// Python's `json.dumps` with the arguments that transformers passes on: nothing is escaped for HTML.
///
/// Takes a step of the template's for every byte: a value may hold others many times over.
#[allow(clippy::needless_pass_by_value)] // as minijinja calls it
fn tojson(state: &State, value: &Value, indent: Option<Value>, arguments: Kwargs) -> Result<String, Error> {
    let indent = indent.or(arguments.get::<Option<Value>>("indent")?).filter(|indent| !indent.is_none());
    let ascii: bool = arguments.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sorted: bool = arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators: Option<Vec<String>> = arguments.get("separators")?;
    arguments.assert_all_used()?;
    let failed = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    // In vain first, as in `write_value`.
    serde_json::to_writer(Fuelled(state), value).map_err(failed)?;
    let mut json = serde_json::to_value(value).map_err(failed)?;
    if sorted {
        json.sort_all_objects();
    }
    let indent = indent.map(usize::try_from).transpose()?;
    if let Some(width @ MAX_INDENT..) = indent {
        let message = format!("tojson: expected an indent of less than {MAX_INDENT}, found {width}");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    let indent = indent.map(|width| " ".repeat(width));
    let mut separators = separators.unwrap_or_default().into_iter();
    let item = if indent.is_some() { "," } else { ", " };
    let item = separators.next().unwrap_or_else(|| item.to_owned());
    let key = separators.next().unwrap_or_else(|| ": ".to_owned());
    let mut bytes = Vec::new();
    let pretty = indent.as_ref().map(|indent| PrettyFormatter::with_indent(indent.as_bytes()));
    let style = Python { item, key, ascii, pretty };
    json.serialize(&mut Serializer::with_formatter(&mut bytes, style)).map_err(failed)?;
    String::from_utf8(bytes).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// Takes steps for bytes, and fails where none are left.
struct Fuelled<'a, 'b, 'c>(&'a State<'b, 'c>);

impl io::Write for Fuelled<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.consume_fuel(bytes.len() as u64).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How Python writes JSON.
struct Python<'a> {
    item: String,
    key: String,
    ascii: bool,
    /// Keeps track of the depth where lines are indented.
    pretty: Option<PrettyFormatter<'a>>,
}

impl Python<'_> {
    /// What stands between two items: `serde_json`'s indentation, with our separator before it.
    fn separate<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
        begin: impl Fn(&mut PrettyFormatter<'_>, &mut Vec<u8>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut line = Vec::new();
        if let Some(pretty) = &mut self.pretty {
            begin(pretty, &mut line)?;
        }
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        writer.write_all(line.strip_prefix(b",").unwrap_or(&line))
    }
}

impl Formatter for Python<'_> {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        match &mut self.pretty {
            Some(pretty) => pretty.begin_array(writer),
            None => writer.write_all(b"["),
        }
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        match &mut self.pretty {
            Some(pretty) => pretty.end_array(writer),
            None => writer.write_all(b"]"),
        }
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.separate(writer, first, |pretty, line| pretty.begin_array_value(line, first))
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.pretty.as_mut().map_or(Ok(()), |pretty| pretty.end_array_value(writer))
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        match &mut self.pretty {
            Some(pretty) => pretty.begin_object(writer),
            None => writer.write_all(b"{"),
        }
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        match &mut self.pretty {
            Some(pretty) => pretty.end_object(writer),
            None => writer.write_all(b"}"),
        }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.separate(writer, first, |pretty, line| pretty.begin_object_key(line, first))
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.pretty.as_mut().map_or(Ok(()), |pretty| pretty.end_object_value(writer))
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        if !self.ascii {
            return writer.write_all(fragment.as_bytes());
        }
        let mut units = [0; 2];
        for character in fragment.chars() {
            if character.is_ascii() {
                write!(writer, "{character}")?;
            } else {
                for unit in character.encode_utf16(&mut units) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        serde_json::ser::CompactFormatter.write_char_escape(writer, escape)
    }
}
