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
    /// Only the likeliest tokens that together reach this probability are drawn from.
    pub top_p: f64,
    /// Seeds the draws.
    pub seed: u64,
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
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>, ModelError> {
    let norms = WeightNorms::default();
    let mode = mode.with_norms(&norms);
    let mut rng = ChaCha8Rng::seed_from_u64(sampling.seed);
    let mut caches = vec![LayerCache::default(); decoder.layers()];
    let room = decoder.config.max_position_embeddings.saturating_sub(prompt.len());
    let (mut answer, mut new, mut before) = (Vec::new(), prompt.to_vec(), 0);
    while answer.len() < sampling.max_new_tokens.min(room) && !new.is_empty() {
        let logits = decoder.next_logits(&new, before, &mut caches, mode);
        let logits: Vec<f32> = logits.try_into_vec_as().map_err(|e| ModelError::Device(e.to_string()))?;
        before += new.len();
        let token = choose(&logits, sampling, &mut rng);
        if stop.contains(&token) {
            break;
        }
        answer.push(token);
        if on_token(token).is_break() {
            break;
        }
        new = vec![token];
    }
    Ok(answer)
}

fn choose(logits: &[f32], sampling: Sampling, rng: &mut ChaCha8Rng) -> u32 {
    let mut order: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&l| f64::from(l))).collect();
    let likelier = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if sampling.temperature <= 0.0 {
        return order.into_iter().min_by(likelier).map_or(0, |(token, _)| token);
    }
    order.sort_by(likelier);
    let top = order.first().map_or(0.0, |&(_, l)| l);
    let weight = |l: f64| ((l - top) / sampling.temperature).exp();
    let total: f64 = order.iter().map(|&(_, l)| weight(l)).sum();
    // The nucleus: the shortest run of likeliest tokens that reaches top_p.
    let mut reached = 0.0;
    let within = order.iter().take_while(|&&(_, l)| {
        let open = reached < sampling.top_p * total;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, top_p: f64) -> Sampling {
        Sampling { max_new_tokens: 1, temperature, top_p, seed: 7 }
    }

    #[test]
    fn greedy_takes_the_first_of_the_likeliest() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        assert_eq!(choose(&[0.0, 3.0, 3.0, f32::NEG_INFINITY], sampling(0.0, 1.0), &mut rng), 1);
    }

    #[test]
    fn a_small_nucleus_is_greedy_and_a_whole_one_follows_the_probabilities() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let logits = [0.0, (3.0f32).ln(), f32::NEG_INFINITY];
        assert!((0..100).all(|_| choose(&logits, sampling(1.0, 0.5), &mut rng) == 1));
        let ones = (0..4000).filter(|_| choose(&logits, sampling(1.0, 1.0), &mut rng) == 1).count();
        assert!((2850..3150).contains(&ones), "{ones} of 4000 draws, expected about 3000");
    }
}
