"""Give each answer its own seed, made from the run, the step, the prompt and the answer's number in its group.

Hook: verl's registry of agent loops, chosen by ``actor_rollout_ref.rollout.agent.default_agent_loop``. Requests reach a
rollout server in any order, and any replica may serve them. So if a server's own generator drew the tokens, they would
differ from run to run. This agent loop sends a seed with each request. The rollout of ``cpu/rollout.py`` and vLLM both
draw an answer's tokens from this seed alone.
"""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from entropy_fork.core.randomness import seed_of

NAME = "seeded_single_turn"


def answer_seed(run_seed: int, step: int, raw_prompt: Any, index: Any, session: int) -> int:
    """A seed in [0, 2^63) for one answer.

    Args:
        run_seed: ``actor_rollout_ref.rollout.seed``.
        step: the training step that the prompt was drawn for.
        raw_prompt: the chat messages.
        index: the data set's index of the prompt, because two rows may have the same text.
        session: the answer's number in its group.
    """
    return seed_of(run_seed, step, list(raw_prompt), str(index), session)


class SeededSingleTurnAgentLoop(SingleTurnAgentLoop):
    """verl's single-turn agent loop, with a seed in the sampling parameters of each request."""

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        """verl's own ``run``, with the answer's seed added to ``sampling_params``."""
        seed = answer_seed(
            self.rollout_config.seed,
            int(kwargs["global_steps"]),
            kwargs["raw_prompt"],
            kwargs.get("index"),
            int(kwargs["session_id"]),
        )
        # A copy: verl shares one dict between the answers of a group.
        return await super().run({**sampling_params, "seed": seed}, priority=priority, **kwargs)


register(NAME)(SeededSingleTurnAgentLoop)
