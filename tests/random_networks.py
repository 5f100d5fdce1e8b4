"""Random models that hypothesis draws, and how many of them: FERROTYPE_EXAMPLES=20 for more."""

import os
from functools import partial

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ferrotype.runtime import models

PRECISIONS = [  # weights, activations
    ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"),
]  # fmt: skip
FEW_BITS = [
    ("w8", "bf16"),
    ("w8", "int8"),
    ("w4", "fp32"),
    ("w4", "fp16"),
]  # as random_bundles takes
MORE = int(os.environ.get("FERROTYPE_EXAMPLES", "1"))  # times as many examples
few = partial(settings, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))


def vae(channels, groups=4, **fields):
    """An AutoencoderKL's config."""
    return {
        "latent_channels": 4, "block_out_channels": channels, "layers_per_block": 1,
        "norm_num_groups": groups, "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels), **fields,
    }  # fmt: skip


@st.composite
def kl(draw):
    levels = draw(st.integers(2, 4))
    wide = st.sampled_from([16, 24, 32, 48, 96] if levels < 4 else [16, 24, 32])
    return vae(
        draw(st.lists(wide, min_size=levels, max_size=levels)),
        draw(st.sampled_from([2, 4, 8])),
        latent_channels=draw(st.sampled_from([3, 4, 16])),
        layers_per_block=draw(st.integers(1, 2)),
        mid_block_add_attention=draw(st.booleans()),
        use_quant_conv=draw(st.booleans()),
        use_post_quant_conv=draw(st.booleans()),
    )


@st.composite
def tiny(draw):
    """An AutoencoderTiny's config."""
    levels = draw(st.integers(2, 4))
    channels = [draw(st.sampled_from([16, 24, 64]))] * levels
    blocks = st.lists(st.integers(1, 2), min_size=levels, max_size=levels)
    return {
        "_class_name": models.TINY,
        "block_out_channels": channels,
        "encoder_block_out_channels": channels,
        "decoder_block_out_channels": channels,
        "num_encoder_blocks": draw(blocks),
        "num_decoder_blocks": draw(blocks),
    }


@st.composite
def unets(draw, text):
    """A U-Net's config; `text` are the channels of the text encoder."""
    levels = draw(st.integers(2, 3))
    channels = st.sampled_from([16, 32, 48])
    down = ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]
    up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1)
    return {
        "sample_size": 8,
        "cross_attention_dim": text,
        "attention_head_dim": draw(st.sampled_from([2, 4])),
        "norm_num_groups": draw(st.sampled_from([4, 8])),
        "block_out_channels": draw(st.lists(channels, min_size=levels, max_size=levels)),
        "layers_per_block": draw(st.integers(1, 2)),
        "down_block_types": down,
        "up_block_types": up,
    }


@st.composite
def configs(draw):
    """Of a whole model, as benchmarks.random_bundles takes them."""
    text = draw(st.sampled_from([32, 64]))
    autoencoder = draw(st.one_of(kl(), tiny()))
    latents = autoencoder.setdefault("latent_channels", 4)
    return {
        "text_encoder": {
            "vocab_size": 2048,
            "hidden_size": text,
            "intermediate_size": 2 * text,
            "num_hidden_layers": draw(st.integers(1, 2)),
            "num_attention_heads": 2,
            "max_position_embeddings": draw(st.sampled_from([32, 77])),
            "hidden_act": "quick_gelu",
        },
        "unet": draw(unets(text)) | {"in_channels": latents, "out_channels": latents},
        "vae": autoencoder,
    }
