"""Surgery on Core ML's intermediate programs: weights with fewer bits, and programs in pieces."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..quantize.recipe import Form
from ..quantize.weights import Integers, Palette, pack, quantize
from .checkpoint import ConvertError
from .coremltools_fixes import coremltools

# The operators that read compressed weights, and the argument that they read them through.
READS_COMPRESSED = {"conv": "weight", "linear": "weight", "matmul": "y", "gather": "x"}
SLACK = 0.05  # of all weights: how far a cut may be from the even share to cross fewer values


@contextmanager
def silent() -> Iterator[None]:
    """Keep coremltools' progress bars and warnings off the screen; ours shows the stage."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- weights ------------------------------------------------------------------------------------


def weights(program: Any) -> Iterator[Any]:
    """The constants of a program that are matrices or filters and that may be compressed."""
    for op in list(program.functions["main"].operations):
        value: Any = op.outputs[0].val if op.op_type == "const" else 0.0
        if np.ndim(value) >= 2 and value.dtype.kind == "f":
            yield op


def compress(program: Any, choose: Callable[[str, tuple[int, ...]], Form | None], ios: int) -> None:
    """Replace constants in place by compressed ones, in the form that `choose` names by constant.

    Raises ConvertError for a form that the deployment target has no operator for.
    """
    block = program.functions["main"]
    block._essential_scope_sources = []  # new operators have no line of torch to point at
    for op in weights(program):
        form = choose(op.name, op.outputs[0].shape)
        if form is None:
            continue
        value = op.outputs[0].val
        readers = {(c.op_type, READS_COMPRESSED.get(c.op_type)) for c in op.outputs[0].child_ops}
        if any(name is None for _, name in readers):
            continue
        packed = quantize(np.asarray(value, np.float32), form)
        with block:
            new = _constexpr(packed, op, value.dtype, ios)
        block.replace_uses_of_var_after_op(
            anchor_op=op, old_var=op.outputs[0], new_var=new, no_check_var_types=True
        )
        block.remove_ops([op])


def _constexpr(packed: Palette | Integers, op: Any, dtype: np.dtype, ios: int) -> Any:
    """The operator that stands for a compressed constant, before the constant itself."""
    coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    name, rank = op.name + "_compressed", op.outputs[0].rank
    if isinstance(packed, Palette):
        indices = packed.indices
        if ios < 18:
            return mb.constexpr_lut_to_dense(
                indices=pack(indices, packed.bits),
                lut=packed.lut.reshape(-1).astype(dtype),
                shape=np.array(indices.shape, np.uint32),
                before_op=op,
                name=name,
            )
        kind = types.nptype_from_builtin(types.string_to_builtin(f"uint{packed.bits}"))
        lut = packed.lut.reshape(len(packed.lut), *[1] * (rank - 1), -1, 1).astype(dtype)
        return mb.constexpr_lut_to_dense(
            indices=indices.astype(kind), lut=lut, before_op=op, name=name
        )
    if ios < 18:
        scale = packed.scale.reshape(-1).astype(dtype)
        zero = packed.zero_point
        zero = np.zeros(scale.shape, np.int8) if zero is None else zero.reshape(-1).astype(np.int8)
        return mb.constexpr_affine_dequantize(
            quantized_data=packed.values,
            zero_point=zero if scale.size > 1 else zero[0],
            scale=scale if scale.size > 1 else scale[0],
            axis=np.int32(0),
            before_op=op,
            name=name,
        )
    kind = types.nptype_from_builtin(types.string_to_builtin(f"int{packed.bits}"))
    zero = None if packed.zero_point is None else packed.zero_point.astype(kind)
    offset = {} if zero is None else {"offset": zero}
    return mb.constexpr_blockwise_shift_scale(
        data=packed.values.astype(kind),
        scale=packed.scale.astype(dtype),
        before_op=op,
        name=name,
        **offset,
    )


# --- packages -----------------------------------------------------------------------------------


def save(program: Any, package: Path, ios: int) -> None:
    """Write a program as an .mlpackage."""
    ct = coremltools()
    from coremltools.converters.mil.converter import mil_convert

    with silent():
        mil_convert(
            program,
            convert_to="mlprogram",
            convert_from="milinternal",
            specification_version=getattr(ct.target, f"iOS{ios}"),
            compute_units=ct.ComputeUnit.CPU_ONLY,
            skip_model_load=True,
            pass_pipeline=ct.PassPipeline.EMPTY,
            package_dir=str(package),
        )
    _name_by_path(package)


def _name_by_path(package: Path) -> None:
    """Give a package's items names that follow from their paths: drawn ones differ every time."""
    path = package / "Manifest.json"
    manifest = json.loads(path.read_text())
    entries = manifest["itemInfoEntries"]
    names = {key: str(uuid.uuid5(uuid.NAMESPACE_URL, entries[key]["path"])) for key in entries}
    manifest["itemInfoEntries"] = {
        names[key]: entry
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["path"])
    }
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    path.write_text(json.dumps(manifest, indent=4) + "\n")


