use std::collections::BTreeSet;
use std::ops::ControlFlow;

use pronk_lora::{ForwardMode, WeightNorms};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{Decoder, LayerCache, ModelError};

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Tokens at most.
    pub max_new_tokens: usize,
    /// Logits are divided by it; 0 always takes the likeliest token (greedy).
    pub temperature: f64,
    /// Only so many of the likeliest tokens are drawn from; 0: all.
    pub top_k: usize,
    /// Of those, only the likeliest that together reach this probability.
    pub top_p: f64,
    /// Of those, only the ones at least so likely as this share of the likeliest.
    pub min_p: f64,
    /// What logits of tokens that stand in the text already are divided by, or multiplied where they are negative
    /// (Keskar et al. 2019, <https://arxiv.org/abs/1909.05858>).
    pub repetition_penalty: f64,
    /// Seeds the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

/// Keys and values of the tokens that a decoder has read: of a text that begins alike, only the rest is computed. It
/// belongs to one decoder with one adapter.
#[derive(Debug, Clone, Default)]
pub struct KeyValueCache {
    token_ids: Vec<u32>,
    layers: Vec<LayerCache>,
}

impl KeyValueCache {
    /// Keeps what `text` begins with, and returns how many tokens that is. Never all of them: somebody is to say what
    /// comes behind the last.
    fn keep(&mut self, text: &[u32]) -> usize {
        let same = self.token_ids.iter().zip(text).take_while(|(a, b)| a == b).count();
        let kept = same.min(text.len().saturating_sub(1));
        self.token_ids.truncate(kept);
        self.layers.iter_mut().for_each(|layer| layer.truncate(kept));
        kept
    }

    /// Logits behind `text`, whose beginning may have been read before; and how many of its tokens had not.
    fn read(
        &mut self,
        decoder: &Decoder,
        mode: ForwardMode,
        text: &[u32],
    ) -> Result<(Vec<f32>, usize), ModelError> {
        self.layers.resize_with(decoder.layers(), LayerCache::default);
        let kept = self.keep(text);
        let new = text.get(kept..).unwrap_or_default();
        let logits = decoder.next_logits(new, kept, &mut self.layers, mode);
        let logits: Vec<f32> = logits.try_into_vec_as().map_err(|e| ModelError::Device(e.to_string()))?;
        self.token_ids.extend_from_slice(new);
        Ok((logits, new.len()))
    }
}

/// Why an answer ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// A stop token came.
    Stop,
    /// It has all the tokens it may have, or the context is full.
    Length,
    /// Whoever listened had enough.
    Interrupted,
}

/// What [`answer`] gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Without the stop token.
    pub token_ids: Vec<u32>,
    /// Why it ends.
    pub ending: Ending,
    /// Tokens of the prompt that the cache did not hold.
    pub computed: usize,
}

/// Continues `prompt` until a token of `stop`, `max_new_tokens`, or the end of the context.
/// Every token is handed to `on_token` as it comes; a break ends the generation. The stop token
/// itself is neither handed on nor returned.
pub fn generate(
    decoder: &Decoder,
    mode: ForwardMode,
    prompt: &[u32],
    stop: &[u32],
    sampling: Sampling,
    on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>, ModelError> {
    let mut cache = KeyValueCache::default();
    Ok(answer(&mut cache, decoder, mode, prompt, stop, sampling, on_token)?.token_ids)
}

/// As [`generate`], where `cache` holds what was read before, and holds prompt and answer afterwards.
pub fn answer(
    cache: &mut KeyValueCache,
    decoder: &Decoder,
    mode: ForwardMode,
    prompt: &[u32],
    stop: &[u32],
    sampling: Sampling,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Answer, ModelError> {
    let norms = WeightNorms::default();
    let mode = mode.with_norms(&norms);
    let mut rng = ChaCha8Rng::seed_from_u64(sampling.seed);
    let room = decoder.config.max_position_embeddings.saturating_sub(prompt.len());
    let mut answer = Answer { token_ids: Vec::new(), ending: Ending::Length, computed: 0 };
    let mut text = prompt.to_vec();
    while answer.token_ids.len() < sampling.max_new_tokens.min(room) && !text.is_empty() {
        let (logits, computed) = cache.read(decoder, mode, &text)?;
        if answer.token_ids.is_empty() {
            answer.computed = computed;
        }
        let token = choose(logits, &text, sampling, &mut rng);
        if stop.contains(&token) {
            answer.ending = Ending::Stop;
            break;
        }
        answer.token_ids.push(token);
        text.push(token);
        if on_token(token).is_break() {
            answer.ending = Ending::Interrupted;
            break;
        }
    }
    Ok(answer)
}

fn choose(mut logits: Vec<f32>, text: &[u32], sampling: Sampling, rng: &mut ChaCha8Rng) -> u32 {
    penalize(&mut logits, text, sampling.repetition_penalty);
    let mut order: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&l| f64::from(l))).collect();
    let likelier = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if sampling.temperature <= 0.0 {
        return order.into_iter().min_by(likelier).map_or(0, |(token, _)| token);
    }
    order.sort_by(likelier);
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let top = order.first().map_or(0.0, |&(_, l)| l);
    let weight = |l: f64| ((l - top) / sampling.temperature).exp();
    let total: f64 = order.iter().map(|&(_, l)| weight(l)).sum();
    // The nucleus: the shortest run of likeliest tokens that reaches top_p.
    let mut reached = 0.0;
    let within = order.iter().take_while(|&&(_, l)| {
        let open = reached < sampling.top_p * total && weight(l) >= sampling.min_p;
        reached += weight(l);
        open
    });
    let kept: Vec<(u32, f64)> = within.map(|&(token, l)| (token, weight(l))).collect();
    let mut left = rng.random_range(0.0..1.0) * kept.iter().map(|k| k.1).sum::<f64>();
    let drawn = kept.iter().find(|(_, w)| {
        left -= w;
        left <= 0.0
    });
    drawn.or(kept.first()).map_or(0, |&(token, _)| token)
}

