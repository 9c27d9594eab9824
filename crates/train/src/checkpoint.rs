//! States to go on from: the adapter, what the optimizer remembers, and how far the run has come.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use pronk_kernels::{AdamWState, Blockwise};
use pronk_lora::{Adapter, AdapterFiles, LoraConfig, ModuleShape};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::manifest::differences;
use crate::optimizer::{TensorState, numbers};
use crate::publish::{publish, withdraw};
use crate::{Optimizer, RunFolder, SampleRound, StepRecord, TrainConfig, TrainError};

const STATE: &str = "trainer_state.json";
const STATES: &str = "optimizer.safetensors";

/// How far a run has come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Steps done.
    pub step: u64,
    /// The adapter of the lowest eval loss so far.
    pub best: Option<Best>,
    /// The eval loss before the first step.
    pub eval_before: Option<f64>,
    /// The eval loss after this very step, where it was measured.
    pub eval_loss: Option<f64>,
    /// What is told of this very step, where the run was stopped before it had measured on the held-out rows.
    pub unmeasured: Option<StepRecord>,
    /// Steps without an update so far, as their loss or their gradients were no numbers.
    pub skipped: u64,
    /// How many of them came last, with no other step between or behind.
    pub skipped_in_a_row: u64,
    /// Hash of the prepared rows the run learns from.
    pub data_key: String,
    /// What the sample prompts were answered so far.
    pub samples: Vec<SampleRound>,
}

impl TrainerState {
    /// Before the first step of a run on the rows called `data_key`.
    pub fn new(data_key: String) -> Self {
        Self {
            step: 0,
            best: None,
            eval_before: None,
            eval_loss: None,
            unmeasured: None,
            skipped: 0,
            skipped_in_a_row: 0,
            data_key,
            samples: Vec::new(),
        }
    }
}

/// What is known of the adapter that gave the lowest loss on the held-out rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The loss.
    pub eval_loss: f64,
    /// The step that it was measured after.
    pub step: u64,
    /// The loss of the first micro-batch of these rows, summed over its supervised tokens; unknown where base or rows have
    /// changed since.
    pub first_loss: Option<f64>,
    /// SHA-256 of its weights as they were saved.
    pub sha256: Option<String>,
}

/// What a file tells of a run, and of the adapter beside it, which its own files tell in words of PEFT's.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    #[serde(flatten)]
    state: TrainerState,
    /// Ranks of what lies behind the modules' factors in the adapter's file, and is not trained.
    fixed_ranks: BTreeMap<String, usize>,
    /// How the adapter was made.
    lora: LoraConfig,
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

impl Checkpoint {
    /// Reads the checkpoint in `dir`, whatever its manifest says.
    pub fn load(
        dir: &Path,
        modules: &[ModuleShape],
        config: &TrainConfig,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let Told { state, fixed_ranks, lora } = read_state(dir)?;
        let adapter = Adapter::load(dir, modules, device)?;
        let adapter = adapter
            .with_fixed(&fixed_ranks, lora, modules)
            .map_err(|e| TrainError::Checkpoint { path: dir.join(STATE), problem: e.to_string() })?;
        let mut optimizer = Optimizer::new(config, &adapter);
        states_from_file(&mut optimizer, &dir.join(STATES), device)?;
        Ok(Self { state, adapter, optimizer })
    }

    /// The newest checkpoint that is whole, if there is one. Damaged ones are passed over and named to `warn`; one that
    /// is whole and does not fit the run is an error.
    pub fn load_newest(
        folder: &RunFolder,
        modules: &[ModuleShape],
        config: &TrainConfig,
        device: &Device,
        warn: impl Fn(&str),
    ) -> Result<Option<Self>, TrainError> {
        for path in list(folder).into_values().rev() {
            match differences(&path).first() {
                None => return Self::load(&path, modules, config, device).map(Some),
                Some(first) => {
                    let (file, problem) = (first.path.display(), &first.problem);
                    warn(&format!("passing over a damaged checkpoint: {file}: {problem}"));
                }
            }
        }
        Ok(None)
    }
}

/// A checkpoint's files as they will be, in the host's memory, so that the run can go on while they are written.
#[derive(Debug)]
pub(crate) struct Snapshot {
    dest: PathBuf,
    told: Told,
    adapter: AdapterFiles,
    optimizer: Vec<u8>,
}

