"""What a folder's configurations may hold: a table of fields, checked before anything reads them.

They are downloaded like the weights: a number of layers can be a text, or so large that its network
would never be done.  Fields that nobody here reads are left to those who do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError

MAX_BLOCKS = 1000  # SDXL has 150 by the same count
MAX_LEVELS = 16  # resolutions of a network, and layers with a width of their own


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test."""

    said: str
    fits: Callable[[Any], bool]

    def or_null(self) -> Rule:
        return Rule(f"{self.said} or null", lambda v: v is None or self.fits(v))

    def or_list(self, depth: int = 1) -> Rule:
        """One for all levels, or a list with one for each; of lists, if `depth` is 2."""
        one = self.or_list(depth - 1) if depth > 1 else self
        return Rule(f"{self.said}, or a list of such", lambda v: one.fits(v) or _each(one, v))

    def list(self) -> Rule:
        return Rule(f"a list of 1 to {MAX_LEVELS}, each {self.said}", lambda v: _each(self, v))


def _each(rule: Rule, value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= MAX_LEVELS and all(map(rule.fits, value))


def whole(low: int, high: int) -> Rule:
    said = f"a whole number from {low:,} to {high:,}"
    return Rule(said, lambda v: type(v) is int and low <= v <= high)


def number(low: float, high: float) -> Rule:
    said = f"a number from {low:g} to {high:g}"
    return Rule(said, lambda v: type(v) in (int, float) and math.isfinite(v) and low <= v <= high)


WIDTH = whole(1, 1 << 16)
COUNT = whole(1, 128)  # of layers
TEXT = Rule("a text of up to 100 letters", lambda v: isinstance(v, str) and len(v) <= 100)
FLAG = Rule("true or false", lambda v: type(v) is bool)
TINY = number(1e-12, 1)

CLIP = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": COUNT,
    "num_attention_heads": whole(1, 1024),
    "max_position_embeddings": whole(3, 1 << 16),
    "vocab_size": whole(3, 1 << 20),
    "projection_dim": WIDTH,
    "hidden_act": TEXT,
    "layer_norm_eps": TINY,
    "eos_token_id": whole(0, 1 << 20),
    "bos_token_id": whole(0, 1 << 20).or_null(),
    "pad_token_id": whole(-1, 1 << 20).or_null(),
}
UNET = {
    "sample_size": WIDTH.or_list().or_null(),
    "in_channels": WIDTH,
    "out_channels": WIDTH,
    "block_out_channels": WIDTH.list(),
    "layers_per_block": COUNT.or_list(),
    "down_block_types": TEXT.list(),
    "up_block_types": TEXT.list(),
    "mid_block_type": TEXT.or_null(),
    "cross_attention_dim": WIDTH.or_list(),
    "transformer_layers_per_block": COUNT.or_list(2),
    "reverse_transformer_layers_per_block": COUNT.or_list(2).or_null(),
    "attention_head_dim": WIDTH.or_list(),
    "num_attention_heads": WIDTH.or_list().or_null(),
    "norm_num_groups": whole(1, 1024),
    "norm_eps": TINY,
    "act_fn": TEXT,
    "use_linear_projection": FLAG,
    "flip_sin_to_cos": FLAG,
    "freq_shift": number(-16, 16),
    "downsample_padding": whole(0, 1),
    "time_cond_proj_dim": WIDTH.or_null(),
    "time_embedding_dim": WIDTH.or_null(),
    "addition_embed_type": TEXT.or_null(),
    "addition_time_embed_dim": WIDTH.or_null(),
    "projection_class_embeddings_input_dim": WIDTH.or_null(),
}
VAE = {
    "_class_name": TEXT,
    "sample_size": WIDTH.or_list(),
    "in_channels": WIDTH,
    "out_channels": WIDTH,
    "latent_channels": WIDTH,
    "block_out_channels": WIDTH.list(),
    "encoder_block_out_channels": WIDTH.list(),
    "decoder_block_out_channels": WIDTH.list(),
    "num_encoder_blocks": COUNT.list(),
    "num_decoder_blocks": COUNT.list(),
    "layers_per_block": COUNT,
    "down_block_types": TEXT.list(),
    "up_block_types": TEXT.list(),
    "norm_num_groups": whole(1, 1024),
    "act_fn": TEXT,
    "scaling_factor": number(1e-6, 1e6),
    "force_upcast": FLAG,
    "mid_block_add_attention": FLAG,
    "use_quant_conv": FLAG,
    "use_post_quant_conv": FLAG,
}
SCHEDULER = {
    "_class_name": TEXT,
    "prediction_type": TEXT,
    "timestep_spacing": TEXT,
    "beta_schedule": TEXT,
    "beta_start": number(0, 1),
    "beta_end": number(0, 1),
    "num_train_timesteps": whole(2, 100_000),
    "original_inference_steps": whole(1, 100_000),
    "steps_offset": whole(0, 1000),
    "set_alpha_to_one": FLAG,
    "rescale_betas_zero_snr": FLAG,
    "timestep_scaling": number(0, 1e6),
    "use_karras_sigmas": FLAG.or_null(),
    "algorithm_type": TEXT,
    "solver_order": whole(1, 3),
}
TABLES: dict[str, Mapping[str, Rule]] = {
    "text_encoder": CLIP,
    "text_encoder_2": CLIP,
    "unet": UNET,
    "vae": VAE,
    "scheduler": SCHEDULER,
}


def check(part: str, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a field of a component or the scheduler that cannot be meant."""
    for field, rule in TABLES[part].items():
        if field in config and not rule.fits(config[field]):
            found = repr(config[field])[:100]
            raise CheckpointError(f"{part}: {field} is {found}; it must be {rule.said}")
    levels = len(config.get("block_out_channels", "1"))
    layers = _largest(config.get("layers_per_block", 1))
    depth = _largest(config.get("transformer_layers_per_block", 1))
    if (blocks := levels * (2 * layers + 1) * depth) > MAX_BLOCKS:
        raise CheckpointError(
            f"{part}: {levels} levels of up to {layers} layers and {depth} transformers each: that "
            f"may be {blocks:,} blocks, the limit is {MAX_BLOCKS:,}"
        )


def _largest(value: Any) -> int:
    return max(map(_largest, value)) if isinstance(value, list) else value
