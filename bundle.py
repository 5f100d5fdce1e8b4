"""The bundle: a folder with a manifest and every component's files.  Format: docs/bundle.md."""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from .errors import FerrotypeError

FORMAT = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 << 20
MAX_PATH = 200  # leaves room for the bundle's own place on systems that stop at 260
MAX_DEPTH = 32  # of objects in objects; a parser with a small stack reads it too
MAX_INT = 2**63 - 1
WINDOWS_DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{d}{n}" for d in ("com", "lpt") for n in "123456789"),
}
TEXT_ENCODERS = {  # component -> its tokenizer; SDXL has both, and joins their states
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
}
TIME_IDS = 6  # height, width, top, left, height, width: what SDXL is told of the picture
# What a host takes from a network: the output's name and its number of dimensions.
OUTPUTS = {
    "unet": ("out_sample", 4),
    "vae_decoder": ("sample", 4),
    "vae_encoder": ("latent_parameters", 4),
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace", "lcm")
BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
OPTIONAL = {"optional": True}  # a field that came later: written only if it says something


class BundleError(FerrotypeError):
    """The bundle is damaged, incomplete or of another format.  The message says what to do."""


@dataclass(frozen=True)
class File:
    """One file of the bundle: its size and the SHA-256 of its contents, in lower-case hex."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        _require(self.bytes >= 0, f"bytes is {self.bytes}, it cannot be negative")
        _require(
            re.fullmatch("[0-9a-f]{64}", self.sha256),
            f"sha256 {self.sha256!r} is not 64 hex digits",
        )


@dataclass(frozen=True)
class Tensor:
    """An input or output: NumPy's name of the dtype; a dimension that varies is a name."""

    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        bad = [d for d in self.shape if (not d if isinstance(d, str) else d < 1)]
        _require(not bad, f"shape has the dimension {bad and _short(bad[0])}")


@dataclass(frozen=True)
class Memory:
    """Bytes on the device: the weights, what lives between layers, and what a layer works in."""

    weights: int
    activations: int
    scratch: int

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            _require(value >= 0, f"{name} is {value}, it cannot be negative")

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.scratch


@dataclass(frozen=True)
class Component:
    """A network: `path` is a file or a folder of the bundle, `config` is the checkpoint's own.

    `parts` are those below `path` that run one after the other, where a network was cut.
    `memory` is what a device needs to run it, by device, as its compiler reported it.
    `activations` is what it computes in, if not what the manifest says of all.
    """

    path: str
    config: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    parts: tuple[str, ...] = ()
    memory: dict[str, Memory] = field(default_factory=dict)
    activations: str = field(default="", metadata=OPTIONAL)

    def __post_init__(self) -> None:
        _plain_path(self.path)
        for part in self.parts:
            _plain_path(f"{self.path}/{part}")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer folder (it holds tokenizer.json) and the length that the text encoder reads."""

    path: str
    max_length: int
    pad_token: str

    def __post_init__(self) -> None:
        _plain_path(self.path)
        _require(
            3 <= self.max_length <= 1 << 16, f"max_length is {self.max_length}, not in 3..65536"
        )


@dataclass(frozen=True)
class Sizes:
    """The picture sizes, (width, height) in pixels, that the networks accept."""

    default: tuple[int, int]
    multiple: int = 8
    minimum: int = 64
    maximum: int = 2048
    allowed: tuple[tuple[int, int], ...] | None = None  # None: every multiple between the bounds

    def __post_init__(self) -> None:
        _require(self.multiple >= 1, f"multiple is {self.multiple}, the least is 1")
        _require(
            1 <= self.minimum <= self.maximum <= 1 << 16,
            f"minimum {self.minimum} and maximum {self.maximum} are not in order within 1..65536",
        )
        self.check(self.default)

    def check(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return `size`, or raise ValueError naming the sizes that work."""
        width, height = size
        if self.allowed is not None:
            if (width, height) in self.allowed:
                return size
            names = ", ".join(f"{w}x{h}" for w, h in self.allowed)
            raise ValueError(f"size {width}x{height}: this bundle draws only {names}")
        for side in size:
            if not self.minimum <= side <= self.maximum:
                raise ValueError(
                    f"size {width}x{height}: {side} is outside {self.minimum}..{self.maximum}"
                )
            if side % self.multiple:
                near = max(self.minimum, round(side / self.multiple) * self.multiple)
                raise ValueError(
                    f"size {width}x{height}: {side} is no multiple of {self.multiple}, try {near}"
                )
        return size


@dataclass(frozen=True)
class Recipe:
    """How the model wants to be sampled: everything a sampler table is computed from."""

    sampler: str  # a name in runtime.samplers.SAMPLERS
    steps: int
    guidance: float  # classifier-free guidance scale; 0 and 1 both mean one pass
    prediction_type: str = "epsilon"
    spacing: str = "leading"
    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    zero_terminal_snr: bool = False
    steps_offset: int = 1
    set_alpha_to_one: bool = False  # the last step lands on alpha_cumprod 1, not on that of t=0
    original_steps: int = 50  # the lattice that LCM and TCD were distilled on
    timestep_scaling: float = 10.0  # LCM's boundary condition
    eta: float = 0.0  # DDIM's eta, TCD's gamma: the share of noise put back at each step
    timesteps: tuple[float, ...] = ()  # these and no spacing, where a model was distilled on them
    zero_negative: bool = False  # an empty negative prompt means zeros, not the states of ""
    # What a model was distilled for; the manifest leaves these out where they say nothing.
    name: str = field(default="", metadata=OPTIONAL)  # in runtime.recipes.FAMILIES
    allowed_steps: tuple[int, ...] = field(default=(), metadata=OPTIONAL)  # none: any
    guidance_range: tuple[float, float] | None = field(default=None, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        _require(1 <= self.steps <= 1000, f"steps is {self.steps}, not in 1..1000")
        _require(self.guidance >= 0, f"guidance is {self.guidance}, the least is 0")
        _one_of("prediction_type", self.prediction_type, PREDICTION_TYPES)
        _one_of("spacing", self.spacing, SPACINGS)
        _one_of("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        _require(
            2 <= self.train_steps <= 100_000, f"train_steps is {self.train_steps}, not in 2..100000"
        )
        _require(
            0 < self.beta_start < 1 and 0 < self.beta_end < 1,
            f"beta_start {self.beta_start} and beta_end {self.beta_end} must lie between 0 and 1",
        )
        for steps in self.allowed_steps:
            _require(1 <= steps <= 1000, f"allowed_steps has {steps}, not in 1..1000")
        if self.guidance_range is not None:
            low, high = self.guidance_range
            _require(0 <= low <= high, f"guidance_range {low} to {high} does not rise from 0")


@dataclass(frozen=True)
class Precision:
    """How weights are stored and what the graphs compute in."""

    weights: str
    activations: str


@dataclass(frozen=True)
class Source:
    """The checkpoint that the bundle was made from; `sha256` is over all files that were read."""

    name: str
    sha256: str


def _no_files() -> dict[str, File]:
    """Until `save` lists them; in a manifest's text they must be there."""
    return {}


@dataclass(frozen=True)
class Manifest:
    """Everything a host needs to know before it opens a component."""

    format: int
    tool: str
    model: str
    family: str
    target: str
    licence: str
    source: Source
    precision: Precision
    sizes: Sizes
    recipe: Recipe
    preview: tuple[tuple[float, float, float], ...]  # RGB in [-1, 1] per latent channel, then bias
    tokenizers: dict[str, Tokenizer]
    components: dict[str, Component]
    parity: dict[str, Any]
    options: dict[str, str] = field(default_factory=dict)  # what the target was told, as text
    files: dict[str, File] = field(default_factory=_no_files)

    def __post_init__(self) -> None:
        folded: dict[str, str] = {}
        for name in self.files:
            _plain_path(name)
            _require(name.lower() != MANIFEST, f"files: {name!r} cannot hold its own hash")
            twin = folded.setdefault(name.lower(), name)
            _require(twin == name, f"files {twin!r} and {name!r} differ only in case")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: where it is and what its manifest says; nothing else is loaded."""

    folder: Path
    manifest: Manifest

    @property
    def sha256(self) -> str:
        """The bundle's identity: the hash of its manifest, which holds the hash of every file."""
        return hashlib.sha256(dumps(self.manifest).encode()).hexdigest()

    def path(self, name: str) -> Path:
        """The location of a file or folder of the bundle."""
        return self.folder / _plain_path(name)

    def bytes_of(self, name: str) -> int:
        """The size of a file, or of everything below a folder, as the manifest states it."""
        return sum(f.bytes for path, f in self.manifest.files.items() if _below(path, name))

    def component(self, name: str) -> Component:
        """The component of that name, or a BundleError that lists those there are."""
        try:
            return self.manifest.components[name]
        except KeyError:
            have = ", ".join(self.manifest.components)
            raise BundleError(f"{self.folder} has no {name}: it holds {have}") from None

    def activations(self, name: str) -> str:
        """What the component of that name computes in."""
        return self.component(name).activations or self.manifest.precision.activations


def states_of(outputs: Iterable[str]) -> str:
    """Which of a text encoder's outputs the U-Net attends to; empty if it is not just one."""
    found = [n for n in outputs if re.fullmatch(r"last_hidden_state|hidden_states\.[0-9]+", n)]
    return found[0] if len(found) == 1 else ""


# --- load and verify ----------------------------------------------------------------------------


def load(folder: str | os.PathLike) -> Bundle:
    """Open a bundle: parse the manifest and check that every file is there with its size.

    Raises BundleError with one line for whatever is wrong.  Contents are hashed by `verify`.
    """
    folder = Path(folder)
    try:
        if not folder.is_dir():
            what = "not a folder" if folder.exists() else "not there"
            raise BundleError(
                f"{folder} is {what}: a bundle is a folder that `ferrotype convert` wrote"
            )
        bundle = Bundle(folder, loads(_read_manifest(folder), str(folder / MANIFEST)))
        root = folder.resolve()
        for name, file in bundle.manifest.files.items():
            _check_size(bundle.path(name), root, name, file)
        _check_parts(bundle)
    except OSError as error:
        raise BundleError(f"{folder} cannot be read: {error.strerror or error}") from None
    return bundle


def verify(bundle: Bundle, progress: Callable[[int], None] = lambda count: None) -> list[str]:
    """Hash every file; return the problems found, one line each.  `progress` is told the bytes."""
    problems = []
    for name, file in bundle.manifest.files.items():
        try:
            found = hash_file(bundle.path(name), progress)
        except OSError as error:
            problems.append(f"{name}: cannot be read: {error.strerror or error}")
            continue
        if found != file.sha256:
            problems.append(
                f"{name}: its sha256 is {found[:12]}…, the manifest says {file.sha256[:12]}…"
            )
    return [*problems, *(_unlisted(name) for name in _extra(bundle.folder, bundle.manifest))]


def loads(text: str, where: str = MANIFEST) -> Manifest:
    """Parse a manifest; every fault is a BundleError that names the field."""
    try:
        raw = strict_json(text)
        if not isinstance(raw, dict) or "format" not in raw:
            raise TypeError("format: missing")
        if raw["format"] != FORMAT:  # first: a newer format may have fields we do not know
            raise BundleError(
                f"{where}: it is format {_short(raw['format'])}, this ferrotype reads {FORMAT}; "
                "update ferrotype or convert the checkpoint again"
            )
        _check_depth(raw, MAX_DEPTH)
        manifest = _read(Manifest, raw, "")
        _check_networks(manifest)
    except RecursionError:
        raise BundleError(f"{where} is not a valid manifest: it nests too deeply") from None
    except (ValueError, TypeError) as error:
        reason = _printable(str(error), 300)
        raise BundleError(f"{where} is not a valid manifest: {reason}") from None
    return manifest


def _read_manifest(folder: Path) -> str:
    """The manifest's text; what is no file is never opened, since a pipe would wait for ever."""
    path = folder / MANIFEST
    if not path.is_file():
        what = f"its {MANIFEST} is not a file" if os.path.lexists(path) else f"it has no {MANIFEST}"
        raise BundleError(f"{folder} is not a bundle: {what}")
    _check_inside(path, folder.resolve(), MANIFEST)
    with path.open("rb") as stream:
        data = stream.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} has more than {MAX_MANIFEST_BYTES:,} bytes, which is the limit")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8 text: {error.reason}") from None