impl Snapshot {
    /// Of a run that lies in `folder`.
    pub(crate) fn take(
        folder: &RunFolder,
        state: &TrainerState,
        adapter: &Adapter,
        optimizer: &Optimizer,
        base: &str,
    ) -> Result<Self, TrainError> {
        let dest = folder.checkpoints().join(name(state.step));
        let (fixed_ranks, lora) = (adapter.fixed_ranks(), adapter.config.clone());
        let told = Told { state: state.clone(), fixed_ranks, lora };
        let (adapter, optimizer) = (adapter.files(&dest, base, true)?, states_to_bytes(optimizer, &dest)?);
        Ok(Self { dest, told, adapter, optimizer })
    }

    /// Writes the checkpoint as a whole, and removes those that `config` does not keep.
    pub(crate) fn write(&self, folder: &RunFolder, config: &TrainConfig) -> Result<(), TrainError> {
        publish(&self.dest, |dir| {
            self.adapter.write(dir)?;
            RunFolder::write(&dir.join(STATES), &self.optimizer)?;
            let text = serde_json::to_vec_pretty(&self.told)
                .map_err(|e| TrainError::Io { path: dir.join(STATE), source: e.into() })?;
            RunFolder::write(&dir.join(STATE), &text)
        })?;
        let all = list(folder);
        let kept = kept(&all, self.told.state.step, config, |path| read_state(path).ok()?.state.eval_loss);
        all.iter().filter(|(step, _)| !kept.contains(step)).try_for_each(|(_, path)| withdraw(path))
    }
}

/// The steps whose checkpoints stay when that of `newest` is written: the last ones, and those of the
/// lowest eval loss. Beyond `newest` lies what the run has turned back from.
fn kept(
    all: &BTreeMap<u64, PathBuf>,
    newest: u64,
    config: &TrainConfig,
    eval_loss: impl Fn(&Path) -> Option<f64>,
) -> BTreeSet<u64> {
    let steps = || all.range(..=newest).rev();
    let mut kept: BTreeSet<u64> = steps().take(config.keep_last).map(|(step, _)| *step).collect();
    if config.keep_best > 0 {
        let mut best: Vec<(f64, u64)> =
            steps().filter_map(|(step, path)| Some((eval_loss(path)?, *step))).collect();
        best.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        kept.extend(best.into_iter().take(config.keep_best).map(|(_, step)| step));
    }
    kept
}

/// Where the newest whole checkpoint is.
pub fn newest(folder: &RunFolder) -> Option<PathBuf> {
    list(folder).into_values().rev().find(|path| differences(path).is_empty())
}

/// Whether some checkpoint tells of steps that left an adapter to use. Of the first one that did not fail it is not sure:
/// in a warmup it learns nothing.
pub(crate) fn has_learned(folder: &RunFolder) -> bool {
    let learned = |state: &TrainerState| state.step.saturating_sub(state.skipped) > 1;
    list(folder).values().any(|path| read_state(path).is_ok_and(|told| learned(&told.state)))
}

fn read_state(checkpoint: &Path) -> Result<Told, TrainError> {
    let path = checkpoint.join(STATE);
    let text = pronk_files::read_text(&path).map_err(TrainError::io(&path))?;
    serde_json::from_slice(&text).map_err(|e| TrainError::Checkpoint { path, problem: e.to_string() })
}

/// Checkpoints by step.
pub(crate) fn list(folder: &RunFolder) -> BTreeMap<u64, PathBuf> {
    let Ok(entries) = fs::read_dir(folder.checkpoints()) else { return BTreeMap::new() };
    let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix("step-")?.parse::<u64>().ok();
    let found = entries.filter_map(|entry| entry.ok().map(|e| e.path()));
    found.filter_map(|path| Some((step(&path)?, path))).collect()
}

fn name(step: u64) -> String {
    format!("step-{step:06}")
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
    let bytes = pronk_files::read(path).map_err(TrainError::io(path))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_and_the_best_are_kept() {
        let all: BTreeMap<u64, PathBuf> = [2, 4, 6, 8, 10].map(|step| (step, step.to_string().into())).into();
        let eval_loss = |path: &Path| match path.to_str() {
            Some("2") => Some(0.5),
            Some("4" | "10") => Some(0.4),
            Some("8") => Some(0.9),
            _ => None,
        };
        let kept = |newest, keep_last, keep_best| {
            let config = TrainConfig { keep_last, keep_best, ..TrainConfig::default() };
            kept(&all, newest, &config, eval_loss).into_iter().collect::<Vec<_>>()
        };
        assert_eq!(kept(10, 2, 0), [8, 10]);
        assert_eq!(kept(10, 1, 1), [4, 10], "of equals the first");
        assert_eq!(kept(10, 1, 9), [2, 4, 8, 10], "what was not measured is not among the best");
        assert_eq!(kept(6, 2, 1), [4, 6], "what lies beyond was turned back from");
    }
}
