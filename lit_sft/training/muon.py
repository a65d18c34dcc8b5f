"""Muon for the matrices of hidden layers, AdamW for all other parameters.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) makes the update of a matrix
orthogonal. It is made for hidden layers: embeddings, the head, norms and biases are trained by
AdamW, with the same learning rate. The rate of both fits with
`adjust_lr_fn: match_rms_adamw` (Liu et al. 2025, arXiv:2502.16982).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer


class MuonWithAdamW(Optimizer):
    """Two optimizers that share one state and one list of parameter groups.

    Args:
        make: Makes a `Muon`.
        groups: Parameter groups.
        adamw_only: `id` of the matrices that AdamW trains: embeddings and head.
    """

    def __init__(
        self,
        make: Callable[[Iterable], Optimizer],
        groups: Iterable[dict[str, Any]],
        adamw_only: Collection[int],
    ) -> None:
        hidden: list[nn.Parameter] = []
        others: list[dict[str, Any]] = []
        for group in groups:
            rest = []
            for parameter in group["params"]:
                if parameter.ndim == 2 and id(parameter) not in adamw_only:
                    hidden.append(parameter)
                else:
                    rest.append(parameter)
            if rest:
                others.append({**group, "params": rest})
        muon = make(hidden)
        self._parts = [muon]
        if others:
            defaults = muon.defaults
            self._parts.append(
                AdamW(others, lr=defaults["lr"], weight_decay=defaults["weight_decay"])
            )
        all_groups = [group for part in self._parts for group in part.param_groups]
        super().__init__(all_groups, muon.defaults)
        self._share()

    def _share(self) -> None:
        """Gives both optimizers the groups and the state of this one."""
        for part in self._parts:
            is_muon = isinstance(part, Muon)
            part.param_groups = [g for g in self.param_groups if ("betas" not in g) == is_muon]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of both optimizers."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Makes a step of both optimizers.

        Args:
            closure: Computes the loss and the gradients.

        Returns:
            The loss; None without `closure`.
        """
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss
