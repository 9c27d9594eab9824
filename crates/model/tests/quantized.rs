//! Quantized bases: made once, kept whole, and computing as the numbers that they stand for.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test reports by panicking

mod golden;

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use golden::{Answers, assert_close, devices, host, relative_error, workspace};
use pronk_kernels::{DYNAMIC_MAP, NF4_CODEBOOK, Nf4QuantState, Nf4Scales};
use pronk_kernels::{Format, quantize_nf4};
use pronk_lora::ForwardMode;
use pronk_model::{
    Base, Decoder, LoadConfig, Memory, ModelError, Origin, Quantization, QuantizedBase, Residency, Scheme,
    WeightBytes, quantized,
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

const VARIANTS: [&str; 6] = ["gqa", "tied", "bias", "head-dim", "rope-linear", "rope-llama3"];
const TOLERANCE: f32 = 1e-5;
const WEIGHTS: &str = "model.safetensors";
const MANIFEST: &str = "pronk_cache.json";

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tiny(variant: &str) -> Base {
    Base::open(&workspace(&format!("tests/golden/tiny-{variant}"))).unwrap()
}

fn quantize(base: &Base, scheme: Scheme, cache: &Path) -> QuantizedBase {
    quantized(base, scheme, cache, |_, _| ControlFlow::Continue(())).unwrap()
}

/// What the cache gives where it has nothing to make.
fn from_cache(base: &Base, cache: &Path) -> Base {
    let found = quantized(base, Scheme::Nf4, cache, |_, _| panic!("it is there already")).unwrap();
    assert_eq!(found.origin, Origin::Cache);
    found.base
}

fn write(dir: &Path, config: &Value, tensors: &Tensors) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(dir.join(WEIGHTS), safetensors::serialize(views, None).unwrap()).unwrap();
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The same numbers in float32, in the directory `dir`.
fn dequantized(base: &Base, dir: &Path) -> Base {
    let float = |name: String| {
        let host = base.read(&name).unwrap();
        let bytes = le_bytes(&host.to_f32());
        (name, (Dtype::F32, host.shape, bytes))
    };
    let tensors = base.config.tensors().into_iter().map(|(name, _)| float(name)).collect();
    write(dir, &base.config.to_json("float32"), &tensors);
    Base::open(dir).unwrap()
}

fn logits(base: &Base, device: &Device, weights: Residency, token_ids: &[u32]) -> Vec<f32> {
    let config = LoadConfig { weights, ..LoadConfig::default() };
    let decoder = Decoder::load(base, device, config, |_, _| {}).unwrap();
    host(decoder.logits(token_ids, ForwardMode::inference(None)))
}

/// Everything in `dir`, hidden or not.
fn listing(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn assert_tells(error: &ModelError, parts: &[&str]) {
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

#[test]
fn they_answer_as_the_numbers_that_they_stand_for() {
    let dir = TempDir::new().unwrap();
    for variant in VARIANTS {
        let base = tiny(variant);
        let expected = Answers::read(&format!("tiny-{variant}/expected.safetensors"));
        let token_ids = expected.ids("token_ids");
        // A row is 32 numbers, half a block of NF4: blocks span rows.
        for (scheme, furthest) in [(Scheme::Nf4, 1.0), (Scheme::Int8, 0.1)] {
            let quantized = quantize(&base, scheme, &dir.path().join("cache"));
            assert_eq!(quantized.origin, Origin::Quantized);
            let quantized = quantized.base;
            assert_eq!(quantized.quantization(), Some(scheme.to_string()));
            assert_eq!((&quantized.config, quantized.shapes()), (&base.config, base.shapes()));
            let dense = dequantized(&quantized, &dir.path().join(format!("{variant}-{scheme}")));
            for (device_name, device) in devices() {
                let run = |base, weights| logits(base, &device, weights, &token_ids);
                let found = run(&quantized, Residency::Resident);
                let what = format!("tiny-{variant} in {scheme} on {device_name}");
                assert_close(&what, &found, &run(&dense, Residency::Resident), TOLERANCE);
                assert_eq!(run(&quantized, Residency::Streamed), found, "{what}: streamed");
                let lost = relative_error(&found, &expected.floats("logits"));
                println!("{what}: quantizing costs {lost:.2e}");
                assert!(lost > 1e-4 && lost < furthest, "{what}: quantizing costs {lost}");
            }
        }
    }
}

/// No size is a multiple of four, nor of a block; matrices are bfloat16.
fn odd_base(dir: &Path, first_norm: f32) -> Base {
    let mut config = tiny("gqa").config;
    (config.vocab_size, config.hidden_size, config.intermediate_size) = (7, 6, 5);
    (config.num_attention_heads, config.num_key_value_heads, config.head_dim) = (3, 1, 2);
    let mut tensors = Tensors::new();
    for (name, shape) in config.tensors() {
        let count = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..count).map(|i| (i as f32 * 1.7 + name.len() as f32).sin()).collect();
        let bf16: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()[2..].to_vec()).collect();
        let tensor = if shape.len() == 2 {
            (Dtype::BF16, shape, bf16)
        } else {
            (Dtype::F32, shape, le_bytes(&values))
        };
        tensors.insert(name, tensor);
    }
    tensors.get_mut("model.norm.weight").unwrap().2[..4].copy_from_slice(&first_norm.to_le_bytes());
    write(dir, &config.to_json("bfloat16"), &tensors);
    Base::open(dir).unwrap()
}

#[test]
fn odd_sizes_and_sixteen_bits_are_kept() {
    let dir = TempDir::new().unwrap();
    let base = odd_base(&dir.path().join("base"), 1.0);
    for scheme in Scheme::ALL {
        let quantized = quantize(&base, scheme, &dir.path().join("cache")).base;
        for (name, shape) in base.config.tensors() {
            let [source, kept] = [&base, &quantized].map(|base| base.read(&name).unwrap());
            if shape.len() == 1 || !name.starts_with("model.layers") {
                assert_eq!((source.dtype, source.bytes), (kept.dtype, kept.bytes), "{name}");
                continue;
            }
            let error = relative_error(&kept.to_f32(), &source.to_f32());
            assert!(
                error > 0.0 && error < if scheme == Scheme::Nf4 { 0.2 } else { 0.005 },
                "{name}: {error}"
            );
        }
    }
    // The state says what the weights were.
    let file =
        fs::read(quantize(&base, Scheme::Nf4, &dir.path().join("cache")).base.path.join(WEIGHTS)).unwrap();
    let name = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4";
    let state = SafeTensors::deserialize(&file).unwrap().tensor(name).unwrap().data().to_vec();
    let state = Nf4QuantState::from_json(&state).unwrap();
    assert_eq!((state.dtype.as_str(), &state.shape[..]), ("bfloat16", &[5, 6][..]));
}

/// A copy of a tiny base, with its tokenizer.
fn copy(to: &Path) -> Base {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(workspace("tests/golden/tiny-gqa")).unwrap() {
        let from = entry.unwrap().path();
        fs::copy(&from, to.join(from.file_name().unwrap())).unwrap();
    }
    Base::open(to).unwrap()
}

#[test]
fn the_second_time_it_is_there() {
    let dir = TempDir::new().unwrap();
    let (base, cache) = (copy(&dir.path().join("base")), dir.path().join("cache"));
    let made = quantize(&base, Scheme::Nf4, &cache).base;
    let files = [
        "config.json",
        "generation_config.json",
        WEIGHTS,
        MANIFEST,
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(listing(&made.path), files);
    let changed = || fs::metadata(made.path.join(WEIGHTS)).unwrap().modified().unwrap();
    let before = changed();
    assert_eq!(from_cache(&base, &cache).path, made.path);
    assert_eq!(changed(), before);

    // Another scheme, and another base, are others.
    let other = quantize(&base, Scheme::Int8, &cache);
    assert_eq!(other.origin, Origin::Quantized);
    let weights = dir.path().join("base").join(WEIGHTS);
    let file = fs::File::options().write(true).open(&weights).unwrap();
    file.set_modified(before - std::time::Duration::from_mins(1)).unwrap();
    let other = quantize(&base, Scheme::Nf4, &cache);
    assert_eq!(other.origin, Origin::Quantized);
    assert_eq!(listing(&cache).len(), 3);
    assert_eq!(changed(), before);
    // Other numbers of the same shapes, as old as those: what an image or an archive may hold.
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    let age = fs::metadata(&weights).unwrap().modified().unwrap();
    fs::write(&weights, bytes).unwrap();
    fs::File::options().append(true).open(&weights).unwrap().set_modified(age).unwrap();
    assert_eq!(quantize(&base, Scheme::Nf4, &cache).origin, Origin::Quantized);
}

#[test]
fn a_cache_that_is_not_whole_is_made_anew() {
    let dir = TempDir::new().unwrap();
    let (base, cache) = (copy(&dir.path().join("base")), dir.path().join("cache"));
    let path = quantize(&base, Scheme::Nf4, &cache).base.path;
    let whole = fs::read(path.join(WEIGHTS)).unwrap();
    let anew = |damage: &dyn Fn(), words: &str| {
        damage();
        let QuantizedBase { base: made, origin } = quantize(&base, Scheme::Nf4, &cache);
        let Origin::QuantizedAnew(reason) = origin else { panic!("{origin:?}") };
        assert!(reason.contains(words), "{reason}");
        assert_eq!(fs::read(made.path.join(WEIGHTS)).unwrap(), whole, "{words}");
        from_cache(&base, &cache);
        assert_eq!(listing(&cache).len(), 1);
    };
    let (weights, manifest) = (path.join(WEIGHTS), path.join(MANIFEST));
    let cut = format!("{WEIGHTS}: expected {} bytes, found {}", whole.len(), whole.len() - 1);
    anew(&|| fs::write(&weights, &whole[..whole.len() - 1]).unwrap(), &cut);
    let mut flipped = whole.clone();
    flipped[whole.len() / 3] ^= 1;
    anew(&|| fs::write(&weights, &flipped).unwrap(), "model.safetensors: it is not what was written");
    anew(&|| fs::remove_file(&weights).unwrap(), "model.safetensors: No such file");
    anew(&|| fs::remove_file(&manifest).unwrap(), "pronk_cache.json cannot be read");
    anew(&|| fs::write(&manifest, "{").unwrap(), "pronk_cache.json is no manifest");
    let other = odd_base(&dir.path().join("other"), 1.0);
    let other = quantize(&other, Scheme::Nf4, &dir.path().join("elsewhere")).base.path;
    anew(
        &|| {
            fs::remove_dir_all(&path).unwrap();
            fs::rename(&other, &path).unwrap();
        },
        "it was made of another base",
    );
}

#[test]
fn whoever_stops_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let (base, cache) = (tiny("gqa"), dir.path().join("new/cache"));
    for tensors in 0..3 {
        let mut heard = 0;
        let stopped = quantized(&base, Scheme::Nf4, &cache, |done, total| {
            assert!(done < total);
            heard += 1;
            if heard > tensors { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(stopped, Err(ModelError::Interrupted)));
        assert_eq!(listing(dir.path()), Vec::<String>::new());
    }
}

/// The system stops files from growing beyond 64 blocks of this process's child, which is what a
/// full disk looks like to the writer.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told_and_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let limited = "trap '' XFSZ; ulimit -f 64; exec \"$0\" --exact --ignored on_a_full_disk";
    let child = std::process::Command::new("sh")
        .args(["-c", limited])
        .arg(std::env::current_exe().unwrap())
        .env(CACHE, dir.path().join("cache"))
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&child.stdout);
    assert!(!child.status.success(), "{told}");
    assert!(told.contains("model.safetensors: File too large") && told.contains("make room"), "{told}");
    assert_eq!(listing(dir.path()), Vec::<String>::new());
}

const CACHE: &str = "PRONK_TEST_CACHE";

#[test]
#[ignore = "a_full_disk_is_told_and_leaves_nothing runs it, in a process of its own"]
fn on_a_full_disk() {
    let Some(cache) = std::env::var_os(CACHE) else { return };
    let failed = quantized(&tiny("gqa"), Scheme::Int8, Path::new(&cache), |_, _| ControlFlow::Continue(()));
    panic!("{}", failed.unwrap_err());
}

#[test]
fn numbers_that_are_none_are_told() {
    let dir = TempDir::new().unwrap();
    let base = odd_base(&dir.path().join("base"), f32::NAN);
    quantize(&base, Scheme::Nf4, &dir.path().join("cache")); // norms are not quantized
    let file = dir.path().join("base").join(WEIGHTS);
    let mut tensors = read(&file);
    tensors.get_mut("model.layers.0.mlp.up_proj.weight").unwrap().2[2..4].copy_from_slice(&[0x80, 0x7f]);
    write(&dir.path().join("base"), &base.config.to_json("bfloat16"), &tensors);
    let base = Base::open(&base.path).unwrap();
    for scheme in Scheme::ALL {
        let refused = quantized(&base, scheme, &dir.path().join("new"), |_, _| ControlFlow::Continue(()));
        let told = ["base: model.layers.0.mlp.up_proj.weight: expected finite numbers, found inf at 1"];
        assert_tells(&refused.unwrap_err(), &told);
        assert_eq!(listing(&dir.path().join("new")), Vec::<String>::new());
    }
}

#[test]
fn what_is_quantized_is_used_as_it_is() {
    let dir = TempDir::new().unwrap();
    let base = quantize(&tiny("gqa"), Scheme::Nf4, dir.path()).base;
    let again = quantized(&base, Scheme::Nf4, dir.path(), |_, _| panic!("there is nothing to do")).unwrap();
    assert_eq!((again.origin, again.base.path), (Origin::AsItWas, base.path.clone()));
    let refused = quantized(&base, Scheme::Int8, dir.path(), |_, _| ControlFlow::Continue(())).unwrap_err();
    assert_tells(&refused, &["to quantize to int8, found nf4", "leave quantize out"]);
    assert_eq!(listing(dir.path()).len(), 1);
}

/// Left as they are in the cache, whose configuration says so, and counted so beforehand.
#[test]
fn skipped_layers_stay_in_16_bits() {
    let dir = TempDir::new().unwrap();
    let base = tiny("gqa");
    let skipping = |names: &[&str]| {
        let skip_modules = names.iter().map(|&name| name.to_owned()).collect();
        Quantization { scheme: Scheme::Nf4, skip_modules }
    };
    let write = |quantization| quantized(&base, quantization, dir.path(), |_, _| ControlFlow::Continue(()));
    let skips = skipping(&["down_proj", "model.layers.1.self_attn"]);
    let found = write(skips.clone()).unwrap().base;
    for module in base.config.linear_modules() {
        let skipped = module.name.ends_with("down_proj") || module.name.contains("layers.1.self_attn.");
        let format = found.matrix(&format!("{}.weight", module.name)).unwrap().format();
        assert_eq!(format, if skipped { Format::Bf16 } else { Format::Nf4 }, "{}", module.name);
    }
    let config: Value = serde_json::from_slice(&fs::read(found.path.join("config.json")).unwrap()).unwrap();
    let names = &config["quantization_config"]["llm_int8_skip_modules"];
    assert_eq!(names, &json!(["down_proj", "model.layers.1.self_attn", "lm_head"]));
    assert_eq!(found.skip_modules(), skips.skip_modules);

    let bytes = |base, quantization| {
        WeightBytes::of(base, LoadConfig::default(), quantization, Memory::Card).unwrap().resident
    };
    assert_eq!(bytes(&base, Some(&skips)), bytes(&found, None));
    assert_eq!(write(skips.clone()).unwrap().origin, Origin::Cache);
    assert_eq!(write(skipping(&[])).unwrap().origin, Origin::Quantized, "another base");
    let again = quantized(&found, skips, dir.path(), |_, _| panic!("there is nothing to do")).unwrap();
    assert_eq!(again.origin, Origin::AsItWas);
    assert_tells(&write(skipping(&["dwon_proj"])).unwrap_err(), &["'dwon_proj'", "down_proj, gate_proj"]);
    assert_tells(&write(skipping(&[""])).unwrap_err(), &["found ''"]);
}

#[test]
fn schemes_are_named() {
    assert_eq!(Scheme::ALL.map(|scheme| scheme.to_string().parse::<Scheme>().unwrap()), Scheme::ALL);
    let unknown = "int4".parse::<Scheme>().unwrap_err();
    assert_eq!(unknown.to_string(), "quantize: expected nf4 or int8, found 'int4'");
}

fn read(file: &Path) -> Tensors {
    let whole = fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&whole).unwrap().tensors().into_iter();
    tensors.map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))).collect()
}

