"""The command line: navit demo | train | eval | predict | embed | info."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from . import plots
from .config import NaViTConfig
from .data import DataError, ImageSet, SkipReport, find_images, read_images, train_and_held_out
from .evaluate import cost_and_accuracy, majority_baseline, outputs, probabilities, score, view_batches
from .fit import fit
from .images import Augment, Resize
from .info import kernel_table, machine_table, model_tables
from .integrations import siglip2
from .model import NaViT
from .runs import RunFolder, UserError, load_model
from .train import BatchStream, Settings, TrainConfig, Trainer

app = typer.Typer(
    help="Vision transformers on images of any resolution and aspect ratio.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)
DEMO_DATA = Path(__file__).parent.parent / "data" / "openclipart-mini"

Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images; 0 decodes in the main one.")]
Run = Annotated[Path, typer.Option(help="The run folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left there.")]
RunArgument = Annotated[Path, typer.Argument(help="A run folder that demo or train wrote.", metavar="RUN")]


class Schedule(str, Enum):
    rsqrt = "rsqrt"
    cosine = "cosine"
    constant = "constant"


class Loss(str, Enum):
    softmax = "softmax"
    sigmoid = "sigmoid"


class Sampling(str, Enum):
    native = "native"
    uniform = "uniform"
    truncated_normal = "truncated_normal"


def main() -> None:
    """Run the command line. What the user can mend ends in one line on stderr and exit code 1."""
    try:
        app()
    except (UserError, DataError) as error:
        err.print(f"navit: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


def choose_device(name: str) -> torch.device:
    """The device to run on. Says which, because a GPU runs the Triton kernels and a CPU the plain torch references."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here")
    runs = "the Triton kernels run" if device.type == "cuda" else "the plain torch references run, not the kernels"
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    err.print(f"device: {what}; {runs}", style="dim")
    return device


def load_run(path: Path, device: str) -> tuple[RunFolder, Settings, NaViT]:
    """A run folder, how it was trained, and its model on a device."""
    run = RunFolder.open(path)
    settings, model = run.settings(), load_model(path)
    if model.config.num_classes != len(settings.classes):
        raise UserError(
            f"{path}: the model has {model.config.num_classes} classes, settings.json {len(settings.classes)}"
        )
    return run, settings, model.to(choose_device(device))


def read_split(data: str, classes: tuple[str, ...] | None = None) -> tuple[ImageSet, ImageSet]:
    """The training and held-out images of a data set, which must have these classes."""
    images = read_images(data)
    if classes is not None and images.classes != classes:
        raise UserError(f"{data} has the classes {', '.join(images.classes)}; the run has {', '.join(classes)}")
    return train_and_held_out(images)


def begin(
    path: Path, settings: Settings, sides: tuple[ImageSet, ImageSet], config: NaViTConfig, device: str, overwrite: bool
) -> tuple[RunFolder, NaViT]:
    """A new run folder, and a model drawn from the run's seed."""
    placed = choose_device(device)
    torch.manual_seed(settings.train.seed)
    model = NaViT(config).to(placed)
    run = RunFolder.create(path, settings, overwrite)
    images, words = sum(map(len, sides)), f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
    out.print(f"{images} images of {len(settings.classes)} classes, {len(sides[1])} held out; {words}")
    return run, model


