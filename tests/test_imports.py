"""Imports point one way: kernels, bundle, parity <- runtime <- quantize <- convert <- cli."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ferrotype
from ferrotype import bundle, kernels
from ferrotype.runtime.pipeline import EMBEDDED, EMBEDDED_ONNX

ROOT = Path(ferrotype.__file__).parent
FREE = {"errors", "_version"}  # what any layer may import
MAY_IMPORT = {
    "errors": set(),
    "kernels": set(),
    "bundle": set(),
    "parity": set(),
    "runtime": {"kernels", "bundle", "parity"},
    "quantize": {"kernels", "bundle", "parity", "runtime"},
    "convert": {"kernels", "bundle", "parity", "runtime", "quantize"},
}
HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors"}


def files(layer):
    return [*(ROOT / layer).rglob("*.py"), *ROOT.glob(f"{layer}.py")]


def own_imports(path):
    """Names of our own layers that a file imports; between layers imports are relative."""
    depth = len(path.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [a.name for a in node.names]


def foreign_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_a_layer_imports_only_what_lies_below(layer):
    for path in files(layer):
        assert set(own_imports(path)) <= MAY_IMPORT[layer] | FREE, path


@pytest.mark.parametrize("layer", sorted(MAY_IMPORT.keys() - {"convert"}))
def test_only_convert_imports_torch_and_its_kin(layer):
    for path in files(layer):
        assert not set(foreign_imports(path)) & HEAVY, path


def loaded_after(code):
    """The modules in memory after running some code in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_importing_ferrotype_loads_next_to_nothing():
    assert not loaded_after("import ferrotype") & {*HEAVY, "numpy", "PIL", "onnxruntime", "click"}


def test_help_loads_neither_onnxruntime_nor_torch_nor_numpy():
    code = "from ferrotype.cli import main\nmain(['--help'], standalone_mode=False)"
    assert not loaded_after(code) & {*HEAVY, "onnxruntime", "numpy", "PIL", "rich"}


@pytest.mark.parametrize("folder", [EMBEDDED, EMBEDDED_ONNX], ids=lambda folder: folder.name)
def test_drawing_loads_its_own_engine_but_not_torch(folder):
    target = bundle.load(folder).manifest.target
    if target == "native" and not kernels.available():
        pytest.skip("the native engine is not built")
    code = f"import ferrotype\nferrotype.load({str(folder)!r}).generate('a pizza', steps=1)"
    names = loaded_after(code)
    assert ("onnxruntime" in names) == (target == "onnx")
    assert not names & {*HEAVY, "coremltools", "tensorrt", "tensorrt_rtx", "cuda"}


def test_conversion_starts_inside_a_checkout():
    """transformers looks for a package called kernels, which is not ours."""
    code = "import ferrotype.convert, transformers; transformers.CLIPTextModel"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_public_name_is_there():
    for name in ferrotype.__all__:
        assert getattr(ferrotype, name) is not None
    assert ferrotype.__all__ == sorted(ferrotype.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ferrotype.nonsense  # noqa: B018
