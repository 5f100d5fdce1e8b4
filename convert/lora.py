"""LoRA files: differences to a checkpoint's weights, added to each tensor when it is read.

kohya and LyCORIS flatten a layer's path with underscores, which cannot be undone by looking at it;
so the paths of the checkpoint's own layers are flattened, by diffusers' names and by the original
ones, and a name of the file is looked up among them.  Names of diffusers and PEFT go the same way.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import names
from .checkpoint import (
    Addition,
    Checkpoint,
    CheckpointError,
    OptionError,
    Patch,
    Tensors,
    read_finite,
)
from .single import FAMILY_OF, open_file
from .storage import Stored, read_metadata

Shape = tuple[int, ...]
Patches = dict[str, dict[str, Patch]]  # by component, then by the tensor's name
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")  # those that LoRA files are made for
PREFIXES = {  # how a name begins -> its component; without one any component that has the layer
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "diffusion_model.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "lycoris_": "",
}
PEFT = "base_model.model."  # may stand before any of them
LORA = ("down", "up")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
ROLES = {  # how a name ends -> what the tensor is for its layer
    **{f".lora_{role}.weight": role for role in ("down", "up", "mid")},  # kohya
    **{f".lora.{role}.weight": role for role in LORA},  # diffusers
    **{f".lora_linear_layer.{role}.weight": role for role in LORA},
    **{f"_lora.{role}.weight": role for role in LORA},  # diffusers' attention processors
    ".lora_A.weight": "down",  # PEFT
    ".lora_B.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".dora_scale": "dora_scale",
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
    **{f".{role}": role for role in (*LOHA, *LOKR)},
}
REFUSED = {  # part of a name -> its kind, which is not one of sums of small matrices
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".on_input": "IA3",
    ".ia3_": "IA3",
    ".a1.weight": "GLoRA",
    ".vera_": "VeRA",
    ".lora_embedding_": "LoRA of an embedding table",
    ".lokr_t1": "LoKr with a core of its first factor",
    "lora_controlnet": "Control-LoRA",
    "bundle_emb": "a LoRA with embeddings inside",
}
OTHER_FAMILIES = {  # part of a flat name -> the family that has such layers
    "double_blocks": "Flux",
    "single_transformer_blocks": "Flux",
    "joint_blocks": "Stable Diffusion 3",
    "transformer_blocks_0_attn_add": "Stable Diffusion 3",
    "text_encoder_2": "sdxl",
    "lora_te2": "sdxl",
}
WIDTHS = FAMILY_OF | {2048: "sdxl"}  # of what cross attention reads
OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
SHOWN = 4  # names in an error


def merge(checkpoint: Checkpoint, path: Path | str, weight: float = 1.0) -> Checkpoint:
    """The checkpoint with a LoRA that is added, `weight` times, to its tensors as they are read.

    Raises CheckpointError for a file that does not apply as a whole.
    """
    path = Path(path)
    if not math.isfinite(weight):
        raise OptionError(f"{path.name}: weight {weight} is not a finite number")
    patches, notes = read(checkpoint, path, weight)
    merged = {component: dict(tensors) for component, tensors in checkpoint.patches.items()}
    for component, tensors in patches.items():
        mine = merged.setdefault(component, {})
        for name, patch in tensors.items():
            mine[name] = (*mine.get(name, ()), patch)
    addition = Addition(path, f"LoRA {path.name}, weight {weight:g}", notes)
    return dataclasses.replace(
        checkpoint, patches=merged, additions=(*checkpoint.additions, addition)
    )


def read(
    checkpoint: Checkpoint, path: Path, weight: float = 1.0
) -> tuple[Patches, tuple[str, ...]]:
    """What a LoRA adds to which tensors, and what to know of it; weights are not read yet.

    Raises CheckpointError, naming the tensors of the file, if any does not apply.
    """
    every = _parts(path)
    tensors = {c: Tensors(checkpoint, c) for c in COMPONENTS if c in checkpoint.configs}
    modules = {c: _modules(checkpoint, c, given) for c, given in tensors.items()}
    layers, problems = _layers(modules, every)
    configs = _configs(path, every)
    patches: Patches = {}
    silent = []  # layers whose alpha nobody states
    for layer in layers:
        try:
            patches.setdefault(layer.component, {}).update(
                _patches(path.name, layer, tensors[layer.component], weight, configs)
            )
        except ValueError as error:
            problems += [(part.name, str(error)) for part in layer.parts.values()]
        else:
            silent += [layer] if _is_silent(layer, configs) else []
    if problems:
        raise CheckpointError(_refusal(checkpoint, path, every, problems))
    scaled = [layer for layer in layers if _form(layer).rank(_shapes(layer)) is not None]
    if silent and len(silent) < len(scaled):
        raise CheckpointError(
            f"{path.name}: alpha is stated for {len(scaled) - len(silent)} of its {len(scaled)} "
            f"layers and not for {silent[0].module}: how much those count cannot be known; "
            "save it again with every alpha"
        )
    note = f"{path.name} states no alpha: taken to be the rank, so that its weight counts in full"
    return patches, (note,) if silent else ()


# --- the file -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A tensor of a file, read when it is asked for."""

    name: str
    stored: Stored

    @property
    def shape(self) -> Shape:
        return self.stored.shape

    def read(self) -> np.ndarray:
        """The tensor as float64."""
        return read_finite(self.name, self.stored).astype(np.float64)