/// `tiny-gqa` as it would be published: NF4 without double quantization, its map off by what
/// devices differ by, one layer left in float32; or int8 without a word about the rows' order.
fn published(dir: &Path, scheme: Scheme, change: impl Fn(&mut Tensors, &mut Value)) -> PathBuf {
    let base = tiny("gqa");
    let mut tensors = read(&base.path.join(WEIGHTS));
    let mut config = base.config.to_json("float32");
    for (name, shape) in base.config.tensors() {
        let &[rows, cols] = &shape[..] else { continue };
        if !name.starts_with("model.layers.") || name.contains("o_proj") {
            continue;
        }
        let values = base.read(&name).unwrap().to_f32();
        match scheme {
            Scheme::Nf4 => nf4(&mut tensors, &name, [rows, cols], &values),
            Scheme::Int8 => {
                let (codes, scales) = pronk_kernels::quantize_int8(&values, rows);
                tensors.insert(name.replace(".weight", ".SCB"), (Dtype::F32, vec![rows], scales.to_vec()));
                tensors.insert(name, (Dtype::I8, shape, codes.to_vec()));
            }
        }
    }
    config["quantization_config"] = match scheme {
        Scheme::Nf4 => json!({"load_in_4bit": true, "bnb_4bit_quant_type": "nf4", "llm_int8_threshold": 6.0,
                              "quant_method": "bitsandbytes", "llm_int8_skip_modules": ["o_proj"]}),
        Scheme::Int8 => json!({"load_in_8bit": true, "load_in_4bit": false, "llm_int8_skip_modules": null}),
    };
    change(&mut tensors, &mut config);
    write(dir, &config, &tensors);
    dir.into()
}

