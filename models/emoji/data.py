"""Pictures and captions from the two npm packages: names, compositing, and the sampler of captions.

    python models/emoji/data.py WORK    # writes WORK/data.pt

A picture is kept with its alpha at 160 pixels and put on a named background colour when it is
drawn, smaller or larger and slightly shifted, at the size the model works at.  Each thing is shown
on white and on six of the ten other colours; with the four that are withheld from it evaluate.py
measures combinations that were never seen.

Names come from the "name" of emoji-datasource, made plain by the rules of names.json: regular
expressions of what is left out and of what is deleted from a name, names for names, further names
(also those in "short_names"), and a word for the kind of thing by the beginning of its subcategory.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ferrotype.models.emoji.config import Recipe, stage

PICTURES = ("@lobehub/fluent-emoji-3d", "1.1.0")
NAMES = ("emoji-datasource", "16.0.0")
STORED = 160  # pixels of a stored picture; more than are drawn, so that scaling loses nothing
COLOURS = {  # sRGB
    "white": (255, 255, 255),
    "black": (28, 28, 34),
    "red": (222, 54, 54),
    "orange": (250, 146, 44),
    "yellow": (255, 222, 90),
    "green": (84, 184, 96),
    "sky blue": (140, 208, 250),
    "blue": (48, 88, 212),
    "purple": (146, 84, 200),
    "pink": (255, 168, 204),
    "gray": (158, 160, 166),
}
COLOUR_NAMES = tuple(COLOURS)
MIN_DIFFERENCE = (
    2.0  # of 255, mean over a 32x32 thumbnail: what is nearer is taken for the same picture
)
MAX_ARCHIVE = 200_000_000  # bytes unpacked; both packages together have 70 MB

SUBJECTS = {"{}": 0.85, "an emoji of {}": 0.1, "a picture of {}": 0.05}  # template -> its share
BACKGROUNDS = {"{} on {} background": 0.6, "{}, {} background": 0.25, "{} on {}": 0.15}
WHITE_UNSAID = 0.7  # of the pictures on white
FIRST_NAME = 0.5  # share of the canonical name, beside all names in turn
KIND_ALONE = 0.04  # "an animal"
ARTICLE = 0.6


@dataclass(frozen=True)
class Emoji:
    """One thing: its names (the first is unique), its kind, and its picture's file name."""

    names: tuple[str, ...]
    kind: str  # "" where no word fits
    file: str


# ---- names ---------------------------------------------------------------------------------------


def codes(unified: str) -> str:
    """Code points without the variation selector, which the two packages use differently."""
    return "-".join(c for c in unified.lower().split("-") if c != "fe0f")


def plain(name: str) -> str:
    """Lower case letters and single spaces: what a prompt is made of."""
    words = re.sub(r"[_\-:,]", " ", name.lower().replace("’", "'"))
    return " ".join(words.split())


def is_neutral(code: str, known: set[str]) -> bool:
    """Whether the same person is also there as a man and as a woman, which look almost the same."""
    by_role = code.startswith("1f9d1-200d") and code.replace("1f9d1", "1f468", 1) in known
    return by_role or f"{code}-200d-2640" in known


def canonical(name: str, table: dict) -> str:
    if name in table["renamed"]:
        return table["renamed"][name]
    name = plain(name)
    for pattern in table["deleted"]:
        name = re.sub(pattern, "", name)
    return name


def emoji_list(records: Sequence[dict], files: set[str], table: dict) -> list[Emoji]:
    """The things that have a picture (`files`: names without suffix) and a name of their own."""
    by_code = {codes(file): file for file in files}
    known = {codes(record["unified"]) for record in records}
    chosen = []
    for record in records:
        name = (record["name"] or record["short_name"].replace("_", " ")).lower()
        code = codes(record["unified"])
        unwanted = record["subcategory"] in table["left_out"] or is_neutral(code, known)
        if unwanted or any(re.fullmatch(p, name) for p in table["left_out_names"]):
            continue
        if code in by_code:
            chosen.append((canonical(name, table), by_code[code], record))
    firsts: dict[str, tuple] = {}
    for first, file, record in chosen:  # of two with one name the first is kept
        firsts.setdefault(first, (file, record))
    wanted = re.compile(rf"(?!({'|'.join(table['left_out_aliases'])})$)[a-z' ]+")
    aliases = {
        first: [a for a in map(plain, record["short_names"]) if wanted.fullmatch(a)]
        + table["also"].get(first, [])
        for first, (_, record) in firsts.items()
    }
    uses = Counter(a for names in aliases.values() for a in set(names))
    return [
        Emoji(
            (
                first,
                *(a for a in dict.fromkeys(aliases[first]) if a not in firsts and uses[a] == 1),
            ),
            next((k for s, k in table["kinds"].items() if record["subcategory"].startswith(s)), ""),
            file,
        )
        for first, (file, record) in firsts.items()
    ]


