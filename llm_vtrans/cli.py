"""The console script `llm-vtrans`: one subcommand per thing a user does."""

from __future__ import annotations

import sys
from collections.abc import Callable

from llm_vtrans import __version__
from llm_vtrans.command import USER_ERROR, run_command


def _prune(arguments: list[str]) -> None:
    from llm_vtrans.prune import prune

    prune(arguments)


def _score(arguments: list[str]) -> None:
    from llm_vtrans.score import run

    run(arguments)


def _export(arguments: list[str]) -> None:
    from llm_vtrans.exporting import export

    export(arguments)


def _report(arguments: list[str]) -> None:
    from llm_vtrans.report.command import report

    report(arguments)


def _probe(arguments: list[str]) -> None:
    from llm_vtrans.probe.command import probe

    probe(arguments)


def _convert(arguments: list[str]) -> None:
    from llm_vtrans.convert.command import convert

    convert(arguments)


def _verify(arguments: list[str]) -> None:
    from llm_vtrans.verify import verify

    verify(arguments)


def _publish(arguments: list[str]) -> None:
    from llm_vtrans.publishing import publish

    publish(arguments)


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "prune": (_prune, "train masks under a budget and write the pruned checkpoint"),
    "export": (_export, "write another size from a run's masks, without training"),
    "score": (_score, "perplexity and harness tasks, beside a dense baseline"),
    "report": (_report, "write the HTML report of a run, or several runs side by side"),
    "probe": (_probe, "what the dense model's heads look at, kept against pruned"),
    "convert": (_convert, "write a checkpoint for another runtime (gguf: llama.cpp)"),
    "verify": (_verify, "check that a checkpoint holds what its manifest states"),
    "publish": (_publish, "upload a verified checkpoint with its card to the hub"),
}


def main() -> int:
    """Runs the subcommand that the first argument names."""
    arguments = sys.argv[1:]
    if arguments in (["--version"], ["-V"]):
        print(__version__)
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:8} {text}" for name, (_, text) in COMMANDS.items()]
        lines.append("\nevery command takes --offline: nothing is fetched, no connection is made")
        print("usage: llm-vtrans COMMAND [OPTIONS]\n\n" + "\n".join(lines))
        return 0 if arguments else USER_ERROR
    if arguments[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: unknown command {arguments[0]!r}; known are {known}", file=sys.stderr)
        return USER_ERROR
    return run_command(COMMANDS[arguments[0]][0], arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
