"""TRACK: metrics to the trackers that `accelerate` knows (`--track`)."""

from __future__ import annotations

from accelerate.tracking import get_available_trackers

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.errors import UserError

TRACKING_FOLDER = "tracking"  # beside the results, for trackers that write files


def trackers(args: PruneArguments) -> list[str] | None:
    """Accelerate's trackers that `--track` names.

    Raises:
        UserError: one of them is unknown or not installed.
    """
    available = [str(tracker.value) for tracker in get_available_trackers()]
    for name in args.trackers():
        if name not in available:
            raise UserError(
                f"--track {name}: not installed; there are {', '.join(available) or 'none'} "
                "(pip install tensorboard, wandb, ...)"
            )
    return args.trackers() or None
