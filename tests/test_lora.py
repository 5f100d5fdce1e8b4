"""A merged LoRA gives the weights that diffusers, PEFT and LyCORIS give; or it is refused."""

import json
import warnings

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from ferrotype import cli
from ferrotype.benchmarks.checkpoints import (
    SMALL,
    TINY,
    write_checkpoint,
    write_single,
)
from ferrotype.convert import lora, names
from ferrotype.convert.checkpoint import CheckpointError, Tensors, open_checkpoint, source_hash

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
DOTTED = {"unet": "unet.", "text_encoder": "text_encoder.", "text_encoder_2": "text_encoder_2."}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
CLOSE = 1e-6


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- making files -------------------------------------------------------------------------------


def layers(folder, component, kinds=(2, 4)):
    """Every matrix and filter of a component: its module's path -> its shape."""
    tensors = Tensors(open_checkpoint(folder), component)
    return {
        name.removesuffix(".weight"): tensors.shape(name)
        for name in tensors
        if name.endswith(".weight")
        and len(tensors.shape(name)) in kinds
        and "embedding." not in name
    }


def components(folder):
    return [name for name in KOHYA if (folder / name).is_dir()]


def floats(rng, *shape, size=0.3):
    return (rng.standard_normal(shape) * size).astype(np.float32)


def pair(rng, shape, rank):
    """down and up for a weight of this shape."""
    ones = (1,) * (len(shape) - 2)
    return floats(rng, rank, *shape[1:]), floats(rng, shape[0], rank, *ones)


