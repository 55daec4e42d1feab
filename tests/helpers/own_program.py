"""A program like those of verl's recipes: it has its own task runner, whose trainer derives from verl's.

It imports nothing of entropy_fork, and calls none of verl's functions that check a config.
"""

from __future__ import annotations

from typing import Any

import hydra
import ray
from omegaconf import DictConfig, OmegaConf
from verl.trainer.main_ppo import run_ppo
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, PPOTrainerSync


class OwnTrainer(PPOTrainerSync):  # type: ignore[misc]
    def on_init_end(self) -> None:
        super().on_init_end()
        print(f"{type(self).__name__} is what trains", flush=True)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        metrics["own/rows"] = len(batch)
        return super()._compute_advantage(batch, metrics)


@ray.remote
class OwnTaskRunner:
    def run(self, config: DictConfig) -> None:
        import transfer_queue

        config.transfer_queue.enable = True
        OmegaConf.resolve(config)
        transfer_queue.init(config.transfer_queue)
        trainer = OwnTrainer(config=config)
        trainer.init()
        agent_loop = AgentLoopManagerTQ.create(
            config=config,
            llm_client=trainer.get_llm_client(),
            teacher_client=trainer.get_teacher_client(),
            reward_loop_worker_handles=trainer.get_reward_handles(),
        )
        trainer.fit(agent_loop)
        transfer_queue.close()


@hydra.main(config_path="pkg://verl.trainer.config", config_name="ppo_trainer", version_base=None)
def main(config: DictConfig) -> None:
    run_ppo(config, task_runner_class=OwnTaskRunner)


if __name__ == "__main__":
    main()
