//! `README.md` of what others are to load: what it is, how every runtime loads it, and how it was trained.

use std::path::Path;

use miette::{IntoDiagnostic, Result};
use pronk_data::{CHAT_TEMPLATE, Conversation, PromptTemplate};
use pronk_export::{MODEL_GGUF, Runtime};
use pronk_lora::{Adapter, LM_HEAD};
use pronk_train::ModelCard;

use crate::args::Method;
use crate::base::{self, OpenedBase};

/// What the commands ask.
const QUESTION: &str = "Why do alpacas hum?";
/// The answer's length in the commands.
const MAX_TOKENS: usize = 64;

/// What stands for a base that cannot be named.
const UNKNOWN: &str = "BASE";

/// An adapter and its base, of which something is written that wants a card.
pub struct Making<'a> {
    opened: &'a OpenedBase,
    adapter: Adapter,
    /// As a shell has to be told of it.
    base: String,
    asking: Asking,
}

/// How a question becomes the text that was trained on.
enum Asking {
    /// By the chat template that lies in the folder.
    Stored,
    /// By the tokenizer's own.
    Own,
    /// By no template that transformers knows: the text itself.
    Text(String),
}

impl<'a> Making<'a> {
    /// `template` is the one that was trained with, where that is known.
    pub fn new(opened: &'a OpenedBase, adapter: &Adapter, template: Option<&PromptTemplate>) -> Result<Self> {
        let asking = match template {
            Some(template) if template.file_name() == CHAT_TEMPLATE => Asking::Stored,
            None if opened.tokenizer.chat_template().is_some() => Asking::Own,
            Some(template) => Asking::Text(question_in(template)?),
            None => Asking::Text(question_in(&base::template(None, None, &opened.tokenizer)?)?),
        };
        // What is written sits on layers that runtimes know.
        let adapter = adapter.onto_packed(&opened.base.config.adapter_modules());
        let base = base::without_revision(&opened.lasting_name()).to_owned();
        Ok(Self { opened, adapter, base, asking })
    }

    /// Of an adapter in PEFT's layout, all but its training.
    pub fn of_adapter(&self) -> String {
        let sections = [
            self.peft(),
            self.pronk(),
            self.vllm(),
            self.mistralrs(),
            self.llama_cpp(),
            self.mlx(),
            self.ollama(),
        ];
        self.opening("peft", "adapter", &format!("{} adapter", self.kind()), &sections)
    }

    /// Of an adapter that was written for `runtime`.
    pub fn of_export(&self, runtime: Runtime) -> String {
        let (library, section) = match runtime {
            Runtime::Peft | Runtime::Vllm | Runtime::MistralRs => return self.of_adapter(),
            Runtime::Gguf => ("gguf", block("llama.cpp", "sh", &self.llama_cli("adapter.gguf"))),
            Runtime::Ollama => ("gguf", block("Ollama", "sh", &ollama("Modelfile"))),
            Runtime::Mlx => ("mlx", block("MLX", "sh", &mlx(&self.hugging_face(), Some(".")))),
        };
        self.opening(
            library,
            "adapter",
            &format!("{} adapter, written for {runtime},", self.kind()),
            &[section],
        )
    }

    /// Of the merged model, as a Hugging Face directory. `adapter` is where the adapter lies.
    pub fn of_merged(&self, adapter: &Path) -> String {
        let gguf = format!("{} --format gguf --out ../gguf\n", self.merge(&shown(adapter)));
        let sections = [
            block("transformers", "python", &self.python(None, ".")),
            block("pronk", "sh", "pronk chat --base ."),
            block("vLLM", "sh", &format!("vllm serve .{}", self.template_argument())),
            block("mistral.rs", "python", &self.mistralrs_python("Which.Plain(model_id=\".\")", "")),
            block("MLX", "sh", &mlx(".", None)),
            block("llama.cpp", "sh", &format!("{gguf}llama-cli --model ../gguf/{MODEL_GGUF}")),
            block("Ollama", "sh", &format!("{gguf}{}", ollama("../gguf/Modelfile"))),
        ];
        self.opening(
            "transformers",
            "finetune",
            &format!("model, tuned by a {} adapter that is merged into it,", self.kind()),
            &sections,
        )
    }

