from .record import AdapterDescription as AdapterDescription
