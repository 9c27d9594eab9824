use pronk_data::PromptTemplate;
use pronk_lora::{InitLoraWeights, LoraConfig, TrainedBiases};

/// What the adapter's `README.md` says of it, and the template that is stored beside.
#[derive(Debug, Clone)]
pub struct ModelCard<'a> {
    /// Name or path of the base.
    pub base: String,
    /// What comes before [`ModelCard::TRAINING`]: what it is, and how it is loaded.
    pub opening: String,
    /// The data files by name, each with its SHA-256.
    pub data: Vec<(String, String)>,
    /// The template that the rows were made with.
    pub template: &'a PromptTemplate,
    /// Hash of the prepared rows.
    pub data_key: String,
    /// The recipe, as TOML.
    pub recipe: String,
}

impl ModelCard<'_> {
    /// The card's file name, which a model hub looks for.
    pub const FILE: &'static str = "README.md";

    /// The line from which on a card tells how its adapter was trained. What is made of an adapter takes that along.
    pub const TRAINING: &'static str = "## Training\n";

    /// The card as Markdown.
    pub(crate) fn to_markdown(&self, lora: &LoraConfig, step: u64, eval: Option<(f64, f64)>) -> String {
        let Self { opening, data, template, data_key, recipe, .. } = self;
        let eval = eval.map_or(String::new(), |(before, after)| {
            format!("| eval loss, base alone | {before:.4} |\n| eval loss, this adapter | {after:.4} |\n")
        });
        let data: String =
            data.iter().map(|(name, hash)| format!("| data: {name} | sha256 `{hash}` |\n")).collect();
        let (template, file) =
            (template.name().rsplit(['/', '\\']).next().unwrap_or_default(), template.file_name());
        let (rank, alpha) = (lora.rank, lora.alpha);
        let targets = serde_json::to_string(&lora.target_modules).unwrap_or_default();
        let heading = Self::TRAINING;
        let mut whole = lora.modules_to_save.join(", ");
        if lora.bias != TrainedBiases::None {
            let biases = serde_json::to_string(&lora.bias).unwrap_or_default();
            whole += &format!("{}biases: {biases}", if whole.is_empty() { "" } else { ", " });
        }
        let whole = if whole.is_empty() { String::new() } else { format!("| trained whole | {whole} |\n") };
        let start = match (lora.init_lora_weights, lora.restore_rank) {
            (InitLoraWeights::Default, 0) => String::new(),
            (init, 0) => format!("| init_lora_weights | {init} |\n"),
            (init, rank) => format!("| init_lora_weights, restore_rank | {init}, {rank} |\n"),
        };
        format!(
            "{opening}{heading}\n\
             | | |\n|---|---|\n\
             | rank, alpha | {rank}, {alpha} |\n| target modules | {targets} |\n\
             {whole}{start}| prompt template | {template}, in `{file}` |\n{data}\
             | prepared rows | `{data_key}` |\n| optimizer steps | {step} |\n{eval}\n\
             The recipe, for `pronk train`; its paths are those of no machine:\n\n```toml\n{recipe}```\n\n\
             The licences of the base and of the data apply as well. Trained with pronk.\n"
        )
    }
}
