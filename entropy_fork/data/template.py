"""The text around a question: what is in the data, and what the chat template adds.

The paper's prompt is ``User:\\n[question]\\n`` + the instruction + ``\\n\\nAssistant:\\n``. verl always sends messages
through a chat template, so the prompt is made in two places: the data have the question and the instruction, as the
user's message; the chat template of ``recipes/template/paper.yaml`` adds the rest. The same data therefore also work
with the model's own chat template.
"""

from __future__ import annotations

from omegaconf import OmegaConf

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.recipes import preset_names, recipes_dir

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def user_message(question: str) -> dict[str, str]:
    """The one chat message of a prompt."""
    return {"role": "user", "content": f"{question}\n{INSTRUCTION}"}


def chat_template(name: str) -> str | None:
    """The Jinja chat template of an option of the Hydra group ``template``; None means the tokenizer's own.

    Raises:
        EntropyForkError: there is no such template.
    """
    known = preset_names("template")
    if name not in known:
        raise EntropyForkError(f"there is no template {name!r}; write one of {', '.join(known)}")
    recipe = OmegaConf.load(recipes_dir() / "template" / f"{name}.yaml")
    return OmegaConf.select(recipe, "actor_rollout_ref.model.custom_chat_template")
