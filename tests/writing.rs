//! Where nothing can be written, or not all of it: folders that are closed, files that cannot grow, disks that are full. What a
//! command writes is whole afterwards, or not there.
#![allow(clippy::unwrap_used, clippy::expect_used)] // in a test, a panic is the report
#![cfg(unix)]

mod support;

use std::fs;
use std::process::Command;

use support::{Run, Workshop, golden, merge_args, prep_args, sandboxed, train_args, works};

/// A workshop with a merged model in it, to take an adapter out of.
fn with_tuned() -> Workshop {
    let shop = Workshop::new();
    let base = golden("tiny-gqa");
    shop.pronk(merge_args(&base, &golden("adapter-gqa"), "tuned")).succeeds();
    shop
}

/// What trains into `folder`; nobody makes room here.
fn trainer(folder: &str) -> Vec<String> {
    train_args(&format!("{folder}/run"), "cpu", &["train.save_patience=0"])
}

/// The other commands that write into `folder`: each a file, or a folder, that is whole or not there.
fn writers(folder: &str) -> Vec<Vec<String>> {
    let (base, adapter) = (golden("tiny-gqa"), golden("adapter-gqa"));
    let owned = |args: &[&str]| args.iter().map(|&arg| arg.to_owned()).collect::<Vec<String>>();
    let out = format!("{folder}/out");
    let merge = merge_args(&base, &adapter, &out);
    let gguf = [&merge[..], &owned(&["--format", "gguf"])].concat();
    let both = ["adapter", "combine", "--adapter", &adapter, "--weight", "1", "--adapter", &adapter];
    let tuned = ["adapter", "extract", "--base", &base, "--tuned", "tuned", "--rank", "2"];
    let logits = ["inspect", "logits", "--base", &base, "--text", "It is green."];
    let mut writers = vec![prep_args("data.json", &base, &out), merge, gguf];
    for runtime in ["peft", "gguf", "mlx"] {
        writers.push(owned(&[
            "export",
            "--base",
            &base,
            "--adapter",
            &adapter,
            "--to",
            runtime,
            "--out",
            &out,
        ]));
    }
    writers.push([owned(&both), owned(&["--weight", "1", "--out", &out])].concat());
    for other in [&tuned[..], &logits[..]] {
        writers.push([owned(other), owned(&["--out", &out])].concat());
    }
    writers
}

#[test]
fn a_read_only_output_folder() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    let shop = with_tuned();
    let folder = shop.path("locked");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o555)).unwrap();
    // Root may write anywhere, unless it gives that right up.
    let humble = ["--bounding-set=-dac_override", "--inh-caps=-dac_override"];
    let is_root = fs::metadata(&folder).unwrap().uid() == 0;
    if is_root && !works("setpriv", &[&humble[..], &["true"]].concat()) {
        eprintln!("not tested: run by root, without setpriv");
        return;
    }
    let before = shop.snapshot();
    for args in writers("locked").into_iter().chain([trainer("locked")]) {
        let program = env!("CARGO_BIN_EXE_pronk");
        let mut command = Command::new(if is_root { "setpriv" } else { program });
        if is_root {
            command.args(humble).arg(program);
        }
        let run: Run = sandboxed(command, shop.root()).args(&args).output().unwrap().into();
        run.fails(&["locked", "Permission denied"]);
        assert_eq!(shop.snapshot(), before, "{args:?}");
    }
}

/// No file may grow beyond 512 bytes, or 1 KiB: what the system says then differs from a full disk's words, and
/// nothing else does. Works for everybody.
#[test]
fn files_that_cannot_grow() {
    let shop = with_tuned();
    fs::create_dir(shop.path("small")).unwrap();
    let before = shop.snapshot();
    for args in writers("small").into_iter().chain([trainer("small")]) {
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' XFSZ; ulimit -f 1; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_pronk")]);
        let run: Run = sandboxed(command, shop.root()).args(&args).output().unwrap().into();
        run.fails(&["small", "File too large"]);
        assert_eq!(shop.snapshot(), before, "{args:?}");
    }
}