def kohya_file(rng, folder, path, name=lambda component, module: module, alphas=True):
    """Every layer of every component, each of a rank and an alpha of its own."""
    tensors = {}
    for component in components(folder):
        for module, shape in layers(folder, component).items():
            flat = KOHYA[component] + name(component, module).replace(".", "_")
            rank = 2 if component == "text_encoder_2" else int(rng.integers(1, 5))
            down, up = pair(rng, shape, rank)  # diffusers takes the projection's from the others
            tensors[f"{flat}.lora_down.weight"], tensors[f"{flat}.lora_up.weight"] = down, up
            if alphas:
                alpha = rng.uniform(0.5, 4) if alphas is True else alphas
                tensors[f"{flat}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path)
    return tensors


def without_alphas(tensors, path):
    """The same with alpha / rank in the factors: diffusers 0.42 forgets alphas of single layers."""
    plain = {name: value for name, value in tensors.items() if not name.endswith(".alpha")}
    for name in tensors.keys() - plain.keys():
        up = name.replace(".alpha", ".lora_up.weight")
        plain[up] = plain[up] * (tensors[name] / plain[up].shape[1])
    save_file(plain, path)


def sgm(folder):
    """Modules of the U-Net as the original called them, which is what kohya does for SDXL."""
    original = names.inverse(names.unet(open_checkpoint(folder).configs["unet"]))
    return lambda c, module: names.rename(original, module) if c == "unet" else module


# --- what others make of them -------------------------------------------------------------------


def from_diffusers(folder):
    import diffusers

    kind = "StableDiffusionXLPipeline" if (folder / "text_encoder_2").is_dir() else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = getattr(diffusers, kind or "StableDiffusionPipeline")
        options = {"add_watermarker": False} if kind else {"safety_checker": None}
        return pipe.from_pretrained(folder, torch_dtype=torch.float32, **options)


def fused(folder, *files):
    """diffusers' pipeline with these (path, weight) fused, one after the other."""
    pipe = from_diffusers(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, (path, _) in enumerate(files):
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"a{i}")
        adapters = [f"a{i}" for i in range(len(files))]
        pipe.set_adapters(adapters, [weight for _, weight in files])
        pipe.fuse_lora(components(folder), adapter_names=adapters)
    return pipe


def state_of(module):
    """The weights of a module, whatever wrappers PEFT left around its layers."""
    state = {key.replace("base_layer.", ""): v for key, v in module.state_dict().items()}
    return {key.removeprefix("text_model."): v for key, v in state.items() if ".lora_" not in key}


def merged(folder, *files):
    checkpoint = open_checkpoint(folder)
    for path, weight in files:
        checkpoint = lora.merge(checkpoint, path, weight)
    return checkpoint


def check_equal(checkpoint, component, expected):
    """Every tensor of the component is as expected; returns how many are new."""
    plain = Tensors(open_checkpoint(checkpoint.folder), component)
    found = Tensors(checkpoint, component)
    changed = 0
    for name in found:
        value = found[name]
        assert value.dtype == np.float32
        reference = expected[name.removeprefix("text_model.")].detach().numpy()
        assert np.abs(value - reference).max() <= CLOSE, name
        changed += not np.array_equal(value, plain[name])
    return changed


def check_pipeline(folder, *files):
    """All that diffusers fuses; every matrix of every component that the files have must change."""
    pipe, checkpoint = fused(folder, *files), merged(folder, *files)
    return {c: check_equal(checkpoint, c, state_of(getattr(pipe, c))) for c in components(folder)}


# --- kohya --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, -0.7])
def test_kohya_with_diffusers_names(sd, tmp_path, rng, weight):
    """Linear layers and convolutions, as LCM-LoRA has them, both of every component."""
    kohya_file(rng, sd, tmp_path / "k.safetensors", alphas=1.5)
    changed = check_pipeline(sd, (tmp_path / "k.safetensors", weight))
    assert changed == {c: len(layers(sd, c)) for c in components(sd)}


def test_every_layer_may_have_its_own_alpha(sd, tmp_path, rng):
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    without_alphas(kohya_file(rng, sd, one), other)
    pipe, checkpoint = fused(sd, (other, 0.6)), merged(sd, (one, 0.6))
    for component in components(sd):
        check_equal(checkpoint, component, state_of(getattr(pipe, component)))


def test_kohya_with_the_blocks_of_sdxl(xl, tmp_path, rng):
    tensors = kohya_file(rng, xl, tmp_path / "k.safetensors", sgm(xl), alphas=2.0)
    assert any("_input_blocks_3_1_" in name for name in tensors)
    assert any("_output_blocks_1_2_conv" in name for name in tensors)
    changed = check_pipeline(xl, (tmp_path / "k.safetensors", 0.8))
    assert changed == {c: len(layers(xl, c)) for c in components(xl)}


def test_without_alpha_it_is_the_rank_and_a_note_says_so(sd, tmp_path, rng):
    path = tmp_path / "k.safetensors"
    kohya_file(rng, sd, path, alphas=False)
    check_pipeline(sd, (path, 1.0))
    (addition,) = merged(sd, (path, 0.5)).additions
    assert addition.text == "LoRA k.safetensors, weight 0.5"
    assert addition.notes == (
        "k.safetensors states no alpha: taken to be the rank, so that its weight counts in full",
    )
    kohya_file(rng, sd, path)
    assert merged(sd, (path, 1.0)).additions[0].notes == ()


def test_the_older_prefix_of_the_text_encoder_and_fp16(sd, tmp_path, rng):
    tensors = kohya_file(rng, sd, tmp_path / "k.safetensors", alphas=2.0)
    older = {n.replace("lora_te1_", "lora_te_"): t.astype(np.float16) for n, t in tensors.items()}
    save_file(older, tmp_path / "older.safetensors")
    assert all(check_pipeline(sd, (tmp_path / "older.safetensors", 1.0)).values())


def test_filters_of_one_pixel_are_matrices_and_the_other_way_round(sd, xl, tmp_path, rng):
    """Files made with linear projections around attention fit a model with convolutions there."""
    for folder in (sd, xl):
        path = tmp_path / f"{folder.name}.safetensors"
        module, shape = next(m for m in layers(folder, "unet").items() if m[0].endswith("proj_in"))
        down, up = floats(rng, 2, shape[1]), floats(rng, shape[0], 2)
        flat = "lora_unet_" + module.replace(".", "_")
        ones = (1, 1) if len(shape) == 2 else ()
        file = {"lora_down.weight": down, "lora_up.weight": up}
        save_file({f"{flat}.{k}": v.reshape(*v.shape, *ones) for k, v in file.items()}, path)
        found = Tensors(merged(folder, (path, 1.0)), "unet")[f"{module}.weight"]
        base = Tensors(open_checkpoint(folder), "unet")[f"{module}.weight"]
        assert np.abs(found - base - (up @ down).reshape(shape)).max() <= CLOSE


# --- diffusers and PEFT -------------------------------------------------------------------------


def adapter(kind, **options):
    targets = (*ATTENTION[:4], "conv1", "conv_in", "proj_in", "ff.net.2")
    if options.get("lora_bias"):  # PEFT merges it only where there is a bias
        targets = targets[3:]
    return kind(target_modules=list(targets), **options)


LORAS = {
    "plain": {"r": 3, "lora_alpha": 5},
    "by layer": {
        "r": 3,
        "lora_alpha": 5,
        "rank_pattern": {"attn1.to_q": 2, "^conv_in": 4},
        "alpha_pattern": {"attn1.to_q": 1.5, "up_blocks.1.attentions.0.proj_in": 7},
    },
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 3, "lora_alpha": 2, "use_dora": True},
    "biases": {"r": 2, "lora_alpha": 3, "lora_bias": True},
}