fn nf4(tensors: &mut Tensors, name: &str, shape: [usize; 2], values: &[f32]) {
    let parts = quantize_nf4(values, false);
    let Nf4Scales::Plain { absmax } = &parts.scales else { panic!("plain scales") };
    let state = Nf4QuantState::new(shape, "float16", &parts.scales).to_json().unwrap();
    let map: Vec<f32> = NF4_CODEBOOK.iter().map(|x| x * (1.0 + 1e-6)).collect();
    for (part, dtype, bytes) in [
        (".absmax", Dtype::F32, absmax.to_vec()),
        (".quant_map", Dtype::F32, le_bytes(&map)),
        (".quant_state.bitsandbytes__nf4", Dtype::U8, state),
    ] {
        let length = bytes.len() / if dtype == Dtype::F32 { 4 } else { 1 };
        tensors.insert(format!("{name}{part}"), (dtype, vec![length], bytes));
    }
    tensors.insert(name.into(), (Dtype::U8, vec![parts.codes.len(), 1], parts.codes.to_vec()));
}

#[test]
fn published_checkpoints_open() {
    let dir = TempDir::new().unwrap();
    let token_ids = Answers::read("tiny-gqa/expected.safetensors").ids("token_ids");
    for scheme in Scheme::ALL {
        let base = Base::open(&published(&dir.path().join(scheme.to_string()), scheme, |_, _| {})).unwrap();
        assert_eq!(base.quantization(), Some(scheme.to_string()));
        assert_eq!(base.shapes(), tiny("gqa").shapes());
        let name = "model.layers.0.self_attn.o_proj.weight";
        assert_eq!(base.read(name).unwrap().bytes, tiny("gqa").read(name).unwrap().bytes, "left as it was");
        let dense = dequantized(&base, &dir.path().join(format!("{scheme}-dense")));
        for (device_name, device) in devices() {
            let run = |base| logits(base, &device, Residency::Resident, &token_ids);
            let what = format!("published in {scheme} on {device_name}");
            assert_close(&what, &run(&base), &run(&dense), TOLERANCE);
        }
    }
}

