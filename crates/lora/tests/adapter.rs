//! Adapter directories, PEFT's and our own, and the numbers that a fresh adapter starts from.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test reports by panicking

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use half::bf16;
use pronk_kernels::{Dropout, DropoutKey, FrozenLinear, open_devices};
use pronk_lora::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, ForwardMode, InitLoraWeights, LoftQConfig, LoraConfig,
    LoraError, LoraLinear, LoraPair, ModuleNames, ModuleShape, PartOf, TargetModules, loftq_config_of,
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

const GOLDENS: [&str; 5] = ["gqa", "tied", "rslora", "patterns", "dora"];
const KEY: &str = "base_model.model.model.layers.0.self_attn.q_proj";

/// Every device that this build has and this machine, with its name; there is at least one.
fn devices() -> Vec<(String, Device)> {
    let devices = open_devices();
    assert!(!devices.is_empty(), "these tests need a CPU backend: --features flex, or tch");
    devices
}

fn device() -> Device {
    devices().swap_remove(0).1
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(format!("adapter-{name}"))
}

/// The linear layers of `tiny-gqa` and `tiny-tied`.
fn modules() -> Vec<ModuleShape> {
    let linears = [
        ("self_attn.q_proj", 32, 32),
        ("self_attn.k_proj", 32, 16),
        ("self_attn.v_proj", 32, 16),
        ("self_attn.o_proj", 32, 32),
        ("mlp.gate_proj", 32, 64),
        ("mlp.up_proj", 32, 64),
        ("mlp.down_proj", 64, 32),
    ];
    let layer = |layer| {
        linears.map(|(name, in_features, out_features)| {
            ModuleShape::new(format!("model.layers.{layer}.{name}"), in_features, out_features)
        })
    };
    (0..2).flat_map(layer).collect()
}

/// Two layers, of which one is packed from two parts.
fn packed_modules() -> Vec<ModuleShape> {
    let part = |name: &str, rows: std::ops::Range<usize>| ModuleShape {
        part_of: Some(PartOf { module: "l.pair".into(), rows: rows.clone() }),
        ..ModuleShape::new(name, 3, rows.len())
    };
    vec![
        ModuleShape::new("l.pair", 3, 6),
        ModuleShape::new("l.down", 5, 3),
        part("l.first", 0..4),
        part("l.second", 4..6),
    ]
}

#[test]
fn all_linear_means_the_layers_that_the_base_has() {
    let modules = packed_modules();
    let all: TargetModules = serde_json::from_str("\"all-linear\"").unwrap();
    let names = |targets: TargetModules| -> Vec<String> {
        targets
            .select(&modules.iter().collect::<Vec<_>>())
            .unwrap()
            .into_iter()
            .map(|m| m.name.clone())
            .collect()
    };
    assert_eq!(names(all), ["l.pair", "l.down"]);
    assert_eq!(names(TargetModules::Names(vec!["second".into()])), ["l.second"]);
}

#[test]
fn parts_of_a_packed_layer_become_blocks_of_one_pair() {
    let modules = packed_modules();
    for rslora in [false, true] {
        let targets = ["first", "second", "down"].map(str::to_owned).to_vec();
        let config = LoraConfig {
            rank: 2,
            alpha: 4.0,
            rslora,
            target_modules: TargetModules::Names(targets),
            rank_pattern: [("second".to_owned(), 3)].into_iter().collect(),
            ..LoraConfig::default()
        };
        let mut adapter = Adapter::init(&config, &modules, 1, &device()).unwrap();
        for pair in adapter.pairs.values_mut() {
            pair.b = pair.b.clone().add_scalar(1.0);
        }
        let packed = adapter.onto_packed(&modules);
        assert_eq!(packed.pairs.keys().collect::<Vec<_>>(), ["l.down", "l.pair"]);
        assert_eq!((packed.pairs["l.down"].rank(), packed.pairs["l.pair"].rank()), (2, 5));
        for (name, pair) in &packed.pairs {
            assert_eq!(packed.config.rank_of(name), pair.rank());
            assert!((packed.config.scale_of(name) - pair.scale).abs() < 1e-12);
        }
        let update = |pair: &LoraPair| host(&(pair.b.clone().matmul(pair.a.clone()) * pair.scale));
        let [first, second, down] =
            ["l.first", "l.second", "l.down"].map(|name| update(&adapter.pairs[name]));
        let together = update(&packed.pairs["l.pair"]);
        let expected = [first, second].concat();
        assert!(
            together.iter().zip(&expected).all(|(x, y)| (x - y).abs() < 1e-6),
            "{together:?} {expected:?}"
        );
        assert_eq!(update(&packed.pairs["l.down"]), down);

        let dir = TempDir::new().unwrap();
        packed.save(dir.path(), "base", false).unwrap();
        let loaded = Adapter::load(dir.path(), &modules[..2], &device()).unwrap();
        assert_eq!(numbers(&loaded), numbers(&packed));
        assert_eq!(numbers(&packed.onto_packed(&modules)), numbers(&packed), "once is enough");
    }
}

