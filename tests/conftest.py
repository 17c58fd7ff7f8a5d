"""The suite runs on the CPU, also where there is a GPU: there results are the same to the bit. See `test_cuda.py`."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