/// Makes the tokens of `text` less likely, each once however often it stands there.
fn penalize(logits: &mut [f32], text: &[u32], penalty: f64) {
    if (penalty - 1.0).abs() < f64::EPSILON {
        return;
    }
    for token in text.iter().collect::<BTreeSet<_>>() {
        if let Some(logit) = logits.get_mut(*token as usize) {
            let penalty = penalty as f32;
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, top_p: f64) -> Sampling {
        Sampling { temperature, top_p, ..Sampling::default() }
    }

    fn drawn(logits: &[f32], sampling: Sampling, rng: &mut ChaCha8Rng) -> u32 {
        choose(logits.to_vec(), &[], sampling, rng)
    }

    #[test]
    fn greedy_takes_the_first_of_the_likeliest() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        assert_eq!(drawn(&[0.0, 3.0, 3.0, f32::NEG_INFINITY], sampling(0.0, 1.0), &mut rng), 1);
    }

    #[test]
    fn a_small_nucleus_is_greedy_and_a_whole_one_follows_the_probabilities() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let logits = [0.0, (3.0f32).ln(), f32::NEG_INFINITY];
        assert!((0..100).all(|_| drawn(&logits, sampling(1.0, 0.5), &mut rng) == 1));
        let ones = (0..4000).filter(|_| drawn(&logits, sampling(1.0, 1.0), &mut rng) == 1).count();
        assert!((2850..3150).contains(&ones), "{ones} of 4000 draws, expected about 3000");
    }

    #[test]
    fn unlikely_tokens_are_never_drawn() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        // Probabilities 4, 3, 2 and 1 in ten.
        let logits = [4.0f32, 3.0, 2.0, 1.0].map(f32::ln);
        let mut seen = |sampling: Sampling| -> BTreeSet<u32> {
            (0..300).map(|_| choose(logits.to_vec(), &[], sampling, &mut rng)).collect()
        };
        assert_eq!(seen(sampling(1.0, 1.0)).len(), 4);
        assert_eq!(seen(Sampling { top_k: 2, ..sampling(1.0, 1.0) }), [0, 1].into());
        assert_eq!(seen(Sampling { min_p: 0.45, ..sampling(1.0, 1.0) }), [0, 1, 2].into());
        // Of the two that are left, the first has four sevenths.
        assert_eq!(seen(Sampling { top_k: 2, ..sampling(1.0, 0.55) }), [0].into());
    }

    #[test]
    fn what_was_said_becomes_less_likely() {
        let mut logits = [2.0, -2.0, 1.0];
        penalize(&mut logits, &[0, 1, 0, 9], 2.0);
        assert_eq!(logits.map(f32::to_bits), [1.0f32, -4.0, 1.0].map(f32::to_bits));
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let penalty = |repetition_penalty| Sampling { repetition_penalty, ..sampling(0.0, 1.0) };
        assert_eq!(choose(vec![2.0, 1.5], &[0], penalty(1.0), &mut rng), 0);
        assert_eq!(choose(vec![2.0, 1.5], &[0], penalty(2.0), &mut rng), 1);
    }
}
