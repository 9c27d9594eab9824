//! temporary
use pronk_data::*;
use serde_json::Value;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let tok = if a[1].ends_with(".json") {
        let v: Value = serde_json::from_slice(&std::fs::read(&a[1]).unwrap()).unwrap();
        let strs = |k: &str| {
            v[k].as_array()
                .map(|x| x.iter().map(|s| s.as_str().unwrap().to_owned()).collect())
                .unwrap_or_default()
        };
        let g = GgufVocabulary {
            model: v["model"].as_str().unwrap().into(),
            pre: v["pre"].as_str().map(Into::into),
            tokens: strs("tokens"),
            token_types: v["token_types"]
                .as_array()
                .unwrap()
                .iter()
                .map(|x| x.as_i64().unwrap() as i32)
                .collect(),
            merges: strs("merges"),
            scores: v["scores"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect(),
            bos: v["bos"].as_u64().map(|x| x as u32),
            eos: v["eos"].as_u64().map(|x| x as u32),
            add_bos: v["add_bos"].as_bool(),
            add_space_prefix: v["add_space_prefix"].as_bool(),
            chat_template: v["chat_template"].as_str().map(Into::into),
        };
        let t0 = std::time::Instant::now();
        let t = TextTokenizer::from_gguf(&g).unwrap();
        eprintln!("from_gguf {:?}", t0.elapsed());
        t
    } else {
        TextTokenizer::from_dir(a[1].as_ref()).unwrap()
    };
    eprintln!("{tok:?} eos {:?}", tok.eos_ids());
    match a[2].as_str() {
        "golden" => {
            let g: Value = serde_json::from_slice(&std::fs::read(&a[3]).unwrap()).unwrap();
            let (mut ok, mut n) = (0, 0);
            for case in g.as_array().unwrap() {
                let text = case["text"].as_str().unwrap();
                let ids: Vec<u32> =
                    case["ids"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect();
                let got = tok.encode(text).unwrap();
                n += 1;
                if got == ids {
                    ok += 1
                } else {
                    println!("DIFF {text:?}\n  want {ids:?}\n  got  {got:?}")
                }
                let mut s = tok.decode_stream();
                let mut out = String::new();
                for id in &got {
                    out += &s.step(*id).unwrap();
                }
                out += &s.finish().unwrap();
                if out != tok.decode(&got).unwrap() {
                    println!("STREAM {out:?} vs {:?}", tok.decode(&got))
                }
            }
            println!("{ok} of {n}");
        }
        "save" => {
            std::fs::create_dir_all(&a[3]).unwrap();
            tok.save(a[3].as_ref()).unwrap()
        }
        "prep" => {
            let config = PrepareConfig {
                files: a[4..].iter().map(Into::into).collect(),
                template: "alpaca".into(),
                max_seq_len: 512,
                train_on_inputs: false,
                val_size: 100,
                skip_bad: false,
            };
            let t0 = std::time::Instant::now();
            let _ = key(&config, &PromptTemplate::load("alpaca").unwrap(), &tok).unwrap();
            eprintln!("key {:?}", t0.elapsed());
            let t0 = std::time::Instant::now();
            let r = read_records(&config.files).unwrap();
            eprintln!("read {} in {:?}", r.records.len(), t0.elapsed());
            let t0 = std::time::Instant::now();
            let d = prepare(&config, &tok, &mut |_, _| ()).unwrap();
            eprintln!("prepare {:?}", t0.elapsed());
            let t0 = std::time::Instant::now();
            d.write(a[3].as_ref()).unwrap();
            eprintln!("write {:?}", t0.elapsed());
            let t0 = std::time::Instant::now();
            assert!(PreparedDataset::read(a[3].as_ref()).unwrap() == d);
            eprintln!("read {:?}", t0.elapsed());
            println!("{:#?}", d.report);
        }
        _ => panic!(),
    }
}
