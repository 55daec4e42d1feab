"""Options that several commands share: their types and their help."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class EngineName(str, Enum):
    """What generates the answers."""

    auto = "auto"
    vllm = "vllm"
    transformers = "transformers"


Model = Annotated[
    Path,
    typer.Argument(
        help="A Hugging Face folder, verl's checkpoint …/global_step_N, or the folder of a run's checkpoints "
        "(trainer.default_local_dir): the newest whole one counts."
    ),
]
Data = Annotated[list[Path], typer.Option(help="A parquet file in verl's format; may be repeated.")]
AnswersFolder = Annotated[Path, typer.Option(help="Folder for answers and results; the same command continues there.")]
Answers = Annotated[int, typer.Option(help="Answers per question: the k of Acc@k.")]
TopP = Annotated[float, typer.Option(help="1.0 turns it off.")]
TopK = Annotated[int, typer.Option(help="-1 turns it off.")]
MaxTokens = Annotated[int, typer.Option(help="Length limit of an answer, in tokens.")]
Seed = Annotated[int, typer.Option(help="Each answer gets a seed of its own, derived from this one.")]
Engine = Annotated[EngineName, typer.Option(help="What generates the answers. auto: vLLM if it is installed.")]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        help="The template of the training: 'paper', 'worked', a Jinja file or Jinja text. Default: the "
        "tokenizer's own."
    ),
]
Tokenizer = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="A folder with the tokenizer, if the model's has none.")
]
Dtype = Annotated[str, typer.Option(help="Of the weights: auto (as stored), bfloat16, float16 or float32.")]
Merged = Annotated[
    Path | None, typer.Option(help="Where to keep the Hugging Face folder made from a sharded checkpoint.")
]
BatchSize = Annotated[int, typer.Option(help="Answers generated at once (engine transformers).")]
TensorParallel = Annotated[int, typer.Option(help="GPUs per copy of the model (engine vllm).")]
VllmArguments = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="A further argument of vllm.LLM; may be repeated.")
]
MinCount = Annotated[
    int, typer.Option(min=1, help="The tables of highest and lowest entropy show tokens seen this often or more.")
]
Scores = Annotated[
    list[str] | None,
    typer.Option(
        "--score",
        metavar="NAME",
        help="A score to show beside the built-in ones: a function of yours, package.module:function. May be repeated.",
    ),
]