fn host(tensor: &Tensor<2>) -> Vec<f32> {
    tensor.try_to_vec_as().unwrap()
}

/// A and B of every module, on the host.
fn numbers(adapter: &Adapter) -> BTreeMap<String, [Vec<f32>; 2]> {
    let pairs = adapter.pairs.iter();
    pairs.map(|(name, pair)| (name.clone(), [host(&pair.a), host(&pair.b)])).collect()
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(dir: &Path) -> Tensors {
    let bytes = fs::read(dir.join(ADAPTER_WEIGHTS)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let all = file.tensors().into_iter();
    all.map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))).collect()
}

fn config_of(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join(ADAPTER_CONFIG)).unwrap()).unwrap()
}

fn names(list: &[&str]) -> TargetModules {
    TargetModules::Names(list.iter().map(|&name| name.into()).collect())
}

fn assert_tells(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

#[test]
fn pefts_directories_load_and_come_back_the_same() {
    for (device_name, device) in devices() {
        for name in GOLDENS {
            let loaded = Adapter::load(&golden(name), &modules(), &device).unwrap();
            let dir = TempDir::new().unwrap();
            let saved = dir.path().join("new/adapter");
            loaded.save(&saved, "some/base", false).unwrap();

            assert_eq!(tensors(&saved), tensors(&golden(name)), "{name} on {device_name}");
            let again = Adapter::load(&saved, &modules(), &device).unwrap();
            assert_eq!(again.config, loaded.config, "{name} on {device_name}");
            assert_eq!(numbers(&again), numbers(&loaded), "{name} on {device_name}");
            let written = fs::read_dir(&saved).unwrap().count();
            assert_eq!(written, 2, "only the two files lie there");
        }
    }
}

#[test]
fn a_gaussian_start_is_one() {
    let config = LoraConfig {
        rank: 4,
        target_modules: names(&["gate_proj", "down_proj"]),
        init_lora_weights: InitLoraWeights::Gaussian,
        ..LoraConfig::default()
    };
    let adapter = Adapter::init(&config, &modules(), 3, &device()).unwrap();
    let a: Vec<f32> = adapter.pairs.values().flat_map(|pair| host(&pair.a)).collect();
    let mean = |power: i32| a.iter().map(|x| (4.0 * x).powi(power)).sum::<f32>() / a.len() as f32;
    assert!(mean(1).abs() < 0.15 && (mean(2) - 1.0).abs() < 0.2 && (mean(4) - 3.0).abs() < 1.2);
    assert!(adapter.pairs.values().all(|pair| host(&pair.b).iter().all(|x| *x == 0.0)));
}

#[test]
fn a_quantized_base_is_told_as_peft_can_read_it() {
    let loftq = LoftQConfig { loftq_bits: 4, loftq_iter: 1, skip_modules: Vec::new() };
    let config = LoraConfig { loftq_config: Some(loftq.clone()), ..LoraConfig::default() };
    let adapter = Adapter::init(&config, &modules(), 3, &device()).unwrap();
    let dir = TempDir::new().unwrap();
    adapter.save(dir.path(), "base", true).unwrap();
    let file = config_of(dir.path());
    assert_eq!(file["init_lora_weights"], true, "PEFT must not quantize the base once more");
    assert_eq!(file["loftq_config"], json!({"loftq_bits": 4, "loftq_iter": 1}));
    assert_eq!(loftq_config_of(dir.path()).unwrap(), Some(loftq));
    assert_eq!(loftq_config_of(&golden("gqa")).unwrap(), None);
}

#[test]
fn pefts_configuration_is_understood() {
    let load = |name: &str| Adapter::load(&golden(name), &modules(), &device()).unwrap();
    let gqa = load("gqa");
    assert_eq!((gqa.config.rank, gqa.config.alpha, gqa.config.rslora), (4, 8.0, false));
    assert_eq!(gqa.pairs.len(), 14);
    assert!(gqa.pairs.values().all(|pair| (pair.scale - 2.0).abs() < 1e-12));
    assert_eq!(gqa.pairs["model.layers.1.mlp.down_proj"].a.dims(), [4, 64]);
    assert_eq!(gqa.pairs["model.layers.1.mlp.down_proj"].b.dims(), [32, 4]);
    assert_eq!(gqa.parameters(), 2 * 4 * (3 * (32 + 64) + 2 * (32 + 16) + 2 * (32 + 32)));

    let rslora = load("rslora");
    assert_eq!((rslora.config.rank, rslora.config.alpha, rslora.config.rslora), (8, 8.0, true));
    assert_eq!(rslora.pairs.len(), 4);
    assert!(rslora.pairs.values().all(|pair| (pair.scale - 8.0 / 8f64.sqrt()).abs() < 1e-12));

    // q_proj of layer 1 has rank 2 and alpha 6, o_proj rank 6, all others rank 4; alpha is 8, v_proj's 3.
    let patterns = load("patterns");
    let of = |name: &str| {
        let pair = &patterns.pairs[&format!("model.layers.1.{name}")];
        (pair.rank(), pair.scale)
    };
    assert_eq!(patterns.pairs.len(), 6, "one layer of two, and no up_proj");
    assert_eq!(of("self_attn.q_proj"), (2, 3.0));
    assert_eq!(of("self_attn.o_proj"), (6, 8.0 / 6.0));
    assert_eq!((of("self_attn.k_proj"), of("self_attn.v_proj")), ((4, 2.0), (4, 0.75)));
}

#[test]
fn the_saved_configuration_has_the_keys_that_every_reader_knows() {
    let dir = TempDir::new().unwrap();
    let loaded = Adapter::load(&golden("rslora"), &modules(), &device()).unwrap();
    loaded.save(dir.path(), "some/base", false).unwrap();
    let mut saved = config_of(dir.path());
    let targets = saved["target_modules"].as_array_mut().unwrap();
    targets.sort_by_key(ToString::to_string);
    let expected = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": true,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "inference_mode": true,
        "modules_to_save": null,
        "rank_pattern": {},
        "alpha_pattern": {},
    });
    assert_eq!(saved, expected);
    let bytes = fs::read(dir.path().join(ADAPTER_WEIGHTS)).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
}

