"""The console script `llm-vtrans`: one subcommand per thing a user does."""

from __future__ import annotations

import sys
from pkgutil import resolve_name

from llm_vtrans import __version__
from llm_vtrans.commands.command import USER_ERROR, run_command

# Imported when called: a subcommand needs only its own libraries.
COMMANDS = {
    "prune": ("prune:prune", "train masks under a budget and write the pruned checkpoint"),
    "plan": ("commands.plan:plan", "what a run would take, from the config alone"),
    "export": ("commands.export:export", "write another size from a run's masks, without training"),
    "score": ("score:run", "perplexity and harness tasks, beside a dense baseline"),
    "report": ("report.command:report", "write the HTML report of a run, or several side by side"),
    "probe": ("probe.command:probe", "what the dense model's heads look at, kept against pruned"),
    "convert": ("convert.command:convert", "write a checkpoint for another runtime (gguf)"),
    "verify": ("commands.verify:verify", "check that a checkpoint holds what its manifest states"),
    "publish": ("commands.publish:publish", "upload a verified checkpoint with its card"),
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
    return run_command(resolve_name(f"llm_vtrans.{COMMANDS[arguments[0]][0]}"), arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