def trained_unet(folder, config, wrap=True):
    """The U-Net with an adapter of random weights, as PEFT's model or as diffusers'."""
    import diffusers

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        if wrap:
            model = peft.get_peft_model(model, config)
        else:
            model.add_adapter(config)
    for name, value in model.named_parameters():
        if "lora_magnitude_vector" in name:
            value.data *= 1 + torch.rand_like(value) / 2
        elif any(part in name for part in ("lora_", "hada_", "lokr_")):
            value.data.normal_(std=0.3)
    return model


def save_from_diffusers(folder, tmp_path, options):
    """A file as `save_lora_weights` writes it, with its metadata."""
    import diffusers

    config = adapter(peft.LoraConfig, **options)
    model = trained_unet(folder, config, wrap=False)
    said = {"target_modules": sorted(config.target_modules), **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=peft.get_peft_model_state_dict(model),
            unet_lora_adapter_metadata=said,
        )
    return tmp_path / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("name", LORAS)
def test_diffusers_own_files(xl, tmp_path, name):
    path = save_from_diffusers(xl, tmp_path, LORAS[name])
    assert check_pipeline(xl, (path, 0.7))["unet"] > 10


@pytest.mark.parametrize("name", LORAS)
def test_peft_folders(sd, tmp_path, name):
    check_peft(sd, tmp_path, trained_unet(sd, adapter(peft.LoraConfig, **LORAS[name])))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lambda: adapter(peft.LoHaConfig, r=3, alpha=2), id="LoHa"),
        pytest.param(
            lambda: adapter(peft.LoHaConfig, r=2, alpha=5, use_effective_conv2d=True),
            id="LoHa, Tucker",
        ),
        pytest.param(lambda: adapter(peft.LoKrConfig, r=1, alpha=2, init_weights=False), id="LoKr"),
        pytest.param(lambda: adapter(peft.LoKrConfig, r=64, alpha=2), id="LoKr, whole"),
        pytest.param(
            lambda: adapter(
                peft.LoKrConfig,
                r=1,
                alpha=3,
                use_effective_conv2d=True,
                decompose_both=True,
                decompose_factor=4,
                alpha_pattern={"attn1.to_q": 2},
            ),
            id="LoKr, Tucker, both",
        ),
    ],
)
def test_peft_folders_of_products(sd, tmp_path, config):
    check_peft(sd, tmp_path, trained_unet(sd, config()))


def check_peft(folder, tmp_path, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    assert all(name.startswith("base_model.model.") for name in load_file(path))
    expected = state_of(model.merge_and_unload())
    checkpoint = merged(folder, (path, 1.0))
    assert check_equal(checkpoint, "unet", expected) > 10
    assert not any("states no alpha" in note for note in checkpoint.additions[0].notes)


@pytest.mark.parametrize("style", ["processors", "linear layers"])
def test_older_names_of_diffusers(sd, tmp_path, rng, style):
    """Attention processors and `lora_linear_layer`, from before PEFT."""
    tensors = {}
    for component in components(sd):
        for module, shape in layers(sd, component, kinds=(2,)).items():
            if not module.endswith(ATTENTION):
                continue
            down, up = pair(rng, shape, 2)
            path = DOTTED[component] + module
            if component == "unet":
                path = path.replace(".to_", ".processor.to_").replace("to_out.0", "to_out")
                path += "_lora"
            elif style == "processors":
                for new, old in names_of_attention.items():
                    path = path.replace(new, old)
                path += "_lora"
            else:
                path += ".lora_linear_layer"
            tensors |= {f"{path}.down.weight": down, f"{path}.up.weight": up}
    save_file(tensors, tmp_path / "old.safetensors")
    changed = check_pipeline(sd, (tmp_path / "old.safetensors", 0.9))
    assert sum(changed.values()) == len(tensors) // 2


names_of_attention = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "out_proj": "to_out",
}


