from .lora import Lora as Lora
from .model import Policy as Policy
from .model import load_config as load_config
from .model import load_model as load_model
from .model import load_tokenizer as load_tokenizer
from .reference import Reference as Reference
