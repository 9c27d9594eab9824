//! States to go on from: the adapter, what the optimizer remembers, and how far the run has come.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use pronk_kernels::{AdamWState, Blockwise};
use pronk_lora::{Adapter, ModuleShape};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::optimizer::{TensorState, numbers};
use crate::{Optimizer, RunFolder, SampleRound, TrainConfig, TrainError};

const STATE: &str = "trainer_state.json";
const STATES: &str = "optimizer.safetensors";

/// How far a run has come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Steps done.
    pub step: u64,
    /// The lowest eval loss so far, and the step it was measured after.
    pub best: Option<(f64, u64)>,
    /// The eval loss before the first step.
    pub eval_before: Option<f64>,
    /// Hash of the prepared rows the run learns from.
    pub data_key: String,
    /// What the sample prompts were answered so far.
    pub samples: Vec<SampleRound>,
}

/// A state that was read back.
#[derive(Debug)]
pub struct Checkpoint {
    /// How far the run had come.
    pub state: TrainerState,
    /// The adapter as it was.
    pub adapter: Adapter,
    /// The optimizer as it was.
    pub optimizer: Optimizer,
}

/// Writes a checkpoint beside its name, syncs it, renames it, and removes older ones above
/// `keep_last`. Returns where it is.
pub fn save(
    folder: &RunFolder,
    state: &TrainerState,
    adapter: &Adapter,
    optimizer: &Optimizer,
    base: &str,
    keep_last: usize,
) -> Result<PathBuf, TrainError> {
    let root = folder.checkpoints();
    let (done, partial) = (root.join(name(state.step)), root.join(format!(".{}.partial", name(state.step))));
    let write = || {
        fs::create_dir_all(&partial).map_err(TrainError::io(&partial))?;
        adapter.save(&partial, base, true)?;
        RunFolder::write(&partial.join(STATES), &states_to_bytes(optimizer, &partial)?)?;
        let text = serde_json::to_vec_pretty(state)
            .map_err(|e| TrainError::Io { path: partial.join(STATE), source: e.into() })?;
        RunFolder::write(&partial.join(STATE), &text)?;
        if done.exists() {
            fs::remove_dir_all(&done).map_err(TrainError::io(&done))?;
        }
        fs::rename(&partial, &done).map_err(TrainError::io(&done))?;
        sync(&root)
    };
    let written = write();
    if written.is_err() {
        // What cannot be removed either is passed over when the newest checkpoint is looked for.
        let _ = fs::remove_dir_all(&partial);
    }
    written?;
    let mut all = list(folder);
    while all.len() > keep_last {
        let (_, oldest) = all.remove(0);
        fs::remove_dir_all(&oldest).map_err(TrainError::io(&oldest))?;
    }
    Ok(done)
}

/// The newest checkpoint that reads back whole. Damaged ones are passed over and named to `warn`.
pub fn load_newest(
    folder: &RunFolder,
    modules: &[ModuleShape],
    config: &TrainConfig,
    device: &Device,
    mut warn: impl FnMut(String),
) -> Result<Checkpoint, TrainError> {
    for (_, path) in list(folder).into_iter().rev() {
        match load(&path, modules, config, device) {
            Ok(checkpoint) => return Ok(checkpoint),
            Err(e) => warn(format!("passing over a damaged checkpoint: {e}")),
        }
    }
    Err(TrainError::NoCheckpoint(folder.root().into()))
}

/// Where the newest checkpoint is.
pub fn newest(folder: &RunFolder) -> Option<PathBuf> {
    list(folder).pop().map(|(_, path)| path)
}

fn load(
    path: &Path,
    modules: &[ModuleShape],
    config: &TrainConfig,
    device: &Device,
) -> Result<Checkpoint, TrainError> {
    let file = path.join(STATE);
    let text = fs::read(&file).map_err(TrainError::io(&file))?;
    let state: TrainerState = serde_json::from_slice(&text)
        .map_err(|e| TrainError::Checkpoint { path: file, problem: e.to_string() })?;
    let adapter = Adapter::load(path, modules, device)?;
    let mut optimizer = Optimizer::new(config, &adapter);
    states_from_file(&mut optimizer, &path.join(STATES), device)?;
    Ok(Checkpoint { state, adapter, optimizer })
}