def test_names_without_a_component(sd, xl, tmp_path, rng):
    """A U-Net's layers are only there; a layer of both text encoders is neither's."""
    for folder in (sd, xl):
        module, shape = next(iter(layers(folder, "unet", kinds=(2,)).items()))
        down, up = pair(rng, shape, 1)
        path = tmp_path / "bare.safetensors"
        save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, path)
        assert list(merged(folder, (path, 1.0)).patches) == ["unet"]
    shared = "text_model.encoder.layers.0.mlp.fc1"
    down, up = pair(rng, layers(sd, "text_encoder")[shared], 1)
    save_file({f"{shared}.lora_A.weight": down, f"{shared}.lora_B.weight": up}, path)
    assert list(merged(sd, (path, 1.0)).patches) == ["text_encoder"]
    assert "is a layer of text_encoder and of text_encoder_2" in refused(xl, path)


# --- LyCORIS ------------------------------------------------------------------------------------


def lycoris_layers(folder):
    """One layer of each kind: linear, 3x3, 1x1 and the text encoder's."""
    unet, text = layers(folder, "unet"), layers(folder, "text_encoder")
    ends = ("attn2.to_k", "resnets.0.conv1", "attentions.0.proj_in")
    chosen = [("unet", next(m for m in unet if m.endswith(end))) for end in ends]
    return [*chosen, ("text_encoder", next(m for m in text if m.endswith("mlp.fc2")))]


LYCORIS = {
    "LoCon": ("LoConModule", {"lora_dim": 3, "alpha": 2.0}),
    "LoCon, Tucker": ("LoConModule", {"lora_dim": 3, "alpha": 2.0, "use_tucker": True}),
    "DoRA": ("LoConModule", {"lora_dim": 3, "alpha": 2.0, "weight_decompose": True}),
    "DoRA of columns": (
        "LoConModule",
        {"lora_dim": 3, "alpha": 2.0, "weight_decompose": True, "wd_on_out": False},
    ),
    "rsLoRA": ("LoConModule", {"lora_dim": 4, "alpha": 2.0, "rs_lora": True}),
    "LoHa": ("LohaModule", {"lora_dim": 3, "alpha": 2.0}),
    "LoHa, Tucker, DoRA": (
        "LohaModule",
        {"lora_dim": 3, "alpha": 2.0, "use_tucker": True, "weight_decompose": True},
    ),
    "LoKr": ("LokrModule", {"lora_dim": 1, "alpha": 2.0, "factor": 4}),
    "LoKr, Tucker, both": (
        "LokrModule",
        {"lora_dim": 1, "alpha": 2.0, "factor": 4, "use_tucker": True, "decompose_both": True},
    ),
    "LoKr, whole": ("LokrModule", {"lora_dim": 1000, "alpha": 2.0, "full_matrix": True}),
    "LoKr, DoRA": (
        "LokrModule",
        {"lora_dim": 2, "alpha": 1.0, "factor": 2, "weight_decompose": True, "wd_on_out": False},
    ),
}


