//! A chat template as Ollama has them: in the language of Go's text/template, over `.System` and `.Messages`.
//!
//! What can be said of any template is what it writes around the messages. That is found by rendering conversations
//! of words that no template holds, and tried on conversations of other lengths before it is believed.

use super::{PromptTemplate, Style};
use crate::error::DataError;
use crate::record::{Conversation, InstructRecord};

/// Words that stand for messages: letters alone, so that no filter changes them.
const SYSTEM: &str = "Pronksystemword";
const TURNS: [(&str, &str); 3] = [
    ("Pronkfirstword", "Pronksecondword"),
    ("Pronkthirdword", "Pronkfourthword"),
    ("Pronkfifthword", "Pronksixthword"),
];

/// What a template writes around the messages of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Around {
    /// In front of the first question where there is no system message.
    head: String,
    /// Around the system message, up to the first question; `None` where the template has no place for one.
    system: Option<(String, String)>,
    /// Between a question and its answer.
    answer: String,
    /// Between an answer and the next question; `None` where there is but one turn.
    question: Option<String>,
}

impl PromptTemplate {
    /// The template in Ollama's language, for the `TEMPLATE` of a Modelfile. `bos` is the token that the runtime puts in
    /// front of every text by itself.
    ///
    /// A template that writes more than fixed text around the messages is refused: Ollama would write something
    /// else than the model was trained with.
    pub fn to_ollama(&self, bos: Option<&str>) -> Result<String, DataError> {
        let mut around = self.around()?;
        if let (Some(bos), Style::Chat) = (bos, self.style) {
            around.without_bos(bos);
        }
        let template = around.to_go();
        if template.contains("\"\"\"") {
            return Err(self.no_ollama("it writes \"\"\", which no Modelfile can hold"));
        }
        Ok(template)
    }

    fn around(&self) -> Result<Around, DataError> {
        let alone = self.asked(None, 1)?;
        let [head, answer] = self.between(&alone, &[TURNS[0].0])?;
        if self.style == Style::Record {
            return Ok(Around { head, system: None, answer, question: None });
        }
        let [_, _, question, _] =
            self.between(&self.asked(None, 2)?, &[TURNS[0].0, TURNS[0].1, TURNS[1].0])?;
        let system = match self.asked(Some(SYSTEM), 1) {
            Ok(text) if text.contains(SYSTEM) => {
                let [before, behind, _] = self.between(&text, &[SYSTEM, TURNS[0].0])?;
                Some((before, behind))
            }
            _ => None, // some templates refuse one, others leave it out
        };
        let around = Around { head, system, answer, question: Some(question) };
        let with_system = around.system.is_some().then_some(SYSTEM);
        for (system, turns) in [(None, 1), (None, 2), (None, 3), (with_system, 1), (with_system, 3)] {
            if around.fill(system, turns) != self.asked(system, turns)? {
                return Err(self.no_ollama(&format!(
                    "around {turns} turns it writes something else than around others, which Ollama's templates cannot"
                )));
            }
        }
        Ok(around)
    }

    /// The text that asks for the last answer of a conversation of so many turns.
    fn asked(&self, system: Option<&str>, turns: usize) -> Result<String, DataError> {
        let turn = |&(question, answer): &(&str, &str)| InstructRecord {
            instruction: question.to_owned(),
            input: String::new(),
            output: answer.to_owned(),
        };
        let conversation = Conversation {
            system: system.map(str::to_owned),
            turns: TURNS.iter().take(turns).map(turn).collect(),
        };
        let segments = self.render_prompt(&conversation)?;
        Ok(segments.into_iter().map(|segment| segment.text).collect())
    }

    /// What stands in front of, between, and behind `words`, each of which must be there once.
    fn between<const N: usize>(&self, text: &str, words: &[&str]) -> Result<[String; N], DataError> {
        let mut rest = text;
        let mut pieces = Vec::with_capacity(N);
        for word in words {
            let Some((before, behind)) = rest.split_once(word) else {
                return Err(self.no_ollama("it does not write every message once, in order"));
            };
            pieces.push(before.to_owned());
            rest = behind;
        }
        pieces.push(rest.to_owned());
        pieces.try_into().map_err(|_| self.no_ollama("it does not write every message once, in order"))
    }

    fn no_ollama(&self, why: &str) -> DataError {
        self.error(&format!(
            "cannot be written as an Ollama template: {why}. Export to gguf, and write the Modelfile by hand"
        ))
    }
}

impl Around {
    fn without_bos(&mut self, bos: &str) {
        let system = self.system.iter_mut().map(|(before, _)| before);
        for begin in system.chain([&mut self.head]) {
            if let Some(rest) = begin.strip_prefix(bos) {
                *begin = rest.to_owned();
            }
        }
    }

