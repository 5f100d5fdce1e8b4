"""A CLIP tokenizer for the captions: byte-level BPE of lower-case words that end in </w>.

python models/emoji/tokenizer.py WORK    # writes WORK/tokenizer/
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from ferrotype.models.emoji.config import Recipe, stage
from ferrotype.models.emoji.data import Data, shown_colours
from ferrotype.models.emoji.networks import TOKENS

WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # as CLIP splits a prompt
CAPTIONS = 8  # of each thing


def learn_merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """The pairs to join, most frequent first; a few more than `count`."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2 * count + 512, end_of_word_suffix=WORD_END, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def vocabulary(merges: Iterable[tuple[str, str]], size: int) -> tuple[list[str], list[str]]:
    """Tokens in CLIP's order (bytes, bytes that end a word, pairs, start, end), and merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(alphabet + [letter + WORD_END for letter in alphabet])
    lines = []
    for left, right in merges:
        if (
            len(tokens) < size - 2
            and left in tokens
            and right in tokens
            and left + right not in tokens
        ):
            tokens[left + right] = None
            lines.append(f"{left} {right}")
    unused = [f"<|unused{i}|>" for i in range(size - 2 - len(tokens))]
    return [*tokens, *unused, START, END], lines


def write(folder: Path, tokens: list[str], merges: list[str]) -> None:
    """The files of a CLIP tokenizer; the end token fills short prompts, as in Stable Diffusion."""
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True}
    texts = {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "special_tokens_map.json": json.dumps(special, indent=1),
        "tokenizer_config.json": json.dumps({**config, **special}, indent=1),
    }
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def load(work: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(work / "tokenizer")


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """(n, TOKENS) int64."""
    return tokenizer(
        prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def main(work: Path, recipe: Recipe) -> None:
    if (work / "tokenizer").exists():
        return
    data, rng = Data.load(work), random.Random(0)
    texts = [name for names in data.names for name in names]
    for thing in range(len(data)):
        colours = rng.choices(shown_colours(thing), k=CAPTIONS)
        texts += [data.caption(thing, colour, rng) for colour in colours]
    merges = learn_merges(texts, recipe.vocabulary)
    folder = work / "tokenizer.tmp"
    write(folder, *vocabulary(merges, recipe.vocabulary))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    lengths = sorted(map(len, tokenizer(texts).input_ids))
    print(f"captions of {lengths[len(lengths) // 2]} tokens, the longest of {lengths[-1]}")
    folder.rename(work / "tokenizer")


if __name__ == "__main__":
    main(*stage())