def _check_size(path: Path, root: Path, name: str, file: File) -> None:
    if not path.is_file():
        what = "not a file" if os.path.lexists(path) else "missing"
        raise BundleError(f"{name}: {path} is {what}; copy or convert the bundle again")
    _check_inside(path, root, name)
    size = path.stat().st_size
    if size != file.bytes:
        raise BundleError(f"{name}: {path} should have {file.bytes:,} bytes, found {size:,}")


def _check_inside(path: Path, root: Path, name: str) -> None:
    if not path.resolve().is_relative_to(root):
        raise BundleError(f"{name}: {path} is a link that leaves the bundle")


def _check_parts(bundle: Bundle) -> None:
    """Engines open what they find in a part's folder, so all that is there must be listed."""
    manifest, extra = bundle.manifest, list(_extra(bundle.folder, bundle.manifest))
    parts: dict[str, Component | Tokenizer] = {**manifest.tokenizers, **manifest.components}
    for name, part in parts.items():
        if not any(_below(path, part.path) for path in manifest.files):
            raise BundleError(
                f"{bundle.folder / MANIFEST}: {name} is at {part.path!r}, which lists no file"
            )
        for path in extra:
            if _below(path, part.path):
                raise BundleError(f"{bundle.folder}: {_unlisted(path)}; remove it")


