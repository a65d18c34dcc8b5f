"""The setting `model.lora`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lit_sft.errors import UserError

_INIT = re.compile(r"gaussian|orthogonal|olora|pissa|pissa_niter_\d+")


@dataclass
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685). The fields have the names and meaning of peft's."""

    r: int = 8
    """Rank of the update. An adapted [out, in] matrix gets r * (out + in) trained parameters."""
    lora_alpha: int = 8
    """Scale of the update, which is multiplied by lora_alpha / r (with `use_rslora` by lora_alpha /
    sqrt(r)).
    """
    lora_dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in training, in [0, 1)."""
    target_modules: str | list[str] = "all-linear"
    """Modules to adapt: `all-linear` for every linear layer except the head, a list of names such
    as [q_proj, v_proj], or one regular expression.
    """
    target_experts: bool = False
    """Also adapt the experts of a mixture of experts that are one parameter per layer, each expert
    with rank `r`. `all-linear` alone leaves them out.
    """
    exclude_modules: str | list[str] | None = None
    """Modules to leave out although `target_modules` matches them: a list of names, or one regular
    expression. null leaves none out.
    """
    modules_to_save: list[str] | None = None
    """Modules to train as a whole and to save with the adapter, such as [embed_tokens, lm_head].
    null trains none.
    """
    layers_to_transform: list[int] | None = None
    """Numbers of the decoder layers to adapt, from 0. null adapts all. Needs `target_modules` as a
    list.
    """
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks that differ from `r`, by name or regular expression of the module: {down_proj: 32}."""
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    """Values that differ from `lora_alpha`, by name or regular expression of the module."""
    trainable_token_indices: list[int] | None = None
    """Ids of tokens whose embeddings are trained, too, such as those of a chat template that is new
    to the base. null trains none.
    """
    use_rslora: bool = False
    """Rank-stabilized scaling (arXiv:2312.03732)."""
    use_dora: bool = False
    """Train direction and magnitude of the weights separately (DoRA, arXiv:2402.09353): better at
    low rank, slower.
    """
    init_lora_weights: bool | str = True
    """Start values: true for a random A and a zero B, or gaussian, orthogonal, olora, pissa
    (arXiv:2404.02948), pissa_niter_N (with a faster SVD).
    """

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_names()
        if self.target_experts:
            self._check_experts()

    def _check_numbers(self) -> None:
        if self.r <= 0:
            raise UserError(
                f"model.lora.r is {self.r}; set a rank of at least 1, or model.lora to null for no"
                " adapter"
            )
        if self.lora_alpha <= 0:
            raise UserError(
                f"model.lora.lora_alpha is {self.lora_alpha}; set a positive number, often r or"
                " 2 * r"
            )
        if not 0 <= self.lora_dropout < 1:
            raise UserError(
                f"model.lora.lora_dropout is {self.lora_dropout}; set a share from 0 to below 1"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            if any(value <= 0 for value in getattr(self, name).values()):
                raise UserError(
                    f"model.lora.{name} is {getattr(self, name)}; every value must be at least 1"
                )

    def _check_names(self) -> None:
        if not self.target_modules:
            raise UserError(
                "model.lora.target_modules is empty; set all-linear or a list of module names"
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise UserError(
                "model.lora.layers_to_transform needs model.lora.target_modules as a list of module"
                " names"
            )
        if isinstance(self.init_lora_weights, str) and not _INIT.fullmatch(self.init_lora_weights):
            raise UserError(
                f"model.lora.init_lora_weights is {self.init_lora_weights!r}; set true, false,"
                " gaussian, orthogonal, olora, pissa or pissa_niter_N"
            )

    def _check_experts(self) -> None:
        """Refuses what adapters on experts do not have."""
        defaults = {"lora_dropout": 0.0, "use_dora": False}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                raise UserError(
                    f"model.lora.{name} is {getattr(self, name)}, which adapters on experts do not"
                    f" have: set it to {default}, or model.lora.target_experts to false"
                )
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise UserError(
                f"model.lora.init_lora_weights is {self.init_lora_weights}, which adapters on"
                " experts do not have: set it to true or gaussian, or model.lora.target_experts to"
                " false"
            )
