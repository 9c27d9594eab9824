//! A base that answers: by itself, or through one of several adapters.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use miette::{IntoDiagnostic, Result, miette};
use pronk_data::{Conversation, PromptTemplate, Question, tokenize_prompt};
use pronk_lora::{Adapter, ForwardMode, vocab_size_of};
use pronk_model::{Answer, Decoder, KeyValueCache, LoadConfig, Sampling, answer};

use crate::args::Speaking;
use crate::base::{self, OpenedBase};
use crate::terminal::say;

/// An adapter by its name, with the template that it was trained with; or the base alone.
pub struct Voice {
    /// Empty for the base.
    pub name: String,
    pub template: PromptTemplate,
    dir: Option<PathBuf>,
    /// How many tokens it has embeddings for.
    vocab_size: usize,
}

/// All that is needed to ask, before any weight is read.
pub struct Voices {
    opened: OpenedBase,
    /// At least one.
    all: Vec<Voice>,
    verbose: bool,
}

/// All that is needed to answer.
pub struct Speaker {
    voices: Voices,
    decoder: Decoder,
    adapters: Vec<Option<Adapter>>,
}

impl Voices {
    pub fn open(args: &Speaking) -> Result<Self> {
        let opened = base::open(&args.base, Path::new("."))?;
        let named = if args.adapter.is_empty() {
            vec![(String::new(), None)]
        } else {
            args.adapter.iter().map(|adapter| named(adapter)).map(|(name, dir)| (name, Some(dir))).collect()
        };
        let mut voices: Vec<Voice> = Vec::new();
        for (name, dir) in named {
            if voices.iter().any(|voice| voice.name == name) {
                return Err(miette!(
                    "--adapter: two are called {name:?}; expected NAME=DIR, each its own name"
                ));
            }
            let template = base::template(args.template.as_deref(), dir.as_deref(), &opened.tokenizer)?;
            voices.push(Voice { name, template, dir, vocab_size: opened.base.config.vocab_size });
        }
        let mut dirs = voices.iter().filter_map(|voice| voice.dir.as_deref());
        let opened = dirs.try_fold(opened, OpenedBase::of_adapter)?;
        for Voice { dir, vocab_size, .. } in &mut voices {
            if let Some(own) = dir.as_ref().and_then(|dir| vocab_size_of(dir).transpose()) {
                *vocab_size = own.into_diagnostic()?;
            }
        }
        Ok(Self { opened, all: voices, verbose: args.verbose_prompt })
    }

    /// In the order they were given; the first is the one that speaks unless another is named.
    pub fn all(&self) -> &[Voice] {
        &self.all
    }

    /// The number of the voice called `name`.
    pub fn find(&self, name: &str) -> Result<usize> {
        self.all.iter().position(|voice| voice.name == name).ok_or_else(|| {
            let names: Vec<String> = self.all.iter().map(|voice| format!("{:?}", voice.name)).collect();
            miette!("there is no adapter called {name:?}; there are: {}", names.join(", "))
        })
    }

    /// The tokens that `voice` is to go on from.
    pub fn prompt(&self, voice: usize, question: &Question) -> Result<Vec<u32>> {
        let tokenizer = &self.opened.tokenizer;
        let Some(Voice { template, vocab_size, .. }) = self.all.get(voice) else {
            return Err(miette!("there is no adapter number {voice}"));
        };
        let ids = match question {
            Question::Conversation(asked) => tokenize_prompt(tokenizer, asked, template),
            Question::Text(text) => tokenizer.encode_prompt(text),
        };
        let ids = ids.into_diagnostic()?;
        self.opened.must_embed_within(*vocab_size, ids.iter().max().copied())?;
        let context = self.opened.base.config.max_position_embeddings;
        if ids.len() >= context {
            return Err(miette!("the prompt has {} tokens, the base's context is {context}", ids.len()));
        }
        if ids.is_empty() {
            return Err(miette!("the prompt has no token; expected some text to go on from"));
        }
        Ok(ids)
    }

    /// Reads the base and the adapters onto `device`.
    pub fn load(self, device: &str) -> Result<Speaker> {
        let decoder = self.opened.load(device, LoadConfig::default())?;
        let adapters = self
            .all
            .iter()
            .map(|voice| voice.dir.as_ref().map(|dir| self.opened.load_adapter(dir, &decoder)).transpose());
        let adapters = adapters.collect::<Result<_>>()?;
        Ok(Speaker { voices: self, decoder, adapters })
    }
}

impl Speaker {
    pub fn voices(&self) -> &Voices {
        &self.voices
    }

    /// Goes on from `prompt` as `voice` does, until it stops or `on_text`, which hears every piece of text, breaks.
    /// `cache` is this voice's.
    pub fn answer(
        &self,
        cache: &mut KeyValueCache,
        voice: usize,
        prompt: &[u32],
        sampling: Sampling,
        mut on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<(String, Answer)> {
        if self.voices.verbose {
            say(&format!("prompt: {prompt:?}"));
        }
        let tokenizer = &self.voices.opened.tokenizer;
        let (mut stream, mut text, mut failure) = (tokenizer.decode_stream(), String::new(), None);
        let on_token = |token| match stream.step(token) {
            Ok(piece) => {
                text += &piece;
                on_text(&piece)
            }
            Err(e) => {
                failure = Some(e);
                ControlFlow::Break(())
            }
        };
        let mode = ForwardMode::inference(self.adapters.get(voice).and_then(Option::as_ref));
        let stop = tokenizer.eos_ids();
        let found = answer(cache, &self.decoder, mode, prompt, stop, sampling, on_token).into_diagnostic()?;
        if let Some(e) = failure {
            return Err(e).into_diagnostic();
        }
        let rest = stream.finish().into_diagnostic()?;
        text += &rest;
        let _ = on_text(&rest); // nothing comes after it
        Ok((text, found))
    }
}

/// `NAME=DIR`, or `DIR`, which is its own name.
fn named(adapter: &str) -> (String, PathBuf) {
    match adapter.split_once('=') {
        Some((name, dir)) if !name.contains(['/', '\\']) && !Path::new(adapter).exists() => {
            (name.to_owned(), dir.into())
        }
        _ => (adapter.to_owned(), adapter.into()),
    }
}

/// One question with an input that may be empty.
pub fn question(instruction: &str, input: &str) -> Question {
    Question::Conversation(Conversation::question(instruction, input))
}

/// How `args` has tokens chosen.
pub fn sampling(args: &Speaking) -> Result<Sampling> {
    let &Speaking { max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, .. } = args;
    if !temperature.is_finite() || temperature < 0.0 {
        return Err(miette!("--temperature: expected a number from 0, found {temperature}"));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(miette!("--top-p: expected a number above 0, up to 1, found {top_p}"));
    }
    if !(0.0..=1.0).contains(&min_p) {
        return Err(miette!("--min-p: expected a number from 0 to 1, found {min_p}"));
    }
    if !repetition_penalty.is_finite() || repetition_penalty <= 0.0 {
        return Err(miette!("--repetition-penalty: expected a number above 0, found {repetition_penalty}"));
    }
    Ok(Sampling { max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed })
}
