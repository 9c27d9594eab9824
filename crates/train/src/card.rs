use pronk_data::PromptTemplate;
use pronk_lora::{InitLoraWeights, LoraConfig};

use crate::TrainConfig;

/// What the adapter's `README.md` says of it, and the template that is stored beside.
#[derive(Debug, Clone)]
pub struct ModelCard<'a> {
    /// Name or path of the base.
    pub base: String,
    /// The data files.
    pub data: Vec<String>,
    /// The template that the rows were made with.
    pub template: &'a PromptTemplate,
    /// Hash of the prepared rows.
    pub data_key: String,
}

impl ModelCard<'_> {
    /// The card as Markdown, with the front matter that a model hub reads.
    pub(crate) fn to_markdown(
        &self,
        lora: &LoraConfig,
        train: &TrainConfig,
        step: u64,
        eval: Option<(f64, f64)>,
    ) -> String {
        let Self { base, data, template, data_key } = self;
        let eval = eval.map_or(String::new(), |(before, after)| {
            format!("| eval loss, base alone | {before:.4} |\n| eval loss, this adapter | {after:.4} |\n")
        });
        let data = data.join(", ");
        let (template, file) = (template.name(), template.file_name());
        let (rank, alpha, targets) = (lora.rank, lora.alpha, &lora.target_modules);
        let targets = serde_json::to_string(targets).unwrap_or_default();
        let (batch, rate, seed) = (train.batch_size, train.learning_rate, train.seed);
        let start = match lora.init_lora_weights {
            InitLoraWeights::Default => String::new(),
            init => format!("| init_lora_weights | {init} |\n"),
        };
        // Over the base as it was, it would bring back what that never lost.
        let (quantized, import, load) = match lora.loftq_config {
            None => (String::new(), "", String::new()),
            Some(loftq) => quantized_base(base, loftq.loftq_bits),
        };
        format!(
            "---\nbase_model: {base}\nlibrary_name: peft\npipeline_tag: text-generation\ntags: [lora, pronk]\n---\n\n\
             # A LoRA adapter for {base}\n\n\
             | | |\n|---|---|\n\
             | rank, alpha | {rank}, {alpha} |\n| target modules | {targets} |\n{start}| prompt template | {template}, in `{file}` |\n\
             | data | {data} |\n| prepared rows | `{data_key}` |\n\
             | steps, records a step | {step}, {batch} |\n| learning rate, seed | {rate}, {seed} |\n{eval}\n{quantized}\
             The licences of the base and of the data apply to this adapter as well.\n\n\
             ```python\nfrom peft import AutoPeftModelForCausalLM\n{import}\
             model = AutoPeftModelForCausalLM.from_pretrained(\"path/to/this/folder\"{load})\n```\n\n\
             Trained with pronk.\n"
        )
    }
}

/// What to say of an adapter on a quantized base, and how transformers quantizes that.
fn quantized_base(base: &str, bits: u8) -> (String, &'static str, String) {
    let (how, arguments) = if bits == 4 {
        ("NF4", "load_in_4bit=True, bnb_4bit_quant_type=\"nf4\", bnb_4bit_use_double_quant=True")
    } else {
        ("int8", "load_in_8bit=True")
    };
    let note = format!(
        "It belongs to {base} **quantized to {how}**, not to {base} itself: it started from what the quantized base \
         has lost (LoftQ). `pronk merge --base {base}` merges it into the quantized weights.\n\n"
    );
    let import = "from transformers import BitsAndBytesConfig\n";
    (note, import, format!(", quantization_config=BitsAndBytesConfig({arguments})"))
}
