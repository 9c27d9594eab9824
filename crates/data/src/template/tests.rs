use std::fs;

use super::*;
use crate::tokenizer::tests::{llama2, smollm};

const WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n### Instruction:\nI\n\n### Input:\nX\n\n### Response:\n";
const NO_INPUT: &str = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nI\n\n### Response:\n";

fn load(name: &str) -> Result<PromptTemplate, DataError> {
    PromptTemplate::load(name, &smollm())
}

fn new(name: &str, source: &str) -> Result<PromptTemplate, DataError> {
    PromptTemplate::new(name, source, &smollm())
}

fn record(instruction: &str, input: &str, output: &str) -> InstructRecord {
    InstructRecord { instruction: instruction.into(), input: input.into(), output: output.into() }
}

/// The prompt of one turn.
fn asked(template: &PromptTemplate, instruction: &str, input: &str) -> String {
    template.render_prompt(&Conversation::question(instruction, input)).unwrap().remove(0).text
}

fn rendered(template: &PromptTemplate, record: &InstructRecord) -> (String, String) {
    let segments = template.render(&record.clone().into(), Learn::All).unwrap();
    let roles: Vec<_> = segments.iter().map(|segment| segment.role).collect();
    assert_eq!(roles, [Role::Prompt, Role::Response]);
    (segments[0].text.clone(), segments[1].text.clone())
}

#[test]
fn alpaca_is_the_published_prompt_byte_for_byte() {
    let template = load("alpaca").unwrap();
    assert_eq!(rendered(&template, &record("I", "X", "O")), (WITH_INPUT.into(), "O<|im_end|>".into()));
    assert_eq!(rendered(&template, &record("I", "", "O")), (NO_INPUT.into(), "O<|im_end|>".into()));
    // An input of white space is an input, as in the reference.
    assert_eq!(asked(&template, "I", " "), WITH_INPUT.replace('X', " "));
}

#[test]
fn the_other_built_in_templates() {
    let short = load("alpaca-short").unwrap();
    assert_eq!(asked(&short, "I", ""), "### Instruction:\nI\n\n### Response:\n");
    assert_eq!(asked(&short, "I", "X"), "### Instruction:\nI\n\n### Input:\nX\n\n### Response:\n");
    let vicuna = load("vicuna").unwrap();
    let prompt = asked(&vicuna, "I", "");
    assert!(
        prompt.starts_with("A chat between a curious user and an artificial intelligence assistant. The ")
    );
    assert!(prompt.ends_with("questions. USER: I ASSISTANT: "), "{prompt}");
    assert!(asked(&vicuna, "I", "X").ends_with("USER: I\n\nX ASSISTANT: "));
    assert_eq!(PromptTemplate::names().count(), 3);
}

#[test]
fn text_of_the_record_is_never_taken_for_the_templates() {
    for name in PromptTemplate::names() {
        let template = load(name).unwrap();
        let hostile = record(
            "### Response:\n{{ output }} {% raw %} \u{e000}0\u{e001} \u{e000}1",
            "<b>&amp;</b> \u{e000}1\u{e001}\r\n",
            "### Response:\nASSISTANT: \u{e000}0\u{e001} \n\n",
        );
        let (prompt, response) = rendered(&template, &hostile);
        assert_eq!(response, hostile.output.clone() + "<|im_end|>", "{name}");
        assert!(prompt.contains(&hostile.instruction) && prompt.contains(&hostile.input), "{name}");
        assert_eq!(prompt, asked(&template, &hostile.instruction, &hostile.input));
    }
}

#[test]
fn an_empty_output_is_an_empty_response() {
    let template = load("alpaca").unwrap();
    assert_eq!(rendered(&template, &record("I", "", "")), (NO_INPUT.into(), "<|im_end|>".into()));
}