#[test]
fn a_fraction_stays_a_fraction_and_all_linear_is_spelled_out() {
    let dir = TempDir::new().unwrap();
    let target_modules = serde_json::from_value(json!("all-linear")).unwrap();
    let config = LoraConfig { alpha: 1.5, dropout: 0.25, target_modules, ..LoraConfig::default() };
    Adapter::init(&config, &modules(), 1, &device()).unwrap().save(dir.path(), "base", true).unwrap();
    let saved = config_of(dir.path());
    assert_eq!((&saved["lora_alpha"], &saved["lora_dropout"]), (&json!(1.5), &json!(0.25)));
    let all = json!(["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]);
    assert_eq!(saved["target_modules"], all);
    let again = Adapter::load(dir.path(), &modules(), &device()).unwrap();
    assert_eq!((again.pairs.len(), again.config.alpha, again.config.dropout), (14, 1.5, 0.25));
}

#[test]
fn an_adapter_that_learned_nothing_is_not_saved_unless_it_is_fresh() {
    let fresh = Adapter::init(&LoraConfig::default(), &modules(), 1, &device()).unwrap();
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("adapter");
    let error = fresh.save(&path, "base", false).unwrap_err();
    assert!(matches!(error, LoraError::NotSaved { .. }));
    assert_tells(&error.to_string(), &["was not saved", "every B is zero"]);
    assert!(!path.exists(), "nothing is left behind");

    fresh.save(&path, "base", true).unwrap();
    let again = Adapter::load(&path, &modules(), &device()).unwrap();
    assert_eq!(numbers(&again), numbers(&fresh));

    let mut learned = fresh;
    learned.pairs.first_entry().unwrap().get_mut().b = Tensor::ones([32, 8], &device());
    learned.save(&path, "base", false).unwrap();
}

#[test]
fn numbers_that_are_not_finite_are_not_saved() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("adapter");
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for fresh in [false, true] {
            let mut adapter = Adapter::load(&golden("gqa"), &modules(), &device()).unwrap();
            let mut entry = adapter.pairs.last_entry().unwrap();
            let a = entry.get().a.clone();
            let mut values = host(&a);
            *values.last_mut().unwrap() = bad;
            entry.get_mut().a = Tensor::from_data(TensorData::new(values, a.dims()), &device());
            let error = adapter.save(&path, "base", fresh).unwrap_err();
            assert_tells(&error.to_string(), &["was not saved", "not finite"]);
            assert!(!path.exists(), "nothing is left behind");
        }
    }
}

