from .architecture import find_components as find_components
from .component import Component as Component
from .layouts import BlockLayout as BlockLayout
from .layouts import register_architecture as register_architecture