/// Whole checkpoints by step, oldest first.
fn list(folder: &RunFolder) -> Vec<(u64, PathBuf)> {
    let Ok(entries) = fs::read_dir(folder.checkpoints()) else { return Vec::new() };
    let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix("step-")?.parse::<u64>().ok();
    let found = entries.filter_map(|entry| entry.ok().map(|e| e.path()));
    found.filter_map(|path| Some((step(&path)?, path))).collect::<BTreeMap<_, _>>().into_iter().collect()
}

fn name(step: u64) -> String {
    format!("step-{step:06}")
}

fn sync(directory: &Path) -> Result<(), TrainError> {
    File::open(directory).and_then(|d| d.sync_all()).map_err(TrainError::io(directory))
}

fn states_to_bytes(optimizer: &Optimizer, path: &Path) -> Result<Vec<u8>, TrainError> {
    let damaged = |problem: String| TrainError::Checkpoint { path: path.join(STATES), problem };
    let mut tensors = Vec::new();
    for (name, state) in &optimizer.states {
        for (part, dtype, shape, bytes) in parts_of(state)? {
            tensors.push((format!("{name}.{part}"), dtype, shape, bytes));
        }
    }
    let views = tensors
        .iter()
        .map(|(key, dtype, shape, bytes)| Ok((key, TensorView::new(*dtype, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|e| damaged(e.to_string()))?;
    safetensors::serialize(views, None::<HashMap<String, String>>).map_err(|e| damaged(e.to_string()))
}

/// What a state is made of: how its key ends, format, shape and bytes.
type Part = (&'static str, Dtype, Vec<usize>, Vec<u8>);

fn parts_of(state: &TensorState) -> Result<Vec<Part>, TrainError> {
    let floats = |values: Vec<f32>| values.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>();
    let tensor = |name, tensor: &Tensor<2>| -> Result<Part, TrainError> {
        Ok((name, Dtype::F32, tensor.dims().to_vec(), floats(numbers(tensor)?)))
    };
    Ok(match state {
        TensorState::Moments(AdamWState { m, v }) => vec![tensor("m", m)?, tensor("v", v)?],
        TensorState::Momentum(momentum) => vec![tensor("momentum", momentum)?],
        TensorState::EightBit { m, v } => {
            let codes = |name, x: &Blockwise| (name, Dtype::U8, vec![x.codes.len()], x.codes.clone());
            let scales =
                |name, x: &Blockwise| (name, Dtype::F32, vec![x.absmax.len()], floats(x.absmax.clone()));
            vec![codes("m", m), scales("m.absmax", m), codes("v", v), scales("v.absmax", v)]
        }
    })
}

fn states_from_file(optimizer: &mut Optimizer, path: &Path, device: &Device) -> Result<(), TrainError> {
    let damaged = |problem: String| TrainError::Checkpoint { path: path.into(), problem };
    let bytes = fs::read(path).map_err(TrainError::io(path))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| damaged(e.to_string()))?;
    let read = |key: &str, dtype: Dtype, shape: &[usize]| {
        let view = file.tensor(key).map_err(|e| damaged(format!("{key}: {e}")))?;
        if view.shape() != shape || view.dtype() != dtype {
            let found = (view.dtype(), view.shape());
            return Err(damaged(format!("{key}: expected {dtype:?} of shape {shape:?}, found {found:?}")));
        }
        Ok(view.data().to_vec())
    };
    let floats = |key: &str, shape: &[usize]| {
        let bytes = read(key, Dtype::F32, shape)?;
        let floats: Vec<f32> = bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        Ok::<_, TrainError>(floats)
    };
    for (name, state) in &mut optimizer.states {
        let key = |part: &str| format!("{name}.{part}");
        let tensor = |part: &str, like: &mut Tensor<2>| {
            let data = TensorData::new(floats(&key(part), &like.dims())?, like.dims());
            *like = Tensor::from_data(data, device);
            Ok::<_, TrainError>(())
        };
        let quantized = |part: &str, like: &mut Blockwise| {
            like.codes = read(&key(part), Dtype::U8, &[like.codes.len()])?;
            like.absmax = floats(&key(&format!("{part}.absmax")), &[like.absmax.len()])?;
            Ok::<_, TrainError>(())
        };
        match state {
            TensorState::Moments(AdamWState { m, v }) => tensor("m", m).and_then(|()| tensor("v", v))?,
            TensorState::Momentum(momentum) => tensor("momentum", momentum)?,
            TensorState::EightBit { m, v } => quantized("m", m).and_then(|()| quantized("v", v))?,
        }
    }
    Ok(())
}