#[test]
fn a_users_template_comes_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.html");
    fs::write(
        &path,
        "\u{feff}Q: {{ instruction }}{% if input %} ({{ input }}){% endif %}\nA: {{ output }} END\n",
    )
    .unwrap();
    let template = load(path.to_str().unwrap()).unwrap();
    // Nothing is escaped for HTML; what follows the output is learned, less one newline at the very end.
    assert_eq!(
        rendered(&template, &record("1 < 2", "&", "yes")),
        ("Q: 1 < 2 (&)\nA: ".into(), "yes END".into())
    );
    assert_eq!(template.name(), path.to_str().unwrap());
    assert!(template.source().starts_with("Q: "));
}

#[test]
fn a_filter_may_change_the_output_alone() {
    let template = new("t", "Q: {{ instruction }}\nA: {{ output | trim | upper }}.").unwrap();
    assert_eq!(rendered(&template, &record("x", "", "  yes\n")), ("Q: x\nA: ".into(), "YES.".into()));
    let template =
        new("t", "{% if output | length > 20 %}Long{% else %}Short{% endif %}: {{ output }}").unwrap();
    let error =
        template.render(&record("x", "", &"long ".repeat(9)).into(), Learn::All).unwrap_err().to_string();
    assert!(error.contains("changes with the output"), "{error}");
}

fn refusal(source: &str) -> String {
    new("mine.txt", source).unwrap_err().to_string()
}

#[test]
fn templates_that_cannot_work_are_refused_at_once() {
    for (source, expected) in [
        ("Q: {{ instruction }}", "never writes {{ output }}"),
        ("{% if input %}{{ output }}{% endif %}", "never writes {{ output }}"),
        ("{{ output }} and again {{ output }}", "more than once"),
        ("{{ instuction }} {{ output }}", "knows instruction, input and output"),
        ("line\n{{ output }} {% if %}", "line 2"),
        (
            "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}{{ output }}",
            "mine.txt",
        ),
        ("{% include 'other' %}{{ output }}", "other"),
        ("", "never writes"),
    ] {
        let error = refusal(source);
        assert!(error.starts_with("template mine.txt: ") && error.contains(expected), "{source}: {error}");
    }
}

#[test]
fn names_and_paths_that_lead_nowhere() {
    let error = load("alpacca").unwrap_err().to_string();
    assert!(error.contains("did you mean \"alpaca\"?"), "{error}");
    assert!(error.contains("alpaca, alpaca-short, vicuna"), "{error}");
    let error = load("/no/such/file.jinja").unwrap_err().to_string();
    assert!(!error.contains("did you mean") && error.contains("built in are"), "{error}");

    let dir = tempfile::tempdir().unwrap();
    let error = load(dir.path().to_str().unwrap()).unwrap_err().to_string();
    assert!(error.contains("cannot read the template"), "{error}");
    let path = dir.path().join("t");
    fs::write(&path, b"\xff{{ output }}").unwrap();
    let error = load(path.to_str().unwrap()).unwrap_err().to_string();
    assert!(error.contains("invalid UTF-8 at byte 0"), "{error}");
    fs::write(&path, vec![b'x'; MAX_SOURCE + 1]).unwrap();
    assert!(load(path.to_str().unwrap()).unwrap_err().to_string().contains("at most"));
}

fn turn(instruction: &str, output: &str) -> InstructRecord {
    record(instruction, "", output)
}

fn conversation(system: Option<&str>, turns: &[(&str, &str)]) -> Conversation {
    let turns = turns.iter().map(|(instruction, output)| turn(instruction, output)).collect();
    Conversation { system: system.map(str::to_owned), turns }
}

/// Each segment's text, responses in brackets.
fn shown(segments: &[Segment]) -> String {
    let show = |segment: &Segment| match segment.role {
        Role::Prompt => segment.text.clone(),
        Role::Response => format!("[{}]", segment.text),
    };
    segments.iter().map(show).collect()
}

fn shown_whole(template: &PromptTemplate, conversation: &Conversation) -> String {
    shown(&template.render(&Record::Conversation(conversation.clone()), Learn::All).unwrap())
}

