"""``nettrim prune``: from a network and calibration files to a folder."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

import nettrim
from nettrim import folder, recipe, samples
from nettrim.commands.common import Goal, NumberOrAuto, Numbers, Size, finite, in_a_line, one_goal, one_line_errors
from nettrim.commands.progress import Bar
from nettrim.commands.workers import workers
from nettrim.errors import ArgumentError
from nettrim.files import MAX_BYTES
from nettrim.options import Options
from nettrim.sources import Source, normalised, open_source
from nettrim.sources.base import Reading

GOALS = ("epsilon", "sparsity", "budget")
# of the command, not of nettrim.prune; those of the first line are in the recipe too
_INPUTS = ("model", "weights", "calibration", "key", "samples", "batch_size", "sequence_length", "image_size", "image_mean", "image_std", "max_bytes")
_RUNNING = ("workers", "scheduler", "threads")
_NOT_IN_RECIPE = ("out", "force", "checkpoint_dir", "recipe", "as_json", "quiet")
_THERE = click.Path(exists=True, path_type=Path)
_SHARE: dict[str, Any] = {"type": float, "callback": finite, "show_default": True}
_COUNT = click.IntRange(min=1)
_DEFAULTS: dict[str, Any] = {name: parameter.default for name, parameter in inspect.signature(nettrim.prune).parameters.items()}


def _use_recipe(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Take the recipe's values as the defaults of the other options."""
    if path is None:
        return None
    try:
        found = recipe.read_recipe(path)
    except ArgumentError as error:
        raise click.BadParameter(in_a_line(error)) from error
    context.meta[__name__] = dict(found)
    for name in (recipe.MADE_BY, recipe.INPUTS):
        found.pop(name, None)
    known = {option.name for option in context.command.params} - set(_NOT_IN_RECIPE)
    unknown = sorted(found.keys() - known)
    if unknown:
        raise click.BadParameter(f"{path} has no option {unknown[0]!r}; expected some of {', '.join(sorted(filter(None, known)))}")
    for name in ("epsilon", "sparsity"):
        if name in found:
            given = found[name]
            found[name] = list(given.items()) if isinstance(given, dict) else [(None, given)]
    for name in ("targets", "ignore"):
        if isinstance(found.get(name), str):
            found[name] = [found[name]]
    context.default_map = found
    return path


