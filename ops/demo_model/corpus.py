"""The demo model's data: domains, held-out split, tokenizer and training windows.

A domain is a list of documents. Every `*.txt` of the corpus folder is a domain, named by its stem. The source
of the running interpreter's standard library is the domain `python`. The domain `chat` is made from a play,
whose speeches become exchanges of a user and an assistant.

Shapes: S tokens of a stream, T tokens of a window, N windows.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from arithmetic import problems
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
# One part in twenty of every domain is held out from training.
HELD_OUT_SHARE = 20

# These folders hold tests, tables, generated text or legacy code, which a model should not imitate.
STDLIB_SKIP = {
    "__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
STDLIB_BYTES = 6_000_000

# A newline never merges with its neighbours, and every digit is a token of its own. A prompt that ends at
# "ROMEO:" or at the end of a line is therefore split as the same text was in training.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

# A conversation looks like a play: the system text is a stage direction, and each message is a speech.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{- '[' + message['content'] | trim + ']\\n\\n' }}
{%- elif message['role'] == 'assistant' %}
{{- 'Assistant:\\n' + message['content'] | trim + eos_token + '\\n\\n' }}
{%- else %}{{- message['role'] | capitalize + ':\\n' + message['content'] | trim + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:\\n' }}{%- endif %}
"""

SPEECH = re.compile(r"^[A-Z][A-Za-z ]*:\n((?:.+\n)+)", re.MULTILINE)


@dataclass(frozen=True)
class Domain:
    name: str
    train: list[str]
    held_out: list[str]


@dataclass(frozen=True)
class Stream:
    """A domain as tokens: [S] int16 ids, and the positions at which a window may begin with <s>."""

    ids: Tensor
    starts: Tensor


def split_text(text: str) -> tuple[str, str]:
    """The text without its last twentieth, and that last twentieth; the cut is at a paragraph."""
    cut = text.index("\n\n", len(text) - len(text) // HELD_OUT_SHARE)
    return text[:cut], text[cut:].lstrip()


def standard_library() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    files, size = [], 0
    for path in sorted(root.rglob("*.py")):
        if STDLIB_SKIP.isdisjoint(path.relative_to(root).parts) and size < STDLIB_BYTES:
            files.append(path.read_text(encoding="utf-8", errors="ignore"))
            size += len(files[-1])
    return [text for text in files if text.strip()]


def load_domains(folder: Path) -> list[Domain]:
    domains = []
    for path in sorted(folder.glob("*.txt")):
        train, held_out = split_text(path.read_text(encoding="utf-8"))
        domains.append(Domain(path.stem, [train], [held_out]))
    files = standard_library()
    held_out_files = files[::HELD_OUT_SHARE]
    files = [text for i, text in enumerate(files) if i % HELD_OUT_SHARE]
    return [*domains, Domain("python", files, held_out_files)]


def unseen_domain() -> Domain:
    """Arithmetic, which is measured beside the others and never trained on."""
    return Domain("arithmetic", [], ["\n\n".join(problems(count=1000, seed=0))])


def tokenizer_texts(domains: list[Domain], limit: int = 2_000_000) -> Iterator[str]:
    """The training text, with at most `limit` characters of a domain, so that none dominates the merges."""
    for domain in domains:
        left = limit
        for text in domain.train:
            yield text[:left]
            left = max(0, left - len(text))


def build_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(BOS, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def conversations(play: str, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Every third run of four short speeches, as two exchanges."""
    speeches = [match.group(1).strip() for match in SPEECH.finditer(play)]
    runs = [speeches[i : i + 4] for i in range(0, len(speeches) - 3, 12)]
    roles = ("user", "assistant", "user", "assistant")
    texts = []
    for run in runs:
        if max(map(len, run)) <= 400:
            messages = [{"role": role, "content": text} for role, text in zip(roles, run, strict=True)]
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
            texts.append(text.removeprefix(BOS).rstrip().removesuffix(EOS))
    return texts


def encode(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> Stream:
    """`<s> document </s> <s> document </s> ...`; a window may begin at any line that is not indented."""
    flat: list[int] = []
    for text in documents:
        flat += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    ends_line = torch.tensor([piece.endswith("\n") or piece == BOS for piece in pieces])
    opens = torch.tensor([not piece[:1].isspace() and piece not in (BOS, EOS) for piece in pieces])
    ids = torch.tensor(flat)
    starts = (ends_line[ids[:-1]] & opens[ids[1:]]).nonzero().squeeze(1) + 1
    return Stream(ids.short(), starts)


def draw_window(stream: Stream, length: int, bos: int, generator: torch.Generator) -> Tensor:
    """`length` + 1 tokens [T+1]: half of the windows begin with <s> at a line, half of them anywhere."""

    def below(bound: int) -> int:
        return int(torch.randint(bound, (1,), generator=generator))

    start = int(stream.starts[below(len(stream.starts))])
    if below(2) and start + length <= len(stream.ids):
        return torch.cat([torch.tensor([bos]), stream.ids[start : start + length].long()])
    start = below(len(stream.ids) - length)
    return stream.ids[start : start + length + 1].long()


def held_out_windows(domain: Domain, tokenizer: PreTrainedTokenizerFast, length: int, limit: int) -> Tensor:
    """The first `limit` windows [N, T+1] of the held-out text, end to end, each with <s> before it."""
    ids = encode(domain.held_out, tokenizer).ids[1:].long()
    rows = ids[: len(ids) // length * length].view(-1, length)[:limit]
    bos = torch.full((len(rows), 1), int(tokenizer.bos_token_id))
    return torch.cat([bos, rows], dim=1)