#[test]
fn built_in_templates_go_on_for_turns() {
    let talk = conversation(None, &[("a", "b"), ("c", "d")]);
    let said = conversation(Some("S"), &[("a", "b"), ("c", "d")]);
    let short = load("alpaca-short").unwrap();
    let turns = "### Instruction:\na\n\n### Response:\n[b<|im_end|>]\n\n### Instruction:\nc\n\n### Response:\n[d<|im_end|>]";
    assert_eq!(shown_whole(&short, &talk), turns);
    assert_eq!(shown_whole(&short, &said), format!("S\n\n{turns}"));
    let alpaca = load("alpaca").unwrap();
    let preamble = NO_INPUT.split("###").next().unwrap();
    assert_eq!(shown_whole(&alpaca, &talk), format!("{preamble}{turns}"));
    assert_eq!(shown_whole(&alpaca, &said), format!("S\n\n{turns}"));
    let vicuna = PromptTemplate::load("vicuna", &llama2()).unwrap();
    let text = shown_whole(&vicuna, &said);
    assert_eq!(text, "<s>S USER: a ASSISTANT: [b</s>]USER: c ASSISTANT: [d</s>]");
    // A prompt is what the row has before the last answer.
    for template in [&short, &alpaca, &vicuna] {
        let whole = shown_whole(template, &said);
        let prompt = shown(&template.render_prompt(&said).unwrap());
        assert!(whole.starts_with(&prompt) && whole[prompt.len()..].starts_with("[d"), "{whole} {prompt}");
    }
}

/// How `ChatML` is commonly written; and what Phi-3 and Qwen3 do to it.
const CHATML: &str = "{% for message in messages %}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}";

#[test]
fn answers_are_what_the_template_adds_to_their_prompts() {
    let said = conversation(Some("S"), &[("a", "b"), ("c", "d")]);
    let text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>\n]\
                <|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[d<|im_end|>\n]";
    assert_eq!(shown_whole(&new("t", CHATML).unwrap(), &said), text);
    // An end of all that only the last answer has.
    let ended = format!("{CHATML}{{% if not add_generation_prompt %}}{{{{ '<|endoftext|>' }}}}{{% endif %}}");
    let expected = text.replacen("[b<|im_end|>\n]", "[b<|im_end|>]\n", 1).replacen(
        "[d<|im_end|>\n]",
        "[d<|im_end|>\n<|endoftext|>]",
        1,
    );
    assert_eq!(shown_whole(&new("t", &ended).unwrap(), &said), expected);
    // Marks of the template's own.
    let marked = CHATML.replace(
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}",
        "{{- '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}{% generation %}\
         {{- message.content + '<|im_end|>' }}{%- endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}\
         {%- endif %}{{ '\n' }}",
    );
    let expected = text.replace("<|im_end|>\n]", "<|im_end|>]\n");
    assert_eq!(shown_whole(&new("t", &marked).unwrap(), &said), expected);
    let forged = conversation(None, &[("a", "b\u{f8f0}")]);
    let error =
        new("t", &marked).unwrap().render(&Record::Conversation(forged), Learn::All).unwrap_err().to_string();
    assert!(error.contains("U+F8F0"), "{error}");
}

#[test]
fn chat_templates_that_cannot_be_learned_from_say_why() {
    let refusals = [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "never writes the assistant's message"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "renders the first 1 messages, when they are to be answered, otherwise",
        ),
        (
            "{% for m in messages %}{{ raise_exception('No ' + m.role) }}{% endfor %}",
            "the template refuses: No user",
        ),
        ("{% for m in messages %}{{ m.content.foo() }}{% endfor %}", "line 1"),
        (
            "{% for m in messages %}{% for n in range(100000) %}{% for o in range(1000) %}x{% endfor %}{% endfor %}{{ m.content }}{% endfor %}",
            "too many steps",
        ),
    ];
    for (source, expected) in refusals {
        let error = refusal(source);
        assert!(error.starts_with("template mine.txt: ") && error.contains(expected), "{source}: {error}");
    }
    let single = new("t", "{{ instruction }} {{ output }}").unwrap();
    let error = single
        .render(&Record::Conversation(conversation(Some("S"), &[("a", "b")])), Learn::All)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("found a system message and 1 turns") && error.contains("over `messages`"),
        "{error}"
    );
}

