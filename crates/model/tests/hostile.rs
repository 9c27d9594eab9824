//! Broken bases: each is refused with a message that says what is wrong, and none panics.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test reports by panicking

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Content, Value as GgufValue, write};
use candle_core::quantized::{GgmlDType, QTensor};
use pronk_model::{Base, ModelError};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

fn golden(variant: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(format!("tiny-{variant}"))
}

/// A copy of a tiny base, to be broken.
fn copy(variant: &str) -> TempDir {
    let dir = TempDir::new().unwrap();
    for entry in fs::read_dir(golden(variant)).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() != "expected.safetensors" {
            fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
    }
    Base::open(dir.path()).expect("whole, it opens");
    dir
}

/// The message of the refusal, which begins with the path of what was opened or of a file in it.
fn refusal(path: &Path) -> String {
    let message = Base::open(path).map(|_| ()).unwrap_err().to_string();
    assert!(message.starts_with(&path.display().to_string()), "{message}");
    message
}

fn assert_tells(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

#[test]
fn a_safetensors_file_cut_short_or_made_longer() {
    let dir = copy("gqa");
    let file = dir.path().join(WEIGHTS);
    let whole = fs::read(&file).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for length in [0, 1, 7, 8, 100, header - 1, header, header + 100, whole.len() - 1] {
        fs::write(&file, &whole[..length]).unwrap();
        assert_tells(&refusal(dir.path()), &[WEIGHTS, "not a whole safetensors file", "download it again"]);
    }
    fs::write(&file, [&whole[..], &[0]].concat()).unwrap();
    assert_tells(&refusal(dir.path()), &["not a whole safetensors file"]);
}

#[test]
fn a_safetensors_header_that_lies() {
    let dir = copy("gqa");
    let file = dir.path().join(WEIGHTS);
    let whole = fs::read(&file).unwrap();
    for length in [1 << 60, u64::MAX, whole.len() as u64] {
        fs::write(&file, [&length.to_le_bytes(), &whole[8..]].concat()).unwrap();
        assert_tells(&refusal(dir.path()), &[WEIGHTS, "not a whole safetensors file"]);
    }
    let headers = [
        "[1, 2]",
        "{\"x\": {",
        r#"{"x": {"dtype": "F32", "shape": [4611686018427387904, 16], "data_offsets": [0, 0]}}"#,
        r#"{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 18446744073709551615]}}"#,
        r#"{"x": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}"#,
        r#"{"x": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}"#,
        r#"{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}"#,
    ];
    for header in headers {
        let length = (header.len() as u64).to_le_bytes();
        fs::write(&file, [&length, header.as_bytes(), &[0; 4]].concat()).unwrap();
        assert_tells(&refusal(dir.path()), &[WEIGHTS, "not a whole safetensors file"]);
    }
}

/// Puts `change` into the index of a base of two shards.
fn with_index(change: impl Fn(&mut Value)) -> (TempDir, String) {
    let dir = copy("head-dim");
    let mut index: Value = serde_json::from_slice(&fs::read(dir.path().join(INDEX)).unwrap()).unwrap();
    change(&mut index["weight_map"]);
    fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
    let message = refusal(dir.path());
    (dir, message)
}

#[test]
fn an_index_that_leads_astray() {
    for name in ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "x/"] {
        let (_dir, message) = with_index(|map| map["model.norm.weight"] = name.into());
        assert_tells(&message, &[INDEX, &format!("'{name}' leaves the directory")]);
    }
    let (_dir, message) = with_index(|map| map["model.norm.weight"] = "absent.safetensors".into());
    assert_tells(&message, &["absent.safetensors", "No such file"]);

    let shard = "model-00001-of-00002.safetensors";
    let (_dir, message) = with_index(|map| {
        map["model.layers.7.one.weight"] = shard.into();
        map["model.layers.7.two.weight"] = shard.into();
    });
    for tensor in ["one", "two"] {
        let told = format!("model.layers.7.{tensor}.weight: the index places it in {shard}");
        assert_tells(&message, &[INDEX, &told, "does not hold it"]);
    }

    for broken in [json!(3), json!({"x": 3}), Value::Null] {
        let (_dir, message) = with_index(|map| *map = broken.clone());
        assert_tells(&message, &[INDEX, "expected a"]);
    }
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Puts `change` into the weights of `tiny-<variant>`.
fn with_weights(variant: &str, change: impl Fn(&mut Tensors)) -> TempDir {
    let dir = copy(variant);
    let file = dir.path().join(WEIGHTS);
    let whole = fs::read(&file).unwrap();
    let mut tensors: Tensors = SafeTensors::deserialize(&whole)
        .unwrap()
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect();
    change(&mut tensors);
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
    dir
}

fn floats(shape: &[usize]) -> (Dtype, Vec<usize>, Vec<u8>) {
    (Dtype::F32, shape.to_vec(), vec![0; 4 * shape.iter().product::<usize>()])
}

#[test]
fn weights_that_do_not_fit_are_all_listed() {
    let dir = with_weights("gqa", |tensors| {
        tensors.remove("model.norm.weight").unwrap();
        tensors.remove("model.layers.1.mlp.up_proj.weight").unwrap();
        tensors.insert("model.layers.0.self_attn.q_norm.weight".into(), floats(&[8]));
        tensors.insert("model.layers.0.self_attn.k_proj.weight".into(), floats(&[32, 32]));
        tensors.insert("lm_head.weight".into(), floats(&[0, 32]));
        let norm = tensors.get_mut("model.layers.0.input_layernorm.weight").unwrap();
        norm.0 = Dtype::I32;
    });
    let error = Base::open(dir.path()).unwrap_err();
    assert!(matches!(&error, ModelError::Weights { problems, .. } if problems.len() == 6), "{error}");
    let lines = [
        "model.norm.weight: missing, expected shape [32]",
        "model.layers.1.mlp.up_proj.weight: missing, expected shape [64, 32]",
        "model.layers.0.self_attn.q_norm.weight: surplus, shape [8]",
        "model.layers.0.self_attn.k_proj.weight: expected shape [16, 32], found [32, 32]",
        "lm_head.weight: expected shape [264, 32], found [0, 32]",
        "model.layers.0.input_layernorm.weight: expected float32, float16 or bfloat16, found I32",
    ];
    assert_tells(&error.to_string(), &lines);
}

#[test]
fn a_long_list_of_problems_is_shortened_for_the_screen() {
    let dir = with_weights("gqa", |tensors| {
        tensors.retain(|name, _| name == "model.norm.weight");
        tensors.insert("strange".into(), floats(&[2, 3, 4]));
    });
    assert_tells(&refusal(dir.path()), &["model.embed_tokens.weight: missing", "... and 1 more"]);
}

#[test]
fn what_old_checkpoints_carry_beside_is_no_problem() {
    let dir = with_weights("tied", |tensors| {
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), floats(&[4]));
        tensors.insert("lm_head.weight".into(), floats(&[264, 32]));
    });
    Base::open(dir.path()).unwrap();
}

