//! An adapter out of a tuned model: the reverse of a merge.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use pronk_lora::{Adapter, LoraConfig, LoraPair, TargetModules, low_rank_factors};
use pronk_model::Base;

use crate::ExportError;
use crate::update::values;

/// How often the random directions are turned towards the largest singular values.
const TURNS: usize = 4;

/// An adapter, and how much of the difference between two models it holds.
#[derive(Debug, Clone)]
pub struct Extraction {
    /// On every targeted layer that differs.
    pub adapter: Adapter,
    /// Those layers.
    pub layers: Vec<ExtractedLayer>,
    /// Tensors that differ and are on no targeted layer: what the adapter leaves out altogether.
    pub left_out: Vec<String>,
}

/// What became of a layer's difference.
#[derive(Debug, Clone, PartialEq)]
pub struct ExtractedLayer {
    /// Its name.
    pub name: String,
    /// Squared Frobenius norm of the difference.
    pub energy: f64,
    /// The part of it that the adapter keeps.
    pub kept: f64,
}

impl Extraction {
    /// Share of the energy of all differences that is kept, of targeted layers alone.
    pub fn kept(&self) -> f64 {
        let sum = |of: fn(&ExtractedLayer) -> f64| self.layers.iter().map(of).sum::<f64>();
        sum(|layer| layer.kept) / sum(|layer| layer.energy)
    }
}

/// The adapter of `config`'s rank, scale and targets that makes `base` most like `tuned`: of every layer's
/// difference the largest singular values, whose factors share them. One layer at a time is in
/// memory, four times. `progress` hears how many layers are done, and how many there are.
pub fn extract(
    base: &Base,
    tuned: &Base,
    config: &LoraConfig,
    seed: u64,
    device: &Device,
    mut progress: impl FnMut(usize, usize),
) -> Result<Extraction, ExportError> {
    must_be_alike(base, tuned)?;
    let modules = base.config.linear_modules();
    let chosen = config.select(&modules)?;
    let (mut pairs, mut layers, mut left_out) = (BTreeMap::new(), Vec::new(), Vec::new());
    for (done, module) in chosen.iter().enumerate() {
        progress(done, chosen.len());
        let (rank, scale) = (config.rank_of(&module.name), config.scale_of(&module.name));
        let difference = difference(base, tuned, &format!("{}.weight", module.name))?;
        let energy: f64 = difference.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        if energy == 0.0 {
            continue;
        }
        let shape = [module.out_features, module.in_features];
        let difference = Tensor::from_data(TensorData::new(difference, shape), device);
        let factors = low_rank_factors(&difference, rank, TURNS, seed, &module.name);
        let kept = values(&factors.energy.unsqueeze_dim(0))?.first().copied().map_or(0.0, f64::from);
        let share = 1.0 / scale.sqrt();
        let pair =
            LoraPair { a: factors.a * share, b: factors.b * share, scale, magnitude: None, fixed: None };
        pairs.insert(module.name.clone(), pair);
        layers.push(ExtractedLayer { name: module.name.clone(), energy, kept: kept.min(energy) });
    }
    progress(chosen.len(), chosen.len());
    if pairs.is_empty() {
        let problem = "expected a targeted layer that differs from the base's, found none".into();
        return Err(ExportError::Malformed { path: tuned.path.clone(), problem });
    }
    for (name, _) in base.config.tensors() {
        let targeted = name.strip_suffix(".weight").is_some_and(|m| chosen.iter().any(|c| c.name == m));
        if !targeted && difference(base, tuned, &name)?.iter().any(|&x| x != 0.0) {
            left_out.push(name);
        }
    }
    // By whole names, where the others' ends would name layers that do not differ.
    let complete = pairs.len() == chosen.len();
    let names = TargetModules::Names(pairs.keys().cloned().collect());
    let config =
        if complete { config.clone() } else { LoraConfig { target_modules: names, ..config.clone() } };
    Ok(Extraction { adapter: Adapter::of_pairs(&config, pairs), layers, left_out })
}

/// Refuses models of different tensors; lists every difference.
fn must_be_alike(base: &Base, tuned: &Base) -> Result<(), ExportError> {
    let found: BTreeMap<_, _> = tuned.config.tensors().into_iter().collect();
    let problem = |(name, expected): (String, Vec<usize>)| match found.get(&name) {
        Some(shape) if *shape == expected => None,
        Some(shape) => {
            Some(format!("{name}: expected shape {expected:?}, found {shape:?} in the tuned model"))
        }
        None => Some(format!("{name}: missing in the tuned model")),
    };
    let problems: Vec<String> = base.config.tensors().into_iter().filter_map(problem).collect();
    if problems.is_empty() {
        return Ok(());
    }
    Err(ExportError::DoesNotFit { base: base.path.clone(), problems })
}

/// The numbers of a tensor in `tuned` less those in `base`, all finite.
fn difference(base: &Base, tuned: &Base, name: &str) -> Result<Vec<f32>, ExportError> {
    let (before, mut after) = (base.read(name)?.to_f32(), tuned.read(name)?.to_f32());
    for (x, y) in after.iter_mut().zip(&before) {
        *x -= y;
    }
    match after.iter().find(|x| !x.is_finite()) {
        None => Ok(after),
        Some(&found) => Err(ExportError::Number {
            tensor: name.to_owned(),
            dtype: "float32",
            found,
            remedy: "the base or the tuned model is damaged",
        }),
    }
}
