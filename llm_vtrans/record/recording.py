"""RECORD: what a finished run says about itself, and how a requeued one recognises it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.budget.cost import dense_shape, mac_cost, parameter_cost
from llm_vtrans.errors import UserError
from llm_vtrans.loading.checkpoint import Checkpoint
from llm_vtrans.preparation.command_line import command_line, recipe
from llm_vtrans.preparation.planning import dense_params
from llm_vtrans.record.manifest import (
    CARD_FILE,
    RECIPE_FILE,
    dtype_name,
    figures,
    kept_units,
    write_manifest,
)
from llm_vtrans.record.masks_file import MASKS_FILE
from llm_vtrans.record.model_card import PIPELINES, base_license, model_card
from llm_vtrans.record.output_folder import MANIFEST_FILE, OutputFolder, atomic_write_text
from llm_vtrans.record.redaction import redact
from llm_vtrans.record.reporting import METRICS_FILE, versions
from llm_vtrans.record.verification import sha256_of, windows_sha256
from llm_vtrans.report.build import write_run_report
from llm_vtrans.report.record import RunRecord
from llm_vtrans.training.run_state import STATE_FILE, STATE_FOLDER

if TYPE_CHECKING:
    from llm_vtrans.job import Job

RESULT_KEYS = (  # of the manifest, in the order in which --json prints them
    "source", "layout", "budget", "params", "macs", "bytes", "latency", "perplexity", "score",
    "kept", "phases",
)  # fmt: skip
METHODS = {"faster": "faster-vtrans", "fast": "fast-vtrans", "vtrans": "vtrans"}
RECOVERY_SETTINGS = ("recover", "recover_steps")  # a stage that begins anew
FREE_SETTINGS = {  # a resumed run may have others
    "config", "output", "overwrite", "resume", "dry_run", "save_every", "log_every", "quiet",
    "json", "shard_size", "export_dtype", "batch_size", "gradient_accumulation",
    "gradient_checkpointing", "track", *RECOVERY_SETTINGS,
}  # fmt: skip


def deciding_settings(args: PruneArguments) -> dict[str, Any]:
    """Options on which the trained masks depend; the global batch is one more."""
    return {name: value for name, value in asdict(args).items() if name not in FREE_SETTINGS}


def result_folder(args: PruneArguments) -> OutputFolder:
    """The place of a run's result, which may hold the state of an interrupted one."""
    folder = args.output_folder()
    resumes = args.resume and (folder / STATE_FILE).is_file()
    return OutputFolder(folder, args.overwrite or resumes, (STATE_FOLDER,))


def finished_manifest(args: PruneArguments) -> dict[str, Any] | None:
    """Manifest of this run if its result is in the output folder, as a requeued job finds it."""
    folder = args.output_folder()
    if (folder / STATE_FILE).is_file() or not (folder / MANIFEST_FILE).is_file():
        return None
    try:
        manifest: dict[str, Any] = RunRecord.read(folder).manifest
    except UserError:  # something else lies there, which the check of the folder tells
        return None
    found, now = manifest["settings"], deciding_settings(args)
    now |= {name: getattr(args, name) for name in RECOVERY_SETTINGS}
    if not now["samples"]:  # the default, which is known with the model only
        del now["samples"]
    is_same = all(found[name] == now[name] for name in found.keys() & now.keys())
    return manifest if is_same else None


def result_line(folder: Path, manifest: dict[str, Any]) -> str:
    """What `--json` prints of a result."""
    result = {key: manifest[key] for key in RESULT_KEYS if key in manifest}
    return json.dumps({"output": str(folder), **result})


def write_record(job: Job, folder: Path, hashes: dict[str, str], metrics: Path) -> dict[str, Any]:
    """Writes all that goes with the weights: manifest, metrics, recipe, card and report.

    Args:
        job: a run with its scores.
        folder: that holds the weights and masks.
        hashes: SHA-256 of the weight files.
        metrics: records of the training, which `--masks` leaves out.

    Returns:
        The manifest.
    """
    if metrics.is_file():
        shutil.copyfile(metrics, folder / METRICS_FILE)
    atomic_write_text(folder / RECIPE_FILE, redact(recipe(job.args)))
    names = {path.name for path in folder.iterdir() if path.is_file()} | {MASKS_FILE}
    rest = {name: sha256_of(folder / name) for name in sorted(names - hashes.keys())}
    manifest = _manifest(job, folder, {**rest, **hashes})
    write_manifest(folder, manifest)
    atomic_write_text(folder / CARD_FILE, redact(model_card(manifest, figures(manifest))))
    write_run_report(folder, job.output.path.name)
    return manifest


def _manifest(job: Job, folder: Path, hashes: dict[str, str]) -> dict[str, Any]:
    args, source, shape = job.args, job.source, job.plan.shape
    written = Checkpoint.open(folder)
    num_written = sum(torch.Size(info.shape).numel() for info in written.tensors.values())
    params = parameter_cost(job.architecture)
    num_params = params.of(shape)
    assert num_written == num_params, (num_written, num_params)
    dense = dense_shape(source.architecture)
    dense_cost = parameter_cost(source.architecture)
    dense_macs = mac_cost(source.architecture, job.seq_len)
    budgets = [limit.budget.record(limit.cost.of(shape)) for limit in job.problem.limits]
    return {
        "method": METHODS[args.variant],
        "source": {
            "name": args.model,
            "revision": args.revision,
            "sha256": source.checkpoint.sha256,
            "license": base_license(source.checkpoint.folder, source.checkpoint.config),
        },
        "params": {"before": dense_params(source), "after": num_params},
        "macs": {
            "before": dense_macs.of(dense),
            "after": job.macs.of(shape),
            "seq_len": job.seq_len,
        },
        # Of one sequence at a time; the ranks, a quantised base and other dtypes leave it out.
        "latency": job.measured.compared_latency(),
        "bytes": {"before": source.checkpoint.num_bytes, "after": written.num_bytes},
        "budget": budgets[0],
        "also": budgets[1:],
        "kept": kept_units(shape),
        "units": {axis.value: n for axis, n in job.architecture.num_units.items()},
        "parts": _by_part(dense_cost.split(dense), params.split(shape)),
        "mac_parts": _by_part(dense_macs.split(dense), job.macs.split(shape)),
        "layout": args.layout,
        "rotation": "pca" if job.rotation is not None else "none",
        "task": job.data.kind,
        "pipeline_tag": PIPELINES[job.data.kind],
        "auto_class": source.auto_class.__name__,
        # Of each stage the headline score; a language model's is its perplexity.
        "perplexity" if job.data.kind == "clm" else "score": {
            **job.measured.headline,
            "protocol": job.data.protocol,
            "windows_sha256": windows_sha256(job.data.heldout.tensors["input_ids"]),
        },
        "recovery": {"method": args.recover, "steps": job.recovery_steps},
        "headline": job.data.headline,
        "scores": job.measured.scores,
        "settings": {**asdict(args), "steps": job.settings.num_steps},
        "command": redact(command_line(args)),
        "phases": job.reporter.record(),
        "versions": versions(),
        "computed_in": {
            "device": job.accelerator.device.type, "dtype": dtype_name(job.dtype),
        },
        "sha256": hashes,
    }  # fmt: skip


def _by_part(before: dict[str, int], after: dict[str, int]) -> dict[str, dict[str, int]]:
    return {name: {"before": before[name], "after": after[name]} for name in before}
