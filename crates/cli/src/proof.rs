//! What a merged model or an exported adapter is compared with base and adapter on.

use std::path::Path;

use miette::{IntoDiagnostic, Result};
use pronk_data::{Conversation, tokenize_prompt};
use pronk_export::Verification;

use crate::base::{self, OpenedBase};

const INSTRUCTION: &str = "Explain in two sentences how a seed becomes a tree.";

/// A prompt of the kind that the adapter in `dir` was trained on, with the tokens behind it that were added.
pub fn prompt(opened: &OpenedBase, dir: &Path) -> Result<Vec<u32>> {
    let template = base::template(None, Some(dir), &opened.tokenizer)?;
    let question = Conversation::question(INSTRUCTION, "");
    let mut prompt = tokenize_prompt(&opened.tokenizer, &question, &template).into_diagnostic()?;
    prompt.extend(opened.tokenizer.added_tokens().keys().filter(|id| (**id as usize) < opened.vocab_size));
    prompt.truncate(opened.base.config.max_position_embeddings);
    opened.must_embed(prompt.iter().max().copied())?;
    Ok(prompt)
}

/// A line that says how close it came.
pub fn shown(Verification { max_abs_difference, max_logit, kl }: Verification) -> String {
    format!(
        "against base + adapter: logits differ by {max_abs_difference:.2e} at most (largest logit {max_logit:.1}), \
         KL {kl:.2e} nats\n"
    )
}
