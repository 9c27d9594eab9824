//! What a run tells of a failure that cannot be had from outside.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use pronk_data::{Columns, Learn, PrepareConfig, PromptTemplate, RecordFormat, RowConfig, prepare};
use pronk_lora::{LoraConfig, LoraError};
use pronk_model::{Base, LoadConfig, Memory, StartWeights};

use super::*;

struct Silent;

impl Observer for Silent {
    fn step(&mut self, _: &StepRecord, _: u64) {}
    fn note(&mut self, _: &str) {}
    fn warn(&mut self, _: &str) {}
}

/// A run of three steps in `dir`.
fn with_trainer(dir: &Path, test: impl FnOnce(Trainer<'_>)) {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny-gqa");
    let (base, tokenizer) = (Base::open(&base).unwrap(), TextTokenizer::from_dir(&base).unwrap());
    let (_, device) = pronk_kernels::open_devices().into_iter().next().unwrap();
    let decoder = Decoder::load(&base, &device, LoadConfig::default(), |_, _| ()).unwrap();
    let records = r#"[{"instruction": "Colour of coal?", "output": "Black."}, {"instruction": "Of snow?", "output": "White."}]"#;
    std::fs::write(dir.join("data.json"), records).unwrap();
    let config = PrepareConfig {
        files: vec![dir.join("data.json").into()],
        format: RecordFormat::Auto,
        columns: Columns::default(),
        template: "alpaca-short".to_owned(),
        row: RowConfig { max_seq_len: 128, train_on_inputs: false, learn: Learn::All },
        val_size: 0,
        skip_bad: false,
    };
    let data = prepare(&config, &tokenizer, dir, &mut |_, _| ()).unwrap().load().unwrap();
    let template = PromptTemplate::load(&config.template, &tokenizer).unwrap();
    let weights = StartWeights { base: &base, original: None, records: &[] };
    let lora = LoraConfig { rank: 2, ..LoraConfig::default() };
    let adapter = decoder.started_adapter(&lora, weights, 1, |_, _| ()).unwrap();
    let card = ModelCard {
        base: "tiny-gqa".to_owned(),
        opening: String::new(),
        data: Vec::new(),
        template: &template,
        data_key: data.key.clone(),
        recipe: String::new(),
    };
    test(
        Trainer::new(
            &decoder,
            WeightBytes::of(&base, LoadConfig::default(), None, Memory::of(&device)).unwrap(),
            &tokenizer,
            &data,
            Order::default(),
            MicroBatches::Grouped { rows: 2 },
            TrainConfig { max_steps: Some(3), batch_size: 2, save_steps: 1, ..TrainConfig::default() },
            adapter,
            RunFolder::create(&dir.join("run")).unwrap(),
            card,
            Samples::new(Vec::new(), 0),
        )
        .unwrap(),
    );
}

/// An adapter whose bytes were written well, and are not those of the adapter that was trained.
#[test]
fn an_adapter_that_is_not_what_was_trained_is_not_called_saved() {
    let dir = tempfile::tempdir().unwrap();
    with_trainer(dir.path(), |mut run| {
        run.run(&mut Silent, &AtomicBool::new(false)).unwrap();
        run.read_back().unwrap();
        let config = dir.path().join("run/adapter/adapter_config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        let alpha = text.lines().find(|line| line.contains("lora_alpha")).unwrap();
        std::fs::write(&config, text.replace(alpha, "\"lora_alpha\": 4000.0,")).unwrap();
        let told = run.read_back().unwrap_err().to_string();
        for words in ["run/adapter", "gives a loss of", "do not use it", "step-000003"] {
            assert!(told.contains(words), "{words}: {told}");
        }
    });
}

#[test]
fn a_device_that_fails_is_told_with_what_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    with_trainer(dir.path(), |mut run| {
        run.before_the_first_step(&mut Silent, &AtomicBool::new(false)).unwrap();
        let told = run.ended_by(TrainError::Device("it has fallen off the bus".to_owned())).to_string();
        for words in [
            "step 1: the device failed: it has fallen off the bus",
            "The last good state is",
            "step-000000",
            "not_finite.json",
            "pronk train --resume",
            "train.memory_budget",
        ] {
            assert!(told.contains(words), "{words}: {told}");
        }
        let batch = std::fs::read_to_string(dir.path().join("run/not_finite.json")).unwrap();
        assert!(batch.contains("fallen off the bus") && batch.contains("Colour of coal?"), "{batch}");

        // Behind the last step there is none to come.
        run.run(&mut Silent, &AtomicBool::new(false)).unwrap();
        let told = run.ended_by(TrainError::Device("gone".to_owned())).to_string();
        assert!(told.contains("step 3: ") && told.contains("step-000003"), "{told}");
        // What is wrong with the adapter itself is of the step before, and other errors are what they were.
        let bad = || TrainError::Lora(LoraError::NotFinite { path: "adapter".into() });
        assert!(run.ended_by(bad()).to_string().contains("step 3: the adapter is NaN"));
        let other = run.ended_by(TrainError::NoRows).to_string();
        assert_eq!(other, TrainError::NoRows.to_string());
    });
}
