"""Variational-information-bottleneck masks: the mathematics, nothing of models.

VTrans (arXiv:2406.05276) after VIBNet (arXiv:1802.10399). Every unit carries a
Gaussian gate `z ~ N(mu, exp(log_var))`; the KL term drives the gates of redundant
units to noise.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

THRESHOLD = 0.0  # log_alpha from which a unit's noise outweighs its signal
SHARPNESS = (0.5, 10.0)  # of the keep probability, annealed geometrically over the search


def log_alpha(mu: Tensor, log_var: Tensor) -> Tensor:
    """Log noise-to-signal ratio of each gate; a unit is redundant from `THRESHOLD` on.

    Args:
        mu: means, any shape, float32.
        log_var: log variances, same shape.

    Returns:
        `log_var - log(mu^2 + 1e-8)`, same shape (VIBNet, arXiv:1802.10399).
    """
    return log_var - torch.log(mu.square() + 1e-8)


def kl_divergence(mu: Tensor, log_var: Tensor) -> Tensor:
    """KL of one mask to its prior with the prior's variance optimised out, in nats, shape `()`.

    `0.5 * sum log(1 + mu^2 / exp(log_var))` (VIBNet's closed form), written with `softplus` so
    that it neither overflows nor loses its gradient at small variances.
    """
    return 0.5 * nn.functional.softplus(torch.log(mu.square() + 1e-8) - log_var).sum()


def keep_probability(log_alpha_: Tensor, sharpness: float) -> Tensor:
    """Differentiable stand-in for `log_alpha < THRESHOLD`: `sigmoid(-sharpness * log_alpha)`.

    TVA-Prune's surrogate. At `sharpness` 10 it is flat around the initial `log_alpha`,
    so training anneals the sharpness upwards from a value that has a gradient there.
    """
    return torch.sigmoid(-sharpness * (log_alpha_ - THRESHOLD))


class VIBMasks(nn.Module):
    """All gates of a model: per structure one `mu` and one `log_var` tensor, always float32.

    Args:
        shapes: structure name -> shape, such as `{"hidden": (4096,), "heads": (32, 8)}`.
        initial_log_var: starting value of every `log_var`.
        seed: of the small spread around the starting values.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], initial_log_var: float, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def around(value: float, shape: tuple[int, ...]) -> nn.Parameter:
            return nn.Parameter(value + 0.01 * torch.randn(shape, generator=generator))

        self.mu = nn.ParameterDict({name: around(1.0, shape) for name, shape in shapes.items()})
        self.log_var = nn.ParameterDict(
            {name: around(initial_log_var, shape) for name, shape in shapes.items()}
        )

    def names(self) -> list[str]:
        """The structures that have gates."""
        return list(self.mu.keys())

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """One reparameterised draw of every gate, noise taken in a single call.

        Args:
            generator: on the masks' device; it alone decides the noise.
        """
        sizes = [self.mu[name].numel() for name in self.names()]
        device = self.mu[self.names()[0]].device
        noise = torch.randn(sum(sizes), generator=generator, device=device).split(sizes)
        return {
            name: self.mu[name] + eps.view_as(self.mu[name]) * torch.exp(self.log_var[name] / 2)
            for name, eps in zip(self.names(), noise, strict=True)
        }

    def log_alpha(self) -> dict[str, Tensor]:
        """`log_alpha` of every structure."""
        return {name: log_alpha(self.mu[name], self.log_var[name]) for name in self.names()}

    def keep_probability(self, sharpness: float) -> dict[str, Tensor]:
        """Soft probability of every unit to be kept."""
        return {name: keep_probability(la, sharpness) for name, la in self.log_alpha().items()}

    def kl(self, weights: Mapping[str, float]) -> Tensor:
        """Weighted sum of the masks' KL terms in nats, shape `()`."""
        terms = [weights[n] * kl_divergence(self.mu[n], self.log_var[n]) for n in self.names()]
        return torch.stack(terms).sum()
