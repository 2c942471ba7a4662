"""The public names of loraplex, each once; `import loraplex` reads this file when the first of them is asked for."""

from loraplex.adapters.add import Add as Add
from loraplex.adapters.hydra import HydraLoRA as HydraLoRA
from loraplex.adapters.lora import LoRA as LoRA
from loraplex.adapters.magnitude import DoRA as DoRA
from loraplex.adapters.magnitude import Magnitude as Magnitude
from loraplex.adapters.prolora import PRoLoRA as PRoLoRA
from loraplex.adapters.registry import Adapter as Adapter
from loraplex.adapters.tied import TiedLoRA as TiedLoRA
from loraplex.adapters.xs import LoRAXS as LoRAXS
from loraplex.allocation.alora import ALoRA as ALoRA
from loraplex.allocation.hetero import HeteroLoRA as HeteroLoRA
from loraplex.errors import UserError as UserError
from loraplex.models.loading import load_model as load_model
from loraplex.models.loading import load_tokenizer as load_tokenizer
from loraplex.objectives.echo import EchoLoRA as EchoLoRA
from loraplex.training_hooks.allocation import start_allocation as start_allocation
from loraplex.tuner.adapter_loading import load_adapter as load_adapter
from loraplex.tuner.config import AdapterConfig as AdapterConfig
from loraplex.tuner.counting import print_trainable_parameters as print_trainable_parameters