# ---- captions ------------------------------------------------------------------------------------


def with_article(phrase: str) -> str:
    last = phrase.split()[-1]
    if last.endswith("s") and not last.endswith("ss"):
        return phrase
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def on_colour(phrase: str, colour: str, template: str = "{} on {} background") -> str:
    """The phrase with its background: "a cat", "blue" -> "a cat on a blue background"."""
    said = with_article(colour) if template.endswith("on {} background") else colour
    return template.format(phrase, said)


def caption(names: Sequence[str], kind: str, colour: str, rng: random.Random) -> str:
    """One way to describe the thing on that background."""
    if kind and rng.random() < KIND_ALONE:
        phrase = kind
    else:
        phrase = names[0] if rng.random() < FIRST_NAME else rng.choice(names)
    if rng.random() < ARTICLE:
        phrase = with_article(phrase)
    phrase = rng.choices(list(SUBJECTS), list(SUBJECTS.values()))[0].format(phrase)
    if colour == "white" and rng.random() < WHITE_UNSAID:
        return phrase
    return on_colour(phrase, colour, rng.choices(list(BACKGROUNDS), list(BACKGROUNDS.values()))[0])


def shown(thing: int, colour: int) -> bool:
    """Whether this thing is ever shown on this colour; four of the ten are withheld from each."""
    return colour == 0 or (thing + 3 * colour) % 5 >= 2


def shown_colours(thing: int) -> list[int]:
    return [c for c in range(len(COLOUR_NAMES)) if shown(thing, c)]


# ---- pictures ------------------------------------------------------------------------------------


def read_picture(path: Path) -> np.ndarray:
    """uint8 (4, STORED, STORED): colour times alpha, and alpha; so resampling leaves no fringe."""
    with Image.open(path) as file:
        rgba = np.asarray(file.convert("RGBA"), np.float32)
    rgba = np.concatenate([rgba[..., :3] * rgba[..., 3:] / 255, rgba[..., 3:]], axis=2)
    planes = [
        np.asarray(Image.fromarray(rgba[..., k]).resize((STORED, STORED), Image.Resampling.LANCZOS))
        for k in range(4)
    ]
    resized = np.clip(np.stack(planes), 0, 255)
    resized[:3] = np.minimum(resized[:3], resized[3:])
    return resized.round().astype(np.uint8)


def distinct(rgba: torch.Tensor) -> list[int]:
    """Indices of the pictures of which no earlier one is nearly the same."""
    small = F.adaptive_avg_pool2d(rgba.float(), 32).flatten(1)
    kept: list[int] = []
    for i, picture in enumerate(small):
        if not kept or (small[kept] - picture).abs().mean(1).min() >= MIN_DIFFERENCE:
            kept.append(i)
    return kept


@dataclass(frozen=True)
class Placement:
    """How pictures are put down, one value per picture; scale 1 fills the frame."""

    colour: torch.Tensor  # int64, index into COLOUR_NAMES
    scale: torch.Tensor
    dx: torch.Tensor  # half frames, as dy
    dy: torch.Tensor
    shade: torch.Tensor  # how much lighter the top of the background is, in half ranges

    @classmethod
    def centred(cls, colour: torch.Tensor, scale: float = 0.9) -> Placement:
        zero = torch.zeros(len(colour))
        return cls(colour, torch.full((len(colour),), scale), zero, zero, zero)

    @classmethod
    def drawn(cls, colour: torch.Tensor, rng: torch.Generator, spread: float = 1.0) -> Placement:
        """A random one; the scales are 0.9 +- 0.05 times the spread."""
        u = torch.rand(5, len(colour), generator=rng) - 0.5
        shade = (u[3] + 0.3) * 0.2 * (u[4] < 0.1)
        return cls(
            colour, 0.9 + 0.1 * spread * u[0], 0.05 * spread * u[1], 0.05 * spread * u[2], shade
        )


