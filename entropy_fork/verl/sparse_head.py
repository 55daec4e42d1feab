"""The LM head only where the loss looks, in verl's FSDP engines: at response positions, or at those with a weight.

Hook: a mixin in front of the engines that ``engine.py`` registers. It extends ``forward_step`` and the two methods that
``forward_step`` calls. A micro-batch without the flag :data:`HEAD` goes straight through. While a micro-batch with the
flag is under way, two parts of the model change:

- A forward hook of the decoder hands on only the hidden states of the wanted positions. Whatever computes logits from
  them, the model's own head or one of verl's fused ones, then does it for these positions.
- The head, a linear layer, returns log-probabilities instead of logits. They must be computed *inside* the model's
  forward pass, because only there FSDP has gathered the head's weight.

transformers' ``logits_to_keep`` cannot replace the hook: it keeps the same columns in every padded row, and verl's
fused forward passes ignore it. It cannot replace the head's forward either: the log-prob pass must not hold the logits
of all response tokens.

The results are put back to their positions, so they have verl's shapes. At a position that the loss must not look at,
the old log-probability is filled in: a ratio of 1.

**On-policy the ratio is 1.** Both passes compute a log-probability as verl's dense pass does: by verl's own function
and in verl's order of roundings. Logits are in the model's type; they are divided in that type by the temperature,
rounded to it. So with unchanged weights a new log-probability equals the old one, whichever of the passes were sparse.

**Entropies that a mask looks at** are computed here in every pass of a masked run, in dense passes as well: in float32,
from the logits that the log-probabilities are made of. So the same policy gives the same entropies and the same mask.
(verl's own entropies have 16 bits on a CPU, and another formula on a GPU.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from verl.utils import tensordict_utils as tu
from verl.utils.torch_functional import logprobs_from_logits

from entropy_fork.common.errors import EntropyForkError, process_name
from entropy_fork.common.verl_types import StockEngine
from entropy_fork.core.entropy import entropies
from entropy_fork.core.lm_head import (
    CHUNK,
    FEWEST_ROWS,
    ROWS_KEPT,
    in_chunks,
    logits_of,
    padded_positions,
    response_positions,
)
from entropy_fork.verl import policy_loss
from entropy_fork.verl.config import NODE

if TYPE_CHECKING:
    Base = StockEngine
else:
    Base = object  # engine.py puts the mixin in front of verl's own methods

#: the flag that the trainer sends with a batch: where the head is wanted
HEAD = "entropy_fork_head"
#: its values: at every position, at those of the responses, at those with a token weight that is not 0
EVERYWHERE, AT_RESPONSES, AT_KEPT = "everywhere", "responses", "kept"

#: verl's flag: compute Σπ², the sum of the squared probabilities of all tokens, in the log-prob pass
SUM_PI_SQUARED = "calculate_sum_pi_squared"

#: in verl's ``output_args``: the positions in the packed sequence that the head was computed at
HEAD_POSITIONS = "entropy_fork_head_positions"

#: in verl's model output, for a mask that is made in the loss: entropies of verl's shapes, detached
ENTROPY_OF_MASK = "entropy_fork_entropy"


class RowsOfHead:
    """Replaces the LM head's forward pass in a causal LM. It is idle unless ``rows`` is set.

    Attributes:
        rows: int64, shape (num_rows,): which positions of the decoder's flattened output the head computes.
        labels: int64, shape (num_rows,): the token that follows each of these positions.
        temperature: T, which logits are divided by.
        log_probs: what the head returned last, shape (1, num_rows, 1).
        entropy: the entropies of these rows, float32, shape (num_rows,); None in a pass with gradients.
        sum_pi_squared: the sums of the squared probabilities of these rows, float32, shape (num_rows,); None in a pass
            with gradients, and if nobody asked.
        with_sum_pi_squared: whether a pass without gradients computes it.
    """

    def __init__(self, model: Any) -> None:
        self.rows: Tensor | None = None
        self.labels: Tensor | None = None
        self.temperature = 1.0
        self.log_probs: Tensor | None = None
        self.entropy: Tensor | None = None
        self.sum_pi_squared: Tensor | None = None
        self.with_sum_pi_squared = False
        self._head = model.get_output_embeddings()
        self._dense = self._head.forward
        self._head.forward = self._forward
        model.get_decoder().register_forward_hook(self._select)

    def forget(self) -> None:
        """Be idle again."""
        self.rows = self.labels = self.log_probs = self.entropy = self.sum_pi_squared = None
        self.with_sum_pi_squared = False

    @staticmethod
    def unsuitable(model: Any) -> str | None:
        """Why the head cannot compute single rows, or None. Only a head that computes ``x @ weight.T`` can."""
        if hasattr(model.config, "vision_config"):
            return "a vision model has its own forward pass"
        head = model.get_output_embeddings()
        name = type(head).__name__
        if not isinstance(head, nn.Linear) or head.bias is not None:
            return f"its LM head is a {name}, not a linear layer without a bias"
        if type(head).forward is not nn.Linear.forward or "forward" in vars(head):
            return f"its LM head, a {name}, has a forward pass of its own"
        hooks = [*head._forward_pre_hooks.values(), *head._forward_hooks.values()]
        if parametrize.is_parametrized(head) or not all(_is_of_fsdp(hook) for hook in hooks):
            return f"its LM head, a {name}, has a hook or a parametrization"
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
        arguments = hidden.squeeze(0), self._head.weight, self.labels, self.temperature
        if torch.is_grad_enabled():
            log_probs = log_probs_with_gradient(*arguments)
        else:
            log_probs, self.entropy, *more = log_probs_and_entropy(*arguments, self.with_sum_pi_squared)
            self.sum_pi_squared = more[0] if more else None
        self.log_probs = log_probs.view(1, -1, 1)
        return self.log_probs


def log_probs_with_gradient(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the labels, as verl's dense pass computes them.

    Keeps the logits of up to :data:`ROWS_KEPT` rows. If there are more rows, computes the logits again in the backward
    pass, :data:`ROWS_KEPT` rows at once. The gradient of the weight is a sum over these chunks. Each addition rounds,
    so large chunks are better than small ones.

    Args:
        hidden: float, shape (num_rows, hidden_size).
        weight: same type, shape (vocabulary, hidden_size).
        labels: int64, shape (num_rows,).
        temperature: T, which logits are divided by.

    Returns:
        Shape (num_rows,), nats.
    """

    def log_probs(hidden: Tensor, labels: Tensor) -> Tensor:
        return logprobs_from_logits(_scaled(logits_of(hidden, weight), temperature), labels)

    if len(hidden) <= ROWS_KEPT:
        return log_probs(hidden, labels)
    parts = zip(hidden.split(ROWS_KEPT), labels.split(ROWS_KEPT), strict=True)
    return torch.cat([checkpoint(log_probs, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def log_probs_and_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, with_sum_pi_squared: bool = False
) -> tuple[Tensor, ...]:
    """The same log-probabilities without a gradient, and the entropies of the whole distributions (the paper's Eq. 1).

    An entropy is the difference of two numbers around 20. bfloat16 has steps of 0.125 there, so the entropy is computed
    from the same logits in float32 or better.

    Args:
        hidden: float, shape (num_rows, hidden_size), one row or more.
        weight: same type, shape (vocabulary, hidden_size).
        labels: int64, shape (num_rows,).
        temperature: T, which logits are divided by.
        with_sum_pi_squared: whether to compute Σπ² too.

    Returns:
        Two tensors of shape (num_rows,), nats; the entropies in float32 (float64 for such input). If asked, Σπ² in the
        same type, a number in (0, 1], as a third.
    """

    def measure(make: Callable[[], Tensor], labels: Tensor) -> tuple[Tensor, ...]:
        logits = _scaled(make(), temperature)
        log_probs = logprobs_from_logits(logits, labels)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not with_sum_pi_squared:
            return log_probs, entropies(logits)
        squared = torch.softmax(logits, dim=-1).square_().sum(-1)
        return log_probs, entropies(logits), squared

    return in_chunks(measure, hidden, weight, labels)


def _scaled(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """verl's ``_scale_logits_by_temperature`` (workers/engine/fsdp/transformer_impl.py), in place.

    Args:
        logits: shape (num_rows, vocabulary).
        temperature: T, a number, or float32 of shape (num_rows,).
    """
    if not isinstance(temperature, Tensor):
        if temperature == 1.0:
            return logits
        # A tensor, not a Python number: on a GPU torch would multiply by the number's inverse.
        temperature = torch.full((1,), temperature, dtype=torch.float32, device=logits.device)
    return logits.div_(temperature.clamp(min=1e-8).to(logits.dtype).unsqueeze(-1))


class SparseHead(Base):
    """Mixin in front of verl's FSDP engine with an LM head.

    Attributes:
        selects_in_loss: whether a mask is made in the loss, which needs :data:`ENTROPY_OF_MASK` in the model's output.
    """

    selects_in_loss = False
    _rows_of_head: RowsOfHead | None = None
    _where: str | None = None
    _said: tuple[str, ...] = ()

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool
    ) -> Any:
        """verl's forward step, with the LM head only at the positions that the batch names."""
        self._where = self._where_wanted(micro_batch)
        if self._where == AT_KEPT and loss_function is not None:
            loss_function = policy_loss.seeing_kept_only(loss_function)
        try:
            return super().forward_step(micro_batch, loss_function, forward_only)
        finally:  # also after an error, because the next call of the model may not go through this method
            self._where = None
            if self._rows_of_head is not None:
                self._rows_of_head.forget()

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """verl's inputs. Also tells the head which rows to compute."""
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)
        if self._rows_of_head is None:
            return model_inputs, output_args
        self._rows_of_head.rows = None
        if self._where is not None:
            following = output_args["input_ids_rmpad_rolled"]
            positions = self._local(micro_batch, self._where, len(following))
            if not len(positions):  # Every rank must run the head: here at position 0, whose result is not used.
                positions = positions.new_zeros(1)
            output_args[HEAD_POSITIONS] = positions
            if _is_fused(micro_batch):  # verl's own products, see core/lm_head.py: FEWEST_ROWS
                positions = torch.cat([positions, positions[:1].expand(max(0, FEWEST_ROWS - len(positions)))])
            self._rows_of_head.rows = _in_output(positions, micro_batch, model_inputs["input_ids"].shape[1])
            self._rows_of_head.labels = following[positions]
            self._rows_of_head.temperature = float(micro_batch["temperature"])
            self._rows_of_head.with_sum_pi_squared = _wants(micro_batch, SUM_PI_SQUARED)
            if _is_fused(micro_batch):
                model_inputs["shift_labels"] = self._rows_of_head.labels.unsqueeze(0)
        return model_inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        """verl's outputs. If the head computed only some rows, all positions are filled: same names, same shapes."""
        if HEAD_POSITIONS in output_args:
            return self._of_some_rows(output, output_args, micro_batch)
        is_wanted = tu.get_non_tensor_data(micro_batch, key="calculate_entropy", default=False)
        is_pass = is_wanted and HEAD in micro_batch and not torch.is_grad_enabled()
        if not is_pass and not self.selects_in_loss:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        # Let verl compute entropies only for an entropy bonus, or in its fused kernels, which make no logits.
        is_fused = _is_fused(micro_batch)
        micro_batch = micro_batch.copy()
        tu.assign_non_tensor(micro_batch, calculate_entropy=is_fused or (is_wanted and not is_pass))
        model_output = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        if is_fused:
            entropy = model_output["entropy"].detach() if is_wanted else model_output.pop("entropy").detach()
        else:
            entropy = self._entropy(output.logits, output_args, micro_batch)
        model_output["entropy" if is_pass else ENTROPY_OF_MASK] = entropy
        return model_output

    def _of_some_rows(self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict) -> dict[str, Tensor]:
        """The head's log-probabilities, and entropies if wanted, put back to their positions in the whole batch."""
        head = self._rows_of_head
        assert head is not None
        if _is_fused(micro_batch):
            log_probs, entropy = output.log_probs.squeeze(0), output.entropy.squeeze(0)
        else:
            log_probs, entropy = output.logits.view(-1), head.entropy
            if head.log_probs is None or output.logits.data_ptr() != head.log_probs.data_ptr():
                raise EntropyForkError(
                    f"the model does something to its logits after the LM head (a soft cap, a scale), which "
                    f"{NODE}.sparse_head does not know, in {process_name()}. Write {NODE}.sparse_head=false."
                )
        squared = head.sum_pi_squared
        head.forget()
        positions = output_args[HEAD_POSITIONS]
        model_output = {"log_probs": self._everywhere(log_probs, positions, output_args, micro_batch)}
        if self._where == AT_KEPT:
            model_output["log_probs"] = _with_old_elsewhere(model_output["log_probs"], micro_batch)
        if tu.get_non_tensor_data(micro_batch, key="calculate_entropy", default=False):
            assert entropy is not None
            model_output["entropy"] = self._everywhere(entropy, positions, output_args, micro_batch)
        if squared is not None:
            model_output["sum_pi_squared"] = self._everywhere(squared, positions, output_args, micro_batch)
        return model_output

    @torch.no_grad()
    def _entropy(self, logits: Tensor, output_args: dict[str, Any], micro_batch: TensorDict) -> Tensor:
        """Entropies at response positions, from the logits of all positions; 0 elsewhere."""
        positions = self._local(micro_batch, AT_RESPONSES, len(output_args["input_ids_rmpad_rolled"]))
        rows = _in_output(positions, micro_batch, logits.shape[1])
        if "temperature_rmpad" in output_args:
            temperature = output_args["temperature_rmpad"][positions]
        else:
            temperature = output_args["temperature"][rows // logits.shape[1]]
        logits = logits.flatten(0, 1)
        parts = zip(rows.split(CHUNK), temperature.split(CHUNK), strict=True)
        entropy = torch.cat([entropies(_scaled(logits[part], t)) for part, t in parts])
        return self._everywhere(entropy, positions, output_args, micro_batch)

    def _where_wanted(self, micro_batch: TensorDict) -> str | None:
        """Where the batch wants the head; None for every position.

        Also None if this worker cannot compute single positions. The reason is printed once.
        """
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
        needed = ("response_mask", "rollout_is_weights") if where == AT_KEPT else ("response_mask",)
        if missing := [name for name in needed if name not in micro_batch]:
            return f"the batch has no {missing[0]}"
        if _wants(micro_batch, "distillation_use_topk"):
            return "distillation_use_topk needs it"
        if _wants(micro_batch, SUM_PI_SQUARED) and (where == AT_KEPT or _is_fused(micro_batch)):
            return f"{SUM_PI_SQUARED} needs it"
        if isinstance(micro_batch["temperature"], Tensor):
            return "each sample has a temperature of its own"
        if self._rows_of_head is None:
            model = _causal_lm(self.module)
            if reason := RowsOfHead.unsuitable(model):
                return reason
            self._rows_of_head = RowsOfHead(model)
        return None

    def _local(self, micro_batch: TensorDict, where: str, num_local: int) -> Tensor:
        """The wanted positions in this rank's part of the packed sequence: all of it without sequence parallelism."""
        wanted = _wanted(micro_batch, where)
        if not self.use_ulysses_sp:
            return wanted
        wanted = wanted - num_local * self.ulysses_device_mesh["sp"].get_local_rank()
        return wanted[(wanted >= 0) & (wanted < num_local)]

    def _everywhere(
        self, values: Tensor, positions: Tensor, output_args: dict[str, Any], micro_batch: TensorDict
    ) -> Tensor:
        """Values at these positions, 0 at all others, of all sequence-parallel ranks; nested as the input.

        Args:
            values: float, shape (num_positions or more,); those beyond ``num_positions`` are dropped.
            positions: int64, shape (num_positions,), in this rank's part of the packed sequence.
            output_args: verl's, from :meth:`prepare_model_inputs`.
            micro_batch: verl's micro-batch.
        """
        zeros = values.new_zeros(len(output_args["input_ids_rmpad_rolled"]))
        everywhere = zeros.index_put((positions,), values[: len(positions)])
        if "pad_size" in output_args:  # if not, verl padded the rows, and these values have no padding
            everywhere = self._gather_and_unpad_packed(everywhere, output_args["pad_size"])
        return torch.nested.nested_tensor_from_jagged(everywhere, micro_batch["input_ids"].offsets())


def _wanted(micro_batch: TensorDict, where: str) -> Tensor:
    """The wanted positions in the packed sequence, ascending: int64, shape (num_positions,)."""
    mask: Any = micro_batch["response_mask"]
    positions = response_positions(micro_batch["input_ids"].offsets(), mask.offsets().diff())
    if where == AT_RESPONSES:
        return positions
    return positions[(micro_batch["rollout_is_weights"].values() != 0) & mask.values().bool()]


def _in_output(positions: Tensor, micro_batch: TensorDict, width: int) -> Tensor:
    """Where packed positions are in the model's output of shape (rows, width, …), flattened to (rows * width, …)."""
    if tu.get_non_tensor_data(micro_batch, key="use_remove_padding", default=True):
        return positions
    return padded_positions(positions, micro_batch["input_ids"].offsets(), width)


def _with_old_elsewhere(log_probs: Any, micro_batch: TensorDict) -> Tensor:
    """These log-probabilities at kept positions, the old ones at other response positions: a ratio of 1; nested."""
    values, old = log_probs.values(), micro_batch["old_log_probs"].values()
    everywhere = old.new_zeros(len(values)).index_put((_wanted(micro_batch, AT_RESPONSES),), old)
    is_kept = torch.zeros_like(everywhere, dtype=torch.bool)
    is_kept[_wanted(micro_batch, AT_KEPT)] = True
    return torch.nested.nested_tensor_from_jagged(torch.where(is_kept, values, everywhere), log_probs.offsets())


def _wants(micro_batch: TensorDict, flag: str) -> bool:
    return bool(tu.get_non_tensor_data(micro_batch, key=flag, default=False))


def _is_fused(micro_batch: TensorDict) -> bool:
    return _wants(micro_batch, "use_fused_kernels")


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def _causal_lm(module: Any) -> Any:
    """The model without FSDP's and PEFT's wrappers."""
    module = getattr(module, "_fsdp_wrapped_module", module)
    return module.get_base_model() if hasattr(module, "peft_config") and hasattr(module, "get_base_model") else module
