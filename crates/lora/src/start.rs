//! Pairs that start from singular values, and their way into files that know no such start.

use std::collections::BTreeMap;

use burn::tensor::Tensor;

use crate::{
    Adapter, InitLoraWeights, LoraConfig, LoraError, LoraPair, low_rank_factors, low_rank_factors_over,
};

/// The factors that a pair started with, where they were the base's own: what they compute is taken away from
/// what the base computes, so that the base may stay as it is, quantized, mapped or streamed.
#[derive(Debug, Clone)]
pub struct StartFactors {
    /// `[rank, in]`
    pub a: Tensor<2>,
    /// `[out, rank]`
    pub b: Tensor<2>,
}

impl LoraPair {
    /// Makes `scale * B A` the best approximation of `matrix`, `[out, in]`, that its rank allows: of the matrix
    /// itself, or of what it makes of the layer's inputs X, where `inputs` is their `X^T X`, `[in, in]`. Where the
    /// matrix has no such rank, the rest is zero. `seed` and `name` are those of [`low_rank_factors`].
    pub fn approximate(
        &mut self,
        matrix: &Tensor<2>,
        inputs: Option<&Tensor<2>>,
        init: InitLoraWeights,
        seed: u64,
        name: &str,
    ) {
        let (rank, turns) = (self.rank(), init.turns());
        let factors = match inputs {
            Some(inputs) => low_rank_factors_over(matrix, inputs, rank, turns, seed, name),
            None => low_rank_factors(matrix, rank, turns, seed, name),
        };
        let (share, found) = (1.0 / self.scale.sqrt(), factors.a.dims()[0]);
        let ([rank, columns], rows) = (self.a.dims(), self.b.dims()[0]);
        let (a, b) = (factors.a * share, factors.b * share);
        self.a = self.a.zeros_like().slice_assign([0..found, 0..columns], a);
        self.b = Tensor::zeros([rows, rank], &b.device()).slice_assign([0..rows, 0..found], b);
    }

    /// Takes what the pair computes now away from what the base computes.
    pub fn keep_start(&mut self) {
        self.start = Some(StartFactors { a: self.a.clone(), b: self.b.clone() });
    }

    /// The same update without a start: of twice the rank, as PEFT converts it when it saves.
    fn standalone(&self) -> Self {
        let Some(start) = &self.start else { return self.clone() };
        Self {
            a: Tensor::cat(vec![self.a.clone(), start.a.clone()], 0),
            b: Tensor::cat(vec![self.b.clone(), start.b.clone().neg()], 1),
            start: None,
            ..self.clone()
        }
    }

    /// The reverse of [`Self::standalone`], to the bit; nothing where the rank is odd.
    fn with_start(&self) -> Option<Self> {
        let half = self.rank() / 2;
        if half == 0 || self.rank() != 2 * half {
            return None;
        }
        let start = StartFactors {
            a: self.a.clone().narrow(0, half, half),
            b: self.b.clone().narrow(1, half, half).neg(),
        };
        let (a, b) = (self.a.clone().narrow(0, 0, half), self.b.clone().narrow(1, 0, half));
        Some(Self { a, b, start: Some(start), ..self.clone() })
    }
}

impl Adapter {
    /// The same update as every reader of PEFT's layout takes it: over the base as it is.
    #[must_use]
    pub fn standalone(&self) -> Self {
        if self.pairs.values().all(|pair| pair.start.is_none()) {
            return self.clone();
        }
        let pairs = self.pairs.iter().map(|(name, pair)| (name.clone(), pair.standalone())).collect();
        let config = LoraConfig { init_lora_weights: InitLoraWeights::Default, ..self.config.clone() };
        self.with_pairs(&config, pairs)
    }

    /// The adapter that [`Self::standalone`] was made of.
    pub fn with_start(&self) -> Result<Self, LoraError> {
        let mut pairs = BTreeMap::new();
        for (name, pair) in &self.pairs {
            let Some(pair) = pair.with_start() else {
                let problem = format!("expected twice a rank, found {}", pair.rank());
                return Err(LoraError::Malformed { path: name.into(), problem });
            };
            pairs.insert(name.clone(), pair);
        }
        Ok(self.with_pairs(&self.config, pairs))
    }

    /// Takes the configuration of `other`, to the bit, where it describes these pairs too; otherwise says that it
    /// does not. A file tells ranks and scales in words of its own.
    pub fn take_config_of(&mut self, other: &Self) -> bool {
        let alike = |(mine, theirs): ((&String, &LoraPair), (&String, &LoraPair))| {
            let ((name, pair), (other_name, other)) = (mine, theirs);
            let scales = (pair.scale - other.scale).abs() <= 1e-9 * other.scale.abs();
            let kinds = pair.start.is_some() == other.start.is_some()
                && pair.magnitude.is_some() == other.magnitude.is_some();
            name == other_name && pair.rank() == other.rank() && scales && kinds
        };
        let same = self.pairs.len() == other.pairs.len() && self.whole.keys().eq(other.whole.keys());
        if !same || !self.pairs.iter().zip(&other.pairs).all(alike) {
            return false;
        }
        self.config = other.config.clone();
        for (pair, other) in self.pairs.values_mut().zip(other.pairs.values()) {
            pair.scale = other.scale;
        }
        true
    }
}
