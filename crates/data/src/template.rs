//! Prompt templates: a conversation becomes text, and every piece of it is known to be prompt or response.
//!
//! A template is a chat template over `messages`, as Hugging Face's tokenizers carry them: the built-in ones are,
//! and the base's own is. A user's template may also be written over `instruction`, `input` and `output`.

mod built_in;
mod chat;
mod deep;
mod markers;
mod ollama;
mod python;
mod record_style;

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use minijinja::{Environment, UndefinedBehavior, Value};

use self::built_in::BUILT_IN;
use self::deep::deep;
use crate::error::DataError;
use crate::example::Learn;
use crate::files;
use crate::record::{Conversation, InstructRecord, Record};
use crate::tokenizer::TextTokenizer;

/// The name of the base's own template; `chat:NAME` is one of several.
const CHAT: &str = "chat";

/// What is done where a template cannot be read.
const READ: &str = "read the template";

/// minijinja instructions a single rendering of a record may take; a template over them takes about 20.
const FUEL: u64 = 100_000;

/// The same for a conversation, which may have hundreds of turns.
const CHAT_FUEL: u64 = 2_000_000;

/// A template beyond this many bytes is a mistaken path; and what it nests has to find room on a stack (`deep`).
const MAX_SOURCE: usize = 1 << 17;

/// The file beside an adapter that holds its template over `messages`, for pronk and for transformers.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// The same for a template over `instruction`, `input` and `output`, which only pronk reads.
pub const PROMPT_TEMPLATE: &str = "prompt_template.jinja";

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Given to the model; masked unless training on inputs.
    Prompt,
    /// What the model learns to say.
    Response,
}

/// A piece of a rendered record.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Segment {
    /// Who speaks.
    pub role: Role,
    /// The text; may be empty.
    pub text: String,
}

/// What a template is written over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    /// `messages`. Begin and end of the text are the template's own.
    Chat,
    /// `instruction`, `input` and `output`. The tokenizer's begin and end of a text go around it.
    Record,
}

/// Renders records to [`Segment`]s.
pub struct PromptTemplate {
    name: String,
    source: String,
    style: Style,
    environment: Arc<Environment<'static>>,
    /// `bos_token` and the like, as a template knows them.
    special: Value,
    /// The spelling of the tokens that end a text.
    eos: Vec<String>,
}

impl fmt::Debug for PromptTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PromptTemplate").field("name", &self.name).finish_non_exhaustive()
    }
}

impl PromptTemplate {
    /// The names of the built-in templates.
    pub fn names() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// A built-in template by name, the base's own ("chat"; "chat:NAME" where it has several), or the user's own
    /// from a file.
    pub fn load(name_or_path: &str, tokenizer: &TextTokenizer) -> Result<Self, DataError> {
        if let Some((name, source)) = BUILT_IN.iter().find(|(name, _)| *name == name_or_path) {
            // Chat templates write their own beginning of text.
            let bos = if tokenizer.bos().is_some() { "{{- bos_token -}}" } else { "" };
            return Self::new(name, &format!("{bos}{source}"), tokenizer);
        }
        let path = Path::new(name_or_path);
        let mut words = name_or_path.splitn(2, ':');
        if words.next() == Some(CHAT) && !path.exists() {
            return Self::new(name_or_path, tokenizer.named_chat_template(words.next())?, tokenizer);
        }
        if !path.exists() {
            return Err(unknown(name_or_path));
        }
        // It may be a link: the user named it.
        Self::from_file(path, std::fs::read(path).map_err(DataError::io(path, READ)), tokenizer)
    }

    fn from_file(
        path: &Path,
        bytes: Result<Vec<u8>, DataError>,
        tokenizer: &TextTokenizer,
    ) -> Result<Self, DataError> {
        let (bytes, name) = (bytes?, path.display().to_string());
        check_size(&name, bytes.len())?;
        Self::new(&name, files::text(path, &bytes)?, tokenizer)
    }

    /// The template that an adapter was trained with, where its folder `dir` holds one.
    pub fn of_adapter(dir: &Path, tokenizer: &TextTokenizer) -> Result<Option<Self>, DataError> {
        let stored = [CHAT_TEMPLATE, PROMPT_TEMPLATE].map(|name| dir.join(name));
        let found = stored.iter().find(|path| path.exists());
        found.map(|path| Self::from_file(path, files::read(path, READ), tokenizer)).transpose()
    }

    /// A template from its source. As usual with Jinja, one newline at the very end of `source` is left off.
    pub fn new(name: &str, source: &str, tokenizer: &TextTokenizer) -> Result<Self, DataError> {
        check_size(name, source.len())?;
        let special = tokenizer.special_tokens().into_iter().map(|(k, v)| (k, Value::from(v)));
        let special = Value::from_pairs(special);
        let eos = tokenizer.eos_ids().iter().filter_map(|&id| tokenizer.token(id)).collect();
        let own = (name.to_owned(), source.to_owned());
        deep(move || Self::parse(&own.0, &own.1, special, eos)).unwrap_or_else(|e| Err(no_thread(name, &e)))
    }

    fn parse(name: &str, source: &str, special: Value, eos: Vec<String>) -> Result<Self, DataError> {
        let mut environment = python::environment().map_err(|error| template_error(name, &error))?;
        let prepared = python::with_generation_calls(source);
        let parsed = environment.template_from_named_str(name, &prepared);
        let variables = parsed.map_err(|error| template_error(name, &error))?.undeclared_variables(false);
        let style = if variables.contains("messages") { Style::Chat } else { Style::Record };
        if style == Style::Record {
            environment = record_environment();
        }
        environment.set_formatter(python::write_value);
        environment.set_fuel(Some(if style == Style::Chat { CHAT_FUEL } else { FUEL }));
        environment
            .add_template_owned(
                name.to_owned(),
                if style == Style::Chat { prepared } else { source.to_owned() },
            )
            .map_err(|error| template_error(name, &error))?;
        let (name, source, environment) = (name.to_owned(), source.to_owned(), Arc::new(environment));
        let template = Self { name, source, style, environment, special, eos };
        template.probe()?;
        Ok(template)
    }