/// A copy of an adapter of PEFT's, with changes to its configuration and weights.
fn changed(name: &str, config: impl Fn(&mut Value), weights: impl Fn(&mut Tensors)) -> TempDir {
    let dir = TempDir::new().unwrap();
    let mut value = config_of(&golden(name));
    config(&mut value);
    fs::write(dir.path().join(ADAPTER_CONFIG), value.to_string()).unwrap();
    let mut all = tensors(&golden(name));
    weights(&mut all);
    let views = all
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(dir.path().join(ADAPTER_WEIGHTS), safetensors::serialize(views, None).unwrap()).unwrap();
    dir
}

/// The message of the refusal, which begins with the path of the directory or of a file in it.
fn refusal(dir: &TempDir) -> String {
    let message = Adapter::load(dir.path(), &modules(), &device()).map(|_| ()).unwrap_err().to_string();
    assert!(message.starts_with(&dir.path().display().to_string()), "{message}");
    message
}

#[test]
fn weights_that_do_not_fit_are_all_listed() {
    let dir = changed(
        "gqa",
        |_| {},
        |tensors| {
            tensors.remove(&format!("{KEY}.lora_A.weight")).unwrap();
            let b = tensors.remove(&format!("{KEY}.lora_B.weight")).unwrap();
            tensors.insert("base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight".into(), b);
            let up = tensors.get_mut("base_model.model.model.layers.1.mlp.up_proj.lora_A.weight").unwrap();
            up.1 = vec![32, 4];
            let down =
                tensors.get_mut("base_model.model.model.layers.1.mlp.down_proj.lora_B.weight").unwrap();
            down.0 = Dtype::I32;
        },
    );
    let q_proj = |half: &str| format!("{KEY}.lora_{half}.weight: missing");
    let lines = [
        &q_proj("A"),
        &q_proj("B"),
        "layers.9.self_attn.q_proj.lora_B.weight: belongs to no targeted module of the base",
        "layers.1.mlp.up_proj.lora_A.weight: expected shape [4, 32], found [32, 4]",
        "layers.1.mlp.down_proj.lora_B.weight: expected float32, float16 or bfloat16, found I32",
    ];
    assert_tells(&refusal(&dir), &lines);

    // For another rank than the file's, every factor has the wrong shape.
    let dir = changed("rslora", |config| config["r"] = 2.into(), |_| {});
    assert_eq!(refusal(&dir).matches("expected shape").count(), 8);
}

#[test]
fn halves_are_read_as_floats() {
    let to_bf16 = |(dtype, _, bytes): &mut (Dtype, Vec<usize>, Vec<u8>)| {
        let floats = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        *bytes = floats.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect();
        *dtype = Dtype::BF16;
    };
    let dir = changed("gqa", |_| {}, |tensors| tensors.values_mut().for_each(to_bf16));
    let halves = numbers(&Adapter::load(dir.path(), &modules(), &device()).unwrap());
    let floats = numbers(&Adapter::load(&golden("gqa"), &modules(), &device()).unwrap());
    for (name, pair) in floats {
        let rounded = pair.map(|factor| factor.iter().map(|&x| bf16::from_f32(x).to_f32()).collect());
        let expected: [Vec<f32>; 2] = rounded;
        assert_eq!(halves[&name], expected, "{name}");
    }
}

