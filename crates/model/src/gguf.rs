//! A GGUF file as a base: its metadata as a configuration, its tensors under Hugging Face's
//! names and in Hugging Face's row order.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use pronk_kernels::RopeScaling;
use safetensors::Dtype;

use crate::mapped::MappedFile;
use crate::{DecoderConfig, HostTensor, ModelError};

/// An opened GGUF file.
pub struct GgufFile {
    path: PathBuf,
    mapped: MappedFile,
    content: Content,
    /// The file's tensor names by Hugging Face's.
    names: BTreeMap<String, String>,
    heads: usize,
    kv_heads: usize,
}

impl std::fmt::Debug for GgufFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GgufFile").field("path", &self.path).finish_non_exhaustive()
    }
}

impl GgufFile {
    pub(crate) fn open(path: &Path) -> Result<(Self, DecoderConfig), ModelError> {
        let mapped = MappedFile::open(path)?;
        let content = Content::read(&mut Cursor::new(&mapped[..])).map_err(|e| {
            let cut = format!(
                "not a whole GGUF file ({}); if it was downloaded, download it again",
                first_line(&e)
            );
            ModelError::malformed(path, cut)
        })?;
        let names = content.tensor_infos.keys().map(|name| (hugging_face_name(name), name.clone())).collect();
        let mut file = Self { path: path.into(), mapped, content, names, heads: 1, kv_heads: 1 };
        file.check_length()?;
        let config = file.config()?;
        (file.heads, file.kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        // The frequencies' factors are the configuration's, not a weight.
        file.names.remove(ROPE_FREQS);
        Ok((file, config))
    }

    /// Refuses a file that ends before its last tensor does, as one whose download broke off.
    fn check_length(&self) -> Result<(), ModelError> {
        let end = |info: &TensorInfo| {
            let numbers = info.shape.dims().iter().try_fold(1usize, |n, &size| n.checked_mul(size))?;
            let blocks = numbers.div_ceil(info.ggml_dtype.block_size());
            let bytes = blocks.checked_mul(info.ggml_dtype.type_size())? as u64;
            self.content.tensor_data_offset.checked_add(info.offset)?.checked_add(bytes)
        };
        let last = self.content.tensor_infos.iter().max_by_key(|(_, info)| end(info).unwrap_or(u64::MAX));
        let Some((name, info)) = last else { return Ok(()) };
        let (end, length) = (end(info).unwrap_or(u64::MAX), self.mapped.len() as u64);
        if end <= length {
            return Ok(());
        }
        let cut = format!(
            "not a whole GGUF file (tensor {name} ends at byte {end}, the file at {length}); \
             if it was downloaded, download it again"
        );
        Err(ModelError::malformed(&self.path, cut))
    }

    /// A text of the metadata.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.content.metadata.get(key)? {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    /// A number or a flag of the metadata, whatever its width.
    pub fn number(&self, key: &str) -> Option<f64> {
        number(self.content.metadata.get(key)?)
    }

    /// A list of texts of the metadata; empty where there is none.
    pub fn texts(&self, key: &str) -> Vec<String> {
        self.list(key).iter().filter_map(|v| v.to_string().ok().cloned()).collect()
    }

    /// A list of numbers of the metadata; empty where there is none.
    pub fn numbers(&self, key: &str) -> Vec<f64> {
        self.list(key).iter().filter_map(number).collect()
    }

    fn list(&self, key: &str) -> &[Value] {
        self.content.metadata.get(key).and_then(|v| v.to_vec().ok()).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let shape = |gguf: &String| self.content.tensor_infos.get(gguf).map(|i| i.shape.dims().to_vec());
        self.names.iter().filter_map(|(name, gguf)| Some((name.clone(), shape(gguf)?))).collect()
    }

    /// A tensor, dequantized to float32, its query and key rows in Hugging Face's order.
    pub(crate) fn read(&self, name: &str) -> Option<Result<HostTensor<'static>, ModelError>> {
        let gguf = self.names.get(name)?;
        Some(self.dequantize(gguf).map(|(mut values, shape)| {
            let heads = match gguf.rsplit('.').nth(1) {
                Some("attn_q") => self.heads,
                Some("attn_k") => self.kv_heads,
                _ => 0,
            };
            if let (1.., Some(&rows)) = (heads, shape.first()) {
                values = interleaved_to_halves(&values, rows, heads);
            }
            let bytes = Cow::Owned(values.iter().flat_map(|x| x.to_le_bytes()).collect());
            HostTensor { dtype: Dtype::F32, shape, bytes }
        }))
    }