#[test]
fn records_of_text_pass_as_they_are() {
    let record = Record::Text { prompt: "{{ a }}".into(), completion: "b".into() };
    for name in PromptTemplate::names() {
        assert_eq!(shown(&load(name).unwrap().render(&record, Learn::All).unwrap()), "{{ a }}[b]");
    }
}

#[test]
fn what_is_stored_with_an_adapter_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    assert!(PromptTemplate::of_adapter(dir.path(), &smollm()).unwrap().is_none());
    for source in ["{{ instruction }}: {{ output }}", CHATML] {
        let template = new("t", source).unwrap();
        fs::write(dir.path().join(template.file_name()), template.source()).unwrap();
        let found = PromptTemplate::of_adapter(dir.path(), &smollm()).unwrap().unwrap();
        assert_eq!((found.source(), found.file_name()), (source, template.file_name()));
    }
}

/// A chat template that does `first` and is good for nothing else.
fn chat(first: &str) -> Result<PromptTemplate, DataError> {
    new("mine", &format!("{first}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"))
}

#[test]
fn what_a_template_nests_does_not_exhaust_the_stack() {
    // As the parser follows it, as deep as the source may be long.
    let many = |piece: &str| piece.repeat((MAX_SOURCE - 200) / piece.len());
    let sources = [
        format!("{{{{ {}1 }}}}", many("-")),
        format!("{{{{ {}1 }}}}", many("not ")),
        format!("{{{{ {}1 }}}}", many("1+")),
        format!("{{{{ {}1 }}}}", many("1 if 1 else ")),
        format!("{{{{ a{} }}}}", many(".a")),
        format!("{{{{ a{} }}}}", many("()")),
        format!("{{% if 0 %}}{}{{% endif %}}", many("{% elif 0 %}")),
    ];
    for source in sources {
        let _ = chat(&source);
    }
    // Values within each other, as deep as the fuel lasts.
    for wrap in ["[n.x]", "{'a': n.x}"] {
        for used in ["", "{{ n.x }}", "{{ n.x | tojson }}", "{{ n.x == [n.x] }}"] {
            let times = "{% for i in range(600) %}{% for j in range(600) %}";
            for times in [times.to_owned(), times.replace("600", "350"), times.replace("600", "150")] {
                let _ = chat(&format!(
                    "{{% set n = namespace(x=1) %}}{times}{{% set n.x = {wrap} %}}{{% endfor %}}{{% endfor %}}{used}"
                ));
            }
        }
    }
}

#[test]
fn what_is_written_takes_no_more_room_than_a_template_has_steps() {
    let refusal = |source: &str| chat(source).unwrap_err().to_string();
    for width in ["64", "99999999999", "999999999999999999999"] {
        let error = refusal(&format!("{{{{ messages | tojson(indent={width}) }}}}"));
        assert!(error.contains("template mine: line 1"), "{error}");
    }
    // A list that holds another twice, which does too, and so on: terabytes, spelled out.
    let doubled =
        "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}";
    let error = refusal(&format!("{doubled}{{{{ n.x | tojson }}}}"));
    assert!(error.contains("fuel"), "{error}");
    // And as Jinja writes it, and numbers as wide as a disk.
    for written in [&format!("{doubled}{{{{ n.x }}}}"), "{{ '{:>99999999999}'.format('a') }}"] {
        let error = refusal(written);
        assert!(error.contains("fuel"), "{error}");
    }
}

#[test]
fn a_template_has_no_more_time_than_it_can_need() {
    let doubled = "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}\
        {% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}";
    let error = chat(&format!("{doubled}{{{{ n.x == n.y }}}}")).unwrap_err().to_string();
    assert!(error.contains("not rendered after 5 s"), "{error}");
}

#[test]
fn a_template_that_came_with_a_tokenizer_has_a_size_too() {
    assert!(chat(&"x".repeat(MAX_SOURCE)).unwrap_err().to_string().contains("at most"));
}
