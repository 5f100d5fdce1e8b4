"""What a target may be told beside the precision; each knows its limits and says them."""

from __future__ import annotations

from dataclasses import dataclass

from .checkpoint import ConvertError

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


Options = CoremlOptions | TensorrtOptions | NativeOptions


def _choose(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConvertError(f"{name} {value!r} is not one of {', '.join(known)}")
