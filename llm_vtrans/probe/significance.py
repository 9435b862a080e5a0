"""Kept against pruned units: differences, effect sizes and permutation tests."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

NUM_PERMUTATIONS = 10_000


@dataclass(frozen=True)
class Comparison:
    """One category of attention, kept units against pruned ones.

    Attributes:
        kept: mean share over kept units.
        pruned: mean share over pruned units.
        cohens_d: difference (kept minus pruned) over the pooled standard deviation.
        cliffs_delta: P(kept > pruned) - P(kept < pruned), in [-1, 1].
        p_value: two-sided permutation test over all units.
        p_within_layers: the same, permuting inside each layer only, so that a difference
            between layers cannot pass for one between heads; None where no layer is mixed.
        p_holm: `p_value` corrected for the number of categories (Holm).
        spearman: rank correlation of the share with the unit's signal-to-noise ratio.
        p_spearman: its two-sided permutation test.

    Where every unit was kept, or none, only the correlation is there; the rest is None.
    """

    kept: float | None
    pruned: float | None
    cohens_d: float | None
    cliffs_delta: float | None
    p_value: float | None
    p_within_layers: float | None
    p_holm: float | None
    spearman: float
    p_spearman: float


def compare(
    shares: np.ndarray, is_kept: np.ndarray, signal: np.ndarray, seed: int = 0
) -> list[dict[str, float | None]]:
    """Compares kept and pruned units in every category.

    Args:
        shares: `(num_layers, num_units, num_categories)`.
        is_kept: `(num_layers, num_units)` bool.
        signal: log signal-to-noise ratio of the units' masks, `(num_layers, num_units)`.
        seed: of the permutations.
    """
    found = [
        _compare(shares[..., c], is_kept, signal, np.random.default_rng([seed, c]))
        for c in range(shares.shape[-1])
    ]
    p_values = [f.p_value for f in found if f.p_value is not None]
    corrected = holm(p_values) if p_values else [None] * len(found)
    return [{**asdict(f), "p_holm": p} for f, p in zip(found, corrected, strict=True)]


def _compare(
    share: np.ndarray, is_kept: np.ndarray, signal: np.ndarray, random: np.random.Generator
) -> Comparison:
    ranks, other = _ranks(share.ravel()), _ranks(signal.ravel())
    rho = _correlation(ranks, other)
    shuffled = [_correlation(random.permutation(ranks), other) for _ in range(NUM_PERMUTATIONS)]
    p_spearman = _p_value(np.abs(shuffled), abs(rho))
    kept, pruned = share[is_kept], share[~is_kept]
    if not len(kept) or not len(pruned):
        return Comparison(None, None, None, None, None, None, None, rho, p_spearman)
    spread = np.sqrt(
        (((kept - kept.mean()) ** 2).sum() + ((pruned - pruned.mean()) ** 2).sum())
        / max(share.size - 2, 1)
    )
    difference = kept.mean() - pruned.mean()
    larger = np.sign(kept[:, None] - pruned[None, :])
    return Comparison(
        kept=float(kept.mean()),
        pruned=float(pruned.mean()),
        cohens_d=float(difference / spread) if spread > 0 else 0.0,
        cliffs_delta=float(larger.mean()),
        p_value=permutation_test(share.reshape(1, -1), is_kept.reshape(1, -1), random),
        p_within_layers=_within_layers(share, is_kept, random),
        p_holm=1.0,
        spearman=rho,
        p_spearman=p_spearman,
    )


def _within_layers(
    share: np.ndarray, is_kept: np.ndarray, random: np.random.Generator
) -> float | None:
    mixed = is_kept.any(1) & ~is_kept.all(1)
    return permutation_test(share[mixed], is_kept[mixed], random) if mixed.any() else None


def permutation_test(share: np.ndarray, is_kept: np.ndarray, random: np.random.Generator) -> float:
    """Two-sided p-value of the difference of means when labels are exchanged within rows.

    Args:
        share: `(num_rows, num_units)`.
        is_kept: same shape, bool.
        random: draws the permutations.
    """

    def difference(flags: np.ndarray) -> np.ndarray:
        kept = np.where(flags, share, 0).sum((-2, -1)) / flags.sum((-2, -1))
        pruned = np.where(flags, 0, share).sum((-2, -1)) / (~flags).sum((-2, -1))
        return np.abs(kept - pruned)

    drawn = [difference(random.permuted(is_kept, axis=1)) for _ in range(NUM_PERMUTATIONS)]
    return _p_value(np.array(drawn), float(difference(is_kept)))


def _p_value(drawn: np.ndarray, observed: float) -> float:
    """Share of draws at least as extreme, the observation counted as one (never zero)."""
    extreme = int((drawn >= observed * (1 - 1e-12)).sum())
    return (extreme + 1) / (len(drawn) + 1)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction, in the given order."""
    order = np.argsort(p_values)
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties share their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean_ranks: np.ndarray = (ends - (counts + 1) / 2)[inverse]
    return mean_ranks


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; 0 where one side is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / norm) if norm > 0 else 0.0
