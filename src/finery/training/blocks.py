"""BAdam's two optimizers, fitted to a run: what is frozen stays frozen, what they print is logged, and their state can be saved."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from badam import BlockOptimizer, BlockOptimizerRatio  # type: ignore[import-untyped]
from torch import Tensor, nn

from finery.errors import UserError
from finery.log import get_logger
from finery.training.optimizers.base import Setting

log = get_logger(__name__)


@contextlib.contextmanager
def _logged(is_wanted: bool) -> Iterator[None]:
    """The package prints; that goes to the log, or nowhere."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        yield
    if is_wanted:
        for line in said.getvalue().splitlines():
            log.info("BAdam: %s", line)


class Layers(BlockOptimizer):
    """One layer after the other, with fp32 copies of its weights."""

    def __init__(self, base: torch.optim.Optimizer, trained: list[tuple[str, nn.Parameter]], decayed: frozenset[str], how: Any) -> None:
        self.decayed = decayed
        with _logged(how["verbose"] > 0), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fp32 weights, which the caller tells in our words
            super().__init__(base_optimizer=base, named_parameters_list=trained, **how)
        del self.state_dict  # the package puts its base's there, which knows nothing of blocks

    def switch_trainable_params(self, verbose: int | None = None) -> None:
        """The next block; `badam_verbose` counts, where the package always prints."""
        self.active = self.current_block_idx
        with _logged(self.verbose > 0):
            super().switch_trainable_params(self.verbose)

    def _switch_trainable_params_single_gpu(self, verbose: int | None = None) -> None:
        super()._switch_trainable_params_single_gpu(verbose)
        # the package lets norms decay, and takes the decay from the base's defaults
        decays, stays = self.base_optimizer.param_groups
        decays["params"] = [self.param_idx2hp[place] for place in self._places(True)]
        stays["params"] = [self.param_idx2hp[place] for place in self._places(False)]
        stays["weight_decay"] = 0.0

    def _places(self, decays: bool) -> list[int]:
        return [place for place in self.param_idx2hp if (self.named_parameters_list[place][0] in self.decayed) is decays]

    def _grad_to_hp(self, clear_lp_grads: bool = True) -> None:
        for weight in self.param_idx2lp.values():
            if weight.grad is None:  # an expert to which no token went
                weight.grad = torch.zeros_like(weight)
        super()._grad_to_hp(clear_lp_grads)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The block's state and fp32 weights, and whose turn it is."""
        return {
            "base": self.base_optimizer.state_dict(),
            "weights": list(self.param_idx2hp.values()),
            "lr": self.param_groups[0]["lr"],  # from which each step takes it
            "step": self.global_step,
            "active": self.active,
            "next": self.current_block_idx,
            "order": getattr(self, "block_order", []),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Goes to the block that was trained, and takes up its state."""
        if state_dict["active"] >= self.block_num:
            raise ValueError(f"it holds the state of block {state_dict['active']}, and there are {self.block_num}")
        self.current_block_idx = state_dict["active"]
        self.switch_trainable_params()
        self.base_optimizer.load_state_dict(state_dict["base"])
        for group in self.param_groups:
            group["lr"] = state_dict["lr"]
        with torch.no_grad():
            for weight, kept in zip(self.param_idx2hp.values(), state_dict["weights"], strict=True):
                weight.copy_(kept)
        self.global_step, self.current_block_idx = state_dict["step"], state_dict["next"]
        if self.switch_mode == "random":
            self.block_order = list(state_dict["order"])


class Shares(BlockOptimizerRatio):
    """A share of each matrix after the other."""

    def _generate_mask_scatter(self, param: Tensor, ratio: float, offset: int) -> Tensor:
        with torch.random.fork_rng(devices=[param.device] if param.is_cuda else []):  # the package seeds the run's own dice
            return super()._generate_mask_scatter(param, ratio, offset)

    @property
    def _marks(self) -> list[dict[str, Any]]:
        return [self.sparse_dict[weight] for _, weight in self.named_parameters_list]

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """With what tells which entries are trained."""
        masks = [[list(shape), mask.coalesce().indices()] for shape, mask in self.mask_dict.items() if mask is not None]
        marks = [[mark["offset"], mark["seed"]] for mark in self._marks]
        return {"base": super().state_dict(), "step": self.global_step, "marks": marks, "masks": masks}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """As it was saved."""
        super().load_state_dict(state_dict["base"])
        self.global_step = state_dict["step"]
        for mark, (offset, seed) in zip(self._marks, state_dict["marks"], strict=True):
            mark |= {"offset": offset, "seed": seed}
        weights = {tuple(weight.shape): weight for _, weight in self.named_parameters_list}
        self.mask_dict = {}
        for shape, places in state_dict["masks"]:
            like = weights[tuple(shape)]
            ones = torch.ones(places.shape[1], device=like.device, dtype=like.dtype)
            self.mask_dict[like.shape] = torch.sparse_coo_tensor(places.to(like.device), ones, like.shape)


def layer_blocks(model: nn.Module, setting: Setting, how: dict[str, Any]) -> Layers:
    """Layers one after the other; raises `UserError` where there is no such layer, or none."""
    trained = _trained(model)
    # a fused step's own state would not follow when the block changes
    arguments = {name: value for name, value in setting.arguments.items() if name != "fused"}
    base = torch.optim.AdamW([weight for _, weight in trained], weight_decay=setting.weight_decay, **arguments)
    blocks = BlockOptimizer.infer_param_groups(None, [name for name, _ in trained], False, False)  # type: ignore[arg-type]
    start = how["start_block"]
    if not blocks:
        raise UserError("'use_badam' needs a model whose weights lie in numbered layers; 'badam_mode: ratio' needs none")
    if start is not None and start >= len(blocks):
        raise UserError(f"'badam_start_block' should be below {len(blocks)}, the number of blocks that are trained, found {start}")
    if any(weight.dtype == torch.float32 for _, weight in trained):
        log.warning("BAdam saves most memory with weights in half precision ('pure_bf16' or 'bf16'); these are fp32")
    return Layers(base, trained, setting.decayed, how | {"block_prefix_list": blocks})


def shares(model: nn.Module, setting: Setting, how: dict[str, Any]) -> Shares:
    """A share of each matrix."""
    torch.sparse.check_sparse_tensor_invariants.disable()  # as they are anyway; torch warns where nobody says so
    trained = _trained(model)
    names = [name for name, _ in trained]
    # without a weight of that name the package has nothing to leave out, and fails
    absent = {f"include_{key}": not any(word in name for name in names) for key, word in (("embedding", "embed"), ("lm_head", "lm_head"))}
    arguments = {name: setting.arguments[name] for name in ("lr", "betas", "eps")}
    return Shares([{"params": [weight for _, weight in trained]}], trained, verbose=0, **how, **absent, **arguments)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
