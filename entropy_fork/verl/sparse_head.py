"""The LM head where the loss looks, in verl's FSDP engines: at response positions, or at those with a weight.

Hook: a mixin in front of the engines that ``engine.py`` registers; ``forward_step`` and the two methods that it calls
are extended, and a micro-batch without the flag :data:`HEAD` goes straight through. In the model nothing is replaced
but, while such a micro-batch is under way, what the LM head returns:

- a forward hook of the decoder hands on the hidden states of the wanted positions alone, so whatever computes logits
  from them, the model's own head or verl's fused ones, does it for these rows;
- the head, a linear layer, then returns log-probabilities in the place of logits: they must be computed *inside* of the
  model's forward pass, where FSDP has its weight gathered.

Scattered back to all positions the results look as verl's do. What a loss must not look at has the old log-probability,
a ratio of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import linear
from verl.utils import tensordict_utils as tu

from entropy_fork.core.head import ROWS_KEPT, log_probs_and_entropy, padded_positions, response_positions
from entropy_fork.verl import policy_loss
from entropy_fork.verl.config import NODE
from entropy_fork.verl.errors import EntropyForkError, process_name

#: what the trainer sends with a batch: where the head is wanted
HEAD = "entropy_fork_head"
EVERYWHERE, RESPONSES, KEPT = "everywhere", "responses", "kept"


class RowsOfHead:
    """What is installed in a causal LM: idle, unless ``rows`` is set.

    Attributes:
        rows: int64, shape (num_wanted,): positions in the decoder's flattened output.
        labels: int64, shape (num_wanted,).
        temperature: T.
        result: what the head returned last, shape (1, num_wanted, 1 or 2).
    """

    def __init__(self, model: Any) -> None:
        self.rows: Tensor | None = None
        self.labels: Tensor | None = None
        self.temperature = 1.0
        self.result: Tensor | None = None
        self._head = model.get_output_embeddings()
        self._dense = self._head.forward
        self._head.forward = self._forward
        model.get_decoder().register_forward_hook(self._select)

    @staticmethod
    def unsuitable(model: Any) -> str | None:
        """Why this model's head cannot be asked for single rows; None where it can."""
        if hasattr(model.config, "vision_config"):
            return "a model that sees has its own forward pass"
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            return f"its LM head is a {type(head).__name__}, not a linear layer without a bias"
        return None

    def _select(self, decoder: nn.Module, inputs: Any, output: Any) -> Any:
        if self.rows is None:
            return output
        if getattr(output, "last_hidden_state", None) is None:
            raise EntropyForkError(
                f"{NODE}.sparse_head finds no last_hidden_state in what {type(decoder).__name__} returns, in "
                f"{process_name()}. Write {NODE}.sparse_head=false."
            )
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[self.rows].unsqueeze(0)
        return output

    def _forward(self, hidden: Tensor) -> Tensor:
        if self.rows is None:
            return self._dense(hidden)
        assert self.labels is not None
        rows, weight = hidden.squeeze(0), self._head.weight
        if torch.is_grad_enabled():
            columns = [log_probs_with_gradient(rows, weight, self.labels, self.temperature)]
        else:
            columns = list(log_probs_and_entropy(rows, weight, self.labels, self.temperature))
        self.result = torch.stack([column.unsqueeze(0) for column in columns], dim=-1)
        return self.result


