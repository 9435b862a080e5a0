"""`llm-vtrans convert gguf RUN --output FILE`: a checkpoint for llama.cpp."""

from __future__ import annotations

import os
from pathlib import Path

from llm_vtrans.commands.command import Parser
from llm_vtrans.errors import UserError, require

FORMATS = ("gguf",)
DTYPES = ("auto", "float32", "float16", "bfloat16")


def convert(arguments: list[str]) -> None:
    """Converts a checkpoint and prints the path.

    Args:
        arguments: the command line after the command's name.

    Raises:
        UserError: the `gguf` package is missing, or the model cannot be written.
    """
    parser = Parser(prog="llm-vtrans convert", description=__doc__)
    parser.add_argument("format", choices=FORMATS, help="what to write")
    parser.add_argument("run", type=Path, metavar="RUN", help="a checkpoint, pruned or dense")
    parser.add_argument("--output", type=Path, help="file to write (default: RUN/model.gguf)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the matrices")
    args = parser.parse_args(arguments)
    require("gguf", f"convert {args.format}", "gguf")
    from llm_vtrans.convert.gguf_file import write_gguf

    path = args.output or args.run / "model.gguf"
    if not path.absolute().parent.is_dir():
        raise UserError(f"--output {path}: {path.parent} is no folder")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        write_gguf(args.run, partial, args.dtype)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    print(path)
