use std::ops::ControlFlow;

use pronk_data::TextTokenizer;
use pronk_lora::{Adapter, ForwardMode};
use pronk_model::{Decoder, Sampling, generate};
use serde::{Deserialize, Serialize};

use crate::TrainError;

/// A prompt that is answered before, during and after training.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SamplePrompt {
    /// As a reader sees it.
    pub text: String,
    /// As the base sees it.
    pub token_ids: Vec<u32>,
}

/// What the prompts were answered at one time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleRound {
    /// Steps done then.
    pub step: u64,
    /// One answer a prompt.
    pub answers: Vec<String>,
}

/// The prompts of a run.
#[derive(Debug, Clone)]
pub struct Samples {
    prompts: Vec<SamplePrompt>,
    max_new_tokens: usize,
}

impl Samples {
    /// `prompts`, each to be answered in `max_new_tokens` at most.
    pub fn new(prompts: Vec<SamplePrompt>, max_new_tokens: usize) -> Self {
        Self { prompts, max_new_tokens }
    }

    /// Whether there is nothing to answer.
    pub fn is_empty(&self) -> bool {
        self.prompts.is_empty()
    }

    /// Every prompt answered, greedily.
    pub(crate) fn answer(
        &self,
        step: u64,
        decoder: &Decoder,
        adapter: &Adapter,
        tokenizer: &TextTokenizer,
    ) -> Result<SampleRound, TrainError> {
        let sampling = Sampling { max_new_tokens: self.max_new_tokens, ..Sampling::default() };
        let mode = ForwardMode::inference((step > 0).then_some(adapter));
        let answer = |prompt: &SamplePrompt| {
            let on_token = |_| ControlFlow::Continue(());
            let ids = generate(decoder, mode, &prompt.token_ids, tokenizer.eos_ids(), sampling, on_token)?;
            Ok(tokenizer.decode(&ids)?)
        };
        let answers = self.prompts.iter().map(answer).collect::<Result<_, TrainError>>()?;
        Ok(SampleRound { step, answers })
    }

    /// The page: each prompt with its answers under one another.
    pub(crate) fn to_markdown(&self, rounds: &[SampleRound]) -> String {
        let quote = |text: &str| text.trim().lines().map(|l| format!("> {l}\n")).collect::<String>();
        let mut page = String::from("# The same prompts, answered as training went on\n");
        for (i, prompt) in self.prompts.iter().enumerate() {
            page += &format!("\n## {}\n\n```\n{}\n```\n", i + 1, prompt.text.trim());
            for SampleRound { step, answers } in rounds {
                let when =
                    if *step == 0 { "before training".to_owned() } else { format!("after step {step}") };
                let answer = answers.get(i).map_or("", String::as_str);
                page += &format!("\n**{when}**\n\n{}", quote(answer));
            }
        }
        page
    }
}
