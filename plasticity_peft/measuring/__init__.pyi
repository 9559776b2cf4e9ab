from .forecast import forecast_finetuning as forecast_finetuning
from .head import fit_head as fit_head
from .measure import measure_plasticity as measure_plasticity
