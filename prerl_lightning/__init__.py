"""prerl-lightning: RL with verifiable rewards in pre-train and post-train space, on Lightning and vLLM.

Names are listed in __init__.pyi, and imported when they are asked for: `import prerl_lightning` loads no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
