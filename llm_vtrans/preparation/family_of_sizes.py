"""SEVERAL BUDGETS: masks trained once, and one result of each size (`--budgets`).

The masks' ranking serves every budget (METHOD.md section 5, Flexible VIB's idea, arXiv
2402.01238), so only the first run trains it; the others allocate, tune and export from it.
"""

from __future__ import annotations

from dataclasses import replace

from llm_vtrans.arguments import PruneArguments


def runs_of(args: PruneArguments) -> list[PruneArguments]:
    """The runs that options ask for, in order: one, or one for each of `--budgets`.

    The masks are trained at the budget in the middle, nearest to all others.
    """
    budgets = args.shares()
    if not budgets:
        return [args]
    folder = args.output_folder()

    def run(share: float, masks: str | None) -> PruneArguments:
        output = str(folder / f"{share:g}")
        return replace(args, budgets=None, sparsity=share, masks=masks, output=output)

    middle = sorted(budgets)[len(budgets) // 2]
    first = run(middle, args.masks)
    others = [run(share, args.masks or first.output) for share in budgets if share != middle]
    return [first, *others]
