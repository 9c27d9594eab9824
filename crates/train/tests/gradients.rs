//! Loss and `LoRA` gradients against PEFT's, on every CPU device, with and without recompute.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test may panic

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use pronk_data::{PackedBatch, TokenizedExample};
use pronk_kernels::{Dropout, DropoutKey, open_devices};
use pronk_lora::{Adapter, InitLoraWeights, LoraConfig, TargetModules, TensorKind, TensorName};
use pronk_model::{Base, Decoder, LoadConfig, StartWeights};
use pronk_train::{Gradients, Keep, MicroBatchLoss, SavedInputs, loss_and_gradients, loss_only};
use safetensors::SafeTensors;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

/// A file of numbers, which stays to the end of the tests.
fn numbers(file: &str) -> SafeTensors<'static> {
    SafeTensors::deserialize(fs::read(golden().join(file)).unwrap().leak()).unwrap()
}

fn devices() -> Vec<Device> {
    let devices = open_devices();
    assert!(!devices.is_empty(), "build with --features flex, tch, or both");
    devices.into_iter().map(|(_, device)| device).collect()
}

fn decoder(name: &str, device: &Device) -> (Base, Decoder) {
    let base = Base::open(&golden().join(name)).unwrap();
    let decoder = Decoder::load(&base, device, LoadConfig::default(), |_, _| ()).unwrap();
    (base, decoder)
}

fn floats(file: &SafeTensors, key: &str) -> Vec<f32> {
    let bytes = file.tensor(key).unwrap().data();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn whole_numbers(file: &SafeTensors, key: &str) -> Vec<usize> {
    let bytes = file.tensor(key).unwrap().data();
    bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as usize).collect()
}

/// The golden's documents, as rows.
fn examples(file: &SafeTensors, case: &str) -> Vec<TokenizedExample> {
    let ids = whole_numbers(file, &format!("{case}.token_ids"));
    let mask = file.tensor(&format!("{case}.loss_mask")).unwrap().data().to_vec();
    let mut start = 0;
    let mut examples = Vec::new();
    for length in whole_numbers(file, &format!("{case}.document_lengths")) {
        let rows = start..start + length;
        examples.push(TokenizedExample {
            token_ids: ids[rows.clone()].iter().map(|&id| id as u32).collect(),
            loss_mask: mask[rows].iter().map(|&m| m == 1).collect(),
        });
        start += length;
    }
    examples
}

fn pack(examples: &[TokenizedExample]) -> PackedBatch {
    PackedBatch::concat(examples.iter().map(TokenizedExample::view))
}