    /// Of the merged model as a GGUF file, perhaps with a Modelfile beside it.
    pub fn of_merged_gguf(&self, adapter: &Path, modelfile: bool) -> String {
        let mut sections = vec![
            block("llama.cpp", "sh", &format!("llama-cli --model {MODEL_GGUF}")),
            block("pronk", "sh", &format!("pronk chat --base {MODEL_GGUF}")),
        ];
        if modelfile {
            sections.push(block("Ollama", "sh", &ollama("Modelfile")));
        }
        let merge = format!("{} --out ../merged\n", self.merge(&shown(adapter)));
        let others = format!("{merge}vllm serve ../merged\n{}", mlx("../merged", None));
        sections.push(block(
            "transformers, vLLM, mistral.rs, MLX: as a Hugging Face directory",
            "sh",
            &others,
        ));
        self.opening(
            "gguf",
            "finetune",
            &format!("model, tuned by a {} adapter that is merged into it,", self.kind()),
            &sections,
        )
    }

    fn opening(&self, library: &str, relation: &str, what: &str, sections: &[String]) -> String {
        let base = &self.base;
        let kind = self.kind().to_lowercase();
        let tags = if kind.contains("dora") { format!("{kind}, lora") } else { kind };
        format!(
            "{heading}A {what} for `{base}`.{explained}\n\n\
             ## Use\n\nThe commands are for this folder.{names}\n\n{sections}",
            heading = heading(base, library, relation, &tags),
            explained = self.explained(),
            names = self.names(),
            sections = sections.concat(),
        )
    }

