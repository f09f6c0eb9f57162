"""Small trainable parts hooked into a frozen model: attach, detach, save, load.

The model's own modules, classes and forwards stay as they are. `attach` registers one submodule,
`model.fastalign_adapter`, and hooks; `detach` removes both.
"""

from fastalign.adapters._adapter import NAME as NAME
from fastalign.adapters._adapter import Adapter as Adapter
from fastalign.adapters._adapter import adapter_of as adapter_of
from fastalign.adapters._adapter import attach as attach
from fastalign.adapters._adapter import detach as detach
from fastalign.adapters._adapter import disabled as disabled
from fastalign.adapters._config import AdapterConfig as AdapterConfig
from fastalign.adapters._config import adapter_parameters as adapter_parameters
from fastalign.adapters._config import upper_half as upper_half
from fastalign.adapters._files import CONFIG as CONFIG
from fastalign.adapters._files import FORMAT as FORMAT
from fastalign.adapters._files import WEIGHTS as WEIGHTS
from fastalign.adapters._files import load_adapter as load_adapter
from fastalign.adapters._files import save_adapter as save_adapter