def composite(rgba: torch.Tensor, at: Placement, size: int) -> torch.Tensor:
    """uint8 (n, 4, STORED, STORED) put on backgrounds -> float (n, 3, size, size) in [-1, 1]."""
    n = len(rgba)
    frame = torch.zeros(n, 2, 3)
    frame[:, 0, 0] = frame[:, 1, 1] = 1 / at.scale
    frame[:, 0, 2], frame[:, 1, 2] = -at.dx / at.scale, -at.dy / at.scale
    grid = F.affine_grid(frame, [n, 4, size, size], align_corners=False)
    x = F.grid_sample(rgba.float() / 255, grid, align_corners=False, padding_mode="zeros")
    palette = torch.tensor(list(COLOURS.values())) / 127.5 - 1
    ramp = torch.linspace(1, -1, size)[None, None, :, None]
    ground = palette[at.colour][:, :, None, None] + at.shade[:, None, None, None] * ramp
    alpha = x[:, 3:]
    return 2 * x[:, :3] - alpha + ground.clamp(-1, 1) * (1 - alpha)


# ---- the stage -----------------------------------------------------------------------------------


def npm_package(folder: Path, name: str, version: str) -> Path:
    """The unpacked package, fetched with `npm pack` if it is not there yet."""
    archive = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    unpacked = folder / archive.stem
    if not unpacked.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            subprocess.run(["npm", "pack", f"{name}@{version}"], cwd=folder, check=True)
        with tarfile.open(archive) as tar:
            members = [m for m in tar if m.isfile() and "/img/" not in m.name]  # sprite sheets
            if sum(m.size for m in members) > MAX_ARCHIVE:
                raise SystemExit(
                    f"{archive} unpacks to over {MAX_ARCHIVE:,} bytes: another package?"
                )
            tar.extractall(folder / "unpacking", members, filter="data")
        (folder / "unpacking").rename(unpacked)
    return unpacked / "package"


def batches(count: int, size: int) -> Iterator[slice]:
    yield from (slice(i, i + size) for i in range(0, count, size))


def prepare(work: Path, recipe: Recipe) -> None:
    if (work / "data.pt").exists():
        return
    pictures = npm_package(work / "npm", *PICTURES) / "assets"
    records = json.loads((npm_package(work / "npm", *NAMES) / "emoji.json").read_text())
    table = json.loads(Path(__file__).with_name("names.json").read_text())
    things = emoji_list(records, {path.stem for path in pictures.glob("*.webp")}, table)
    if recipe.things:
        things = things[:: len(things) // recipe.things][: recipe.things]
    rgba = torch.stack(
        [torch.from_numpy(read_picture(pictures / f"{t.file}.webp")) for t in things]
    )
    kept = distinct(rgba)
    save_data(work, rgba[kept], [things[i] for i in kept])
    print(f"{len(kept)} things; {len(things) - len(kept)} left out that look like another")


def save_data(work: Path, rgba: torch.Tensor, things: Sequence[Emoji]) -> None:
    temporary = work / "data.pt.tmp"
    names, kinds = [list(t.names) for t in things], [t.kind for t in things]
    torch.save({"rgba": rgba, "names": names, "kinds": kinds}, temporary)
    temporary.rename(work / "data.pt")


@dataclass(frozen=True)
class Data:
    """What the data stage wrote: pictures (n, 4, STORED, STORED), and names and kind of each."""

    rgba: torch.Tensor
    names: list[list[str]]
    kinds: list[str]

    @classmethod
    def load(cls, work: Path) -> Data:
        return cls(**torch.load(work / "data.pt", weights_only=True))

    def __len__(self) -> int:
        return len(self.names)

    def caption(self, thing: int, colour: int, rng: random.Random) -> str:
        return caption(self.names[thing], self.kinds[thing], COLOUR_NAMES[colour], rng)


if __name__ == "__main__":
    prepare(*stage())
