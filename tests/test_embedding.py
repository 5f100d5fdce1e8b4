"""A textual inversion is a word of every prompt, as diffusers reads it."""

import json
import shutil
import warnings

import numpy as np
import pytest
from safetensors.numpy import save_file

from ferrotype import bundle, cli, kernels, parity
from ferrotype.benchmarks.checkpoints import TINY, write_checkpoint
from ferrotype.convert import convert, embedding, modules, tokenizer
from ferrotype.convert.checkpoint import CheckpointError, Tensors, open_checkpoint, source_hash
from ferrotype.runtime.pipeline import EMBEDDED, Pipeline
from ferrotype.runtime.tokenizer import Tokenizer

torch = pytest.importorskip("torch")

PROMPT = "a red <cat> on a sky blue background"
TABLES = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def floats(rng, *shape):
    return np.array(rng.standard_normal(shape), np.float32)


def from_diffusers(folder):
    import diffusers

    xl = (folder / "text_encoder_2").is_dir()
    kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    options = {"add_watermarker": False} if xl else {"safety_checker": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = kind.from_pretrained(folder, torch_dtype=torch.float32, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def learn(pipe, rows, token, encoder="text_encoder"):
    """diffusers' own way to add a token."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_textual_inversion(
            {token: torch.from_numpy(rows)},
            token=token,
            text_encoder=getattr(pipe, encoder),
            tokenizer=getattr(pipe, TABLES[encoder]),
        )


def table_of(checkpoint, encoder):
    tensors = Tensors(checkpoint, encoder)
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    assert tensors[name].shape == tensors.shape(name)
    return tensors[name]


def written(checkpoint, folder, encoder="text_encoder"):
    """Our tokenizer of a checkpoint, as a bundle has it."""
    folder.mkdir()
    spec = tokenizer.write_tokenizer(checkpoint, folder, encoder)
    manifest = bundle.load(EMBEDDED).manifest
    manifest.tokenizers.clear()
    manifest.tokenizers[TABLES[encoder]] = spec
    return Tokenizer(bundle.Bundle(folder, manifest), TABLES[encoder])


# --- what diffusers reads -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("form", ["token", "emb_params", "clip_l"])
def test_the_vectors_and_the_ids_are_those_of_diffusers(sd, tmp_path, rng, count, form):
    rows = floats(rng, count, 32)
    name = "<cat>" if form == "token" else form
    stored = rows[0] if (count, form) == (1, "token") else rows  # as diffusers saves one vector
    save_file({name: stored}, tmp_path / "cat.safetensors")
    checkpoint = embedding.add(open_checkpoint(sd), tmp_path / "cat.safetensors")
    pipe = from_diffusers(sd)
    learn(pipe, rows, "<cat>")
    expected = pipe.text_encoder.get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(table_of(checkpoint, "text_encoder"), expected)
    assert checkpoint.configs["text_encoder"]["vocab_size"] == 2048 + count
    assert open_checkpoint(sd).configs["text_encoder"]["vocab_size"] == 2048
    ours = written(checkpoint, tmp_path / "out")
    for prompt in (PROMPT, "<cat>", "<cat><cat>, no dog", "a cat", "", "<cat> " * 60):
        spelled = pipe.maybe_convert_prompt(prompt, pipe.tokenizer)
        options = {"padding": "max_length", "truncation": True, "max_length": 77}
        ids = pipe.tokenizer(spelled, **options).input_ids
        assert ours(prompt).ids[0].tolist() == ids
    (addition,) = checkpoint.additions
    many = {1: "1 vector", 3: "3 vectors"}[count]
    assert addition.text == f"embedding cat.safetensors, token <cat>, {many}"


def web_ui(path, rows, name, **more):
    """What A1111's web UI writes when it trains."""
    value = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": rows},
        "name": name,
        "step": 500,
        "sd_checkpoint": "e1441589a6",
        "sd_checkpoint_name": "sd-v1-5",
    }
    torch.save(value | more, path)


@pytest.mark.parametrize("form", ["tensor", "trained", "parameters"])
@pytest.mark.parametrize("count", [1, 3])
def test_files_of_the_web_ui_are_those_of_diffusers(sd, tmp_path, rng, count, form):
    """Also as the method's authors wrote them: a ParameterDict, and a tensor of the token's id."""
    rows, path = floats(rng, count, 32), tmp_path / "my cat.pt"
    values, more = torch.from_numpy(rows), {}
    if form == "trained":
        values.requires_grad_(True)
    web_ui(path, values, "<cat>")
    if form == "parameters":
        held = torch.nn.ParameterDict({"*": torch.nn.Parameter(values)})
        more = {"string_to_param": held, "string_to_token": {"*": torch.tensor(265)}}
        web_ui(path, values, "<cat>", **more)
    checkpoint = embedding.add(open_checkpoint(sd), path)
    pipe = from_diffusers(sd)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form == "parameters":  # which its loader refuses
            learn(pipe, rows, "<cat>")
        else:
            pipe.load_textual_inversion(path)
    expected = pipe.text_encoder.get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(table_of(checkpoint, "text_encoder"), expected)
    assert checkpoint.additions[0].text.split(", ")[:2] == ["embedding my cat.pt", "token <cat>"]
    assert embedding.add(open_checkpoint(sd), path, "<dog>").tokens["tokenizer"][0] == "<dog>"


def test_a_file_of_the_web_ui_without_a_name_is_called_as_the_file(sd, tmp_path, rng):
    rows = torch.from_numpy(floats(rng, 1, 32))
    for name in (None, 7):
        web_ui(tmp_path / "cat.pt", rows, name)
        made = embedding.add(open_checkpoint(sd), tmp_path / "cat.pt")
        assert made.tokens["tokenizer"] == ("<cat>",)
    web_ui(tmp_path / "cat.pt", rows, "my cat")
    assert "the token 'my cat' has a space" in refused(sd, tmp_path / "cat.pt")
    save_file({"*": rows.numpy()}, tmp_path / "cat.safetensors")
    made = embedding.add(open_checkpoint(sd), tmp_path / "cat.safetensors")
    assert made.tokens["tokenizer"] == ("<cat>",)
    two = {"*": rows, "+": rows}
    web_ui(tmp_path / "cat.pt", rows, "<cat>", string_to_param=two)
    assert "is no embedding: it holds 2 tensors (*, +)" in refused(sd, tmp_path / "cat.pt")
    web_ui(tmp_path / "cat.pt", rows, "<cat>", hypernetwork=torch.nn.Linear(1, 1))
    assert "asks for 'torch.nn.modules.linear.Linear'" in refused(sd, tmp_path / "cat.pt")


def test_case_and_longer_names(sd, tmp_path, rng):
    """The tokenizer reads no case; <cat>s are not <cat>."""
    checkpoint = open_checkpoint(sd)
    for token, count in (("<Cat>", 2), ("<cat>s", 1), ("dog!", 3)):
        save_file({"emb_params": floats(rng, count, 32)}, tmp_path / "x.safetensors")
        checkpoint = embedding.add(checkpoint, tmp_path / "x.safetensors", token)
    ours = written(checkpoint, tmp_path / "out")
    first = 2048

    def ids(prompt):
        row = ours(prompt).ids[0]
        return [int(i) for i in row[1:] if i != row[-1]]

    assert ids("<cat>") == ids("<CAT>") == ids("<Cat>") == [first, first + 1]
    assert ids("<cat>_1") == [first + 1]
    assert ids("<cat>s") == [first + 2]
    assert ids("dog!") == [first + 3, first + 4, first + 5]
    assert ids("a dog! and a <cat>")[-2:] == [first, first + 1]
    assert ours("<cat> " * 40).dropped.endswith("<cat> <cat>_1")


def test_two_text_encoders_and_the_end_token(xl, tmp_path, rng):
    """SDXL's pooled state is that of the end token, which had the largest id until now."""
    vectors = {"clip_l": floats(rng, 2, 32), "clip_g": floats(rng, 2, 48)}
    save_file(vectors, tmp_path / "cat.safetensors")
    checkpoint = embedding.add(open_checkpoint(xl), tmp_path / "cat.safetensors")
    pipe = from_diffusers(xl)
    for encoder, rows in zip(TABLES, vectors.values(), strict=True):
        learn(pipe, rows, "<cat>", encoder)
        module = getattr(pipe, encoder)
        inner = getattr(module, "text_model", module)
        inner.eos_token_id = pipe.tokenizer.eos_token_id  # diffusers leaves the old way in place
        source = tokenizer.theirs(checkpoint, TABLES[encoder])
        ids = torch.from_numpy(tokenizer.original_ids(source, PROMPT, 77))
        assert written(checkpoint, tmp_path / encoder, encoder)(PROMPT).ids.tolist() == ids.tolist()
        ours = getattr(modules, encoder)(checkpoint)
        with torch.no_grad():
            found, expected = (m(ids, output_hidden_states=True) for m in (ours, module))
        assert np.allclose(found.hidden_states[-2], expected.hidden_states[-2], atol=1e-6)
    assert np.allclose(found.text_embeds, expected.text_embeds, atol=1e-6)
    assert checkpoint.configs["text_encoder_2"]["eos_token_id"] == 2047


def test_rows_that_no_token_had_are_replaced(tmp_path, rng):
    """Some tables have more rows than there are tokens; the new id is the next of the tokens."""
    configs = TINY | {"text_encoder": TINY["text_encoder"] | {"vocab_size": 2060}}
    folder = write_checkpoint(tmp_path / "wide", configs, torch.float32)
    rows = floats(rng, 2, 32)
    save_file({"<cat>": rows}, tmp_path / "cat.safetensors")
    checkpoint = embedding.add(open_checkpoint(folder), tmp_path / "cat.safetensors")
    table = table_of(checkpoint, "text_encoder")
    assert np.array_equal(table[2048:], rows)
    assert np.array_equal(table[:2048], table_of(open_checkpoint(folder), "text_encoder")[:2048])
    modules.text_encoder(checkpoint)


@pytest.mark.parametrize("newer", [False, True])
def test_other_tools_read_the_written_tokenizer(sd, tmp_path, rng, newer):
    """Also if the checkpoint's configuration lists its tokens, as transformers 4.34 began to."""
    from transformers import CLIPTokenizerFast

    sd = shutil.copytree(sd, tmp_path / "sd")
    if newer:
        path = sd / "tokenizer" / "tokenizer_config.json"
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        ends = {"2046": "<|startoftext|>", "2047": "<|endoftext|>"}
        listed = {i: {"content": end, **flags, "special": True} for i, end in ends.items()}
        names = {"bos_token": ends["2046"], "eos_token": ends["2047"], "unk_token": ends["2047"]}
        config = json.loads(path.read_text()) | {"added_tokens_decoder": listed} | names
        path.write_text(json.dumps(config))
    save_file({"<cat>": floats(rng, 2, 32)}, tmp_path / "cat.safetensors")
    checkpoint = embedding.add(open_checkpoint(sd), tmp_path / "cat.safetensors")
    ours = written(checkpoint, tmp_path / "out")
    folder = tmp_path / "out" / "tokenizer"
    said = json.loads((folder / "added_tokens.json").read_text())
    assert said == {"<cat>": 2048, "<cat>_1": 2049}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert ("2049" in config.get("added_tokens_decoder", {})) == newer
    theirs = CLIPTokenizerFast.from_pretrained(folder)
    assert tokenizer.original_ids(theirs, PROMPT, 77).tolist() == ours(PROMPT).ids.tolist()


def test_the_hash_knows_the_file_and_the_token(sd, tmp_path, rng):
    save_file({"<cat>": floats(rng, 2, 32)}, tmp_path / "cat.safetensors")
    plain = open_checkpoint(sd)
    added = [embedding.add(plain, tmp_path / "cat.safetensors", t) for t in (None, "<dog>")]
    assert len({source_hash(c) for c in (plain, *added)}) == 3


# --- what is refused ----------------------------------------------------------------------------


def refused(folder, path, token=None, checkpoint=None):
    with pytest.raises(CheckpointError) as caught:
        embedding.add(checkpoint or open_checkpoint(folder), path, token)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("file", "token", "said"),
    [
        ({"<cat>": (2, 33)}, None, "has vectors of 33 values, text_encoder reads 32"),
        ({"<cat>": (2, 768)}, None, "; it is for sd1, the checkpoint is sd"),
        ({"clip_l": (2, 32), "clip_g": (2, 1280)}, None, "2 is not there; it is for sdxl"),
        ({"<cat>": (2, 3, 32)}, None, "<cat> is F32 of shape (2, 3, 32), not vectors"),
        ({"<cat>": ()}, None, "<cat> is F32 of shape (), not vectors"),
        ({"<cat>": (76, 32)}, None, "has 76 vectors, a prompt has room for 75"),
        ({"a": (1, 32), "b": (1, 32)}, None, "is no embedding: it holds 2 tensors (a, b)"),
        ({}, None, "is no embedding: it holds 0 tensors, an embedding"),
        ({"emb_params": (1, 32), "clip_l": (1, 32)}, None, "has vectors for text_encoder twice"),
        ({"emb_params": (1, 32)}, "my cat", "the token 'my cat' has a space"),
        ({"emb_params": (1, 32)}, "\x1b[2J", "has a space or an unprintable sign"),
        ({"emb_params": (1, 32)}, "a", "the token a is in the vocabulary already; give another"),
        ({"emb_params": (1, 32)}, "<|endoftext|>", "is in the vocabulary already"),
    ],
)  # fmt: skip
def test_an_embedding_that_does_not_fit(sd, tmp_path, rng, file, token, said):
    path = tmp_path / "cat.safetensors"
    save_file({name: np.array(floats(rng, *shape)) for name, shape in file.items()}, path)
    assert said in refused(sd, path, token)


