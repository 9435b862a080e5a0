"""`llm-vtrans report`: the report of a run anew, or several runs in one page."""

from __future__ import annotations

from pathlib import Path

from llm_vtrans.commands.command import Parser
from llm_vtrans.errors import UserError, blame
from llm_vtrans.record.output_folder import atomic_write_text
from llm_vtrans.report.build import comparison_page, run_page
from llm_vtrans.report.record import REPORT_FILE, UNCHANGED, RunRecord


def report(arguments: list[str]) -> None:
    """Writes an HTML file and prints its path.

    Args:
        arguments: the command line after the command's name.

    Raises:
        UserError: no such run, or several runs without `--output`.
    """
    parser = Parser(prog="llm-vtrans report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="result of prune")
    parser.add_argument("--output", type=Path, help="HTML file (one run: RUN/report/index.html)")
    parser.add_argument("--scores", type=Path, help="JSON of `llm-vtrans score` (one run)")
    parser.add_argument("--comparison", type=Path, help="table.json of eval/compare.py")
    parser.add_argument("--probe", type=Path, help="folder of `llm-vtrans probe` (one run)")
    args = parser.parse_args(arguments)
    if len(args.runs) > 1 and args.output is None:
        raise UserError("several runs make one page: name it by --output compare.html")
    if len(args.runs) > 1:
        records = [RunRecord.read(run) for run in args.runs]
        with blame(", ".join(map(str, args.runs)), UNCHANGED):
            html = comparison_page(records)
    else:
        record = RunRecord.read(args.runs[0], args.scores, args.comparison, args.probe)
        with blame(record.folder, UNCHANGED):
            html = run_page(record, record.name)
    path = args.output or args.runs[0] / REPORT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, html)
    print(path)
