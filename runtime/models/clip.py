"""CLIP's text model, as OpenAI's ViT-L and OpenCLIP's H and bigG; transformers' names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...kernels import Type
from ..program import GraphError, Net, Value
from .blocks import activation

OLD_EOS = 2  # in configs of before transformers 4.31; there the end token is the largest id


def text_encoder(net: Net, config: Mapping[str, Any], outputs: Collection[str]) -> None:
    """input_ids (1, tokens) -> states (1, tokens, c) and a pooled one (1, c), as `outputs` name.

    `last_hidden_state` and `pooler_output` are normed, `text_embeds` is the pooled one projected,
    `hidden_states.<n>` what goes into layer n.
    """
    layers = config.get("num_hidden_layers", 12)
    hidden = [f"hidden_states.{n}" for n in range(1, layers)]
    known = {"last_hidden_state", "pooler_output", "text_embeds", *hidden}
    if unknown := sorted(set(outputs) - known):
        raise GraphError(f"text encoder: no output {unknown[0]}, only {', '.join(sorted(known))}")
    tokens = config.get("max_position_embeddings", 77)
    ids = net.number_input("input_ids", (1, tokens), Type.I32)
    x = _embeddings(net, config, ids, tokens)
    x = _layer(net, "text_model.encoder.layers.0", x, config)
    for i, name in enumerate(hidden, 1):
        if name in outputs:
            net.token_output(name, x)
            if set(outputs) == {name}:  # SDXL's first reads nothing of the last layer
                return
        x = _layer(net, f"text_model.encoder.layers.{i}", x, config)
    x = net.layer_norm("text_model.final_layer_norm", x, _eps(config))
    if "last_hidden_state" in outputs:
        net.token_output("last_hidden_state", x)
    pooled = net.pick("text_model.pooled", x, ids, _end_token(config))
    if "pooler_output" in outputs:
        net.vector_output("pooler_output", pooled)
    if "text_embeds" in outputs:
        width = config.get("projection_dim", 512)
        embeds = net.linear("text_projection", pooled, width, bias=False, type=Type.F32)
        net.vector_output("text_embeds", embeds)


def _embeddings(net: Net, config: Mapping[str, Any], ids: Value, tokens: int) -> Value:
    name = "text_model.embeddings"
    return net.embedding(
        name,
        ids,
        config.get("vocab_size", 49408),
        config.get("hidden_size", 512),
        f"{name}.token_embedding",
        f"{name}.position_embedding",
        tokens,
    )


def _layer(net: Net, name: str, x: Value, config: Mapping[str, Any]) -> Value:
    """x + causal attention, then x + two linear layers; (tokens, c) -> (tokens, c)."""
    heads = config.get("num_attention_heads", 8)
    act = activation("text encoder", config, "hidden_act", "quick_gelu")
    y = net.layer_norm(f"{name}.layer_norm1", x, _eps(config))
    attn = f"{name}.self_attn"
    q, k, v = net.project(attn, y, ("q_proj", "k_proj", "v_proj"), x.c, bias=True)
    y = net.attention(attn, q, k, v, heads, causal=True)
    x = net.linear(f"{attn}.out_proj", y, x.c, residual=x)
    y = net.layer_norm(f"{name}.layer_norm2", x, _eps(config))
    y = net.linear(f"{name}.mlp.fc1", y, config.get("intermediate_size", 2048), act=act)
    return net.linear(f"{name}.mlp.fc2", y, x.c, residual=x)


def _eps(config: Mapping[str, Any]) -> float:
    return config.get("layer_norm_eps", 1e-5)


def _end_token(config: Mapping[str, Any]) -> int:
    """The id of the token whose state is the pooled one; -1: the largest."""
    end = config.get("eos_token_id", 49407)
    if not isinstance(end, int):
        raise GraphError(f"text encoder: eos_token_id is {end!r}; only one is supported")
    return -1 if end == OLD_EOS else end