@app.command()
def demo(
    data: Annotated[Path, typer.Option(help="A folder of class folders, or a manifest.")] = DEMO_DATA,
    run: Run = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the weights, the order and the augmentation.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Packs to train on.")] = 400,
    device: Device = "auto",
    workers: Workers = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train a small NaViT on the drawings that the repository ships, and evaluate it on held-out ones."""
    if data == DEMO_DATA and not data.exists():
        raise UserError(f"the demo's images are not at {data}: run it from a checkout, or give --data")
    sides = read_split(str(data))
    settings = Settings(
        data=str(data.resolve()),
        classes=sides[0].classes,
        train=TrainConfig(
            steps=steps,
            learning_rate=2e-3,
            warmup=max(1, steps // 12),
            schedule="cosine",
            decay_head=0.05,
            decay_body=0.05,
            label_smoothing=0.1,
            seed=seed,
            evaluate_every=max(1, steps // 4),
        ),
        token_budget=2048,
        resize=Resize("native"),
        view=Resize("native"),
        augment=Augment(flip=0.5, recolor=0.3),
        token_drop=(0.5, 0.5),
    )
    config = NaViTConfig(
        width=128, depth=4, heads=4, mlp_width=512, patch_size=8, table_length=64, num_classes=len(settings.classes)
    )
    folder, model = begin(run, settings, sides, config, device, overwrite)
    stream = BatchStream(sides[0], settings, config, workers)
    fit(folder, Trainer(model, settings.train), stream, sides[1], settings, out)


@app.command()
def train(
    context: typer.Context,
    data: Annotated[str | None, typer.Argument(help="A folder of class folders, or a CSV or JSONL manifest.")] = None,
    run: Run = Path("runs/train"),
    preset: Annotated[str, typer.Option(help="Ti, S, B, L or So400m, a slash, and the patch size in pixels.")] = "S/16",
    steps: Annotated[int, typer.Option(min=1, help="Packs to train on.")] = 10_000,
    token_budget: Annotated[int, typer.Option(min=1, help="Tokens per pack.")] = 16_384,
    image_budget: Annotated[
        int | None, typer.Option(min=1, help="Images per pack at most: pads packs, and a GPU replays CUDA graphs.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="After the warm-up.")] = 8e-4,
    schedule: Annotated[Schedule, typer.Option(help="Of the learning rate after the warm-up.")] = Schedule.rsqrt,
    warmup: Annotated[int, typer.Option(min=0, help="Steps of linear warm-up.")] = 500,
    cooldown: Annotated[int, typer.Option(min=0, help="Steps of linear decay to zero at the end.")] = 500,
    decay_head: Annotated[float, typer.Option(help="Weight decay of the classifier.")] = 3.0,
    decay_body: Annotated[float, typer.Option(help="Weight decay of all other matrices.")] = 0.03,
    loss: Annotated[Loss, typer.Option(help="Cross-entropy.")] = Loss.softmax,
    label_smoothing: Annotated[float, typer.Option(min=0, max=1, help="With softmax.")] = 0.0,
    sampling: Annotated[
        Sampling, typer.Option(help="How an image's size is drawn; native keeps it.")
    ] = Sampling.uniform,
    sides: Annotated[str, typer.Option(help="Least and greatest side that is drawn, in pixels.")] = "64,256",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Patches per image at most; larger ones shrink.")
    ] = 1024,
    token_drop: Annotated[str, typer.Option(help="Share of tokens dropped: a rate, or START,END over training.")] = "0",
    seed: Annotated[int, typer.Option(help="Of the weights, the order and the augmentation.")] = 0,
    evaluate_every: Annotated[int, typer.Option(min=0, help="Steps; 0: at the end.")] = 1000,
    save_every: Annotated[int, typer.Option(min=0, help="Steps; 0: at the end.")] = 1000,
    device: Device = "auto",
    workers: Workers = 2,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the model with torch.compile.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run stopped, as if it had not.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a NaViT on a data set."""
    if compiled and (device == "cpu" or not torch.cuda.is_available()):
        raise UserError("--compile needs a GPU: the references that run on a CPU loop over images")
    if resume:
        changed = sorted(set(_given(context)) - {"run", "resume", "device", "workers", "compiled"})
        if changed:
            raise UserError(f"--resume goes on with the run's own settings; leave out {', '.join(changed)}")
        folder, settings, model = load_run(run, device)
        state = folder.load_state()
        images = read_split(settings.data, settings.classes)
        stream = BatchStream(images[0], settings, model.config, workers)
        trainer = Trainer(model, settings.train, compiled, settings.image_budget, max(settings.token_drop))
        stream.position = state["position"]
        trainer.load_state(state)
        if trainer.step >= settings.train.steps:
            raise UserError(f"{run} has finished: it took all of its {trainer.step} steps")
        out.print(f"going on after step {trainer.step}")
    else:
        if data is None:
            raise UserError("give the data set to train on, or --resume")
        low, high = _numbers("--sides", sides, float, 2)
        images = read_split(data)
        try:
            settings = Settings(
                data=str(Path(data).resolve()),
                classes=images[0].classes,
                train=TrainConfig(
                    steps=steps,
                    learning_rate=learning_rate,
                    warmup=warmup,
                    schedule=schedule.value,
                    cooldown=cooldown,
                    decay_head=decay_head,
                    decay_body=decay_body,
                    loss=loss.value,
                    label_smoothing=label_smoothing,
                    seed=seed,
                    evaluate_every=evaluate_every,
                    save_every=save_every,
                ),
                token_budget=token_budget,
                image_budget=image_budget,
                resize=Resize(sampling.value, low, high, max_tokens),
                view=Resize(max_tokens=max_tokens),
                token_drop=_token_drop(token_drop),
            )
            config = NaViTConfig.preset(preset, num_classes=len(settings.classes))
        except ValueError as error:
            raise UserError(str(error)) from None
        folder, model = begin(run, settings, images, config, device, overwrite)
        stream = BatchStream(images[0], settings, config, workers)
        trainer = Trainer(model, settings.train, compiled, settings.image_budget, max(settings.token_drop))
    try:
        fit(folder, trainer, stream, images[1], settings, out)
    except KeyboardInterrupt:
        raise UserError(f"stopped at step {trainer.step}; go on from the last checkpoint with --resume") from None
    except FloatingPointError as error:
        raise UserError(f"{error}; try a lower --learning-rate or a longer --warmup") from None


def _given(context: typer.Context) -> list[str]:
    """The parameters that the command line names."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def _numbers(option: str, text: str, kind: type, count: int | None = None) -> list:
    """The comma-separated numbers of an option."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or count not in (None, len(numbers)):
        raise UserError(f"{option} must be {count or 'some'} numbers with commas between, got {text!r}")
    return numbers


def _token_drop(text: str) -> tuple[float, float]:
    rates = _numbers("--token-drop", text, float)
    if len(rates) > 2 or not all(0 <= rate < 1 for rate in rates):
        raise UserError(f"--token-drop must be one or two rates in [0, 1), got {text!r}")
    return rates[0], rates[-1]


@app.command(name="eval")
def evaluate(
    run: RunArgument,
    data: Annotated[str | None, typer.Option(help="Another data set of the same classes.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens per image to compare, such as 64,144,256,576.")] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Evaluate on held-out images; with --tokens, plot accuracy and cost against tokens per image into RUN."""
    folder, settings, model = load_run(run, device)
    images, held_out = read_split(data or settings.data, settings.classes)
    majority = majority_baseline(images, held_out)
    skipped = SkipReport()
    if tokens is None:
        last = score(model, held_out, settings, skipped=skipped)
        out.print(f"held-out accuracy {last.accuracy:.1%} of {len(last.labels_S)} images, loss {last.loss:.3f}")
    else:
        picture = run / "tradeoff.png"
        if picture.exists() and not overwrite:
            raise UserError(f"{picture} exists already: give --overwrite")
        rows = [
            cost_and_accuracy(model, held_out, settings, count, skipped) for count in _numbers("--tokens", tokens, int)
        ]
        table = Table("tokens per image", "accuracy", "GFLOP per image", "ms per image")
        for row in rows:
            table.add_row(
                f"{row['tokens']:.1f}", f"{row['accuracy']:.1%}", f"{row['gflops']:.3g}", f"{row['milliseconds']:.3g}"
            )
        out.print(table)
        plots.plot_tradeoff(picture, rows, majority)
        folder.write("tradeoff.json", json.dumps(rows, indent=2) + "\n")
        out.print(f"wrote {picture} and tradeoff.json")
    out.print(f"always answering the majority class: {majority:.1%}")
    _warn(skipped)


@app.command()
def predict(
    run: RunArgument,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", metavar="IMAGE...")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 3,
    device: Device = "auto",
) -> None:
    """Print the likeliest classes of image files."""
    found = find_images(images)
    _, settings, model = load_run(run, device)
    skipped = SkipReport()
    result = outputs(model, view_batches(found, settings, model, skipped=skipped))
    for row, place in zip(result.rows_SN, result.places_S.tolist(), strict=True):
        best = probabilities(row[None], settings)[0].topk(min(top, len(settings.classes)))
        guesses = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        guess = ", ".join(f"{settings.classes[k]} {chance:.1%}" for k, chance in guesses)
        out.print(f"{found.paths[place]}: {guess}", markup=False, soft_wrap=True)
    _warn(skipped, fatal=True)


@app.command()
def embed(
    paths: Annotated[list[Path], typer.Argument(help="A run, and files or folders.", metavar="[RUN] IMAGE...")],
    to: Annotated[Path, typer.Option(help="The file to write: vectors (N, E) float32 and paths (N,).")] = Path(
        "embeddings.npz"
    ),
    weights: Annotated[Path | None, typer.Option(help="A SigLIP 2 NaFlex checkpoint folder, in place of RUN.")] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write one vector per image, the model's output before its classifier, with the images' paths."""
    if weights is None and len(paths) == 1:
        raise UserError("give a run folder and images, or --weights and images")
    found = find_images(paths if weights else paths[1:])
    if to.exists() and not overwrite:
        raise UserError(f"{to} exists already: give another --to, or --overwrite")
    if not to.parent.is_dir():
        raise UserError(f"there is no folder {to.parent} to write {to.name} to")
    skipped = SkipReport()
    if weights is None:
        _, settings, model = load_run(paths[0], device)
        model.head = nn.Identity()
        packs = view_batches(found, settings, model, skipped=skipped)
    else:
        model = load_model(weights, siglip2.from_checkpoint).float().to(choose_device(device))
        packs = siglip2.Preprocessing.read(weights).packs(found, report=skipped)
    result = outputs(model, packs)
    if not len(result.places_S):
        raise UserError(f"none of the {len(found)} images can be used: {next(iter(skipped.reasons.values()))}")
    with open(to, "wb") as file:
        np.savez(
            file, vectors=result.rows_SN.numpy(), paths=np.array([found.paths[k] for k in result.places_S.tolist()])
        )
    out.print(f"wrote {to}: {len(result.rows_SN)} vectors of {result.rows_SN.shape[1]}")
    _warn(skipped)


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A preset, a run folder or a saved model.")] = "B/16",
    device: Device = "auto",
) -> None:
    """Print a model's parameters and FLOPs, versions, the device, and which kernels are active."""
    path = Path(model)
    if path.is_dir():
        config = load_model(path).config
    else:
        try:
            config = NaViTConfig.preset(model)
        except ValueError as error:
            raise UserError(f"{model} is no folder, and as a preset: {error}") from None
    placed = choose_device(device)
    for table in (*model_tables(model, config), machine_table(placed), kernel_table(placed, config)):
        out.print(table)


def _warn(skipped: SkipReport, fatal: bool = False) -> None:
    """Name the files that could not be used."""
    if skipped:
        err.print(str(skipped), style="yellow", markup=False, soft_wrap=True)
        if fatal:
            raise typer.Exit(1)