#[test]
fn features_that_change_the_result_are_refused_by_name() {
    let features = [
        ("fan_in_fan_out", json!(true)),
        ("layers_pattern", json!("blocks")),
        ("layer_replication", json!([[0, 1]])),
        ("trainable_token_indices", json!([1])),
        ("target_parameters", json!(["x"])),
        ("lora_bias", json!(true)),
        ("use_qalora", json!(true)),
        ("kasa_config", json!({"beta": 1})),
        ("arrow_config", json!({"top_k": 3})),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("init_lora_weights", json!("olora")),
        ("init_lora_weights", json!("loftq")),
    ];
    for (key, value) in &features {
        let dir = changed("gqa", |config| config[*key] = value.clone(), |_| {});
        assert_tells(&refusal(&dir), &[key, &value.to_string(), "not supported"]);
    }
    let all = changed("gqa", |config| features.iter().for_each(|(k, v)| config[*k] = v.clone()), |_| {});
    assert_tells(&refusal(&all), &features.map(|(key, _)| key));

    for harmless in [json!("gaussian"), json!(false), json!("orthogonal")] {
        let dir = changed("gqa", |config| config["init_lora_weights"] = harmless.clone(), |_| {});
        Adapter::load(dir.path(), &modules(), &device()).unwrap();
    }
}

#[test]
fn a_configuration_that_is_wrong_is_told() {
    let cases = [
        ("bias", json!("some"), "bias: unknown variant `some`"),
        ("peft_type", json!("IA3"), "expected peft_type \"LORA\", found \"IA3\""),
        ("r", json!(0), "rank: expected a whole number from 1, found 0"),
        ("r", json!(-4), "rank: expected a whole number from 1, found"),
        ("r", json!("four"), "r: expected a number, found \"four\""),
        ("lora_alpha", json!(0), "alpha: expected a number above 0"),
        ("lora_dropout", json!(1.0), "dropout: expected a number from 0 to below 1"),
        ("target_modules", json!(3), "target_modules: expected a list of module names, a regular expression"),
        (
            "target_modules",
            json!(".*(?=_proj)"),
            "target_modules: expected names, or a regular expression without",
        ),
        (
            "rank_pattern",
            json!({"q_proj": 0}),
            "rank_pattern: expected whole numbers from 1, found 0 for q_proj",
        ),
        (
            "alpha_pattern",
            json!({"q_proj": -1}),
            "alpha_pattern: expected numbers above 0, found -1 for q_proj",
        ),
        ("alpha_pattern", json!({"q_(": 1}), "alpha_pattern: expected names, or regular expressions"),
        ("rank_pattern", json!(["q_proj"]), "rank_pattern: "),
        ("exclude_modules", json!("q_("), "exclude_modules: expected names, or a regular expression"),
        ("exclude_modules", json!(3), "exclude_modules: expected a list"),
    ];
    for (key, value, told) in cases {
        let dir = changed("gqa", |config| config[key] = value.clone(), |_| {});
        assert_tells(&refusal(&dir), &[ADAPTER_CONFIG, told]);
    }
    let dir = changed("gqa", |config| config["target_modules"] = json!(["c_attn"]), |_| {});
    let error = Adapter::load(dir.path(), &modules(), &device()).unwrap_err();
    assert_tells(&error.to_string(), &["c_attn", "q_proj"]);
}

#[test]
fn broken_files_are_told() {
    let dir = changed("gqa", |_| {}, |_| {});
    let weights = dir.path().join(ADAPTER_WEIGHTS);
    let whole = fs::read(&weights).unwrap();
    for length in [0, 7, 100, whole.len() - 1] {
        fs::write(&weights, &whole[..length]).unwrap();
        assert_tells(&refusal(&dir), &[ADAPTER_WEIGHTS, "not a whole safetensors file"]);
    }
    fs::remove_file(&weights).unwrap();
    assert_tells(&refusal(&dir), &[ADAPTER_WEIGHTS, "No such file"]);
    fs::write(dir.path().join(ADAPTER_CONFIG), "{").unwrap();
    assert_tells(&refusal(&dir), &[ADAPTER_CONFIG, "EOF"]);
    fs::remove_file(dir.path().join(ADAPTER_CONFIG)).unwrap();
    assert_tells(&refusal(&dir), &[ADAPTER_CONFIG, "No such file"]);
}