def _check_networks(manifest: Manifest) -> None:
    """What every host computes with must be there, before a network is loaded for it."""
    parts = manifest.components
    for name, (output, rank) in OUTPUTS.items():
        if name in parts:
            _check_output(parts[name], name, output, rank)
    for name in TEXT_ENCODERS:
        if name in parts:
            outputs = parts[name].outputs
            _require(
                states_of(outputs) or not outputs,
                f"components.{name}.outputs: last_hidden_state or one hidden_states.K expected, "
                f"found {_printable(', '.join(outputs), 100)}",
            )
            _check_output(parts[name], name, states_of(outputs) or "last_hidden_state", 3)
    if "vae_decoder" in manifest.components:
        where, config = "components.vae_decoder.config", manifest.components["vae_decoder"].config
        channels = _read(int, config.get("latent_channels"), f"{where}.latent_channels")
        blocks = _read(
            tuple[int, ...], config.get("block_out_channels"), f"{where}.block_out_channels"
        )
        factor = _read(float, config.get("scaling_factor"), f"{where}.scaling_factor")
        _require(1 <= channels <= 64, f"{where}.latent_channels is {channels}, not in 1..64")
        _require(1 <= len(blocks) <= 8, f"{where}.block_out_channels has {len(blocks)}, not 1 to 8")
        _require(factor > 0, f"{where}.scaling_factor is {factor}, it must be above 0")
        rows = len(manifest.preview)
        _require(
            rows == channels + 1,
            f"preview has {rows} rows, {channels} latent channels and bias expected",
        )
    unet = parts.get("unet")
    if unet and "timestep_cond" in unet.inputs:
        where = "components.unet.config.time_cond_proj_dim"
        width = _read(int, unet.config.get("time_cond_proj_dim"), where)
        _require(
            4 <= width <= 1 << 16 and width % 2 == 0, f"{where} is {width}, not even in 4..65536"
        )
    if unet and "time_ids" in unet.inputs:
        shape = unet.inputs["time_ids"].shape
        _require(
            len(shape) == 2 and shape[1] == TIME_IDS,
            f"components.unet.inputs: time_ids is not of {TIME_IDS} numbers",
        )
    if unet and "text_embeds" in unet.inputs:
        _require("text_encoder_2" in parts, "components: no text_encoder_2, which the unet needs")
        _check_output(parts["text_encoder_2"], "text_encoder_2", "text_embeds", 2)


