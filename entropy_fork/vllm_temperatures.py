"""The path by which users name the processor in vLLM. The code is in ``entropy_fork/sampling/vllm_processor.py``."""

from entropy_fork.sampling.vllm_processor import NAME, TwoTemperaturesProcessor, extra_args

__all__ = ["NAME", "TwoTemperaturesProcessor", "extra_args"]