#[test]
fn a_fresh_adapter_starts_as_in_peft() {
    const IN: usize = 512;
    let module = ModuleShape::new("model.layers.0.mlp.up_proj", IN, 24);
    let config = LoraConfig { rank: 64, target_modules: names(&["up_proj"]), ..LoraConfig::default() };
    for (name, device) in devices() {
        let adapter = Adapter::init(&config, std::slice::from_ref(&module), 7, &device).unwrap();
        let pair = &adapter.pairs[&module.name];
        assert_eq!((pair.a.dims(), pair.b.dims()), ([64, IN], [24, 64]));
        assert!(host(&pair.b).iter().all(|&x| x == 0.0));

        let bound = 1.0 / (IN as f64).sqrt();
        let a: Vec<f64> = host(&pair.a).into_iter().map(f64::from).collect();
        let n = a.len() as f64;
        let mean = a.iter().sum::<f64>() / n;
        let variance = a.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        let top = a.iter().fold(0.0, |top: f64, x| top.max(x.abs()));
        assert!(top <= bound * (1.0 + 1e-6) && top > 0.999 * bound, "{name}: {top}, the bound is {bound}");
        assert!(mean.abs() < 0.01 * bound, "{name}: mean {mean}");
        let uniform = bound * bound / 3.0;
        assert!((variance / uniform - 1.0).abs() < 0.02, "{name}: variance {variance}, uniform's {uniform}");
    }
}

#[test]
fn a_fresh_adapter_depends_on_seed_and_names_alone() {
    let modules = modules();
    let config = LoraConfig { target_modules: names(&["q_proj", "o_proj"]), ..LoraConfig::default() };
    let init = |modules: &[ModuleShape], seed, device: &Device| {
        numbers(&Adapter::init(&config, modules, seed, device).unwrap())
    };
    let first = init(&modules, 7, &device());
    for (name, device) in devices() {
        assert_eq!(init(&modules, 7, &device), first, "the same again on {name}");
    }
    let backwards: Vec<_> = modules.iter().rev().cloned().collect();
    assert_eq!(init(&backwards, 7, &device()), first, "the order of the modules does not matter");
    let one_layer = init(&modules[..7], 7, &device());
    assert!(one_layer.iter().all(|(name, pair)| first[name] == *pair), "nor does how many there are");

    let other_seed = init(&modules, 8, &device());
    let mut all: Vec<&Vec<f32>> = first.values().chain(other_seed.values()).map(|[a, _]| a).collect();
    all.sort_by(|x, y| x.partial_cmp(y).unwrap());
    all.dedup();
    assert_eq!(all.len(), 8, "every module and every seed has its own numbers");
}

#[test]
fn the_configuration_chooses_the_modules() {
    let chosen = |target_modules| {
        let config = LoraConfig { target_modules, ..LoraConfig::default() };
        Adapter::init(&config, &modules(), 1, &device()).map(|adapter| adapter.pairs.into_keys().collect())
    };
    let both = |name: &str| [0, 1].map(|layer| format!("model.layers.{layer}.{name}"));
    let count = |target_modules| chosen(target_modules).map(|keys: Vec<String>| keys.len());

    assert_eq!(chosen(names(&["k_proj"])).unwrap(), both("self_attn.k_proj"));
    assert_eq!(chosen(names(&["self_attn.k_proj"])).unwrap(), both("self_attn.k_proj"));
    let whole = "model.layers.1.mlp.up_proj";
    assert_eq!(chosen(names(&[whole])).unwrap(), [whole]);
    assert_eq!(count(names(&["q_proj", "v_proj", "q_proj"])).unwrap(), 4);
    assert_eq!(count(serde_json::from_value(json!("all-linear")).unwrap()).unwrap(), 14);
    assert_eq!(count(LoraConfig::default().target_modules).unwrap(), 4);

    let adapted = |config: LoraConfig| {
        Adapter::init(&config, &modules(), 1, &device()).map(|adapter| adapter.pairs.into_keys().collect())
    };
    let upper = LoraConfig { layers_to_transform: vec![1], ..LoraConfig::default() };
    let last = [("self_attn.q_proj"), ("self_attn.v_proj")].map(|name| format!("model.layers.1.{name}"));
    let found: Vec<String> = adapted(upper.clone()).unwrap();
    assert_eq!(found, last);
    let found =
        adapted(LoraConfig { exclude_modules: ModuleNames::Names(vec!["v_proj".into()]), ..upper.clone() })
            .unwrap();
    assert_eq!(found, last[..1]);
    let told = |config: LoraConfig| adapted(config).unwrap_err().to_string();
    let error = told(LoraConfig { layers_to_transform: vec![0, 2], ..upper.clone() });
    assert_tells(&error, &["lora.layers_to_transform", "from 0 to below 2", "found 2"]);
    let excluding = |names| LoraConfig { exclude_modules: names, ..upper.clone() };
    let found = adapted(excluding(ModuleNames::Pattern(".*v_proj".into()))).unwrap();
    assert_eq!(found, last[..1]);
    let error = told(excluding(ModuleNames::Names(vec!["q_proj".into(), last[1].clone()])));
    assert_tells(&error, &["lora.exclude_modules", "a module left"]);
    let error = told(excluding(ModuleNames::Pattern(".*(q|v)_proj".into())));
    assert_tells(&error, &["lora.exclude_modules", "a module left", ".*(q|v)_proj"]);
    let pattern = r"model\.layers\.1\..*\.(q|v)_proj";
    assert_eq!(chosen(serde_json::from_value(json!(pattern)).unwrap()).unwrap(), last);
    let error = told(LoraConfig { rank_pattern: [("k_proj".to_owned(), 2)].into_iter().collect(), ..upper });
    assert_tells(&error, &["lora.rank_pattern", "q_proj, v_proj", "found k_proj"]);

    let error = count(names(&["q_proj", "qproj", "proj"])).unwrap_err().to_string();
    assert_tells(&error, &["[qproj, proj] matches no linear layer", "down_proj", "v_proj", "all-linear"]);
    assert!(count(names(&[])).is_err());
}

