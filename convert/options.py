"""What a target may be told beside the precision; each knows its limits and says them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..bundle import Precision, Sizes
from ..quantize.recipe import Recipe
from .checkpoint import Checkpoint, ConvertError

if TYPE_CHECKING:
    from .optimum import Graph

Size = tuple[int, int]

DEPLOYMENTS = ("ios16", "ios17", "ios18", "macos13", "macos14", "macos15")
COMPUTE_UNITS = ("all", "cpu_and_ne", "cpu_and_gpu", "cpu_only")
ATTENTIONS = ("original", "split-einsum")
LAYOUTS = ("ferrotype", "apple")
MAX_CHUNKS = 16


@dataclass(frozen=True)
class CoremlOptions:
    """How Core ML packages are made.

    `deployment` is the oldest system they run on.  `attention` is "original", fastest on the GPU,
    or "split-einsum", made for the Neural Engine; by default what suits `compute_units`, which by
    default are the Neural Engine on iOS and the GPU on macOS.  `chunks` cuts the U-Net into so many
    packages.  `layout` "apple" takes the names and shapes of Apple's Swift runtime.
    """

    deployment: str = "ios17"
    compute_units: str = ""
    attention: str = ""
    chunks: int = 1
    layout: str = "ferrotype"

    def __post_init__(self) -> None:
        _choose("deployment", self.deployment, DEPLOYMENTS)
        mobile = self.deployment.startswith("ios")
        units = self.compute_units or ("cpu_and_ne" if mobile else "cpu_and_gpu")
        _choose("compute units", units, COMPUTE_UNITS)
        engine = units in ("cpu_and_ne", "all") and mobile
        attention = self.attention or ("split-einsum" if engine else "original")
        _choose("attention", attention, ATTENTIONS)
        _choose("layout", self.layout, LAYOUTS)
        if not 1 <= self.chunks <= MAX_CHUNKS:
            raise ConvertError(f"chunks is {self.chunks}: it must be 1 to {MAX_CHUNKS}")
        if self.layout == "apple" and self.chunks > 2:
            raise ConvertError(
                f"chunks is {self.chunks}: Apple's Swift runtime opens one U-Net or two pieces"
            )
        object.__setattr__(self, "compute_units", units)
        object.__setattr__(self, "attention", attention)

    @property
    def ios(self) -> int:
        """The iOS generation of the operators: macOS 13, 14 and 15 have those of iOS 16 to 18."""
        number = int(self.deployment.lstrip("iosmac"))
        return number if self.deployment.startswith("ios") else number + 3


@dataclass(frozen=True)
class TensorrtOptions:
    """For which GPUs engines are built ahead of time: their compute capabilities.

    With `weight_streaming` an engine can run in less memory than its weights take.
    """

    capabilities: tuple[str, ...] = ("8.6", "8.9", "12.0")
    weight_streaming: bool = False


@dataclass(frozen=True)
class NativeOptions:
    """How the bundle is checked here: with `isa`, an instruction set by name, or the best one.

    What is written is the same for all.
    """

    isa: str | None = None


@dataclass(frozen=True)
class OptimumOptions:
    """Graphs of a folder that Optimum exported, by component, in place of an export of our own."""

    graphs: dict[str, Graph]

    @property
    def fixed(self) -> bool:
        """Whether a graph takes one size alone."""
        return any(graph.latents for graph in self.graphs.values())


Options = CoremlOptions | TensorrtOptions | NativeOptions | OptimumOptions


@dataclass(frozen=True)
class Request:
    """What was asked for: how the checkpoint becomes a bundle.

    `family` is of the recipe, by name.  `progress` is told of every stage, `written` how many bytes
    of a component are written, of how many.
    """

    options: Options | None
    weights: Recipe
    precision: Precision
    sizes: tuple[Size, ...]
    family: str | None = None
    progress: Callable[[str], None] = lambda stage: None
    written: Callable[[int, int], None] = lambda done, total: None


def _choose(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConvertError(f"{name} {value!r} is not one of {', '.join(known)}")


def picture_sizes(
    checkpoint: Checkpoint, sizes: tuple[Size, ...], options: Options | None
) -> Sizes:
    """The sizes that the networks will take: those given, or one if they must be fixed, or any.

    Raises ConvertError for a side that is no multiple of what the networks halve by.
    """
    try:
        return _picture_sizes(checkpoint, sizes, options)
    except ValueError as error:
        raise ConvertError(str(error)) from None


def _picture_sizes(
    checkpoint: Checkpoint, sizes: tuple[Size, ...], options: Options | None
) -> Sizes:
    scale, levels = checkpoint.vae_scale, len(checkpoint.configs["unet"]["down_block_types"])
    # The native U-Net doubles what it halved, so that no half may be odd; so does Optimum's.
    open_export = isinstance(options, OptimumOptions) and not options.fixed
    doubles = isinstance(options, NativeOptions) or open_export
    multiple = scale * 2 ** (levels - 1) if doubles else scale
    side = checkpoint.configs["unet"].get("sample_size", 64)
    width, height = side if isinstance(side, list) else (side, side)
    default = (scale * width, scale * height)
    fixed = isinstance(options, CoremlOptions | TensorrtOptions)
    for width, height in sizes or (default,):
        for side in (width, height):
            if side % multiple or side < multiple:
                raise ValueError(f"size {width}x{height}: {side} is no multiple of {multiple}")
    sizes = sizes or ((default,) if fixed else ())
    if sizes:
        sides = [side for size in sizes for side in size]
        return Sizes(sizes[0], multiple, min(sides), max(sides), tuple(dict.fromkeys(sizes)))
    least = min(scale * 2**levels, *default)
    return Sizes(default, multiple, least, max(2048, *default))
