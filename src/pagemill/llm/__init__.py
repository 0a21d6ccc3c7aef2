"""The Python API: `LLM` and its sessions. Names and shapes are vLLM's where it has them."""

from pagemill.llm.api import LLM
from pagemill.llm.outputs import CompletionOutput, Logprob, RequestOutput, Timing
from pagemill.llm.session import Session

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "Session", "Timing"]