def _check_output(part: Component, name: str, output: str, rank: int) -> None:
    tensor = part.outputs.get(output)
    found = tensor and len(tensor.shape)
    _require(found == rank, f"components.{name}.outputs: no {output} of {rank} dimensions")


# --- save ---------------------------------------------------------------------------------------


@contextmanager
def staging(out: str | os.PathLike, force: bool = False) -> Iterator[Path]:
    """A folder beside `out` to build a bundle in; it is gone on leaving unless `save` renamed it.

    Raises BundleError at once when `out` could not be written in the end.
    """
    out = Path(out)
    try:
        _check_replaceable(out, force)
        if not out.parent.is_dir():
            raise BundleError(f"{out.parent} is not a folder: make it first")
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name[:40]}.", suffix=".tmp"))
    except OSError as error:
        raise _cannot_write(out, error) from None
    try:
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):  # whatever wrote it
            raise _cannot_write(out, error) from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(staged: Path, out: str | os.PathLike, manifest: Manifest, force: bool = False) -> Bundle:
    """Write the manifest of the files in `staged`, last, and rename the folder to `out`.

    `out` must be free, or with `force` a bundle, which is then replaced.
    """
    out = Path(out)
    try:
        manifest = dataclasses.replace(manifest, files=list_files(staged))
        with (staged / MANIFEST).open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(dumps(manifest))
            stream.flush()
            os.fsync(stream.fileno())
        load(staged)  # what we would refuse to read is never published
        staged.chmod(0o777 & ~_umask())  # mkdtemp made it private
        _check_replaceable(out, force)
        _publish(staged, out)
    except OSError as error:
        raise _cannot_write(out, error) from None
    except ValueError as error:  # a path that is not plain, a number that JSON cannot hold
        raise BundleError(f"{out} would not be a bundle: {error}") from None
    return Bundle(out, manifest)


