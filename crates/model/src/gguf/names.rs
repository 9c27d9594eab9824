//! Tensor names: llama.cpp's and Hugging Face's.

use crate::family::Traits;

/// llama.cpp's names of tensors that stand for themselves, and Hugging Face's.
const WHOLE: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// The same for modules within a block.
const IN_BLOCK: [(&str, &str); 11] = [
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
];

/// Hugging Face's name of llama.cpp's tensor `gguf`; its own where there is no other.
pub fn hugging_face_name(gguf: &str, traits: &Traits) -> String {
    let whole = WHOLE.iter().find(|(name, _)| *name == gguf).map(|(_, hf)| (*hf).to_owned());
    let in_block = || {
        let (layer, rest) = gguf.strip_prefix("blk.")?.split_once('.')?;
        let (module, suffix) = rest.rsplit_once('.')?;
        let (_, module) = modules(traits).find(|(name, _)| *name == module)?;
        Some(format!("model.layers.{layer}.{module}.{suffix}"))
    };
    whole.or_else(in_block).unwrap_or_else(|| gguf.to_owned())
}

/// llama.cpp's name of Hugging Face's tensor `name`; `None` where it knows no such tensor.
pub fn gguf_name(name: &str, traits: &Traits) -> Option<String> {
    if let Some((gguf, _)) = WHOLE.iter().find(|(_, hf)| *hf == name) {
        return Some((*gguf).to_owned());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, suffix) = rest.rsplit_once('.')?;
    let (gguf, _) = modules(traits).find(|(_, hf)| *hf == module)?;
    Some(format!("blk.{layer}.{gguf}.{suffix}"))
}

/// A family's own names go before those of Llama.
fn modules(traits: &Traits) -> impl Iterator<Item = &(&'static str, &'static str)> {
    traits.gguf_names.iter().chain(&IN_BLOCK)
}

#[cfg(test)]
mod tests {
    use crate::Family;
    use crate::family::Traits;

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

    #[test]
    fn every_tensor_of_a_family_has_a_name_and_gets_its_own_back() {
        for family in Family::ALL {
            let traits: &Traits = family.traits();
            let norms = traits.norms.iter().flat_map(|norms| [Some(norms.before), norms.after]).flatten();
            let linears: &[&str] = if traits.packed {
                &["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
            } else {
                &["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"]
            };
            let in_blocks =
                norms.chain(linears.iter().copied()).map(|m| format!("model.layers.7.{m}.weight"));
            for name in in_blocks.chain(["lm_head.weight".to_owned(), "model.embed_tokens.weight".to_owned()])
            {
                let gguf = super::gguf_name(&name, traits).unwrap();
                assert_eq!(super::hugging_face_name(&gguf, traits), name, "{family:?} {gguf}");
            }
        }
        assert_eq!(super::gguf_name("model.layers.0.strange.weight", Family::Llama.traits()), None);
    }
}