def torch_layer(weight):
    outputs, inputs, *side = weight.shape
    if side:
        layer = torch.nn.Conv2d(inputs, outputs, side, padding=side[0] // 2, bias=False)
    else:
        layer = torch.nn.Linear(inputs, outputs, bias=False)
    layer.weight.data = torch.from_numpy(weight)
    return layer


@pytest.mark.parametrize("name", LYCORIS)
@torch.no_grad()
def test_lycoris(sd, tmp_path, name):
    """Its modules, filled with random numbers, save the file; what they merge is the reference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = pytest.importorskip("lycoris.modules")
    kind, options = LYCORIS[name]
    torch.manual_seed(0)
    tensors, expected = {}, {}
    for component, path in lycoris_layers(sd):
        weight = Tensors(open_checkpoint(sd), component)[f"{path}.weight"]
        module = getattr(modules, kind)("x", torch_layer(weight), **options)
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
        if module.wd:
            module.dora_scale.abs_().add_(0.5)
        flat = KOHYA[component] + path.replace(".", "_")
        tensors |= {f"{flat}.{k}": v.numpy() for k, v in module.custom_state_dict().items()}
        # the forward pass of LoHa and LoKr counts their scale once, their own merging twice
        delta = getattr(module, "get_weight", None)
        total = torch.from_numpy(weight) + (
            delta(module.shape) if delta else module.get_diff_weight(shape=module.shape)[0]
        )
        expected[component, f"{path}.weight"] = (
            module.apply_weight_decompose(total) if module.wd else total
        )
    save_file(tensors, tmp_path / "l.safetensors")
    checkpoint = merged(sd, (tmp_path / "l.safetensors", 1.0))
    assert sum(map(len, checkpoint.patches.values())) == len(expected)
    for (component, tensor), value in expected.items():
        found = Tensors(checkpoint, component)[tensor]
        assert np.abs(found - value.numpy()).max() <= CLOSE, (component, tensor)


def test_whole_differences_of_weights_biases_and_norms(sd, tmp_path, rng):
    base = Tensors(open_checkpoint(sd), "unet")
    module, norm = "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.norm1"
    added = {
        f"{module}.weight": floats(rng, *base.shape(f"{module}.weight")),
        f"{module}.bias": floats(rng, *base.shape(f"{module}.bias")),
        f"{norm}.weight": floats(rng, *base.shape(f"{norm}.weight")),
        f"{norm}.bias": floats(rng, *base.shape(f"{norm}.bias")),
    }
    ends = ("diff", "diff_b", "w_norm", "b_norm")
    flat = [f"lora_unet_{path.replace('.', '_')}" for path in (module, module, norm, norm)]
    file = {f"{f}.{end}": v for f, end, v in zip(flat, ends, added.values(), strict=True)}
    save_file(file, tmp_path / "full.safetensors")
    found = Tensors(merged(sd, (tmp_path / "full.safetensors", 0.5)), "unet")
    for name in base:
        expected = base[name] + 0.5 * added.get(name, 0)
        assert np.abs(found[name] - expected).max() <= CLOSE, name


def test_a_bias_beside_a_pair(sd, tmp_path, rng):
    module = "mid_block.attentions.0.proj_out"
    base = Tensors(open_checkpoint(sd), "unet")
    shape = base.shape(f"{module}.weight")
    down, up = pair(rng, shape, 2)
    bias = floats(rng, shape[0])
    flat = "lora_unet_" + module.replace(".", "_")
    file = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.float32(1), "diff_b": bias}
    save_file({f"{flat}.{k}": np.asarray(v) for k, v in file.items()}, tmp_path / "b.safetensors")
    found = Tensors(merged(sd, (tmp_path / "b.safetensors", 2.0)), "unet")
    delta = (up.reshape(-1, 2) @ down.reshape(2, -1)).reshape(shape)  # 2.0 * alpha / rank is 1
    assert np.abs(found[f"{module}.weight"] - base[f"{module}.weight"] - delta).max() <= CLOSE
    assert np.abs(found[f"{module}.bias"] - base[f"{module}.bias"] - 2 * bias).max() <= CLOSE


# --- several ------------------------------------------------------------------------------------


def test_several_add_up_in_the_order_given(sd, tmp_path, rng):
    """With DoRA the order matters: it scales what was merged before, and not what comes after."""
    one, two = tmp_path / "k.safetensors", save_from_diffusers(sd, tmp_path, LORAS["dora"])
    kohya_file(rng, sd, one, alphas=3.0)
    for files in ([(one, 0.4), (two, 1.0)], [(two, 0.7), (one, 0.4)], [(one, 0.5), (one, 0.5)]):
        check_pipeline(sd, *files)
    ahead, behind = (
        Tensors(merged(sd, *files), "unet")["conv_in.weight"]
        for files in ([(one, 0.4), (two, 1.0)], [(two, 1.0), (one, 0.4)])
    )
    assert np.abs(ahead - behind).max() > 0.01
    hashes = {
        source_hash(merged(sd, *files))
        for files in ([], [(one, 1.0)], [(one, 0.5)], [(one, 1.0), (two, 1.0)], [(two, 1.0)])
    }
    assert len(hashes) == 5


def test_merging_reads_no_weights(sd, tmp_path, rng, monkeypatch):
    """What a tensor gets is read with that tensor; of the others nothing is."""
    path = tmp_path / "k.safetensors"
    kohya_file(rng, sd, path, alphas=False)
    seen = []
    read = lora.read_finite
    monkeypatch.setattr(lora, "read_finite", lambda n, s: seen.append(n) or read(n, s))
    checkpoint = merged(sd, (path, 1.0))
    assert seen == []
    tensors = Tensors(checkpoint, "unet")
    assert tensors.shape("conv_in.weight") == (16, 4, 3, 3)
    first, again = tensors["conv_in.weight"], tensors["conv_in.weight"]
    assert np.array_equal(first, again)
    assert sorted(set(seen)) == [
        "lora_unet_conv_in.lora_down.weight",
        "lora_unet_conv_in.lora_up.weight",
    ]


def test_a_row_of_zeros_has_no_direction(sd, tmp_path):
    """DoRA divides by the length of a row."""
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    base = Tensors(open_checkpoint(sd), "unet")[f"{module}.weight"]
    flat = f"lora_unet_{module.replace('.', '_')}"
    diff = np.zeros_like(base)
    diff[3] = -base[3]
    file = {f"{flat}.diff": diff, f"{flat}.dora_scale": np.ones((len(base), 1), np.float32)}
    save_file(file, tmp_path / "d.safetensors")
    found = Tensors(merged(sd, (tmp_path / "d.safetensors", 1.0)), "unet")[f"{module}.weight"]
    lengths = np.linalg.norm(found, axis=1)
    assert lengths[3] == 0
    assert np.allclose(np.delete(lengths, 3), 1, atol=CLOSE)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_single_files_have_the_same_layers(tmp_path, rng, family):
    """The original naming of the checkpoint changes nothing."""
    folder = write_checkpoint(tmp_path / "folder", SMALL[family], torch.float16)
    single = write_single(tmp_path / "single.safetensors", SMALL[family], torch.float16)
    path = tmp_path / "k.safetensors"
    kohya_file(rng, folder, path)
    for component in components(folder):
        one, other = (Tensors(merged(c, (path, 1.0)), component) for c in (folder, single))
        for name in one:
            assert np.array_equal(one[name], other[name]), name


# --- what is refused ----------------------------------------------------------------------------


def refused(folder, *paths):
    """The one line about a file."""
    with pytest.raises(CheckpointError) as caught:
        merged(folder, *((path, 1.0) for path in paths))
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 800
    return line


@pytest.fixture
def file(sd, tmp_path, rng):
    """A good file, what it holds, and a way to write that back."""
    path = tmp_path / "ink.safetensors"
    tensors = kohya_file(rng, sd, path)
    return path, tensors, lambda: save_file(tensors, path)


CONV = "lora_unet_conv_in"
ATTN2 = "transformer_blocks_0_attn2_to_k"
MID = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(name, *shape):
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


def whole(name, *shape):
    return lambda tensors: tensors.update({name: np.ones(shape, np.int32)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename(f"{CONV}.alpha", "lora_unet_conv_inn.alpha"), "conv_inn.alpha (no such layer)"),
        (put(f"{CONV}.weight", 3), "1 of its 280 tensors do not apply: lora_unet_conv_in.weight"),
        (put(f"{CONV}.weight", 3), "lora_unet_conv_in.weight (is no part of a LoRA); a LoRA is"),
        (lambda t: t.pop(f"{CONV}.lora_up.weight"), "its layer has no up"),
        (lambda t: t.pop(f"{CONV}.lora_down.weight"), "its layer has no down"),
        (put(f"{CONV}.lora_up.weight", 16, 9, 1, 1), "its parts are of rank 9 and"),
        (put(f"{CONV}.lora_up.weight", 15, 3, 1, 1), "is for 15 x 36, the layer is 16 x 36"),
        (put(f"{CONV}.lora_down.weight"), "() is the shape of no matrix"),
        (put(f"{CONV}.alpha", 2), "alpha is of shape (2,), not one number"),
        (lambda t: t.update({f"{CONV}.alpha": np.zeros((), np.float32)}), "alpha is 0"),
        (lambda t: t.pop(f"{CONV}.alpha"), "for 92 of its 93 layers and not for conv_in"),
        (put(f"{CONV}.dora_scale", 3, 1, 1, 1), "has lengths of shape (3, 1, 1, 1)"),
        (put(f"{CONV}.hada_w1_a", 3, 1), "is of two kinds at once"),
        (put(f"{CONV}.hada_t1", 3, 1), "its layer has a stray hada_t1"),
        (put(f"{MID}.diff_b", 32), "the layer has no bias"),
        (put(f"{CONV}.diff_b", 15), "is (15,), the layer's bias is (16,)"),
        (put("lora_unet_conv_norm_out.lora_mid.weight", 3), "is without the rest of its layer"),
        (put("lora_unet_conv_norm_out.diff", 8), "is for 8 x 1, the layer is 16 x 1"),
        (put("lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha"), "has no text_encoder_2"),
        (put("unet.conv_in.lora_A.weight", 3, 4, 3, 3), "is there twice, also as"),
        (put(f"{MID}.oft_blocks", 3, 3), "OFT is not supported"),
        (put(f"{MID}.a1.weight", 3, 3), "GLoRA is not supported"),
        (whole(f"{CONV}.lora_up.weight", 16, 3, 1, 1), "is I32, not a weight"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)  # fmt: skip
def test_every_tensor_applies_or_is_named(sd, file, change, said):
    path, tensors, write = file
    tensors[f"{CONV}.lora_down.weight"] = np.ones((3, 4, 3, 3), np.float32)
    tensors[f"{CONV}.lora_up.weight"] = np.ones((16, 3, 1, 1), np.float32)
    change(tensors)
    write()
    line = refused(sd, path)
    assert said in line
    assert "ink.safetensors" in line


def test_many_leftovers_are_counted_and_the_first_named(sd, file):
    path, tensors, write = file
    for name in list(tensors):
        if "_up_blocks_" in name:
            tensors[name.replace("_up_blocks_", "_top_blocks_")] = tensors.pop(name)
    write()
    line = refused(sd, path)
    count = sum("_top_" in name for name in tensors)
    assert f"{count} of its {len(tensors)} tensors do not apply" in line
    assert f"and {count - 4} more; a LoRA is merged as a whole or not at all" in line


@pytest.mark.parametrize(
    ("made", "name", "width"),
    [
        ("sdxl", f"lora_unet_input_blocks_4_1_{ATTN2}.lora_down.weight", 2048),
        ("sd2", f"unet.down_blocks.0.attentions.0.{ATTN2}.lora_A.weight", 1024),
        ("sd2", f"lora_unet_down_blocks_0_attentions_0_{ATTN2}.hada_w1_b", 1024),
        ("sdxl", "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", 1280),
        ("Flux", "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", 3072),
        ("Flux", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", 3072),
        ("Stable Diffusion 3", "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", 1536),
    ],
)  # fmt: skip
def test_another_familys_is_told_by_its_layers(tmp_path, made, name, width):
    configs = TINY | {
        "unet": TINY["unet"] | {"cross_attention_dim": 768},
        "text_encoder": TINY["text_encoder"] | {"hidden_size": 768, "num_attention_heads": 2},
    }
    folder = write_checkpoint(tmp_path / "sd1", configs, torch.float16)
    path = tmp_path / "other.safetensors"
    save_file({name: np.ones((4, width), np.float16)}, path)
    line = refused(folder, path)
    assert f"it is for {made}, the checkpoint is sd1: take a LoRA that is for sd1" in line


def test_what_is_no_file_of_tensors(sd, tmp_path):
    path = tmp_path / "x.safetensors"
    assert "is not a file; give a LoRA as safetensors" in refused(sd, path)
    assert "is not a file" in refused(sd, tmp_path)
    path.write_bytes(b"\x80\x04}q\x00.")
    assert "can run code when read" in refused(sd, path)
    path.write_bytes(b"")
    assert "is empty" in refused(sd, path)
    path.write_bytes((10**12).to_bytes(8, "little") + b"{}")
    assert "the header claims" in refused(sd, path)


def test_a_header_whose_length_begins_like_a_pickle(sd, tmp_path):
    path = tmp_path / "x.safetensors"
    entry = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    header = json.dumps({f"{CONV}.diff_b": entry}).ljust(0x80).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    assert path.read_bytes()[:1] == b"\x80"
    assert list(merged(sd, (path, 1.0)).patches["unet"]) == ["conv_in.bias"]


def test_a_zipped_checkpoint_of_torch_is_read_without_executing_it(sd, file, tmp_path):
    path, tensors, _ = file
    torch.save(
        {name: torch.from_numpy(value) for name, value in tensors.items()}, tmp_path / "k.pt"
    )
    found, expected = (
        Tensors(merged(sd, (p, 1.0)), "unet")["conv_in.weight"] for p in (tmp_path / "k.pt", path)
    )
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_values_are_named_when_they_are_read(sd, file, value):
    path, tensors, write = file
    tensors[f"{CONV}.lora_down.weight"][0, 0, 0, 0] = value
    write()
    with pytest.raises(CheckpointError, match=r"conv_in.lora_down.weight has 1 NaN or Inf of"):
        Tensors(merged(sd, (path, 1.0)), "unet")["conv_in.weight"]


def test_a_weight_that_leaves_float32(sd, file):
    path, *_ = file
    with pytest.raises(CheckpointError, match=r"ink.safetensors: .* reaches beyond float32"):
        Tensors(merged(sd, (path, 1e41)), "unet")["conv_in.weight"]


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ("[1]", "the adapter's configuration is no object"),
        ("{", "the adapter's configuration is not JSON"),
        ({"unet.r": 3, "unet.lora_alpha": "big"}, "configuration has lora_alpha 'big'"),
        ({"unet.r": -3, "unet.lora_alpha": 3}, "the adapter's configuration has r -3"),
        (
            {"unet.r": 3, "unet.lora_alpha": 3, "unet.alpha_pattern": {"(a+)+b": 3}},
            "alpha_pattern has '(a+)+b': only names of layers are supported",
        ),
        ({"unet.r": 3, "unet.lora_alpha": 3, "unet.alpha_pattern": [3]}, "has alpha_pattern [3]"),
    ],
)  # fmt: skip
def test_a_configuration_is_others_words(sd, tmp_path, rng, metadata, said):
    down, up = pair(rng, (16, 4, 3, 3), 3)
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(
        {"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up},
        tmp_path / "m.safetensors",
        {"lora_adapter_metadata": text},
    )
    assert said in refused(sd, tmp_path / "m.safetensors")


# --- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("ink.safetensors", "ink.safetensors", None),
        ("ink.safetensors:0.8", "ink.safetensors", 0.8),
        ("ink.safetensors:-1e-1", "ink.safetensors", -0.1),
        ("C:ink.safetensors", "C:ink.safetensors", None),
        ("C:\\models\\ink.safetensors", "C:\\models\\ink.safetensors", None),
        ("C:\\models\\ink.safetensors:0.5", "C:\\models\\ink.safetensors", 0.5),
        ("C:/models/ink.safetensors", "C:/models/ink.safetensors", None),
    ],
)
def test_a_weight_follows_a_colon(text, path, weight):
    found, number = cli.Weight().convert(text, None, None)
    assert (str(found), number) == (path, weight)


def test_a_file_may_have_a_colon_in_its_name(tmp_path):
    path = tmp_path / "a:0.5"
    path.write_bytes(b"x")
    assert cli.Weight().convert(str(path), None, None) == (path, None)
    assert cli.Weight().convert(f"{path}:2", None, None) == (path, 2.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [("x:big", "weight 'big' is not a number"), ("x:nan", "not finite"), ("x:", "''")],
)
def test_a_weight_that_is_none_is_a_usage_error(tmp_path, text, said):
    command = ["convert", str(tmp_path), "--lora", f"{tmp_path}/{text}"]
    done = CliRunner().invoke(cli.main, command)
    assert done.exit_code == 2
    assert said in done.output


def test_the_command_refuses_before_it_writes(sd, tmp_path):
    out = tmp_path / "out.ferro"
    command = ["convert", str(sd), "-o", str(out), "--lora", str(tmp_path / "none.safetensors")]
    done = CliRunner().invoke(cli.main, command)
    assert done.exit_code == 1
    assert "none.safetensors is not a file; give a LoRA as safetensors" in done.output
    assert not out.exists()
