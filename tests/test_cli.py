"""The command line: what it writes, what it refuses, and how it says so."""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from drawings import write_drawings
from PIL import Image

from navit import cli, config
from navit.info import kernel_table
from navit.train import Batch, Trainer

SMALL = [
    "--preset",
    "Nano/16",
    "--steps",
    "6",
    "--token-budget",
    "64",
    "--warmup",
    "2",
    "--workers",
    "0",
    "--device",
    "cpu",
]
SMALL += ["--sides", "24,48", "--learning-rate", "0.01", "--decay-head", "0.1", "--token-drop", "0.5,0.1"]


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.SIZES, "Nano", (32, 1, 2, 64))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawings(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(config.SIZES, "Nano", (32, 1, 2, 64))
        assert navit("train", data, "--run", run, *SMALL) == 0
    return run


def navit(*arguments: object) -> int:
    """Run the command line here; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["navit", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that an error prints on stderr, after what was said before."""
    lines = capsys.readouterr().err.splitlines()
    assert lines, "an error says something"
    assert [line.startswith("navit: ") for line in lines] == [False] * (len(lines) - 1) + [True], lines
    return lines[-1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_training_leaves_weights_state_metrics_and_pictures(trained: Path) -> None:
    names = {"config.json", "model.safetensors", "settings.json", "resume.pt", "metrics.jsonl"}
    pictures = {"curves.png", "predictions.png", "packs.png"}
    assert {path.name for path in trained.iterdir()} == names | pictures
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(0 < line["fill"] <= 1 and line["images"] > 0 and line["tokens"] <= 64 for line in steps)
    assert lines[-1].keys() == {"step", "held_out_loss", "held_out_accuracy"}
    for name in pictures:
        with Image.open(trained / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10, f"{name} is blank"


def test_an_existing_run_is_not_written_over(trained: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(trained)
    assert navit("train", data, "--run", trained, *SMALL) == 1
    assert "exists already" in error_line(capsys)
    assert contents(trained) == before


def test_overwrite_replaces_a_run_but_no_other_folder(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    (again / "tradeoff.png").write_bytes(b"of the run before")
    assert navit("train", data, "--run", again, *SMALL, "--overwrite") == 0
    assert not (again / "tradeoff.png").exists()
    capsys.readouterr()
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("years of work")
    assert navit("train", data, "--run", precious, *SMALL, "--overwrite") == 1
    assert "no run folder" in error_line(capsys)
    assert contents(precious) == {"chapter.txt": b"years of work"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "Huge/16"], "preset must be"),
        (["--device", "abacus"], "--device must be"),
        (["--sides", "64"], "--sides must be 2 numbers"),
        (["--sides", "256,64"], "0 < low <= high"),
        (["--token-drop", "1.5"], "--token-drop must be"),
    ],
)
def test_a_wrong_option_is_one_line_and_leaves_nothing(
    options: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert navit("train", data, "--run", tmp_path / "run", *SMALL, *options) == 1
    assert message in error_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "one class"])
def test_an_unusable_data_set_is_one_line_and_leaves_nothing(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = tmp_path / "set"
    if kind == "empty":
        where.mkdir()
    elif kind == "one class":
        write_drawings(where, classes=("red",))
    assert navit("train", where, "--run", tmp_path / "run", *SMALL) == 1
    assert str(where) in error_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["eval", "predict", "embed", "resume"])
@pytest.mark.parametrize(
    "kind", ["missing", "no run", "weights missing", "weights broken", "other shape", "other classes"]
)
def test_an_unusable_run_is_one_line(
    kind: str, command: str, trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    if kind == "no run":
        run.mkdir()
    elif kind != "missing":
        shutil.copytree(trained, run)
    if kind == "weights missing":
        (run / "model.safetensors").unlink()
    elif kind == "weights broken":
        (run / "model.safetensors").write_bytes(b"\0" * 100)
    elif kind == "other shape":
        (run / "config.json").write_text((run / "config.json").read_text().replace('"width": 32', '"width": 64'))
    elif kind == "other classes":
        settings = json.loads((run / "settings.json").read_text())
        (run / "settings.json").write_text(json.dumps(settings | {"classes": ["cat", "dog"]}))
    before = contents(run) if run.exists() else None
    arguments = {
        "eval": ["eval", run],
        "predict": ["predict", run, data],
        "embed": ["embed", run, data, "--to", tmp_path / "out.npz"],
        "resume": ["train", "--resume", "--run", run],
    }[command]
    assert navit(*arguments) == 1
    assert str(run) in error_line(capsys)
    assert (contents(run) if run.exists() else None) == before
    assert not (tmp_path / "out.npz").exists()


def test_evaluating_on_other_classes_is_an_error(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_drawings(tmp_path / "other", classes=("blue", "red"))
    assert navit("eval", trained, "--data", other) == 1
    assert "the classes blue, red; the run has blue, green, red" in error_line(capsys)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_resuming_continues_bitwise(device: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, run, steps = tmp_path / "whole", tmp_path / "run", Trainer.run
    options = [*SMALL, "--save-every", "3", "--device", device]
    assert navit("train", data, "--run", whole, *options) == 0

    def interrupted(self: Trainer, batches: Iterable[Batch]) -> Iterator[list[dict[str, float]]]:
        for arrived in steps(self, batches):
            yield arrived
            if self.step == 4:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", interrupted)
        assert navit("train", data, "--run", run, *options) == 1
    torch.manual_seed(999)  # a new process would not have the old one's random state
    assert navit("train", "--resume", "--run", run, "--device", device, "--workers", "0") == 0
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    def losses(folder: Path) -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    assert losses(run) == losses(whole)
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.gpu
def test_a_compiled_model_trains(data: Path, tmp_path: Path) -> None:
    assert navit("train", data, "--run", tmp_path / "run", *SMALL, "--device", "cuda", "--compile") == 0


def test_compiling_on_a_cpu_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert navit("train", data, "--run", tmp_path / "run", *SMALL, "--compile") == 1
    assert "--compile needs a GPU" in error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_resumed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(trained)
    assert navit("train", "--resume", "--run", trained) == 1
    assert "has finished" in error_line(capsys)
    assert contents(trained) == before


def test_resuming_takes_no_other_settings(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert navit("train", "--resume", "--run", trained, "--learning-rate", "1") == 1
    assert "learning_rate" in error_line(capsys)


def test_files_that_cannot_be_used_are_named_and_not_fatal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = write_drawings(tmp_path / "set")
    (where / "red" / "torn.png").write_bytes((where / "red" / "0.png").read_bytes()[:60])
    (where / "blue" / "empty.png").write_bytes(b"")
    assert navit("train", where, "--run", tmp_path / "run", *SMALL) == 0
    said = "".join(capsys.readouterr().out.split())
    assert "torn.png" in said
    assert "empty.png" in said


def test_demo_trains_on_any_data_set_and_states_the_baseline(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert navit("demo", "--data", data, "--run", run, "--steps", "2", "--device", "cpu") == 0
    captured = capsys.readouterr()
    assert captured.err.count("plain torch references run") == 1
    assert "held-out accuracy" in captured.out
    assert "majority class: 33.3%" in " ".join(captured.out.split())
    assert (run / "predictions.png").exists()


def test_the_demos_images_are_in_the_repository() -> None:
    assert (cli.DEMO_DATA / "manifest.csv").exists()


def test_eval_with_tokens_plots_accuracy_and_cost(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert navit("eval", trained, "--tokens", "1,4,9", "--device", "cpu") == 0
    rows = json.loads((trained / "tradeoff.json").read_text())
    assert [row["tokens"] <= limit for row, limit in zip(rows, (1, 4, 9), strict=True)] == [True] * 3
    assert rows[0]["gflops"] < rows[1]["gflops"] < rows[2]["gflops"]
    assert all(0 <= row["accuracy"] <= 1 and row["milliseconds"] > 0 for row in rows)
    picture = (trained / "tradeoff.png").read_bytes()
    capsys.readouterr()
    assert navit("eval", trained, "--tokens", "4", "--device", "cpu") == 1
    assert "exists already" in error_line(capsys)
    assert (trained / "tradeoff.png").read_bytes() == picture
    (trained / "tradeoff.png").unlink()
    (trained / "tradeoff.json").unlink()


def test_predict_prints_the_likeliest_classes(trained: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert navit("predict", trained, data / "red" / "0.png", data / "blue" / "1.png", "--top", "2") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(str(data / "red" / "0.png"))
    assert second.startswith(str(data / "blue" / "1.png"))
    assert first.count("%") == 2


def test_predict_names_a_file_it_cannot_read_and_goes_on(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert navit("predict", trained, tmp_path / "bad.png", data / "red" / "0.png") == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert "bad.png" in captured.err


def test_embed_writes_vectors_beside_their_paths_in_the_order_given(trained: Path, data: Path, tmp_path: Path) -> None:
    files = [data / "red" / "3.png", data / "blue" / "0.png", data / "green" / "5.png", data / "blue" / "7.png"]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert navit("embed", trained, *files[:2], tmp_path / "bad.png", *files[2:], "--to", tmp_path / "all.npz") == 0
    together = np.load(tmp_path / "all.npz")
    assert together["paths"].tolist() == list(map(str, files))
    assert together["vectors"].shape == (4, 32)
    for place, file in enumerate(files):
        assert navit("embed", trained, file, "--to", tmp_path / f"{place}.npz") == 0
        alone = np.load(tmp_path / f"{place}.npz")["vectors"][0]
        np.testing.assert_allclose(alone, together["vectors"][place], rtol=1e-4, atol=1e-5)


def test_embed_does_not_write_over_a_file(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.npz").write_text("mine")
    assert navit("embed", trained, data, "--to", tmp_path / "mine.npz") == 1
    assert "exists already" in error_line(capsys)
    assert (tmp_path / "mine.npz").read_text() == "mine"


@pytest.mark.parametrize("model", ["B/16", "So400m/14"])
def test_info_tells_size_cost_and_what_runs(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert navit("info", model, "--device", "cpu") == 0
    said = capsys.readouterr().out
    for expected in ("parameters", "GFLOP", "torch", "self_attention", "reference"):
        assert expected in said


@pytest.mark.parametrize(
    ("arch", "gluon", "forward", "backward"),
    [(90, True, "hopper_stream", "hopper_stream"), (90, False, "stream", "stream"), (80, True, "stream", "stream")],
)
def test_info_tells_which_attention_kernels_run_on_a_gpu(
    arch: int, gluon: bool, forward: str, backward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from navit_kernels import _jit

    monkeypatch.setattr(_jit, "architecture", lambda device: arch)
    monkeypatch.setattr(_jit, "gluon_is_supported", lambda: gluon)
    table = kernel_table(torch.device("cuda"), config.NaViTConfig.preset("B/16"))
    ops, runs, launches = ([*column.cells] for column in table.columns)
    row = ops.index("self_attention")
    lines = dict(line.split(":", 1) for line in launches[row].splitlines())
    assert lines["longer forward"].strip().startswith(f"{forward},")
    assert lines["longer backward"].strip().startswith(f"{backward},")
    assert ("Hopper" in runs[row]) == ("hopper" in launches[row]) == (forward == "hopper_stream")


def test_info_of_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert navit("info", trained, "--device", "cpu") == 0
    assert "0.0" in capsys.readouterr().out


def test_info_of_nothing_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert navit("info", "nowhere/at/all", "--device", "cpu") == 1
    assert "nowhere/at/all" in error_line(capsys)


def test_a_checkpoint_is_whole_even_if_saving_is_cut_off(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, save, saves = tmp_path / "run", torch.save, []

    def cut_off(state: dict, path: Path) -> None:
        saves.append(path)
        if len(saves) == 2:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut_off)
        assert navit("train", data, "--run", run, *SMALL, "--save-every", "2") == 1
    assert navit("train", "--resume", "--run", run, "--workers", "0", "--device", "cpu") == 0