#[test]
fn parts_that_are_missing_or_others_are_all_listed() {
    let dir = TempDir::new().unwrap();
    let refusal = |scheme, change: &dyn Fn(&mut Tensors, &mut Value)| {
        Base::open(&published(dir.path(), scheme, change)).map(|_| ()).unwrap_err()
    };
    let layer = "model.layers.0.mlp";
    let error = refusal(Scheme::Nf4, &|tensors, _| {
        tensors.remove(&format!("{layer}.up_proj.weight.absmax")).unwrap();
        tensors.remove(&format!("{layer}.gate_proj.weight.quant_state.bitsandbytes__nf4")).unwrap();
        tensors.remove(&format!("{layer}.down_proj.weight.quant_map")).unwrap();
        let map = tensors.get_mut("model.layers.1.mlp.up_proj.weight.quant_map").unwrap();
        map.2[20] ^= 1;
        map.2[22] ^= 1;
        let codes = tensors.get_mut("model.layers.1.mlp.down_proj.weight").unwrap();
        codes.2.pop();
        codes.1[0] -= 1;
        tensors.get_mut("model.layers.1.mlp.gate_proj.weight").unwrap().0 = Dtype::I8;
    });
    assert!(matches!(&error, ModelError::Weights { problems, .. } if problems.len() == 6), "{error}");
    let told = [
        "model.layers.0.mlp.up_proj.weight.absmax: missing, expected a tensor in F32",
        "model.layers.0.mlp.gate_proj.weight.quant_state.bitsandbytes__nf4: missing, expected a tensor in U8",
        "model.layers.0.mlp.down_proj.weight.quant_map: missing",
        "model.layers.1.mlp.up_proj.weight.quant_map: expected bitsandbytes' 16 numbers, found others",
        "model.layers.1.mlp.down_proj.weight: weight of nf4 [32, 64]: expected 1024 bytes, found 1023",
        "model.layers.1.mlp.gate_proj.weight: expected U8, found I8",
    ];
    assert_tells(&error, &told);

    let error = refusal(Scheme::Int8, &|tensors, _| {
        tensors.remove(&format!("{layer}.up_proj.SCB")).unwrap();
        tensors.insert(format!("{layer}.down_proj.weight_format"), (Dtype::U8, vec![], vec![2]));
        tensors.get_mut(&format!("{layer}.gate_proj.weight")).unwrap().1 = vec![32, 64];
    });
    let told = [
        "model.layers.0.mlp.up_proj.SCB: missing, expected a tensor in F32",
        "model.layers.0.mlp.down_proj.weight_format: expected 0, rows one after another, found [2]",
        "model.layers.0.mlp.gate_proj.weight: scales of int8 [32, 64]: expected 128 bytes, found 256",
    ];
    assert_tells(&error, &told);

    // A matrix of another shape than the configuration's is told as any other.
    let error = refusal(Scheme::Nf4, &|_, config| config["intermediate_size"] = 65.into());
    assert_tells(&error, &["model.layers.0.mlp.up_proj.weight: expected shape [65, 32], found [64, 32]"]);
    // Nothing of it is taken for granted.
    let error = refusal(Scheme::Nf4, &|_, config| config["quantization_config"] = Value::Null);
    assert_tells(&error, &["expected float32, float16 or bfloat16, found U8"]);
}

