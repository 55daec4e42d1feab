"""test_stock.py runs this: it gives command lines to main_ppo, up to the moment at which Ray would start.

It reads a JSON list of command lines, and writes a JSON list of verdicts: the config of the training, or the error.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import verl.trainer.main_ppo as main_ppo
from omegaconf import OmegaConf

HYDRA = ["hydra.output_subdir=null", "hydra.run.dir=.", "hydra/job_logging=none", "hydra/hydra_logging=none"]


def verdict(line: list[str]) -> dict[str, Any]:
    started = []
    main_ppo.run_ppo = lambda config, task_runner_class: started.append((config, task_runner_class))
    sys.argv = [main_ppo.__file__, *line, *HYDRA]
    try:
        main_ppo.main()
    except BaseException as error:
        return {"error": type(error).__name__, "message": str(error)}
    ((config, runner),) = started
    return {"config": OmegaConf.to_yaml(config), "runner": type(runner).__name__}


if __name__ == "__main__":
    lines = json.loads(sys.argv[1])
    sys.modules["__main__"] = main_ppo  # the program that our search path plugin and Hydra see
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions as they are
    result = {
        "active": "entropy_fork.verl.plugin" in sys.modules,
        "verdicts": [verdict(line) for line in lines],
    }
    sys.__stderr__.write("\nVERDICTS " + json.dumps(result) + "\n")