/// A disk of the size given, on which `args` must fail; returns the names on it afterwards, with sizes.
#[cfg(target_os = "linux")]
fn on_a_small_disk(shop: &Workshop, size: &str, args: &[String]) -> Option<(Run, Vec<String>)> {
    let mount = "mount -t tmpfs -o size=$SIZE pronk disk";
    fs::create_dir_all(shop.path("disk")).unwrap();
    // Root's own mount namespace, or a user's own root's: gone with the process, and seen by nobody else.
    let namespaces = ["-m", "-rm"].into_iter().find(|flag| {
        let probe = Command::new("unshare")
            .args([flag, "sh", "-c", mount])
            .env("SIZE", size)
            .current_dir(shop.root())
            .output();
        probe.is_ok_and(|output| output.status.success())
    })?;
    let script = format!(
        "{mount} || exit 9; \"$@\"; code=$?; cd disk; find . -type f | while read f; do \
         echo \"FILE $f\"; done; tail -qc 1 $(find . -name metrics.jsonl) /dev/null | od -An -c; exit $code"
    );
    let mut command = Command::new("unshare");
    command.args([namespaces, "sh", "-c", &script, "sh", env!("CARGO_BIN_EXE_pronk")]).env("SIZE", size);
    let run: Run = sandboxed(command, shop.root()).args(args).output().unwrap().into();
    let mut files: Vec<String> =
        run.out.lines().filter_map(|line| line.strip_prefix("FILE ./")).map(str::to_owned).collect();
    files.sort();
    Some((run, files))
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk() {
    let shop = with_tuned();
    for args in writers("disk") {
        // From one that holds nothing to one that holds it all, the first ones a page more at a time.
        let mut refused = 0;
        for pages in std::iter::successors(Some(1), |pages| Some(pages + 1 + pages / 8)) {
            let Some((run, files)) = on_a_small_disk(&shop, &format!("{}k", 4 * pages), &args) else {
                eprintln!("not tested: no file system may be mounted here; see files_that_cannot_grow");
                return;
            };
            if run.code == Some(0) {
                break;
            }
            refused += 1;
            run.fails(&["No space left on device"]);
            assert!(files.is_empty(), "{args:?}: {files:?}");
        }
        assert!(refused > 0, "{args:?}");
    }
    let train = trainer("disk");
    // Wherever the disk is full, what a run leaves is whole: a checkpoint has all its files or is not there.
    for size in [
        "4k", "12k", "16k", "20k", "24k", "32k", "40k", "48k", "56k", "64k", "72k", "80k", "96k", "112k",
        "144k", "192k",
    ] {
        let (run, files) = on_a_small_disk(&shop, size, &train).unwrap();
        if run.code == Some(0) {
            assert!(size != "4k" && size != "48k", "{size} should not do");
            break;
        }
        let run = run.fails(&["disk/run", "No space left on device"]);
        let has = |name: &str| files.iter().any(|file| file == name);
        // The lock is a file without a byte, and stays where a run has begun.
        for file in files.iter().filter(|file| *file != "run/.lock") {
            assert!(
                !file.contains("/.") && !file.contains("partial") && !file.contains("tmp"),
                "{size}: {file}"
            );
            if let Some((folder, _)) = file.rsplit_once('/').filter(|(folder, _)| folder.contains("step-")) {
                for part in ["adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json"] {
                    assert!(has(&format!("{folder}/{part}")), "{size}: {files:?}");
                }
            }
        }
        assert_eq!(
            has("run/adapter/adapter_config.json"),
            has("run/adapter/adapter_model.safetensors"),
            "{size}"
        );
        if has("run/metrics.jsonl") {
            assert!(run.out.trim_end().ends_with("\\n"), "{size}: a whole last line: {}", run.out);
        } else {
            assert!(files.is_empty(), "{size}: before the first step there is nothing to keep: {files:?}");
        }
    }
}