#[test]
fn double_quantization_wants_its_parts_too() {
    let dir = TempDir::new().unwrap();
    let made = quantize(&tiny("gqa"), Scheme::Nf4, dir.path()).base.path;
    let config: Value = serde_json::from_slice(&fs::read(made.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization_config"]["bnb_4bit_use_double_quant"], true);
    let mut tensors = read(&made.join(WEIGHTS));
    let name = "model.layers.1.self_attn.q_proj.weight";
    assert_eq!(tensors[&format!("{name}.nested_quant_map")].2, le_bytes(&DYNAMIC_MAP));
    tensors.remove(&format!("{name}.nested_absmax")).unwrap();
    tensors.get_mut(&format!("{name}.nested_quant_map")).unwrap().2[9] ^= 0x40;
    write(&made, &config, &tensors);
    let told = [
        ".nested_absmax: missing, expected a tensor in F32",
        ".nested_quant_map: expected bitsandbytes' 256",
    ];
    assert_tells(&Base::open(&made).unwrap_err(), &told);
}

#[test]
fn other_quantizations_are_refused_by_name() {
    let dir = TempDir::new().unwrap();
    for other in [
        json!({"quant_method": "gptq", "bits": 4}),
        json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "fp4"}),
        json!({"quant_method": "bitsandbytes", "load_in_4bit": true}),
        json!({"quant_method": "bitsandbytes"}),
        json!("nf4"),
    ] {
        let path =
            published(dir.path(), Scheme::Nf4, |_, config| config["quantization_config"] = other.clone());
        let words = [&format!("quantization_config: {other} is not supported") as &str, "\"nf4\""];
        assert_tells(&Base::open(&path).unwrap_err(), &words);
    }
}