#[test]
fn biases_that_the_configuration_does_not_speak_of_are_surplus() {
    let dir = copy("bias");
    change_config(&dir, |config| config["attention_bias"] = false.into());
    assert_tells(&refusal(dir.path()), &["model.layers.0.self_attn.q_proj.bias: surplus, shape [32]"]);
}

fn change_config(dir: &TempDir, change: impl Fn(&mut Value)) {
    let file = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    change(&mut config);
    fs::write(&file, config.to_string()).unwrap();
}

#[test]
fn a_configuration_that_asks_for_what_is_not_computed() {
    let dir = copy("gqa");
    change_config(&dir, |config| {
        config["model_type"] = "mamba".into();
        config["hidden_act"] = "gelu".into();
        config["sliding_window"] = 4096.into();
        config["quantization_config"] = json!({"quant_method": "gptq"});
        config["partial_rotary_factor"] = json!(0.5);
        config["rope_parameters"] = json!({"rope_type": "yarn", "factor": 4.0});
        config["num_hidden_layers"] = 4_000_000_000_u64.into();
        config["num_key_value_heads"] = 3.into();
        config["vocab_size"] = json!(-1);
        config["rms_norm_eps"] = "small".into();
        config["tie_word_embeddings"] = 1.into();
        config.as_object_mut().unwrap().remove("intermediate_size");
    });
    let lines = [
        "config.json: this base needs what is not supported:",
        "model_type: expected one of \"llama\", \"mistral\", \"qwen2\", \"qwen3\", \"gemma2\", \"gemma3_text\", \
         \"phi3\", found \"mamba\"",
        "hidden_act: expected \"silu\", found \"gelu\"",
        "sliding_window: 4096 is not supported",
        "quantization_config: {\"quant_method\":\"gptq\"} is not supported",
        "partial_rotary_factor: 0.5 is not supported",
        "rope_parameters.rope_type: 'yarn' is not supported (default, linear and llama3 are)",
        "num_hidden_layers: expected at most 1024, found 4000000000",
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        "vocab_size: expected a whole number from 1, found -1",
        "rms_norm_eps: expected a number above 0, found \"small\"",
        "tie_word_embeddings: expected true or false, found 1",
        "intermediate_size: missing",
    ];
    assert_tells(&refusal(dir.path()), &lines);
}

