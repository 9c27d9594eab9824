//! Adapters that start from singular values of the base's weights, or stand beside such.

use burn::tensor::{Device, Tensor, TensorData};
use pronk_lora::{Adapter, LoftQConfig, LoraConfig, LoraError, ModuleShape, Sought};

use crate::calibration::{BATCH_TOKENS, Calibration};
use crate::mapped::Pages;
use crate::{Base, Decoder, DecoderConfig, ModelError, Scheme};

/// Of about how many records QERA looks at what layers read, and how many tokens of each at most.
pub const CALIBRATION: [usize; 2] = [128, 256];

/// The weights that a fresh adapter may start from, or restore.
#[derive(Debug, Clone, Copy)]
pub struct StartWeights<'a> {
    /// The base that is trained on.
    pub base: &'a Base,
    /// The same before it was quantized, where it was.
    pub original: Option<&'a Base>,
    /// Token ids of records that show what its layers read, for `QERA`.
    pub records: &'a [Vec<u32>],
}

impl Decoder {
    /// A fresh adapter as `init_lora_weights` and `restore_rank` ask for it. It changes nothing yet, but for what brings a
    /// quantized base nearer to what it was. `progress` hears how many modules' weights are decomposed, and how
    /// many will be; one at a time is in memory.
    pub fn started_adapter(
        &self,
        config: &LoraConfig,
        weights: StartWeights,
        seed: u64,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Adapter, ModelError> {
        let init = config.init_lora_weights;
        if init.starts_from_zero() && !config.restores() {
            return Ok(self.new_adapter(config, seed)?);
        }
        let lost = |original| Lost { original, base: weights.base };
        let lost = match weights.original {
            _ if !config.restores() => None,
            Some(original) => Some(lost(original)),
            None => {
                let expected = "a base that is quantized when the run starts, for what it loses by it".into();
                let (knob, asked) = match config.restore_rank {
                    0 => ("init_lora_weights", init.to_string()),
                    rank => ("restore_rank", rank.to_string()),
                };
                let found = format!("{asked} over a base as it is");
                return Err(LoraError::Config { knob, expected, found }.into());
            }
        };
        let mut calibration = match &lost {
            Some(lost) if config.looks_at_inputs() => {
                Some(Calibration::of(lost.original, weights.records, self.device())?)
            }
            _ => None,
        };
        let loftq_config = match lost {
            Some(_) => Some(loftq_config(config, weights.base)?),
            None => config.loftq_config.clone(),
        };
        let config = LoraConfig { loftq_config, ..config.clone() };
        let modules = self.config.adapter_modules();
        let mut adapter = Adapter::init(&config, &modules, seed, self.device())?;
        let (mut done, total) = (0, adapter.pairs.len());
        for module in &modules {
            let Some(pair) = adapter.pairs.get_mut(&module.name) else { continue };
            progress(done, total);
            done += 1;
            if lost.is_some() && !weights.base.is_quantized(&format!("{}.weight", module.layer())) {
                continue; // nothing was lost there
            }
            let matrix = match &lost {
                Some(lost) => lost.by(module, self.device())?,
                None => weight(weights.base, module, self.device())?,
            };
            let inputs = calibration.as_mut().and_then(|them| them.inputs_of(module.layer()));
            let sought = Sought { matrix: &matrix, inputs, turns: init.turns(), seed, name: &module.name };
            if init.starts_from_zero() {
                let rank = config.fixed_rank_of(module);
                pair.fix_beside(sought, rank, self.precision)?;
                continue;
            }
            pair.approximate(sought);
            if init.keeps_start() {
                pair.keep_start(&module.name)?;
            }
        }
        progress(total, total);
        if config.use_dora {
            self.set_magnitudes(&mut adapter);
        }
        Ok(adapter)
    }
}

/// Bytes that are there while `targets` are started as `lora` asks on a base that looks like `config`, beside its weights:
/// in float32 the matrix at hand, what it was and what it has lost; and for QERA the hidden states of its records, what a
/// block's layers read of some of them, and that times itself, for those and for all. In 16 bits the original's block.
pub fn start_bytes(config: &DecoderConfig, lora: &LoraConfig, targets: &[&ModuleShape]) -> usize {
    const FLOAT: usize = size_of::<f32>();
    let matrix = targets.iter().map(|m| m.in_features * m.out_features).max().unwrap_or(0);
    if !lora.restores() {
        return if lora.init_lora_weights.starts_from_zero() { 0 } else { 2 * FLOAT * matrix };
    }
    if !lora.looks_at_inputs() {
        return 3 * FLOAT * matrix;
    }
    let [q, _] = config.attention_widths();
    let (hidden, inner, [records, tokens]) = (config.hidden_size, config.intermediate_size, CALIBRATION);
    let squares: usize = [hidden, q, hidden, inner].map(|width| width * width).iter().sum();
    let read = BATCH_TOKENS * (4 * hidden + 2 * q + 3 * inner);
    let linear: usize = config.linear_modules().iter().map(|m| m.in_features * m.out_features).sum();
    let block = linear / config.num_hidden_layers.max(1);
    FLOAT * (3 * matrix + records * tokens * hidden + read + 2 * squares) + size_of::<u16>() * block
}

/// What quantizing a base has taken away.
struct Lost<'a> {
    original: &'a Base,
    base: &'a Base,
}

impl Lost<'_> {
    fn by(&self, module: &ModuleShape, device: &Device) -> Result<Tensor<2>, ModelError> {
        let original = weight(self.original, module, device)?;
        // Nobody reads it again.
        let pages = self.original.pages(&format!("{}.weight", module.layer()));
        pages.iter().for_each(Pages::release);
        Ok(original - weight(self.base, module, device)?)
    }
}

/// A module's weight, `[out, in]`, in float32.
fn weight(base: &Base, module: &ModuleShape, device: &Device) -> Result<Tensor<2>, ModelError> {
    let layer = module.layer();
    let rows = module.part_of.as_ref().map_or(0..module.out_features, |part| part.rows.clone());
    let columns = module.in_features;
    let mut values = base.read(&format!("{layer}.weight"))?.to_f32();
    values.truncate(rows.end * columns);
    values.drain(..rows.start * columns);
    Ok(Tensor::from_data(TensorData::new(values, [rows.len(), columns]), device))
}

/// What the recipe says of the quantized base, or what it is.
fn loftq_config(config: &LoraConfig, base: &Base) -> Result<LoftQConfig, LoraError> {
    let found = base.as_loftq_config();
    match &config.loftq_config {
        Some(asked) if asked.loftq_bits != found.loftq_bits => Err(LoraError::Config {
            knob: "loftq_config.loftq_bits",
            expected: format!(
                "{}, as the base is quantized to {}",
                found.loftq_bits,
                base.quantization().unwrap_or_default()
            ),
            found: asked.loftq_bits.to_string(),
        }),
        Some(asked) => Ok(LoftQConfig { skip_modules: found.skip_modules, ..asked.clone() }),
        None => Ok(found),
    }
}

impl Base {
    /// How an adapter says that it belongs to this base, quantized as it is; of no bits where it is not.
    pub fn as_loftq_config(&self) -> LoftQConfig {
        let quantization = self.quantization().unwrap_or_default();
        let scheme = Scheme::ALL.into_iter().find(|scheme| scheme.to_string() == quantization);
        let loftq_bits = scheme.map_or(0, Scheme::bits);
        LoftQConfig { loftq_bits, loftq_iter: 1, skip_modules: self.skip_modules().to_vec() }
    }
}
