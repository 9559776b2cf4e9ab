from .record import AdapterRecord as AdapterRecord