Parts = Mapping[str, Part]  # of one layer by role, or of a file by name


@dataclass(frozen=True)
class Layer:
    """What a file holds for one layer of the checkpoint."""

    component: str
    module: str  # its path, as the checkpoint's tensors have it
    parts: dict[str, Part]


def _parts(path: Path) -> dict[str, Part]:
    """Every tensor of a file by name."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; give a LoRA as safetensors")
    parts = {name: Part(name, stored) for name, stored in open_file(path).items()}
    if not parts:
        raise CheckpointError(f"{path} holds no tensors; fetch it again")
    return parts


def _layers(
    modules: Mapping[str, Mapping[str, str]], every: Parts
) -> tuple[list[Layer], list[tuple[str, str]]]:
    """The file's tensors by layer of the checkpoint, and those that belong to none, with why."""
    found: dict[tuple[str, str], Layer] = {}
    problems = []
    for name, part in every.items():
        try:
            path, role = _split(name)
            if role != "alpha" and not part.stored.is_float:
                raise ValueError(f"is {part.stored.dtype}, not a weight")
            component, module = _find(modules, path)
        except ValueError as error:
            problems.append((name, str(error)))
            continue
        layer = found.setdefault((component, module), Layer(component, module, {}))
        if role in layer.parts:
            problems.append((name, f"is there twice, also as {layer.parts[role].name}"))
        layer.parts[role] = part
    return list(found.values()), problems


def _split(name: str) -> tuple[str, str]:
    """A name as the path of its layer and its role there."""
    for part, kind in REFUSED.items():
        if part in name:
            raise ValueError(f"{kind} is not supported")
    for suffix in sorted(ROLES, key=len, reverse=True):
        if name.endswith(suffix):
            return name.removesuffix(suffix), ROLES[suffix]
    raise ValueError("is no part of a LoRA")


def _find(modules: Mapping[str, Mapping[str, str]], path: str) -> tuple[str, str]:
    """The component and the module of the checkpoint that a path means."""
    path = path.removeprefix(PEFT).replace(".processor.", ".")
    components: Iterable[str] = modules
    for prefix, component in PREFIXES.items():
        if path.startswith(prefix):
            path = path.removeprefix(prefix)
            if component and component not in modules:
                raise ValueError(f"the checkpoint has no {component}")
            components = [component] if component else modules
            break
    flat = _flat(path)
    found = [(c, modules[c][flat]) for c in components if flat in modules[c]]
    if not found:
        raise ValueError("no such layer")
    if len(found) > 1:
        raise ValueError(f"is a layer of {' and of '.join(c for c, _ in found)}")
    return found[0]