#[test]
fn rotary_scaling_is_never_passed_over() {
    let cases = [
        (json!("yarn"), "rope_parameters: expected an object, found \"yarn\""),
        (json!({"rope_type": 3}), "rope_parameters.rope_type: '3' is not supported"),
        (json!({"rope_type": "linear"}), "rope_parameters.factor: missing"),
        (json!({"rope_type": "linear", "factor": 0}), "rope_parameters.factor: expected a number above 0"),
        (json!({"type": "dynamic", "factor": 2}), "rope_parameters.rope_type: 'dynamic' is not supported"),
    ];
    for (value, told) in cases {
        let dir = copy("gqa");
        change_config(&dir, |config| config["rope_parameters"] = value.clone());
        assert_tells(&refusal(dir.path()), &[told]);
    }
}

#[test]
fn a_configuration_that_is_none() {
    let dir = copy("gqa");
    for (text, told) in [("", "not a JSON document"), ("[]", "expected a JSON object"), ("{", "not a JSON")] {
        fs::write(dir.path().join("config.json"), text).unwrap();
        assert_tells(&refusal(dir.path()), &["config.json", told]);
    }
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert_tells(&refusal(dir.path()), &["hidden_size: missing", "vocab_size: missing"]);
    fs::remove_file(dir.path().join("config.json")).unwrap();
    assert_tells(&refusal(dir.path()), &["config.json", "No such file"]);
}

#[test]
fn no_base_at_all() {
    let dir = copy("gqa");
    fs::remove_file(dir.path().join(WEIGHTS)).unwrap();
    assert_tells(&refusal(dir.path()), &[WEIGHTS, INDEX, "found neither"]);

    let expected = "expected a Hugging Face directory or a .gguf file";
    for name in ["nowhere", "nowhere.gguf"] {
        assert_tells(&refusal(&dir.path().join(name)), &[expected, "found nothing"]);
    }
    assert_tells(&refusal(&dir.path().join("config.json")), &[expected, "found another kind of file"]);
}

/// `tiny-gqa` as llama.cpp's converter writes it; `change` may add to the metadata.
fn gguf(change: impl Fn(&mut BTreeMap<&str, GgufValue>)) -> Vec<u8> {
    let base = Base::open(&golden("gqa")).unwrap();
    let config = &base.config;
    let count = |n: usize| GgufValue::U32(n as u32);
    let mut metadata = BTreeMap::from([
        ("general.architecture", GgufValue::String("llama".into())),
        ("llama.embedding_length", count(config.hidden_size)),
        ("llama.feed_forward_length", count(config.intermediate_size)),
        ("llama.block_count", count(config.num_hidden_layers)),
        ("llama.context_length", count(config.max_position_embeddings)),
        ("llama.attention.head_count", count(config.num_attention_heads)),
        ("llama.attention.head_count_kv", count(config.num_key_value_heads)),
        ("llama.attention.layer_norm_rms_epsilon", GgufValue::F32(config.rms_norm_eps as f32)),
        ("llama.rope.freq_base", GgufValue::F32(config.rope_theta as f32)),
    ]);
    change(&mut metadata);
    let tensors: Vec<(String, QTensor)> = config
        .tensors()
        .into_iter()
        .map(|(name, shape)| {
            let mut values = base.read(&name).unwrap().to_f32();
            if name.contains("q_proj") || name.contains("k_proj") {
                values = halves_to_pairs(&values, config.head_dim, shape[1]);
            }
            let tensor = candle_core::Tensor::from_vec(values, shape, &candle_core::Device::Cpu).unwrap();
            (gguf_name(&name), QTensor::quantize(&tensor, GgmlDType::F32).unwrap())
        })
        .collect();
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = Cursor::new(Vec::new());
    write(&mut file, &metadata, &tensors).unwrap();
    file.into_inner()
}

