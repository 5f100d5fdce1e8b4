"""The tables of names, against diffusers' own mapping of the original naming, key by key."""

import pytest
from diffusers.loaders import single_file_utils as theirs

from ferrotype.benchmarks.checkpoints import SD15, SDXL, SMALL, _on_meta
from ferrotype.convert import names

torch = pytest.importorskip("torch")
ARCHITECTURES = {"sd15": SD15, "sdxl full": SDXL, **SMALL}


class Key(str):
    """A name in place of a tensor: diffusers asks some for their shape."""

    shape = (1,)


@pytest.fixture(params=ARCHITECTURES)
def configs(request):
    return ARCHITECTURES[request.param]


def original_names(table, module):
    """What every tensor of a module is called in the original; the table goes both ways."""
    inverse = names.inverse(table)
    found = {names.rename(inverse, name): Key(name) for name in module.state_dict()}
    assert None not in found
    assert len(found) == len(module.state_dict())
    assert all(names.rename(table, old) == new for old, new in found.items())
    return found


def test_the_unets_names_are_diffusers(configs):
    module = _on_meta("UNet2DConditionModel", configs["unet"])
    found = original_names(names.unet(module.config), module)
    found = {f"model.diffusion_model.{old}": new for old, new in found.items()}
    mapped = theirs.convert_ldm_unet_checkpoint(found, module.config)
    known = {n for n in module.state_dict() if "cond_proj" not in n}  # which diffusers drops
    assert mapped == {name: name for name in known}


def test_the_autoencoders_names_are_diffusers(configs, monkeypatch):
    monkeypatch.setattr(theirs, "conv_attn_to_linear", lambda mapped: None)
    module = _on_meta("AutoencoderKL", configs["vae"])
    found = original_names(names.vae(module.config), module)
    found = {f"first_stage_model.{old}": new for old, new in found.items()}
    mapped = theirs.convert_ldm_vae_checkpoint(found, module.config)
    assert mapped == {name: name for name in module.state_dict()}


@pytest.mark.parametrize("layers", [1, 3])
def test_open_clips_names_are_diffusers(layers):
    width = 4
    rows = {f"transformer.resblocks.{i}.{old}": i for i in range(layers) for old in LAYER}
    values = {
        name: torch.randn(3 * width, width) if "in_proj" in name else torch.randn(width, width)
        for name in [*rows, *names.OPEN_CLIP, "token_embedding.weight"]
        if name not in ("token_embedding", "ln_final")
    }
    values |= {f"ln_final.{kind}": torch.randn(width) for kind in ("weight", "bias")}
    whole = {f"conditioner.embedders.1.model.{name}": v for name, v in values.items()}
    mapped = theirs.convert_open_clip_checkpoint(None, whole, "conditioner.embedders.1.model.")
    table, found = names.open_clip(layers), {}
    for name, value in values.items():
        for new, place in names.parts(names.rename(table, name)):
            found[new] = value if place is None else value[place * width : (place + 1) * width]
            if new == names.TRANSPOSED:
                found[new] = value.T
    assert found.keys() == mapped.keys()
    assert all(torch.equal(found[name], mapped[name]) for name in found)


LAYER = [
    *(f"{norm}.{kind}" for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")),
    *(f"{part}.{kind}" for part in ("mlp.c_fc", "mlp.c_proj") for kind in ("weight", "bias")),
    *("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"),
]


def test_a_name_that_no_row_has_is_none():
    table = names.unet(SD15["unet"] | {"layers_per_block": 2})
    assert names.rename(table, "input_blocks.1.0.in_layers.2.weight") == (
        "down_blocks.0.resnets.0.conv1.weight"
    )
    assert names.rename(table, "input_blocks.1.1.transformer_blocks.0.attn1.to_q") == (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    )
    for name in ("input_blocks.12.0.in_layers.2.weight", "input_blocks", "", "conv_in.weight"):
        assert names.rename(table, name) is None


PUBLISHED = {  # of the files that everyone has
    "sd15": {
        "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks.11.0.out_layers.3": "down_blocks.3.resnets.1.conv2",
        "middle_block.2.emb_layers.1": "mid_block.resnets.1.time_emb_proj",
        "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
        "output_blocks.11.0.skip_connection": "up_blocks.3.resnets.2.conv_shortcut",
        "output_blocks.11.1.proj_out": "up_blocks.3.attentions.2.proj_out",
    },
    "sdxl full": {
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.6.0.op": "down_blocks.1.downsamplers.0.conv",
        "input_blocks.8.1.transformer_blocks.9": "down_blocks.2.attentions.1.transformer_blocks.9",
        "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.8.0.in_layers.2": "up_blocks.2.resnets.2.conv1",
    },
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_names_are_known(family):
    """diffusers reads some names in more places than the original has them."""
    config = ARCHITECTURES[family]["unet"]
    table = names.unet(config)
    assert {old: names.rename(table, old) for old in PUBLISHED[family]} == PUBLISHED[family]
    vae = names.vae(ARCHITECTURES[family]["vae"])
    assert names.rename(vae, "decoder.up.3.upsample.conv") == (
        "decoder.up_blocks.0.upsamplers.0.conv"
    )
    assert names.rename(vae, "decoder.up.0.block.2.conv1") == "decoder.up_blocks.3.resnets.2.conv1"
    assert names.rename(vae, "encoder.down.2.block.0.nin_shortcut") == (
        "encoder.down_blocks.2.resnets.0.conv_shortcut"
    )


def test_tiny_autoencoders_count_what_has_no_weights():
    """The original decoder begins with the clamping of latents, diffusers' does not."""
    assert names.rename(names.taesd("decoder", 19), "1.weight") == "decoder.layers.0.weight"
    assert names.rename(names.taesd("encoder", 15), "0.bias") == "encoder.layers.0.bias"
    assert names.rename(names.taesd("decoder", 19), "3.conv.2.bias") == (
        "decoder.layers.2.conv.2.bias"
    )