def test_one_text_encoder_of_two(xl, tmp_path, rng):
    path = tmp_path / "cat.safetensors"
    save_file({"clip_l": floats(rng, 1, 32)}, path)
    assert "has no vectors for text_encoder_2; a model with 2 text encoders" in refused(xl, path)
    save_file({"clip_l": floats(rng, 1, 32), "clip_g": floats(rng, 2, 48)}, path)
    assert "has 1 and 2 vectors for the text encoders; they must be as many" in refused(xl, path)


def test_tokens_that_would_be_mixed_up(sd, tmp_path, rng):
    path = tmp_path / "cat.safetensors"
    save_file({"<cat>": floats(rng, 1, 32)}, path)
    checkpoint = embedding.add(open_checkpoint(sd), path)
    for token in ("<cat>", "<CAT>", "<cat>_1", "<cat>_7"):
        assert "already" in refused(sd, path, token, checkpoint)
    save_file({"<cat>": floats(rng, 2, 32)}, path)
    one_more = embedding.add(open_checkpoint(sd), path, "x_1")
    assert "already" in refused(sd, path, "x", one_more)


def test_what_is_no_file(sd, tmp_path):
    path = tmp_path / "cat.bin"
    assert "is not a file; give an embedding as safetensors or .pt" in refused(sd, path)
    path.write_bytes(b"\x80\x04}q\x00.")
    assert "can run code when read" in refused(sd, path)