    /// As papers call it.
    fn kind(&self) -> &'static str {
        match (self.adapter.config.use_dora, self.adapter.config.rslora) {
            (false, false) => "LoRA",
            (false, true) => "rsLoRA",
            (true, _) => "DoRA",
        }
    }

    fn explained(&self) -> String {
        let config = &self.adapter.config;
        let dora = " DoRA: the lengths of the weights' rows are trained apart from their directions.";
        let rslora = " rsLoRA: the update is scaled by alpha / sqrt(rank).";
        let kinds = [(config.use_dora, dora), (config.rslora, rslora)];
        let kinds: String = kinds.iter().filter(|(is, _)| *is).map(|(_, text)| *text).collect();
        // Over the base as it was, it would bring back what that never lost.
        let quantized = self.quantized().map_or(String::new(), |(how, _)| {
            let base = &self.base;
            format!(
                " It belongs to `{base}` **quantized to {how}**, not to `{base}` itself: it brings back what \
                 that has lost (LoftQ, QERA)."
            )
        });
        kinds + &quantized
    }

    /// How the base is quantized that the adapter belongs to (`LoftQ`, `QERA`), and how transformers is told.
    fn quantized(&self) -> Option<(String, String)> {
        quantized(&self.adapter)
    }

    /// What the names in the commands stand for.
    fn names(&self) -> String {
        if self.opened.base.gguf().is_none() {
            return String::new();
        }
        format!(" `BASE` is the Hugging Face directory that `{}` was made from.", self.base)
    }

    /// The base as a Hugging Face directory or a hub id.
    fn hugging_face(&self) -> String {
        if self.opened.base.gguf().is_some() { UNKNOWN.into() } else { shell(&self.base) }
    }

    /// A command that runs the base's GGUF file with an adapter, after one that makes the file where there is none.
    fn llama_cli(&self, adapter: &str) -> String {
        if self.opened.base.gguf().is_some() {
            return format!("llama-cli --model {} --lora {adapter}", shell(&self.base));
        }
        format!(
            "python convert_hf_to_gguf.py {} --outfile base.gguf  # llama.cpp's own\n\
             llama-cli --model base.gguf --lora {adapter}",
            self.hugging_face()
        )
    }

    fn merge(&self, adapter: &str) -> String {
        format!("pronk merge --base {} --adapter {adapter}", shell(&self.base))
    }

    fn export(&self, to: Runtime) -> String {
        format!("pronk export --base {} --adapter . --to {to} --out ../{to}\n", shell(&self.base))
    }

    /// The commands for `runtime`, or where it cannot load the adapter the reason, and the commands for the
    /// merged model.
    fn unless_refused(
        &self,
        title: &str,
        runtime: Runtime,
        language: &str,
        code: &str,
        merged: &str,
    ) -> String {
        let mut refusals = runtime.refusals(&self.opened.base, &self.adapter);
        if let Some((how, _)) = self.quantized() {
            refusals.push(format!("it belongs to the base quantized to {how}"));
        }
        if refusals.is_empty() {
            return block(title, language, code);
        }
        let code = format!("{} {merged}", self.merge("."));
        format!(
            "### {title}\n\nThe adapter alone does not load: {}.\n\n```sh\n{code}\n```\n\n",
            refusals.join("; ")
        )
    }

    fn peft(&self) -> String {
        block("transformers and PEFT", "python", &self.python(Some("."), &self.base))
    }

    fn pronk(&self) -> String {
        block("pronk", "sh", &format!("pronk chat --base {} --adapter .", shell(&self.base)))
    }

    fn vllm(&self) -> String {
        let room = Runtime::max_lora_rank(&self.adapter)
            .map_or(String::new(), |room| format!(" --max-lora-rank {room}"));
        let serve = format!(
            "vllm serve {} --enable-lora --lora-modules tuned=.{room}{}",
            self.hugging_face(),
            self.template_argument()
        );
        self.unless_refused("vLLM", Runtime::Vllm, "sh", &serve, "--out ../merged\nvllm serve ../merged")
    }

    fn template_argument(&self) -> &'static str {
        if matches!(self.asking, Asking::Stored) { " --chat-template chat_template.jinja" } else { "" }
    }

    fn mistralrs(&self) -> String {
        let base = python(&self.base);
        let which = format!("Which.Lora(model_id={base}, adapters=[LoraAdapter(\"tuned\", \".\")])");
        let code = self.mistralrs_python(&which, ", adapter=\"tuned\"");
        let merged = "--out ../merged  # its README.md goes on";
        self.unless_refused("mistral.rs", Runtime::MistralRs, "python", &code, merged)
    }

    fn mistralrs_python(&self, which: &str, adapter: &str) -> String {
        let template = if matches!(self.asking, Asking::Stored) {
            ", chat_template=\"chat_template.jinja\""
        } else {
            ""
        };
        let lora = if adapter.is_empty() { "" } else { "LoraAdapter, " };
        format!(
            "from mistralrs import ChatCompletionRequest, {lora}Runner, Which\n\n\
             runner = Runner(which={which}{template})\n\
             messages = [{{\"role\": \"user\", \"content\": \"{QUESTION}\"}}]\n\
             request = ChatCompletionRequest(model=\"default\", messages=messages, max_tokens={MAX_TOKENS}{adapter})\n\
             print(runner.send_chat_completion_request(request).choices[0].message.content)"
        )
    }

    fn llama_cpp(&self) -> String {
        let code = format!("{}{}", self.export(Runtime::Gguf), self.llama_cli("../gguf/adapter.gguf"));
        let merged = format!("--format gguf --out ../gguf\nllama-cli --model ../gguf/{MODEL_GGUF}");
        self.unless_refused("llama.cpp", Runtime::Gguf, "sh", &code, &merged)
    }

    fn mlx(&self) -> String {
        let code = format!("{}{}", self.export(Runtime::Mlx), mlx(&self.hugging_face(), Some("../mlx")));
        let merged = format!("--out ../merged\n{}", mlx("../merged", None));
        self.unless_refused("MLX", Runtime::Mlx, "sh", &code, &merged)
    }

    fn ollama(&self) -> String {
        let code = format!("{}{}", self.export(Runtime::Ollama), ollama("../ollama/Modelfile"));
        let merged = format!("--format gguf --out ../gguf\n{}", ollama("../gguf/Modelfile"));
        self.unless_refused("Ollama", Runtime::Ollama, "sh", &code, &merged)
    }

    /// A question to `model` by transformers, with an adapter by PEFT.
    fn python(&self, adapter: Option<&str>, model: &str) -> String {
        let model = if adapter.is_some() && self.opened.base.gguf().is_some() { UNKNOWN } else { model };
        let (import, load) = match adapter {
            Some(_) => ("from peft import PeftModel\n", "model = PeftModel.from_pretrained(model, \".\")\n"),
            None => ("", ""),
        };
        // A model's own folder gives its tokenizer the template; an adapter's has to be told.
        let template = match (&self.asking, adapter) {
            (Asking::Stored, Some(_)) => {
                "tokenizer.chat_template = open(\"chat_template.jinja\", encoding=\"utf-8\").read()\n"
            }
            _ => "",
        };
        // Tokens that were added are known to the tokenizer beside the adapter, and have their rows in it alone.
        let brings_tokens = adapter.is_some() && !self.opened.tokenizer.added_tokens().is_empty();
        let tokenizer = if brings_tokens { "\".\"" } else { "base" };
        let rows = self.adapter.vocab_size().filter(|rows| *rows > self.opened.base.config.vocab_size);
        let resize = rows.filter(|_| adapter.is_some());
        let resize = resize.map_or(String::new(), |rows| format!("model.resize_token_embeddings({rows})\n"));
        let (bits, quantized) = match self.quantized().filter(|_| adapter.is_some()) {
            Some((_, how)) => {
                (", BitsAndBytesConfig", format!(", quantization_config=BitsAndBytesConfig({how})"))
            }
            None => ("", String::new()),
        };
        let asked = match &self.asking {
            Asking::Text(text) => format!("inputs = tokenizer({}, return_tensors=\"pt\")", python(text)),
            Asking::Stored | Asking::Own => format!(
                "messages = [{{\"role\": \"user\", \"content\": \"{QUESTION}\"}}]\n\
                 inputs = tokenizer.apply_chat_template(\n    \
                     messages, add_generation_prompt=True, return_dict=True, return_tensors=\"pt\"\n)"
            ),
        };
        format!(
            "{import}from transformers import AutoModelForCausalLM, AutoTokenizer{bits}\n\n\
             base = {}\n\
             tokenizer = AutoTokenizer.from_pretrained({tokenizer})\n{template}\
             model = AutoModelForCausalLM.from_pretrained(base, dtype=\"auto\"{quantized})\n{resize}{load}\
             {asked}\n\
             output = model.generate(**inputs, max_new_tokens={MAX_TOKENS}, do_sample=False)\n\
             print(tokenizer.decode(output[0, inputs[\"input_ids\"].shape[1] :], skip_special_tokens=True))",
            python(model)
        )
    }
}

