"""Our engines and their peers, on networks of some kilobytes."""

from dataclasses import replace

import pytest

from ferrotype.benchmarks import peer_workers, peers
from ferrotype.benchmarks.peer_workers import PEERS
from ferrotype.runtime.bench import results
from ferrotype.runtime.bench.protocol import Limits, Picture, RunnerError

OURS, TORCH, PLAIN = "native-bf16", "torch-fp32", "onnxruntime-fp32"
ABSENT = "stable-diffusion.cpp-f16"
STEPS = 3
SCALE = replace(peers.TINY, steps=STEPS, limits=Limits(rounds=2, seconds=1e6, restart=1000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(scope="module")
def output(folder):
    """Of a run in which nothing can be installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        peers.compare((OURS, TORCH, ABSENT, PLAIN), folder, SCALE, 1, "again", folder / "out")
    return folder / "out"


def test_everyone_draws_the_same_work_in_turn(output):
    found = results.load(output.with_suffix(".json"))
    assert [v.name for v in found.measured] == [OURS, TORCH, PLAIN]
    for variant in found.measured:
        assert [s.round for s in variant.samples] == [0, 1]
        assert variant.settings["size"] == "64x64"
        for sample in variant.samples:
            counts = {stage: len(times) for stage, times in sample.stages.items()}
            assert counts == {"text_encoder": 1, "unet": STEPS, "vae_decoder": 1}
            assert sum(map(sum, sample.stages.values())) <= sample.seconds
        assert variant.peak > 0
    assert [v.activations for v in found.measured] == ["bf16", "fp32", "fp32"]


def test_who_cannot_be_installed_is_named_with_the_reason(output):
    found = results.load(output.with_suffix(".json"))
    [absent] = [v for v in found.variants if not v.samples]
    assert absent.name == ABSENT
    assert "pip could not install stable-diffusion-cpp-python" in absent.error
    text = output.with_suffix(".md").read_text()
    assert f"- {ABSENT}: pip could not install" in text.split("## Not measured")[1]


def test_the_table_has_the_figures_of_the_result(output):
    found = results.load(output.with_suffix(".json"))
    text = output.with_suffix(".md").read_text()
    assert "`again`" in text
    for variant in found.measured:
        [row] = [line for line in text.splitlines() if line.startswith(f"| {variant.name} ")]
        steps = [s for sample in variant.samples for s in sample.stages["unet"]]
        assert peers.tables.duration(peers.median(steps)) in row


def test_an_interrupt_keeps_what_was_measured(folder, output, monkeypatch):
    written = []

    def interrupt(found, path, write=peers.write):
        write(found, path)
        written.append(found.protocol.rounds)
        if len(written) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(peers, "write", interrupt)
    target = folder / "interrupted"
    monkeypatch.setattr(peers, "prepare_all", lambda names, *_: (list(names), {}))
    peers.compare((OURS, PLAIN), folder, SCALE, 1, "again", target)
    found = results.load(target.with_suffix(".json"))
    assert found.protocol.stopped == "interrupted"
    assert [len(v.samples) for v in found.variants] == [1, 1]
    assert not list(folder.glob("*.part"))


def test_what_takes_too_long_to_make_is_named():
    for argv, seconds, why in (
        (["sleep", "60"], 0.1, "no time to make"),
        (["sh", "-c", "echo one >&2; echo the last words >&2; exit 3"], 60, "the last words"),
        (["sh", "-c", "exit 3"], 60, "ended with 3"),
        (["true"], 60, ""),
    ):
        found = peers._failure(argv, seconds)
        assert why in found
        assert bool(found) == bool(why)


def test_short_memory_is_shared_in_turns(folder, output):
    """With room for one, whoever draws ends the other; both draw on."""
    turns = []
    room = peers.Room(lambda: 0 if any(turn.pid for turn in turns) else 1e12)
    turns += [peers.Turn(PEERS[name], folder, SCALE, 1, room) for name in (OURS, PLAIN)]
    for turn in (*turns, *turns[::-1]):
        turn.ready()
        assert turn.picture(0).seconds > 0
        assert [t.pid is not None for t in turns] == [t is turn for t in turns]
    for turn in turns:
        turn.close()


def test_whoever_lost_pages_to_others_warms_up_again(folder, output, monkeypatch):
    turn = peers.Turn(PEERS[OURS], folder, SCALE, 1, peers.Room())
    turn.ready()
    drawn, draw = [], turn._draw
    monkeypatch.setattr(turn, "_draw", lambda seed: drawn.append(seed) or draw(seed))
    turn.ready()
    assert not drawn
    monkeypatch.setattr(peers, "TAKEN", -1e6)  # as if a terabyte were gone
    turn.ready()
    assert drawn == [0]
    turn.close()


def test_a_peer_that_does_not_answer_is_ended(folder, output):
    worker = peer_workers.Worker(PEERS[TORCH], folder, 1, patience=0.2)
    try:
        with pytest.raises(RunnerError, match="no answer within"):
            worker.ask(open={"size": (64, 64), "steps": 1})
    finally:
        worker.close()


def test_what_an_engine_raises_is_told(folder, output, tmp_path):
    with peer_workers.Worker(PEERS[PLAIN], tmp_path, 1) as worker:
        with pytest.raises(RunnerError, match=r"model\.onnx"):
            worker.ask(open={"size": (64, 64), "steps": 1})
        with pytest.raises(RunnerError, match="no such request"):
            worker.picture(0)


def test_stages_of_stable_diffusion_cpp_are_what_it_tells():
    """Its package is not there: a stand-in that calls back as it does."""

    class Engine:
        steps = STEPS

        def generate_image(self, *, sample_steps, progress_callback, **more):
            progress_callback(5, 100, 0.0)  # of its weights
            for step in range(self.steps + 1):
                progress_callback(step, sample_steps, 0.1)

    drawer = object.__new__(peer_workers.Cpp)
    drawer._size, drawer._steps, drawer._engine = (64, 64), STEPS, Engine()
    found = drawer.picture(0)
    assert {stage: len(times) for stage, times in found.items()} == {
        "text_encoder": 1, "unet": STEPS, "vae_decoder": 1,
    }  # fmt: skip
    assert Picture(1.0, found)
    Engine.steps = 1
    with pytest.raises(peer_workers.PeerError, match="told of 1 steps, not of 3"):
        drawer.picture(0)
