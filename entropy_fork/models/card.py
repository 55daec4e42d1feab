"""The card of a fetched model: what it is, what it is not, and where it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import entropy_fork

if TYPE_CHECKING:
    from entropy_fork.models.fetch import Wheel
    from entropy_fork.models.from_gguf import Facts

_CARD = """---
license: {licence}
base_model: {base_model}
library_name: transformers
---

# {title}, from four-bit weights

**These are not the published weights.** They are those of `{gguf}`, turned back into floats
({parameters:,} parameters). The file has the weights of the layers rounded to four bits, and the
embedding to eight. What the rounding lost stays lost: probabilities and entropies differ from those of
`{base_model}`. Do not report results of this model as results of that one.

| | |
|---|---|
| made by | `entropy-fork model fetch {name}`, entropy-fork {version} |
| from | the wheel `{package}` {package_version} of the Python package index |
| sha256 of the wheel | `{sha256}` |
| the file calls the model | {calls_itself} |
| stored there as | {formats} |
| stored here as | float32 |
| licence | {licence}; the text is in `LICENSE`, as it is in the wheel |

Two things differ from what transformers makes of the same file:

- `<|im_end|>` ends an answer, in the tokenizer, in `config.json` and in `generation_config.json`. Otherwise the
  tokenizer would say `<|im_start|>`, and an answer would never end.
- White space before a digit stays in one piece, as the kind `{pre_tokenizer}` in the file says.

The chat template is the one in the file.
"""


def card(model: Wheel, facts: Facts) -> str:
    """The text of README.md, in Markdown with the front matter that the hub reads."""
    from entropy_fork.models.from_gguf import PRE_TOKENIZER

    formats = ", ".join(f"{kind} ({count:,} parameters)" for kind, count in facts.formats.items())
    return _CARD.format(
        licence=facts.licence,
        base_model=model.base_model,
        title=model.title,
        gguf=model.gguf.rpartition("/")[2],
        parameters=facts.parameters,
        name=model.name,
        version=entropy_fork.__version__,
        package=model.package,
        package_version=model.version,
        sha256=model.sha256,
        calls_itself=facts.name,
        formats=formats,
        pre_tokenizer=PRE_TOKENIZER,
    )
