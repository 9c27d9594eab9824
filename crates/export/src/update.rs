//! What an adapter changes: `W + scale * B A`, with `DoRA` its rows made as long as the magnitudes say; one
//! weight at a time. What it trains whole takes the place of the base's own.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use pronk_lora::{Adapter, LoraPair, ModuleShape, TensorKind, TensorName};
use pronk_model::{Base, DecoderConfig, EMBEDDINGS, HEAD, HostTensor, ModelError};

use crate::{Dtype, ExportError};

/// An adapter that has been found to fit a base.
pub struct Update<'a> {
    base: &'a Base,
    /// On layers that the base has.
    adapter: Adapter,
    /// Of the merged model.
    config: DecoderConfig,
    /// `None` keeps each tensor's own format.
    dtype: Option<Dtype>,
}

impl<'a> Update<'a> {
    /// Checks every module of `adapter` against the linear layers of `base`; lists all problems.
    pub fn new(base: &'a Base, adapter: &Adapter, dtype: Option<Dtype>) -> Result<Self, ExportError> {
        let adapter = adapter.onto_packed(&base.config.adapter_modules());
        check_fit(base, &adapter)?;
        let config = base.config.tuned_by(&adapter);
        Ok(Self { base, adapter, config, dtype })
    }

    /// What the merged model looks like.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// What it changes.
    pub fn base(&self) -> &Base {
        self.base
    }

    /// Shapes of all tensors of the merged model, by name.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let mut shapes = self.base.shapes();
        let unties = self.base.config.tie_word_embeddings && !self.config.tie_word_embeddings;
        for name in [EMBEDDINGS, HEAD] {
            if shapes.contains_key(name) || (unties && name == HEAD) {
                shapes.insert(name.to_owned(), vec![self.config.vocab_size, self.config.hidden_size]);
            }
        }
        shapes
    }

    /// Under which name the base has what becomes `name`.
    fn in_base<'n>(&self, name: &'n str) -> &'n str {
        let unties = name == HEAD && !self.config.tie_word_embeddings;
        if unties { self.base.config.head_weight() } else { name }
    }

    /// The format in which the tensor called `name` is written. What is quantized in the base, and
    /// all of a GGUF file, is dequantized to float32, and stays so unless told otherwise.
    pub fn dtype(&self, name: &str) -> Result<Dtype, ExportError> {
        match self.dtype {
            Some(dtype) => Ok(dtype),
            None => Ok(Dtype::of_file(self.base.dtype_of(self.in_base(name))?)),
        }
    }

    /// How many tensors the adapter changes.
    pub fn len(&self) -> usize {
        self.adapter.pairs.len() + self.adapter.whole.len()
    }

    /// The tensor called `name` as the merged model has it, rounded once, from float32. One
    /// that neither the adapter nor the format changes comes as the base's own bytes.
    pub fn apply(&self, name: &str) -> Result<HostTensor<'a>, ExportError> {
        let dtype = self.dtype(name)?;
        if let Some((trained, tensor)) = self.trained_whole(name) {
            return rounded(name, &values(tensor)?, trained.kind.shape_in_file(tensor.dims()), dtype);
        }
        let host = self.base.read(self.in_base(name))?;
        let pair = name.strip_suffix(".weight").and_then(|module| self.adapter.pairs.get(module));
        if pair.is_none() && host.dtype == dtype.in_file() {
            return Ok(host);
        }
        let mut weight = host.to_f32();
        if let Some(pair) = pair {
            let [rank, columns] = pair.a.dims();
            let (a, b) = (values(&pair.a)?, values(&pair.b)?);
            add_product(&mut weight, &a, &b, rank, columns, pair.scale as f32);
            if let Some(magnitude) = &pair.magnitude {
                set_norms(&mut weight, &values(magnitude)?, columns);
            }
        }
        rounded(name, &weight, host.shape, dtype)
    }

    /// What the adapter has in the place of the base's tensor called `name`.
    fn trained_whole(&self, name: &str) -> Option<(&TensorName, &Tensor<2>)> {
        let name = if name == HEAD { self.adapter.head_name() } else { TensorName::of_base(name) };
        self.adapter.whole.get_key_value(&name?)
    }
}

/// `values` as the tensor called `name` of a file. Numbers that `dtype` cannot hold are refused.
fn rounded(
    name: &str,
    values: &[f32],
    shape: Vec<usize>,
    dtype: Dtype,
) -> Result<HostTensor<'static>, ExportError> {
    if let Some(&found) = values.iter().find(|x| !dtype.holds(**x)) {
        let remedy = if found.is_finite() {
            "choose --dtype bf16 or f32"
        } else {
            "the base or the adapter is damaged"
        };
        return Err(ExportError::Number { tensor: name.into(), dtype: dtype.torch_name(), found, remedy });
    }
    Ok(HostTensor::from_f32(values, shape, dtype.in_file()))
}