/// Within each head, rows i and i + half become neighbours, as llama.cpp's rotary wants them.
fn halves_to_pairs(values: &[f32], head_dim: usize, width: usize) -> Vec<f32> {
    let rows: Vec<&[f32]> = values.chunks_exact(width).collect();
    let heads = rows.chunks_exact(head_dim);
    let turned = heads.flat_map(|head| {
        let (first, second) = head.split_at(head_dim / 2);
        first.iter().zip(second).flat_map(|(a, b)| [*a, *b])
    });
    turned.flatten().copied().collect()
}

fn gguf_name(hugging_face: &str) -> String {
    let renamed = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ];
    renamed.iter().fold(hugging_face.to_owned(), |name, (from, to)| name.replace(from, to))
}

fn written(dir: &TempDir, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join("tiny.gguf");
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn a_whole_gguf_file_holds_what_its_checkpoint_held() {
    let dir = TempDir::new().unwrap();
    let from_gguf = Base::open(&written(&dir, &gguf(|_| {}))).unwrap();
    let from_checkpoint = Base::open(&golden("gqa")).unwrap();
    assert_eq!(from_gguf.config, from_checkpoint.config);
    for (name, _) in from_checkpoint.config.tensors() {
        let [a, b] = [&from_gguf, &from_checkpoint].map(|base| base.read(&name).unwrap());
        assert_eq!((a.to_f32(), &a.shape), (b.to_f32(), &b.shape), "{name}");
    }
    assert_tells(&from_gguf.read("absent").unwrap_err().to_string(), &["absent: missing"]);
}

#[test]
fn a_gguf_file_cut_short() {
    let dir = TempDir::new().unwrap();
    let whole = gguf(|_| {});
    let content = Content::read(&mut Cursor::new(&whole)).unwrap();
    let data = content.tensor_data_offset as usize;
    let last = content.tensor_infos.values().map(|info| info.offset as usize + info.shape.elem_count() * 4);
    let end = data + last.max().unwrap();
    for length in [0, 3, 4, 8, 20, 24, 60, data / 2, data - 100, data, data + 1000, end - 1] {
        let message = refusal(&written(&dir, &whole[..length]));
        assert_tells(&message, &["tiny.gguf: not a whole GGUF file", "download it again"]);
    }
    Base::open(&written(&dir, &whole[..end])).unwrap();
}

#[test]
fn a_gguf_file_of_something_else() {
    let dir = TempDir::new().unwrap();
    assert_tells(&refusal(&written(&dir, b"not a model")), &["not a whole GGUF file"]);
    let bytes =
        gguf(|metadata| drop(metadata.insert("general.architecture", GgufValue::String("mamba".into()))));
    assert_tells(
        &refusal(&written(&dir, &bytes)),
        &["expected one of \"llama\", \"qwen2\"", "found \"mamba\""],
    );
    let bytes = gguf(|metadata| {
        metadata.remove("llama.embedding_length");
        metadata.insert("llama.attention.head_count", GgufValue::U32(0));
        metadata.insert("llama.expert_count", GgufValue::U32(8));
        metadata.insert("llama.rope.scaling.type", GgufValue::String("yarn".into()));
    });
    let told = [
        "llama.embedding_length: expected a whole number from 1",
        "llama.attention.head_count: expected a whole number from 1",
        "llama.expert_count",
        "llama.rope.scaling.type: \"yarn\" is not supported",
    ];
    assert_tells(&refusal(&written(&dir, &bytes)), &told);
    let bytes = gguf(|metadata| drop(metadata.insert("llama.feed_forward_length", GgufValue::U32(63))));
    let told = ["model.layers.1.mlp.down_proj.weight: expected shape [32, 63], found [32, 64]"];
    assert_tells(&refusal(&written(&dir, &bytes)), &told);
}