def _modules(checkpoint: Checkpoint, component: str, tensors: Iterable[str]) -> dict[str, str]:
    """Every path that a file may give for a module, flat -> the path that the tensors have."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    original = names.inverse(names.unet(checkpoint.configs["unet"])) if component == "unet" else {}
    table = {_flat(module): module for module in modules}
    for module in modules:
        for other in _other_names(module, original):
            table.setdefault(_flat(other), module)
    return table


def _other_names(module: str, original: names.Table) -> Iterator[str]:
    """What other tools call a module: the original's path, CLIP's without or with its prefix."""
    if renamed := names.rename(original, module):
        yield renamed
    if module.endswith(".to_out.0"):  # as the attention processors had it
        yield module.removesuffix(".0")
    bare = module.removeprefix("text_model.")
    for plain in (bare, f"text_model.{bare}"):
        yield plain
        path, _, leaf = plain.rpartition(".")
        if leaf in OLD_ATTENTION:
            yield f"{path}.{OLD_ATTENTION[leaf]}"


def _flat(path: str) -> str:
    return path.replace(".", "_")


# --- what is added ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A way to write a difference as small matrices; a difference is (outputs, inputs * taps).

    `matrix` makes it of the parts; `shape` tells its shape from theirs, or raises ValueError;
    `rank` is what alpha is divided by, or None where there is no alpha.
    """

    needs: tuple[tuple[str, ...], ...]  # one of each
    may: tuple[str, ...]
    shape: Callable[[Mapping[str, Shape]], tuple[int, int]]
    rank: Callable[[Mapping[str, Shape]], int | None]
    matrix: Callable[[Mapping[str, np.ndarray]], np.ndarray]