@pytest.mark.parametrize(
    ("text", "path", "token"),
    [
        ("cat.safetensors", "cat.safetensors", None),
        ("cat.safetensors:<cat>", "cat.safetensors", "<cat>"),
        ("C:\\models\\cat.safetensors:<cat>", "C:\\models\\cat.safetensors", "<cat>"),
    ],
)
def test_a_token_follows_a_colon(text, path, token):
    found, name = cli.WithSuffix().convert(text, None, None)
    assert (str(found), name) == (path, token)


# --- from the checkpoint to the picture ---------------------------------------------------------


@pytest.mark.skipif(not kernels.available(), reason="the native engine is not built")
def test_a_lora_and_an_embedding_in_the_picture(trained, tmp_path, rng):
    """Converted for the CPU engine, and drawn: diffusers with both draws the same."""
    checkpoint = open_checkpoint(trained)
    unet = Tensors(checkpoint, "unet")
    file = {}
    for name in unet:
        shape = unet.shape(name)
        if name.endswith(("to_q.weight", "to_v.weight", "conv1.weight")):
            flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            ones = (1,) * (len(shape) - 2)
            file[f"{flat}.lora_down.weight"] = 0.05 * floats(rng, 4, *shape[1:])
            file[f"{flat}.lora_up.weight"] = 0.05 * floats(rng, shape[0], 4, *ones)
            file[f"{flat}.alpha"] = np.array(2, np.float32)
    save_file(file, tmp_path / "ink.safetensors")
    table = table_of(checkpoint, "text_encoder")
    rows = table[rng.integers(300, 2000, 2)] + 0.3 * table.std() * floats(rng, 2, table.shape[1])
    save_file({"<cat>": rows}, tmp_path / "cat.safetensors")
    made = convert(
        trained,
        tmp_path / "both.ferro",
        "native",
        "fp32",
        "fp32",
        loras=[(tmp_path / "ink.safetensors", 0.8)],
        embeddings=[(tmp_path / "cat.safetensors", None)],
        sizes=[(64, 64)],
    )
    report = made.manifest.parity
    assert [line.split(", sha256")[0] for line in report["merged"]] == [
        "LoRA ink.safetensors, weight 0.8",
        "embedding cat.safetensors, token <cat>, 2 vectors",
    ]
    assert report["picture"]["psnr"] > 45
    assert "merged" in cli.describe(made)
    pipe = from_diffusers(trained)
    pipe.load_lora_weights(tmp_path, weight_name="ink.safetensors")
    pipe.fuse_lora(lora_scale=0.8)
    learn(pipe, rows, "<cat>")
    expected, plain = (drawn(p, PROMPT) for p in (pipe, from_diffusers(trained)))
    ours = Pipeline.load(made.folder)
    *_, last = ours.steps(PROMPT, seed=3)
    found = ours.decode_array(last.latents)
    assert parity.psnr(expected, found, peak=1.0) > 45
    assert parity.psnr(plain, found, peak=1.0) < 30


def drawn(pipe, prompt):
    generator = torch.Generator("cpu").manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(
            prompt, height=64, width=64, num_inference_steps=4, guidance_scale=1.0,
            generator=generator, output_type="np",
        ).images[0]  # fmt: skip


def test_letters_that_only_fold_alike_are_left_alone():
    from ferrotype.runtime.tokenizer import _spell_out

    spelled = {"<is>": "<is> <is>_1"}
    assert _spell_out("an <IS> and <i\u017f>", spelled) == "an <is> <is>_1 and <i\u017f>"
