//! A real GGUF base merged: SmolLM2-135M-Instruct.
#![allow(clippy::unwrap_used)] // a test reports by panicking

mod tiny;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pronk_export::{Dtype, MergeOptions};
use pronk_model::Base;
use tempfile::TempDir;
use tiny::{json, plain, random};

/// The file that `SMOLLM2_GGUF` names, or the one that `scripts/smollm2` leaves in `target`.
fn gguf() -> PathBuf {
    if let Some(path) = std::env::var_os("SMOLLM2_GGUF") {
        return path.into();
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/smollm2");
    let output = Command::new(&script).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "scripts/smollm2 failed, and SMOLLM2_GGUF is not set: {told}");
    String::from_utf8(output.stdout).unwrap().trim().into()
}

#[test]
fn a_gguf_base_becomes_a_directory() {
    let base = Base::open(&gguf()).unwrap();
    let adapter =
        random(&base, &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 0.02);
    let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let prompt = "0 504 4521 28 216 34 1761 1743 314 260 1379 282".split(' ').map(|id| id.parse().unwrap());
    let options = MergeOptions { shard_bytes: 200 << 20, prompt: prompt.collect(), dtype: None };
    for (dtype, shards) in [(None, 3), (Some(Dtype::F16), 2), (Some(Dtype::Bf16), 2)] {
        let out = dir.path().join("merged");
        let report = plain(&base, &adapter, &out, &MergeOptions { dtype, ..options.clone() }).unwrap();
        println!("{dtype:?}: {:?}", report.verification);
        assert_eq!((report.tensors, report.adapted), (272, 210));
        assert_eq!(report.files.len(), shards);
        let config = json(&out.join("config.json"));
        assert_eq!(config["dtype"], dtype.unwrap_or(Dtype::F32).torch_name());
        assert_eq!((&config["bos_token_id"], &config["eos_token_id"]), (&1.into(), &2.into()));
        assert_eq!(Base::open(&out).unwrap().config, base.config);
        fs::remove_dir_all(&out).unwrap();
    }
}