    fn dequantize(&self, gguf: &str) -> Result<(Vec<f32>, Vec<usize>), ModelError> {
        let mut reader = Cursor::new(&self.mapped[..]);
        let mut read = || -> candle_core::Result<_> {
            let tensor = self.content.tensor(&mut reader, gguf, &Device::Cpu)?.dequantize(&Device::Cpu)?;
            Ok((tensor.flatten_all()?.to_vec1()?, tensor.dims().to_vec()))
        };
        read().map_err(|e| ModelError::malformed(&self.path, format!("tensor {gguf}: {}", first_line(&e))))
    }

    fn config(&self) -> Result<DecoderConfig, ModelError> {
        let architecture = self.text("general.architecture").unwrap_or("(none)");
        let unsupported =
            |problems: Vec<String>| ModelError::Unsupported { path: self.path.clone(), problems };
        if architecture != "llama" {
            return Err(unsupported(vec![format!(
                "general.architecture: expected \"llama\", found \"{architecture}\""
            )]));
        }
        let mut problems = Vec::new();
        let mut size = |key: &str, default: Option<usize>| {
            let found = self.number(&format!("llama.{key}"));
            if let Some(n) = found.filter(|n| (1.0..4e9).contains(n)).map(|n| n as usize).or(default) {
                n
            } else {
                problems.push(format!("llama.{key}: expected a whole number from 1, found {found:?}"));
                1
            }
        };
        let hidden_size = size("embedding_length", None);
        let num_attention_heads = size("attention.head_count", None);
        let head_dim = size("rope.dimension_count", Some(hidden_size / num_attention_heads));
        let head_dim = size("attention.key_length", Some(head_dim));
        let shapes = self.shapes();
        let config = DecoderConfig {
            vocab_size: shapes.get("model.embed_tokens.weight").and_then(|s| s.first().copied()).unwrap_or(0),
            hidden_size,
            intermediate_size: size("feed_forward_length", None),
            num_hidden_layers: size("block_count", None),
            num_attention_heads,
            num_key_value_heads: size("attention.head_count_kv", Some(num_attention_heads)),
            head_dim,
            max_position_embeddings: size("context_length", Some(2048)),
            rms_norm_eps: shortest(self.number("llama.attention.layer_norm_rms_epsilon").unwrap_or(1e-5)),
            rope_theta: shortest(self.number("llama.rope.freq_base").unwrap_or(10_000.0)),
            rope_scaling: RopeScaling::None,
            tie_word_embeddings: !shapes.contains_key("lm_head.weight"),
            attention_bias: shapes.contains_key("model.layers.0.self_attn.o_proj.bias"),
            mlp_bias: shapes.contains_key("model.layers.0.mlp.up_proj.bias"),
        };
        problems.extend(config.inconsistencies());
        if self.number("llama.expert_count").is_some_and(|n| n > 0.0) {
            problems.push("llama.expert_count: mixtures of experts are not supported".into());
        }
        match self.rope_scaling(&config) {
            Ok(rope_scaling) if problems.is_empty() => Ok(DecoderConfig { rope_scaling, ..config }),
            Ok(_) => Err(unsupported(problems)),
            Err(problem) => Err(unsupported([problems, vec![problem]].concat())),
        }
    }

    /// llama.cpp stores Llama 3's scaling as the factors of the frequencies. The four numbers
    /// behind them are those of a release: the release whose factors these are is looked up.
    fn rope_scaling(&self, config: &DecoderConfig) -> Result<RopeScaling, String> {
        if self.content.tensor_infos.contains_key(ROPE_FREQS) {
            let (factors, _) = self.dequantize(ROPE_FREQS).map_err(|e| e.to_string())?;
            let fits = |scaling: &RopeScaling| {
                let ours = scaling.factors(config.head_dim, config.rope_theta);
                ours.len() == factors.len()
                    && ours.iter().zip(&factors).all(|(a, &b)| (a / f64::from(b) - 1.0).abs() < 1e-3)
            };
            return LLAMA3_RELEASES
                .map(|factor| RopeScaling::Llama3 {
                    factor,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_context: 8192.0,
                })
                .into_iter()
                .find(fits)
                .ok_or_else(|| format!("{ROPE_FREQS}: these factors are those of no known Llama 3 release"));
        }
        match self.text("llama.rope.scaling.type").unwrap_or("none") {
            "none" => Ok(RopeScaling::None),
            "linear" => {
                let factor = self.number("llama.rope.scaling.factor").unwrap_or(1.0);
                Ok(RopeScaling::Linear { factor: shortest(factor) })
            }
            other => Err(format!("llama.rope.scaling.type: \"{other}\" is not supported")),
        }
    }
}

