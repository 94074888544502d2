from .endpoint import Endpoint as Endpoint
from .engine import Engine as Engine
from .engine import HeldOutSampling as HeldOutSampling
from .engine import Place as Place
from .engine import Sampling as Sampling
from .vllm_engine import VLLMEngine as VLLMEngine
