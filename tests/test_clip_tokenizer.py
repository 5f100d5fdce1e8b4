"""Our CLIP tokenizer gives the ids of transformers', for any text and any form of a checkpoint."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrotype.convert import tokenizer
from ferrotype.convert.clip import MAX_BYTES, ClipTokenizer
from ferrotype.convert.errors import ConvertError

transformers = pytest.importorskip("transformers")
WORDS = (
    "a photo of a cat",
    "don't",
    "it's 1234",
    "<|endoftext|>",
    "<|startoftext|> x",
    "!!",
    "\u00a0",
)
texts = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(WORDS),
        st.text("\u0130\u1e9e\ufb01\u0301\u200d\U0001f468\U0001f3fd\u4e2d\u0e01 \t\n'", max_size=6),
    ),
    max_size=5,
).map(" ".join)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """CLIP's own tokenizer in its older form."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer._write_vocabulary(folder)
    return folder


@pytest.fixture(params=["clip", "trained", "old form", "added"])
def folder(request, clip, trained, tmp_path):
    if request.param == "clip":
        return clip
    shutil.copytree(trained / "tokenizer", tmp_path / "t")
    if request.param == "old form":
        (tmp_path / "t" / "tokenizer.json").unlink()
    if request.param == "added":
        theirs = tokenizer.original(trained / "tokenizer")
        theirs.add_tokens(["<cat-toy>", "zebra2"])
        shutil.rmtree(tmp_path / "t")
        theirs.save_pretrained(tmp_path / "t")
    return tmp_path / "t"


def test_the_ids_are_those_of_transformers(folder):
    ours, theirs = ClipTokenizer(folder), tokenizer.original(folder)
    assert len(ours) == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.pad_token == theirs.pad_token

    @given(texts)
    @settings(max_examples=150, deadline=None)
    def same(text):
        text = text.encode("utf-8", "ignore").decode()
        assert ours.backend.encode(text).ids == theirs(text).input_ids

    same()
    for text in ("<cat-toy> on a mat", "a zebra2.", *WORDS):
        assert ours.backend.encode(text).ids == theirs(text).input_ids


@pytest.mark.parametrize("pad", [None, "!"])
def test_new_tokens_are_words_of_their_own(clip, pad):
    ours, theirs = ClipTokenizer(clip, pad), tokenizer.original(clip, pad)
    for found in (ours.add, theirs.add_tokens):
        found(["<thing>", "style_7"])
    assert ours.pad_token == theirs.pad_token == (pad or "<|endoftext|>")
    for text in ("a <thing> in Style_7", "a<thing>b", "<thing><thing>"):
        assert ours.backend.encode(text).ids == theirs(text).input_ids
    known = {i: t.content for i, t in ours.added().items()}
    assert known == {i: t.content for i, t in theirs.added_tokens_decoder.items()}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("tokenizer.json", lambda d: d["model"].update(type="WordPiece"), "its model is WordPiece"),
        ("tokenizer.json", lambda d: d.pop("model"), "'model'"),
        ("tokenizer.json", lambda d: d["model"].update(vocab={}), "it has 0 tokens"),
        ("tokenizer.json", lambda d: d["model"]["merges"].append("one"), "not enough values"),
        ("tokenizer.json", lambda d: d["model"].update(vocab={"a": -1}), "no CLIP tokenizer"),
        (
            "tokenizer.json",
            lambda d: d["added_tokens"].append({"id": 9999, "content": "<far>"}),
            "'<far>' is number 9999, the next free one is 2048",
        ),
        (
            "special_tokens_map.json",
            lambda d: d.update(pad_token="[PAD]"),
            "pad_token '\\[PAD\\]' is not in the vocabulary",
        ),
    ],
)
def test_what_is_no_clip_tokenizer_is_refused(trained, tmp_path, name, change, said):
    folder = shutil.copytree(trained / "tokenizer", tmp_path / "t")
    told = json.loads((folder / name).read_text())
    change(told)
    (folder / name).write_text(json.dumps(told))
    with pytest.raises(ConvertError, match=said) as caught:
        ClipTokenizer(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\0\1", '{"model": 1}'])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConvertError):
        ClipTokenizer(tmp_path)


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ConvertError, match="at most"):
        ClipTokenizer(tmp_path)


def test_random_bytes_are_no_vocabulary(tmp_path):
    rng = np.random.default_rng()
    for _ in range(50):
        (tmp_path / "tokenizer.json").write_bytes(rng.bytes(200))
        with pytest.raises(ConvertError):
            ClipTokenizer(tmp_path)