    /// What the template in Go's language writes for the words.
    fn fill(&self, system: Option<&str>, turns: usize) -> String {
        let mut text = match (system, &self.system) {
            (Some(system), Some((before, behind))) => format!("{before}{system}{behind}"),
            _ => self.head.clone(),
        };
        for (i, (question, answer)) in TURNS.iter().take(turns).enumerate() {
            text += &format!("{question}{}", self.answer);
            if i + 1 < turns {
                text += &format!("{answer}{}", self.question.as_deref().unwrap_or_default());
            }
        }
        text
    }

    fn to_go(&self) -> String {
        let Self { head, system, answer, question } = self;
        let (head, answer) = (literal(head), literal(answer));
        let Some(question) = question else {
            return format!("{head}{{{{ .Prompt }}}}{answer}{{{{ .Response }}}}");
        };
        let question = literal(question);
        let head = system.as_ref().map_or(head.clone(), |(before, behind)| {
            let (before, behind) = (literal(before), literal(behind));
            format!("{{{{ if .System }}}}{before}{{{{ .System }}}}{behind}{{{{ else }}}}{head}{{{{ end }}}}")
        });
        // The system message stands among the messages again, and is passed over there.
        format!(
            "{head}{{{{ range $i, $_ := .Messages }}}}{{{{ $last := eq (len (slice $.Messages $i)) 1 }}}}\
             {{{{ if eq .Role \"user\" }}}}{{{{ .Content }}}}{answer}\
             {{{{ else if eq .Role \"assistant\" }}}}{{{{ .Content }}}}{{{{ if not $last }}}}{question}{{{{ end }}}}\
             {{{{ end }}}}{{{{ end }}}}"
        )
    }
}

/// Text that stands for itself in Go's language.
fn literal(text: &str) -> String {
    text.replace("{{", "{{ \"{{\" }}")
}

#[cfg(test)]
mod tests {
    use super::super::BUILT_IN;
    use crate::template::PromptTemplate;
    use crate::tokenizer::tests::smollm;

    const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + \
        '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

    fn ollama(source: &str, bos: Option<&str>) -> Result<String, String> {
        let template = PromptTemplate::new("test", source, &smollm()).unwrap();
        template.to_ollama(bos).map_err(|e| e.to_string())
    }

    #[test]
    fn chatml_becomes_a_loop_over_messages() {
        let expected = "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n{{ else }}\
            <|im_start|>user\n{{ end }}{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}\
            {{ if eq .Role \"user\" }}{{ .Content }}<|im_end|>\n<|im_start|>assistant\n\
            {{ else if eq .Role \"assistant\" }}{{ .Content }}{{ if not $last }}<|im_end|>\n<|im_start|>user\n{{ end }}\
            {{ end }}{{ end }}";
        assert_eq!(ollama(CHATML, None).unwrap(), expected);
        let begun = format!("{{{{- '<s>' -}}}}{CHATML}");
        assert_eq!(ollama(&begun, Some("<s>")).unwrap(), expected, "the runtime adds it");
        assert!(ollama(&begun, None).unwrap().contains("{{ else }}<s><|im_start|>user"));
    }

    #[test]
    fn every_built_in_template_can_be_written() {
        for (name, source) in BUILT_IN {
            let go = ollama(source, None).unwrap();
            assert!(go.contains("{{ .Content }}") && !go.contains("Pronk"), "{name}: {go}");
        }
    }

    #[test]
    fn a_template_over_a_record_has_one_turn() {
        let source = "Q: {{ instruction }}{{ input }}\nA: {{ output }}";
        assert_eq!(ollama(source, None).unwrap(), "Q: {{ .Prompt }}\nA: {{ .Response }}");
        let braces = "Q: {{ '{{' }}{{ instruction }}{{ input }}\nA: {{ output }}";
        assert!(ollama(braces, None).unwrap().starts_with("Q: {{ \"{{\" }}{{ .Prompt }}"));
    }

    #[test]
    fn what_ollama_cannot_write_is_refused() {
        // The number of the turn
        let counting = CHATML.replace(
            "message.content",
            "message.content + (loop.index | string if message.role == 'user' else '')",
        );
        // Earlier answers otherwise than the last
        let forgetting = CHATML
            .replace("message.content", "(message.content if loop.last or message.role == 'user' else 'x')");
        for source in [&counting, &forgetting] {
            let refusal = ollama(source, None).unwrap_err();
            assert!(refusal.contains("Ollama template") && refusal.contains("by hand"), "{refusal}");
        }
        let quotes = CHATML.replace("<|im_end|>", "\"\"\"");
        assert!(ollama(&quotes, None).unwrap_err().contains("\"\"\""));
        // Gemma's refuses a system message
        let strict = format!(
            "{{%- if messages[0].role == 'system' -%}}{{{{- raise_exception('no') -}}}}{{%- endif -%}}{CHATML}"
        );
        assert!(!ollama(&strict, None).unwrap().contains(".System"));
    }
}
