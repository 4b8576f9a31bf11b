"""Data: from a path to arrays (`load`), to training data (`prepare`), in a defined order (`Order`).

`load.py` lists the formats.  A new one is a module with `matches` and `read` (see `base.py`) and a line
there; the tests of the contract then run over it by themselves.
"""

from distbp.data.augment import Crop, Flip, Noise, Transform, transforms
from distbp.data.base import Dataset, Options, Request, Source, Sources
from distbp.data.block_order import Blocks
from distbp.data.fingerprint import fingerprint
from distbp.data.load import BUILT_INS, SOURCES, has_columns, load
from distbp.data.memory import ArrayDataset
from distbp.data.order import Order
from distbp.data.parts import pack_datasets, unpack_datasets
from distbp.data.permutation import permute
from distbp.data.prepare import Prepared, prepare, treated
from distbp.data.preprocessing import Preprocessing
from distbp.data.read_ahead import ReadAhead
from distbp.data.rows import Rows
from distbp.data.shared import attach, pack
from distbp.data.split import split

__all__ = [
    "BUILT_INS",
    "SOURCES",
    "ArrayDataset",
    "Blocks",
    "Crop",
    "Dataset",
    "Flip",
    "Noise",
    "Options",
    "Order",
    "Prepared",
    "Preprocessing",
    "ReadAhead",
    "Request",
    "Rows",
    "Source",
    "Sources",
    "Transform",
    "attach",
    "fingerprint",
    "has_columns",
    "load",
    "pack",
    "pack_datasets",
    "permute",
    "prepare",
    "split",
    "transforms",
    "treated",
    "unpack_datasets",
]
