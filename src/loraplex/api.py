"""The public names of loraplex, each once; `import loraplex` reads this file when the first of them is asked for."""

from loraplex.adapters.add import Add as Add
from loraplex.adapters.lora import LoRA as LoRA
from loraplex.adapters.magnitude import Magnitude as Magnitude
from loraplex.adapters.registry import Adapter as Adapter
from loraplex.allocation.alora import ALoRA as ALoRA
from loraplex.allocation.hetero import Hetero as Hetero
from loraplex.errors import UserError as UserError
from loraplex.models.loading import load_model as load_model
from loraplex.models.loading import load_tokenizer as load_tokenizer
from loraplex.objectives.echo import Echo as Echo
from loraplex.tuner.config import AdapterConfig as AdapterConfig
from loraplex.tuner.counting import print_trainable_parameters as print_trainable_parameters
from loraplex.tuner.drive import drive_allocation as drive_allocation
from loraplex.tuner.loading import load_adapter as load_adapter
