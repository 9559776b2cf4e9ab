from .sampler import Batches as Batches
from .sampler import Pairs as Pairs
from .sampler import Sampler as Sampler
from .sampler import SingleImages as SingleImages