    /// Whether the answer appears must not depend on the input; better found now than at record 31,337.
    fn probe(&self) -> Result<(), DataError> {
        for input in ["", "input"] {
            let probe = InstructRecord {
                instruction: "instruction".to_owned(),
                input: input.to_owned(),
                output: "output".to_owned(),
            };
            let segments = self.conversation_segments(&probe.into(), Learn::All)?;
            let writes_answer = |s: &Segment| s.role == Role::Response && s.text.contains("output");
            if self.style == Style::Chat && !segments.iter().any(writes_answer) {
                return Err(self.error(
                    "never writes the assistant's message, so that there would be nothing to learn; it has to write \
                     the content of every message",
                ));
            }
        }
        Ok(())
    }

    /// The built-in name, or the path as given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The minijinja source; two templates of one source are one template.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The name under which it is stored with an adapter: [`CHAT_TEMPLATE`] or [`PROMPT_TEMPLATE`].
    pub fn file_name(&self) -> &'static str {
        match self.style {
            Style::Chat => CHAT_TEMPLATE,
            Style::Record => PROMPT_TEMPLATE,
        }
    }

    /// Writes it into the folder `dir`, for [`PromptTemplate::of_adapter`] to find.
    pub fn save(&self, dir: &Path) -> Result<(), DataError> {
        files::write_atomically(&dir.join(self.file_name()), &[self.source.as_bytes()], "write the template")
    }

    /// Whether the template itself writes the tokens that begin a text and end an answer.
    pub fn writes_special_tokens(&self) -> bool {
        self.style == Style::Chat
    }

    /// The record's text, cut where the speaker changes. A record that is text already is left as it is.
    ///
    /// For [`Learn::Last`] the answers before the last are told from the rest only where that is possible: some
    /// templates render a conversation otherwise than its beginning.
    pub fn render(&self, record: &Record, learn: Learn) -> Result<Vec<Segment>, DataError> {
        match record {
            Record::Conversation(conversation) => self.conversation_segments(conversation, learn),
            Record::Text { prompt, completion } => Ok(vec![
                Segment { role: Role::Prompt, text: prompt.clone() },
                Segment { role: Role::Response, text: completion.clone() },
            ]),
        }
    }

    /// The conversation up to where the model speaks: its last turn's output is left out.
    pub fn render_prompt(&self, conversation: &Conversation) -> Result<Vec<Segment>, DataError> {
        match self.style {
            Style::Chat => self.chat_prompt(conversation),
            Style::Record => self.record_prompt(conversation),
        }
    }

    fn conversation_segments(
        &self,
        conversation: &Conversation,
        learn: Learn,
    ) -> Result<Vec<Segment>, DataError> {
        match self.style {
            Style::Chat => self.chat_segments(conversation, learn),
            Style::Record => self.record_segments(conversation),
        }
    }

    fn fill(&self, context: Value) -> Result<String, DataError> {
        let (environment, name) = (Arc::clone(&self.environment), self.name.clone());
        deep(move || environment.get_template(&name)?.render(context))
            .map_err(|e| no_thread(&self.name, &e))?
            .map_err(|error| template_error(&self.name, &error))
    }

    fn error(&self, message: &str) -> DataError {
        DataError::Template { name: self.name.clone(), message: message.to_owned() }
    }
}

/// A user's template over a record: a name that it does not know is a typo.
fn record_environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment
}

/// Told before a file's bytes are taken for text, and of templates that come with a tokenizer.
fn check_size(name: &str, bytes: usize) -> Result<(), DataError> {
    if bytes <= MAX_SOURCE {
        return Ok(());
    }
    let message = format!("{bytes} bytes long; expected a prompt template of at most {MAX_SOURCE}");
    Err(DataError::Template { name: name.to_owned(), message })
}

/// What the system's refusal of a thread, or one that was given up, means for the template called `name`.
pub(crate) fn no_thread(name: &str, error: &io::Error) -> DataError {
    let message = if error.kind() == io::ErrorKind::TimedOut {
        let seconds = deep::PATIENCE.as_secs();
        format!(
            "not rendered after {seconds} s; look for a loop, or for values that hold others over and over"
        )
    } else {
        format!("cannot be rendered, as the system gives no thread for it ({error})")
    };
    DataError::Template { name: name.to_owned(), message }
}

fn template_error(name: &str, error: &minijinja::Error) -> DataError {
    let place = error.line().map_or_else(String::new, |line| format!("line {line}: "));
    let hint = match error.kind() {
        minijinja::ErrorKind::UndefinedError => {
            "; a template knows instruction, input and output, or messages and what transformers adds to them"
        }
        minijinja::ErrorKind::OutOfFuel => "; it took too many steps to render, look for a loop",
        _ => "",
    };
    let detail = error.detail().map_or_else(String::new, |detail| format!(": {detail}"));
    DataError::Template { name: name.to_owned(), message: format!("{place}{}{detail}{hint}", error.kind()) }
}

fn unknown(name: &str) -> DataError {
    let known = || PromptTemplate::names().chain([CHAT]);
    let suggestion = known()
        .map(|known| (strsim::jaro_winkler(known, name), known))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known.to_owned());
    let known = known().map(str::to_owned).collect();
    DataError::UnknownTemplate { name: name.to_owned(), suggestion, known }
}

#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod tests;