/// Checks every module of `adapter` against the linear layers of `base`; lists all problems.
pub fn check_fit(base: &Base, adapter: &Adapter) -> Result<(), ExportError> {
    let modules = base.config.adapter_modules();
    let modules = modules.iter().filter(|module| module.part_of.is_none());
    let modules: BTreeMap<&str, &ModuleShape> = modules.map(|m| (m.name.as_str(), m)).collect();
    let whole_problem = |(name, tensor): (&TensorName, &Tensor<2>)| {
        let Some(module) = modules.get(name.module.as_str()) else {
            return Some(format!("{name}: the base has no such module"));
        };
        let (found, outputs) = (tensor.dims(), module.out_features);
        let (fits, expected) = match name.kind {
            TensorKind::Bias => (found == [1, outputs], format!("{outputs} numbers")),
            _ => (
                found[0] >= outputs && found[1] == module.in_features,
                format!("at least {outputs} rows of {}", module.in_features),
            ),
        };
        (!fits).then(|| format!("{name}: expected {expected}, found shape {found:?}"))
    };
    let problem = |(name, pair): (&String, &LoraPair)| {
        let rank = pair.rank();
        let Some(module) = modules.get(name.as_str()).filter(|module| !module.is_vocabulary()) else {
            return Some(format!("{name}: the base's blocks have no such linear layer"));
        };
        let expected = ([rank, module.in_features], [module.out_features, rank]);
        let found = (pair.a.dims(), pair.b.dims());
        let magnitude = pair.magnitude.as_ref().map(|m| m.dims()[1]);
        if let Some(found) = magnitude.filter(|rows| *rows != module.out_features) {
            let expected = module.out_features;
            return Some(format!("{name}: expected {expected} magnitudes, found {found}"));
        }
        (found != expected)
            .then(|| format!("{name}: expected A and B of shapes {expected:?}, found {found:?}"))
    };
    let mut problems: Vec<String> = adapter.pairs.iter().filter_map(problem).collect();
    problems.extend(adapter.whole.iter().filter_map(whole_problem));
    if adapter.pairs.values().all(|pair| pair.rank() == 0) {
        problems.push("it adapts no module at all".into());
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(ExportError::DoesNotFit { base: base.path.clone(), problems })
    }
}

/// `weight += scale * (b a)`, a row at a time.
///
/// On the host, so that the merged model does not depend on the device: graphics cards may
/// multiply float32 at less than its precision.
///
/// # Shapes
/// - weight: `[out, columns]`
/// - a: `[rank, columns]`
/// - b: `[out, rank]`
fn add_product(weight: &mut [f32], a: &[f32], b: &[f32], rank: usize, columns: usize, scale: f32) {
    let mut product = vec![0.0; columns];
    for (row, factors) in weight.chunks_exact_mut(columns).zip(b.chunks_exact(rank)) {
        product.fill(0.0);
        for (factor, a) in factors.iter().zip(a.chunks_exact(columns)) {
            for (sum, x) in product.iter_mut().zip(a) {
                *sum += factor * x;
            }
        }
        for (w, x) in row.iter_mut().zip(&product) {
            *w += scale * x;
        }
    }
}

/// Makes each row of `weight`, `[out, columns]`, as long as `magnitude`, `[out]`, says.
fn set_norms(weight: &mut [f32], magnitude: &[f32], columns: usize) {
    for (row, magnitude) in weight.chunks_exact_mut(columns).zip(magnitude) {
        let norm = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        let factor = (f64::from(*magnitude) / norm) as f32;
        for x in row {
            *x *= factor;
        }
    }
}

/// A tensor's numbers, from wherever it lies.
pub fn values(tensor: &Tensor<2>) -> Result<Vec<f32>, ExportError> {
    let values = tensor.try_to_vec_as::<f32>();
    values.map_err(|e| ModelError::Device(e.to_string()).into())
}

#[cfg(test)]
mod tests {
    use super::add_product;

    #[test]
    fn the_product_of_b_and_a_is_scaled_and_added() {
        let mut weight = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]; // [3, 2]
        let a = [1.0, 2.0, 10.0, 20.0]; // [rank 2, 2]
        let b = [1.0, 0.0, 0.0, 1.0, 1.0, -1.0]; // [3, rank 2]
        add_product(&mut weight, &a, &b, 2, 2, 0.5);
        let expected = [1.5, 3.0, 8.0, 14.0, 0.5, -3.0];
        assert!(weight.iter().zip(expected).all(|(w, e)| (w - e).abs() < 1e-6), "{weight:?}");
    }
}
