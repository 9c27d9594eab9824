//! Prompt templates: a record becomes text, and every piece of it is known to be prompt or response.
//!
//! All templates, the built-in ones too, are minijinja sources over `instruction`, `input` and `output`. The
//! response is found by rendering twice, once with the answer and once with a marker in its place that occurs
//! nowhere else: what precedes the marker is the prompt. Nothing is ever searched for "### Response:", which an
//! instruction may well contain.

use std::fmt;
use std::path::Path;

use minijinja::{Environment, UndefinedBehavior, context};

use crate::error::DataError;
use crate::files;
use crate::record::InstructRecord;

/// The published Stanford Alpaca prompts.
const ALPACA: &str = "\
{%- if input -%}
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{{ instruction }}

### Input:
{{ input }}

### Response:
{% else -%}
Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
{{ instruction }}

### Response:
{% endif -%}
{{ output }}";

/// Alpaca without its preamble: some 20 tokens less a row.
const ALPACA_SHORT: &str = "\
### Instruction:
{{ instruction }}
{% if input %}
### Input:
{{ input }}
{% endif %}
### Response:
{{ output }}";

/// Vicuna 1.1's conversation of one turn; an input follows its instruction after a blank line.
const VICUNA: &str = "\
A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, \
and polite answers to the user's questions. USER: {{ instruction }}\
{% if input %}

{{ input }}{% endif %} ASSISTANT: {{ output }}";

const BUILT_IN: [(&str, &str); 3] = [("alpaca", ALPACA), ("alpaca-short", ALPACA_SHORT), ("vicuna", VICUNA)];

/// minijinja instructions a single rendering may take; the built-in templates take about 20.
const FUEL: u64 = 100_000;

/// A template file beyond this many bytes is a mistaken path.
const MAX_SOURCE: usize = 1 << 20;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Given to the model; masked unless training on inputs.
    Prompt,
    /// What the model learns to say.
    Response,
}

/// A piece of a rendered record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Who speaks.
    pub role: Role,
    /// The text; may be empty.
    pub text: String,
}

/// Renders records to [`Segment`]s.
pub struct PromptTemplate {
    name: String,
    source: String,
    environment: Environment<'static>,
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

    /// A built-in template by name, or the user's own from a file.
    pub fn load(name_or_path: &str) -> Result<Self, DataError> {
        if let Some((name, source)) = BUILT_IN.iter().find(|(name, _)| *name == name_or_path) {
            return Self::new(name, source);
        }
        let path = Path::new(name_or_path);
        if !path.exists() {
            return Err(unknown(name_or_path));
        }
        let bytes = files::read(path, "read the template")?;
        if bytes.len() > MAX_SOURCE {
            let message =
                format!("{} bytes long; expected a prompt template of at most {MAX_SOURCE}", bytes.len());
            return Err(DataError::Template { name: name_or_path.to_owned(), message });
        }
        Self::new(name_or_path, files::text(path, &bytes)?)
    }

    /// A template from its source. As usual with Jinja, one newline at the very end of `source` is left off.
    pub fn new(name: &str, source: &str) -> Result<Self, DataError> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment
            .add_template_owned(name.to_owned(), source.to_owned())
            .map_err(|error| template_error(name, &error))?;
        let template = Self { name: name.to_owned(), source: source.to_owned(), environment };
        // Whether the answer appears must not depend on the input; better found now than at record 31,337.
        for input in ["", "input"] {
            let probe = InstructRecord {
                instruction: "instruction".to_owned(),
                input: input.to_owned(),
                output: "output".to_owned(),
            };
            template.render(&probe)?;
        }
        Ok(template)
    }

    /// The built-in name, or the path as given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The minijinja source; two templates of one source are one template.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt, then the response. Text that the template has after the output belongs to the response.
    pub fn render(&self, record: &InstructRecord) -> Result<Vec<Segment>, DataError> {
        let (prompt, after) = self.around_output(&record.instruction, &record.input)?;
        let mut whole = self.fill(&record.instruction, &record.input, &record.output)?;
        // The template may filter the output (`{{ output | trim }}`), but its other text may not depend on it.
        if !whole.starts_with(&prompt) || !whole.ends_with(&after) || whole.len() < prompt.len() + after.len()
        {
            return Err(self.error(
                "the text around {{ output }} changes with the output, so that no prompt could be asked without \
                 knowing the answer; let it depend on instruction and input alone",
            ));
        }
        let response = whole.split_off(prompt.len());
        Ok(vec![
            Segment { role: Role::Prompt, text: prompt },
            Segment { role: Role::Response, text: response },
        ])
    }

    /// The prompt alone, up to where the model speaks.
    pub fn render_prompt(&self, instruction: &str, input: &str) -> Result<String, DataError> {
        self.around_output(instruction, input).map(|(prompt, _)| prompt)
    }

    /// What the template writes before and after the output.
    fn around_output(&self, instruction: &str, input: &str) -> Result<(String, String), DataError> {
        let marker = marker([instruction, input, &self.source]);
        let mut text = self.fill(instruction, input, &marker)?;
        let mut places = text.match_indices(&marker).map(|(at, _)| at);
        match (places.next(), places.next()) {
            (Some(at), None) => {
                let after = text.split_off(at + marker.len());
                text.truncate(at);
                Ok((text, after))
            }
            (None, _) => Err(self.error(
                "never writes {{ output }}, so that there would be nothing to learn; add it where the answer belongs",
            )),
            (Some(_), Some(_)) => Err(self.error(
                "writes {{ output }} more than once, so that the prompt would give the answer away; keep one",
            )),
        }
    }

    fn fill(&self, instruction: &str, input: &str, output: &str) -> Result<String, DataError> {
        self.environment
            .get_template(&self.name)
            .and_then(|template| template.render(context! { instruction, input, output }))
            .map_err(|error| template_error(&self.name, &error))
    }

    fn error(&self, message: &str) -> DataError {
        DataError::Template { name: self.name.clone(), message: message.to_owned() }
    }
}

/// A string that occurs in none of `texts`. It begins and ends with characters of its own, so that no
/// neighbouring text can complete a second one; and it has no letters or spaces for a filter to change.
fn marker(texts: [&str; 3]) -> String {
    let mut number = 0_u64;
    loop {
        let marker = format!("\u{e000}{number}\u{e001}");
        if !texts.iter().any(|text| text.contains(&marker)) {
            return marker;
        }
        number += 1;
    }
}

fn template_error(name: &str, error: &minijinja::Error) -> DataError {
    let place = error.line().map_or_else(String::new, |line| format!("line {line}: "));
    let hint = match error.kind() {
        minijinja::ErrorKind::UndefinedError => "; a template knows instruction, input and output",
        minijinja::ErrorKind::OutOfFuel => "; it took too many steps to render, look for a loop",
        _ => "",
    };
    let detail = error.detail().map_or_else(String::new, |detail| format!(": {detail}"));
    DataError::Template { name: name.to_owned(), message: format!("{place}{}{detail}{hint}", error.kind()) }
}

fn unknown(name: &str) -> DataError {
    let suggestion = PromptTemplate::names()
        .map(|known| (strsim::jaro_winkler(known, name), known))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known.to_owned());
    let known = PromptTemplate::names().map(str::to_owned).collect();
    DataError::UnknownTemplate { name: name.to_owned(), suggestion, known }
}

#[cfg(test)]
mod tests;