def _publish(staged: Path, out: Path) -> None:
    """Rename `staged` to `out`; the bundle it replaces is put aside, and back if that fails."""
    if not out.exists():
        staged.rename(out)
        return
    old = staged.with_suffix(".old")
    try:
        out.rename(old)
        staged.rename(out)
    finally:
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(out)


def _cannot_write(out: Path, error: OSError) -> BundleError:
    return BundleError(f"{out} cannot be written: {error.strerror or error}")


def dumps(manifest: Manifest) -> str:
    """The manifest's text: JSON in a fixed order, so that equal bundles are equal bytes."""
    return json.dumps(_plain(manifest), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Objects and lists for JSON, without the OPTIONAL fields that have their default."""
    if dataclasses.is_dataclass(value):
        given = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {f.name: _plain(v) for f, v in given if f.metadata != OPTIONAL or v != f.default}
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def list_files(folder: Path) -> dict[str, File]:
    """Size and hash of every file below `folder` by its path, sorted; the manifest itself apart."""
    names = sorted(name for name in _walk(folder) if name != MANIFEST)
    for path in (folder / name for name in names):
        if path.is_symlink() or not path.is_file():
            raise BundleError(f"{path} is a link or no file: a bundle holds only files and folders")
    return {n: File((folder / n).stat().st_size, hash_file(folder / n)) for n in names}


def hash_file(path: Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file's contents, read in pieces of 1 MiB that `progress` is told of."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
            progress(len(piece))
    return digest.hexdigest()


def _check_replaceable(out: Path, force: bool) -> None:
    try:
        out.lstat()  # exists() calls a dangling link and a name that is too long free
    except FileNotFoundError:
        return
    if not force:
        raise BundleError(f"{out} exists: choose another name or pass --force to replace it")
    if out.is_symlink() or not _is_bundle(out):
        raise BundleError(f"{out} is not a bundle, so it is not replaced: choose another name")


def _is_bundle(folder: Path) -> bool:
    """Whether the manifest is ours: a manifest.json is in many folders that are no bundle."""
    try:
        loads(_read_manifest(folder))
    except BundleError:
        return False
    return True


def _walk(folder: Path) -> Iterator[str]:
    """Relative paths of all below `folder` but folders; dot files (a file manager's) do not count.

    Links are not followed.
    """
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*links, *files):
            if not name.startswith("."):
                yield (Path(place) / name).relative_to(folder).as_posix()


def _extra(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What is in a bundle's folder and not in its manifest; folders and links to some apart."""
    for name in sorted(_walk(folder)):
        linked = (folder / name).is_dir() and any(_below(path, name) for path in manifest.files)
        if name not in manifest.files and name != MANIFEST and not linked:
            yield name


def _unlisted(name: str) -> str:
    return f"{_printable(name, 300)}: not in the manifest, so nothing vouches for it"


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask


# --- reading JSON into the dataclasses above ----------------------------------------------------


def strict_json(text: str) -> Any:
    """Parse JSON that every parser reads alike: no key twice, no NaN, numbers of 64 bits.

    Raises ValueError that names the finding, RecursionError for what nests too deeply.
    """
    return json.loads(
        text,
        object_pairs_hook=_unique_keys,
        parse_constant=_number,
        parse_float=_number,
        parse_int=_whole_number,
    )


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`; TypeError or ValueError names place and finding."""
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return read_fields(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _read_union(args, value, where)
    if origin is dict:
        _expect(dict, value, where)
        if args[1] is not Any:
            for key in value:
                _require(key.isprintable() and key, f"{where}: {_short(key)} is not a name")
        return {k: _read(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is tuple:
        _expect(list, value, where)
        if args[-1] is ...:
            args = args[:1] * len(value)
        _require(
            len(value) == len(args), f"{where}: {len(args)} values expected, found {len(value)}"
        )
        return tuple(
            _read(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if kind is float and type(value) is int:
        value = float(value)
    _expect(kind, value, where)
    return value


def read_fields(kind: Any, value: Any, where: str) -> Any:
    """Parsed JSON as a dataclass, field by field of the types it is annotated with.

    TypeError or ValueError names place and finding; so does a ValueError of its __post_init__.
    """
    _expect(dict, value, where)
    hints = _hints(kind)
    dot = f"{where}." if where else ""
    needed = {f.name for f in dataclasses.fields(kind) if _is_needed(f)}
    for name in sorted(needed - value.keys()):
        raise TypeError(f"{dot}{name}: missing")
    for name in sorted(value.keys() - hints.keys()):
        raise TypeError(f"{dot}{name}: not a field of format {FORMAT}")
    fields = {name: _read(hints[name], v, f"{dot}{name}") for name, v in value.items()}
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


_hints = functools.cache(get_type_hints)


def _is_needed(entry: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return entry.default is missing and entry.default_factory in (missing, _no_files)


def _read_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    """Of `int | str` and `... | None`, the alternatives in use, the value's type tells which."""
    if value is None and type(None) in args:
        return None
    plain = [a for a in args if a is not type(None)]
    return _read(type(value) if type(value) in plain else plain[0], value, where)


def _expect(kind: type, value: Any, where: str) -> None:
    if type(value) is not kind:
        raise TypeError(f"{where or 'manifest'}: {kind.__name__} expected, found {_short(value)}")


def _short(value: Any) -> str:
    return _printable(json.dumps(value), 40)


def _printable(text: str, limit: int) -> str:
    """`text` for a message: one line, no control characters, not endless."""
    text = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"an object names the key {_short(key)} twice")
        result[key] = value
    return result


def _number(text: str) -> float:
    """NaN and Infinity are not JSON, and 1e999 is no float."""
    value = float(text)
    _require(math.isfinite(value), f"{text[:40]} is not a finite number")
    return value


def _whole_number(text: str) -> int:
    """Whole numbers fit 64 bits in every language; the length is first, parsing is quadratic."""
    _require(len(text) <= 20 and abs(int(text)) <= MAX_INT, f"{text[:40]} does not fit 64 bits")
    return int(text)


def _check_depth(value: Any, left: int) -> None:
    _require(left, f"it nests deeper than {MAX_DEPTH}")
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, left - 1)


def _require(holds: object, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    _require(value in known, f"{name} {value!r} is not one of {', '.join(known)}")


def _plain_path(name: str) -> str:
    """`name` if it is a relative path that stays below the bundle on every system."""
    if len(name) > MAX_PATH or not all(map(_is_plain, name.split("/"))):
        raise ValueError(f"{_printable(name, MAX_PATH)!r} is not a plain path inside the bundle")
    return name


def _is_plain(part: str) -> bool:
    """Whether every system takes `part` for the same file name, and for nothing else."""
    return (
        re.fullmatch(r"[!-~]([ -~]*[!-~])?", part) is not None
        and not re.search(r'[\\:*?"<>|]', part)
        and not part.startswith(".")
        and not part.endswith(".")
        and part.split(".")[0].lower() not in WINDOWS_DEVICES
    )


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")
