#!/usr/bin/env python3
"""Writes tiny_tokenizers.json: small vocabularies as a GGUF file holds them, and the ids their makers' libraries
give for tricky texts. Byte-level BPE by Hugging Face tokenizers, SentencePiece BPE by sentencepiece itself.

    pip install tokenizers sentencepiece transformers && ./make_tiny_tokenizers.py
"""
import io, json, pathlib
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers as pt, trainers
from tokenizers.models import BPE

HERE = pathlib.Path(__file__).parent
TEXTS = [case["text"] for case in json.load(open(HERE / "../../../tests/golden/smollm2-tokens.json"))]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
MORE = ["a  b    c\n\nd \n\n  e", "<b>bold</b>   <mask>", "    four", "two  \n"]
CORPUS = [t for t in TEXTS if t.isascii()] * 3


def split(pattern):
    return pt.Sequence([pt.Split(Regex(pattern), "isolated"), pt.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(pre, cut, ignore_merges=False, normalizer=None):
    tok = Tokenizer(BPE())
    tok.pre_tokenizer = cut
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=430, initial_alphabet=pt.ByteLevel.alphabet(), special_tokens=CONTROL, show_progress=False))
    model = json.loads(tok.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(m) for m in model["merges"]]
    if ignore_merges:  # a token no merge leads to, which only `ignore_merges` finds
        vocab["Ġthrice"] = len(vocab)
        TEXTS_HERE = TEXTS + ["once twice thrice"]
    else:
        TEXTS_HERE = TEXTS
    tok = Tokenizer(BPE(vocab, merges, ignore_merges=ignore_merges))
    tok.pre_tokenizer = cut
    if normalizer:
        tok.normalizer = normalizer
    tok.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in CONTROL])
    tokens = sorted(vocab, key=vocab.get)
    return dict(model="gpt2", pre=pre, tokens=tokens, token_types=[3 if t in CONTROL else 1 for t in tokens],
                merges=[" ".join(m) for m in merges], scores=[], bos=0, eos=2,
                cases=[dict(text=t, ids=tok.encode(t, add_special_tokens=False).ids) for t in TEXTS_HERE])


def sentence_piece(name, **options):
    """As Llama trains its own; `options` say otherwise. Also writes the model's file."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, model_type="bpe", vocab_size=500, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, hard_vocab_limit=False, minloglevel=2, **options)
    (HERE / f"tiny_{name}.model").write_bytes(out.getvalue())
    sp = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    n = range(sp.get_piece_size())
    defined = options.get("user_defined_symbols", [])
    kind = lambda i: (2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i)
                      else 4 if sp.id_to_piece(i) in defined else 1)
    # What spells a control token is that token here, as in transformers; sentencepiece takes it for plain text.
    # An empty text is no token at all, but sentencepiece never sees the difference to none: left as it is.
    return dict(model="llama", pre=None, tokens=[sp.id_to_piece(i) for i in n], token_types=[kind(i) for i in n],
                merges=[], scores=[sp.get_score(i) for i in n], bos=sp.bos_id(), eos=sp.eos_id(),
                add_space_prefix=options.get("add_dummy_prefix", True),
                cases=[dict(text=t, ids=sp.encode(t)) for t in TEXTS + MORE])


gpt2 = pt.ByteLevel(add_prefix_space=False)
made = dict(
    smollm=byte_level("smollm", pt.Sequence([pt.Digits(individual_digits=True), gpt2])),
    gpt2=byte_level("gpt-2", gpt2),
    llama3=byte_level("llama-bpe", split(LLAMA3), ignore_merges=True),
    qwen2=byte_level("qwen2", split(QWEN2), normalizer=normalizers.NFC()),
    sentence_piece=sentence_piece("sentence_piece"),
    # Gemma's: no space in front, runs of spaces and lines that are tokens whatever the merges say.
    sentence_piece_gemma=sentence_piece(
        "sentence_piece_gemma", add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        user_defined_symbols=["<mask>", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581\u2581", "<b>"]),
)
lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=True, separators=(',', ':'))}" for name, value in made.items()]
(HERE / "tiny_tokenizers.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
