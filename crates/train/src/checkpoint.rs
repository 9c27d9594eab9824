//! States to go on from: the adapter, the optimizer's moments, and how far the run has come.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use pronk_kernels::AdamWState;
use pronk_lora::{Adapter, ModuleShape};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::{Optimizer, RunFolder, SampleRound, TrainError};

const STATE: &str = "trainer_state.json";
const MOMENTS: &str = "optimizer.safetensors";
/// The four moments of a module, as their keys end.
const PARTS: [&str; 4] = ["lora_A.m", "lora_A.v", "lora_B.m", "lora_B.v"];

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
        RunFolder::write(&partial.join(MOMENTS), &moments_to_bytes(optimizer, &partial)?)?;
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
    weight_decay: f64,
    device: &Device,
    mut warn: impl FnMut(String),
) -> Result<Checkpoint, TrainError> {
    for (_, path) in list(folder).into_iter().rev() {
        match load(&path, modules, weight_decay, device) {
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
    weight_decay: f64,
    device: &Device,
) -> Result<Checkpoint, TrainError> {
    let file = path.join(STATE);
    let text = fs::read(&file).map_err(TrainError::io(&file))?;
    let state: TrainerState = serde_json::from_slice(&text)
        .map_err(|e| TrainError::Checkpoint { path: file, problem: e.to_string() })?;
    let adapter = Adapter::load(path, modules, device)?;
    let mut optimizer = Optimizer::new(weight_decay, &adapter);
    moments_from_file(&mut optimizer, &path.join(MOMENTS), device)?;
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

fn moments_to_bytes(optimizer: &Optimizer, path: &Path) -> Result<Vec<u8>, TrainError> {
    let damaged = |problem: String| TrainError::Checkpoint { path: path.join(MOMENTS), problem };
    let mut tensors = Vec::new();
    for (module, (a, b)) in &optimizer.moments {
        for (part, tensor) in PARTS.iter().zip([&a.m, &a.v, &b.m, &b.v]) {
            let values = tensor.try_to_vec_as::<f32>().map_err(|e| TrainError::Device(e.to_string()))?;
            let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
            tensors.push((format!("{module}.{part}"), tensor.dims().to_vec(), bytes));
        }
    }
    let views = tensors
        .iter()
        .map(|(key, shape, bytes)| Ok((key, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|e| damaged(e.to_string()))?;
    safetensors::serialize(views, None::<HashMap<String, String>>).map_err(|e| damaged(e.to_string()))
}

fn moments_from_file(optimizer: &mut Optimizer, path: &Path, device: &Device) -> Result<(), TrainError> {
    let damaged = |problem: String| TrainError::Checkpoint { path: path.into(), problem };
    let bytes = fs::read(path).map_err(TrainError::io(path))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| damaged(e.to_string()))?;
    let read = |key: String, like: &Tensor<2>| {
        let view = file.tensor(&key).map_err(|e| damaged(format!("{key}: {e}")))?;
        if view.shape() != like.dims() || view.dtype() != Dtype::F32 {
            let (expected, found) = (like.dims(), (view.dtype(), view.shape()));
            return Err(damaged(format!("{key}: expected float32 of shape {expected:?}, found {found:?}")));
        }
        let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        Ok(Tensor::from_data(TensorData::new(values.collect::<Vec<f32>>(), like.dims()), device))
    };
    for (module, (a, b)) in &mut optimizer.moments {
        let [am, av, bm, bv] = PARTS.map(|part| format!("{module}.{part}"));
        *a = AdamWState { m: read(am, &a.m)?, v: read(av, &a.v)? };
        *b = AdamWState { m: read(bm, &b.m)?, v: read(bv, &b.v)? };
    }
    Ok(())
}
