//! The built-in templates: chat templates like any other, which the instruction of a record stands in as well.
//!
//! A user's message has its `instruction` and `input` beside its `content` where the record tells them apart.

/// The published Stanford Alpaca prompts. A system message takes the preamble's place; a second turn needs none.
const ALPACA: &str = "\
{%- for message in messages -%}
{%- set input = message.input | default('') -%}
{%- if message.role == 'system' -%}
{{- message.content + '\\n\\n' -}}
{%- elif message.role == 'user' -%}
{%- if loop.first and input -%}
{{- 'Below is an instruction that describes a task, paired with an input that provides further context. ' -}}
{{- 'Write a response that appropriately completes the request.\\n\\n' -}}
{%- elif loop.first -%}
{{- 'Below is an instruction that describes a task. ' -}}
{{- 'Write a response that appropriately completes the request.\\n\\n' -}}
{%- elif loop.previtem.role == 'assistant' -%}
{{- '\\n\\n' -}}
{%- endif -%}
{{- '### Instruction:\\n' + message.instruction | default(message.content) + '\\n\\n' -}}
{%- if input -%}
{{- '### Input:\\n' + input + '\\n\\n' -}}
{%- endif -%}
{{- '### Response:\\n' -}}
{%- else -%}
{{- message.content + eos_token -}}
{%- endif -%}
{%- endfor -%}";

/// Alpaca without its preamble: some 20 tokens less a row.
const ALPACA_SHORT: &str = "\
{%- for message in messages -%}
{%- set input = message.input | default('') -%}
{%- if message.role == 'system' -%}
{{- message.content + '\\n\\n' -}}
{%- elif message.role == 'user' -%}
{%- if not loop.first and loop.previtem.role == 'assistant' -%}
{{- '\\n\\n' -}}
{%- endif -%}
{{- '### Instruction:\\n' + message.instruction | default(message.content) + '\\n\\n' -}}
{%- if input -%}
{{- '### Input:\\n' + input + '\\n\\n' -}}
{%- endif -%}
{{- '### Response:\\n' -}}
{%- else -%}
{{- message.content + eos_token -}}
{%- endif -%}
{%- endfor -%}";

/// Vicuna 1.1's conversation; an input follows its instruction after a blank line.
const VICUNA: &str = "\
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{- message.content + ' ' -}}
{%- elif message.role == 'user' -%}
{%- if loop.first -%}
{{- 'A chat between a curious user and an artificial intelligence assistant. ' -}}
{{- \"The assistant gives helpful, detailed, and polite answers to the user's questions. \" -}}
{%- endif -%}
{{- 'USER: ' + message.content + ' ASSISTANT: ' -}}
{%- else -%}
{{- message.content + eos_token -}}
{%- endif -%}
{%- endfor -%}";

/// Name and source of each.
pub(super) const BUILT_IN: [(&str, &str); 3] =
    [("alpaca", ALPACA), ("alpaca-short", ALPACA_SHORT), ("vicuna", VICUNA)];
