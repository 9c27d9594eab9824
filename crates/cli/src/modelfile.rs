//! Ollama's Modelfile: <https://docs.ollama.com/modelfile>.

use std::fmt;

use pronk_data::{DataError, PromptTemplate, TextTokenizer};

/// Which weights, how they are asked, and where they stop.
pub struct Modelfile {
    /// A GGUF file or a Hugging Face directory.
    pub from: String,
    /// An adapter's GGUF file, beside the Modelfile.
    pub adapter: Option<&'static str>,
    /// In Ollama's language.
    template: String,
    /// Tokens that end an answer.
    stop: Vec<String>,
}

impl Modelfile {
    /// For weights that were trained with `template`, which is written as Ollama has them.
    pub fn new(
        from: String,
        adapter: Option<&'static str>,
        template: &PromptTemplate,
        tokenizer: &TextTokenizer,
    ) -> Result<Self, DataError> {
        let bos = tokenizer.bos().and_then(|id| tokenizer.token(id));
        let template = template.to_ollama(bos.as_deref())?;
        let stop = tokenizer.eos_ids().iter().filter_map(|&id| tokenizer.token(id)).collect();
        Ok(Self { from, adapter, template, stop })
    }
}

impl fmt::Display for Modelfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, adapter, template, stop } = self;
        writeln!(f, "FROM {from}")?;
        if let Some(adapter) = adapter {
            writeln!(f, "ADAPTER ./{adapter}")?;
        }
        writeln!(f, "TEMPLATE \"\"\"{template}\"\"\"")?;
        stop.iter().try_for_each(|stop| writeln!(f, "PARAMETER stop \"{stop}\""))
    }
}
