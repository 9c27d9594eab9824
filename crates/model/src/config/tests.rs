use serde_json::json;

use super::*;

fn llama() -> Value {
    json!({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
           "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "rms_norm_eps": 1e-5})
}

fn problems(change: impl Fn(&mut Value)) -> String {
    let mut value = llama();
    change(&mut value);
    DecoderConfig::from_json(value.to_string().as_bytes()).unwrap_err().join("\n")
}

#[test]
fn defaults_and_a_round_trip() {
    let mut config = DecoderConfig::from_json(llama().to_string().as_bytes()).unwrap();
    assert_eq!((config.head_dim, config.rope_theta, config.tie_word_embeddings), (8, 10_000.0, false));
    config.rope_scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192.0,
    };
    let again = DecoderConfig::from_json(config.to_json("float32").to_string().as_bytes()).unwrap();
    assert_eq!(again, config);
}

#[test]
fn what_would_change_the_result_is_refused_by_name() {
    assert!(problems(|c| c["model_type"] = "mamba".into()).contains("model_type"));
    assert!(problems(|c| c["hidden_act"] = "gelu".into()).contains("hidden_act"));
    assert!(problems(|c| c["sliding_window"] = 4096.into()).contains("sliding_window: 4096"));
    let yarn = |c: &mut Value| c["rope_scaling"] = json!({"rope_type": "yarn", "factor": 2});
    assert!(problems(yarn).contains("'yarn'"));
    assert!(problems(|c| c["rope_scaling"] = json!({"type": "linear"})).contains("factor: missing"));
}

#[test]
fn all_problems_are_told_at_once() {
    let told = problems(|c| {
        c["hidden_size"] = "32".into();
        c["num_key_value_heads"] = 3.into();
        c.as_object_mut().unwrap().remove("vocab_size");
    });
    for key in ["hidden_size", "num_key_value_heads 3", "vocab_size: missing"] {
        assert!(told.contains(key), "{told}");
    }
}

#[test]
fn families_round_trip_with_their_own_keys_and_defaults() {
    for family in Family::ALL {
        let mut value = llama();
        value["model_type"] = family.traits().model_type.into();
        let config = DecoderConfig::from_json(value.to_string().as_bytes()).unwrap();
        assert_eq!(config.family, family);
        let again = DecoderConfig::from_json(config.to_json("float32").to_string().as_bytes()).unwrap();
        assert_eq!(again, config);
    }
}

fn of(change: impl Fn(&mut Value)) -> DecoderConfig {
    let mut value = llama();
    change(&mut value);
    DecoderConfig::from_json(value.to_string().as_bytes()).unwrap()
}

#[test]
fn gemma_leaves_out_what_is_usual_for_it() {
    let gemma = of(|c| c["model_type"] = "gemma2".into());
    assert_eq!((gemma.head_dim, gemma.tie_word_embeddings), (256, true));
    assert_eq!((gemma.attn_logit_softcapping, gemma.final_logit_softcapping), (Some(50.0), Some(30.0)));
    assert_eq!((gemma.window(0), gemma.window(1)), (Some(4096), None));
    let json = gemma.to_json("float32");
    assert!(json["query_pre_attn_scalar"].is_u64() && json["final_logit_softcapping"].is_f64(), "{json}");
    let uncapped = of(|c| {
        c["model_type"] = "gemma2".into();
        c["attn_logit_softcapping"] = Value::Null;
    });
    assert_eq!(uncapped.attn_logit_softcapping, None);
    let gemma = of(|c| {
        c["model_type"] = "gemma3_text".into();
        c["num_hidden_layers"] = 12.into();
        c["rope_scaling"] = json!({"rope_type": "linear", "factor": 8.0});
    });
    assert_eq!((gemma.rope_theta, gemma.rope_local_base_freq), (1e6, Some(1e4)));
    assert_eq!(gemma.rope_scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!((gemma.window(4), gemma.window(5), gemma.window(11)), (Some(4096), None, None));
}

#[test]
fn qwen_has_a_window_only_where_it_is_switched_on() {
    let qwen = |used: bool| {
        of(|c| {
            c["model_type"] = "qwen2".into();
            c["sliding_window"] = 7.into();
            c["max_window_layers"] = 1.into();
            c["use_sliding_window"] = used.into();
        })
    };
    assert_eq!(qwen(false).sliding_window, None);
    assert_eq!((qwen(true).window(0), qwen(true).window(1)), (None, Some(7)));
    assert!(qwen(false).has_bias("model.layers.0.self_attn.q_proj"));
    assert!(!qwen(false).has_bias("model.layers.0.self_attn.o_proj"));
}
