//! An adapter in the layout of another runtime.

mod gguf;
mod mlx;

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use pronk_lora::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, LoraConfig, LoraPair};
use pronk_model::{Base, Staging};

use crate::update::{check_fit, values};
use crate::{ExportError, Finish, Runtime, Verification, verify};

/// How to write an adapter for another runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportOptions {
    /// Who is to load it.
    pub runtime: Runtime,
    /// What the adapter says it belongs to, where its layout has a place for that.
    pub base_name: String,
    /// Tokens to compare what was written with base and adapter on.
    pub prompt: Vec<u32>,
}

/// What an export has written.
#[derive(Debug, Clone, PartialEq)]
pub struct ExportReport {
    /// The runtime's own files, in the directory.
    pub files: Vec<&'static str>,
    /// How many modules the adapter changes.
    pub adapted: usize,
    /// What the runtime's user has to know.
    pub notes: Vec<String>,
    /// How closely what was written, read back, answers as base and adapter do.
    pub verification: Verification,
}

/// Writes `adapter` for another runtime into the directory `out`, which must not exist or be empty.
///
/// An adapter that the runtime could not load onto `base` is refused with the reason. `finish` may add files.
/// What was written is read back, and its answers on `base` compared with the adapter's on `device`, where the
/// adapter must lie; only then is the directory renamed to `out`. Whatever fails before leaves nothing behind.
pub fn export(
    base: &Base,
    adapter: &Adapter,
    out: &Path,
    options: &ExportOptions,
    device: &Device,
    finish: &mut Finish,
) -> Result<ExportReport, ExportError> {
    let runtime = options.runtime;
    // Runtimes know the layers of a checkpoint, not their parts.
    let adapter = &adapter.onto_packed(&base.config.adapter_modules());
    check_fit(base, adapter)?;
    let refusals = runtime.refusals(base, adapter);
    if !refusals.is_empty() {
        return Err(ExportError::Refused { runtime, problems: refusals });
    }
    verify::check_prompt(&base.config.tuned_by(adapter), &options.prompt)?;
    let staging = Staging::beside(out, Some(&base.path))?;
    let files = write(base, adapter, options, &staging)?;
    finish(staging.path()).map_err(ExportError::Finish)?;
    let found = read(base, runtime, staging.path(), device)?;
    let verification = verify::verify_adapter(base, adapter, &found, &options.prompt, device)?;
    let notes = runtime.notes(base, adapter);
    staging.publish()?;
    let adapted = adapter.pairs.len() + adapter.whole.len();
    Ok(ExportReport { files, adapted, notes, verification })
}

fn write(
    base: &Base,
    adapter: &Adapter,
    options: &ExportOptions,
    staging: &Staging,
) -> Result<Vec<&'static str>, ExportError> {
    match options.runtime {
        Runtime::Peft | Runtime::Vllm | Runtime::MistralRs => {
            adapter.files(staging.destination(), &options.base_name, false)?.write(staging.path())?;
            Ok(vec![ADAPTER_CONFIG, ADAPTER_WEIGHTS])
        }
        Runtime::Gguf | Runtime::Ollama => gguf::write(base, &host_pairs(adapter)?, staging),
        Runtime::Mlx => mlx::write(base, adapter.config.dropout, host_pairs(adapter)?, staging),
    }
}

/// The adapter that a runtime would find in `dir`.
fn read(base: &Base, runtime: Runtime, dir: &Path, device: &Device) -> Result<Adapter, ExportError> {
    match runtime {
        Runtime::Peft | Runtime::Vllm | Runtime::MistralRs => {
            Ok(Adapter::load(dir, &base.config.adapter_modules(), device)?)
        }
        Runtime::Gguf | Runtime::Ollama => gguf::read(base, dir, device),
        Runtime::Mlx => mlx::read(dir, device),
    }
}

/// A pair on the host: what it adds to its module's weight is `scale * b a`, and with `DoRA` the rows of the sum are
/// as long as `magnitude` says.
struct HostPair {
    module: String,
    rank: usize,
    scale: f64,
    /// `[rank, in]`
    a: Vec<f32>,
    /// `[out, rank]`
    b: Vec<f32>,
    /// `[out]`
    magnitude: Option<Vec<f32>>,
}

impl HostPair {
    fn in_features(&self) -> usize {
        self.a.len() / self.rank
    }

    fn out_features(&self) -> usize {
        self.b.len() / self.rank
    }

    /// The same update with its scale in B.
    fn folded(self) -> Self {
        let b = self.b.iter().map(|x| (f64::from(*x) * self.scale) as f32).collect();
        Self { b, scale: 1.0, ..self }
    }
}

/// Every pair on the host. Refuses numbers that are not finite, and an adapter that changes nothing.
fn host_pairs(adapter: &Adapter) -> Result<Vec<HostPair>, ExportError> {
    let mut pairs = Vec::with_capacity(adapter.pairs.len());
    for (module, pair) in &adapter.pairs {
        let (a, b) = (values(&pair.a)?, values(&pair.b)?);
        let magnitude = pair.magnitude.as_ref().map(values).transpose()?;
        if let Some(&found) = a.iter().chain(&b).chain(magnitude.iter().flatten()).find(|x| !x.is_finite()) {
            let (tensor, remedy) = (module.clone(), "the adapter is damaged");
            return Err(ExportError::Number { tensor, dtype: "float32", found, remedy });
        }
        pairs.push(HostPair {
            module: module.clone(),
            rank: pair.rank(),
            scale: pair.scale,
            a,
            b,
            magnitude,
        });
    }
    if pairs.iter().all(|pair| pair.b.iter().all(|x| *x == 0.0)) {
        return Err(ExportError::ChangesNothing);
    }
    Ok(pairs)
}

/// An adapter of these pairs, on `device`.
fn adapter_of(pairs: Vec<HostPair>, device: &Device) -> Adapter {
    let tensor =
        |values: Vec<f32>, shape: [usize; 2]| Tensor::<2>::from_data(TensorData::new(values, shape), device);
    let on_device = |pair: HostPair| {
        let (rows, columns) = (pair.out_features(), pair.in_features());
        let HostPair { module, rank, scale, a, b, magnitude } = pair;
        let magnitude = magnitude.map(|magnitude| tensor(magnitude, [1, rows]));
        (
            module,
            LoraPair {
                a: tensor(a, [rank, columns]),
                b: tensor(b, [rows, rank]),
                scale,
                magnitude,
                fixed: None,
            },
        )
    };
    Adapter::of_pairs(&LoraConfig::default(), pairs.into_iter().map(on_device).collect())
}
