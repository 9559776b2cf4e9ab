from .callback import PlasticityCallback as PlasticityCallback
from .config import PlasticityConfig as PlasticityConfig
from .loading import load_adapter as load_adapter
from .pretrained import load_pretrained as load_pretrained