def load(package: Path) -> Any:
    """A saved package's program, its operations in a list."""
    ct = coremltools()
    from coremltools.converters.mil.frontend.milproto.load import load as from_proto

    model = ct.models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    program = from_proto(spec, spec.specificationVersion, model.weights_dir)
    block = program.functions["main"]
    block.operations = list(block.operations)
    return program


# --- pieces -------------------------------------------------------------------------------------


def join(folder: Path, part: str) -> None:
    """Make folder/FUNCTION/part of every function one package, folder/part, that shares weights."""
    ct = coremltools()
    functions = sorted(p.parent.name for p in folder.glob(f"size_*/{part}"))
    description = ct.utils.MultiFunctionDescriptor()
    for name in functions:
        description.add_function(str(folder / name / part), "main", name)
    description.default_function_name = functions[0]
    with silent():
        ct.utils.save_multifunction(description, str(folder / part))
    _name_by_path(folder / part)
    for name in functions:
        shutil.rmtree(folder / name / part)
        if not any((folder / name).iterdir()):
            (folder / name).rmdir()


def cut(package: Path, parts: list[Path], ios: int) -> None:
    """Write a package as pieces that run one after the other, about equal in bytes of weights.

    A piece takes the values of earlier ones by name; the last returns the outputs.
    """
    places = _places(load(package), len(parts))
    for first, last, part in zip([0, *places], [*places, None], parts, strict=True):
        program = load(package)
        _keep(program, first, last)
        save(program, part, ios)


def _places(program: Any, count: int) -> list[int]:
    """Where to cut: near the even share of bytes, where the fewest values cross."""
    operations = program.functions["main"].operations
    if len(operations) <= count:
        raise ConvertError(f"the network is too small for {count} chunks; ask for fewer")
    position = {id(op): i for i, op in enumerate(operations)}
    bytes_before, crossing = [0], [0]
    change = [0] * (len(operations) + 2)
    for i, op in enumerate(operations):
        constant = op.op_type.startswith("const")
        bytes_before.append(bytes_before[-1] + (_bytes(op) if constant else 0))
        for var in () if constant else op.outputs:
            last = max((position[id(child)] for child in var.child_ops), default=i)
            change[i + 1] += int(np.prod(var.shape))
            change[last + 1] -= int(np.prod(var.shape))
    for delta in change[1:]:
        crossing.append(crossing[-1] + delta)
    total = bytes_before[-1]
    places: list[int] = []
    for k in range(1, count):
        share = total * k / count
        near = [
            i
            for i in range(1, len(operations))
            if abs(bytes_before[i] - share) <= SLACK * total and i > max(places, default=0)
        ]
        near = near or [min(range(1, len(operations)), key=lambda i: abs(bytes_before[i] - share))]
        places.append(min(near, key=lambda i: (crossing[i], abs(bytes_before[i] - share))))
    if len({0, *places, len(operations)}) != count + 1:
        raise ConvertError(f"the network is too small for {count} chunks; ask for fewer")
    return places


def _bytes(op: Any) -> int:
    """What a constant takes on disk; those inside a compressed one are counted by themselves."""
    value = op.outputs[0].val if op.op_type == "const" else None
    return int(np.asarray(value).nbytes) if value is not None and np.ndim(value) else 0


def _keep(program: Any, first: int, last: int | None) -> None:
    """Reduce a program, in place, to its operations from `first` up to `last`."""
    coremltools()
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    block = program.functions["main"]
    operations = block.operations
    position = {id(op): i for i, op in enumerate(operations)}
    end = len(operations) if last is None else last
    results = {id(var) for var in block.outputs}
    before = [v for op in operations[:first] if _computes(op) for v in op.outputs]
    mine = [v for op in operations[first:end] if _computes(op) for v in op.outputs]
    late = [v for v in mine if any(position[id(c)] >= end for c in v.child_ops)]
    outputs = [*late, *(v for v in mine if id(v) in results and v not in late)]
    if first:
        anchor = operations[first - 1]
        crossing = [v for v in before if any(position[id(c)] >= first for c in v.child_ops)]
        inputs = _replace_by_inputs(block, crossing, anchor)
        outputs = [inputs.get(id(v), v) for v in outputs]
    block.set_outputs(outputs)
    PASS_REGISTRY["common::dead_code_elimination"](program)
    used = OrderedDict((k, v) for k, v in block._input_dict.items() if v.child_ops)
    block._input_dict = used
    block.function_inputs = tuple(used.values())


def _computes(op: Any) -> bool:
    return not op.op_type.startswith("const") and op.outputs[0].val is None


def _replace_by_inputs(block: Any, crossing: list[Any], anchor: Any) -> dict[int, Any]:
    from coremltools.converters.mil.mil import Placeholder

    made = {}
    with block:
        for var in crossing:
            new = Placeholder(sym_shape=var.shape, dtype=var.dtype, name=var.name).outputs[0]
            block._input_dict[new.name] = new
            block.function_inputs = tuple(block._input_dict.values())
            block.replace_uses_of_var_after_op(
                anchor_op=anchor, old_var=var, new_var=new, force_replace=True
            )
            made[id(var)] = new
    return made
