"""The one ancestor of everything Ferrotype raises on purpose; its message is for the user.

FerrotypeError
├── BundleError    bundle.py            the bundle is damaged, incomplete or of another format
├── ParityError    parity.py            what was written differs too much from the original
├── PipelineError  runtime/pipeline.py  a network returned something that is no picture
├── PictureError   runtime/pictures.py  a picture cannot be read or may not be written
├── TraceError     runtime/memory.py    the system does not tell what a process has in memory
├── ResultError    runtime/bench/       what was given as a benchmark's result is none
├── StoreError     runtime/bench/       the file of results cannot be read or written
├── RunnerError    runtime/bench/       what was to be measured cannot go on
├── Refusal        runtime/plan.py      a run does not fit the memory budget
├── RecipeRefusal  runtime/recipes.py   a few-step model is asked for what it was not distilled for
├── DeviceError    runtime/devices.json the doctor's data cannot be read
├── KernelError    kernels/             the native engine is missing or refuses a program
├── GraphError     runtime/program.py   a network that the native engine cannot run
├── RecipeError    quantize/recipe.py   which weights get how many bits cannot be read
└── ConvertError   convert/             the checkpoint or an option does not work

A wrong argument is a ValueError.
"""


class FerrotypeError(Exception):
    """Something is wrong outside the program; the message is one line that says what to do."""


def printable(text: str) -> str:
    """`text` as one line that moves no cursor: names in files are others' words."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
