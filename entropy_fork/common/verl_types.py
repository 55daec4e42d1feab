"""What we use of verl's classes, written down for the type checker.

verl ships no types. Without this file the type checker would have to be silenced at every call of verl's own method.

Nothing in here runs. A mixin derives from :class:`StockTrainer` or :class:`StockEngine` only while types are checked;
when the program runs, its base is ``object``, because :func:`entropy_fork.verl.trainer.install` and the engines put the
mixins in front of verl's own classes. So these two are plain classes and not protocols: a type checker forbids to call
a protocol's method by ``super()``, and that call is what the mixins are made of.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tensordict import TensorDict
    from torch import Tensor


class BatchDescription(Protocol):
    """verl's ``KVBatchMeta``: which rows of the TransferQueue are a batch. The values are in the queue.

    Attributes:
        keys: one per row, ``{uid}_{session}_{output}``.
        tags: one per row; verl marks a padding row with ``is_padding``.
        partition_id: the part of the queue.
        fields: the names of what has been written for these rows.
        extra_info: what is sent to the workers with the batch, once for all rows.
    """

    keys: list[str]
    tags: list[dict[str, Any]]
    partition_id: str
    fields: list[str]
    extra_info: dict[str, Any]

    def __len__(self) -> int:
        """The number of rows."""
        ...


class StockTrainer:
    """verl's ``PPOTrainer`` (``verl/trainer/ppo/v1/trainer_base.py``), as far as our mixins use it.

    Attributes:
        config: the root, OmegaConf's.
        global_steps: the number of the training step, from 1.
        tokenizer: the model's.
        actor_rollout_wg: the worker group that trains the policy; there after ``_setup``.
        critic_wg: the worker group of the critic, where ``use_critic``.
        use_critic: whether there is one.
    """

    config: Any
    global_steps: int
    tokenizer: Any
    actor_rollout_wg: Any
    critic_wg: Any
    use_critic: bool

    def __init__(self, config: Any) -> None:
        raise NotImplementedError

    def _setup(self) -> None:
        """Start the workers."""
        raise NotImplementedError

    def _build_replay_buffer(self) -> Any:
        """Make what collects the answers."""
        raise NotImplementedError

    def _compute_old_log_prob(self, batch: BatchDescription, metrics: dict[str, Any]) -> BatchDescription:
        """The log-prob pass of the policy at the start of the step, which also writes the entropies."""
        raise NotImplementedError

    def _compute_ref_log_prob(self, batch: BatchDescription, metrics: dict[str, Any]) -> BatchDescription:
        """The log-prob pass of the reference policy."""
        raise NotImplementedError

    def _compute_advantage(self, batch: BatchDescription, metrics: dict[str, Any]) -> BatchDescription:
        """The advantages, written into the queue."""
        raise NotImplementedError

    def _update_actor(self, batch: BatchDescription, metrics: dict[str, Any]) -> BatchDescription:
        """The gradient steps on the batch, in the workers."""
        raise NotImplementedError

    def _save_checkpoint(self) -> None:
        raise NotImplementedError

    def _load_checkpoint(self) -> None:
        raise NotImplementedError


class StockEngine:
    """verl's FSDP engine with an LM head (``verl/workers/engine/fsdp/transformer_impl.py``), as far as we use it.

    Attributes:
        module: the model, wrapped by FSDP.
        mode: ``train`` or ``eval``; None outside of both.
        use_ulysses_sp: whether a sequence is split over several ranks.
        ulysses_device_mesh: the mesh of these ranks, dimension ``sp``.
        ulysses_sequence_parallel_size: how many they are; 1 if a sequence is not split.
    """

    module: Any
    mode: str | None
    use_ulysses_sp: bool
    ulysses_device_mesh: Any
    ulysses_sequence_parallel_size: int

    def get_data_parallel_group(self) -> Any:
        """The process group of the ranks that share a mini-batch."""
        raise NotImplementedError

    def eval_mode(self, **settings: Any) -> AbstractContextManager[Any]:
        """The context for passes without gradients."""
        raise NotImplementedError

    def train_batch(self, data: TensorDict, loss_function: Callable[..., Any]) -> Any:
        """One gradient step on a mini-batch."""
        raise NotImplementedError

    def infer_batch(self, data: TensorDict) -> Any:
        """One pass without gradients over a mini-batch."""
        raise NotImplementedError

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool
    ) -> Any:
        """The model and, if there is one, the loss on a micro-batch."""
        raise NotImplementedError

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments of the model; and what ``prepare_model_outputs`` needs to know of them."""
        raise NotImplementedError

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, Any]:
        """Log-probabilities and entropies, nested, from what the model returned."""
        raise NotImplementedError

    def _gather_and_unpad_packed(self, values: Tensor, pad_size: int) -> Tensor:
        """The packed values of all sequence-parallel ranks, without padding."""
        raise NotImplementedError