def log_probs_with_gradient(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the labels, by verl's own functions.

    Up to :data:`ROWS_KEPT` rows as in its ordinary path (utils/torch_functional.py: logprobs_from_logits), which keeps
    the logits; more by its fused head (utils/experimental/torch_functional.py), which keeps none.

    Args:
        hidden: float, shape (num_rows, hidden_size).
        weight: same type, shape (vocabulary, hidden_size).
        labels: int64, shape (num_rows,).
        temperature: T, which logits are divided by.

    Returns:
        Shape (num_rows,), nats.
    """
    if len(hidden) > ROWS_KEPT:
        from verl.utils.experimental.torch_functional import FusedLinearForPPO

        log_probs, _ = FusedLinearForPPO()(hidden, weight, labels, temperature)
        return log_probs
    from verl.utils.torch_functional import logprobs_from_logits

    logits = linear(hidden, weight)
    if temperature != 1.0:
        logits = logits / temperature
    return logprobs_from_logits(logits, labels)


class SparseHead:
    """Mixin in front of verl's FSDP engine with an LM head."""

    _rows_of_head: RowsOfHead | None = None
    _where: str | None = None
    _said: tuple[str, ...] = ()

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool
    ) -> Any:
        """verl's, with the head only where the batch says."""
        self._where = self._where_wanted(micro_batch)
        if self._where == KEPT and loss_function is not None:
            loss_function = policy_loss.seeing_kept_only(loss_function)
        return super().forward_step(micro_batch, loss_function, forward_only)  # type: ignore[misc]

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """verl's, and for the head the rows that are wanted of it."""
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)  # type: ignore[misc]
        if self._rows_of_head is None:
            return model_inputs, output_args
        self._rows_of_head.rows = None
        if self._where is not None:
            is_packed = tu.get_non_tensor_data(micro_batch, key="use_remove_padding", default=True)
            offsets = micro_batch["input_ids"].offsets()
            following = output_args["input_ids_rmpad_rolled"]
            # Under sequence parallelism a rank has a part of the packed sequence. One that has none of the wanted
            # positions still needs a row, for its part in the gradient: 0, which nothing looks at.
            wanted = _wanted(micro_batch, self._where) - self._first_position(len(following))
            wanted = wanted[(wanted >= 0) & (wanted < len(following))]
            positions = wanted if len(wanted) else wanted.new_zeros(1)
            rows = positions
            if not is_packed:
                rows = padded_positions(positions, offsets, model_inputs["input_ids"].shape[1])
            self._rows_of_head.rows, self._rows_of_head.labels = rows, following[positions]
            self._rows_of_head.temperature = float(micro_batch["temperature"])
            output_args[HEAD] = positions
            if _is_fused(micro_batch):
                model_inputs["shift_labels"] = self._rows_of_head.labels.unsqueeze(0)
        return model_inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        """verl's, of verl's shapes; of a head that saw some rows, the same for all positions."""
        if HEAD not in output_args:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)  # type: ignore[misc]
        assert self._rows_of_head is not None
        columns = self._columns(output, _is_fused(micro_batch))
        self._rows_of_head.rows = self._rows_of_head.result = None
        log_probs = self._everywhere(columns[0], output_args)
        if self._where == KEPT:
            log_probs = _with_old_elsewhere(log_probs, micro_batch)
        offsets = micro_batch["input_ids"].offsets()
        model_output = {"log_probs": torch.nested.nested_tensor_from_jagged(log_probs, offsets)}
        if tu.get_non_tensor_data(micro_batch, key="calculate_entropy", default=False):
            entropy = self._everywhere(columns[1], output_args)
            model_output["entropy"] = torch.nested.nested_tensor_from_jagged(entropy, offsets)
        return model_output

    def _where_wanted(self, micro_batch: TensorDict) -> str | None:
        """What the batch asks for; None for every position, also where this worker cannot do it, which is said once."""
        where = tu.get_non_tensor_data(micro_batch, key=HEAD, default=EVERYWHERE)
        if where == EVERYWHERE:
            return None
        reason = self._reason_against(micro_batch, where)
        if reason is None:
            return where
        if reason not in self._said:
            self._said = (*self._said, reason)
            print(f"entropy_fork: the LM head sees every position in {process_name()}: {reason}", flush=True)
        return None

    def _reason_against(self, micro_batch: TensorDict, where: str) -> str | None:
        needed = ("response_mask", "rollout_is_weights") if where == KEPT else ("response_mask",)
        if missing := [name for name in needed if name not in micro_batch]:
            return f"the batch has no {missing[0]}"
        settings = ["calculate_sum_pi_squared", "distillation_use_topk"]
        if where == KEPT:
            settings.append("calculate_entropy")
        for name in settings:
            if tu.get_non_tensor_data(micro_batch, key=name, default=False):
                return f"{name} needs it"
        if isinstance(micro_batch["temperature"], Tensor):
            return "each sample has a temperature of its own"
        if self._rows_of_head is None:
            model = _causal_lm(self.module)  # type: ignore[attr-defined]
            if reason := RowsOfHead.unsuitable(model):
                return reason
            self._rows_of_head = RowsOfHead(model)
        return None

    def _first_position(self, num_local: int) -> int:
        """Where this rank's part of the packed sequence begins."""
        if not self.use_ulysses_sp:  # type: ignore[attr-defined]
            return 0
        return num_local * self.ulysses_device_mesh["sp"].get_local_rank()  # type: ignore[attr-defined]

    def _columns(self, output: Any, is_fused: bool) -> list[Tensor]:
        """Log-probabilities and perhaps entropies of the wanted rows."""
        assert self._rows_of_head is not None
        if is_fused:
            return [output.log_probs.squeeze(0), output.entropy.squeeze(0)]
        result = self._rows_of_head.result
        if result is None or output.logits.data_ptr() != result.data_ptr() or output.logits.shape != result.shape:
            raise EntropyForkError(
                f"the model does something to its logits after the LM head (a soft cap, a scale), which "
                f"{NODE}.sparse_head does not know, in {process_name()}. Write {NODE}.sparse_head=false."
            )
        return list(output.logits.squeeze(0).unbind(-1))

    def _everywhere(self, values: Tensor, output_args: dict[str, Any]) -> Tensor:
        """Values at the wanted positions as values at all positions, 0 elsewhere; over all sequence-parallel ranks."""
        zeros = values.new_zeros(len(output_args["input_ids_rmpad_rolled"]))
        everywhere = zeros.index_put((output_args[HEAD],), values)
        if "pad_size" not in output_args:  # rows were padded, and the values are not
            return everywhere
        return self._gather_and_unpad_packed(everywhere, output_args["pad_size"])  # type: ignore[attr-defined]


def _wanted(micro_batch: TensorDict, where: str) -> Tensor:
    """Positions in the packed sequence, ascending."""
    mask: Any = micro_batch["response_mask"]
    positions = response_positions(micro_batch["input_ids"].offsets(), mask.offsets().diff())
    if where == RESPONSES:
        return positions
    return positions[(micro_batch["rollout_is_weights"].values() != 0) & mask.values().bool()]


def _with_old_elsewhere(log_probs: Tensor, micro_batch: TensorDict) -> Tensor:
    """The old log-probability where the head was not asked, as if the policy had not moved there."""
    responses, kept = _wanted(micro_batch, RESPONSES), _wanted(micro_batch, KEPT)
    old = log_probs.new_zeros(len(log_probs))
    old[responses] = micro_batch["old_log_probs"].values().to(old.dtype)
    is_kept = torch.zeros_like(old, dtype=torch.bool)
    is_kept[kept] = True
    return torch.where(is_kept, log_probs, old)


def _is_fused(micro_batch: TensorDict) -> bool:
    return bool(tu.get_non_tensor_data(micro_batch, key="use_fused_kernels", default=False))


def _causal_lm(module: Any) -> Any:
    """The model under FSDP's and PEFT's wrappers."""
    module = getattr(module, "_fsdp_wrapped_module", module)
    return module.get_base_model() if hasattr(module, "peft_config") and hasattr(module, "get_base_model") else module
