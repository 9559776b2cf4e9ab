from . import adapters as adapters
from . import card as card
from . import checkpoints as checkpoints
from . import cli as cli
from . import components as components
from . import criteria as criteria
from . import errors as errors
from . import files as files
from . import images as images
from . import measuring as measuring
from . import optimizers as optimizers
from . import report as report
from . import saved as saved
from .adapters import PlasticityCallback as PlasticityCallback
from .adapters import PlasticityConfig as PlasticityConfig
from .adapters import load_adapter as load_adapter
from .adapters import load_pretrained as load_pretrained
from .components import BlockLayout as BlockLayout
from .components import find_components as find_components
from .components import register_architecture as register_architecture
from .criteria import register_criterion as register_criterion
from .errors import PlasticityError as PlasticityError
from .measuring import fit_head as fit_head
from .measuring import measure_plasticity as measure_plasticity
from .optimizers import create_plasticity_optimizer as create_plasticity_optimizer
from .report import PlasticityReport as PlasticityReport

__version__: str
