"""`llm-vtrans publish RUN --repo NAME`: a verified checkpoint goes to the hub."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from transformers.utils import logging as transformers_logging

from llm_vtrans.commands.command import Parser
from llm_vtrans.errors import UserError, blame
from llm_vtrans.record.manifest import CARD_FILE, figures
from llm_vtrans.record.model_card import model_card
from llm_vtrans.record.output_folder import MANIFEST_FILE, atomic_write_text
from llm_vtrans.record.verification import Subject, verify
from llm_vtrans.report.record import REPORT_FILE, SCORES_FILE, UNCHANGED, RunRecord

EXTRA = (MANIFEST_FILE, CARD_FILE, REPORT_FILE, SCORES_FILE)  # beside the files with a hash
REPO = re.compile(r"([\w.-]+/)?[A-Za-z0-9][\w.-]*")


def publish(arguments: list[str]) -> None:
    """Checks a run, writes its card anew and uploads it.

    Args:
        arguments: the command line after the command's name.

    Raises:
        UserError: the run does not hold what it states, or the hub refuses.
    """
    args = parse(arguments)
    transformers_logging.set_verbosity_error()
    record = RunRecord.read(args.run, scores=args.scores)
    for finding in verify(Subject.open(args.run)):
        if finding.is_failure:
            raise UserError(
                f"{args.run}: {finding.check}: {finding.text}; `llm-vtrans verify` tells all"
            )
    with blame(args.run, UNCHANGED):
        card = model_card(record.manifest, figures(record.manifest), record.scores)
        names = published_files(args.run, record)
    print(f"{args.repo} ({'private' if args.private else 'public'})")
    for name in names:
        size = len(card.encode()) if name == CARD_FILE else (args.run / name).stat().st_size
        print(f"  {size:>14,} bytes  {name}")
    if args.dry_run:
        print(f"\n{CARD_FILE}:\n{card}\nnothing was sent (--dry-run)")
        return
    atomic_write_text(args.run / CARD_FILE, card)
    print(upload(args, names))


def published_files(run: Path, record: RunRecord) -> list[str]:
    """Names of the files that go: those with a hash, the manifest, the card and the report."""
    extra = [name for name in EXTRA if name == CARD_FILE or (run / name).is_file()]
    return sorted({*record.manifest["sha256"], *extra})


def upload(args: argparse.Namespace, names: list[str]) -> str:
    """Makes the repository and uploads the files in one commit; returns its address.

    Raises:
        UserError: no token, no right, or no connection.
    """
    api = HfApi()
    title = json.loads((args.run / MANIFEST_FILE).read_text())["source"]["name"]
    try:
        repo = api.create_repo(args.repo, private=args.private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=args.run,
            allow_patterns=names,
            commit_message=f"{Path(title).name} pruned by llm_vtrans",
        )
    except (OSError, HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--repo {args.repo}: the hub did not take it ({reason[:200]}); set HF_TOKEN to a "
            "token with write access, check the connection"
        ) from error
    return str(commit.commit_url)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = Parser(prog="llm-vtrans publish", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="result of prune")
    parser.add_argument("--repo", required=True, help="OWNER/NAME on the hub")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--scores", type=Path, help="JSON of `llm-vtrans score` for the card")
    parser.add_argument("--dry-run", action="store_true", help="show what would go, send nothing")
    args = parser.parse_args(arguments)
    if REPO.fullmatch(args.repo) is None:
        raise UserError(f"--repo {args.repo}: expected OWNER/NAME of letters, digits, - _ and .")
    return args
