from .measure import measure_plasticity as measure_plasticity