/// How the base is quantized that an adapter belongs to, and how transformers is told.
fn quantized(adapter: &Adapter) -> Option<(String, String)> {
    let loftq = adapter.config.loftq_config.as_ref()?;
    let (how, told) = match loftq.loftq_bits {
        4 => ("NF4", "load_in_4bit=True, bnb_4bit_quant_type=\"nf4\", bnb_4bit_use_double_quant=True"),
        _ => ("int8", "load_in_8bit=True"),
    };
    let skipped = &loftq.skip_modules;
    if skipped.is_empty() {
        return Some((how.to_owned(), told.to_owned()));
    }
    // Without a list, transformers leaves the head out by itself.
    let names: Vec<&str> = skipped.iter().map(String::as_str).chain([LM_HEAD]).collect();
    let names = serde_json::to_string(&names).unwrap_or_default();
    Some((format!("{how}, but for {}", skipped.join(", ")), format!("{told}, llm_int8_skip_modules={names}")))
}

/// What the hub reads of a card, and its title.
fn heading(base: &str, library: &str, relation: &str, tags: &str) -> String {
    // The hub refuses a base that it does not know.
    let is_hub_id = base != UNKNOWN && !Path::new(base).is_absolute();
    let base_model = if is_hub_id {
        format!("base_model: {base}\nbase_model_relation: {relation}\n")
    } else {
        String::new()
    };
    let title = Path::new(base).file_name().unwrap_or_default().to_string_lossy();
    format!(
        "---\n{base_model}library_name: {library}\npipeline_tag: text-generation\ntags: [{tags}, pronk]\n---\n\n\
         # {title}, tuned\n\n"
    )
}

