//! What is added beside a pair and stays as it is, and its way into files that know no such thing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use half::bf16;
use pronk_kernels::{Format, FrozenLinear, FrozenMatrix, Precision};

use crate::tensors::numbers;
use crate::{
    ADAPTER_CONFIG, Adapter, InitLoraWeights, LoraConfig, LoraError, LoraPair, LowRankFactors, ModuleShape,
    low_rank_factors, low_rank_factors_over,
};

/// An update beside the one that is trained, with the same factor in front: less of what a pair started with, where that
/// was the base's own, or what a quantized base has lost. As the base is, it is frozen.
#[derive(Debug, Clone)]
pub struct FixedFactors {
    /// A, `[fixed rank, in]`, and B, `[out, fixed rank]`.
    layers: [FrozenLinear; 2],
    device: Device,
}

impl FixedFactors {
    /// Those of the module called `name`. They are kept in 16 bits, and so multiplied, where that is `rounded` to, or
    /// where it keeps every number as it is.
    fn new([a, b]: [&Tensor<2>; 2], rounded: bool, name: &str) -> Result<Self, LoraError> {
        let layers = [frozen(a, rounded, name)?, frozen(b, rounded, name)?];
        Ok(Self { layers, device: a.device() })
    }

    /// The update's rank.
    pub fn rank(&self) -> usize {
        self.layers[0].out_features()
    }

    /// A and B.
    pub fn factors(&self) -> [Tensor<2>; 2] {
        self.layers.each_ref().map(|layer| {
            let rows: Vec<u32> = (0..layer.out_features() as u32).collect();
            layer.rows(&rows, &self.device)
        })
    }

    /// `y + scale * (x A^T) B^T`.
    ///
    /// # Shapes
    /// - x: `[tokens, in]`
    /// - y and result: `[tokens, out]`
    pub(crate) fn add(&self, y: &Tensor<2>, x: Tensor<2>, scale: f64) -> Tensor<2> {
        let [a, b] = &self.layers;
        b.product_onto(y, &(a.product(x) * scale), None)
    }
}

fn frozen(factor: &Tensor<2>, rounded: bool, name: &str) -> Result<FrozenLinear, LoraError> {
    let numbers = numbers(name, factor)?;
    let short: Vec<bf16> = numbers.iter().map(|&x| bf16::from_f32(x)).collect();
    let (format, precision, bytes) =
        if rounded || short.iter().zip(&numbers).all(|(s, x)| s.to_f32().to_bits() == x.to_bits()) {
            (Format::Bf16, Precision::Bf16, short.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
        } else {
            (Format::F32, Precision::F32, numbers.iter().flat_map(|x| x.to_le_bytes()).collect())
        };
    let matrix = FrozenMatrix::dense(format, factor.dims(), bytes.into());
    let matrix = matrix.map_err(|e| LoraError::Malformed { path: name.into(), problem: e.to_string() })?;
    Ok(FrozenLinear::on_host(Arc::new(matrix), precision, None).on_device(&factor.device()))
}

/// What factors are to come near to.
#[derive(Debug, Clone, Copy)]
pub struct Sought<'a> {
    /// `[out, in]`
    pub matrix: &'a Tensor<2>,
    /// `X^T X`, `[in, in]`, where it is what the matrix makes of inputs X, and not the matrix itself.
    pub inputs: Option<&'a Tensor<2>>,
    /// The rest of what [`low_rank_factors`] asks for.
    pub turns: usize,
    /// See there.
    pub seed: u64,
    /// The module's name.
    pub name: &'a str,
}

impl Sought<'_> {
    /// A and B for an update with `scale` in front, of `rank` at most.
    fn factors(&self, rank: usize, scale: f64) -> [Tensor<2>; 2] {
        let Self { matrix, inputs, turns, seed, name } = *self;
        let LowRankFactors { a, b, .. } = match inputs {
            Some(inputs) => low_rank_factors_over(matrix, inputs, rank, turns, seed, name),
            None => low_rank_factors(matrix, rank, turns, seed, name),
        };
        [a, b].map(|factor| factor * (1.0 / scale.sqrt()))
    }
}

impl LoraPair {
    /// Makes `scale * B A` the best approximation of what is sought that its rank allows. Where that has no such rank,
    /// the rest is zero.
    pub fn approximate(&mut self, sought: Sought) {
        let [a, b] = sought.factors(self.rank(), self.scale);
        let (found, [rank, columns], rows) = (a.dims()[0], self.a.dims(), self.b.dims()[0]);
        self.a = self.a.zeros_like().slice_assign([0..found, 0..columns], a);
        self.b = Tensor::zeros([rows, rank], &b.device()).slice_assign([0..rows, 0..found], b);
    }