#[test]
fn values_that_cannot_train_are_refused() {
    let default = LoraConfig::default;
    let cases = [
        (LoraConfig { rank: 0, ..default() }, "lora.rank"),
        (LoraConfig { alpha: 0.0, ..default() }, "lora.alpha"),
        (LoraConfig { alpha: f64::NAN, ..default() }, "lora.alpha"),
        (LoraConfig { dropout: 1.0, ..default() }, "lora.dropout"),
        (LoraConfig { dropout: -0.1, ..default() }, "lora.dropout"),
        (LoraConfig { dropout: f64::NAN, ..default() }, "lora.dropout"),
    ];
    for (config, knob) in cases {
        let error = Adapter::init(&config, &modules(), 1, &device()).unwrap_err();
        assert_tells(&error.to_string(), &[knob, "expected", "found"]);
    }
    let parse = |text: &str| serde_json::from_str::<LoraConfig>(text);
    assert_eq!(parse("{}").unwrap(), default());
    assert_eq!(parse(r#"{"rank": 16, "target_modules": ["k_proj"]}"#).unwrap().rank, 16);
    assert!(parse(r#"{"lora_rank": 16}"#).unwrap_err().to_string().contains("lora_rank"));
}

#[test]
fn dora_drops_what_the_adapter_changes_as_peft_does() {
    let device = device();
    let numbers = |shape: [usize; 2], step: f32| {
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i as f32 * step).sin()).collect();
        Tensor::<2>::from_data(TensorData::new(values, shape), &device)
    };
    let (x, weight, bias) = (numbers([5, 4], 0.7), numbers([3, 4], 1.3), numbers([1, 3], 0.9));
    let (a, b, magnitude, scale) =
        (numbers([2, 4], 0.3), numbers([3, 2], 1.9), numbers([1, 3], 0.4) + 2.0, 1.5);
    let pair =
        LoraPair { a: a.clone(), b: b.clone(), scale, magnitude: Some(magnitude.clone()), fixed: None };
    let adapter = Adapter {
        config: LoraConfig::default(),
        pairs: [("l".to_owned(), pair)].into(),
        whole: BTreeMap::new(),
    };
    let layer =
        LoraLinear::new("l".into(), FrozenLinear::new(weight.clone(), Some(bias.clone().reshape([3]))));
    let dropout = Dropout { p: 0.5, key: DropoutKey { seed: 1, step: 2, micro_batch: 3 } };
    let mode = ForwardMode { dropout: Some(dropout), ..ForwardMode::inference(Some(&adapter)) };
    let found = layer.forward(&x, mode);

    let kept = dropout.apply(x.clone(), "l");
    assert_ne!(kept.to_data(), x.to_data());
    let update = b.matmul(a) * scale;
    let norms = (weight.clone() + update.clone()).powf_scalar(2.0).sum_dim(1).sqrt().transpose();
    let stretch = magnitude / norms;
    let of = |x: &Tensor<2>, w: &Tensor<2>| x.clone().matmul(w.clone().transpose());
    let expected =
        of(&x, &weight) + of(&kept, &weight) * (stretch.clone() - 1.0) + of(&kept, &update) * stretch + bias;
    let differences = (found - expected).abs().try_to_vec_as::<f32>().unwrap();
    assert!(differences.iter().all(|difference| *difference < 1e-4), "{differences:?}");
}