const ROPE_FREQS: &str = "rope_freqs.weight";
/// Scaling factors of Llama 3.1 and 3.2.
const LLAMA3_RELEASES: [f64; 2] = [8.0, 32.0];

fn number(value: &Value) -> Option<f64> {
    Some(match value {
        Value::U8(n) => f64::from(*n),
        Value::I8(n) => f64::from(*n),
        Value::U16(n) => f64::from(*n),
        Value::I16(n) => f64::from(*n),
        Value::U32(n) => f64::from(*n),
        Value::I32(n) => f64::from(*n),
        Value::U64(n) => *n as f64,
        Value::I64(n) => *n as f64,
        Value::F32(n) => f64::from(*n),
        Value::F64(n) => *n,
        Value::Bool(b) => f64::from(u8::from(*b)),
        Value::String(_) | Value::Array(_) => return None,
    })
}

/// GGUF holds constants as float32: the shortest decimal of it is what was meant (1e-5, not
/// 9.99999974e-6).
fn shortest(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

fn hugging_face_name(gguf: &str) -> String {
    let whole = |name: &str| match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    let in_block = |name: &str| {
        let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let (module, suffix) = rest.rsplit_once('.')?;
        let module = match module {
            "attn_q" => "self_attn.q_proj",
            "attn_k" => "self_attn.k_proj",
            "attn_v" => "self_attn.v_proj",
            "attn_output" => "self_attn.o_proj",
            "ffn_gate" => "mlp.gate_proj",
            "ffn_up" => "mlp.up_proj",
            "ffn_down" => "mlp.down_proj",
            "attn_norm" => "input_layernorm",
            "ffn_norm" => "post_attention_layernorm",
            _ => return None,
        };
        Some(format!("model.layers.{layer}.{module}.{suffix}"))
    };
    whole(gguf).map(str::to_owned).or_else(|| in_block(gguf)).unwrap_or_else(|| gguf.to_owned())
}

/// The reader's own words: with `RUST_BACKTRACE` set, it puts a backtrace behind them.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// llama.cpp turns neighbouring rows of a head together, Hugging Face rows half a head apart.
/// Row `2 i + j` of a head here is row `i + j * head_dim / 2` there.
fn interleaved_to_halves(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    if rows == 0 || heads == 0 || !rows.is_multiple_of(2 * heads) {
        return values.to_vec();
    }
    let (width, head_dim) = (values.len() / rows, rows / heads);
    let source = |row: usize| {
        let (head, within) = (row / head_dim, row % head_dim);
        let (half, i) = (within / (head_dim / 2), within % (head_dim / 2));
        head * head_dim + 2 * i + half
    };
    (0..rows).flat_map(|row| &values[source(row) * width..][..width]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_hugging_faces() {
        assert_eq!(hugging_face_name("blk.12.attn_output.weight"), "model.layers.12.self_attn.o_proj.weight");
        assert_eq!(
            hugging_face_name("blk.0.ffn_norm.weight"),
            "model.layers.0.post_attention_layernorm.weight"
        );
        assert_eq!(hugging_face_name("output.weight"), "lm_head.weight");
        assert_eq!(hugging_face_name("blk.0.strange.weight"), "blk.0.strange.weight");
    }

    #[test]
    fn rows_move_from_pairs_to_halves() {
        // two heads of four rows, one column
        let rows = [0., 1., 2., 3., 10., 11., 12., 13.];
        assert_eq!(interleaved_to_halves(&rows, 8, 2), [0., 2., 1., 3., 10., 12., 11., 13.]);
    }
}
