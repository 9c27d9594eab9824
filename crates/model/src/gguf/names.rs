//! Tensor names: llama.cpp's and Hugging Face's.

use crate::family::Traits;

/// Hugging Face's name of llama.cpp's tensor `gguf`; its own where there is no other.
pub fn hugging_face_name(gguf: &str, traits: &Traits) -> String {
    let whole = |name: &str| match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    let in_block = |name: &str| {
        let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let (module, suffix) = rest.rsplit_once('.')?;
        let own = traits.gguf_names.iter().find(|(name, _)| *name == module);
        let module = match module {
            _ if own.is_some() => own.map(|(_, name)| *name)?,
            "attn_q" => "self_attn.q_proj",
            "attn_k" => "self_attn.k_proj",
            "attn_v" => "self_attn.v_proj",
            "attn_output" => "self_attn.o_proj",
            "ffn_gate" => "mlp.gate_proj",
            "ffn_up" => "mlp.up_proj",
            "ffn_down" => "mlp.down_proj",
            "attn_q_norm" => "self_attn.q_norm",
            "attn_k_norm" => "self_attn.k_norm",
            "attn_norm" => "input_layernorm",
            "ffn_norm" => "post_attention_layernorm",
            _ => return None,
        };
        Some(format!("model.layers.{layer}.{module}.{suffix}"))
    };
    whole(gguf).map(str::to_owned).or_else(|| in_block(gguf)).unwrap_or_else(|| gguf.to_owned())
}

#[cfg(test)]
mod tests {
    use crate::Family;

    #[test]
    fn names_are_hugging_faces() {
        let hugging_face_name = |name| super::hugging_face_name(name, Family::Llama.traits());
        assert_eq!(hugging_face_name("blk.12.attn_output.weight"), "model.layers.12.self_attn.o_proj.weight");
        assert_eq!(
            hugging_face_name("blk.0.ffn_norm.weight"),
            "model.layers.0.post_attention_layernorm.weight"
        );
        assert_eq!(hugging_face_name("output.weight"), "lm_head.weight");
        assert_eq!(hugging_face_name("blk.0.strange.weight"), "blk.0.strange.weight");
    }

    #[test]
    fn families_have_names_of_their_own() {
        let gemma = |name| super::hugging_face_name(name, Family::Gemma2.traits());
        assert_eq!(gemma("blk.0.ffn_norm.weight"), "model.layers.0.pre_feedforward_layernorm.weight");
        assert_eq!(
            gemma("blk.0.post_attention_norm.weight"),
            "model.layers.0.post_attention_layernorm.weight"
        );
        let phi = |name| super::hugging_face_name(name, Family::Phi3.traits());
        assert_eq!(phi("blk.3.ffn_up.weight"), "model.layers.3.mlp.gate_up_proj.weight");
        assert_eq!(phi("blk.3.ffn_down.weight"), "model.layers.3.mlp.down_proj.weight");
    }
}