@click.command()
@click.argument("model", required=False, metavar="[MODEL]")
@click.option("--calibration", type=_THERE, help="File (.npy, .npz, .safetensors, .txt) or folder of images or text: unlabelled samples.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; it must not exist.")
@click.option("--force", is_flag=True, help="Replace --out if it is the folder of another run.")
@click.option("--recipe", type=_THERE, is_eager=True, callback=_use_recipe, help="YAML file with options; those given here count before its own.")
@click.option("--weights", type=_THERE, help="MODEL is package.module:factory: its weights (.safetensors).")
@click.option("--epsilon", type=Goal(), multiple=True, callback=one_goal, help="Budget of each layer, relative; or LAYER=NUMBER, repeated.")
@click.option("--sparsity", type=Goal(), multiple=True, callback=one_goal, help="Share of the weights to be zero; or LAYER=NUMBER, repeated.")
@click.option("--budget", type=float, callback=finite, help="How far the network's output may be off, relative.")
@click.option("--pattern", default="unstructured", show_default=True, help="unstructured, n:m (n kept of m), block:RxC, or neuron.")
@click.option("--allocation", type=click.Choice(["auto", "uniform"]), default="auto", show_default=True, help="How one sparsity is spread.")
@click.option("--fidelity", type=click.Choice(["network", "diagonal", "layer"]), default="network", show_default=True, help="What the zeros serve.")
@click.option("--mode", type=click.Choice(["cascade", "parallel"]), default="cascade", show_default=True, help="Whose inputs a layer sees.")
@click.option("--gamma", default=1.1, **_SHARE, help="Cascade: slack over what the dense weights leave, squared.")
@click.option("--repair", type=NumberOrAuto(), default=1.0, show_default=True, help="Cascade: how far it makes up for what is broken; or auto.")
@click.option("--damping", default=0.0, **_SHARE, help="How near to the dense weights, as a share of noise in every input.")
@click.option("--preserve-zeros", is_flag=True, help="Weights that are zero stay so.")
@click.option("--kappa", default=1.0, **_SHARE, help="Cascade: factor on the last layer's squared budget.")
@click.option("--consistency", type=click.Choice(["relaxed", "paper"]), default="relaxed", show_default=True, help="Set that the layers are kept in.")
@click.option("--penalty", type=click.Choice(["auto", "l0", "l1"]), default="auto", show_default=True, help="--epsilon: fewest, or the papers' norm.")
@click.option("--reweight", type=click.IntRange(min=0), default=0, show_default=True, help="With --epsilon: rounds of reweighted l1.")
@click.option("--solver", default="auto", show_default=True, help="By name.")
@click.option("--tol", default=1e-3, **_SHARE, help="Relative duality gap called optimal.")
@click.option("--max-iter", type=_COUNT, help="Of the solver, for each layer.")
@click.option("--bias-weight", default=1.0, **_SHARE, help="Of biases in the l1 norm; 0 leaves them free.")
@click.option("--target", "targets", multiple=True, help="Layers to prune: name, glob or re:..., repeated; all by default.")
@click.option("--ignore", multiple=True, help="Layers to leave dense: name, glob or re:..., repeated.")
@click.option("--holdout", default=0.1, **_SHARE, help="Share of the samples kept out for the audit.")
@click.option("--max-rows", type=_COUNT, help="Solve on at most so many rows a layer.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all draws, and of a factory's random weights.")
@click.option("--device", help="Where the programs are solved: cpu, cuda, cuda:1; the network's own by default.")
@click.option("--on-failure", type=click.Choice(["raise", "keep_dense"]), default="raise", show_default=True, help="What an unsolved layer does.")
@click.option("--neurons", type=_COUNT, help="Solve layers with more outputs in blocks of so many.")
@click.option("--recalibrate-batchnorm", is_flag=True, help="Estimate the statistics of the pruned network's BatchNorms again.")
@click.option("--blocks", default="auto", show_default=True, help="Run the network block by block: auto, the module that holds the blocks, or none.")
@click.option("--checkpoint-dir", type=click.Path(path_type=Path), help="Folder that remembers solved layers: run again after a crash, it goes on.")
@click.option("--key", help="Of several arrays in the calibration file, the inputs.")
@click.option("--samples", type=_COUNT, help="Use the first so many samples.")
@click.option("--batch-size", type=_COUNT, default=8, show_default=True, help="Texts or images at a time through the network.")
@click.option("--sequence-length", type=click.IntRange(min=2), help="Tokens of a sample of text; what the network takes, at most 512, by default.")
@click.option("--image-size", type=Size(), help="Images: SIDE or HEIGHTxWIDTH; what a Hugging Face folder says by default.")
@click.option("--image-mean", type=Numbers(), help="Images: taken from the values in [0, 1]; one number or one a channel.")
@click.option("--image-std", type=Numbers(), help="Images: what the values are divided by then.")
@click.option("--max-bytes", type=_COUNT, default=MAX_BYTES, show_default="16 GiB", help="The most that a calibration file may hold.")
@click.option("--workers", type=_COUNT, help="With --mode parallel, or --neurons: solve in so many processes.")
@click.option("--scheduler", metavar="ADDRESS", help="Instead of --workers: of a Dask scheduler, such as tcp://host:8786.")
@click.option("--threads", type=_COUNT, help="Of torch, in each process; torch's own number by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="Print nothing: only the folder and the exit code.")
@click.pass_context
@one_line_errors
def prune(context: click.Context, **given: Any) -> None:
    """Prune MODEL on calibration samples and write the result to a folder.

    MODEL is a Hugging Face folder, a torch.export program (.pt2), or package.module:factory, a function without arguments that returns the network.

    The folder holds the pruned network, masks.safetensors, report.json, report.html and recipe.yaml, which runs the same again. Exits with 0 when
    the certificate holds, with 1 when it does not or something failed, with 2 when an option is wrong.
    """
    _goal_of_the_command_line(context, given)
    settings = {name: value for name, value in given.items() if name not in (*_INPUTS, *_RUNNING, *_NOT_IN_RECIPE)}
    settings["targets"] = settings["targets"] or None
    settings["blocks"] = None if settings["blocks"] == "none" else settings["blocks"]
    _check(given, settings)
    place = folder.check_place(given["out"], force=given["force"])
    if given["threads"] is not None:
        torch.set_num_threads(given["threads"])
    source, calibration, digests = open_inputs(given)
    recipe.check_inputs(context.meta.get(__name__, {}), digests)
    with workers(given["workers"], given["scheduler"]) as executor, Bar(given["quiet"]) as bar:
        running: dict[str, Any] = {"executor": executor, "progress": bar, "checkpoint_dir": given["checkpoint_dir"]}
        result = nettrim.prune(source.model, calibration, **settings, forward_fn=source.forward_fn, **running)
    with folder.new_folder(place, force=given["force"]) as made:
        source.write(result.model, made)
        folder.write_records(result, made)
        recipe.write_recipe(made / recipe.RECIPE, _asked(context, given), made_by=_versions(), inputs=digests)
    holds = result.report.certificate.holds
    if given["as_json"]:
        click.echo(json.dumps({"out": str(place), "holds": holds, "report": result.report.to_dict()}, allow_nan=False))
    elif not given["quiet"]:
        click.echo(f"{result.report}\nwrote {given['out']}")
    if not holds:
        raise click.ClickException(f"the certificate does not hold: {result.report.certificate.explanation}")


def _goal_of_the_command_line(context: click.Context, given: dict[str, Any]) -> None:
    """A goal that is given on the command line takes the place of the recipe's."""
    typed = [name for name in GOALS if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    for name in GOALS:
        if typed and name not in typed:
            given[name] = None


def _check(given: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse what is wrong whatever the network: before anything is read."""
    for name in ("model", "calibration"):
        if given[name] is None:
            raise click.UsageError(f"{'MODEL' if name == 'model' else '--calibration'} is missing; give it, or a --recipe that says it")
    helpers = [name for name in ("workers", "scheduler") if given[name] is not None]
    if len(helpers) > 1:
        raise click.UsageError("--workers starts processes here and --scheduler asks for those of a cluster; give one of them")
    if helpers and given["mode"] != "parallel" and given["neurons"] is None:
        raise click.UsageError(f"--{helpers[0]} goes with --mode parallel, or --neurons: in a cascade each layer waits for the one before")
    if given["quiet"] and given["as_json"]:
        raise click.UsageError("--quiet prints nothing and --json prints; give one of them")
    try:
        options: dict[str, Any] = {field.name: settings.get(field.name, _DEFAULTS.get(field.name)) for field in dataclasses.fields(Options)}
        Options(**options).check()
    except ArgumentError as error:
        raise click.UsageError(in_a_line(error)) from error


def open_inputs(given: dict[str, Any]) -> tuple[Source, Any, dict[str, str]]:
    """The network, its calibration data, and the checksums of what they were read from."""
    weights, path = (None if given[name] is None else Path(given[name]) for name in ("weights", "calibration"))
    assert path is not None
    source = open_source(given["model"], weights=weights, seed=given["seed"])
    reading = Reading(**{field.name: given[field.name] for field in dataclasses.fields(Reading)})
    calibration = samples.read(source, path, reading, key=given["key"], max_bytes=given["max_bytes"])
    path = path.resolve()
    files = samples.files_of(path, (*samples.IMAGES, *samples.TEXTS)) if path.is_dir() else [path]
    read = {str(file.resolve()): recipe.checksum([file], file) for file in source.files}
    return source, calibration, {**read, str(path): recipe.checksum(files, path)}


def _asked(context: click.Context, given: dict[str, Any]) -> dict[str, Any]:
    """The options as the recipe keeps them: plain values, paths that mean the same from everywhere, the number of threads that there were."""
    names = [option.name for option in context.command.params if option.name in given]
    kept = {name: given[name] for name in names if name not in _NOT_IN_RECIPE}
    for name in recipe.PATHS:
        kept[name] = None if kept[name] is None else str(Path(kept[name]).resolve())
    plain = {str(name): list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
    return {**plain, "model": normalised(given["model"]), "threads": torch.get_num_threads()}


def _versions() -> dict[str, str]:
    return {"nettrim": nettrim.__version__, "torch": str(torch.__version__)}
