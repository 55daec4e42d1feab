"""The text around a question: what is in the data, and what the chat template adds.

The paper's prompt is ``User:\\n[question]\\n`` + the instruction + ``\\n\\nAssistant:\\n``. verl always sends messages
through a chat template, so the prompt is made in two places: the data have the question and the instruction, as the
user's message; the chat template of ``recipes/template/paper.yaml`` adds the rest. The same data therefore also work
with the model's own chat template.
"""

from __future__ import annotations

import re

from omegaconf import OmegaConf

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.recipes import preset_names, recipes_dir

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

#: where a template of the user's own puts the question
PLACE = "{question}"

#: Instructions that ask for another form of the answer than a box. With ours beside it a model could follow either one.
OTHER_FORM = re.compile(
    r"""Answer:\s*\\?\$\\?Answer\b|own line after ["“']Answer:?["”']|(?:after|behind|following) ["“'`]?####""",
    re.IGNORECASE,
)


def user_message(question: str, template: str = INSTRUCTION) -> dict[str, str]:
    """The one chat message of a prompt.

    Args:
        question: the bare question.
        template: an instruction, which goes on a line behind the question; or a text with ``{question}`` in it. Empty:
            the question alone.
    """
    if PLACE in template:
        return {"role": "user", "content": template.replace(PLACE, question)}
    return {"role": "user", "content": f"{question}\n{template}" if template else question}


def asks_for_a_box(template: str) -> bool:
    """Whether a template asks for the form of answer that our reward looks for."""
    return "\\boxed" in template


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