    /// Leaves the pair as it is, and fixes beside it the best approximation of what is sought, of `rank` at most, with
    /// numbers that are rounded to `precision`.
    pub fn fix_beside(&mut self, sought: Sought, rank: usize, precision: Precision) -> Result<(), LoraError> {
        let [a, b] = sought.factors(rank, self.scale);
        self.fixed = Some(FixedFactors::new([&a, &b], precision == Precision::Bf16, sought.name)?);
        Ok(())
    }

    /// Takes what the pair computes now away from what the base computes. `name` is the module's.
    pub fn keep_start(&mut self, name: &str) -> Result<(), LoraError> {
        self.fixed = Some(FixedFactors::new([&self.a, &self.b.clone().neg()], false, name)?);
        Ok(())
    }

    /// Rank of what is fixed beside it.
    pub fn fixed_rank(&self) -> usize {
        self.fixed.as_ref().map_or(0, FixedFactors::rank)
    }

    /// The same update in one, of both ranks: what is trained, then what is fixed. So PEFT converts `PiSSA`'s when it saves.
    fn standalone(&self) -> Self {
        let Some(fixed) = &self.fixed else { return self.clone() };
        let [a, b] = fixed.factors();
        Self {
            a: Tensor::cat(vec![self.a.clone(), a], 0),
            b: Tensor::cat(vec![self.b.clone(), b], 1),
            fixed: None,
            ..self.clone()
        }
    }

    /// The reverse of [`Self::standalone`], to the bit, where ranks up to `trained` were trained. `name` is the module's.
    fn with_fixed(&self, trained: usize, name: &str) -> Result<Self, LoraError> {
        let rank = self.rank() - trained;
        if rank == 0 {
            return Ok(self.clone());
        }
        let part =
            |first, rank| [self.a.clone().narrow(0, first, rank), self.b.clone().narrow(1, first, rank)];
        let ([a, b], [fixed_a, fixed_b]) = (part(0, trained), part(trained, rank));
        let fixed = Some(FixedFactors::new([&fixed_a, &fixed_b], false, name)?);
        Ok(Self { a, b, fixed, ..self.clone() })
    }
}

impl Adapter {
    /// The same update as every reader of PEFT's layout takes it: in one, over the base as it is.
    #[must_use]
    pub fn standalone(&self) -> Self {
        if self.pairs.values().all(|pair| pair.fixed.is_none()) {
            return self.clone();
        }
        let pairs = self.pairs.iter().map(|(name, pair)| (name.clone(), pair.standalone())).collect();
        let config = LoraConfig {
            init_lora_weights: InitLoraWeights::Default,
            restore_rank: 0,
            ..self.config.clone()
        };
        self.with_pairs(&config, pairs)
    }

    /// Ranks of what is fixed, by the names of the modules where there is such.
    pub fn fixed_ranks(&self) -> BTreeMap<String, usize> {
        let fixed = self.pairs.iter().filter(|(_, pair)| pair.fixed.is_some());
        fixed.map(|(name, pair)| (name.clone(), pair.fixed_rank())).collect()
    }

    /// The adapter that [`Self::standalone`] was made of, where that had these [ranks](Self::fixed_ranks) and this
    /// configuration: a file tells ranks and scales in words of its own.
    pub fn with_fixed(
        mut self,
        ranks: &BTreeMap<String, usize>,
        config: LoraConfig,
        modules: &[ModuleShape],
    ) -> Result<Self, LoraError> {
        config.validate()?;
        let chosen = config.select(modules)?.into_iter().map(|module| &module.name);
        let is_whole = config.whole(modules)?.keys().eq(self.whole.keys());
        if !(chosen.collect::<BTreeSet<_>>().into_iter().eq(self.pairs.keys()) && is_whole) {
            let problem = "the adapter beside it sits on other modules than its configuration says".into();
            return Err(LoraError::Malformed { path: ADAPTER_CONFIG.into(), problem });
        }
        for (name, pair) in &mut self.pairs {
            let (trained, fixed) = (config.rank_of(name), ranks.get(name).copied().unwrap_or(0));
            let (scale, has_magnitude) = (config.scale_of(name), pair.magnitude.is_some());
            let is_off = (pair.scale - scale).abs() > 1e-9 * scale.abs() || has_magnitude != config.use_dora;
            if trained.checked_add(fixed) != Some(pair.rank()) || is_off {
                let problem = format!(
                    "expected rank {trained} beside {fixed} fixed, scale {scale} and use_dora = {}, found rank {}, \
                     scale {} and use_dora = {has_magnitude}",
                    config.use_dora,
                    pair.rank(),
                    pair.scale
                );
                return Err(LoraError::Malformed { path: name.into(), problem });
            }
            *pair = pair.with_fixed(trained, name)?;
            pair.scale = scale;
        }
        Ok(Self { config, ..self })
    }
}