def _core(core: np.ndarray, outputs: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """A Tucker decomposition: core (a, b, ...), outputs (a, o), inputs (b, i) -> (o, i * ...)."""
    flat = core.reshape(*core.shape[:2], -1)
    product = np.tensordot(outputs, np.tensordot(flat, inputs, (1, 0)), (0, 0))  # (o, taps, i)
    return product.transpose(0, 2, 1).reshape(outputs.shape[1], -1)


def _core_shape(core: Shape, outputs: Shape, inputs: Shape) -> tuple[int, int]:
    """Of the same: what `_core` returns."""
    _matrix(core)
    (a, rows), (b, columns) = _matrix(outputs), _matrix(inputs)
    _same_rank(core[0], a)
    _same_rank(core[1], b)
    return rows, columns * math.prod(core[2:])


def _product_shape(left: Shape, right: Shape) -> tuple[int, int]:
    (rows, rank), (other, columns) = _matrix(left), _matrix(right)
    _same_rank(rank, other)
    return rows, columns


def _matrix(shape: Shape) -> tuple[int, int]:
    """A shape as a matrix's: filters (outputs, inputs, 3, 3) are (outputs, inputs * 9)."""
    if len(shape) < 2:
        raise ValueError(f"{shape} is the shape of no matrix")
    return shape[0], math.prod(shape[1:])


def _column(shape: Shape) -> tuple[int, int]:
    """A shape as a matrix's; a vector is one of a single column."""
    return _matrix((*shape, 1) if len(shape) == 1 else shape)


def _same_rank(one: int, other: int) -> None:
    if one != other:
        raise ValueError(f"its parts are of rank {one} and {other}")


def _flattened(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)


def _lora_shape(shapes: Mapping[str, Shape]) -> tuple[int, int]:
    if "mid" in shapes:
        (outputs, rank), (other, inputs) = _matrix(shapes["up"]), _matrix(shapes["down"])
        return _core_shape(shapes["mid"], (rank, outputs), (other, inputs))
    return _product_shape(shapes["up"], shapes["down"])


def _lora(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    up, down = _flattened(parts["up"]), _flattened(parts["down"])
    return _core(parts["mid"], up.T, down) if "mid" in parts else up @ down


def _loha_shape(shapes: Mapping[str, Shape]) -> tuple[int, int]:
    if ("hada_t1" in shapes) != ("hada_t2" in shapes):
        raise ValueError("has one of hada_t1 and hada_t2")
    one, other = (
        _core_shape(shapes[f"hada_t{i}"], shapes[f"hada_w{i}_a"], shapes[f"hada_w{i}_b"])
        if f"hada_t{i}" in shapes
        else _product_shape(shapes[f"hada_w{i}_a"], shapes[f"hada_w{i}_b"])
        for i in (1, 2)
    )
    if one != other:
        raise ValueError(f"its factors are {one} and {other}")
    return one


def _loha(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The product, element by element, of two matrices of low rank."""
    one, other = (
        _core(parts[f"hada_t{i}"], parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"])
        if f"hada_t{i}" in parts
        else parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"]
        for i in (1, 2)
    )
    return one * other


def _lokr_shape(shapes: Mapping[str, Shape]) -> tuple[int, int]:
    sides = []
    for i in (1, 2):
        whole, factors = f"lokr_w{i}", (f"lokr_w{i}_a", f"lokr_w{i}_b")
        if (whole in shapes) == any(factor in shapes for factor in factors):
            raise ValueError(f"needs either {whole} or {factors[0]} and {factors[1]}")
        if whole in shapes:
            sides.append(_matrix(shapes[whole]))
        elif not all(factor in shapes for factor in factors):
            raise ValueError(f"has one of {factors[0]} and {factors[1]}")
        elif f"lokr_t{i}" in shapes:
            sides.append(_core_shape(shapes[f"lokr_t{i}"], *(shapes[f] for f in factors)))
        else:
            sides.append(_product_shape(*(shapes[f] for f in factors)))
    if "lokr_t2" in shapes and "lokr_w2" in shapes:
        raise ValueError("has both lokr_w2 and lokr_t2")
    (a, b), (c, d) = sides
    return a * c, b * d


def _lokr_rank(shapes: Mapping[str, Shape]) -> int | None:
    for factor in ("lokr_w2_b", "lokr_w1_b"):
        if factor in shapes:
            return shapes[factor][0]
    return None  # both are whole: LyCORIS then counts them in full


def _lokr(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The Kronecker product of two matrices; the taps of a filter belong to the second."""
    sides = []
    for i in (1, 2):
        if f"lokr_w{i}" in parts:
            sides.append(_flattened(parts[f"lokr_w{i}"]))
            continue
        a, b = parts[f"lokr_w{i}_a"], parts[f"lokr_w{i}_b"]
        core = parts.get(f"lokr_t{i}")
        sides.append(a @ b if core is None else _core(core, a, b))
    return np.kron(*sides)


FORMS = {
    "LoRA": Form((("down",), ("up",)), ("mid",), _lora_shape, lambda s: s["down"][0], _lora),
    "LoHa": Form(
        tuple((role,) for role in LOHA[:4]),
        LOHA[4:],
        _loha_shape,
        lambda s: s["hada_w1_b"][0],
        _loha,
    ),
    "LoKr": Form(
        (("lokr_w1", "lokr_w1_b"), ("lokr_w2", "lokr_w2_b")), LOKR, _lokr_shape, _lokr_rank, _lokr
    ),
    "full": Form(
        (("diff",),),
        (),
        lambda s: _column(s["diff"]),
        lambda s: None,
        lambda parts: _flattened(parts["diff"]),
    ),
}
BIAS = dataclasses.replace(FORMS["full"], needs=(), shape=lambda s: (0, 0))  # of no weight
BIASES = ("diff_b", "up_bias")
SCALES = ("alpha", "dora_scale", "magnitude")


def _form(layer: Layer) -> Form:
    """The form that the parts of a layer have; raises ValueError if there is none, or too many."""
    roles = set(layer.parts) - {*BIASES, *SCALES}
    if not roles and "diff_b" in layer.parts:
        return BIAS
    fits = [f for f in FORMS.values() if roles & {r for need in f.needs for r in need}]
    if len(fits) != 1:
        raise ValueError("is of two kinds at once" if fits else "is without the rest of its layer")
    form = fits[0]
    missing = [need[0] for need in form.needs if not roles.intersection(need)]
    if missing:
        raise ValueError(f"its layer has no {missing[0]}")
    if left := roles - {role for need in form.needs for role in need} - set(form.may):
        raise ValueError(f"its layer has a stray {min(left)}")
    return form


def _shapes(layer: Layer) -> dict[str, Shape]:
    return {role: part.shape for role, part in layer.parts.items()}


@dataclass(frozen=True)
class Difference:
    """A patch: values + scale * the difference, as float64; with DoRA rows of that get new lengths.

    They are multiplied by the file's length over that of base + scale * the difference, whatever
    was merged before, and the weight scales the difference alone: that is what PEFT merges.
    """

    source: str
    form: Form
    parts: dict[str, Part]
    scale: float
    magnitude: Part | None = None
    inputs: bool = False  # the lengths are those of columns

    def shape(self, shape: Shape) -> Shape:
        return shape

    def __call__(self, values: np.ndarray, base: np.ndarray) -> np.ndarray:
        matrix = self.form.matrix({role: part.read() for role, part in self.parts.items()})
        total = matrix.reshape(values.shape)
        total *= self.scale
        if self.magnitude is not None:
            factor = self._factor(total + base, self.magnitude.read())
            total += values
            total *= factor
        else:
            total += values
        if max(-total.min(), total.max()) > np.finfo(np.float32).max:
            raise CheckpointError(
                f"{self.source}: {next(iter(self.parts.values())).name} reaches beyond float32; "
                "use a smaller weight"
            )
        return total

    def _factor(self, alone: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
        """By what each row is multiplied."""
        axes = tuple(axis for axis in range(alone.ndim) if axis != int(self.inputs))
        norm = np.sqrt(np.square(alone).sum(axis=axes, keepdims=True))
        # a row of zeros has no direction, and stays
        return np.divide(magnitude.reshape(norm.shape), norm, where=norm > 0, out=norm)


def _patches(
    source: str, layer: Layer, tensors: Tensors, weight: float, configs: Configs
) -> Iterator[tuple[str, Patch]]:
    """The patches of a layer by tensor; raises ValueError if it does not fit the checkpoint's."""
    form, shapes, parts = _form(layer), _shapes(layer), layer.parts
    found = form.shape(shapes)
    scale = weight * _scale(form, layer, configs)
    if form is not BIAS:
        name = f"{layer.module}.weight"
        base = _base_shape(tensors, name)
        if found != _column(base):
            raise ValueError(f"is for {_by(found)}, the layer is {_by(_column(base))}")
        mine = {r: p for r, p in parts.items() if r not in (*BIASES, *SCALES)}
        yield name, Difference(source, form, mine, scale, *_magnitude(parts, base))
    for role in BIASES:
        if role in parts:
            name = f"{layer.module}.bias"
            base = _base_shape(tensors, name)
            if shapes[role] != base:
                raise ValueError(f"is {shapes[role]}, the layer's bias is {base}")
            times = scale if role == "up_bias" else weight
            yield name, Difference(source, FORMS["full"], {"diff": parts[role]}, times)


def _base_shape(tensors: Tensors, name: str) -> Shape:
    if name not in tensors:
        raise ValueError(f"the layer has no {name.rpartition('.')[2]}")
    return tensors.shape(name)


def _magnitude(parts: Parts, base: Shape) -> tuple[Part | None, bool]:
    """DoRA's lengths, if there are any, and whether they are those of columns.

    PEFT has one per output.  LyCORIS has a dimension for every one of the weight's, and which of
    them is not 1 depends on its option.
    """
    found = parts.get("magnitude") or parts.get("dora_scale")
    if found is None:
        return None, False
    if len(base) < 2:
        raise ValueError(f"has a length for each output of a weight that is {base}")
    outputs, inputs = base[:2]
    size = math.prod(found.shape)
    across = found.name.endswith("dora_scale") and found.shape[:1] == (1,) and outputs != 1
    if size != (inputs if across else outputs):
        raise ValueError(f"has lengths of shape {found.shape} for a weight that is {base}")
    return found, across


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


# --- alpha --------------------------------------------------------------------------------------

Configs = dict[str, dict[str, Any]]  # by component; "" is for all


def _configs(path: Path, every: Parts) -> Configs:
    """PEFT's configuration: of the file's own header, as diffusers writes it, or beside it."""
    with path.open("rb") as file:
        is_safetensors = file.read(9).endswith(b"{")  # the only kind with words of its own
    said = read_metadata(path).get("lora_adapter_metadata") if is_safetensors else None
    if said is not None:
        configs: Configs = {}
        for key, value in _parse(path, said).items():
            component, _, field = key.partition(".")
            configs.setdefault(component, {})[field] = value
        return configs
    beside = path.parent / "adapter_config.json"
    if beside.is_file() and all(name.startswith(PEFT) for name in every):
        return {"": _parse(beside, beside.read_text("utf-8"))}
    return {}


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the adapter's configuration is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: the adapter's configuration is no object")
    return value


def _configured(layer: Layer, configs: Configs, fields: Mapping[str, str]) -> float | None:
    """A number of the configuration for a layer: of its pattern, or else of the field beside it.

    `fields` maps a field to its field of patterns.
    """
    config = configs.get(layer.component) or configs.get("") or {}
    for field, patterns in fields.items():
        value, special_ones = config.get(field), config.get(patterns) or {}
        if not isinstance(special_ones, dict):
            raise ValueError(f"the adapter's configuration has {patterns} {special_ones!r}")
        for pattern, special in special_ones.items():
            name = pattern.removeprefix("^")
            if not all(c.isalnum() or c in "._" for c in name):
                raise ValueError(f"{patterns} has {pattern!r}: only names of layers are supported")
            # CLIP's prefix comes and goes
            if f".{layer.module}".endswith((f".{name}", f".{name.removeprefix('text_model.')}")):
                value = special
                break
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ValueError(f"the adapter's configuration has {field} {value!r}")
            return float(value)
    return None


def _alpha(layer: Layer, configs: Configs) -> float | None:
    if part := layer.parts.get("alpha"):
        if math.prod(part.shape) != 1:
            raise ValueError(f"alpha is of shape {part.shape}, not one number")
        alpha = float(part.read().reshape(()))
        if not alpha:
            raise ValueError("alpha is 0, so that the layer would do nothing")
        return alpha
    return _configured(layer, configs, {"lora_alpha": "alpha_pattern", "alpha": "alpha_pattern"})


def _scale(form: Form, layer: Layer, configs: Configs) -> float:
    """alpha / rank; 1 where no alpha is stated, and where there is no rank."""
    if form in (BIAS, FORMS["full"]):
        if "alpha" in layer.parts:
            raise ValueError("has an alpha and no rank to divide it by")
        return 1.0
    rank: float | None = form.rank(_shapes(layer))
    alpha = _alpha(layer, configs)
    if alpha is not None and "alpha" not in layer.parts:  # PEFT's word for it
        rank = _configured(layer, configs, {"r": "rank_pattern"}) or rank
        config = configs.get(layer.component) or configs.get("") or {}
        if config.get("use_rslora") and rank is not None:
            rank = math.sqrt(rank)
    return 1.0 if alpha is None or rank is None else alpha / rank


def _is_silent(layer: Layer, configs: Configs) -> bool:
    return _form(layer).rank(_shapes(layer)) is not None and _alpha(layer, configs) is None


# --- what does not apply ------------------------------------------------------------------------


def _refusal(
    checkpoint: Checkpoint,
    path: Path,
    every: Parts,
    problems: list[tuple[str, str]],
) -> str:
    """One line about all that did not apply: how many, the first of them, and whose they may be."""
    shown = ", ".join(f"{name} ({why})" for name, why in problems[:SHOWN])
    more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    made, mine = _made_for(every), checkpoint.family
    hint = "a LoRA is merged as a whole or not at all"
    if made and made != mine and mine != "sd":
        hint = f"it is for {made}, the checkpoint is {mine}: take a LoRA that is for {mine}"
    return (
        f"{path.name}: {len(problems)} of its {len(every)} tensors do not apply: "
        f"{shown}{more}; {hint}"
    )


def _made_for(every: Parts) -> str | None:
    """The family that a file seems to be for."""
    widths: Counter[int] = Counter()
    for name, part in every.items():
        flat = _flat(name)
        for sign, family in OTHER_FAMILIES.items():
            if sign in flat:
                return family
        reads = any(sign in flat for sign in ("down_weight", "lora_A", "hada_w1_b"))
        if "attn2_to_k" in flat and reads and len(part.shape) > 1:
            widths[part.shape[1]] += 1
    common = widths.most_common(1)
    return WIDTHS.get(common[0][0]) if common else None
