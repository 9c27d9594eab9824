//! One adapter out of several: a weighted sum of their updates, as PEFT's `add_weighted_adapter` forms it.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::Tensor;

use crate::{Adapter, LoraConfig, LoraError, LoraPair, TargetModules};

/// How the pairs of a module become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Combination {
    /// One below the other: the weighted sum of the updates, exactly, at the sum of their ranks.
    Cat,
    /// Weighted sums of the A and of the B: the rank stays, and the update is another than the sum of the
    /// updates, unless there is only one.
    Linear,
}

impl Adapter {
    /// `sum(weight * update)` over `adapters`, each with its weight, or what [`Combination::Linear`] makes
    /// of it. Scales are folded into the factors; the result's is 1.
    pub fn combine(adapters: &[(&Self, f64)], how: Combination) -> Result<Self, LoraError> {
        let refuse = |problem: String| Err(LoraError::Combine { problem });
        if let Some((_, weight)) = adapters.iter().find(|(_, weight)| !weight.is_finite()) {
            return refuse(format!("expected weights that are numbers, found {weight}"));
        }
        if let Some(name) = adapters.iter().find_map(|(adapter, _)| adapter.whole.keys().next()) {
            return refuse(format!(
                "{name} is trained whole, and how far it has moved only its base can tell; merge that adapter (pronk merge)"
            ));
        }
        check_restored(adapters, how)?;
        let mut gathered: BTreeMap<&String, Vec<(&LoraPair, f64)>> = BTreeMap::new();
        for (adapter, weight) in adapters {
            for (name, pair) in &adapter.pairs {
                gathered.entry(name).or_default().push((pair, *weight * pair.scale));
            }
        }
        let mut pairs = BTreeMap::new();
        for (name, parts) in gathered {
            if parts.iter().any(|(pair, _)| pair.magnitude.is_some()) {
                return refuse(format!("{name}: magnitudes of DoRA do not add up; merge it instead"));
            }
            let shapes: BTreeSet<_> = parts.iter().map(|(p, _)| (p.a.dims()[1], p.b.dims()[0])).collect();
            if shapes.len() > 1 {
                return refuse(format!("{name}: inputs and outputs differ, found {shapes:?}"));
            }
            let ranks: BTreeSet<usize> = parts.iter().map(|(pair, _)| pair.rank()).collect();
            if how == Combination::Linear && ranks.len() > 1 {
                let problem = format!("{name}: expected one rank, found {ranks:?}; take the method cat");
                return refuse(problem);
            }
            let pair = match how {
                Combination::Cat => Some(stacked(&parts)),
                Combination::Linear => summed(&parts),
            };
            pairs.extend(pair.map(|pair| (name.clone(), pair)));
        }
        Ok(Self::of_pairs(&common(adapters, &pairs), pairs))
    }
}

/// Adapters that bring back what the base lost when it was quantized (`LoftQ`, `QERA`) make up for it, each of them: they
/// add up with their like alone, and where it is made up for once.
fn check_restored(adapters: &[(&Adapter, f64)], how: Combination) -> Result<(), LoraError> {
    let mut started = adapters.iter().map(|(adapter, _)| &adapter.config.loftq_config);
    let Some(first) =
        started.next().filter(|_| adapters.iter().any(|(a, _)| a.config.loftq_config.is_some()))
    else {
        return Ok(());
    };
    let refuse = |problem: String| Err(LoraError::Combine { problem });
    if started.any(|other| other != first) {
        let problem = "some bring back what the quantized base has lost (LoftQ, QERA), others do not, or another loss; \
                       merge them one by one (pronk merge)";
        return refuse(problem.into());
    }
    if how == Combination::Linear {
        let problem = "all of them make up for what the quantized base has lost (LoftQ, QERA), which sums of factors would \
                       multiply; take the method cat";
        return refuse(problem.into());
    }
    let total: f64 = adapters.iter().map(|(_, weight)| weight).sum();
    if (total - 1.0).abs() > 1e-6 {
        return refuse(format!(
            "all of them make up for what the quantized base has lost (LoftQ, QERA): expected weights that add up to 1, found \
             {total}"
        ));
    }
    Ok(())
}

/// PEFT puts weight and scale on A.
fn stacked(parts: &[(&LoraPair, f64)]) -> LoraPair {
    let a = parts.iter().map(|(pair, factor)| pair.a.clone() * *factor).collect();
    let b = parts.iter().map(|(pair, _)| pair.b.clone()).collect();
    LoraPair { a: Tensor::cat(a, 0), b: Tensor::cat(b, 1), scale: 1.0, magnitude: None, fixed: None }
}

/// Weight and scale are shared out between A and B, the sign on A.
fn summed(parts: &[(&LoraPair, f64)]) -> Option<LoraPair> {
    let root = |factor: f64| factor.abs().sqrt();
    let weighted = parts.iter().map(|(pair, factor)| {
        (pair.a.clone() * (root(*factor) * factor.signum()), pair.b.clone() * root(*factor))
    });
    let (a, b) = weighted.reduce(|(a, b), (more_a, more_b)| (a + more_a, b + more_b))?;
    Some(LoraPair { a, b, scale: 1.0, magnitude: None, fixed: None })
}

/// The first one's configuration; where the adapters choose among layers in their own ways, with the
/// modules by their whole names.
fn common(adapters: &[(&Adapter, f64)], pairs: &BTreeMap<String, LoraPair>) -> LoraConfig {
    let Some((first, _)) = adapters.first() else { return LoraConfig::default() };
    let config = LoraConfig { rslora: false, dropout: 0.0, ..first.config.clone() };
    let alike = adapters.iter().all(|(adapter, _)| {
        let LoraConfig { layers_to_transform, exclude_modules, target_modules, .. } = &adapter.config;
        *layers_to_transform == config.layers_to_transform
            && exclude_modules.is_empty()
            && !target_modules.are_whole_names()
    });
    if alike {
        return config;
    }
    LoraConfig { target_modules: TargetModules::Names(pairs.keys().cloned().collect()), ..config }
}
