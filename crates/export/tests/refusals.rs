//! Merges that fail: each says why, and leaves nothing behind.
#![allow(clippy::unwrap_used)] // a test reports by panicking

mod tiny;

use std::fs;
use std::path::Path;

use burn::tensor::{Tensor, TensorData};
use pronk_export::{Dtype, ExportError, MergeOptions, merge, verify};
use pronk_lora::Adapter;
use pronk_model::Base;
use tempfile::TempDir;
use tiny::{PROMPT, base, copy, device, golden, listing, options, peft, plain, random};

const WEIGHTS: &str = "model.safetensors";

/// The message of a merge that must fail, with `finish` called on the staging directory.
fn failure(base: &Base, adapter: &Adapter, options: &MergeOptions, finish: impl Fn(&Path)) -> String {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("new/deeper/merged");
    let mut finish = |staging: &Path| {
        finish(staging);
        Ok(())
    };
    let result = merge(base, adapter, &out, options, &device(), &mut |_, _| {}, &mut finish);
    assert_eq!(listing(dir.path()), Vec::<String>::new(), "something is left behind");
    result.map(|_| ()).unwrap_err().to_string()
}

#[test]
fn a_destination_must_be_new_or_empty() {
    let (dir, base) = (TempDir::new().unwrap(), base("gqa"));
    let adapter = peft("gqa", &base);
    let refusal = |out: &Path| plain(&base, &adapter, out, &options()).unwrap_err().to_string();
    let (full, file, empty) = (dir.path().join("full"), dir.path().join("file"), dir.path().join("empty"));
    fs::create_dir(&full).unwrap();
    fs::write(full.join("notes.txt"), "mine").unwrap();
    fs::write(&file, "mine").unwrap();
    assert!(refusal(&full).contains("found a directory with something in it"), "{}", refusal(&full));
    assert!(refusal(&file).contains("found a file"), "{}", refusal(&file));
    assert!(refusal(&dir.path().join("none/../up")).contains("'..'"));
    assert_eq!(listing(dir.path()), ["file", "full"]);
    assert_eq!(listing(&full), ["notes.txt"]);
    fs::create_dir(&empty).unwrap();
    plain(&base, &adapter, &empty, &options()).unwrap();
    assert!(empty.join(WEIGHTS).exists());
    // The whole way to a new directory is made.
    let deep = dir.path().join("a/b/c");
    plain(&base, &adapter, &deep, &options()).unwrap();
    assert_eq!(listing(&dir.path().join("a/b")), ["c"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_mount_point_is_refused_before_the_work() {
    let base = base("gqa");
    let empty = |path: &&Path| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
    // Which of them is there and empty depends on the machine.
    let mounts = ["/dev/mqueue", "/dev/shm", "/run/lock"].map(Path::new);
    let own_device = |path: &&Path| {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(path).unwrap().dev() != fs::metadata(path.parent().unwrap()).unwrap().dev()
    };
    if let Some(mount) = mounts.iter().copied().filter(empty).find(own_device) {
        let refusal = plain(&base, &peft("gqa", &base), mount, &options()).unwrap_err().to_string();
        assert!(refusal.contains("mount point"), "{refusal}");
    }
}

#[test]
fn a_base_is_never_written_into() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("base");
    copy("gqa", &path);
    let before = listing(&path);
    let base = Base::open(&path).unwrap();
    for out in [path.clone(), path.join("merged"), path.join("a/b"), path.join("../base/merged")] {
        let refusal = plain(&base, &peft("gqa", &base), &out, &options()).unwrap_err().to_string();
        assert!(refusal.contains("it lies in the base"), "{refusal}");
    }
    assert_eq!(listing(&path), before);
    assert_eq!(listing(dir.path()), ["base"]);
}

#[cfg(unix)]
#[test]
fn a_merged_model_is_as_readable_as_other_files() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, base) = (TempDir::new().unwrap(), base("gqa"));
    let (plain_dir, plain_file) = (dir.path().join("d"), dir.path().join("f"));
    fs::create_dir(&plain_dir).unwrap();
    fs::write(&plain_file, "").unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    let out = dir.path().join("merged");
    plain(&base, &peft("gqa", &base), &out, &options()).unwrap();
    assert_eq!(mode(&out), mode(&plain_dir));
    for file in listing(&out) {
        assert_eq!(mode(&out.join(&file)), mode(&plain_file), "{file}");
    }
}

#[test]
fn an_adapter_of_another_base_is_refused_module_by_module() {
    let base = base("head-dim");
    let mut adapter = peft("gqa", &tiny::base("gqa"));
    let stray = adapter.pairs.values().next().unwrap().clone();
    adapter.pairs.insert("model.layers.9.self_attn.q_proj".into(), stray.clone());
    adapter.pairs.insert("lm_head".into(), stray);
    let refusal = failure(&base, &adapter, &options(), |_| {});
    for part in [
        "model.layers.0.self_attn.q_proj: expected A and B of shapes ([4, 32], [64, 4]), found ([4, 32], [32, 4])",
        "model.layers.9.self_attn.q_proj: the base's blocks have no such linear layer",
        "lm_head: the base's blocks have no such linear layer",
    ] {
        assert!(refusal.contains(part), "{refusal}");
    }
    adapter.pairs.clear();
    assert!(failure(&base, &adapter, &options(), |_| {}).contains("no module at all"));
}