/// Of an adapter that was combined out of others for `base`, which nobody has opened.
pub fn of_combined(adapter: &Adapter, base: &str, parts: &[(String, f64)], method: Method) -> String {
    let base = if base.is_empty() { UNKNOWN } else { base };
    let how = match method {
        Method::Cat => "the weighted sum of their updates",
        Method::Linear => "weighted sums of their A and of their B",
    };
    let quantized = quantized(adapter).map_or(String::new(), |(how, _)| {
        format!(" It belongs to that base quantized to {how} (LoftQ, QERA).")
    });
    let row = |(dir, weight): &(String, f64)| {
        let name = Path::new(dir).file_name().unwrap_or_default().to_string_lossy().into_owned();
        format!("| {name} | {weight} |\n")
    };
    let rows: String = parts.iter().map(row).collect();
    let use_of = block("pronk", "sh", &format!("pronk chat --base {} --adapter .", shell(base)));
    format!(
        "{heading}A LoRA adapter for `{base}`, combined out of others.{quantized}\n\n\
         ## Use\n\nThe command is for this folder; PEFT loads it as any adapter.\n\n{use_of}\
         {training}\nNone of its own: {how}.\n\n| adapter | weight |\n|---|---|\n{rows}",
        heading = heading(base, "peft", "adapter", "lora"),
        training = ModelCard::TRAINING,
    )
}

/// The card that begins with `opening` and goes on with what the card of the adapter in `dir` tells of its training.
pub fn with_training(opening: &str, dir: &Path) -> String {
    // What is no text of this folder tells nothing.
    let card = pronk_files::read_text(&dir.join(ModelCard::FILE)).unwrap_or_default();
    let card = String::from_utf8_lossy(&card);
    let start = card.find(&format!("\n{}", ModelCard::TRAINING)).map(|at| at + 1);
    let training = start.and_then(|start| card.get(start..)).unwrap_or("Made with pronk.\n");
    format!("{opening}{training}")
}

/// The question in a template's words, up to where the model speaks.
fn question_in(template: &PromptTemplate) -> Result<String> {
    let segments = template.render_prompt(&Conversation::question(QUESTION, "")).into_diagnostic()?;
    Ok(segments.into_iter().map(|segment| segment.text).collect())
}

fn block(title: &str, language: &str, code: &str) -> String {
    format!("### {title}\n\n```{language}\n{code}\n```\n\n")
}

fn mlx(base: &str, adapter: Option<&str>) -> String {
    let adapter = adapter.map_or(String::new(), |adapter| format!(" --adapter-path {adapter}"));
    format!("mlx_lm.generate --model {base}{adapter} --max-tokens {MAX_TOKENS} --prompt \"{QUESTION}\"")
}

fn ollama(modelfile: &str) -> String {
    format!("ollama create tuned --file {modelfile}\nollama run tuned \"{QUESTION}\"")
}

/// A path from any folder, for a shell.
fn shown(path: &Path) -> String {
    shell(&std::path::absolute(path).unwrap_or_else(|_| path.into()).display().to_string())
}

/// `word` as a shell reads it.
fn shell(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./:@+=,".contains(c);
    if word.chars().all(plain) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// `text` as Python reads it; JSON's strings are Python's too.
fn python(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn words_are_quoted_where_a_shell_would_cut_them() {
        assert_eq!(shell("meta-llama/Llama-3.2-1B"), "meta-llama/Llama-3.2-1B");
        assert_eq!(shell("my models/it's"), r"'my models/it'\''s'");
    }

    #[test]
    fn training_goes_along_and_use_does_not() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(with_training("# New\n\n", dir.path()), "# New\n\nMade with pronk.\n");
        let old = format!("# Old\n\n## Use\n\nthis\n\n{}\nso\n\n## Mine\n\nmore\n", ModelCard::TRAINING);
        fs::write(dir.path().join(ModelCard::FILE), old).unwrap();
        assert_eq!(with_training("# New\n\n", dir.path()), "# New\n\n## Training\n\nso\n\n## Mine\n\nmore\n");
    }
}