/// Largest difference, relative to the largest reference value.
fn relative_error(ours: &Tensor<2>, reference: &[f32]) -> f32 {
    let ours: Vec<f32> = ours.try_to_vec_as().unwrap();
    assert_eq!(ours.len(), reference.len());
    let largest = reference.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    ours.iter().zip(reference).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

/// Keeps so many graphs, and the other blocks' inputs as they are.
fn graphs(graphs: usize) -> Keep {
    Keep { graphs, inputs: SavedInputs::F32 }
}

fn loss(micro: &MicroBatchLoss) -> f32 {
    micro.sum.clone().into_scalar()
}

#[test]
fn loss_and_gradients_equal_pefts() {
    let llamas = [
        ("gqa", "tiny-gqa"),
        ("tied", "tiny-tied"),
        ("rslora", "tiny-gqa"),
        ("patterns", "tiny-gqa"),
        ("dora", "tiny-bias"),
    ];
    equal_pefts("lora-gradients.safetensors", &llamas.map(|(case, model)| (case, model.to_owned())));
}

/// From the same start over the base as it is, where PEFT takes the start away from the base's own weights.
#[test]
fn gradients_of_a_principal_start_equal_pefts() {
    let file = numbers("pissa-gradients.safetensors");
    for device in devices() {
        let (base, decoder) = decoder("tiny-gqa", &device);
        let config = LoraConfig {
            rank: 2,
            alpha: 3.0,
            target_modules: TargetModules::Names(vec!["v_proj".into(), "down_proj".into()]),
            init_lora_weights: InitLoraWeights::Pissa(None),
            ..LoraConfig::default()
        };
        let weights = StartWeights { base: &base, original: None, records: &[] };
        let mut adapter = decoder.started_adapter(&config, weights, 1, |_, _| ()).unwrap();
        for (name, pair) in &mut adapter.pairs {
            let read = |kind: &str, factor, like: &Tensor<2>| {
                let name = TensorName::new(name, factor);
                let values = floats(&file, &format!("pissa.{kind}.base_model.model.{name}.weight"));
                Tensor::<2>::from_data(TensorData::new(values, like.dims()), &device)
            };
            let pefts = |kind| (read(kind, TensorKind::A, &pair.a), read(kind, TensorKind::B, &pair.b));
            let (start, now) = (pefts("start"), pefts("factor"));
            // Singular vectors have no sign of their own, their products have.
            let product: Vec<f32> = start.1.clone().matmul(start.0.clone()).try_to_vec_as().unwrap();
            let error = relative_error(&pair.b.clone().matmul(pair.a.clone()), &product);
            assert!(error < 1e-4, "{device:?} {name}: {error}");
            (pair.a, pair.b) = start;
            pair.keep_start(name).unwrap();
            (pair.a, pair.b) = now;
        }
        let batch = pack(&examples(&file, "pissa"));
        for kept in [usize::MAX, 0] {
            let n = batch.supervised();
            let micro = loss_and_gradients(&decoder, &adapter, &batch, n, graphs(kept), None, None);
            let (mean, expected) = (loss(&micro) / n as f32, floats(&file, "pissa.loss")[0]);
            assert!((mean / expected - 1.0).abs() < 1e-5, "loss {mean}, PEFT's is {expected}");
            assert_eq!(micro.gradients.tensors.len(), 8);
            for (name, ours) in &micro.gradients.tensors {
                let key = format!("pissa.gradient.base_model.model.{name}.weight");
                let error = relative_error(ours, &floats(&file, &key));
                assert!(error < 1e-4, "{device:?} {kept} kept, {key}: {error}");
            }
        }
    }
}

/// Biases, norms of heads and of outputs, caps, windows, two rotary embeddings, packed layers.
#[test]
fn loss_and_gradients_of_every_family_equal_pefts() {
    let families = ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"];
    equal_pefts("family-gradients.safetensors", &families.map(|name| (name, format!("tiny-{name}"))));
}

/// Embeddings, whose rows are summed, and the head, by the fused loss: apart, as one, as copies of one, beside an
/// adapter that does not reach down to the first block; biases of adapted layers and of others.
#[test]
fn gradients_of_what_is_trained_whole_equal_pefts() {
    let cases = [
        ("saved", "tiny-mistral"),
        ("saved-head", "tiny-mistral"),
        ("saved-tied", "tiny-qwen2"),
        ("saved-parted", "tiny-qwen2"),
        ("saved-embeddings", "tiny-gemma2"),
        ("saved-scaled", "tiny-gemma2"),
        ("bias-all", "tiny-qwen2"),
        ("bias-lora-only", "tiny-qwen2"),
        ("bias-dora", "tiny-bias"),
    ];
    equal_pefts("whole-gradients.safetensors", &cases.map(|(case, model)| (case, model.to_owned())));
}

fn equal_pefts(file: &str, cases: &[(&str, String)]) {
    let file = numbers(file);
    for device in devices() {
        for (case, model) in cases {
            let (base, decoder) = decoder(model, &device);
            let modules = base.config.adapter_modules();
            let adapter =
                Adapter::load(&golden().join(format!("adapter-{case}")), &modules, &device).unwrap();
            let batch = pack(&examples(&file, case));
            for kept in [usize::MAX, 0, 1] {
                let n = batch.supervised();
                let micro = loss_and_gradients(&decoder, &adapter, &batch, n, graphs(kept), None, None);
                let expected = floats(&file, &format!("{case}.loss"))[0];
                let mean = loss(&micro) / n as f32;
                assert!((mean / expected - 1.0).abs() < 1e-5, "{case}: loss {mean}, PEFT's is {expected}");
                let names: Vec<TensorName> = adapter.tensors().map(|(name, _)| name).collect();
                let found: Vec<&TensorName> = micro.gradients.tensors.keys().collect();
                assert_eq!(found, names.iter().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>());
                for (name, ours) in &micro.gradients.tensors {
                    let key = match name.kind {
                        TensorKind::A | TensorKind::B => format!("{name}.weight"),
                        TensorKind::Bias if adapter.pairs.contains_key(&name.module) => {
                            format!("{}.base_layer.bias", name.module)
                        }
                        TensorKind::Magnitude | TensorKind::Weight | TensorKind::Bias => name.to_string(),
                    };
                    let key = format!("{case}.gradient.base_model.model.{key}");
                    let error = relative_error(ours, &floats(&file, &key));
                    assert!(error < 1e-4, "{device:?} {kept} kept, {key}: {error}");
                }
            }
        }
    }
}

/// An adapter on parts of packed layers has the gradients that its blocks have in the adapter on the
/// whole, which are PEFT's.
#[test]
fn parts_of_packed_layers_have_the_gradients_of_their_blocks() {
    let file = numbers("family-gradients.safetensors");
    for device in devices() {
        let (base, decoder) = decoder("tiny-phi3", &device);
        let modules = base.config.adapter_modules();
        let targets = ["q_proj", "v_proj", "up_proj"].map(str::to_owned).to_vec();
        let config =
            LoraConfig { rank: 2, target_modules: TargetModules::Names(targets), ..LoraConfig::default() };
        let mut adapter = Adapter::init(&config, &modules, 3, &device).unwrap();
        for pair in adapter.pairs.values_mut() {
            pair.b = pair.a.clone().slice([0..2, 0..1]).transpose().expand(pair.b.dims()) * 0.3;
        }
        let batch = pack(&examples(&file, "phi3"));
        let gradients = |adapter: &Adapter| {
            loss_and_gradients(&decoder, adapter, &batch, 1, graphs(1), None, None).gradients
        };
        let (parts, whole) = (gradients(&adapter), gradients(&adapter.onto_packed(&modules)));
        assert_eq!((parts.tensors.len(), whole.tensors.len()), (12, 8));
        let of = |gradients: &Gradients, name: &str| {
            [TensorKind::A, TensorKind::B]
                .map(|factor| gradients.tensors[&TensorName::new(name, factor)].clone())
        };
        for name in adapter.pairs.keys() {
            let part = modules.iter().find(|m| m.name == *name).unwrap().part_of.clone().unwrap();
            let ([own_a, own_b], [a, b]) = (of(&parts, name), of(&whole, &part.module));
            // Pairs lie in the order of their names: v_proj behind q_proj.
            let first = if name.ends_with("v_proj") { 2 } else { 0 };
            let columns = a.dims()[1];
            let a = a.slice([first..first + 2, 0..columns]);
            let b = b.slice([part.rows, first..first + 2]);
            for (ours, expected) in [(&own_a, a), (&own_b, b)] {
                let expected: Vec<f32> = expected.try_to_vec_as().unwrap();
                assert!(expected.iter().any(|x| *x != 0.0), "{name}");
                let error = relative_error(ours, &expected);
                assert!(error < 1e-4, "{device:?} {name}: {error}");
            }
        }
    }
}

/// A decoder with an adapter and what they are given, all of them goldens.
struct TinyGqa {
    device: Device,
    decoder: Decoder,
    adapter: Adapter,
    examples: Vec<TokenizedExample>,
}

/// One on every device.
fn tiny_gqa() -> impl Iterator<Item = TinyGqa> {
    let examples = examples(&numbers("lora-gradients.safetensors"), "gqa");
    devices().into_iter().map(move |device| {
        let (base, decoder) = decoder("tiny-gqa", &device);
        let modules = base.config.linear_modules();
        let adapter = Adapter::load(&golden().join("adapter-gqa"), &modules, &device).unwrap();
        TinyGqa { device, decoder, adapter, examples: examples.clone() }
    })
}

/// Fails where a gradient is further than `tolerance` of its largest number from the expected one.
fn assert_close(found: &Gradients, expected: &Gradients, tolerance: f32, what: &str) {
    for (name, gradient) in &expected.tensors {
        let reference: Vec<f32> = gradient.try_to_vec_as().unwrap();
        let error = relative_error(&found.tensors[name], &reference);
        assert!(error < tolerance, "{what} {name}: {error}");
    }
}

#[test]
fn micro_batches_add_up_to_the_whole() {
    for TinyGqa { device, decoder, adapter, examples } in tiny_gqa() {
        let whole = pack(&examples);
        let n = whole.supervised();
        let at_once = loss_and_gradients(&decoder, &adapter, &whole, n, graphs(0), None, None);
        let mut sum = Gradients::default();
        let mut losses = 0.0;
        for example in examples.chunks(1) {
            let part = loss_and_gradients(&decoder, &adapter, &pack(example), n, graphs(0), None, None);
            losses += loss(&part);
            sum.accumulate(part.gradients);
        }
        assert!((losses / loss(&at_once) - 1.0).abs() < 1e-5);
        assert_close(&sum, &at_once.gradients, 1e-4, &format!("{device:?}"));
        let plain: f32 = loss_only(&decoder, Some(&adapter), &whole).into_scalar();
        assert!((plain / loss(&at_once) - 1.0).abs() < 1e-5);
    }
}

#[test]
fn recompute_sees_the_same_dropout() {
    for TinyGqa { device, decoder, adapter, examples } in tiny_gqa() {
        let batch = pack(&examples);
        let run = |kept, step| {
            let key = DropoutKey { seed: 1, step, micro_batch: 0 };
            let dropout = Some(Dropout { p: 0.3, key });
            loss_and_gradients(&decoder, &adapter, &batch, 1, graphs(kept), dropout, None)
        };
        let (kept, again) = (run(usize::MAX, 0), run(0, 0));
        // Backends may fuse an operation where no graph is recorded: equal but for rounding.
        assert!((loss(&kept) / loss(&again) - 1.0).abs() < 1e-6);
        assert_close(&again.gradients, &kept.gradients, 1e-5, &format!("{device:?}"));
        let other = run(usize::MAX, 1);
        assert!((loss(&kept) / loss(&other) - 1.0).abs() > 1e-3, "another step has another mask");
    }
}

#[test]
fn saved_inputs_may_be_rounded_or_lie_elsewhere() {
    for TinyGqa { device, decoder, adapter, examples } in tiny_gqa() {
        let batch = pack(&examples);
        let run = |inputs| {
            let micro =
                loss_and_gradients(&decoder, &adapter, &batch, 1, Keep { graphs: 0, inputs }, None, None);
            let gradients = micro.gradients.tensors.values();
            let gradients: Vec<_> = gradients.map(|t| t.try_to_vec_as::<f32>().unwrap()).collect();
            (loss(&micro), gradients)
        };
        let exact = run(SavedInputs::F32);
        assert_eq!(run(SavedInputs::Host), exact);
        let rounded = run(SavedInputs::Bf16);
        assert_eq!(rounded.0.to_bits(), exact.0.to_bits(), "the way forward sees nothing of it");
        let mut furthest = 0.0_f32;
        for (found, expected) in rounded.1.iter().zip(&exact.1) {
            let largest = expected.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            let off = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            furthest = furthest.max(off / largest);
        }
        println!("{device:?}: inputs in bf16 move gradients by {furthest:.1e}");
        assert!(furthest > 0.0 && furthest < 2e-2, "{furthest}");
    }
}

#[test]
fn below_the_lowest_adapter_nothing_has_a_gradient() {
    for device in devices() {
        let (base, decoder) = decoder("tiny-gqa", &device);
        let target = "model.layers.1.mlp.down_proj".to_owned();
        let config = LoraConfig {
            target_modules: TargetModules::Names(vec![target.clone()]),
            ..LoraConfig::default()
        };
        let adapter = Adapter::init(&config, &base.config.linear_modules(), 0, &device).unwrap();
        let example =
            TokenizedExample { token_ids: vec![5, 6, 7, 8], loss_mask: vec![false, true, true, true] };
        for kept in [usize::MAX, 0, 1] {
            let batch = pack(std::slice::from_ref(&example));
            let micro = loss_and_gradients(&decoder, &adapter, &batch, 3, graphs(kept), None, None);
            let names = [TensorKind::A, TensorKind::B].map(|factor| TensorName::new(&target, factor));
            assert!(micro.gradients.tensors.keys().eq(&names));
            // B is zero, so A's gradient is too; B's is not.
            let b: Vec<f32> = micro.gradients.tensors[&names[1]].try_to_vec_as().unwrap();
            assert!(b.iter().any(|&x| x != 0.0));
        }
    }
}
