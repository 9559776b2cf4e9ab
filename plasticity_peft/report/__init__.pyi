from .report import PlasticityReport as PlasticityReport
from .selection import Selection as Selection