#[test]
fn numbers_that_a_format_cannot_hold_are_refused() {
    let base = base("bias");
    let mut adapter = random(&base, &["v_proj"], 1e6);
    let refusal = failure(&base, &adapter, &options(), |_| {});
    assert!(refusal.contains("v_proj.weight: expected finite float16 numbers"), "{refusal}");
    assert!(refusal.contains("--dtype bf16"), "{refusal}");
    let pair = adapter.pairs.values_mut().next().unwrap();
    let [rows, rank] = pair.b.dims();
    pair.b = Tensor::from_data(TensorData::new(vec![f32::NAN; rows * rank], [rows, rank]), &device());
    let wider = MergeOptions { dtype: Some(Dtype::F32), ..options() };
    let refusal = failure(&base, &adapter, &wider, |_| {});
    assert!(refusal.contains("found NaN; the base or the adapter is damaged"), "{refusal}");
}

#[test]
fn a_caller_that_fails_leaves_nothing_behind() {
    let (dir, base) = (TempDir::new().unwrap(), base("gqa"));
    let out = dir.path().join("merged");
    let mut finish = |staging: &Path| {
        assert!(staging.join(WEIGHTS).exists());
        fs::write(staging.join("half"), "written")?;
        Err("No space left on device".into())
    };
    let result = merge(&base, &peft("gqa", &base), &out, &options(), &device(), &mut |_, _| {}, &mut finish);
    assert!(matches!(result, Err(ExportError::Finish(e)) if e.to_string().contains("No space left")));
    assert_eq!(listing(dir.path()), Vec::<String>::new());
    let mut finish = |staging: &Path| Ok(fs::write(staging.join("extra.txt"), "whole")?);
    merge(&base, &peft("gqa", &base), &out, &options(), &device(), &mut |_, _| {}, &mut finish).unwrap();
    assert_eq!(fs::read_to_string(out.join("extra.txt")).unwrap(), "whole");
}

#[test]
fn a_model_that_was_not_merged_is_found_out() {
    let base = base("gqa");
    let adapter = peft("gqa", &base);
    let put = |from: &'static str| {
        move |staging: &Path| {
            fs::copy(golden(from), staging.join(WEIGHTS)).unwrap();
        }
    };
    let refusal = failure(&base, &adapter, &options(), put("tiny-gqa/model.safetensors"));
    assert!(refusal.contains("expected a KL divergence of at most 1e-6 nats (float32)"), "{refusal}");
    let cut = failure(&base, &adapter, &options(), |staging| {
        let bytes = fs::read(staging.join(WEIGHTS)).unwrap();
        fs::write(staging.join(WEIGHTS), &bytes[..bytes.len() - 9]).unwrap();
    });
    assert!(cut.contains("not a whole safetensors file"), "{cut}");
    let other = failure(&base, &adapter, &options(), |staging| {
        fs::copy(golden("tiny-rope-linear/config.json"), staging.join("config.json")).unwrap();
        put("tiny-rope-linear/model.safetensors")(staging);
    });
    assert!(other.contains("expected the configuration"), "{other}");
}

#[test]
fn logits_that_are_no_numbers_are_found_out() {
    let base = base("gqa");
    let mut bytes = fs::read(golden("tiny-gqa/model.safetensors")).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes()); // in a norm or a projection
    let refusal = failure(&base, &peft("gqa", &base), &options(), |staging| {
        fs::write(staging.join(WEIGHTS), &bytes).unwrap();
    });
    assert!(refusal.contains("found NaN among those of the merged model"), "{refusal}");
}

#[test]
fn tokens_to_verify_with_must_be_the_models() {
    let base = base("gqa");
    let adapter = peft("gqa", &base);
    let with = |prompt: &[u32]| {
        failure(&base, &adapter, &MergeOptions { prompt: prompt.to_vec(), ..options() }, |_| {})
    };
    assert!(with(&[]).contains("expected at least one token"));
    assert!(with(&[1, 264]).contains("expected ids below the vocabulary's size, 264, found 264"));
    assert!(verify(&base, &adapter, &base.config, &base.path, &PROMPT, &device()).is_err());
}

#[test]
fn formats_have_names() {
    for dtype in Dtype::ALL {
        assert_eq!(dtype.to_string().parse::<Dtype>().unwrap(), dtype);
    }
    assert!("fp16".parse::<Dtype>().unwrap_err().to_string().contains("f32, f16 or bf16, found 'fp16'"));
}
